"""A training that is stopped in the search for the values of a start goes on behind what it has tried, to the same
bits."""

from __future__ import annotations

import logging
import math
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from worlds import settings

from twotower import api
from twotower.config.experiment import Config
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.split import SplitConfig
from twotower.data.tables import check
from twotower.errors import Interrupted
from twotower.features.categorical import Categorical
from twotower.features.schema import Schema
from twotower.features.sequence import Sequence
from twotower.runs import Run
from twotower.scorers.ials import Ials
from twotower.train.tried_starts import TRIED, TriedStarts

START = Ials.model_validate({"kind": "ials", "regularization": [0.1 + 0.2]})
OTHER = START.model_copy(update={"sweeps": 9})


def test_scores_are_kept_to_the_last_bit(tmp_path: Path) -> None:
    tried, score = TriedStarts(tmp_path / "checkpoints", {"a": 1}), 0.1 + 0.2
    assert tried.score(0, START) is None
    tried.add(0, START, score)
    tried.add(0, OTHER, -math.inf)
    again = TriedStarts(tmp_path / "checkpoints", {"a": 1})
    assert [again.score(0, one) for one in (START, OTHER)] == [score, -math.inf]
    assert again.score(0, OTHER.model_copy(update={"steps": 2})) is again.score(1, START) is None


def test_those_of_another_training_are_not_read(tmp_path: Path) -> None:
    TriedStarts(tmp_path, {"a": 1}).add(0, START, 0.5)
    other = TriedStarts(tmp_path, {"a": 2})
    assert other.score(0, START) is None
    other.add(0, OTHER, 0.25)
    assert TriedStarts(tmp_path, {"a": 1}).score(0, START) is None
    assert TriedStarts(tmp_path, {"a": 2}).score(0, OTHER) == 0.25


@pytest.mark.parametrize("folder", [True, False])
def test_without_a_folder_or_a_fingerprint_nothing_is_written(folder: bool, tmp_path: Path) -> None:
    tried = TriedStarts(tmp_path if folder else None, {} if folder else {"a": 1})
    tried.add(0, START, 0.5)
    assert tried.score(0, START) == 0.5
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    "text", ["", "[1]", '{"of": 1}', '{"of": "x", "scores": {"y": [1]}}', '{"of": "x", "scores": 3}']
)
def test_a_damaged_file_is_told_and_passed_over(text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / TRIED).write_text(text)
    tried = TriedStarts(tmp_path, {"a": 1})
    assert tried.score(0, START) is None
    assert "is damaged" in caplog.text
    tried.add(0, START, 0.5)
    assert TriedStarts(tmp_path, {"a": 1}).score(0, START) == 0.5


def world() -> tuple[Dataset, Config]:
    rng = np.random.default_rng(3)
    frame = pl.DataFrame({"user_id": rng.integers(0, 60, 900), "item_id": rng.integers(0, 40, 900)}).unique()
    frame = frame.sort("user_id", "item_id")
    history: dict[str, Any] = {"name": "h", "side": "user", "share_embedding": False, "pooling": "ridge"}
    schema = Schema(features=(Sequence.model_validate(history), Categorical(name="item_id", side="item")))
    form = {"kind": "ials", "width": 4, "unobserved": [0.03, 0.3], "regularization": [0.004, 0.032]}
    pair = {s: {"fields": [name], "layers": [], "width": 4} for s, name in (("user", "h"), ("item", "item_id"))}
    config = settings(
        model={"width": 4, "similarity": "dot", "bias": True, "temperature": 1.0, "pairs": [pair]},
        loss={"kind": "softmax"},
        negatives={"full": True},
        train={"epochs": 0, "solved": [form], "monitor": "validation.ndcg@5", "device": "cpu", "precision": "fp32"},
    )
    return build_dataset(check(None, None, frame, schema), schema, SplitConfig()), config


class After(logging.Handler):
    """Sends SIGINT with the line of the n-th value, and counts these lines."""

    def __init__(self, n: int) -> None:
        super().__init__(logging.INFO)
        self.n, self.count = n, 0

    def emit(self, record: logging.LogRecord) -> None:
        if "by ials: " in record.getMessage() and "validation.ndcg@5 = " in record.getMessage():
            self.count += 1
            if self.count == self.n:
                os.kill(os.getpid(), signal.SIGINT)


def tried(n: int, data: Dataset, config: Config, **options: Any) -> tuple[int, Run | None]:
    """Train, stop with the n-th value, and return the number of values that were tried, and the run unless it was
    stopped."""
    told, after = logging.getLogger("twotower"), After(n)
    before = told.level
    told.setLevel(logging.INFO)
    told.addHandler(after)
    run = None
    try:
        run = api.fit(data, data.schema, config, **options)
    except Interrupted:
        pass
    finally:
        told.removeHandler(after)
        told.setLevel(before)
    return after.count, run


def test_fault_B2_a_search_that_is_stopped_goes_on_behind_what_it_has_tried(tmp_path: Path) -> None:
    data, config = world()
    every, once = tried(0, data, config)
    folder = tmp_path / "run"
    counts = [tried(3, data, config, folder=folder)[0], tried(4, data, config, folder=folder, resume=True)[0]]
    last, run = tried(0, data, config, folder=folder, resume=True)
    assert (counts, sum(counts) + last) == ([3, 4], every)
    assert once
    assert run
    for (name, mine), theirs in zip(run.model.state_dict().items(), once.model.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name


@pytest.mark.parametrize("changed", [{"seed": 5}, {"monitor": "validation.recall@5"}])
def test_of_another_training_every_value_is_tried(changed: dict[str, Any], tmp_path: Path) -> None:
    data, config = world()
    sections = config.model_dump(mode="json")
    sections["train"] |= changed
    other, folder = Config.model_validate(sections), tmp_path / "run"
    assert tried(3, data, config, folder=folder) == (3, None)
    every, _ = tried(0, data, other)
    again, run = tried(0, data, other, folder=folder, resume=True)
    assert run
    assert again == every


def test_a_training_that_begins_anew_reads_no_scores(tmp_path: Path) -> None:
    data, config = world()
    assert tried(3, data, config, folder=tmp_path / "run") == (3, None)
    assert (tmp_path / "run" / "checkpoints" / TRIED).is_file()
    every, _ = tried(0, data, config)
    assert tried(0, data, config, folder=tmp_path / "run", overwrite=True)[0] == every
