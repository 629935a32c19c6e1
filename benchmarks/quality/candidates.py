"""Baselines chosen among candidates: ranks of targets, their metrics, and the candidate that is best on validation."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from benchmarks.lib.machine import Numbers
from benchmarks.lib.report import Report
from twotower.arrays.types import Ints
from twotower.evaluation.bootstrap import bootstrap

Part = Literal["validation", "test"]
Candidate = tuple[dict[str, Any], Callable[[Part], Ints]]
"""Settings, and the ranks of a part's targets, from 1, by a model that has learned from the train part alone."""
MEASURES: dict[str, Callable[[Ints], npt.NDArray[np.float64]]] = {
    "HR@1": lambda rank: (rank <= 1).astype(np.float64),
    "HR@10": lambda rank: (rank <= 10).astype(np.float64),
    "HR@100": lambda rank: (rank <= 100).astype(np.float64),
    "NDCG@10": lambda rank: (rank <= 10) / np.log2(rank + 1),
    "MRR@10": lambda rank: (rank <= 10) / rank,
}


def best(candidates: Iterator[Candidate], measure: str) -> Numbers:
    """Return settings and test ranks of the candidate with the highest mean of a measure on validation."""
    row: Numbers = {"validation": -1.0, "tried": 0}
    started = time.perf_counter()
    for settings, ranks in candidates:
        row["tried"] += 1
        found = float(MEASURES[measure](ranks("validation")).mean())
        if found > row["validation"]:
            # Ranked now, because a model that trains on changes; nothing reads it until all candidates are through.
            row |= {"settings": settings, "validation": found, "ranks": ranks("test").tolist()}
    return row | {"seconds": round(time.perf_counter() - started, 1)}


def add(report: Report, name: str, seeds: list[Ints], measures: list[str], **facts: Any) -> None:
    """Add the measures of a row; rounds are seeds, the 95 % bootstrap interval is over targets."""
    for measure in measures:
        each = [MEASURES[measure](rank) for rank in seeds]
        interval = [float(end) for end in bootstrap(np.mean(each, 0), np.ones(len(each[0])), 1000)]
        report.add(f"{name}, {measure}", [float(one.mean()) for one in each], interval=interval, **facts)
