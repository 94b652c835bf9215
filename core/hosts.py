"""Which addresses are this machine's own."""

from __future__ import annotations

import ipaddress


def is_loopback(host: str | None) -> bool:
    """Whether `host`, a name or an address without port and brackets, never leaves this machine. Nothing is resolved:
    of names only `localhost` is one."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False
