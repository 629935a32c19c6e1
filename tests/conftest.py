"""Fixtures of all tests."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch; processes that tests start have it too
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before onnxruntime, which some tests load before the package

import preloaded
import pytest
import shapes  # noqa: F401  before twotower
import torch
from messages import collected_messages
from object_server import ObjectServer, object_server, use
from worlds import CHECKERBOARD_SCHEMA, EVERYTHING_SCHEMA, checkerboard, everything

from twotower.config.experiment import Config
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.tables import Tables, check

SLOW = (
    "test_distributed",
    "test_embeddings",
    "test_protocol",
    "test_process",
    "test_connections",
    "test_export",
    "test_runs",
    "test_milvus",
)
"""Files that take longest, which begin first."""


def pytest_configure(config: pytest.Config) -> None:
    """Start the process that others are forked from once for all workers of pytest-xdist."""
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        preloaded.start_zygote()


HEAVY = (
    r"test_an_exported_tower_gives_the_vectors_of_the_model\[(?!bias|all of it|gates).*-attention\]",
    r"test_the_checkerboard_is_solved_through_every_branch\[.*-bf16\]",
    r"test_fault_G12_a_kill_at_any_point_leaves_the_old_run_or_the_new\[overwrite\]",
    r"test_both_methods_give_what_an_exact_index_gives\[server\]",
    r"test_tuning_reaches_the_target_with_the_least\[milvus (IVF_SQ8|HNSW)",
    r"test_rows_from_0_on_are_found_as_any_others\[milvus (?!FLAT)",
    r"test_a_saved_index_gives_the_same_and_goes_on\[milvus (?!FLAT)",
    r"test_fault_G4_more_connections_than_files_silence_nobody\[128-200-1\]",
    r"test_fault_G18_a_damaged_file_of_a_bundle_is_.*\[disk-6\]",
    r"test_a_run_with_memory_and_mined_candidates_stopped_at_any_step_.*\[causal",
    r"test_the_checkerboard_is_solved_by_every_tower_similarity_and_sampler\[0-",
    r"test_no_byte_depends_on_engine_or_sizes\[(?!random|time|column)",
    r"test_every_index_answers_a_table_as_it_answers_single_requests\[milvus-(?!plain)",
    r"test_a_config_names_kinds_of_ones_own_by_import_path",
)
"""Cases of matrices that cost much beside others of the same test: they are run by `make test-system`."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if re.match("|".join(HEAVY), item.name):
            item.add_marker(pytest.mark.system)
    items.sort(key=lambda item: item.path.stem not in SLOW)


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
