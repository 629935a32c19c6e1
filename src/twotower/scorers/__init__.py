"""Scorers: terms of a score that no step trains. One file a kind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from twotower.data.dataset import Dataset
from twotower.evaluation.added_scores import AddedScores
from twotower.evaluation.config import EvaluationConfig
from twotower.evaluation.factors import CatalogueScorer
from twotower.kinds import Kinds
from twotower.scorers.columns import ColumnFactors
from twotower.scorers.ease import Ease
from twotower.scorers.ials import Ials
from twotower.scorers.repeats import Repeats
from twotower.scorers.scorer import AddedScorer, TermScorer
from twotower.scorers.slit import Slit
from twotower.scorers.start import PairValues, Start
from twotower.scorers.transitions import TransitionFactors
from twotower.scorers.trending import Trending

__all__ = [
    "SCORERS",
    "AddedScorer",
    "ColumnFactors",
    "Ease",
    "Ials",
    "PairValues",
    "Repeats",
    "Slit",
    "Start",
    "TermScorer",
    "TransitionFactors",
    "Trending",
    "alone",
]

SCORERS: Kinds[AddedScorer] = Kinds(
    "scorer",
    AddedScorer,
    ColumnFactors,
    Ease,
    Ials,
    Slit,
    TransitionFactors,
    Repeats,
    Trending,
    families=(Start, TermScorer),
)
"""Kinds of scorers, by their names in a config."""


def alone(
    dataset: Dataset, part: int, config: EvaluationConfig, added: Sequence[AddedScores]
) -> Iterator[tuple[str, CatalogueScorer]]:
    """Yield the name and the scores of each scorer that is a baseline of a part. `added` is what a model adds to its
    vectors."""
    for kind in SCORERS:
        if (found := kind.alone(dataset, part, config, added)) is not None:
            yield kind.kind, found
