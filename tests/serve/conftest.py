"""Fixtures of the service's tests."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from server_process import Start, serving
from service_client import Client, Make, clients
from worlds import EVERYTHING_SCHEMA, everything, settings

import twotower
from twotower.data.tables import check
from twotower.retrieval.retriever import Retriever
from twotower.serve import api_keys
from twotower.serve.user_events import InProcessEvents
from twotower.store.store import Store

GATED = {"layers": [8], "senet": {"enabled": True}}


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """The event loop of tests that are coroutines."""
    return "asyncio"


@pytest.fixture(scope="session")
def two_bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with two bundles of a small gated model that reads every kind of feature; the second is current.

    Never changed: a test that rolls back or damages works on a copy."""
    folder = tmp_path_factory.mktemp("two_bundles")
    tables = check(*everything(), EVERYTHING_SCHEMA)
    for epochs in (1, 2):
        config = settings(
            model={"width": 8, "pairs": [{"user": GATED, "item": GATED}]}, train={"epochs": epochs, "batch_size": 256}
        )
        run = twotower.fit(tables, EVERYTHING_SCHEMA, config, folder=folder / f"run{epochs}")
        twotower.publish(run, folder / "store")
    return folder / "store"


@pytest.fixture(scope="module")
def store(two_bundles: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the two bundles, for tests that change which is current and change it back."""
    return Path(shutil.copytree(two_bundles, tmp_path_factory.mktemp("served") / "store"))


@pytest.fixture
def make(store: Path) -> Iterator[Make]:
    """Services with settings of a test's own."""
    with clients(store) as make:
        yield make


@pytest.fixture
def client(make: Make) -> Client:
    """A service of a test's own, whose numbers begin at zero."""
    return make()


@pytest.fixture(scope="session")
def client_of_all(two_bundles: Path) -> Iterator[Client]:
    with clients(two_bundles) as make:
        yield make()


@pytest.fixture
def shared(client_of_all: Client) -> Client:
    """A service of all tests that neither change it nor read its numbers; without recent events."""
    service = client_of_all.service
    service.event_store = service._in_process = InProcessEvents()
    return client_of_all


@pytest.fixture(scope="module")
def retriever(store: Path) -> Retriever:
    return Retriever(Store(store).current())


@pytest.fixture
def key_file(tmp_path: Path) -> tuple[Path, str, str]:
    """A file of keys, a key to ask with, and an admin's."""
    (ask, ask_lines), (boss, boss_lines) = api_keys.make_key("shop", False), api_keys.make_key("boss", True)
    (tmp_path / "keys.toml").write_text(ask_lines + boss_lines)
    return tmp_path / "keys.toml", ask, boss


@pytest.fixture
def serve(store: Path) -> Iterator[Start]:
    """A function that starts services, which are stopped at the end of the test."""
    with serving(store) as start:
        yield start
