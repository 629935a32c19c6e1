"""Split of the interactions into train, validation and test: one part code per row.

The model is trained on TRAIN, epochs and settings are chosen on VALIDATION, metrics are reported on TEST.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import polars as pl

from twotower.arrays.pieces import Scalar
from twotower.arrays.types import Bools, Ints
from twotower.data.interaction_columns import PART, POSITIVE, ROW, TIME, USER, WEIGHT, Columns
from twotower.data.pairs import target_mask
from twotower.data.split import PART_NAMES, SplitConfig
from twotower.errors import ConfigError, DataError

log = logging.getLogger(__name__)

Parts = npt.NDArray[np.int8]

Scratch = Callable[[int, type[np.generic]], npt.NDArray[Any]]
"""Maker of an array of a length and a type, whose values do not matter."""
BLOCK_ROWS = 2**22
"""Rows copied at a time."""
HASHED_IDS = 2**16
"""Ids that are texts of Python at a time."""

TRAIN, VALIDATION, TEST = 0, 1, 2
DROPPED = -1
"""Code of a row that is in no part."""
EVER = 2**62
"""Later than any time."""


class WholeLog(Protocol):
    """All interactions of a log, which some rules look at before they split the buckets."""

    def times(self, of_train: bool = False) -> Ints:
        """Return the times of all, or of those that are given as train, in any order, as an array to change."""

    def by_row(self, draw: Callable[[int, Scratch], npt.NDArray[Scalar]]) -> npt.NDArray[Scalar]:
        """Return by row of the log what is drawn for a number of interactions."""


PartsOf = Callable[[Columns, slice], Parts]
"""Function of the columns (n,) of a bucket, sorted by user, time and row, and of its users, that returns the parts
(n,)."""


def rule_of(config: SplitConfig, measured: Bools | None, log: WholeLog) -> PartsOf:
    """Return the rule of a split, by which each bucket is split.

    - `random`: a share `test` of the rows, then a share `validation` of the rest, as two calls of scikit-learn's
      `train_test_split(random_state=seed)` draw them.
    - `last`: the last row of each user is test, the one before it validation; all rows of users with fewer than three
      are train. Ties keep the table's order. Without a validation part only the last row of users with two is held out.
    - `time`: the latest share `test` of the rows is test, the latest share `validation` of the rest validation. Rows of
      equal time are in one part, so no test row is older than a training row. Rows less than `gap` before the start of
      validation or test and outside the part are dropped.
    - `user_random`: as `user_ratio`, of each user's rows in the order of `random_order`, in place of time.
    - `user_ratio`: of each user's n rows the latest `test` n are test, of the m others the latest `validation` m
      validation, rounded to the nearest number, but every user keeps a train row. Ties keep the table's order.
    - `column`, `files`: the column `part`, of which `from_train` turns training rows into validation.

    By `last`, `user_random` and `user_ratio` all rows of users who are not `measured` (U,) are train; None: all are
    measured."""
    if config.is_given:
        rule = config.rule_of_train
        return _rule_of_train(rule, log) if rule else lambda found, users: found[PART]
    if config.kind == "time":
        starts = part_starts(log.times(), config)
        return lambda found, users: time_parts(found[TIME], starts, config)
    if config.kind == "random":
        drawn = log.by_row(lambda n, scratch: random_parts(n, config, scratch))
        return lambda found, users: drawn[found[ROW]]
    place = log.by_row(lambda n, scratch: random_order(n, config, scratch)) if config.kind == "user_random" else None

    def parts_of(found: Columns, users: slice) -> Parts:
        lengths = np.bincount(found[USER] - users.start, minlength=users.stop - users.start)
        own = user_parts(lengths, None if measured is None else measured[users], config)
        if place is None:
            return own
        parts = np.empty_like(own)
        parts[np.lexsort((place[found[ROW]], found[USER]))] = own
        return parts

    return parts_of


def _rule_of_train(rule: SplitConfig, log: WholeLog) -> PartsOf:
    """Return the rule of given parts of which training rows validate: those from a time on, those that are drawn but
    for users whose rows all are, or the last target of each user of two and what follows it."""
    drawn = log.by_row(lambda n, scratch: random_parts(n, rule, scratch)) if rule.kind == "random" else None
    start = part_starts(log.times(of_train=True), rule)[1] if rule.kind == "time" else 0

    def parts_of(found: Columns, users: slice) -> Parts:
        parts: Parts = found[PART].copy()
        train = np.flatnonzero(parts == TRAIN)
        own = found[USER][train] - users.start
        if drawn is not None:
            is_drawn = drawn[found[ROW][train]] == TEST
            taken = is_drawn & np.isin(own, own[~is_drawn])
        elif rule.kind == "time":
            taken = found[TIME][train] >= start
        else:
            is_target = target_mask(found[POSITIVE], found.get(WEIGHT))[train]
            last = np.zeros(users.stop - users.start, np.int64)
            np.maximum.at(last, own[is_target], train[is_target])
            taken = (train >= last[own]) & (np.bincount(own[is_target], minlength=len(last)) > 1)[own]
        parts[train[taken]] = VALIDATION
        return parts

    return parts_of


@dataclass(frozen=True)
class _InMemory(WholeLog):
    """A log whose interactions are one bucket."""

    found: Columns

    def times(self, of_train: bool = False) -> Ints:
        times: Ints = self.found[TIME][self.found[PART] == TRAIN] if of_train else self.found[TIME].copy()
        return times

    def by_row(self, draw: Callable[[int, Scratch], npt.NDArray[Scalar]]) -> npt.NDArray[Scalar]:
        return draw(len(self.found[ROW]), np.empty)


def split_interactions(columns: Columns, config: SplitConfig, measured: Bools | None = None) -> Parts:
    """Return the part (n,) of every interaction of a log in memory, 0..2, or DROPPED, by `rule_of`; `columns` are those
    of a bucket without `row`, in the order of the log. Raises DataError as `check_parts` and `need_times` do."""
    need_times(config, TIME in columns)
    columns = columns | {ROW: np.arange(len(columns[USER]))}
    by_user = config.kind in SplitConfig.kinds_of_users or config.from_train == "last"  # other rules need no order
    order = np.lexsort([columns[n] for n in (TIME, USER) if n in columns]) if by_user else np.s_[:]
    found = {name: column[order] for name, column in columns.items()}
    parts = np.empty(len(found[ROW]), np.int8)
    parts[order] = rule_of(config, measured, _InMemory(found))(found, slice(0, int(columns[USER].max(initial=-1)) + 1))
    check_parts(part_sizes(parts), config)
    return parts


def need_times(config: SplitConfig, are_there: bool) -> None:
    """Raise DataError if a split needs times and there are none."""
    if are_there or not (config.needs_time or config.from_train == "time"):
        return
    if config.from_train:
        raise DataError(
            "split.from_train = 'time' needs a time; name its column in schema.time, or set split.from_train = 'last'"
        )
    raise DataError(
        f"split.kind = '{config.kind}' needs a time; name its column in schema.time, or set split.kind = 'user_random'"
    )


def given_facts(times: Ints | None, given: Parts) -> Ints:
    """Return (3,) of given parts (n,): 1 if a row validates, the latest time of the training rows, and minus the
    earliest of the test rows. The facts of all rows are the maxima of those of some."""
    validates = (given == VALIDATION).any()
    if times is None:
        return np.array([validates, 1, 0])
    return np.array([validates, times[given == TRAIN].max(initial=-EVER), -times[given == TEST].min(initial=EVER)])


def with_source(config: SplitConfig, facts: Ints) -> SplitConfig:
    """Return the split of given parts with `from_train` where no row validates, by `given_facts`: as the test part
    follows the training rows. Raises ConfigError."""
    if facts[0] and config.from_train:
        raise ConfigError(
            "split.from_train takes a validation part from train, and one is given; leave one of them out"
        )
    if facts[0] or config.from_train or not config.validation:
        return config
    kind = "random" if not config.ordered else "time" if int(facts[1]) <= -int(facts[2]) else "last"
    log.info(
        f"no given row validates, so some training rows do (split.from_train = '{kind}', split.validation = "
        f"{config.validation:g}); histories of the test part hold them"
    )
    return config.model_copy(update={"from_train": kind})


def part_sizes(parts: Parts) -> Ints:
    """Return the numbers (3,) of rows of the parts."""
    return np.bincount(parts[parts != DROPPED], minlength=len(PART_NAMES))


def check_parts(sizes: Ints, config: SplitConfig) -> None:
    """Raise DataError if a part that must have rows, by their numbers `sizes` (3,), has none."""
    for size, name in zip(sizes, PART_NAMES, strict=True):
        if size or (name == "validation" and not config.needs_validation):
            continue
        what = "give rows of it" if config.is_given else "give more data or other shares"
        what += f", or more users (split.users is {config.users:g})" if config.users < 1 else ""
        raise DataError(
            f"split.kind = '{config.kind}' leaves no {name} rows out of {sizes.sum()} interactions; "
            f"{what}{', or a smaller gap' if config.gap else ''}"
        )


def random_parts(n: int, config: SplitConfig, scratch: Scratch = np.empty) -> Parts:
    """Return the parts (n,) by the rule `random`. Arrays of n numbers are made by `scratch`."""
    parts = scratch(n, np.int8)
    parts[:] = TRAIN
    order = _permutation(n, config.seed, scratch)
    n_test = int(np.ceil(config.test * n))
    for some in _blocks(order[:n_test]):
        parts[some] = TEST
    if not config.validation:
        return parts
    rest = order[n_test:]
    # The second draw indexes the remaining rows in the order of the first draw.
    again = _permutation(len(rest), config.seed, scratch)
    for some in _blocks(again[: int(np.ceil(config.validation * len(rest)))]):
        parts[rest[some]] = VALIDATION
    return parts


def random_order(n: int, config: SplitConfig, scratch: Scratch = np.empty) -> Ints:
    """Return for each row (n,) its place in a random order of all, as `numpy.random.RandomState(seed).permutation(n)`
    draws it. Arrays of n numbers are made by `scratch`."""
    places, order = scratch(n, np.int64), _permutation(n, config.seed, scratch)
    for start in range(0, n, BLOCK_ROWS):
        some = order[start : start + BLOCK_ROWS]
        places[some] = np.arange(start, start + len(some))
    return places


def _permutation(n: int, seed: int, scratch: Scratch) -> Ints:
    """Return `RandomState(seed).permutation(n)`."""
    order = scratch(n, np.int64)
    for start in range(0, n, BLOCK_ROWS):
        order[start : start + BLOCK_ROWS] = np.arange(start, min(start + BLOCK_ROWS, n))
    np.random.RandomState(seed).shuffle(order)
    return order


def _blocks(rows: Ints) -> Iterator[Ints]:
    return (rows[start : start + BLOCK_ROWS] for start in range(0, len(rows), BLOCK_ROWS))


def measured_users(ids: pl.Series, config: SplitConfig) -> Bools | None:
    """Return for each user of some ids (U,) whether its rows may test and validate, None if all may.

    A hash of seed and id draws them, the MD5 (RFC 1321) of both as text, so that a user is measured or not whatever
    other users there are, and in whatever order."""
    if config.users == 1:
        return None
    seed, measured = f"{config.seed} ", np.empty(len(ids), np.bool_)
    for start in range(0, len(ids), HASHED_IDS):
        texts = ids[start : start + HASHED_IDS].cast(pl.String).to_list()
        digests = b"".join(hashlib.md5((seed + t).encode(), usedforsecurity=False).digest()[:8] for t in texts)
        measured[start : start + len(texts)] = np.frombuffer(digests, ">u8") < config.users * 2.0**64
    return measured


def user_parts(lengths: Ints, measured: Bools | None, config: SplitConfig) -> Parts:
    """Return the parts by the rules `last` and `user_ratio` of interactions sorted by user and time, of users with
    `lengths` (U,), those `measured` (U,) or all."""
    if config.kind == "last":
        n_validation = np.full(len(lengths), int(config.validation > 0))
        n_test = (lengths >= 2 + n_validation).astype(np.int64)
        n_validation *= n_test
    else:
        n_test = _shares(lengths, config.test)
        n_validation = _shares(lengths - n_test, config.validation)
    if measured is not None:
        n_test, n_validation = n_test * measured, n_validation * measured
    from_end = np.repeat(np.cumsum(lengths), lengths) - np.arange(int(lengths.sum()))  # 1 for a user's last row
    parts = np.zeros(len(from_end), np.int8)
    parts[from_end <= np.repeat(n_test + n_validation, lengths)] = VALIDATION
    parts[from_end <= np.repeat(n_test, lengths)] = TEST
    return parts


def _shares(lengths: Ints, share: float) -> Ints:
    """Return share n (U,) of each number n, rounded to the nearest whole number, halves up, but less than n."""
    nearest = np.floor(lengths * share + 0.5 + 1e-9).astype(np.int64)  # floats may be just below a half
    shares: Ints = np.maximum(np.minimum(nearest, lengths - 1), 0)
    return shares


def part_starts(times: Ints, config: SplitConfig) -> tuple[int, int]:
    """Return the times at which validation and test begin by the rule `time`. Reorders `times` (n,)."""
    if not len(times):  # a file of train whose rows are all left out
        return EVER, EVER
    last = int(np.ceil((len(times) - 1) * (1 - config.test)))
    times.partition(last)
    test, before = int(times[last]), times[:last]
    n = sum(int((some < test).sum()) for some in _blocks(before))
    if not (n and config.validation):
        return test, test
    last = int(np.ceil((n - 1) * (1 - config.validation)))
    before.partition(last)
    return int(before[last]), test


def time_parts(times: Ints, starts: tuple[int, int], config: SplitConfig) -> Parts:
    """Return the parts (n,) by the rule `time`, given the times at which validation and test begin."""
    parts = np.zeros(len(times), np.int8)
    parts[times >= starts[0]] = VALIDATION
    parts[times >= starts[1]] = TEST
    for start in {*starts} if config.gap else ():
        first = max(start - round(config.gap * 1e6), np.iinfo(np.int64).min)
        parts[(times >= first) & (times < start)] = DROPPED
    return parts
