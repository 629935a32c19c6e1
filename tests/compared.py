"""The test data of one dataset for a comparison of vectors."""

from __future__ import annotations

import numpy as np

from twotower.arrays.sets import places_of_rows
from twotower.arrays.types import Ints
from twotower.data.dataset import Dataset
from twotower.data.splits import TEST, TRAIN, VALIDATION
from twotower.evaluation.comparison import ComparisonData
from twotower.evaluation.metrics.measured import RankedItems


def comparison_data(dataset: Dataset, users: Ints, weighted: bool = False) -> ComparisonData:
    """Return the test data of some user rows, which become rows 0, 1, … in the given order."""
    user, item = places_of_rows(users, len(dataset.users)), np.arange(len(dataset.items))
    test, *seen = (dataset.grouped(part).renumbered(users, item) for part in (TEST, TRAIN, VALIDATION))
    ranked = RankedItems.of(dataset, weighted=weighted)
    return ComparisonData(dataset.test.renumbered(user, item), test, seen, ranked, weighted)
