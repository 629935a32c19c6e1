"""One retriever, two methods: what is evaluated is what is served."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from twotower import api
from twotower.data.splits import TEST, VALIDATION
from twotower.errors import DataError
from twotower.evaluation.part_evaluation import evaluate_part
from twotower.index import INDEXES
from twotower.retrieval.batches import rank_items
from twotower.retrieval.request import Request, UnknownId
from twotower.retrieval.request_body import Json
from twotower.retrieval.retriever import Retriever, stored_history, stored_items
from twotower.runs import Run
from twotower.store.store import Store


def ids(answer: object) -> list[str]:
    return [i.id for i in answer.items]  # type: ignore[attr-defined]


def test_both_methods_give_an_unchanged_user_what_the_run_gives(run: Run, retriever: Retriever) -> None:
    for user in ("u0", "u7", "u33", "u59"):
        offline = api.recommend(run, user, 10)
        assert (offline.bundle_id, offline.method, offline.source) == ("", 1, "model")
        assert offline.items == retriever.recommend(Request(user), 10).items
        expected = offline.items
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
    history: list[Json] = [
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


def test_an_item_that_a_told_history_repeats_stands_where_it_was_met_last(retriever: Retriever) -> None:
    told = [("i3", True), ("i5", True), ("i3", False), ("i8", False), ("i5", True)]
    wanted = [("i3", False), ("i8", False), ("i5", True)]
    vectors = [retriever.embed_request(Request(history=history), 2).vector for history in (told, wanted, told[1:])]
    assert np.array_equal(vectors[0], vectors[1])
    assert np.array_equal(vectors[0], vectors[2])
    assert not np.array_equal(vectors[0], retriever.embed_request(Request(history=told[:3]), 2).vector)


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


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"k": 0}, "k is 0"),
        ({"k": 10_001}, "expected 1 to 10,000"),
        ({"k": "5"}, "k is '5'"),
        ({"k": 2.5}, "k is 2.5, expected 1 to 10,000"),
        ({"method": 3}, "method is 3"),
        ({"where": {"brnd": "x"}}, "no column 'brnd'; did you mean 'brand'"),
        ({"where": {"picture": "x"}}, "column 'picture' holds Float64, not 'x'; expected a value such as '0.0'"),
    ],
)
def test_arguments_out_of_range_are_refused(retriever: Retriever, change: dict[str, object], said: str) -> None:
    with pytest.raises(DataError, match=said):
        retriever.recommend(Request("u1"), **({"k": 5} | change))  # type: ignore[arg-type]


def test_k_may_be_a_numpy_integer(retriever: Retriever) -> None:
    k: Any = np.uint8(255)
    assert len(retriever.recommend(Request("nobody"), k, ban=["i1", "i2", "i3"]).items) == 37
    assert retriever.similar("i1", k).items == retriever.similar("i1", 255).items


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
def test_features_that_do_not_fit_are_refused(retriever: Retriever, features: dict[str, Json], said: str) -> None:
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
    features: dict[str, Json] = {"city": "city1", "age": 30.0, "income": 100.0, "motto": "more or less"}
    pl.DataFrame({"uid": ["nobody"]} | {n: [v] for n, v in features.items()}).write_parquet(tmp_path / "new.parquet")
    api.embed(run, "user", tmp_path / "new.parquet", tmp_path / "out")
    expected = pl.read_parquet(tmp_path / "out" / "part-*.parquet")["vector"].to_numpy() @ run.factors().items.numpy().T
    answer = retriever.recommend(Request(features=features), 40)
    assert ids(answer) == [f"i{i}" for i in np.argsort(-expected[0], kind="stable")]
    np.testing.assert_allclose([i.score for i in answer.items], np.sort(expected[0])[::-1], atol=1e-4)


def test_a_retriever_needs_no_torch(store: Path) -> None:
    code = (
        "import sys; import polars as pl; from twotower.retrieval.request import Request\n"
        f"from twotower.retrieval.retriever import current_retriever\nr = current_retriever({str(store)!r})\n"
        "assert len(r.recommend(Request('u1'), 3, 2).items) == 3 and r.similar('i1', 2).items\n"
        "assert r.recommend_frame(pl.DataFrame({'uid': ['u1', 'u2']}), 3, 2).height == 6\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", ["ivf", "hnsw", "ivfpq"])
def test_every_index_serves_what_it_was_judged_by(run: Run, tmp_path: Path, kind: str, messages: list[str]) -> None:
    bundle = api.publish(run, tmp_path / "store", INDEXES.parse({"kind": kind, "min_recall": 0.9, "k": 5}))
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
        parts = [weakref.ref(part) for part in (found, found.loaded, found.dataset, found.index, found.user_inputs)]
        del found
        assert [part() for part in parts] == [None] * len(parts)
    finally:
        gc.enable()


def test_what_is_evaluated_is_what_is_served(run: Run, retriever: Retriever) -> None:
    found = api.evaluate_bundle(retriever)
    for name, value in evaluate_part(run.factors(TEST), run.dataset, TEST, run.config.evaluation).items():
        for way in ("exact", "index", "live"):
            assert found[way][name] == pytest.approx(value, abs=1e-5, nan_ok=True), (way, name)
    assert found["index"]["recall@5"] == pytest.approx(run.metrics["test.recall@5"], abs=1e-9)
    # Test interactions are in no history and no vector: the answers would be other ones.
    assert not np.allclose(run.factors(TEST).users, run.factors(VALIDATION).users)
    # And the ranks are those of single calls, with what comes after the test left in.
    users = np.array([4, 9])
    seen = run.dataset.grouped_before(TEST)
    for row, best in zip(users, rank_items(retriever, users, 5, 2, seen), strict=True):
        gone = {str(retriever.item_ids[i]) for pairs in seen for i in pairs.take(np.array([row])).item}
        answer = retriever.recommend(Request(f"u{row}"), 5, 2, keep_seen=True, ban=list(gone))
        assert [i.id for i in answer.items] == [retriever.item_ids[i] for i in best]


def test_a_history_is_what_the_tower_has_read(run: Run, retriever: Retriever) -> None:
    data = run.dataset
    for row in (0, 7, 33):
        order = data.sort_by_time((data.pairs.user == row) & (data.parts != TEST))
        read = [(str(data.items.ids[int(data.pairs.item[i])]), bool(data.pairs.positive[i])) for i in order]
        assert len(read) > 3
        for n in (0, 1, 3, 1000):
            wanted = [(i, f"Item {i[1:]}", liked) for i, liked in read[max(0, len(read) - n) :]]
            assert stored_history(retriever, f"u{row}", n) == wanted
        assert set(stored_items(retriever, f"u{row}")) > {i for i, _ in read}  # the test part was seen as well
    with pytest.raises(UnknownId, match="user 'nobody' is not among the 60 users"):
        stored_history(retriever, "nobody", 5)
