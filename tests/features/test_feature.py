"""Every kind of feature, registered or of elsewhere, keeps the protocol: alone, in a dataset, and in the service."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import numpy as np
import polars as pl
import pytest
from mykinds.carriers import Curved
from mykinds.features import Cyclic
from pydantic import ValidationError
from worlds import EVERYTHING_SCHEMA, everything, settings

from twotower import api
from twotower.arrays.ragged import Column, Ragged
from twotower.data import memmap
from twotower.data.config import DataConfig
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.memmap import load_tables, save_tables
from twotower.data.prepare import write_prepared
from twotower.data.split import SplitConfig
from twotower.data.tables import check
from twotower.errors import DataError, TwoTowerError
from twotower.features.encoder import Encoder, EncoderState
from twotower.features.encoders import read_vocabularies, write_vocabularies
from twotower.features.event_sequence import EventSequence
from twotower.features.feature import Feature
from twotower.features.field import InputField
from twotower.features.schema import FEATURES, EventRule, Schema
from twotower.features.side import SIDES, FeatureSide
from twotower.retrieval.request import Request
from twotower.retrieval.retriever import Retriever

KINDS: tuple[type[Feature], ...] = (*FEATURES, Cyclic, Curved)
IDS = EVERYTHING_SCHEMA.features[0], EVERYTHING_SCHEMA.side("item")[0]
ROWS = 60
CANDIDATES: dict[str, list[Any]] = {
    "numbers": [float(i % 7) for i in range(ROWS)],
    "vectors": [[float(i % 5), 1.0, -0.5] for i in range(ROWS)],
    "words": [f"v{i % 6}" for i in range(ROWS)],
    "texts": [f"less is more {i % 4}" for i in range(ROWS)],
    "dates": [datetime.date(2020, 1 + i % 7, 1 + i % 9) for i in range(ROWS)],
    "days": [f"2020-01-{1 + i % 9:02}" for i in range(ROWS)],
    "lists": [[f"v{i % 6}", f"w{i % 3}"][: i % 3] for i in range(ROWS)],
}
"""Columns of which a kind must be able to read one."""


def sides(kind: type[Feature]) -> tuple[FeatureSide, ...]:
    """The sides of the user tower that a kind may have, the most usual first."""
    found = get_args(kind.model_fields["side"].annotation)
    return tuple(side for side in ("user", "context") if side in found)


def variants(kind: type[Feature]) -> Iterator[Feature]:
    """The kind with its defaults, then with each count that is 0 and each choice of words set to another value."""
    base = kind(name="x", side=sides(kind)[0])
    yield base
    for key, info in kind.model_fields.items():
        others: list[Any] = [3] if info.annotation is int and info.default == 0 and key != "width" else []
        others += [w for w in get_args(info.annotation) if isinstance(w, str) and key not in ("side", "missing")]
        for value in others:
            with suppress(ValidationError):  # an option that goes with another only
                yield base.model_validate(base.model_dump() | {key: value})


def columns(feature: Feature) -> Iterator[pl.Series]:
    """The columns that a feature can be fitted on, with a missing value in the middle."""
    for name, values in CANDIDATES.items():
        series = pl.Series(name, [*values[:31], None, *values[32:]])
        try:
            feature.fit(series, ones(len(series))).transform(series)
        except DataError:
            continue
        yield series


def of_types(kind: type[Feature]) -> dict[str, object]:
    """The options of a schema whose log has types of events, for a kind that reads them."""
    rules = {"5": EventRule(), "4": EventRule(weight=0.5), "*": EventRule(target="negative")}
    return {"label": "", "event": "stars", "events": rules} if issubclass(kind, EventSequence) else {}


def ones(n: int) -> Any:
    return np.ones(n, np.int64)


CASES = [
    pytest.param(f, c, id=f"{f.kind}-{'-'.join(str(v) for v in f.model_dump(exclude_defaults=True).values())}-{c.name}")
    for kind in KINDS
    for f in variants(kind)
    if not f.history
    for c in columns(f)
]
alone = pytest.mark.parametrize(("feature", "column"), CASES)
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
on_every_side = pytest.mark.parametrize(
    ("kind", "side"), [pytest.param(kind, side, id=f"{kind.kind}-{side}") for kind in KINDS for side in sides(kind)]
)


def same(a: Column, b: Column) -> bool:
    pairs = zip(*([c.values, c.offsets] if isinstance(c, Ragged) else [c] for c in (a, b)), strict=True)
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in pairs)


def fits(column: Column, field: InputField, rows: int) -> None:
    """Check that an encoded column is what its field says."""
    assert len(column) == rows
    if field.length:
        assert isinstance(column, np.ndarray)
        assert column.dtype == np.float32
        assert column.shape == (rows, field.length)
        assert np.isfinite(column).all()
        return
    assert isinstance(column, Ragged) == (field.kind == "bag")
    codes = column.values if isinstance(column, Ragged) else column
    assert codes.dtype == np.int32
    assert codes.ndim == 1
    assert not len(codes) or 0 <= codes.min() <= codes.max() < field.rows


@every_kind
def test_a_kind_is_documented_and_refuses_the_options_of_others(kind: type[Feature]) -> None:
    assert kind.__doc__
    assert all(info.description for info in kind.model_fields.values())
    others = {key for other in FEATURES for key in other.model_fields} - set(kind.model_fields)
    for key in others:
        with pytest.raises(ValidationError, match=f"unknown key '{key}'"):
            kind.model_validate({"name": "x", "side": "user", key: 1})


@every_kind
def test_a_kind_is_read_back_from_its_section(kind: type[Feature]) -> None:
    for feature in variants(kind):
        ids = [f.model_dump(mode="json") for f in IDS]
        columns = {"user_id": "uid", "item_id": "iid", "time": "when", "duplicates": "keep"} | of_types(kind)
        found = Schema.model_validate({**columns, "features": [*ids, feature.model_dump()]})
        assert found.features[2] == feature
        assert Schema.model_validate_json(found.model_dump_json()) == found


@every_kind
def test_a_kind_reads_a_column_or_interactions(kind: type[Feature]) -> None:
    for feature in variants(kind):
        assert feature.history is not None or list(columns(feature))
        assert bool(feature.source) == (feature.history is None)


@alone
def test_an_encoded_column_is_what_its_field_says(feature: Feature, column: pl.Series) -> None:
    encoder = feature.fit(column, ones(len(column)))
    field = feature.field(encoder)
    assert (field.name, field.width) == (feature.name, feature.width)
    fits(encoder.transform(column), field, len(column))
    for unseen in (column.clear(3), column.clear(1), column.clear(), pl.Series(column.name, [None, None])):
        fits(encoder.transform(unseen), field, len(unseen))


@alone
def test_values_never_seen_stay_in_the_field(feature: Feature, column: pl.Series) -> None:
    encoder = feature.fit(column.head(3), ones(3))
    fits(encoder.transform(column), feature.field(encoder), len(column))


@alone
def test_one_row_is_encoded_as_many_are(feature: Feature, column: pl.Series) -> None:
    encoder = feature.fit(column.head(20), ones(20))
    many = encoder.transform(column)
    for i in range(len(column)):
        one = encoder.transform(column[i : i + 1])
        if isinstance(many, Ragged):
            assert isinstance(one, Ragged)
            assert one.values.tolist() == many.row(i).tolist()
        else:
            assert isinstance(one, np.ndarray)
            np.testing.assert_array_equal(one[0], many[i])


@alone
def test_rows_without_training_interactions_teach_nothing(feature: Feature, column: pl.Series) -> None:
    seen = ones(len(column))
    seen[40:] = 0
    assert memory(feature.fit(column, seen)) == memory(feature.fit(column.head(40), seen[:40]))


def memory(encoder: Encoder) -> tuple[EncoderState, list[Any] | None]:
    vocabulary = encoder.stored_vocabulary()
    return encoder.state(), None if vocabulary is None else vocabulary.to_list()


@alone
def test_an_encoder_comes_back_from_its_state(feature: Feature, column: pl.Series) -> None:
    encoder = feature.fit(column, ones(len(column)))
    assert isinstance(encoder, feature.encoder)
    vocabulary = encoder.stored_vocabulary()
    kept = None if vocabulary is None else read_vocabularies(write_vocabularies({"x": vocabulary}))["x"]
    again = feature.encoder.restore(json.loads(encoder.state().model_dump_json()), kept)
    assert memory(again) == memory(encoder)
    assert same(again.transform(column), encoder.transform(column))
    assert feature.field(again) == feature.field(encoder)
    with pytest.raises(ValidationError):
        feature.encoder.restore({"no such key": 1}, kept)


@alone
def test_filters_and_requests_see_a_value_a_row(feature: Feature, column: pl.Series) -> None:
    assert len(feature.values(column)) == len(column)
    encoder = feature.fit(column, ones(len(column)))
    given = column.cast(feature.request_type(column.dtype))
    fits(encoder.transform(given), feature.field(encoder), len(column))


# ---- in a dataset


def world(
    kind: type[Feature], side: FeatureSide = "user"
) -> tuple[Schema, tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]]:
    """A schema with one feature of a kind beside the ids, of the users or of the context, and its tables."""
    users, items, actions = everything()
    feature = kind(name="x", side=side)
    if side == "context" and not feature.reads_time:
        values = next(columns(feature)).alias("x")
        actions = actions.with_columns(values[np.arange(actions.height) % len(values)])
    elif not feature.history and side == "user":
        users = users.with_columns(next(columns(feature)).alias("x"))
    changes: dict[str, object] = {"features": (*IDS, feature)} | of_types(kind)
    if feature.reads_time:  # days_since_previous reads the times of all interactions
        changes["duplicates"] = "keep"
    return EVERYTHING_SCHEMA.model_copy(update=changes), (users, items, actions)


def check_columns(data: Dataset) -> None:
    for side in SIDES:
        for field in data.encoders.fields(side):
            if side == "user" and field.name in data.context:
                fits(data.context[field.name], field, len(data.pairs))
            else:
                fits(data.side(side).columns[field.name], field, len(data.side(side)))


@on_every_side
def test_a_dataset_holds_the_column_also_after_its_files(
    kind: type[Feature], side: FeatureSide, tmp_path: Path
) -> None:
    schema, tables = world(kind, side)
    split = SplitConfig(kind="last")
    data = build_dataset(check(*tables, schema), schema, split)
    check_columns(data)
    (tmp_path / "run").mkdir()
    save_tables(data, tmp_path / "run")
    again = load_tables(tmp_path / "run", schema, split)
    check_columns(again)
    assert again.digest == data.digest
    names = ("users", "items", "interactions")
    for name, frame in zip(names, tables, strict=True):
        frame.write_parquet(tmp_path / f"{name}.parquet")
    paths = {name: str(tmp_path / f"{name}.parquet") for name in names}
    prepared = write_prepared(DataConfig(**paths), schema, split, tmp_path / "prepared")
    check_columns(prepared)
    check_columns(memmap.MemmapDataset.open(tmp_path / "prepared"))
    assert prepared.encoders.digest == memmap.MemmapDataset.open(tmp_path / "prepared").encoders.digest


@on_every_side
def test_missing_error_refuses_a_gap(kind: type[Feature], side: FeatureSide) -> None:
    schema, tables = world(kind, side)
    feature = schema.features[2]
    if "missing" not in kind.model_fields:
        assert feature.history or feature.reads_time
        return
    strict = feature.model_copy(update={"missing": "error"})
    schema = schema.model_copy(update={"features": (*IDS, strict)})
    with pytest.raises(DataError, match="feature 'x' has missing = 'error'"):
        check(*tables, schema)


@on_every_side
def test_a_run_is_trained_published_and_asked(kind: type[Feature], side: FeatureSide, tmp_path: Path) -> None:
    schema, tables = world(kind, side)
    run = api.fit(tables, schema, settings(train={"epochs": 1}), folder=tmp_path / "run")
    api.publish(run, tmp_path / "store", force=True)
    retriever = api.retriever(tmp_path / "store")
    feature = schema.features[2]
    if side == "context":
        asked_in_a_context(retriever, feature, tables[2])
        return
    value = {} if feature.history else {"x": next(v for v in tables[0]["x"].to_list() if v is not None)}
    known = retriever.recommend(Request("u1"), k=3)
    assert len(known.items) == 3
    assert len(retriever.recommend(Request(features=value), k=3).items) == 3
    if feature.history:
        assert len(retriever.recommend(Request(history=[("i1", True)]), k=3).items) == 3
    else:
        with pytest.raises(TwoTowerError, match="request: feature 'x' is"):
            retriever.recommend(Request(features={"x": {"no": "value"}}), k=3)


def asked_in_a_context(retriever: Retriever, feature: Feature, actions: pl.DataFrame) -> None:
    """Check that a request gives the column, or a time, and that one which may not lack it is refused."""
    column = "when" if feature.reads_time else "x"
    value = next(v for v in actions[column].to_list() if v is not None)
    found = retriever.recommend(Request("u1", context={column: value}), 3, 2)
    assert len(found.items) == 3
    assert len(retriever.recommend(Request(context={column: value}), 3, 2).items) == 3
    with pytest.raises(TwoTowerError, match=f"request: context '{column}' is"):
        retriever.recommend(Request("u1", context={column: {"no": "value"}}), 3, 2)
    if feature.reads_time:
        assert len(retriever.recommend(Request("u1"), 3, 2).items) == 3
    else:
        with pytest.raises(TwoTowerError, match="request: context lacks 'x'"):
            retriever.recommend(Request("u1"), 3, 2)


def test_a_day_has_no_end() -> None:
    encoder = Cyclic(name="hour", side="user").fit(pl.Series("hour", [0.0]), ones(1))
    late, midnight, early, noon = encoder.transform(pl.Series("hour", [23.0, 24.0, 1.0, 12.0]))
    assert np.linalg.norm(late - midnight) == pytest.approx(np.linalg.norm(early - midnight), abs=1e-6)
    assert np.linalg.norm(noon - midnight) == pytest.approx(2)
