"""Scorers: terms of a score that no step trains. One file a kind."""

from __future__ import annotations

from twotower.kinds import Kinds
from twotower.scorers.columns import ColumnFactors
from twotower.scorers.ease import Ease
from twotower.scorers.ials import Ials, TowerStart
from twotower.scorers.repeats import Repeats
from twotower.scorers.scorer import AddedScorer
from twotower.scorers.slit import Slit
from twotower.scorers.start import PairValues, Start
from twotower.scorers.transitions import TransitionFactors
from twotower.scorers.trending import Trending

__all__ = [
    "SCORERS",
    "STARTS",
    "AddedScorer",
    "ColumnFactors",
    "Ease",
    "Ials",
    "PairValues",
    "Repeats",
    "Slit",
    "Start",
    "TowerStart",
    "TransitionFactors",
    "Trending",
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
)
"""Kinds of scorers, by their names in a config."""
STARTS = Kinds("start", TowerStart, TowerStart)
"""Kinds of starts of towers, by their names in a config."""
