"""Each encoder against a plain loop: what it learns, what it forgets, and that files give the same back."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from worlds import EVERYTHING_SCHEMA, ID_FEATURES

from twotower.arrays.ragged import Ragged
from twotower.data.dataset import Dataset
from twotower.errors import DataError, RunError
from twotower.features.categorical import Categorical, CategoricalEncoder
from twotower.features.encoders import Encoders, read_vocabularies, write_vocabularies
from twotower.features.multi_hot import MultiHot
from twotower.features.numeric import Numeric, NumericEncoder
from twotower.features.schema import Schema
from twotower.features.sequence import Sequence
from twotower.features.text import Text
from twotower.features.values import SINGLE_ROW_MAX_VALUES, UNKNOWN, canonical_ids, missing_count
from twotower.features.vector import Vector, VectorEncoder

FEW = examples(max_examples=25, deadline=None)
PLAIN_TEXT = st.text(st.characters(exclude_categories=["Cs"]))
IDS: dict[str, tuple[pl.DataType, st.SearchStrategy[Any], Any]] = {
    "int": (pl.Int64(), st.integers(-(2**63), 2**63 - 2), 2**63 - 1),
    "uint64": (pl.UInt64(), st.integers(2**53, 2**64 - 2), 2**64 - 1),
    "str": (pl.String(), PLAIN_TEXT, "never seen"),
    "long": (pl.String(), st.text("aé漢🎬", min_size=1, max_size=3).map(lambda s: s * 5_000), "a"),
}


def series(values: Any, dtype: Any = None) -> pl.Series:
    return pl.Series("col", values, dtype=dtype)


def ones(n: int) -> Any:
    return np.ones(n, np.int64)


def restored(encoder: CategoricalEncoder) -> CategoricalEncoder:
    vocabulary = read_vocabularies(write_vocabularies({"values": encoder.vocabulary}))["values"]
    return CategoricalEncoder.restore(json.loads(encoder.state().model_dump_json()), vocabulary)


def numeric(column: pl.Series, counts: Any, buckets: int = 0) -> NumericEncoder:
    return Numeric(name="col", side="user", buckets=buckets).fit(column, counts)


def test_numbers_without_a_deviation_are_refused_but_in_buckets() -> None:
    """Standardised, all others would be one number."""
    column = series([1.0, 2.0, 3.0, 1e300])
    with pytest.raises(DataError, match=r"values as large as 1e\+300 have no standard deviation"):
        numeric(column, ones(4))
    np.testing.assert_array_equal(numeric(column, ones(4), buckets=4).transform(column), [1, 2, 3, 4])
    assert numeric(column, np.array([1, 1, 1, 0])).deviation < 1, "a row without a training row counts for nothing"


def vocabulary(values: Any, counts: Any = None, **cut: Any) -> list[Any]:
    s = series(values)
    return CategoricalEncoder.fit(s, ones(len(s)) if counts is None else np.array(counts), **cut).vocabulary.to_list()


@pytest.mark.parametrize("kind", IDS)
@FEW
@given(st.data())
def test_fault_C8_ids_of_every_kind_get_codes_1_to_n_also_after_json(kind: str, data: st.DataObject) -> None:
    dtype, values, unseen = IDS[kind]
    known = data.draw(st.lists(values, min_size=1, max_size=20, unique=True).filter(lambda v: unseen not in v))
    ids = series(known, dtype)
    encoder = CategoricalEncoder.fit(ids, ones(len(known)))
    codes = encoder.transform(ids)
    assert sorted(codes) == list(range(1, len(known) + 1))
    assert encoder.rows == len(known) + 1
    again = restored(encoder)
    asked = series([*known, unseen, None], dtype)
    assert again.transform(asked).tolist() == encoder.transform(asked).tolist() == [*codes, UNKNOWN, UNKNOWN]
    assert again.vocabulary.to_list() == encoder.vocabulary.to_list()


KNOWN: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "int": ([-3, 0, 7, 2**53, 2**63 - 1], {}),
    "uint64": ([0, 7, 2**64 - 1], {"dtype": pl.UInt64}),
    "text": (["", "-3", "007", "7", "7.0", "7.5", "true", "漢", "a" * 5_000], {}),
    "float": ([7.0, 7.5, -3.0, 1e300], {}),
    "bool": ([True, False], {}),
    "none": (["x"], {}),
}
ONE = st.one_of(
    st.tuples(st.sampled_from([pl.Int64, pl.UInt64, pl.Int8, pl.Float64, pl.Float32, pl.String]),
        st.sampled_from([0, 7])),
    st.tuples(st.just(pl.Int64), st.one_of(st.none(), st.sampled_from([-3, 2**53, 2**63 - 1]),
        st.integers(-(2**63), 2**63 - 1))),
    st.tuples(st.just(pl.UInt64), st.sampled_from([2**63, 2**64 - 1])),
    st.tuples(
        st.just(pl.Float64), st.one_of(st.sampled_from([7.0, 7.5, -0.0, 1e300, float("nan"), 2.0**53]), st.floats())
    ),
    st.tuples(
        st.just(pl.String),
        st.one_of(st.sampled_from(["7", "007", "7.0", "-0", "-3", "+7", "９", "--3", "9" * 5_000, "true", "", "漢"]),
            PLAIN_TEXT),
    ),
    st.tuples(st.just(pl.Boolean), st.sampled_from([True, False, None])),
    st.tuples(st.just(pl.Null), st.none()),
    st.tuples(st.just(pl.Date), st.just(date(2020, 1, 1))),
)  # fmt: skip


@pytest.mark.parametrize("kind", KNOWN)
@pytest.mark.parametrize("buckets", [0, 5])
@FEW
@given(ONE)
def test_one_value_gets_the_code_it_has_in_a_column(kind: str, buckets: int, one: tuple[Any, Any]) -> None:
    known, how = KNOWN[kind]
    encoder = CategoricalEncoder.fit(pl.Series(known, **how), ones(len(known)), hash_buckets=buckets)
    asked = pl.Series("col", [one[1]]).cast(one[0])
    column = encoder.transform(pl.concat([asked, asked]))
    found = encoder.transform(asked)
    assert found.dtype == column.dtype == np.int32
    assert found.tolist() == column[:1].tolist()


@FEW
@given(
    st.sampled_from([(pl.String, "|"), (pl.List(pl.String), ""), (pl.List(pl.Float64), ""), (pl.List(pl.Boolean), "")]),
    st.data(),
)
def test_one_list_gets_the_codes_it_has_in_a_column(how: tuple[Any, str], data: st.DataObject) -> None:
    dtype, separator = how
    text = st.text("ab|7.", max_size=6)
    values: dict[Any, st.SearchStrategy[Any]] = {
        pl.String: text,
        pl.List(pl.String): st.lists(st.one_of(st.none(), text), max_size=4),
        pl.List(pl.Float64): st.lists(
            st.one_of(st.none(), st.sampled_from([7.0, 7.5, float("nan"), 1e300])), max_size=4
        ),
        pl.List(pl.Boolean): st.lists(st.one_of(st.none(), st.booleans()), max_size=4),
    }
    drawn = series(data.draw(st.lists(st.one_of(st.none(), values[dtype]), min_size=3, max_size=3)), dtype)
    encoder = MultiHot(name="col", side="user", separator=separator).fit(drawn[:2], np.array([1, 1]))
    column, found = encoder.transform(drawn), encoder.transform(drawn[2:])
    assert found.values.tolist() == column.values[column.offsets[2] :].tolist()
    assert found.offsets.tolist() == [0, len(found.values)]


@pytest.mark.parametrize("unseen", ["d", "", "A", None])
def test_fault_C3_an_unseen_category_gets_the_unknown_code(unseen: Any) -> None:
    encoder = CategoricalEncoder.fit(series(["a", "b", "c"]), ones(3))
    assert encoder.transform(series(["b", unseen])).tolist() == [2, UNKNOWN]


@FEW
@given(
    st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 4)), min_size=1, max_size=30),
    st.integers(1, 6),
    st.sampled_from([0.0, 0.05, 0.07, 0.1, 0.3, 0.5]),
)
def test_frequency_cuts_count_training_interactions(
    rows: list[tuple[str, int]], min_count: int, min_rate: float
) -> None:
    n: Counter[str] = Counter()
    for value, count in rows:
        n[value] += count
    total = max(1, sum(n.values()))
    kept = sorted(v for v in n if n[v] >= min_count and n[v] / total >= min_rate)
    values, counts = [v for v, _ in rows], [c for _, c in rows]
    assert vocabulary(values, counts, min_count=min_count, min_rate=min_rate) == kept


@pytest.mark.parametrize(
    ("value", "bucket"), [("cat", 40), (42, 84), ("漢字", 1), (2**64 - 1, 97), ("", 57), (None, UNKNOWN)]
)
def test_hash_buckets_are_the_same_in_every_release(value: Any, bucket: int) -> None:
    encoder = CategoricalEncoder.fit(series(["x"]), ones(1), hash_buckets=100)
    assert encoder.transform(series([value])).tolist() == [bucket]
    assert encoder.transform(series([value, value])).tolist() == [bucket, bucket], "by another way"
    assert encoder.rows == 101


SEVENS = {
    "int": series([7, 8]),
    "uint": series([7, 8], pl.UInt8),
    "float": series([7.0, 8.0]),
    "float with null": series([7.0, 8.0, None]),
    "float with nan": series([7.0, 8.0, float("nan")]),
    "float beside a fraction": series([7.0, 8.0, 2.5]),
    "float32 beside a fraction": series([7.0, 8.0, 0.1], pl.Float32),
    "text": series(["7", "8"]),
    "category": series(["7", "8"], pl.Categorical),
}


@pytest.mark.parametrize("hash_buckets", [0, 1000])
@pytest.mark.parametrize("asked", SEVENS)
@pytest.mark.parametrize("learnt", SEVENS)
def test_7_and_7_point_0_and_text_7_are_one_value(learnt: str, asked: str, hash_buckets: int) -> None:
    encoder = CategoricalEncoder.fit(SEVENS[learnt], ones(len(SEVENS[learnt])), hash_buckets=hash_buckets)
    assert encoder.transform(SEVENS[asked])[:2].tolist() == encoder.transform(SEVENS[learnt])[:2].tolist()
    assert UNKNOWN not in encoder.transform(SEVENS[asked])[:2]


@pytest.mark.parametrize(
    ("column", "spelling"),
    [
        (series([1.0, 2.5, float("inf")]), ["1", "2.5", "inf"]),
        (series([0.1], pl.Float32), ["0.1"]),
        (series([2.0**60, 1.0]), ["1.152921504606847e+18", "1"]),
        (series([True, False, None]), ["true", "false", None]),
        (series([2**70, 1], pl.Int128), [str(2**70), "1"]),
        (series([2**64 - 1, 1], pl.Int128), [2**64 - 1, 1]),
        (series([None, None]), [None, None]),
    ],
)
def test_every_scalar_has_one_spelling(column: pl.Series, spelling: list[Any]) -> None:
    assert canonical_ids(column).to_list() == spelling


@FEW
@given(st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6), st.just(float("nan")), st.just(float("inf"))), min_size=1))
def test_numbers_are_standardised_and_missing_ones_take_the_mean(values: list[float | None]) -> None:
    column = series(values, pl.Float64)
    encoder = numeric(column, ones(len(values)))
    present = np.array([v for v in values if v is not None and np.isfinite(v)])
    mean = present.mean() if len(present) else 0.0
    deviation = present.std() if len(present) and present.std() > 1e-12 else 1.0
    expected = [(v - mean) / deviation if v is not None and np.isfinite(v) else 0.0 for v in values]
    found = encoder.transform(column)
    assert isinstance(found, np.ndarray)
    assert found.shape == (len(values), 1)
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-4, atol=1e-6)
    assert missing_count(column) == len(values) - len(present)


@FEW
@given(st.lists(st.floats(-100, 100), min_size=1, max_size=40), st.integers(2, 8))
def test_quantile_buckets_number_upwards_and_missing_has_its_own(values: list[float], buckets: int) -> None:
    encoder = numeric(series(values), ones(len(values)), buckets)
    edges = sorted({float(np.quantile(values, i / buckets)) for i in range(1, buckets)})
    asked = [*values, -1e9, 1e9, None, float("nan"), float("inf")]
    found = encoder.transform(series(asked))
    assert isinstance(found, np.ndarray)
    expected = [0 if v is None or not np.isfinite(v) else 1 + sum(e <= v for e in edges) for v in asked]
    assert found.tolist() == expected
    assert found.max() <= buckets


LISTS = [["x", "y"], None, [], ["y", "z"], ["x", None]]
MULTI_HOT = {
    "list": (series(LISTS), ""),
    "text": (series(["x|y", None, "", "y|z", "x|"]), "|"),
    "category": (series(["x|y", None, "", "y|z", "x|"], pl.Categorical), "|"),
    "list despite a separator": (series(LISTS), "|"),
    "categories": (series([["x", "y"], None, ["", ""], ["y", "z"], ["x", None]], pl.List(pl.Categorical)), ""),
}


@pytest.mark.parametrize("make", MULTI_HOT)
def test_multi_hot_reads_lists_and_separated_text_alike_and_drops_unknown_values(make: str) -> None:
    column, separator = MULTI_HOT[make]
    feature = MultiHot(name="col", side="item", separator=separator, min_count=2)
    encoder = feature.fit(column, ones(5))
    assert encoder.values.vocabulary.to_list() == ["x", "y"]
    found = encoder.transform(column)
    assert [row.tolist() for row in np.split(found.values, found.offsets[1:-1])] == [[1, 2], [], [], [2], [1]]


@pytest.mark.parametrize("dtype", [pl.String, pl.Categorical, pl.Enum(["x|y", "z"])])
def test_single_values_of_separated_text_are_those_between_the_separators(dtype: pl.DataType) -> None:
    feature = MultiHot(name="col", side="item", separator="|")
    assert feature.values(series(["x|y", None, "z"], dtype)).to_list() == [["x", "y"], None, ["z"]]


def test_multi_hot_reads_fixed_arrays_and_a_column_without_any_value() -> None:
    feature = MultiHot(name="col", side="item")
    encoder = feature.fit(series([[1, 2], [2, 3]], pl.Array(pl.Int64, 2)), ones(2))
    assert encoder.transform(series([[3, 9], [1, 1]])).values.tolist() == [3, 1, 1]
    assert len(encoder.transform(series([None, None]))) == 2
    assert feature.fit(series([None, []]), ones(2)).values.rows == 1


def test_the_rate_cut_of_multi_hot_is_a_share_of_the_interactions_not_of_the_values() -> None:
    # Of 10 interactions, 3 have "rare"; of their 33 values it is less than a tenth.
    column, counts = series([["a", "b", "c"], ["a", "b", "c", "rare"]]), np.array([7, 3])
    encoder = MultiHot(name="col", side="item", min_rate=0.3).fit(column, counts)
    assert "rare" in encoder.values.vocabulary


@pytest.mark.parametrize("dtype", [pl.List(pl.Float64), pl.Array(pl.Float64, 2), pl.List(pl.Int32)])
def test_vectors_are_scaled_to_a_mean_square_of_one_and_missing_ones_are_zeros(dtype: pl.DataType) -> None:
    column = series([[3, 4], None, [-4, 3]], dtype)
    encoder = Vector(name="col", side="item").fit(column, ones(3))
    found = encoder.transform(column)
    root = np.sqrt((9 + 16) / 2)
    np.testing.assert_allclose(found, np.array([[3, 4], [0, 0], [-4, 3]]) / root, rtol=1e-6)
    assert encoder.transform(series([None])).tolist() == [[0, 0]]


def test_numbers_in_vectors_that_are_not_finite_are_zeros() -> None:
    encoder = VectorEncoder(length=2, scale=1.0)
    column = series([[float("nan"), 1.0], [float("inf"), 2.0], [None, 3.0]])
    assert encoder.transform(column).tolist() == [[0, 1], [0, 2], [0, 3]]


@pytest.mark.parametrize(
    ("column", "length", "words"),
    [
        (series([[1.0, 2.0], [3.0], [4.0]]), 0, "2 vectors of unequal length, the first in row 1 with 1 numbers, exp"),
        (series([[1.0, 2.0]]), 3, "with 2 numbers, expected 3; pad or drop"),
        (series(["1,2"]), 0, "found String, expected lists of numbers; convert it"),
        (series([None, None]), 0, "every vector is missing or empty"),
    ],
)
def test_vectors_of_unequal_length_or_other_type_are_refused(column: pl.Series, length: int, words: str) -> None:
    with pytest.raises(DataError, match=words):
        Vector(name="col", side="item", length=length).fit(column, ones(len(column)))


@pytest.mark.parametrize(("share", "rows"), [(True, 3), (False, 4)])
def test_a_shared_sequence_has_the_rows_of_the_id_feature_it_shares(share: bool, rows: int) -> None:
    schema = Schema(
        features=(
            ID_FEATURES[0],
            Categorical(name="item_id", side="item", min_count=2),
            Sequence(name="history", side="user", share_embedding=share),
        )
    )
    frames: Any = {"user": pl.DataFrame({"user_id": [1, 2]}), "item": pl.DataFrame({"item_id": [10, 11, 12]})}
    encoders = Encoders.fit(schema, frames, {"user": np.array([3, 3]), "item": np.array([3, 1, 2])})
    history = encoders.fields("user")[1]
    assert history.rows == rows
    codes = encoders.history_codes(schema.histories("user")[0], frames["item"])
    assert codes.tolist() == ([1, 0, 2] if share else [1, 2, 3])


def test_encoders_come_back_from_their_files_to_the_last_bit(tmp_path: Path) -> None:
    schema = Schema(
        features=(
            ID_FEATURES[0],
            Categorical(name="a.b [x]", side="user"),
            Numeric(name="age", side="user"),
            Numeric(name="income", side="user", buckets=5),
            MultiHot(name="tags", side="user"),
            ID_FEATURES[1],
            Vector(name="picture", side="item"),
            Text(name="label", side="item"),
        )
    )
    rng = np.random.default_rng(0)
    odd = ['"', "\\", "]", "\n", "\u2028", "漢", "🎬", ""]
    user = {"user_id": np.array([2**64 - 1, *range(7)], np.uint64), "a.b [x]": odd, "age": rng.normal(size=8) * 1e-7,
            "income": rng.random(8) * 1e9, "tags": [[o] for o in odd]}  # fmt: skip
    item = {"item_id": [-(2**63), 2**63 - 1], "picture": [[0.1, 0.7], [1.0, 2.0]], "label": odd[-3:-1]}
    frames: Any = {"user": pl.DataFrame(user), "item": pl.DataFrame(item)}
    encoders = Encoders.fit(schema, frames, {"user": ones(8), "item": ones(2)})
    encoders.save(tmp_path)
    again = Encoders.load(schema, tmp_path)
    assert again.digest == encoders.digest
    for side in frames:
        for name, column in encoders.transform(side, frames[side]).items():
            back = again.transform(side, frames[side])[name]
            for a, b in zip(*(vars(c).values() if isinstance(c, Ragged) else [c] for c in (column, back)), strict=True):
                np.testing.assert_array_equal(a, b)
    # A mean that is no number is read as it is written.
    broken = json.loads((tmp_path / "encoders.json").read_text())
    broken["sides"]["user"]["age"]["mean"] = float("nan")
    (tmp_path / "encoders.json").write_text(json.dumps(broken))
    assert np.isnan(Encoders.load(schema, tmp_path).by_side["user"]["age"].state().model_dump()["mean"])


def test_the_digest_tells_vocabularies_apart() -> None:
    schema = Schema(features=ID_FEATURES)

    def digest(users: list[Any]) -> str:
        frames: Any = {"user": pl.DataFrame({"user_id": users}), "item": pl.DataFrame({"item_id": [1]})}
        return Encoders.fit(schema, frames, {"user": ones(len(users)), "item": ones(1)}).digest

    all_users: list[list[Any]] = [[1, 2], ["1", "2"], ["12"], ["1", "2", ""], [2**63, 1], [12], ["12", ""]]
    assert len({digest(users) for users in all_users}) == len(all_users)
    assert digest([2, 1, 1]) == digest([1, 2])


@pytest.mark.parametrize(
    "frame",
    [{"user.user_id": [["a"]]}, {"user.user_id": [[1, None]]}, {}],
)
def test_vocabularies_of_another_type_or_none_are_refused(frame: dict[str, Any], tmp_path: Path) -> None:
    schema = Schema(features=ID_FEATURES)
    frames: Any = {"user": pl.DataFrame({"user_id": [77]}), "item": pl.DataFrame({"item_id": [1]})}
    Encoders.fit(schema, frames, {"user": ones(1), "item": ones(1)}).save(tmp_path)
    whole = read_vocabularies((tmp_path / "vocabularies.arrow").read_bytes())
    if frame == {"user.user_id": [["a"]]}:  # another type of ids is a vocabulary still
        frame = {name: [values] for name, values in whole.items() if name != "user.user_id"}
    pl.DataFrame(frame).write_ipc(tmp_path / "vocabularies.arrow")
    with pytest.raises(RunError, match=r"vocabularies\.arrow: damaged, or of another encoders\.json"):
        Encoders.load(schema, tmp_path)
    states = json.loads((tmp_path / "encoders.json").read_text())
    states["vocabularies"] = hashlib.sha256((tmp_path / "vocabularies.arrow").read_bytes()).hexdigest()
    (tmp_path / "encoders.json").write_text(json.dumps(states))
    with pytest.raises(RunError, match=r"vocabularies\.arrow: damaged \(|encoders\.json: the encoders do not fit"):
        Encoders.load(schema, tmp_path)


@pytest.mark.parametrize("text", ["[]", '{"sides": {"user": {}, "item": {}}}', "[" * 100_000])
def test_encoders_that_do_not_fit_the_schema_are_refused(text: str, everything_data: Dataset, tmp_path: Path) -> None:
    everything_data.encoders.save(tmp_path)
    (tmp_path / "encoders.json").write_text(text)
    with pytest.raises(RunError, match=r"encoders\.json: the encoders do not fit the schema"):
        Encoders.load(EVERYTHING_SCHEMA, tmp_path)


@pytest.mark.parametrize("change", [{"mean": "x"}, {"edges": 3}, {"buckets": -1}, {"more": 1}])
def test_a_state_of_another_kind_is_refused(change: dict[str, Any], everything_data: Dataset, tmp_path: Path) -> None:
    everything_data.encoders.save(tmp_path)
    states = json.loads((tmp_path / "encoders.json").read_text())
    states["sides"]["user"]["age"] |= change
    (tmp_path / "encoders.json").write_text(json.dumps(states))
    with pytest.raises(RunError, match=f"do not fit the schema of this run .{next(iter(change))}: "):
        Encoders.load(EVERYTHING_SCHEMA, tmp_path)


def test_missing_error_refuses_new_tables_with_gaps() -> None:
    schema = Schema(features=(ID_FEATURES[0], Categorical(name="item_id", side="item", missing="error")))
    frames: Any = {"user": pl.DataFrame({"user_id": [1, 2]}), "item": pl.DataFrame({"item_id": [1, 2]})}
    encoders = Encoders.fit(schema, frames, {"user": ones(2), "item": ones(2)})
    with pytest.raises(DataError, match=r"column 'item_id': 1 of 2 values are missing.*fill them or set missing"):
        encoders.transform("item", pl.DataFrame({"item_id": [1, None]}))


@pytest.mark.parametrize(
    "n", [SINGLE_ROW_MAX_VALUES - 1, SINGLE_ROW_MAX_VALUES, SINGLE_ROW_MAX_VALUES + 1, 5 * SINGLE_ROW_MAX_VALUES]
)
def test_a_long_row_is_coded_as_a_short_one(n: int) -> None:
    """Long rows go the way of columns, short ones are coded one by one; both give the same."""
    values = [f"v{i % 90}" for i in range(n)]
    some = MultiHot(name="tags", side="item")
    encoder = some.fit(pl.Series("tags", [[f"v{i}" for i in range(60)]]), ones(1))
    alone, beside = (encoder.transform(pl.Series("tags", rows)) for rows in ([values], [values, []]))
    assert alone.values.tolist() == beside.values.tolist()
    assert len(alone.values) == sum(i % 90 < 60 for i in range(n))
    words = ("less is more " * n)[:n]
    text = Text(name="motto", side="user", max_length=0)
    texts = text.fit(pl.Series("motto", ["more or less"]), ones(1))
    alone, beside = (texts.transform(pl.Series("motto", rows)) for rows in ([words], [words, ""]))
    assert alone.values.tolist() == beside.values.tolist()
    assert len(alone.values) > n // 2
