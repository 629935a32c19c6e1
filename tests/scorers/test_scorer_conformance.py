"""What every kind of scorer must do: be trained, saved, evaluated, published and served, with one score everywhere."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from mykinds.scorers import Together
from service_client import clients
from worlds import replayed

from twotower import api, runs
from twotower.config.experiment import Config
from twotower.config.toml import parse_config
from twotower.data.splits import TEST
from twotower.features.schema import Schema
from twotower.index.exact import Exact
from twotower.retrieval.request import Method, Request
from twotower.retrieval.retriever import Retriever
from twotower.runs import Run
from twotower.scorers import SCORERS, AddedScorer
from twotower.scorers.scorer import TermScorer

N_USERS, N_ITEMS, K = 60, 40, 5
SCHEMA: dict[str, Any] = {
    "time": "at", "time_unit": "order", "duplicates": "keep",
    "features": [
        {"kind": "categorical", "side": "user", "name": "user_id"},
        {"kind": "categorical", "side": "item", "name": "item_id"},
        {"kind": "categorical", "side": "user", "name": "group"},
        {"kind": "categorical", "side": "item", "name": "shelf"},
    ],
}  # fmt: skip
METHODS: tuple[Method, ...] = (1, 2)


def tables() -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Users of a group take items of its shelves, and again what they have taken."""
    users = pl.DataFrame({"user_id": range(N_USERS), "group": [f"g{n % 5}" for n in range(N_USERS)]})
    items = pl.DataFrame({"item_id": range(N_ITEMS), "shelf": [f"s{n % 5}" for n in range(N_ITEMS)]})
    return users, items, replayed(N_USERS, N_ITEMS, 3000)


def settings_of(kind: type[AddedScorer]) -> tuple[Schema, Config]:
    """A model of the scorer alone; one that adds to others is added to `ials`."""
    scorers: list[Any] = [{"kind": "ials", "width": 8}] if issubclass(kind, TermScorer) else []
    schema, config = parse_config({
        "schema": SCHEMA,
        "scorers": [*scorers, kind.kind],
        "model": {"similarity": "dot"},
        "train": {"epochs": 0, "monitor": f"validation.ndcg@{K}", "device": "cpu"},
        "evaluation": {"k": [K], "repeats": "allow", "bootstrap": 0},
        "split": {"kind": "time"},
    })  # fmt: skip
    assert schema is not None
    return schema, config


@dataclass(frozen=True)
class Made:
    kind: type[AddedScorer]
    run: Run
    folder: Path
    store: Path
    served: Retriever


@pytest.fixture(scope="module", params=[*SCORERS, Together], ids=lambda kind: kind.__name__)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("scorer")
    schema, config = settings_of(request.param)
    run = api.fit(tables(), schema, config, folder=folder / "run")
    api.publish(run, folder / "store", Exact())
    return Made(request.param, run, folder / "run", folder / "store", api.retriever(folder / "store"))


def scores(run: Run) -> np.ndarray:
    """Scores of all users and items."""
    found: np.ndarray = run.factors().catalogue_scores(np.arange(N_USERS)).numpy()
    return found


def test_it_finds_more_than_chance(made: Made) -> None:
    assert made.run.metrics[f"test.recall@{K}"] > 1.5 * K / N_ITEMS
    assert np.isfinite(scores(made.run)).all()
    assert scores(made.run).std() > 0


def test_a_score_is_a_product_and_what_terms_add(made: Made) -> None:
    """Pair by pair, of the vectors that an index holds."""
    factors, every = made.run.factors(), scores(made.run)
    users, items = (a.astype(np.int32) for a in np.divmod(np.arange(N_USERS * N_ITEMS), N_ITEMS))
    naive = (factors.users[torch.from_numpy(users)] * factors.items[torch.from_numpy(items)]).sum(1).numpy()
    for added in factors.added:
        naive = naive + added.of_pairs(users, items)
    np.testing.assert_allclose(naive.reshape(every.shape), every, atol=1e-4)
    assert bool(factors.added) == any(term.reads for term in made.run.config.terms)


def test_a_run_that_is_loaded_has_the_same_scores(made: Made) -> None:
    loaded = runs.load(made.folder)
    np.testing.assert_array_equal(scores(loaded), scores(made.run))
    np.testing.assert_allclose(
        loaded.factors_during(TEST).part_scores(loaded.dataset, TEST),
        made.run.factors_during(TEST).part_scores(made.run.dataset, TEST),
    )


def test_python_graph_and_http_give_the_scores_of_the_run(made: Made) -> None:
    every, ids = scores(made.run), made.run.dataset.items.ids.cast(pl.String).to_list()
    with clients(made.store) as make:
        client = make()
        for row in (0, 17):
            user = str(made.run.dataset.users.ids[row])
            wanted = np.sort(every[row])[::-1][:K]
            of_run = [item.score for item in api.recommend(made.run, user, K).items]
            np.testing.assert_allclose(of_run, wanted, rtol=1e-3, atol=1e-3)
            for method in METHODS:
                found = made.served.recommend(Request(user), K, method)
                reply = client.post("/v1/recommend", {"user_id": user, "k": K, "method": method}).json()["items"]
                for of in ({i.id: i.score for i in found.items}, {i["id"]: i["score"] for i in reply}):
                    np.testing.assert_allclose(sorted(of.values(), reverse=True), wanted, rtol=1e-3, atol=1e-3)
                    np.testing.assert_allclose([*of.values()], every[row][[ids.index(i) for i in of]], atol=1e-3)


def test_a_new_user_is_served_from_its_own_history(made: Made) -> None:
    """As a known one with the same history and features."""
    row = 3
    user = str(made.run.dataset.users.ids[row])
    known = made.run.dataset.parts < TEST
    mine = np.flatnonzero(known & (made.run.dataset.pairs.user == row))
    mine = mine[np.argsort(made.run.dataset.times[mine])]
    history = made.run.dataset.items.ids.gather(made.run.dataset.pairs.item[mine]).cast(pl.String).to_list()
    features = {"group": made.run.dataset.users.frame["group"][row]}
    new, old = (
        made.served.recommend(one, K, 2) for one in (Request(features=features, history=history), Request(user))
    )
    assert [item.id for item in new.items] == [item.id for item in old.items]
    np.testing.assert_allclose([i.score for i in new.items], [i.score for i in old.items], rtol=1e-3, atol=1e-3)


def test_prepared_data_give_the_numbers_of_tables(made: Made, tmp_path: Path) -> None:
    schema, config = settings_of(made.kind)
    for frame, name in zip(tables(), ("users", "items", "interactions"), strict=True):
        frame.write_parquet(tmp_path / f"{name}.parquet")
    data = {name: str(tmp_path / f"{name}.parquet") for name in ("users", "items", "interactions")}
    config = config.model_copy(update={"data": config.data.model_validate(data)})
    run = api.fit(api.prepare_folder(config, schema, tmp_path / "prepared"), schema, config)
    for part in ("validation", "test"):
        name = f"{part}.recall@{K}"
        assert run.metrics[name] == pytest.approx(made.run.metrics[name], abs=0.02)
