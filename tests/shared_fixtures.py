"""Fixtures of all tests."""

from __future__ import annotations

import copy
import functools
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from hypothesis import HealthCheck, settings
from messages import collected_messages
from object_server import ObjectServer, object_server, use
from worlds import CHECKERBOARD_SCHEMA, EVERYTHING_SCHEMA, checkerboard, everything

from twotower.config.experiment import Config
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.tables import check

# A busy machine draws examples slowly, which is no fault of a test.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")
_numbers = itertools.count()


@pytest.fixture
def tmp_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new folder, as pytest's, without a link to the newest folder of the test's name, which would be made again each
    time."""
    name = re.sub(r"\W", "_", request.node.name)[:30]
    path = tmp_path_factory.getbasetemp() / f"{name}-{next(_numbers)}"
    path.mkdir()
    return path


@pytest.fixture(scope="session", autouse=True)
def _certificates_are_read_once() -> Iterator[None]:
    """Every client of httpx reads them from the disk, also one that speaks no TLS."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("httpx._transports.default.create_ssl_context", functools.cache(httpx.create_ssl_context))
        yield


@pytest.fixture(scope="session", autouse=True)
def _disks_are_not_waited_for() -> Iterator[None]:
    """No test cuts the power, which alone shows what a flush is for; a full suite makes tens of thousands of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch, cache_folder: Path) -> None:
    """Tiny tensors are fastest on one thread; and no test may find the real archive or a kept one by accident."""
    torch.set_num_threads(1)
    monkeypatch.delenv("TWOTOWER_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_folder))


@pytest.fixture(scope="session")
def s3() -> Iterator[ObjectServer]:
    """A local S3 server."""
    with object_server() as server:
        yield server


@pytest.fixture
def bucket(s3: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a new bucket of the local S3 server, to which the environment points."""
    s3.let_happen()
    use(s3.address, monkeypatch)
    return f"s3://{s3.new_bucket()}"


@pytest.fixture
def messages() -> Iterator[list[str]]:
    """The messages of the library in a test; the list grows with each."""
    with collected_messages() as lines:
        yield lines


@functools.cache
def _board() -> Dataset:
    return build_dataset(check(*checkerboard(), CHECKERBOARD_SCHEMA), CHECKERBOARD_SCHEMA, Config().split)


@functools.cache
def _everything() -> Dataset:
    return build_dataset(check(*everything(), EVERYTHING_SCHEMA), EVERYTHING_SCHEMA, Config().split)


@pytest.fixture
def board() -> Dataset:
    """A copy, which a test may change."""
    return copy.deepcopy(_board())


@pytest.fixture
def everything_data() -> Dataset:
    """A copy, which a test may change."""
    return copy.deepcopy(_everything())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"
