"""The token of the control plane: RLX_TOKEN, else a file that two terminals of one user share."""

from __future__ import annotations

import hmac
import os
import secrets
from pathlib import Path

from rlx.errors import ConfigError, ServiceError

TOKEN_VARIABLE = "RLX_TOKEN"


class Unauthorized(ServiceError):
    """The bearer token is missing or another one."""


def service_token() -> str:
    """RLX_TOKEN, else the content of ~/.rlx/token, which is made with mode 0600 on first use."""
    token = os.environ.get(TOKEN_VARIABLE, "").strip()
    if token:
        return token
    path = Path.home() / ".rlx" / "token"
    try:
        return _read(path) if path.exists() else _create(path)
    except OSError as error:
        raise ConfigError(
            f"cannot use {path} for the service's token: {error.strerror}; set {TOKEN_VARIABLE} instead"
        ) from error


def check_bearer(header: str | None, token: str | None) -> None:
    """Raise Unauthorized unless `header` is `Bearer <token>`; without a token nobody is let in."""
    scheme, _, given = (header or "").partition(" ")
    if token and scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), token.encode()):
        return
    raise Unauthorized(
        "this needs the header `Authorization: Bearer <token>`; the token is RLX_TOKEN, or the content of ~/.rlx/token "
        "of the user who started the service"
    )


def _read(path: Path) -> str:
    token = path.read_text().strip()
    if not token:
        raise ConfigError(f"{path} is empty; remove it, and the service makes a new one")
    return token


def _create(path: Path) -> str:
    """Write the whole file, then link it into place: whoever is second reads the first one's."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    draft = path.with_name(f"token.{os.getpid()}.{secrets.token_hex(4)}")
    draft.touch(mode=0o600, exist_ok=False)
    try:
        draft.write_text(secrets.token_urlsafe(32) + "\n")
        os.link(draft, path)
    except FileExistsError:
        pass
    finally:
        draft.unlink()
    return _read(path)
