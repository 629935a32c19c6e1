"""Protocol of the scorers: terms of the score that are added to the trained towers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from pydantic import JsonValue

from twotower.features.feature import Feature
from twotower.kinds import Kind
from twotower.model.two_tower import PairConfig

if TYPE_CHECKING:
    from twotower.features.schema import Schema


class Addition(NamedTuple):
    """Features, pair and options that a scorer adds to a schema and a model."""

    features: tuple[Feature, ...] = ()
    pair: PairConfig | None = None
    """Towers whose values the scorer, a closed form, solves."""
    model: Mapping[str, JsonValue] = {}
    """Options of the model."""


class AddedScorer(Kind):
    """A term of the score, which the mix weights on the validation part, after the last epoch.

    Scorers are added to the score of the trained towers. With `train.epochs = 0` no tower is trained, and the scorers
    alone make the score. Each reads what it needs by itself: the positives of the users, or columns of the schema.
    """

    @abstractmethod
    def addition(self, schema: Schema, name: str) -> Addition:
        """Return what the scorer adds. `name` begins the names of its features. Raises ConfigError if the schema lacks
        what it reads."""
