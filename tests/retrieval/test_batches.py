"""A table of users is answered row by row as single requests are, by every kind of index."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from mykinds.indexes import Lsh
from service_client import clients
from worlds import ID_FEATURES, settings

import twotower
from twotower import api
from twotower.errors import ConfigError, DataError
from twotower.features.schema import Schema
from twotower.features.sequence import Sequence
from twotower.index import INDEXES
from twotower.index.approximate import ApproximateIndex
from twotower.retrieval.batches import embed_batch, recommend_batch, with_seconds
from twotower.retrieval.request import Answer, Request, UnknownId
from twotower.retrieval.retriever import Retriever
from twotower.runs import Run

KINDS = [kind.kind for kind in (*INDEXES, Lsh)]
ITEMS, USERS = 600, 50
SCHEMA = Schema(label="liked", time="at", time_unit="order",
                features=(*ID_FEATURES, Sequence(name="history", side="user", pooling="mean")))  # fmt: skip


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """More items than an approximate index searches exactly; user 0 has seen one item, user 1 all, user 2 half."""
    rng = np.random.default_rng(3)
    seen = [1, ITEMS, ITEMS // 2, *rng.integers(1, 90, USERS - 3).tolist()]
    user = np.repeat(np.arange(USERS), seen)
    item = np.concatenate([rng.permutation(ITEMS)[:n] for n in seen])
    at = rng.permutation(len(user))
    liked = (user % 3 == item % 3).astype(int)
    tables = (
        pl.DataFrame({"user_id": np.arange(USERS)}),
        pl.DataFrame({"item_id": np.arange(ITEMS), "genre": [f"g{i % 3}" for i in range(ITEMS)]}),
        pl.DataFrame({"user_id": user, "item_id": item, "liked": liked, "at": at}),
    )
    return twotower.fit(tables, SCHEMA, settings(), folder=tmp_path_factory.mktemp("wide") / "run")


class Served(dict[str, Retriever]):
    """A retriever of the same vectors for each kind of index, made when it is first asked for."""

    def __init__(self, run: Run, folder: Path) -> None:
        self.run, self.folder = run, folder

    def __missing__(self, kind: str) -> Retriever:
        options: dict[str, Any] = {"kind": kind, "min_recall": 0.01, "k": 5}
        if INDEXES.find(kind).remote:
            options["uri"] = str(self.folder / "milvus.db")
        store = self.folder / kind.rpartition(":")[2]
        api.publish(self.run, store, INDEXES.parse(options), force=True)
        self[kind] = api.retriever(store)
        return self[kind]


@pytest.fixture(scope="module")
def served(wide: Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    found = Served(wide, tmp_path_factory.mktemp("kinds"))
    yield found
    if any(INDEXES.find(kind).remote for kind in found):
        from milvus_lite.server_manager import server_manager_instance

        server_manager_instance.release_server(str(found.folder / "milvus.db"))


def answers_of(frame: pl.DataFrame, users: list[Any]) -> list[tuple[list[Any], list[float], set[str]]]:
    """Items, scores and sources of each user, whose ranks are checked."""
    found = []
    for user in users:
        own = frame.filter(pl.col("user_id") == user)
        assert own["rank"].to_list() == list(range(1, len(own) + 1))
        found.append((own["item_id"].cast(pl.String).to_list(), own["score"].to_list(), {*own["source"]}))
    return found


def as_rows(answer: Answer) -> tuple[list[Any], list[float], set[str]]:
    return [i.id for i in answer.items], [i.score for i in answer.items], {answer.source for _ in answer.items[:1]}


CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "plain": (7, {}),
    "filtered": (7, {"where": {"genre": "g1"}}),
    "seen": (7, {"keep_seen": True}),
    "banned": (7, {"ban": [str(i) for i in range(0, ITEMS, 5)]}),
    "allowed": (7, {"allow": [str(i) for i in range(40)]}),
    "all of it": (60, {"where": {"genre": "g2"}, "ban": ["2", "5"], "keep_seen": True}),
    "more than there are": (ITEMS + 9, {}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_index_answers_a_table_as_it_answers_single_requests(served: Served, kind: str, case: str) -> None:
    retriever, (k, filters) = served[kind], CASES[case]
    users = [*range(USERS), USERS + 1]
    frame = recommend_batch(retriever, pl.DataFrame({"user_id": users}), k, **filters)
    assert frame.schema == {
        "user_id": pl.Int64, "rank": pl.Int32, "item_id": pl.Int64, "score": pl.Float32, "source": pl.String,
    }  # fmt: skip
    assert frame["user_id"].is_sorted()
    expected = [as_rows(retriever.recommend(Request(str(user)), k, 1, **filters)) for user in users]
    assert answers_of(frame, users) == expected
    if case == "plain":
        assert not expected[1][0], "user 1 has seen everything"
        assert expected[-1][2] == {"popular"}


@pytest.mark.parametrize("kind", KINDS)
def test_the_approximate_indexes_of_these_tests_do_not_search_exactly(served: Served, kind: str) -> None:
    index = served[kind].index
    assert isinstance(index, ApproximateIndex) == (kind not in ("exact", "auto"))
    assert index.batch_invariant == (kind in ("exact", "auto"))


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_does_not_depend_on_the_rest_of_its_table(served: Served, kind: str) -> None:
    retriever = served[kind]
    whole = recommend_batch(retriever, pl.DataFrame({"user_id": range(USERS)}), 9)
    parts = [recommend_batch(retriever, pl.DataFrame({"user_id": [user]}), 9) for user in range(USERS)]
    assert whole.equals(pl.concat(parts))


# ---- method 2, and what a row gives


TABLE = pl.DataFrame(
    {
        "uid": ["u1", "u2", "nobody", "u3", "somebody", "u4", "u5", "new"],
        "age": [None, 33.0, None, float("nan"), 20.0, None, None, None],
        "city": [None, "city1", None, None, "atlantis", None, None, None],
        "history": [None, None, None, ["i1", "i2"], None, [], None, None],
        "events": [None, None, None, None, ["i4", "zz"], None, ["i9"], ["i3"]],
        "extra": range(8),
    }
)


def request_of(row: dict[str, Any]) -> Request:
    features = {n: row[n] for n in ("age", "city") if row[n] is not None and row[n] == row[n]}
    lists = {n: row[n] for n in ("history", "events") if row[n] is not None}
    return Request.parse({"user_id": row["uid"], "features": features} | lists)


def test_method_2_answers_each_row_as_its_request(retriever: Retriever) -> None:
    for filters in ({}, {"keep_seen": True}, {"ban": ["i5"], "where": {"brand": "brand0"}}):
        frame = recommend_batch(retriever, TABLE, 6, 2, **filters)
        found = answers_of(frame, TABLE["uid"].to_list())
        for row, (items, scores, sources) in zip(TABLE.iter_rows(named=True), found, strict=True):
            items_expected, scores_expected, sources_expected = as_rows(
                retriever.recommend(request_of(row), 6, 2, **filters)
            )
            assert (items, sources) == (items_expected, sources_expected), row
            np.testing.assert_allclose(scores, scores_expected, atol=1e-5)
    assert {"model", "cold_start", "popular"} == {*recommend_batch(retriever, TABLE, 3, 2)["source"]}


def test_each_column_changes_the_answers_of_method_2_and_none_those_of_method_1(retriever: Retriever) -> None:
    for column in ("age", "city", "history", "events"):
        without = TABLE.drop(column)
        assert not recommend_batch(retriever, TABLE, 6, 2).equals(recommend_batch(retriever, without, 6, 2)), column
        assert recommend_batch(retriever, TABLE, 6).equals(recommend_batch(retriever, without, 6))
    likes = TABLE.with_columns(
        events=pl.Series([None, None, None, None, None, None, [{"id": "i9", "liked": False}], None])
    )
    request = Request("u5", events=[("i9", False)])
    expected = retriever.recommend(request, 6, 2)
    assert answers_of(recommend_batch(retriever, likes, 6, 2), ["u5"])[0][0] == [i.id for i in expected.items]


@pytest.mark.parametrize("dtype", [pl.Datetime("us"), pl.Datetime("ns", "Europe/Zurich"), pl.Date, pl.Float64])
def test_events_of_a_table_have_the_times_of_the_log(dtype: pl.DataType) -> None:
    days = pl.Series("time", [1_699_920_000, 1_700_006_400, None])  # midnight, UTC
    times = days.cast(pl.Float64) if dtype == pl.Float64 else pl.from_epoch(days).dt.cast_time_unit("us")
    if isinstance(dtype, pl.Datetime) and dtype.time_zone:
        times = times.dt.replace_time_zone("UTC").dt.convert_time_zone(dtype.time_zone)
    rows = pl.DataFrame({"id": ["a", "b", "c"], "time": times.cast(dtype)})
    lists = rows.select(pl.struct("id", "time").implode()).to_series()
    for events in (lists, lists.list.to_array(3)):
        found = with_seconds(events).to_list()[0]
        assert [(e["id"], e["time"]) for e in found] == [*zip("abc", days.to_list(), strict=True)]
    plain = pl.Series([["a", "b"]])
    assert with_seconds(plain).equals(plain)


@pytest.mark.parametrize("method", [1, 2])
def test_rows_equal_the_answers_over_http(store: Path, retriever: Retriever, method: int) -> None:
    table = TABLE if method == 2 else TABLE.select("uid")
    frame = recommend_batch(retriever, table, 8, method, ban=["i7"])  # type: ignore[arg-type]
    with clients(store) as make:
        client = make()
        for row in TABLE.iter_rows(named=True):
            body: dict[str, Any] = {"user_id": row["uid"], "k": 8, "method": method, "ban": ["i7"]}
            if method == 2:
                request = request_of(row)
                body |= {"features": dict(request.features)}
                body |= {n: row[n] for n in ("history", "events") if row[n] is not None}
            reply = client.post("/v1/recommend", body).json()
            ((items, scores, sources),) = answers_of(frame, [row["uid"]])
            assert items == [i["id"] for i in reply["items"]]
            assert sources == {reply["source"]}
            assert reply["truncated"] == (len(items) < 8)
            np.testing.assert_allclose(scores, [i["score"] for i in reply["items"]], atol=1e-5)


def test_vectors_are_those_of_single_requests(retriever: Retriever) -> None:
    for method in (1, 2):
        frame = embed_batch(retriever, TABLE, method)
        assert frame.schema["vector"] == pl.Array(pl.Float32, retriever.index.width)
        assert frame["user_id"].equals(TABLE["uid"].rename("user_id"))
        for row, found in zip(TABLE.iter_rows(named=True), frame.iter_rows(named=True), strict=True):
            request = request_of(row) if method == 2 else Request(row["uid"])
            expected = retriever.embed_request(request, method)
            assert found["source"] == expected.source
            if expected.source == "popular":
                assert found["vector"] is None
            else:
                np.testing.assert_allclose(found["vector"], expected.vector[0], atol=1e-5)


# ---- tables, types and blocks


def test_any_producer_of_an_arrow_stream_is_a_table(retriever: Retriever) -> None:
    expected = retriever.recommend_frame(TABLE, 4, 2)
    batches = pa.table(TABLE).to_batches()
    assert len(batches) == 1
    for table in (pa.table(TABLE), batches[0], TABLE.lazy()):
        assert retriever.recommend_frame(table, 4, 2).equals(expected)
    back = pa.table(recommend_batch(retriever, batches[0], 4, 2))
    assert back.column_names == ["user_id", "rank", "item_id", "score", "source"]
    assert pl.DataFrame(back).equals(expected)


def test_ids_keep_the_type_of_the_table(served: Served) -> None:
    retriever = served["exact"]
    expected = recommend_batch(retriever, pl.DataFrame({"user_id": [3, 4]}), 5)
    for dtype in (pl.Int32, pl.UInt8, pl.String):
        frame = recommend_batch(retriever, pl.DataFrame({"user_id": pl.Series([3, 4]).cast(dtype)}), 5)
        assert frame["user_id"].dtype == dtype
        assert frame.drop("user_id").equals(expected.drop("user_id"))


def test_the_column_of_ids_is_the_schemas_or_user_id(retriever: Retriever) -> None:
    expected = recommend_batch(retriever, TABLE.select("uid"), 3)
    assert recommend_batch(retriever, TABLE.select(user_id="uid"), 3).equals(expected)
    both = TABLE.select("uid", user_id=pl.lit("u1"))
    assert recommend_batch(retriever, both, 3).equals(expected)


def test_blocks_are_answered_as_one_table(retriever: Retriever) -> None:
    """More users than a block has: 16,384 of few items, or 209 of 10,000 items."""
    some = [f"u{i % 60}" for i in range(300)]
    frame = recommend_batch(retriever, pl.DataFrame({"uid": some}), 10_000)
    first = recommend_batch(retriever, pl.DataFrame({"uid": some[:60]}), 10_000)
    assert frame.head(4 * len(first)).equals(pl.concat([first] * 4))
    many = pl.DataFrame({"uid": some * 60})
    vectors = embed_batch(retriever, many)
    assert vectors.height == 18_000
    assert vectors.tail(300).equals(vectors.head(300))


def test_a_table_without_rows_has_answers_without_rows(retriever: Retriever) -> None:
    frame = recommend_batch(retriever, TABLE.clear(), 4, 2)
    assert frame.schema == recommend_batch(retriever, TABLE, 4, 2).schema
    assert frame.is_empty()
    assert embed_batch(retriever, TABLE.clear()).is_empty()


# ---- unknown users and bad input


def test_unknown_users_get_popular_items_are_left_out_or_end_the_call(retriever: Retriever) -> None:
    popular = [i.id for i in retriever.recommend(Request(), 5, ban=["i3"]).items]
    users = pl.DataFrame({"uid": ["u1", "nobody", "u2", "noone"]})
    frame = recommend_batch(retriever, users, 5, ban=["i3"])
    for user in ("nobody", "noone"):
        assert answers_of(frame, [user]) == [(popular, [0.0] * 5, {"popular"})]
    dropped = recommend_batch(retriever, users, 5, unknown="drop", ban=["i3"])
    assert dropped.equals(frame.filter(pl.col("source") == "model"))
    with pytest.raises(UnknownId, match=r"user 'nobody' is not among the 60 users of this bundle; set `unknown` to"):
        recommend_batch(retriever, users, 5, unknown="error")
    # Users of whom the table gives something are not left out.
    assert {*recommend_batch(retriever, TABLE, 3, 2, unknown="drop")["user_id"]} == {*TABLE["uid"]} - {"nobody"}


BAD: dict[str, tuple[pl.DataFrame, dict[str, Any], str]] = {
    "no ids": (pl.DataFrame({"uidd": ["u1"]}), {}, "no column 'uid'; did you mean 'uidd'.*column 'uid' or 'user_id'"),
    "null id": (pl.DataFrame({"uid": ["u1", None]}), {}, "column 'uid' has 1 missing ids"),
    "lists": (pl.DataFrame({"uid": [["u1"]]}), {}, "column 'uid' holds List"),
    "k": (TABLE, {"k": 0}, "k is 0, expected 1 to 10,000"),
    "huge k": (TABLE, {"k": 10**9}, "expected 1 to 10,000"),
    "method": (TABLE, {"method": 3}, "method is 3"),
    "where": (TABLE, {"where": {"brnd": "x"}}, "no column 'brnd'; did you mean 'brand'"),
    "ban": (TABLE, {"ban": "i1"}, "expected a list of item ids"),
    "unknown": (TABLE, {"unknown": "guess"}, "`unknown` is 'guess', expected popular, drop, error"),
    "history": (TABLE.with_columns(history=pl.lit("i1")), {"method": 2}, "'history' holds String, expected lists"),
    "event": (
        TABLE.with_columns(events=[None, "i1"]), {"method": 2},
        "user 'u1': request: events.0: found null, expected an item id",
    ),
    "feature": (TABLE.with_columns(age=pl.lit("old")), {"method": 2}, "user 'u1': request: feature 'age' is 'old'"),
    "vector": (TABLE.with_columns(age=1e35), {"method": 2}, "user 'u1': the user tower's vector is not finite"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(retriever: Retriever, name: str) -> None:
    table, options, message = BAD[name]
    with pytest.raises((DataError, ConfigError), match=message) as e:
        recommend_batch(retriever, table, **options)
    assert "\n" not in str(e.value)
