"""Scorers: terms of a score that no step trains. One file a kind."""

from __future__ import annotations

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
