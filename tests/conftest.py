"""Fixtures of all tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from messages import collected_messages
from worlds import CHECKERBOARD_SCHEMA, EVERYTHING_SCHEMA, checkerboard, everything

from twotower.config import Config
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.tables import Tables, check


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tiny tensors are fastest on one thread; and no test may find the real archive or a kept one by accident."""
    torch.set_num_threads(1)
    monkeypatch.delenv("TWOTOWER_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def messages() -> Iterator[list[str]]:
    """The messages of the library in a test; the list grows with each."""
    with collected_messages() as lines:
        yield lines


@pytest.fixture
def board() -> Dataset:
    return build_dataset(check(*checkerboard(), CHECKERBOARD_SCHEMA), CHECKERBOARD_SCHEMA, Config().split)


@pytest.fixture
def everything_tables() -> Tables:
    return check(*everything(), EVERYTHING_SCHEMA)


@pytest.fixture
def everything_data(everything_tables: Tables) -> Dataset:
    return build_dataset(everything_tables, EVERYTHING_SCHEMA, Config().split)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"
