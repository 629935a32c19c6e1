"""Split of the interactions into train, validation and test: one part code per row.

The model is trained on TRAIN, epochs and settings are chosen on VALIDATION, metrics are reported on TEST.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from twotower.arrays.types import Ints
from twotower.data.split import SplitConfig
from twotower.errors import DataError

Parts = npt.NDArray[np.int8]

Scratch = Callable[[int, type[np.generic]], npt.NDArray[Any]]
"""Maker of an array of a length and a type, whose values do not matter."""
BLOCK_ROWS = 2**22
"""Rows copied at a time."""

TRAIN, VALIDATION, TEST = 0, 1, 2
PART_NAMES = ("train", "validation", "test")


def split_interactions(users: npt.NDArray[np.int32], times: Ints | None, config: SplitConfig) -> Parts:
    """Return the part (n,) of every interaction, 0..2.

    - `random`: a share `test` of the rows, then a share `validation` of the rest, as two calls of scikit-learn's
      `train_test_split(random_state=seed)` draw them.
    - `last`: the last row of each user is test, the one before it validation; all rows of users with fewer than three
      are train. Ties keep the table's order.
    - `time`: the latest share `test` of the rows is test, the latest share `validation` of the rest validation. Rows of
      equal time are in one part, so no test row is older than a training row.

    Raises DataError if a part would be empty or if the split needs times and there are none.
    """
    if config.kind == "random":
        parts = random_parts(len(users), config)
    elif times is None:
        raise DataError(f"split.kind = '{config.kind}' needs a time; name its column in schema.time")
    elif config.kind == "last":
        parts = split_last(users, times)
    else:
        parts = time_parts(times, part_starts(times.copy(), config))
    check_parts(np.bincount(parts, minlength=len(PART_NAMES)), config)
    return parts


def check_parts(sizes: Ints, config: SplitConfig) -> None:
    """Raise DataError if one of the parts, whose numbers of rows are `sizes` (3,), is empty."""
    for size, name in zip(sizes, PART_NAMES, strict=True):
        if not size:
            raise DataError(
                f"split.kind = '{config.kind}' leaves no {name} rows out of {sizes.sum()} interactions; "
                "give more data or other shares"
            )


def random_parts(n: int, config: SplitConfig, scratch: Scratch = np.empty) -> Parts:
    """Return the parts (n,) by the rule `random`. Arrays of n numbers are made by `scratch`."""
    parts = scratch(n, np.int8)
    parts[:] = TRAIN
    order = _permutation(n, config.seed, scratch)
    n_test = int(np.ceil(config.test * n))
    for some in _blocks(order[:n_test]):
        parts[some] = TEST
    rest = order[n_test:]
    # The second draw indexes the remaining rows in the order of the first draw.
    again = _permutation(len(rest), config.seed, scratch)
    for some in _blocks(again[: int(np.ceil(config.validation * len(rest)))]):
        parts[rest[some]] = VALIDATION
    return parts


def _permutation(n: int, seed: int, scratch: Scratch) -> Ints:
    """Return `RandomState(seed).permutation(n)`."""
    order = scratch(n, np.int64)
    for start in range(0, n, BLOCK_ROWS):
        order[start : start + BLOCK_ROWS] = np.arange(start, min(start + BLOCK_ROWS, n))
    np.random.RandomState(seed).shuffle(order)
    return order


def _blocks(rows: Ints) -> Iterator[Ints]:
    return (rows[start : start + BLOCK_ROWS] for start in range(0, len(rows), BLOCK_ROWS))


def split_last(users: npt.NDArray[np.int32], times: Ints) -> Parts:
    """Return the parts (n,) by the rule `last`; a part may be empty."""
    order = np.lexsort((np.arange(len(users)), times, users))
    parts = np.empty(len(users), np.int8)
    parts[order] = last_parts(np.bincount(users))
    return parts


def last_parts(lengths: Ints) -> Parts:
    """Return the parts by the rule `last` of interactions sorted by user and time, of users with `lengths` (U,)."""
    ends = np.cumsum(lengths)
    parts = np.zeros(int(lengths.sum()), np.int8)
    enough = lengths >= 3
    parts[ends[enough] - 1] = TEST
    parts[ends[enough] - 2] = VALIDATION
    return parts


def part_starts(times: Ints, config: SplitConfig) -> tuple[int, int]:
    """Return the times at which validation and test begin by the rule `time`. Reorders `times` (n,)."""
    last = int(np.ceil((len(times) - 1) * (1 - config.test)))
    times.partition(last)
    test, before = int(times[last]), times[:last]
    n = sum(int((some < test).sum()) for some in _blocks(before))
    if not n:
        return test, test
    last = int(np.ceil((n - 1) * (1 - config.validation)))
    before.partition(last)
    return int(before[last]), test


def time_parts(times: Ints, starts: tuple[int, int]) -> Parts:
    """Return the parts (n,) by the rule `time`, given the times at which validation and test begin."""
    parts = np.zeros(len(times), np.int8)
    parts[times >= starts[0]] = VALIDATION
    parts[times >= starts[1]] = TEST
    return parts
