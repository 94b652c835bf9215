"""The quickstart's rows {question, answer} as prompts."""

from __future__ import annotations

from typing import Any


def to_prompt(cfg: Any, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, list[str]]]:
    def transform_fn(example: dict[str, str], tokenizer: Any = None) -> dict[str, Any]:
        return {"prompt": [{"role": "user", "content": example["question"]}], "answer": example["answer"]}

    return transform_fn, {"remove_columns": ["question"]}
