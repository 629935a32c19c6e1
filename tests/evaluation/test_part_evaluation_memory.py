"""Evaluations, comparisons and diagnoses of prepared data take memory that does not grow with the interactions."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

import twotower
from twotower import api, runs
from twotower.config.toml import parse_config
from twotower.model.two_tower import TwoTower
from twotower.runs import Run

MEASURED = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv.pop(1))
import torch
from held_memory import most_held
torch.set_num_threads(1)
import twotower
from twotower import api
from twotower.diagnostics import diagnose
from twotower.reports.compare import compare_runs
from twotower.retrieval.retriever import Retriever
from twotower.store.store import Store

def evaluate_store():
    with Store(Path(sys.argv[1], "../store")).current().lease() as bundle:
        api.evaluate_bundle(Retriever(bundle))

a, b = (twotower.load(sys.argv[1]) for _ in range(2))
work = {
    "evaluate the store": evaluate_store,
    "evaluate": lambda: api.evaluate(a),
    "compare": lambda: compare_runs(a, b, resamples=100),
    "doctor": lambda: diagnose(a),
}
print(json.dumps({name: most_held(work[name]) for name in work}))
"""


def untrained_run(folder: Path, n: int) -> Path:
    """A run on n prepared interactions of 20,000 users with 5,000 items, a fifth of them tested."""
    rng = np.random.default_rng(0)
    shard = {
        "user_id": rng.integers(0, 20_000, n),
        "item_id": (rng.random(n) ** 3 * 5_000).astype(np.int64),
        "liked": rng.random(n) < 0.6,
        "at": np.arange(n),
    }
    folder.mkdir()
    pl.DataFrame(shard).write_parquet(folder / "interactions.parquet")
    body: dict[str, Any] = {
        "data": {"interactions": str(folder / "interactions.parquet")},
        "split": {"kind": "time", "test": 0.2, "validation": 0.1},
        "negatives": {"random": 1},
        "evaluation": {"bootstrap": 20},
        "model": {"width": 4, "pairs": [{"user": {"layers": [4]}, "item": {"layers": [4]}}]},
        "train": {"device": "cpu", "monitor": "validation.auc"},
        "schema": {
            "label": "liked", "time": "at", "time_unit": "order",
            "features": [
                {"name": "user_id", "side": "user", "kind": "categorical"},
                {"name": "item_id", "side": "item", "kind": "categorical"},
                {"name": "liked_items", "side": "user", "kind": "sequence", "interactions": "positive"},
            ],
        },
    }  # fmt: skip
    schema, config = parse_config(body)
    data = api.prepare_folder(config, schema, folder / "prepared")
    torch.manual_seed(0)
    model = TwoTower(config.model, data.encoders.fields("user"), data.encoders.fields("item")).eval()
    history = [{"epoch": epoch, "step": 1, "train.loss": 0.7 - 0.01 * epoch} for epoch in (1, 2)]
    to = folder / "run"
    to.mkdir()
    runs.start_run(to, data, config)
    runs.save_run(to, Run(to, config, data, model, {"train.best_epoch": 1}, history))
    api.publish(twotower.load(to), folder / "store", force=True)
    return to


@pytest.mark.system  # a minute and a half
def test_fault_C7_prepared_interactions_beyond_memory_are_evaluated_compared_and_diagnosed_in_bounded_memory(
    tmp_path: Path,
) -> None:
    """Sixteen times the interactions take no more than a fifth more memory that cannot be given back."""
    found = {}
    for n in (200_000, 3_200_000):
        run = untrained_run(tmp_path / str(n), n)
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, str(Path(__file__).parents[1]), str(run)],
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found[n] = json.loads(done.stdout.splitlines()[-1])
    few, many = found.values()
    for job in few:
        assert many[job] < few[job] * 1.2 + 60, found
