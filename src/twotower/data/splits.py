"""Split of the interactions into train, validation and test: one part code per row.

The model is trained on TRAIN, epochs and settings are chosen on VALIDATION, metrics are reported on TEST.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from twotower.arrays.types import Ints
from twotower.data.split import SplitConfig
from twotower.errors import DataError

Parts = npt.NDArray[np.int8]

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
        parts = _split_random(len(users), config)
    elif times is None:
        raise DataError(f"split.kind = '{config.kind}' needs a time; name its column in schema.time")
    elif config.kind == "last":
        parts = split_last(users, times)
    else:
        parts = _split_time(times, config)
    for part, name in enumerate(PART_NAMES):
        if not (parts == part).any():
            raise DataError(
                f"split.kind = '{config.kind}' leaves no {name} rows out of {len(parts)} interactions; "
                "give more data or other shares"
            )
    return parts


def _split_random(n: int, config: SplitConfig) -> Parts:
    parts = np.zeros(n, np.int8)
    order = np.random.RandomState(config.seed).permutation(n)
    n_test = int(np.ceil(config.test * n))
    parts[order[:n_test]] = TEST
    rest = order[n_test:]
    # The second draw indexes the remaining rows in the order of the first draw.
    again = np.random.RandomState(config.seed).permutation(len(rest))
    parts[rest[again[: int(np.ceil(config.validation * len(rest)))]]] = VALIDATION
    return parts


def split_last(users: npt.NDArray[np.int32], times: Ints) -> Parts:
    """Return the parts (n,) by the rule `last`; a part may be empty."""
    order = np.lexsort((np.arange(len(users)), times, users))
    sizes = np.bincount(users)
    from_end = np.repeat(np.cumsum(sizes), sizes) - np.arange(len(users))
    enough = np.repeat(sizes >= 3, sizes)
    parts = np.zeros(len(users), np.int8)
    parts[order[(from_end == 1) & enough]] = TEST
    parts[order[(from_end == 2) & enough]] = VALIDATION
    return parts


def _split_time(times: Ints, config: SplitConfig) -> Parts:
    parts = np.zeros(len(times), np.int8)
    test_from = np.quantile(times, 1 - config.test, method="higher")
    rest = times[times < test_from]
    if len(rest):
        parts[times >= np.quantile(rest, 1 - config.validation, method="higher")] = VALIDATION
    parts[times >= test_from] = TEST
    return parts
