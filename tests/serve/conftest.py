"""Fixtures of the service's tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from worlds import EVERYTHING_SCHEMA, everything, settings

import twotower
from twotower.data.tables import check

GATED = {"layers": [8], "senet": {"enabled": True}}


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
