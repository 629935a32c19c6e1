"""Kinds of one's own, examples/mykinds: they train, evaluate, export, publish and serve, as instances and by import
path."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import httpx
import polars as pl
import preloaded
import pytest
from mykinds.branches import Mask, MaskBranch
from mykinds.carriers import Curved
from mykinds.datasets import Shop
from mykinds.features import Cyclic
from mykinds.indexes import Lsh
from mykinds.losses import Focal
from mykinds.metrics import Herfindahl, TailShare
from mykinds.negatives import Recent
from mykinds.optimizers import RmsProp
from mykinds.poolings import Recency
from server_process import Served

import twotower
from twotower import api
from twotower.config.experiment import Config
from twotower.config.toml import dump_config
from twotower.errors import RunError
from twotower.features.feature import Feature
from twotower.features.schema import Schema
from twotower.features.sequence import Sequence
from twotower.model.lowering import lower
from twotower.retrieval.retriever import Retriever
from twotower.runs import Run
from twotower.store.store import Store

ROOT = Path(__file__).resolve().parents[1]
SHOP = Shop(customers=60)


def schema_with(*features: Feature) -> Schema:
    """The shop's schema with histories pooled by learned recency, and more features."""
    history = Sequence(name="bought", side="user", interactions="positive", pooling=Recency(steps=4))
    own = [history if f.name == "bought" else f for f in Shop.table_schema.features]
    return Schema.model_validate(Shop.table_schema.model_dump() | {"features": (*own, *features)})


def tables() -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """The tables of the shop, with the hour of each customer."""
    shop = SHOP.load()
    hours = (shop.users["customer"] * 7 % 24).alias("hour")
    return shop.users.with_columns(hours), shop.items, shop.interactions


def settings() -> Config:
    """A config of instances."""
    tower = {"layers": [8], "branches": [MaskBranch(width=6), {"kind": "identity"}]}
    return Config.model_validate(
        {
            "model": {"width": 8, "pairs": [{"user": tower, "item": tower}]},
            "loss": Focal(gamma=1.5),
            "negatives": {"sources": (Recent(n=20),)},
            "train": {
                "optimizer": RmsProp(alpha=0.9), "epochs": 2, "batch_size": 256, "history_scope": "causal",
                "device": "cpu",
                "monitor": "validation.tail_share@5",
            },
            "evaluation": {"k": [5], "bootstrap": 0, "metrics": [TailShare(), Herfindahl()]},
            "index": Lsh(bits=256, min_recall=0.5),
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    schema = schema_with(Cyclic(name="hour", side="user"), Curved(name="value", side="item", column="price"))
    return twotower.fit(tables(), schema, settings(), folder=tmp_path_factory.mktemp("shop") / "run")


@pytest.fixture(scope="module")
def store(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shop") / "store"
    twotower.publish(run, folder)
    return folder


def test_the_checks_of_the_guide_pass_and_find_a_module_that_is_exported_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runpy.run_path(str(ROOT / "examples" / "check_kinds.py"), run_name="__main__")
    assert "test.tail_share@5" in capsys.readouterr().out
    monkeypatch.setattr(Mask, "lower", lambda self, g, x: lower(self.block, g, x))
    with pytest.raises(RunError, match="differ"):
        runpy.run_path(str(ROOT / "examples" / "check_kinds.py"), run_name="__main__")


def test_a_run_with_kinds_of_ones_own_is_trained_evaluated_and_loaded(run: Run) -> None:
    assert {"test.tail_share@5", "test.herfindahl@5", "test.recall@5"} <= run.metrics.keys()
    assert run.folder is not None
    loaded = twotower.load(run.folder)
    assert loaded.config == run.config
    assert loaded.dataset.schema == run.dataset.schema
    assert loaded.factors().users.equal(run.factors().users)
    measured = twotower.evaluate(loaded)
    assert {name: run.metrics[name] for name in measured} == measured
    report = (run.folder / "report.html").read_text(encoding="utf-8")
    assert "tail_share@5" in report


def test_a_bundle_with_kinds_of_ones_own_answers_as_its_run(run: Run, store: Path) -> None:
    retriever = Retriever(Store(store).current())
    assert retriever.index.kind == "mykinds.indexes:Lsh"
    user = str(run.dataset.users.ids[3])
    best = twotower.recommend(run, user, k=5).items
    exact = [retriever.recommend(twotower.Request(user), k=5, method=method).items for method in (1, 2)]
    for items in exact:
        assert {i.id for i in items} & {i.id for i in best}
    moved = [
        retriever.recommend(twotower.Request(features={"hour": hour}), k=5, method=2) for hour in (0.0, 12.0, 24.0)
    ]
    scores = [[i.score for i in answer.items] for answer in moved]
    assert scores[0] == pytest.approx(scores[2], abs=1e-5)
    assert scores[0] != pytest.approx(scores[1], abs=1e-5)
    assert api.evaluate_bundle(retriever)["index"]["tail_share@5"] > 0


# ---- by import path, in processes of their own


CODE = f"import sys; sys.path.insert(0, {str(ROOT / 'examples')!r}); from twotower.cli.app import main; main()"
"""The command line, where the examples are installed and not imported."""


def command(*words: str | Path, code: int = 0) -> str:
    """Run a command in a process of its own; return what it says."""
    done = preloaded.run("-c", CODE, *words, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_config_of_the_guide_trains(tmp_path: Path) -> None:
    config = ROOT / "examples" / "mykinds.toml"
    said = command("train", config, "--run", tmp_path / "run", "--set", "train.epochs=1")
    assert "recall@10" in said
    guide = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    assert f"```toml\n{config.read_text(encoding='utf-8')}```" in guide


def test_a_config_names_kinds_of_ones_own_by_import_path(tmp_path: Path) -> None:
    schema = schema_with(
        Cyclic(name="season", side="item", column="price", period=50), Curved(name="value", side="item", column="price")
    )
    data = {"dataset": {"kind": "mykinds.datasets:Shop", "customers": 60}}
    config = Config.model_validate(settings().model_dump(exclude_defaults=True) | {"data": data})
    path, folder, store = tmp_path / "shop.toml", tmp_path / "run", tmp_path / "store"
    path.write_text(dump_config(schema, config), encoding="utf-8")
    assert "mykinds.poolings:Recency" in path.read_text()
    command("train", path, "--run", folder)
    untrusted = "is code outside twotower, and mykinds.[a-z]+ is not imported; import it, or pass "
    assert re.search(f"{untrusted}--trust$", command("evaluate", folder, code=2))
    assert "tail_share@5" in command("evaluate", folder, "--trust", "--json")
    command("publish", folder, "--store", store, "--trust")
    ask: list[str | Path] = ["recommend", "--store", store, "--user", "3", "--json"]
    assert re.search(f"{untrusted}--kinds mykinds.indexes$", command(*ask, code=2))
    needed = [
        word for name in ("indexes", "features", "carriers", "poolings") for word in ("--kinds", f"mykinds.{name}")
    ]
    answer = json.loads(command(*ask, *needed))
    assert len(answer["items"]) == 10
    assert re.search(f"{untrusted}--kinds mykinds.features$", command("serve", "--store", store, *needed[:2], code=2))
    assert re.search(f"{untrusted}--kinds mykinds.metrics$", command("evaluate", store, *needed, code=2))
    assert "tail_share@5" in command("evaluate", store, *needed, "--kinds", "mykinds.metrics", "--json")
    service = Served(store, "--workers", "2", *needed, code=CODE)
    try:
        reply = httpx.post(f"{service.wait().url}/v1/recommend", json={"user_id": "3", "k": 10}, timeout=60).json()
        assert reply["items"] == answer["items"]
    finally:
        service.end()


def test_a_scorer_of_ones_own_is_trained_published_and_served_without_its_module(tmp_path: Path) -> None:
    (tmp_path / "shop.toml").write_text(
        """
        scorers = [{ kind = "mykinds.scorers:Together", width = 16 }]
        data = { dataset = { kind = "mykinds.datasets:Shop", customers = 60 } }
        model = { similarity = "dot" }
        train = { epochs = 0, monitor = "validation.recall@5" }
        evaluation = { k = [5], bootstrap = 0 }
        """
    )
    command("train", tmp_path / "shop.toml", "--run", tmp_path / "run")
    command("publish", tmp_path / "run", "--store", tmp_path / "store", "--trust")
    run = twotower.load(tmp_path / "run", trust=True)
    assert run.metrics["test.recall@5"] > run.metrics["baseline.popularity.recall@5"]
    service = Served(tmp_path / "store", "--workers", "1", code=CODE)
    try:
        reply = httpx.post(f"{service.wait().url}/v1/recommend", json={"user_id": "3", "k": 10}, timeout=60).json()
    finally:
        service.end()
    items = api.retriever(tmp_path / "store").recommend(twotower.Request("3"), k=10).items
    of_run = {item.id: item.score for item in twotower.recommend(run, "3", k=60).items}
    assert [item["id"] for item in reply["items"]] == [item.id for item in items]
    for found in ({item["id"]: item["score"] for item in reply["items"]}, {item.id: item.score for item in items}):
        assert found == pytest.approx({item: of_run[item] for item in found}, rel=1e-3, abs=1e-4)
