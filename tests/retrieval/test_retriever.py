"""One retriever, two methods: what is evaluated is what is served."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from worlds import EVERYTHING_SCHEMA, everything, settings

import twotower
from twotower import api
from twotower.arrays.ragged import Ragged
from twotower.data.splits import TEST, VALIDATION
from twotower.errors import DataError
from twotower.evaluation.part import evaluate_part
from twotower.features.schema import Categorical, MultiHot, Numeric, Schema, Sequence, Text, Vector
from twotower.features.values import canonical_ids
from twotower.index.choose import IndexConfig
from twotower.model.inputs.feed import feed
from twotower.retrieval.request import Request, UnknownId
from twotower.retrieval.retriever import FILTER_CACHE_ENTRIES, Retriever
from twotower.runs import Run
from twotower.store.store import Store

DECAY = Sequence(name="latest", side="user", pooling="decay", rates=(0.0, 0.7, 1.0))
SCHEMA = EVERYTHING_SCHEMA.model_copy(
    update={
        "features": (
            *(f for f in EVERYTHING_SCHEMA.features if f.name not in ("fans", "disliked")),
            DECAY,
            Sequence(name="order", side="user", pooling="transformer", max_length=12),
            Sequence(name="gist", side="user", interactions="positive", pooling="attention", max_length=50),
            Numeric(name="bought", side="user", statistic="count"),
            Numeric(name="mildness", side="user", statistic="mean"),
        )
    }
)
CONFIG = settings(
    split={"kind": "last"},
    loss={"kind": "softmax"},
    negatives={"full": True},
    train={"history_scope": "causal", "monitor": "validation.recall@5", "epochs": 3},
    evaluation={"k": [5, 10], "bootstrap": 20},
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Every kind of feature, a decaying history among them."""
    users, items, actions = everything()
    items = items.with_columns(year=pl.Series([1990.0 + i % 8 for i in range(len(items))]))
    return twotower.fit((users, items, actions), SCHEMA, CONFIG, folder=tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def store(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stores") / "store"
    api.publish(run, path)
    return path


@pytest.fixture(scope="module")
def retriever(store: Path) -> Retriever:
    return api.retriever(store)


def ids(answer: object) -> list[str]:
    return [i.id for i in answer.items]  # type: ignore[attr-defined]


def test_both_methods_give_an_unchanged_user_what_the_run_gives(run: Run, retriever: Retriever) -> None:
    for user in ("u0", "u7", "u33", "u59"):
        expected = api.recommend(run, user, 10)
        for method in (1, 2):
            answer = retriever.recommend(Request(user), 10, method)
            assert (answer.source, answer.method, answer.bundle_id) == ("model", method, retriever.bundle.id)
            assert ids(answer) == [r.id for r in expected]
            np.testing.assert_allclose([i.score for i in answer.items], [r.score for r in expected], atol=1e-4)
            assert [i.title for i in answer.items] == [r.title for r in expected]


def test_telling_a_user_what_is_stored_of_them_changes_nothing(run: Run, retriever: Retriever) -> None:
    data = run.dataset
    row = 7
    mine = (data.pairs.user == row) & (data.parts != TEST)
    order = data.sort_by_time(mine)
    history = [
        {"id": str(data.items.ids[int(data.pairs.item[i])]), "liked": bool(data.pairs.positive[i])} for i in order
    ]
    frame = data.users.frame
    features = {c: frame[c][row] for c in ("city", "age", "income")}
    stored = retriever.recommend(Request("u7"), 8, 2)
    told = retriever.recommend(Request.parse({"user_id": "u7", "features": features, "history": history}), 8, 2)
    assert ids(told) == ids(stored)
    np.testing.assert_allclose([i.score for i in told.items], [i.score for i in stored.items], atol=1e-4)
    # Without the id it is somebody the bundle does not know, told alike.
    stranger = retriever.recommend(Request.parse({"features": features, "history": history}), 8, 2)
    assert stranger.source == "cold_start"


def test_an_event_changes_the_answer_of_method_2(retriever: Retriever) -> None:
    before = retriever.recommend(Request.parse({"user_id": "u3", "history": ["i1", "i2"]}), 5, 2)
    after = retriever.recommend(Request.parse({"user_id": "u3", "history": ["i1", "i2", ids(before)[0]]}), 5, 2)
    assert ids(before)[0] not in ids(after)
    assert [i.score for i in before.items] != [i.score for i in after.items]


def test_events_go_on_from_the_stored_history_or_the_told_one(run: Run, retriever: Retriever) -> None:
    data = run.dataset
    order = data.sort_by_time((data.pairs.user == 7) & (data.parts != TEST))
    history = [(str(data.items.ids[int(data.pairs.item[i])]), bool(data.pairs.positive[i])) for i in order]
    events = [(history[0][0], True), ("i2", False), (history[1][0], True)]
    assert len(history) > 4
    for asked in (Request("u7", events=events), Request("u7", history=history, events=events)):
        found = retriever.recommend(asked, 6, 2, keep_seen=True)
        met = {i for i, _ in events}  # an item stands where it was met last, as in training
        together = [*(h for h in history if h[0] not in met), *events]
        whole = retriever.recommend(Request("u7", history=together), 6, 2, keep_seen=True)
        assert found.source == "model"
        assert ids(found) == ids(whole)
        np.testing.assert_allclose([i.score for i in found.items], [i.score for i in whole.items], atol=1e-5)
        unchanged = retriever.recommend(Request("u7"), 6, 2, keep_seen=True)
        assert [i.score for i in found.items] != [i.score for i in unchanged.items]
    before = retriever.recommend(Request("u7"), 5, 1)
    assert ids(before)[0] not in ids(retriever.recommend(Request("u7", events=[(ids(before)[0], True)]), 5, 1))


def test_an_event_replaces_what_was_thought_of_its_item_before(retriever: Retriever) -> None:
    told = [("i3", True), ("i5", True), ("i8", False)]
    events = [("i3", False), ("i9", False), ("i5", True), ("i9", True)]
    found = retriever.recommend(Request(history=told, events=events), 5, 2, keep_seen=True)
    wanted = [("i8", False), ("i3", False), ("i5", True), ("i9", True)]
    whole = retriever.recommend(Request(history=wanted), 5, 2, keep_seen=True)
    assert [(i.id, i.score) for i in found.items] == [(i.id, i.score) for i in whole.items]


def test_somebody_new_with_three_clicks_gets_the_towers_answer(retriever: Retriever) -> None:
    clicks = Request.parse({"events": ["i1", "i4", "i9"]})
    answer = retriever.recommend(clicks, 5, 2)
    assert answer.source == "cold_start"
    assert not {"i1", "i4", "i9"} & set(ids(answer))
    told = retriever.recommend(Request.parse({"history": ["i1", "i4", "i9"]}), 5, 2)
    assert ids(told) == ids(answer)


def test_an_unknown_user_is_said_to_be_one(retriever: Retriever, run: Run) -> None:
    nobody = retriever.recommend(Request("nobody"), 5)
    assert nobody.source == "popular"
    train = run.dataset.train
    counts = np.bincount(train.item[train.positive], minlength=len(run.dataset.items))
    assert [counts[int(i[1:])] for i in ids(nobody)] == sorted(counts, reverse=True)[:5]
    told = retriever.recommend(Request.parse({"user_id": "nobody", "features": {"age": 30.0, "city": "city1"}}), 5)
    assert told.source == "cold_start"
    other = retriever.recommend(
        Request.parse({"features": {"age": 30.0, "city": "atlantis"}, "history": ["i1", "zz"]}), 5
    )
    assert other.unknown == ["city", "zz"]
    assert "i1" not in ids(other)


def test_filters_and_bans(retriever: Retriever, run: Run) -> None:
    everything_left = ids(retriever.recommend(Request("u5"), 40))
    seen = {str(run.dataset.items.ids[int(i)]) for i in run.dataset.pairs.item[run.dataset.pairs.user == 5]}
    assert set(everything_left) == {f"i{i}" for i in range(40)} - seen
    assert retriever.recommend(Request("u5"), 40).truncated
    assert ids(retriever.recommend(Request("u5"), 5, ban=everything_left[:3])) == everything_left[3:8]
    assert set(ids(retriever.recommend(Request("u5"), 40, keep_seen=True))) == {f"i{i}" for i in range(40)}
    brand = ids(retriever.recommend(Request("u5"), 40, where={"brand": "brand2"}))
    assert brand == [i for i in everything_left if int(i[1:]) % 5 == 2]
    tagged = ids(retriever.recommend(Request("u5"), 40, where={"tags": "t2"}))
    assert tagged == [i for i in everything_left if int(i[1:]) % 4 == 3]
    # A whole number is one value however a table holds it.
    for year in ("1993", "1993.0"):
        found = ids(retriever.recommend(Request("u5"), 40, where={"year": year}))
        assert found == [i for i in everything_left if int(i[1:]) % 8 == 3] * (year == "1993")
    assert ids(retriever.recommend(Request("u5"), 3, where={"brand": "\udcff"})) == []
    assert ids(
        retriever.recommend(Request("u5"), 3, allow=["i1", "i2", "zz"], keep_seen=True, where={"brand": "brand1"})
    ) == ["i1"]
    assert ids(retriever.recommend(Request("nobody"), 40, where={"brand": "brand2"}, ban=["i2"])) == [
        i for i in ids(retriever.recommend(Request("nobody"), 40)) if int(i[1:]) % 5 == 2 and i != "i2"
    ]


def test_what_is_evaluated_is_what_is_served(run: Run, retriever: Retriever) -> None:
    found = api.evaluate_bundle(retriever)
    for name, value in evaluate_part(run.factors(TEST), run.dataset, TEST, CONFIG.evaluation).items():
        for way in ("exact", "index", "live"):
            assert found[way][name] == pytest.approx(value, abs=1e-5, nan_ok=True), (way, name)
    assert found["index"]["recall@5"] == pytest.approx(run.metrics["test.recall@5"], abs=1e-9)
    # Test interactions are in no history and no vector: the answers would be other ones.
    assert not np.allclose(run.factors(TEST).users, run.factors(VALIDATION).users)
    # And the ranks are those of single calls, with what comes after the test left in.
    users = np.array([4, 9])
    seen = retriever.seen_before(TEST)
    for row, best in zip(users, retriever.rank_items(users, 5, 2, seen), strict=True):
        gone = {str(retriever.item_ids[i]) for i in seen.values[seen.offsets[row] : seen.offsets[row + 1]]}
        answer = retriever.recommend(Request(f"u{row}"), 5, 2, keep_seen=True, ban=list(gone))
        assert ids(answer) == [retriever.item_ids[i] for i in best]


def test_similar_items_point_the_same_way(run: Run, retriever: Retriever) -> None:
    vectors = run.factors().items.numpy()[:, :-2]  # without the biases
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    expected = unit @ unit[6]
    expected[6] = -np.inf
    answer = retriever.similar("i6", 4)
    assert ids(answer) == [f"i{i}" for i in np.argsort(-expected)[:4]]
    np.testing.assert_allclose([i.score for i in answer.items], np.sort(expected)[::-1][:4], atol=1e-5)
    assert len(retriever.similar("i6", 100).items) == 39


def test_json_has_ids_as_text(retriever: Retriever) -> None:
    body = json.loads(retriever.recommend(Request("u1"), 3).to_json())
    assert set(body) == {"items", "bundle_id", "method", "source", "milliseconds", "truncated", "unknown"}
    assert len(body["items"]) == 3
    assert all(isinstance(i["id"], str) and isinstance(i["score"], float) for i in body["items"])


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ([], "JSON object"),
        ({"user": 1}, "unknown key 'user'; did you mean 'user_id'"),
        ({"user_id": True}, "user_id is True"),
        ({"features": [1]}, "features is .*, expected an object"),
        ({"features": 0}, "features is .*, expected an object"),
        ({"features": ""}, "features is .*, expected an object"),
        ({"history": [{"id": True}]}, "a history holds"),
        ({"history": "i1"}, "history is .*, expected a list"),
        ({"history": [{"item": 1}]}, "a history holds"),
        ({"events": {}}, "events is .*, expected a list"),
        ({"events": [2.5]}, "a history holds"),
        ({"history": [None]}, "a history holds"),
    ],
)
def test_a_request_that_is_none_is_refused(body: object, said: str) -> None:
    with pytest.raises(DataError, match=said.replace("(", r"\(")):
        Request.parse(body)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"k": 0}, "k is 0"),
        ({"k": 10_001}, "expected 1 to 10,000"),
        ({"k": "5"}, "k is '5'"),
        ({"k": 2.5}, "k is 2.5, expected 1 to 10,000"),
        ({"method": 3}, "method is 3"),
        ({"where": {"brnd": "x"}}, "no column 'brnd'; did you mean 'brand'"),
        ({"where": {"picture": "x"}}, None),
    ],
)
def test_arguments_out_of_range_are_refused(retriever: Retriever, change: dict[str, object], said: str | None) -> None:
    if said is None:
        assert retriever.recommend(Request("u1"), **change).items == []  # type: ignore[arg-type]
        return
    with pytest.raises(DataError, match=said):
        retriever.recommend(Request("u1"), **({"k": 5} | change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("features", "said"),
    [
        ({"agee": 3}, "no feature 'agee'; did you mean 'age'"),
        ({"age": "old"}, "feature 'age' is 'old', expected Float64"),
        ({"age": {}}, "feature 'age' is {}, expected Float64"),
        ({"city": {"name": "Porto"}}, "feature 'city' is {'name': 'Porto'}, expected String"),
        ({"city": "\udcff"}, "feature 'city' is .*, expected String"),
        ({"age": 1e35}, "use smaller numbers"),
        ({"bought": 3}, r"no feature 'bought' \(allowed: age, city, income, motto\)"),
    ],
)
def test_features_that_do_not_fit_are_refused(retriever: Retriever, features: dict[str, object], said: str) -> None:
    with pytest.raises(DataError, match=said):
        retriever.recommend(Request(features=features), 5, 2)
    with pytest.raises(DataError, match="item 'zz' is not among the 40 items"):
        retriever.similar("zz")


def test_method_1_says_that_features_change_no_stored_vector(retriever: Retriever) -> None:
    asked = Request.parse({"user_id": "u1", "features": {"age": 20}, "history": ["i1"]})
    with pytest.raises(DataError, match="method 1 .* takes no features, and user .u1. has some; use method 2"):
        retriever.recommend(asked, 5, 1)
    assert retriever.recommend(asked, 5, 2).source == "model"
    # A history is left out of the answer and changes nothing else.
    before = ids(retriever.recommend(Request("u1"), 6))
    assert ids(retriever.recommend(Request("u1", history=[(before[0], True)]), 5)) == before[1:]


def test_a_stranger_is_what_a_new_row_of_a_table_is(run: Run, retriever: Retriever, tmp_path: Path) -> None:
    features = {"city": "city1", "age": 30.0, "income": 100.0, "motto": "more or less"}
    pl.DataFrame({"uid": ["nobody"]} | {n: [v] for n, v in features.items()}).write_parquet(tmp_path / "new.parquet")
    api.embed(run, "user", tmp_path / "new.parquet", tmp_path / "out")
    expected = np.load(tmp_path / "out" / "vectors.npy") @ run.factors().items.numpy().T
    answer = retriever.recommend(Request(features=features), 40)
    assert ids(answer) == [f"i{i}" for i in np.argsort(-expected[0], kind="stable")]
    np.testing.assert_allclose([i.score for i in answer.items], np.sort(expected[0])[::-1], atol=1e-4)


def test_a_retriever_needs_no_torch(store: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from twotower.store.store import Store\n"
        "from twotower.retrieval.request import Request\nfrom twotower.retrieval.retriever import Retriever\n"
        f"r = Retriever(Store({str(store)!r}).current())\n"
        "assert len(r.recommend(Request('u1'), 3, 2).items) == 3 and r.similar('i1', 2).items\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw", "ivfpq"])
def test_every_index_serves_what_it_was_judged_by(run: Run, tmp_path: Path, kind: str, messages: list[str]) -> None:
    bundle = api.publish(run, tmp_path / "store", IndexConfig(kind=kind, min_recall=0.9, k=5))
    assert bundle.manifest.recall_check.recall >= 0.9
    assert bundle.manifest.index.kind == kind
    found = api.evaluate_bundle(Retriever(Store(tmp_path / "store").current()))
    assert abs(found["index"]["recall@5"] - found["exact"]["recall@5"]) < 0.1
    assert any("set by index.kind" in line for line in messages)


# ---- vectors, histories, ids


def test_a_vector_is_what_the_answer_was_searched_with(retriever: Retriever) -> None:
    asked: list[tuple[Request, Any]] = [
        (Request("u5"), 1),
        (Request("u5"), 2),
        (Request("u5", {"age": 40.0}, [("i1", True)]), 2),
        (Request("nobody", {"city": "atlantis"}, events=[("i3", True), ("zz", True)]), 2),
        (Request("nobody", history=[]), 1),
    ]
    for request, method in asked:
        vector, source, unknown = retriever.embed_request(request, method)
        assert vector.shape == (1, retriever.index.width)
        answer = retriever.recommend(request, 5, method)
        assert (answer.source, answer.unknown) == (source, unknown)
        again = retriever.recommend(request, 5, method, vector=vector)
        assert again.items == answer.items
        assert again.source == answer.source
    # Another vector changes the order of the items, and not which are left out.
    other, _, _ = retriever.embed_request(Request("u9"), 1)
    mine, theirs = (set(ids(retriever.recommend(Request("u5"), 40, vector=v))) for v in (None, other))
    assert mine == theirs
    assert ids(retriever.recommend(Request("u5"), 40, vector=other)) != ids(retriever.recommend(Request("u5"), 40))
    # Somebody of whom nothing is known gets the most popular items, unless a vector says what to search.
    _, source, _ = retriever.embed_request(Request("nobody"), 2)
    assert source == "popular"
    assert retriever.recommend(Request("nobody"), 5, 2, vector=other).source == "cold_start"
    with pytest.raises(DataError, match="method 1 .* takes no features"):
        retriever.embed_request(Request("u5", {"age": 3}), 1)
    with pytest.raises(DataError, match="no feature 'agee'"):
        retriever.embed_request(Request("u5", {"agee": 3}), 2)
    with pytest.raises(DataError, match="method is 3"):
        retriever.embed_request(Request("u5"), 3)  # type: ignore[arg-type]
    for wrong in (np.zeros((1, 3), np.float32), np.full((1, retriever.index.width), np.nan, np.float32)):
        with pytest.raises(DataError):
            retriever.recommend(Request("u5"), 5, vector=wrong)


def test_a_history_is_what_the_tower_has_read(run: Run, retriever: Retriever) -> None:
    data = run.dataset
    for row in (0, 7, 33):
        order = data.sort_by_time((data.pairs.user == row) & (data.parts != TEST))
        told = [(str(data.items.ids[int(data.pairs.item[i])]), bool(data.pairs.positive[i])) for i in order]
        assert len(told) > 3
        for n in (0, 1, 3, 1000):
            wanted = [(i, f"Item {i[1:]}", liked) for i, liked in told[max(0, len(told) - n) :]]
            assert retriever.history(f"u{row}", n) == wanted
        assert set(retriever.seen_items(f"u{row}")) > {i for i, _ in told}  # the test part was met as well
    with pytest.raises(UnknownId, match="user 'nobody' is not among the 60 users"):
        retriever.history("nobody", 5)
    with pytest.raises(UnknownId):
        retriever.similar("zz")


def test_columns_that_a_request_and_a_filter_may_name(retriever: Retriever, wide_retriever: Retriever) -> None:
    assert retriever.user_columns == ["city", "age", "income", "motto"]
    assert retriever.item_columns == [
        c for c in retriever.dataset.items.frame.columns if c not in ("__count:shown", "__mean:mean_stars")
    ]
    for asked in (retriever, wide_retriever):
        for column in asked.item_columns:
            assert asked.recommend(Request(asked.user_ids[0]), 3, where={column: "no such value"}).items == []


def test_a_filter_asked_again_gives_the_same_and_few_are_kept(retriever: Retriever) -> None:
    filters: list[dict[str, str]] = [
        {"brand": "brand2"},
        {"tags": "t1"},
        {"brand": "brand2", "tags": "t1"},
        {"year": "x"},
    ]
    for _ in range(2):
        for where in filters:
            rows = set(range(40))
            for column, value in where.items():
                rows &= {
                    r
                    for r in range(40)
                    if value in (f"brand{r % 5}", *(f"t{t}" for t in range(r % 4))) and column != "year"
                }
            assert set(ids(retriever.recommend(Request("u5"), 40, keep_seen=True, where=where))) == {
                f"i{r}" for r in rows
            }
            assert retriever.count_allowed(["i2", "i7", "zz"], where) == len(rows & {2, 7})
    for number in range(2 * FILTER_CACHE_ENTRIES):
        retriever.count_allowed(None, {"brand": f"no{number}"})
    assert len(retriever._filter_cache) == FILTER_CACHE_ENTRIES
    with pytest.raises(DataError, match="no column 'brnd'"):
        retriever.count_allowed(None, {"brand": "brand2", "brnd": "x"})


def test_a_retriever_is_gone_as_soon_as_nobody_holds_it(store: Path) -> None:
    gc.collect()
    gc.disable()
    try:
        found = api.retriever(store)
        assert found.recommend(Request("u1", {"age": 3.0}, [("i1", True)]), 3, 2, where={"brand": "brand1"}).items
        assert found.search("more", 3).items
        assert found.similar("i1", 3).items
        with pytest.raises(DataError):
            found.recommend(Request("u1", {"agee": 3.0}), 3, 2)
        parts = [weakref.ref(part) for part in (found, found.dataset, found.index, found.tower, found.item_ids)]
        del found
        assert [part() for part in parts] == [None] * len(parts)
    finally:
        gc.enable()


# ---- what a request says, and what a table would say


WIDE = Schema(
    user_id="uid",
    item_id="iid",
    time="when",
    time_unit="order",
    features=(
        Categorical(name="uid", side="user"),
        Categorical(name="plan", side="user", missing="error"),
        Categorical(name="code", side="user"),
        Categorical(name="level", side="user"),
        Categorical(name="flag", side="user"),
        Categorical(name="shop", side="user", hash_buckets=9),
        Categorical(name="again", side="user", column="level", min_count=30),
        Numeric(name="age", side="user"),
        Numeric(name="income", side="user", buckets=4),
        Numeric(name="years", side="user", missing="error"),
        Numeric(name="bought", side="user", statistic="count"),
        Numeric(name="mildness", side="user", statistic="mean"),
        MultiHot(name="tags", side="user", separator="|"),
        MultiHot(name="numbers", side="user"),
        Vector(name="taste", side="user"),
        Text(name="motto", side="user"),
        Text(name="digits", side="user", n=2),
        Sequence(name="liked", side="user", interactions="positive", max_length=4),
        Sequence(name="met", side="user", pooling="sqrt"),
        Categorical(name="iid", side="item"),
    ),
)


def wide() -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Users with every kind of column; ids are numbers."""
    rng = np.random.default_rng(3)
    n = 30
    users = pl.DataFrame(
        {
            "uid": range(n),
            "plan": [("free", "paid")[i % 2] for i in range(n)],
            "code": [None if i % 7 == 0 else ("7", "007", "7.5", "true", "漢")[i % 5] for i in range(n)],
            "level": [None if i % 8 == 0 else (7.0, 7.5, -3.0, 2.0**53)[i % 4] for i in range(n)],
            "flag": [None if i % 9 == 0 else i % 3 == 0 for i in range(n)],
            "shop": [f"shop{i % 4}" for i in range(n)],
            "age": [None if i % 6 == 0 else 20 + i for i in range(n)],
            "income": [None if i % 5 == 0 else i**2 / 3 for i in range(n)],
            "years": [i / 4 for i in range(n)],
            "tags": [None if i % 7 == 0 else "|".join("abc7"[: i % 5]) for i in range(n)],
            "numbers": [None if i % 9 == 0 else list(range(i % 4)) for i in range(n)],
            "taste": [None if i % 10 == 0 else [i / 7, -1.5] for i in range(n)],
            "motto": [None if i % 10 == 0 else ("more is more", "少即是多", "")[i % 3] for i in range(n)],
            "digits": [i * 111 for i in range(n)],
        }
    )
    items = pl.DataFrame({"iid": [f"i{i}" for i in range(20)]})
    pairs = rng.choice(n * 20, 300, replace=False)
    actions = pl.DataFrame({"uid": pairs // 20, "iid": [f"i{i % 20}" for i in pairs], "when": np.arange(300)})
    return users, items, actions


@pytest.fixture(scope="module")
def wide_retriever(tmp_path_factory: pytest.TempPathFactory) -> Retriever:
    folder = tmp_path_factory.mktemp("wide")
    fitted = twotower.fit(
        wide(),
        WIDE,
        settings(
            split={"kind": "last"}, negatives={"random": 2}, train={"epochs": 1, "monitor": "validation.recall@5"}
        ),
        folder=folder / "run",
    )
    api.publish(fitted, folder / "store", force=True)
    return api.retriever(folder / "store")


def by_the_table(retriever: Retriever, request: Request, unknown: list[str]) -> dict[str, Any]:
    """What the tower reads, by putting the request into a row of the users table and encoding two of it (one value
    goes another way)."""
    schema, users = retriever.schema, retriever.dataset.users.frame
    row = retriever.user_ids.row(request.user_id) if request.user_id is not None else None
    frame = users[row] if row is not None else users.clear(1).with_columns(pl.lit(0.0).alias("__count:bought"))
    texts = [f.source for f in schema.texts("user")]
    numbers = {f.source for f in schema.side("user") if isinstance(f, Numeric | Vector)}
    categories = {f.source for f in schema.side("user") if isinstance(f, Categorical | MultiHot)} - numbers
    frame = frame.with_columns(canonical_ids(frame[name]).cast(pl.String).alias(name) for name in texts)
    values = dict(request.features)
    if row is None and request.user_id is not None:
        values.setdefault(schema.user_id, request.user_id)
    for name, value in values.items():
        try:
            if isinstance(value, dict):
                raise TypeError
            given = pl.Series(name, [value], strict=False)
            column = given.cast(frame.schema[name], strict=True)
            kept, said = (getattr(t, "inner", t) for t in (column.dtype, given.dtype))
            as_said = name in categories and kept.is_integer() and (said == pl.String or said.is_float())
            frame = frame.with_columns(given if as_said else column)  # 007 is not 7
        except (pl.exceptions.PolarsError, TypeError, ValueError, OverflowError):
            if name != schema.user_id:
                raise DataError(f"request: feature '{name}' is {value!r}, expected {frame.schema[name]}") from None
    columns = retriever.dataset.encoders.transform("user", pl.concat([frame, frame]))
    for f in schema.side("user"):
        if isinstance(f, Sequence):
            stored = retriever.columns[f.name]
            assert isinstance(stored, Ragged)
            columns[f.name] = (
                stored.take(np.array([row])) if row is not None else Ragged(stored.values[:0], np.zeros(2, np.int64))
            )
        elif f.source in request.features:
            encoded = columns[f.name]
            codes: Any = encoded.values if isinstance(encoded, Ragged) else encoded
            if codes.dtype == np.int32 and not codes.any():
                unknown.append(f.name)
    return feed(retriever.fields, columns, np.array([0]))


def outcome(work: Callable[[list[str]], dict[str, Any]]) -> Any:
    """The arrays and what is unknown, or the error."""
    unknown: list[str] = []
    try:
        found = work(unknown)
    except Exception as e:
        # Of two rows of a table twice as many values are missing.
        return type(e), str(e).replace("2 of 2", "1 of 1").replace("2 vectors", "1 vectors")
    return {n: (v.dtype, v.shape, v.tobytes()) for n, v in found.items()}, unknown


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 7, -3, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63) - 1, 10**400]),
    st.sampled_from([7.0, 7.5, -0.0, 1e300, 1e-320, float("nan"), float("inf"), -float("inf"), 2.0**53]),
    st.sampled_from(
        ["7", "007", "-7", "-0", "7.0", "7.5", "true", "True", "free", "shop1", "漢", "少即是多", "more IS", "", " ", "a|b", "|a||7|",
         "222", "\\udcff", "９", "+7", "9" * 5000]
    ),
    st.lists(st.one_of(st.none(), st.booleans(), st.integers(-2, 4), st.floats(width=16), st.sampled_from(["a", "1", ""])), max_size=3),
    st.lists(st.lists(st.integers(0, 3), max_size=2), max_size=2),
    st.sampled_from([{}, {"a": 1}, b"7", (1, 2), {1, 2}, 1j, Decimal("7"), datetime(2020, 1, 1), range(2), object]),
    st.text(max_size=3),
    st.integers(),
    st.floats(),
)  # fmt: skip


@examples(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from([None, "3", "7", "nobody", "007", "-1", "\\udcff"]),
    st.dictionaries(
        st.sampled_from(
            [f.source for f in WIDE.side("user") if not f.source.startswith("__") and f.kind != "sequence"]
        ),
        ODD,
        max_size=4,
    ),
)
def test_a_request_is_read_as_the_row_of_a_table_it_stands_for(
    wide_retriever: Retriever, user: str | None, features: dict[str, Any]
) -> None:
    for told in (features, {"plan": "paid", "years": 2} | features):
        request = Request(user, told)
        row = wide_retriever._find_user(request)
        found = outcome(lambda unknown: wide_retriever._tower_inputs(request, row, {}, unknown))  # noqa: B023
        assert found == outcome(lambda unknown: by_the_table(wide_retriever, request, unknown))  # noqa: B023


def test_an_index_file_that_is_known_to_be_sound_is_not_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from twotower.index.faiss import faiss_index

    run = twotower.fit(everything(60, 300, 3000), EVERYTHING_SCHEMA, settings(), folder=tmp_path / "run")
    api.publish(run, tmp_path / "store", IndexConfig(kind="ivf", min_recall=0.1))
    bundle = Store(tmp_path / "store").current()
    looked: list[Path] = []
    monkeypatch.setattr(faiss_index, "verify_file", looked.append)
    first = Retriever(bundle)
    assert [p.name for p in looked] == ["index.faiss"]
    assert first.index_digest == first.digests["index/index.faiss"]
    again = Retriever(bundle, verified_indexes={first.index_digest})
    other = Retriever(bundle, verified_indexes={"0" * 64})
    assert len(looked) == 2
    answers = [r.recommend(Request("u1"), 5).items for r in (first, again, other)]
    assert answers[0] == answers[1] == answers[2]
