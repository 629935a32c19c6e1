"""Starts: closed-form values of a pair of towers, from the training positives. One file a kind."""

from __future__ import annotations

from twotower.kinds import Kinds
from twotower.train.starts.content import ContentFactors
from twotower.train.starts.ease import Ease
from twotower.train.starts.ials import Ials
from twotower.train.starts.next_content import NextContent
from twotower.train.starts.pair import start_pair
from twotower.train.starts.repeats import Repeats
from twotower.train.starts.scorer import AddedScorer
from twotower.train.starts.slit import Slit
from twotower.train.starts.start import PairValues, Start
from twotower.train.starts.transitions import TransitionFactors
from twotower.train.starts.trending import Trending
from twotower.train.starts.user_content import UserContent

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
    "start_pair",
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
