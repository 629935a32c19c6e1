"""Fixtures of the engines' tests."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest


@pytest.fixture
def held() -> Iterator[socket.socket]:
    """A port of this machine that nobody listens at, nor can as long as it is held."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held
