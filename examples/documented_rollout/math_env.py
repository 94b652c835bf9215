"""A rollout function of the documented shape, with its reward and its transform: step-by-step sums.

`tests/envs/test_legacy.py` runs the function as the documentation prints it. Here it asks for what the quickstart's
small model can say: its letters are lower case, and a step that ends in a number is the final answer.
"""

import re


def math_solver_rollout(model, processing_class, prompts, generation_config=None):
    """A list with one completion string for each of `prompts`, which are the messages and have the key 'messages'."""
    completions = []
    for prompt in prompts:
        messages = prompt.get("messages", [])
        formatted_prompt = processing_class.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        full_response = ""
        for _step in range(3):
            current_input = formatted_prompt + full_response
            inputs = processing_class(current_input, return_tensors="pt").to(model.device)
            outputs = model.generate(**inputs, max_new_tokens=8, generation_config=generation_config)
            step_text = processing_class.decode(outputs[0][inputs.input_ids.shape[1] :], skip_special_tokens=True)
            if re.search(r"\d$", step_text):
                full_response += step_text
                break
            full_response += step_text + "\n"
        completions.append(full_response)
    return completions


def math_reward(prompts, completions, answers, **kwargs):
    """1.0 where the last number of the completion is the answer. `answers` is the column `answer`."""
    rewards = []
    for completion, correct_answer in zip(completions, answers):  # noqa: B905  as the documentation writes it
        match = re.search(r"(\d+)$", completion)
        predicted = match.group(1) if match else ""
        rewards.append(1.0 if predicted == str(correct_answer) else 0.0)
    return rewards


def math_transform(cfg, *args, **kwargs):
    """A row {question, answer} as one user message and the column `answer`."""

    def transform_fn(example, processing_class=None):
        return {"prompt": [{"role": "user", "content": example["question"]}], "answer": str(example["answer"])}

    return transform_fn, {"remove_columns": ["question"]}
