from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails a test that looks up a host, even one that swallows the error."""
    asked: list[object] = []

    def refuse(host: object, *_: object) -> None:
        asked.append(host)
        raise OSError(f"the tests are offline, but {host} was looked up")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    assert asked == []
