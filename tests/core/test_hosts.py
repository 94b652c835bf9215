"""Which addresses stay on this machine."""

from __future__ import annotations

import pytest

from rlx.hosts import is_loopback


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.0.1", "::1"])
def test_loopback_names_and_addresses_stay_here(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", [None, "", "0.0.0.0", "::", "10.0.0.5", "localhost.example.com", "127.0.0.1.nip.io"])
def test_nothing_else_does(host: str | None) -> None:
    assert not is_loopback(host)
