"""Split of the interactions into train, validation and test: one part code per row.

The model is trained on TRAIN, epochs and settings are chosen on VALIDATION, metrics are reported on TEST.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from twotower.arrays.types import Bools, Ints
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


def split_interactions(
    users: npt.NDArray[np.int32], times: Ints | None, config: SplitConfig, given: Parts | None = None,
    measured: Bools | None = None,
) -> Parts:  # fmt: skip
    """Return the part (n,) of every interaction, 0..2, or DROPPED.

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
    - `column`, `files`: `given` (n,).

    By `last`, `user_random` and `user_ratio` all rows of users who are not `measured` (U,) are train; None: all are
    measured.

    Raises DataError if a part would be empty or if the split needs times and there are none.
    """
    if config.kind == "random":
        parts = random_parts(len(users), config)
    elif config.kind == "user_random":
        parts = _split_users(users, random_order(len(users), config), config, measured)
    elif config.is_given:
        assert given is not None
        parts = given
    elif times is None:
        raise DataError(
            f"split.kind = '{config.kind}' needs a time; name its column in schema.time, or set split.kind = "
            "'user_random'"
        )
    elif config.kind == "time":
        parts = time_parts(times, part_starts(times.copy(), config), config)
    else:
        parts = _split_users(users, times, config, measured)
    check_parts(part_sizes(parts), config)
    return parts


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


def split_train(
    rule: SplitConfig, users: npt.NDArray[np.int32], times: Ints | None, targets: Bools, given: Parts
) -> Parts:
    """Return given parts (n,) in which training rows validate by `SplitConfig.rule_of_train`; `targets` (n,) are rows
    that can be measured."""
    start = part_starts(times[given == TRAIN], rule)[1] if rule.kind == "time" and times is not None else 0
    is_drawn = random_parts(len(users), rule) == TEST if rule.kind == "random" else None
    return part_of_train(rule, start, users, times, targets, is_drawn, given)


def part_of_train(
    rule: SplitConfig, start: int, users: npt.NDArray[np.int32], times: Ints | None, targets: Bools,
    is_drawn: Bools | None, given: Parts
) -> Parts:  # fmt: skip
    """Return given parts (n,) in which training rows validate: those from the time `start` on, those that are drawn but
    for users whose rows all are, or the last target of each user of two and what follows it."""
    parts, train = given.copy(), np.flatnonzero(given == TRAIN)
    own, is_target = users[train], targets[train]
    if is_drawn is not None:
        taken = is_drawn[train] & np.isin(own, own[~is_drawn[train]])
    elif rule.kind == "time" and times is not None:
        taken = times[train] >= start
    else:
        place, last = np.empty(len(own), np.int64), np.zeros(users.max(initial=0) + 1, np.int64)
        place[np.lexsort((train, train if times is None else times[train], own))] = np.arange(len(own))
        np.maximum.at(last, own[is_target], place[is_target])
        taken = (place >= last[own]) & (np.bincount(own[is_target], minlength=len(last)) > 1)[own]
    parts[train[taken]] = VALIDATION
    return parts


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


def _split_users(users: npt.NDArray[np.int32], times: Ints, config: SplitConfig, measured: Bools | None) -> Parts:
    """Return the parts (n,) by a rule of `user_parts`; a part may be empty."""
    order = np.lexsort((np.arange(len(users)), times, users))
    parts = np.empty(len(users), np.int8)
    lengths = np.bincount(users, minlength=0 if measured is None else len(measured))
    parts[order] = user_parts(lengths, measured, config)
    return parts


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
