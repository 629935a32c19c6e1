"""One retriever, two methods: what is evaluated is what is served."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from conftest import EVERYTHING_SCHEMA, everything, settings

import twotower
from twotower import pipeline
from twotower.config import IndexConfig
from twotower.data.splits import TEST, VALIDATION
from twotower.errors import DataError
from twotower.evaluation import evaluate_part
from twotower.retrieve import Request, Retriever
from twotower.run import Run
from twotower.schema import Numeric, Sequence
from twotower.store import Store

DECAY = Sequence(name="latest", side="user", pooling="decay", rates=(0.0, 0.7, 1.0))
SCHEMA = EVERYTHING_SCHEMA.model_copy(
    update={
        "features": (
            *(f for f in EVERYTHING_SCHEMA.features if f.name not in ("fans", "disliked")),
            DECAY,
            Sequence(name="order", side="user", pooling="transformer", max_length=12),
            Sequence(name="gist", side="user", of="positive", pooling="attention", max_length=50),
            Numeric(name="bought", side="user", statistic="count"),
            Numeric(name="mildness", side="user", statistic="mean"),
        )
    }
)
CONFIG = settings(
    split={"kind": "last"},
    loss={"kind": "softmax"},
    negatives={"full": True},
    train={"histories": "earlier", "monitor": "validation.recall@5", "epochs": 3},
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
    pipeline.publish(run, path)
    return path


@pytest.fixture(scope="module")
def retriever(store: Path) -> Retriever:
    return pipeline.retriever(store)


def ids(answer: object) -> list[str]:
    return [i.id for i in answer.items]  # type: ignore[attr-defined]


def test_both_methods_give_an_unchanged_user_what_the_run_gives(run: Run, retriever: Retriever) -> None:
    for user in ("u0", "u7", "u33", "u59"):
        expected = pipeline.recommend(run, user, 10)
        for method in (1, 2):
            answer = retriever.recommend(Request(user), 10, method)  # type: ignore[arg-type]
            assert (answer.source, answer.method, answer.bundle_id) == ("model", method, retriever.bundle.id)
            assert ids(answer) == [r.id for r in expected]
            np.testing.assert_allclose([i.score for i in answer.items], [r.score for r in expected], atol=1e-4)
            assert [i.title for i in answer.items] == [r.title for r in expected]


def test_telling_a_user_what_is_stored_of_them_changes_nothing(run: Run, retriever: Retriever) -> None:
    data = run.dataset
    row = 7
    mine = (data.pairs.user == row) & (data.parts != TEST)
    order = data.in_order(mine)
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
    order = data.in_order((data.pairs.user == 7) & (data.parts != TEST))
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
    found = pipeline.evaluate_bundle(retriever)
    for name, value in evaluate_part(run.factors(TEST), run.dataset, TEST, CONFIG.evaluation).items():
        for way in ("exact", "index", "live"):
            assert found[way][name] == pytest.approx(value, abs=1e-5, nan_ok=True), (way, name)
    assert found["index"]["recall@5"] == pytest.approx(run.metrics["test.recall@5"], abs=1e-9)
    # Test interactions are in no history and no vector: the answers would be other ones.
    assert not np.allclose(run.factors(TEST).users, run.factors(VALIDATION).users)
    # And the ranks are those of single calls, with what comes after the test left in.
    users = np.array([4, 9])
    seen = retriever.seen_before(TEST)
    for row, best in zip(users, retriever.rank(users, 5, 2, seen), strict=True):
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
        ({"features": [1]}, "features is not an object"),
        ({"features": 0}, "features is not an object"),
        ({"features": ""}, "features is not an object"),
        ({"history": [{"id": True}]}, "is no event"),
        ({"history": "i1"}, "history is not a list"),
        ({"history": [{"item": 1}]}, "is no event"),
        ({"events": {}}, "events is not a list"),
        ({"events": [2.5]}, "is no event"),
        ({"history": [None]}, "is no event"),
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
        ({"age": 1e35}, "too large"),
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
    with pytest.raises(DataError, match="method 1 answers user 'u1' from the stored vector.*method 2"):
        retriever.recommend(asked, 5, 1)
    assert retriever.recommend(asked, 5, 2).source == "model"
    # A history is left out of the answer and changes nothing else.
    before = ids(retriever.recommend(Request("u1"), 6))
    assert ids(retriever.recommend(Request("u1", history=[(before[0], True)]), 5)) == before[1:]


def test_a_stranger_is_what_a_new_row_of_a_table_is(run: Run, retriever: Retriever, tmp_path: Path) -> None:
    features = {"city": "city1", "age": 30.0, "income": 100.0, "motto": "more or less"}
    pl.DataFrame({"uid": ["nobody"]} | {n: [v] for n, v in features.items()}).write_parquet(tmp_path / "new.parquet")
    pipeline.embed(run, "user", tmp_path / "new.parquet", tmp_path / "out")
    expected = np.load(tmp_path / "out" / "vectors.npy") @ run.factors().items.numpy().T
    answer = retriever.recommend(Request(features=features), 40)
    assert ids(answer) == [f"i{i}" for i in np.argsort(-expected[0], kind="stable")]
    np.testing.assert_allclose([i.score for i in answer.items], np.sort(expected[0])[::-1], atol=1e-4)


def test_a_retriever_needs_no_torch(store: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from twotower.store import Store\n"
        "from twotower.retrieve import Request, Retriever\n"
        f"r = Retriever(Store({str(store)!r}).current())\n"
        "assert len(r.recommend(Request('u1'), 3, 2).items) == 3 and r.similar('i1', 2).items\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw", "ivfpq"])
def test_every_index_serves_what_it_was_judged_by(run: Run, tmp_path: Path, kind: str) -> None:
    said: list[str] = []
    bundle = pipeline.publish(run, tmp_path / "store", IndexConfig(kind=kind, recall=0.9, k=5), say=said.append)  # type: ignore[arg-type]
    assert bundle.manifest["gate"]["recall"] >= 0.9
    assert bundle.manifest["index"]["kind"] == kind
    found = pipeline.evaluate_bundle(Retriever(Store(tmp_path / "store").current()))
    assert abs(found["index"]["recall@5"] - found["exact"]["recall@5"]) < 0.1
    assert any("index.kind asks for it" in line for line in said)
