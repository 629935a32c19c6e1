"""All ranks resume from the checkpoint of rank 0, wherever their disks are."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import preloaded
import pytest
import torch

from twotower.distributed import DistributedContext
from twotower.train.checkpoint import STATE, TENSORS, Checkpoint, Checkpoints, shared_checkpoint
from twotower.train.progress import TrainingProgress


class Part:
    """A part of a training of one tensor."""

    def __init__(self, value: float) -> None:
        self.value = torch.full((1000,), value)

    def state(self) -> dict[str, torch.Tensor]:
        return {"weight": self.value}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        self.value = state["weight"]


def save(folder: Path, *steps: int, value: float = 0.5) -> None:
    """Write checkpoints of some steps, whose tensors hold the step and a value."""
    for step in steps:
        written = Checkpoints(folder, {"model": Part(step + value)})
        written.fingerprint = {"seed": value}
        written.save(TrainingProgress(step=step))


RANK = """
import json, sys
from pathlib import Path
from twotower.distributed import DistributedContext
from twotower.errors import RunError
from twotower.train.checkpoint import shared_checkpoint

base, context, found = Path(sys.argv[1]), DistributedContext.from_environment(), {}
with context.process_group(timeout=60):
    for case in sys.argv[2:]:
        folders = [base / case / str(context.rank) / name for name in ("next", "run")]
        try:
            with shared_checkpoint(context, folders, chunk_bytes=1000) as one:
                weight = one and float(one.tensors["model/weight"][999])
                found[case] = one and [one.step, weight, one.fingerprint, str(one.path)]
        except RunError as e:
            found[case] = str(e)
(base / f"{context.rank}.json").write_text(json.dumps(found))
"""
CASES = ("none", "missing", "older", "other", "damaged", "beside", "same", "later", "alone")


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """What each of two ranks, with folders of its own, resumes from in each case."""
    base = tmp_path_factory.mktemp("ranks")

    def run(case: str, rank: int) -> Path:
        return base / case / str(rank) / "run"

    for case in set(CASES) - {"none", "alone"}:
        save(run(case, 0), 4, 8)
    save(run("older", 1), 2, 4)
    save(run("other", 1), 4, 8, value=0.25)  # of another training
    for case in ("damaged", "same"):
        save(run(case, 1), 4, 8)
    tensors = run("damaged", 1) / "step-000000008" / TENSORS
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"?")
    save(run("beside", 0).with_name("next"), 6)
    save(run("later", 1), 12)
    save(run("alone", 1), 12)
    codes, said = preloaded.run_ranks(2, "-c", RANK, base, *CASES, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert codes == [0, 0], said
    return base, [json.loads((base / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", ["missing", "older", "other", "damaged", "beside", "same"])
def test_every_rank_resumes_from_the_checkpoint_of_rank_0(
    resumed: tuple[Path, list[dict[str, Any]]], case: str
) -> None:
    base, found = resumed
    step = 6 if case == "beside" else 8
    paths = []
    for rank in range(2):
        *what, path = found[rank][case]
        assert what == [step, step + 0.5, {"seed": 0.5}]
        paths.append(Path(path))
    own = [path.is_relative_to(base / case / str(rank)) for rank, path in enumerate(paths)]
    assert own == [True, case == "same"], "what a rank has is read where it is"
    assert all(path.exists() for path, kept in zip(paths, own, strict=True) if kept)
    assert not any(path.parent.exists() for path, kept in zip(paths, own, strict=True) if not kept), "copies go"


def test_without_checkpoints_every_rank_starts(resumed: tuple[Path, list[dict[str, Any]]]) -> None:
    assert [found["none"] for found in resumed[1]] == [None, None]


@pytest.mark.parametrize(("case", "has"), [("later", "has one of step 8"), ("alone", "has none")])
def test_a_rank_that_is_further_than_rank_0_is_refused_on_all(
    resumed: tuple[Path, list[dict[str, Any]]], case: str, has: str
) -> None:
    for rank in range(2):
        said = str(resumed[1][rank][case])
        assert (
            f"run: rank 1 has a checkpoint of step 12, and rank 0, which writes them, {has} (this is rank {rank}, on"
            in said
        )
        assert "copy its run folder to the host of rank 0" in said


def test_one_process_resumes_from_its_own(tmp_path: Path) -> None:
    with shared_checkpoint(DistributedContext(), (tmp_path / "next", tmp_path / "run")) as found:
        assert found is None
    save(tmp_path / "run", 4)
    with shared_checkpoint(DistributedContext(), (tmp_path / "next", tmp_path / "run")) as found:
        assert isinstance(found, Checkpoint)
        assert found.path == tmp_path / "run" / "step-000000004"
        assert (found.path / STATE).exists()
