"""What must hold on the real MovieLens 1M: `make test-real DATA=path/to/ml-1m.zip`."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import kill_points
import pytest

from twotower import api
from twotower.config.toml import load_config
from twotower.data.dataset import build_dataset
from twotower.data.datasets import movielens
from twotower.data.datasets.ml_1m import MovieLens1M
from twotower.data.tables import check
from twotower.retrieval.request import Request

pytestmark = pytest.mark.real
ROOT = Path(__file__).resolve().parents[1]
ARCHIVE = os.environ.get("TWOTOWER_DATA", "")


@pytest.fixture(autouse=True)
def archive(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    assert ARCHIVE, "TWOTOWER_DATA must name ml-1m.zip"
    monkeypatch.setenv("TWOTOWER_DATA", ARCHIVE)


def python(folder: Path, *arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_archive_is_what_the_papers_describe() -> None:
    raw = MovieLens1M().load()
    tables = check(raw.users, raw.items, raw.interactions, movielens.SCHEMA)
    assert (tables.users.height, tables.items.height, tables.interactions.height) == (6040, 3883, 1_000_209)
    assert 575_279 <= tables.interactions["__positive"].sum() <= 575_281
    dataset = build_dataset(
        tables, movielens.SCHEMA, load_config(ROOT / "examples" / "recipes" / "ranking.toml")[1].split
    )
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (720_150, 80_017, 200_042)


def test_the_teaching_projects_commands_reach_078(tmp_path: Path) -> None:
    shutil.copy(ROOT / "main.py", tmp_path)
    shutil.copytree(ROOT / "data_process", tmp_path / "data_process")
    for script in ("data_download.py", "data_processing.py"):
        python(tmp_path / "data_process" / "movie_len", script)
    flags = [
        "--data_path", "dataset/ml-1m/feature", "--model_path", "checkpont", "--epochs", "10", "--batch_size", "2048",
        "--dropout", "0.0", "--lr", "0.001", "--optimizer", "Adam", "--device", "gpu", "--encode_min", "0.0",
        "--neg_sampling", "5", "--use_senet", "True", "--whether_train",
    ]  # fmt: skip
    print(python(tmp_path, "main.py", *flags, "train"))
    shown = python(tmp_path, "main.py", *flags, "test")
    print(shown)
    assert float(shown.split("Test AUC:")[1]) >= 0.78


def test_the_ranking_example_reaches_its_goal() -> None:
    schema, config = load_config(ROOT / "examples" / "recipes" / "ranking.toml")
    tables, schema = api.read(config, schema)
    metrics = api.fit(tables, schema, config).metrics
    print({m: round(metrics[m], 4) for m in ("test.auc", "test.gauc", "validation.auc")})
    assert metrics["test.auc"] >= 0.8225
    assert metrics["test.gauc"] >= 0.775


VISITORS: dict[str, Request] = {
    "parallel": Request(None, {"gender": "F", "age": 25}),
    "dat": Request(None, {"gender": "F", "age": 25}),
    "recipes/sequence-long": Request(events=[("2571", True), ("589", True), ("1240", True)]),
    "title-search": Request(None, {"query": "terminater 2"}),
    "title-search-linear": Request(None, {"query": "terminater 2"}),
}


@pytest.mark.parametrize("name", VISITORS)
def test_an_example_is_killed_resumed_published_and_asked(name: str, tmp_path: Path) -> None:
    example, run, store = ROOT / "examples" / f"{name}.toml", tmp_path / "run", tmp_path / "store"
    train = ["train", str(example), "--run", str(run), "--set", "train.epochs=1", "--set", "train.checkpoint_steps=20"]
    killed = subprocess.run(
        [sys.executable, *kill_points.program("step:25"), *train], capture_output=True, text=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert "resuming after step 20" in python(tmp_path, "-m", "twotower", *train, "--resume")
    python(tmp_path, "-m", "twotower", "publish", str(run), "--store", str(store))
    asked = api.retriever(store)
    for user in (asked.user_ids[0], asked.user_ids[3000], asked.user_ids[-1]):
        one, two = (asked.recommend(Request(user), 10, method) for method in (1, 2))
        assert [i.id for i in one.items] == [i.id for i in two.items]
    answer = asked.recommend(VISITORS[name], 10, 2)
    assert (len(answer.items), answer.source) == (10, "cold_start")


def test_the_demo_is_best_in_every_column_of_its_tables(tmp_path: Path) -> None:
    shown = python(tmp_path, "-m", "twotower", "demo", "--run", "runs/demo")
    print(shown)
    for run, metrics in (
        ("demo", ("recall@10", "ndcg@10", "mrr@10", "hit_rate@10", "coverage@10")),
        ("demo-like", ("auc", "gauc")),
    ):
        found = json.loads((tmp_path / "runs" / run / "metrics.json").read_text())
        for metric in metrics:
            baselines = [n for n in found if n.startswith("baseline.") and n.endswith(f".{metric}")]
            assert len(baselines) >= 2
            assert found[f"test.{metric}"] > max(found[name] for name in baselines), metric
        assert found["train.peak_memory_mb"] < 4000
    assert shown.count(" 10. ") == 3
