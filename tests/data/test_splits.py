"""The three splits against plain loops, and what each promises."""

from __future__ import annotations

from fractions import Fraction
from math import ceil
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import assume, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from twotower.data.split import SplitConfig
from twotower.data.splits import DROPPED, HASHED_IDS, TEST, TRAIN, VALIDATION, measured_users, split_interactions
from twotower.errors import DataError

FEW = examples(max_examples=30, deadline=None)
SHARES = st.sampled_from([0.05, 0.1, 0.2, 1 / 3, 0.5])
ROWS = st.lists(st.tuples(st.integers(0, 4), st.integers(-3, 6)), min_size=1, max_size=40)


def columns(rows: list[tuple[int, int]]) -> tuple[Any, Any]:
    return np.array([u for u, _ in rows], np.int32), np.array([t for _, t in rows], np.int64)


def split(users: Any, times: Any, config: SplitConfig, measured: Any = None) -> Any:
    """The parts of a log in memory."""
    return split_interactions({"user": users} | ({} if times is None else {"time": times}), config, measured)


def parts_of(users: Any, seconds: Any, **settings: Any) -> list[int] | None:
    """The parts, or None where one would be empty."""
    try:
        parts: list[int] = split(users, seconds, SplitConfig(**settings)).tolist()
        return parts
    except DataError:
        return None


@pytest.mark.parametrize("n", [5, 17, 100, 1_003])
@pytest.mark.parametrize(("test", "validation", "seed"), [(0.2, 0.1, 2022), (0.1, 0.3, 7)])
def test_the_random_split_is_train_test_split_twice(n: int, test: float, validation: float, seed: int) -> None:
    # scikit-learn's train_test_split: ceil(share * n) rows from the front of one permutation, the rest in its order.
    def cut(rows: list[int], share: float) -> tuple[list[int], list[int]]:
        order = np.random.RandomState(seed).permutation(len(rows))
        held = ceil(share * len(rows))
        return [rows[i] for i in order[held:]], [rows[i] for i in order[:held]]

    rest, tested = cut(list(range(n)), test)
    trained, validated = cut(rest, validation)
    parts = split(np.zeros(n, np.int32), None, SplitConfig(test=test, validation=validation, seed=seed))
    assert sorted(trained) == np.flatnonzero(parts == TRAIN).tolist()
    assert sorted(validated) == np.flatnonzero(parts == VALIDATION).tolist()
    assert sorted(tested) == np.flatnonzero(parts == TEST).tolist()


def test_the_random_split_of_ten_rows_is_the_same_in_every_release() -> None:
    assert split(np.zeros(10, np.int32), None, SplitConfig()).tolist() == [0, 0, 1, 0, 2, 0, 0, 2, 0, 0]


@pytest.mark.parametrize("held", [[TEST, VALIDATION], [TEST]], ids=["validation", "no validation"])
@FEW
@given(ROWS)
def test_the_last_split_equals_a_loop(held: list[int], rows: list[tuple[int, int]]) -> None:
    expected = [TRAIN] * len(rows)
    for user in {u for u, _ in rows}:
        own = sorted((t, n) for n, (u, t) in enumerate(rows) if u == user)  # ties keep the table's order
        if len(own) > len(held):
            for (_, n), part in zip(reversed(own), held, strict=False):
                expected[n] = part
    settings = {} if VALIDATION in held else {"validation": 0}
    assert parts_of(*columns(rows), kind="last", **settings) == (expected if TEST in expected else None)


def nearest(share: float, n: int) -> int:
    """The share of n rows to the nearest number, halves up, but never all rows."""
    return min(int(Fraction(share).limit_denominator(100) * n + Fraction(1, 2)), n - 1)


@FEW
@given(ROWS, SHARES, st.sampled_from([0, 0.1, 1 / 3, 0.5]))
def test_the_split_by_user_ratio_equals_a_loop(rows: list[tuple[int, int]], test: float, validation: float) -> None:
    expected = [TRAIN] * len(rows)
    for user in {u for u, _ in rows}:
        own = [n for _, n in sorted((t, n) for n, (u, t) in enumerate(rows) if u == user)]
        n_test = nearest(test, len(own))
        n_validation = nearest(validation, len(own) - n_test)
        for place, n in enumerate(reversed(own)):
            expected[n] = TEST if place < n_test else VALIDATION if place < n_test + n_validation else TRAIN
        assert n_test + n_validation < len(own)  # every user is trained
    present = {TRAIN, TEST} | ({VALIDATION} if validation else set()) <= {*expected}
    found = parts_of(*columns(rows), kind="user_ratio", test=test, validation=validation)
    assert found == (expected if present else None)


@FEW
@given(ROWS, SHARES, st.sampled_from([0, 0.1, 1 / 3, 0.5]), st.integers(0, 9))
def test_the_split_of_random_rows_of_each_user_is_that_by_user_ratio_of_a_permutation(
    rows: list[tuple[int, int]], test: float, validation: float, seed: int
) -> None:
    users, _ = columns(rows)
    places = np.argsort(np.random.RandomState(seed).permutation(len(rows)))
    sections = {"test": test, "validation": validation}
    found = parts_of(users, None, kind="user_random", seed=seed, **sections)
    assert found == parts_of(users, places, kind="user_ratio", **sections)


@pytest.mark.parametrize("kind", ["last", "user_ratio", "user_random"])
def test_a_share_of_the_users_is_measured_as_all_are_and_the_others_are_trained_whole(kind: str) -> None:
    ids = pl.Series([f"u{i}" for i in range(2_000)])
    users, times = np.repeat(np.arange(2_000, dtype=np.int32), 6), np.random.default_rng(0).permutation(12_000)
    every, some, others, few = (
        split(users, times, config, measured=measured_users(ids, config))
        for config in (
            SplitConfig(kind=kind, users=u, seed=seed) for u, seed in ((1.0, 1), (0.3, 1), (0.3, 2), (0.01, 1))
        )
    )
    measured = np.unique(users[some != TRAIN])
    assert len(measured) == pytest.approx(600, abs=60)
    of_measured = np.isin(users, measured)
    if kind != "user_random":  # whose rows are drawn by the seed too
        assert np.array_equal(some[of_measured], every[of_measured])
    assert (some[~of_measured] == TRAIN).all()
    assert not np.array_equal(some, others)
    assert set(np.unique(users[few != TRAIN])) < set(measured)


def test_a_user_is_measured_whatever_other_users_there_are_and_in_whatever_order() -> None:
    of = SplitConfig(kind="last", users=0.5, seed=3)
    ids = pl.Series(range(100))
    found = measured_users(ids, of)
    assert found is not None
    chosen = set(ids.filter(pl.Series(found)))
    for others in (ids.shuffle(1), pl.Series(["a", *ids.cast(pl.String)]), ids[:50]):
        again = measured_users(others, of)
        assert again is not None
        assert {int(i) for i in others.filter(pl.Series(again)) if i != "a"} == {i for i in chosen if i < len(others)}
    assert measured_users(ids, SplitConfig(kind="last")) is None
    many = measured_users(pl.Series(range(HASHED_IDS + 9)), of)
    assert many is not None
    assert many[:100].tolist() == found.tolist()
    assert many.mean() == pytest.approx(0.5, abs=0.01)


@FEW
@given(ROWS, SHARES, st.sampled_from([0, 0.1, 0.5]), st.integers(1, 4))
def test_a_gap_drops_the_rows_before_validation_and_test(
    rows: list[tuple[int, int]], test: float, validation: float, gap: int
) -> None:
    users, seconds = columns(rows)
    microseconds = seconds * 1_000_000
    plain = parts_of(users, microseconds, kind="time", test=test, validation=validation)
    assume(plain is not None)
    assert plain is not None
    starts = [min(t for (_, t), p in zip(rows, plain, strict=True) if p == part) for part in {*plain} - {TRAIN}]
    expected = [
        DROPPED if any(start - gap <= t < start for start in starts) else part
        for (_, t), part in zip(rows, plain, strict=True)
    ]
    found = parts_of(users, microseconds, kind="time", test=test, validation=validation, gap=gap)
    assert found == (expected if {*plain} == {*expected} - {DROPPED} else None)


@pytest.mark.parametrize("kind", ["random", "user_random", "time", "user_ratio"])
def test_a_share_of_none_leaves_no_validation_part(kind: Any) -> None:
    users, seconds = np.repeat(np.arange(10, dtype=np.int32), 10), np.arange(100)
    with_it = split(users, seconds, SplitConfig(kind=kind))
    without = split(users, seconds, SplitConfig(kind=kind, validation=0))
    assert np.array_equal(with_it == TEST, without == TEST)
    assert {*without.tolist()} == {TRAIN, TEST}


@FEW
@given(ROWS, SHARES, SHARES)
def test_fault_C6_no_test_row_is_older_than_a_training_row(
    rows: list[tuple[int, int]], test: float, validation: float
) -> None:
    users, seconds = columns(rows)
    parts = parts_of(users, seconds, kind="time", test=test, validation=validation)
    assume(parts is not None)
    of = [[t for (_, t), p in zip(rows, parts or [], strict=True) if p == part] for part in (TRAIN, VALIDATION, TEST)]
    assert max(of[TRAIN]) < min(of[VALIDATION])
    assert max(of[VALIDATION]) < min(of[TEST])


@pytest.mark.parametrize("scale", [1, 2**40])
@pytest.mark.parametrize(("test", "validation"), [(0.2, 0.1), (0.5, 0.5)])
def test_the_time_split_holds_out_the_shares_asked_for(scale: int, test: float, validation: float) -> None:
    seconds = np.random.default_rng(0).permutation(1_000) * scale
    parts = split(np.zeros(1_000, np.int32), seconds, SplitConfig(kind="time", test=test, validation=validation))
    assert abs((parts == TEST).mean() - test) <= 0.002
    assert abs((parts == VALIDATION).sum() / (parts != TEST).sum() - validation) <= 0.002


@pytest.mark.parametrize(
    ("kind", "users", "seconds", "part"),
    [
        ("random", [0], None, "train"),
        ("random", [0, 0], None, "train"),
        ("last", [0, 0, 1, 1], [1, 2, 3, 4], "validation"),
        ("time", [0, 0, 0], [5, 5, 5], "train"),
        ("time", [0, 0, 0], [4, 5, 5], "train"),
    ],
)
def test_a_split_that_leaves_a_part_empty_is_refused(kind: Any, users: Any, seconds: Any, part: str) -> None:
    message = f"split.kind = '{kind}' leaves no {part} rows out of {len(users)} interactions; give more data"
    with pytest.raises(DataError, match=message):
        split(np.array(users, np.int32), None if seconds is None else np.array(seconds), SplitConfig(kind=kind))


@pytest.mark.parametrize("kind", ["last", "time", "user_ratio"])
def test_a_split_by_time_without_times_is_refused(kind: Any) -> None:
    with pytest.raises(DataError, match=f"'{kind}' needs a time; name its column in schema.time"):
        split(np.zeros(9, np.int32), None, SplitConfig(kind=kind))


def test_rows_of_train_validate_by_time_only_where_there_are_times() -> None:
    config = SplitConfig(kind="column", column="fold", from_train="time")
    given_parts = np.array([TRAIN, TRAIN, TRAIN, TEST], np.int8)
    columns = {
        "user": np.zeros(4, np.int32), "positive": np.ones(4, np.bool_), "part": given_parts,
        "time": np.array([3, 1, 2, 4]),
    }  # fmt: skip
    assert split_interactions(columns, config).tolist() == [VALIDATION, TRAIN, TRAIN, TEST]
    del columns["time"]
    with pytest.raises(DataError, match="split.from_train = 'time' needs a time"):
        split_interactions(columns, config)
