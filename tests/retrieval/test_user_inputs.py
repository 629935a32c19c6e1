"""A request is read as the row of a table that it stands for."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from decimal import Decimal
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from worlds import settings

import twotower
from twotower import api
from twotower.arrays.ragged import Ragged
from twotower.arrays.types import UserId
from twotower.errors import DataError
from twotower.features.categorical import Categorical
from twotower.features.multi_hot import MultiHot
from twotower.features.numeric import Numeric
from twotower.features.schema import Schema
from twotower.features.sequence import Sequence
from twotower.features.text import Text
from twotower.features.values import canonical_ids
from twotower.features.vector import Vector
from twotower.model.inputs.gather import feed
from twotower.retrieval.request import Request
from twotower.retrieval.retriever import Retriever

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
        Numeric(name="mildness", side="user", statistic="mean", statistic_column="when"),
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
    row = retriever.user_ids.row(UserId(request.user_id)) if request.user_id is not None else None
    frame = users[row] if row is not None else users.clear(1).with_columns(pl.lit(0.0).alias("__count:bought"))
    texts = [f.source for f in schema.side("user") if isinstance(f, Text)]
    numbers = {f.source for f in schema.side("user") if isinstance(f, Numeric | Vector)}
    categories = {f.source for f in schema.side("user") if isinstance(f, Categorical | MultiHot)} - numbers
    frame = frame.with_columns(canonical_ids(frame[name]).cast(pl.String).alias(name) for name in texts)
    values = dict(request.features)
    if row is None and request.user_id is not None:
        values.setdefault(schema.user_id, request.user_id)
    for name, value in values.items():
        if frame.schema[name] == pl.Boolean and isinstance(value, str) and value.lower() in ("true", "false"):
            value = value.lower() == "true"
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
            stored = retriever.loaded.columns[f.name]
            assert isinstance(stored, Ragged)
            columns[f.name] = (
                stored.take(np.array([row])) if row is not None else Ragged(stored.values[:0], np.zeros(2, np.int64))
            )
        elif f.source in request.features:
            encoded = columns[f.name]
            codes: Any = encoded.values if isinstance(encoded, Ragged) else encoded
            if codes.dtype == np.int32 and not codes.any():
                unknown.append(f.name)
    return feed(retriever.loaded.fields, columns, np.array([0]))


def by_the_tower(retriever: Retriever, request: Request, unknown: list[str]) -> dict[str, Any]:
    given = retriever.user_inputs.read(retriever.query(request))
    unknown += given.unknown
    return given.feed


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
        ["7", "007", "-7", "-0", "7.0", "7.5", "true", "True", "free", "shop1", "漢", "少即是多", "more IS", "", " ",
         "a|b", "|a||7|",
         "222", "\\udcff", "９", "+7", "9" * 5000]
    ),
    st.lists(
        st.one_of(
            st.none(), st.booleans(), st.integers(-2, 4), st.floats(width=16), st.sampled_from(["a", "1", ""])
        ), max_size=3,
    ),
    st.lists(st.lists(st.integers(0, 3), max_size=2), max_size=2),
    st.sampled_from([{}, {"a": 1}, b"7", (1, 2), {1, 2}, 1j, Decimal("7"), datetime(2020, 1, 1), range(2), object]),
    st.text(max_size=3),
    st.integers(),
    st.floats(),
)  # fmt: skip


@examples(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
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
    required: dict[str, Any] = {"plan": "paid", "years": 2}
    for told in (features, required | features):
        request = Request(user, told)
        found = outcome(lambda unknown: by_the_tower(wide_retriever, request, unknown))  # noqa: B023
        assert found == outcome(lambda unknown: by_the_table(wide_retriever, request, unknown))  # noqa: B023


def test_columns_that_a_request_and_a_filter_may_name(retriever: Retriever, wide_retriever: Retriever) -> None:
    assert retriever.user_columns == ["city", "age", "income", "motto"]
    assert retriever.item_columns == [
        c for c in retriever.dataset.items.frame.columns if c not in ("__count:shown", "__mean:mean_stars")
    ]
    for asked in (retriever, wide_retriever):
        for column in asked.item_columns:
            with suppress(DataError):  # of a column of numbers
                assert asked.recommend(Request(asked.user_ids[0]), 3, where={column: "no such value"}).items == []
