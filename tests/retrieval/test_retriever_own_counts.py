"""A bundle with own counts answers every way as its run scores."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from service_client import clients
from worlds import REPLAYED_SCHEMA, replayed, settings

from twotower import api
from twotower.arrays.types import Floats
from twotower.data.ids import TextColumn
from twotower.data.split import SplitConfig
from twotower.data.splits import TEST
from twotower.errors import RunError
from twotower.evaluation.own_items import HistoryScores, HistoryTerm, OwnItems
from twotower.features.day_of_week import DayOfWeek
from twotower.features.sequence import Sequence
from twotower.files import layout
from twotower.index.exact import Exact
from twotower.index.faiss.hnsw import Hnsw
from twotower.publishing.bundle_evaluation import evaluate_bundle
from twotower.retrieval.catalogue import Catalogue
from twotower.retrieval.event import Event
from twotower.retrieval.request import Request
from twotower.retrieval.retriever import Retriever
from twotower.runs import Run
from twotower.store.store import Store

SCHEMA = REPLAYED_SCHEMA.model_copy(
    update={"features": (*REPLAYED_SCHEMA.features, Sequence(name="taken", side="user", share_embedding=False))}
)
K, N_ITEMS = 8, 300


@dataclass(frozen=True)
class Shop:
    """A run, its published bundle, and the scores of all users and items."""

    run: Run
    store: Path
    scores: Floats

    def best(self, user: int, among: set[str] | None = None, scores: Floats | None = None) -> list[str]:
        row = int((self.run.dataset.users.ids == user).arg_true()[0])
        ids = [str(i) for i in self.run.dataset.items.ids]
        mine = self.scores[row] if scores is None else scores
        order = [ids[i] for i in np.lexsort((np.arange(len(ids)), -mine))]
        return [i for i in order if among is None or i in among][:K]


@pytest.fixture(
    scope="module",
    params=[Exact(), pytest.param(Hnsw(min_recall=1.0), marks=pytest.mark.system)],
    ids=["exact", "hnsw"],
)
def shop(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Shop:
    folder = tmp_path_factory.mktemp("shop")
    config = settings(
        split=SplitConfig(kind="time").model_dump(), loss={"kind": "softmax"},
        evaluation={"k": [5], "repeats": "allow"},
        train={"monitor": "validation.recall@5", "epochs": 1}, scorers=[{"kind": "repeats", "history": "taken"}],
    )  # fmt: skip
    run = api.fit((None, None, replayed(n_items=N_ITEMS, n=3000)), SCHEMA, config, folder=folder / "run")
    assert run.model.terms["repeats"].is_fitted
    api.publish(run, folder / "store", request.param)
    scores = run.factors(TEST).catalogue_scores(np.arange(len(run.dataset.users))).numpy()
    return Shop(run, folder / "store", scores)


@pytest.fixture
def retriever(shop: Shop) -> Retriever:
    return Retriever(Store(shop.store).current())


@pytest.mark.parametrize("method", [1, 2])
def test_answers_are_the_best_by_product_and_own_counts(shop: Shop, retriever: Retriever, method: Any) -> None:
    for user in range(0, 30, 7):
        answer = retriever.recommend(Request(str(user)), K, method)
        assert [i.id for i in answer.items] == shop.best(user)
        row = int((shop.run.dataset.users.ids == user).arg_true()[0])
        np.testing.assert_allclose([i.score for i in answer.items], np.sort(shop.scores[row])[::-1][:K], rtol=1e-3)
        allowed = [str(i) for i in range(0, N_ITEMS, 3)]
        some = retriever.recommend(Request(str(user)), K, method, allow=allowed, ban=allowed[:4])
        assert [i.id for i in some.items] == shop.best(user, {*allowed[4:]})


def test_answers_without_seen_items_are_those_of_the_product(shop: Shop, retriever: Retriever) -> None:
    user = 3
    seen = {i.id for i in retriever.recommend(Request("3"), N_ITEMS).items}
    seen -= {i.id for i in retriever.recommend(Request("3"), N_ITEMS, keep_seen=False).items}
    found = retriever.recommend(Request("3"), K, keep_seen=False)
    row = int((shop.run.dataset.users.ids == user).arg_true()[0])
    products = shop.run.factors(TEST).products(np.array([row])).numpy()[0]
    assert seen
    assert [i.id for i in found.items] == shop.best(3, {str(i) for i in range(N_ITEMS)} - seen, products)


def test_a_table_is_answered_as_its_users_are(shop: Shop, retriever: Retriever, tmp_path: Path) -> None:
    users = pl.DataFrame({"user_id": [3, 29, 11], "events": [None, ["7", "7"], None]})
    frame = retriever.recommend_frame(users, K, 2)
    for user, events in users.iter_rows():
        request = Request(str(user), events=[Event(i) for i in events or []])
        wanted = retriever.recommend(request, K, 2)
        assert frame.filter(pl.col("user_id") == user)["item_id"].to_list() == [int(i.id) for i in wanted.items]
    users.select("user_id").write_parquet(tmp_path / "users.parquet")
    api.recommend_users(shop.store, tmp_path / "users.parquet", tmp_path / "out", K)
    file = pl.read_parquet(tmp_path / "out" / "part-*.parquet")
    of_run = api.recommend(shop.run, [*users["user_id"]], K)
    assert of_run["item_id"].to_list() == file["item_id"].to_list()
    for user in users["user_id"]:
        assert [str(i) for i in file.filter(pl.col("user_id") == user)["item_id"]] == shop.best(user)


def test_users_of_whom_nothing_is_known_get_what_is_popular(retriever: Retriever) -> None:
    for method in (1, 2):
        assert len(retriever.recommend_frame({"user_id": ["nobody", "nor me"]}, K, method)) == 2 * K
        assert not len(retriever.recommend_frame({"user_id": np.zeros(0, np.int64)}, K, method))


def test_an_index_of_many_items_has_an_engine(shop: Shop, retriever: Retriever) -> None:
    assert (shop.store / "bundles" / retriever.bundle.id / "index" / layout.INDEX_FAISS).exists() == (
        retriever.index.kind == "hnsw"
    )


def test_a_request_with_events_counts_them(shop: Shop, retriever: Retriever) -> None:
    new = retriever.recommend(Request("nobody", history=[Event("41")] * 30), K, 2)
    assert new.items[0].id == "41"
    before = {str(i.id): i.score for i in retriever.recommend(Request("3"), N_ITEMS, 2).items}
    stored = retriever.recommend(Request("3", events=[Event("41")] * 9), K, 1)
    assert [i.id for i in stored.items] == shop.best(3), "method 1 reads the stored history alone"
    after = {str(i.id): i.score for i in retriever.recommend(Request("3", events=[Event("41")] * 9), N_ITEMS, 2).items}
    assert after["41"] > before["41"] + 0.5 * max(shop.scores.std(), 0.1)
    with clients(shop.store) as make:
        client = make()
        for method in (1, 2):
            reply = client.post("/v1/recommend", {"user_id": "3", "k": K, "method": method}).json()
            assert [i["id"] for i in reply["items"]] == shop.best(3)
        body = {"user_id": "3", "k": N_ITEMS, "events": ["41"] * 9}
        reply = client.post("/v1/recommend", body).json()
        assert {i["id"]: pytest.approx(i["score"], rel=1e-4) for i in reply["items"]} == after


def test_the_bundle_is_measured_with_them(shop: Shop, retriever: Retriever) -> None:
    found = evaluate_bundle(retriever)
    for name in ("index", "exact", "live"):
        for metric in ("recall@5", "ndcg@5"):
            assert found[name][metric] == pytest.approx(shop.run.metrics[f"test.{metric}"], abs=2e-3), name


@pytest.mark.parametrize("repeats", ["allow", "only"])
def test_a_run_that_reads_the_context_is_measured_and_served_with_them(repeats: str, tmp_path: Path) -> None:
    day = DayOfWeek(name="day", side="context", default=3)
    schema = SCHEMA.model_copy(update={"time_unit": "s", "features": (*SCHEMA.features, day)})
    config = settings(
        split=SplitConfig(kind="time").model_dump(), loss={"kind": "softmax"},
        evaluation={"k": [5], "repeats": repeats},
        train={"monitor": "validation.recall@5", "epochs": 3}, scorers=[{"kind": "repeats", "history": "taken"}],
    )  # fmt: skip
    rows = replayed().with_columns(at=pl.col("at") * 20_000 + 1_600_000_000)
    run = api.fit((None, None, rows), schema, config, folder=tmp_path / "run")
    own, scorer = run.factors().sparse, run.factors_during(TEST)
    assert own is not None
    pairs, interactions = run.dataset.test, run.dataset.part_indices(TEST)
    plain = replace(scorer, added=())
    user, item = pairs.user.astype(np.int64), pairs.item.astype(np.int64)
    added = own.added_to(torch.zeros(len(run.dataset.users), own.n_items), np.arange(len(run.dataset.users))).numpy()
    at = np.arange(len(user))
    of_catalogue = [s.catalogue_scores(user, interactions).numpy()[at, item] for s in (scorer, plain)]
    of_pairs = [s.part_scores(run.dataset, TEST) for s in (scorer, plain)]
    for with_own, without in (of_catalogue, of_pairs):
        np.testing.assert_allclose(with_own - without, added[user, item], atol=1e-4)
    assert added[user, item].any()
    api.publish(run, tmp_path / "store", Exact())
    found = evaluate_bundle(api.retriever(tmp_path / "store"))["live"]
    assert found["recall@5"] == pytest.approx(run.metrics["test.recall@5"], abs=2e-3)


def test_weights_of_another_history_are_refused(retriever: Retriever) -> None:
    own = retriever.history_scores
    assert own is not None
    every = own.term.weights
    for name, weights in (("taken", every[:-1]), ("other", every), ("user_id", every)):
        with pytest.raises(RunError, match=f"weights are not those of the codes of a history '{name}'"):
            HistoryScores.of(retriever.dataset, own.stored, HistoryTerm(name, weights))


def test_a_damaged_file_is_refused(shop: Shop) -> None:
    bundle = Store(shop.store).current()
    path = bundle.folder / layout.HISTORY_TERM
    kept = path.read_bytes()
    try:
        for weights in (
            np.full(302, np.nan, np.float32),
            np.zeros((302, 1), np.float32),
            np.zeros(302),
            np.zeros(9, np.float32),
        ):
            np.save(path, weights)
            with pytest.raises(RunError, match="history_term"):
                Retriever(bundle)
    finally:
        path.write_bytes(kept)


@pytest.mark.parametrize("seed", range(6))
def test_own_items_are_merged_as_a_sort_of_all_scores_finds(seed: int) -> None:
    """Own items that are excluded, not allowed or rejected by the index, lists shorter than k, and equal scores."""
    rng = np.random.default_rng(seed)
    n_items, n_users, k = 40, 9, 12
    items = rng.integers(-2, 3, (n_items, 3)).astype(np.float32)
    items[[5, 17]] = np.nan
    index = Exact().build(items, np.arange(n_items), "dot")
    vectors = rng.integers(-2, 3, (n_users, 3)).astype(np.float32)
    own = [some_items(rng, n_items, int(rng.integers(0, 15))) for _ in range(n_users)]
    excluded = [rng.permutation(n_items)[: rng.integers(0, 20)] for _ in range(n_users)]
    allowed = np.sort(rng.permutation(n_items)[:25]) if seed % 2 else None
    catalogue = Catalogue(index, TextColumn(pl.Series(range(n_items))), TextColumn(pl.Series(range(n_items))))
    rows, scores = catalogue.rank_many(vectors, k, excluded, allowed, own)
    for user in range(n_users):
        dense = items @ vectors[user]
        dense[own[user].rows] += own[user].scores
        dense[np.isnan(dense)] = -np.inf
        dense[excluded[user]] = -np.inf
        if allowed is not None:
            dense[np.setdiff1d(np.arange(n_items), allowed)] = -np.inf
        wanted = [i for i in np.lexsort((np.arange(n_items), -dense)) if dense[i] > -np.inf][:k]
        assert rows[user][rows[user] >= 0].tolist() == wanted
        np.testing.assert_allclose(scores[user, : len(wanted)], dense[wanted], rtol=1e-5)
        assert (scores[user, len(wanted) :] == -np.inf).all()
        one = catalogue.rank(vectors[user : user + 1], k, excluded[user], allowed, own[user])
        assert (one[0].tolist(), one[1].tolist()) == (rows[user].tolist(), scores[user].tolist())


def some_items(rng: np.random.Generator, n_items: int, n: int) -> OwnItems:
    return OwnItems(np.sort(rng.permutation(n_items)[:n]), rng.integers(0, 3, n).astype(np.float32))
