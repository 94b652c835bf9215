"""What of a configuration may be shown to others: trackers, reports."""

from __future__ import annotations

import json
import re
from typing import Any

from pydantic import BaseModel

_SECRET_NAME = re.compile(r"(token|secret|password|passwd|api_?key|credentials?|authorization)$", re.IGNORECASE)
_USER_OF_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")
_QUERY_OF_URL = re.compile(r"(?<=://)([^?\s]*)\?\S+")


def shown_values(config: BaseModel) -> dict[str, str | int | float | bool]:
    """The configuration flat, by the YAML's keys, without what is None, and without what may be secret: the values of keys
    called token, password or the like, and the user and query of URLs."""
    flat: dict[str, Any] = {}

    def add(key: str, value: Any) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                add(f"{key}.{name}" if key else name, inner)
        elif isinstance(value, list):
            flat[key] = json.dumps(value, ensure_ascii=False)
        elif value is not None:
            flat[key] = value

    add("", without_secrets(config.model_dump(mode="json", by_alias=True)))
    return flat


def without_secrets(value: Any, name: str = "") -> Any:
    """`value`, JSON, of the key `name`, with `***` for what may be secret."""
    if value is not None and _SECRET_NAME.search(name):
        return "***"
    if isinstance(value, dict):
        return {key: without_secrets(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_secrets(inner) for inner in value]
    return _QUERY_OF_URL.sub(r"\1?***", _USER_OF_URL.sub("***", value)) if isinstance(value, str) else value
