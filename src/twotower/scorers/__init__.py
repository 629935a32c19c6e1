"""Scorers: terms of a score that no step trains. One file a kind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from twotower.data.dataset import Dataset
from twotower.evaluation.added_scores import AddedScores
from twotower.evaluation.config import EvaluationConfig
from twotower.evaluation.factors import CatalogueScorer
from twotower.kinds import Kinds
from twotower.scorers.content import ContentFactors
from twotower.scorers.ease import Ease
from twotower.scorers.ials import Ials
from twotower.scorers.next_content import NextContent
from twotower.scorers.repeats import Repeats
from twotower.scorers.scorer import AddedScorer
from twotower.scorers.slit import Slit
from twotower.scorers.start import PairValues, Start
from twotower.scorers.transitions import TransitionFactors
from twotower.scorers.trending import Trending
from twotower.scorers.user_content import UserContent

__all__ = [
    "SCORERS",
    "STARTS",
    "AddedScorer",
    "ContentFactors",
    "Ease",
    "Ials",
    "NextContent",
    "PairValues",
    "Repeats",
    "Slit",
    "Start",
    "TransitionFactors",
    "Trending",
    "UserContent",
    "alone",
]

SCORERS: Kinds[AddedScorer] = Kinds(
    "scorer",
    AddedScorer,
    ContentFactors,
    Ease,
    Ials,
    NextContent,
    Slit,
    TransitionFactors,
    UserContent,
    Repeats,
    Trending,
)
"""Kinds of scorers, by their names in a config."""
STARTS: Kinds[Start] = Kinds(
    "start", Start, ContentFactors, Ease, Ials, NextContent, Slit, TransitionFactors, UserContent
)
"""Kinds of starts, by their names in a config."""


def alone(
    dataset: Dataset, part: int, config: EvaluationConfig, added: Sequence[AddedScores]
) -> Iterator[tuple[str, CatalogueScorer]]:
    """Yield the name and the scores of each scorer that is a baseline of a part. `added` is what a model adds to its
    vectors."""
    for kind in SCORERS:
        if (found := kind.alone(dataset, part, config, added)) is not None:
            yield kind.kind, found
