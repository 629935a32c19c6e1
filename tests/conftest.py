"""How tests are collected; their fixtures are in shared_fixtures.py, which the process that only hands out tests does
not load."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch; processes that tests start have it too
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before onnxruntime, which some tests load before the package

import preloaded
import pytest
import shapes  # noqa: F401  before twotower
from heavy import mark_heavy

SLOW = (
    "test_experiment_options",
    "test_prepare",
    "test_connections",
    "test_milvus",
    "test_runs",
    "test_worker",
    "test_protocol",
    "test_embeddings",
    "test_distributed",
    "test_export",
    "test_app",
    "test_docs",
    "test_supervisor",
)
"""Files that take longest, which begin first."""

gc.disable()  # until all modules and tests are there


def pytest_configure(config: pytest.Config) -> None:
    """Start the process that others are forked from once for all workers of pytest-xdist; load the fixtures where tests
    run."""
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        preloaded.start_zygote()
    else:
        config.pluginmanager.import_plugin("shared_fixtures")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        mark_heavy(item)
    items.sort(key=lambda item: item.path.stem not in SLOW)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Leave modules and tests, hundreds of thousands of objects that stay, out of garbage collection, and look
    seldom."""
    gc.freeze()
    gc.set_threshold(10_000, 20)
    gc.enable()
