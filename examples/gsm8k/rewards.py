"""GSM8K's transform and rewards, in the contracts of the YAML's `datasets[].type` and `trl.reward_funcs`."""

import random
import re

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def rand_reward_func(completions, **kwargs) -> list[float]:
    """A random number for each completion: for trying the plumbing, it teaches nothing."""
    return [random.uniform(0, 1) for _ in completions]


def correct_reward_func(completions, answer, **kwargs) -> list[float]:
    """1.0 where the last number of the reply equals the answer, 0.0 elsewhere."""
    return [
        float(last_number(reply[-1]["content"]) == float(right))
        for reply, right in zip(completions, answer, strict=True)
    ]


def last_number(text: str) -> float | None:
    """The last number written in `text`, thousands separators allowed; None where there is none."""
    numbers = NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None


def oai_gsm8k_transform(cfg, *args, **kwargs):
    """A row {question, answer} as one user message and the bare number after the last "####"."""

    def transform_fn(example, tokenizer=None):
        label = example["answer"].split("####")[-1].strip().replace(",", "")
        return {
            "prompt": [{"role": "user", "content": example["question"]}],
            "answer": label,
        }

    return transform_fn, {"remove_columns": ["question"]}
