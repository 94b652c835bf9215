"""An agent as anybody would write it with the `openai` package: it knows nothing of rlx.

It asks for a sum and checks the reply by casting out nines. When the check fails it says so and asks once more.
"""

from __future__ import annotations

from openai import OpenAI

MAX_TRIES = 2


def solve(base_url: str, api_key: str, question: str) -> str:
    """The answer to a question such as "47+38="."""
    client = OpenAI(base_url=base_url, api_key=api_key)
    messages = [{"role": "user", "content": question}]
    for _ in range(MAX_TRIES):
        completion = client.chat.completions.create(model="clerk", messages=messages, max_tokens=8)
        answer = completion.choices[0].message.content or ""
        if passes_check(question, answer):
            break
        messages += [
            {"role": "assistant", "content": answer},
            {"role": "user", "content": question},
        ]
    return answer


def passes_check(question: str, answer: str) -> bool:
    """Casting out nines: both sides leave the same remainder. Most wrong sums fail."""
    left, right = question.rstrip("=").split("+")
    return answer.isdecimal() and int(answer) % 9 == (int(left) + int(right)) % 9
