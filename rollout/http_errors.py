"""Errors as HTTP answers, both ways: the service writes them, the client raises them again.

The body is `{"error": {"type": "<class of rlx.errors>", "message": "..."}}`.
"""

from __future__ import annotations

import json
from typing import Any

from rlx import errors
from rlx.errors import (
    ConfigError,
    DeadlineExceeded,
    GroupCancelled,
    ModelError,
    RequestRefused,
    RequestTooLong,
    RlxError,
    ServiceError,
    ServiceUnavailable,
    SessionReplaced,
    UserCodeError,
    WeightBaseMismatch,
    WeightSyncError,
    WireError,
)
from rlx.rollout.auth import Unauthorized
from rlx.rollout.groups import KeyConflict

SESSION_HEADER = "rlx-session"
"""Names the learner's session in its requests."""


class BodyTooLarge(WireError):
    """A request body above the limit."""


class UnsupportedBody(WireError):
    """A content type that is neither a frame nor JSON."""


_STATUS: dict[type[Exception], int] = {
    BodyTooLarge: 413,
    UnsupportedBody: 415,
    WireError: 400,
    ConfigError: 400,
    Unauthorized: 401,
    KeyConflict: 409,
    RequestRefused: 409,
    RequestTooLong: 422,
    GroupCancelled: 409,
    SessionReplaced: 409,
    UserCodeError: 422,
    WeightBaseMismatch: 409,
    WeightSyncError: 502,
    ServiceUnavailable: 503,
    DeadlineExceeded: 504,
    ModelError: 500,
    ServiceError: 500,
}
_PUBLIC: dict[str, type[RlxError]] = {
    name: value for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, RlxError)
}


def status_of(error: Exception) -> int:
    """The HTTP status of the nearest class that has one."""
    return next((_STATUS[cls] for cls in type(error).__mro__ if cls in _STATUS), 500)


def error_body(error: Exception) -> dict[str, Any]:
    """Classes that only the service knows go by the name of their public parent."""
    names = (cls.__name__ for cls in type(error).__mro__ if cls.__name__ in _PUBLIC)
    return {"error": {"type": next(names, "ServiceError"), "message": str(error)}}


def raise_answer(status: int, body: bytes, who: str) -> None:
    """Raise what an answer with an error status says; `who` answered it."""
    try:
        error = json.loads(body)["error"]
        name, message = error["type"], str(error["message"])
    except (ValueError, KeyError, TypeError):
        text = body[:200].decode(errors="replace")
        raise ServiceError(f"{who} answered HTTP {status}, and not as the rollout service does: {text}") from None
    if name == WireError.__name__:
        raise ServiceError(f"{who} could not read the request: {message}")
    raise _PUBLIC.get(name, ServiceError)(message)
