"""Protocols of the sources of negatives, and of the samplers that they build for a training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from pydantic import Field, JsonValue, model_validator
from torch import Tensor

from twotower.arrays.types import F32, I64, Bools, Codes, Doubles, Float, Ints, Shaped
from twotower.data.dataset import Dataset
from twotower.evaluation.factors import Factors
from twotower.kinds import Kind

BARE_VALUE = ""
"""Key of a bare value, which sets a source's `shorthand`."""


class NegativeSource(Kind):
    """Options of a source of negatives: a `SharedSource`, a `PerPositiveSource` or a `PairSource`."""

    shorthand: ClassVar[str] = "n"
    """Option that a bare value sets: `negatives.uniform = 512` sets `negatives.uniform.n`. Empty: none."""
    draws: ClassVar[bool] = True
    """False for a source whose candidates a batch has anyway. It stays on, without effect, with an exclusive source or
    a pointwise loss."""
    certain: ClassVar[bool] = False
    """True if every positive has a candidate of this source, so that no other source is needed."""
    beyond_batch: ClassVar[bool] = False
    """True if candidates come from items that no user of a batch has seen, too."""
    exclusive: ClassVar[bool] = False
    """True if every item is a candidate, so that no other source adds one."""
    gives_pairs: ClassVar[bool] = False
    """True for a `PairSource`."""
    warms_up: ClassVar[bool] = False
    """True if the first epoch has fewer candidates than later epochs, so that their losses are not comparable."""

    @model_validator(mode="before")
    @classmethod
    def _read_shorthand(
        cls, data: Mapping[str, JsonValue] | NegativeSource
    ) -> Mapping[str, JsonValue] | NegativeSource:
        if not isinstance(data, Mapping) or BARE_VALUE not in data:
            return data
        if not cls.shorthand:
            raise ValueError(f"{data[BARE_VALUE]!r} is no option; set true or false")
        return {cls.shorthand if key == BARE_VALUE else key: value for key, value in data.items()}

    @property
    def remembered(self) -> int:
        """Number of positives of earlier batches that are candidates."""
        return 0

    def check(self, dataset: Dataset) -> None:
        """Raise ConfigError if the dataset has nothing to draw. Called before a training is prepared."""


class SharedSource(NegativeSource):
    """A source of candidates of every positive of a batch."""

    @abstractmethod
    def build(self, dataset: Dataset, seed: int, device: torch.device) -> SharedSampler:
        """Return the sampler of a training. Raises ConfigError if the dataset does not allow it."""


class PerPositiveSource(NegativeSource):
    """A source of candidates of one positive only."""

    @abstractmethod
    def build(self, dataset: Dataset, seed: int, device: torch.device) -> PerPositiveSampler:
        """Return the sampler of a training. Raises ConfigError if the dataset does not allow it."""


class PairSource(PerPositiveSource):
    """A per-positive source that also gives negative pairs to a pointwise loss."""

    gives_pairs = True
    n: int = Field(5, ge=1, le=100_000, description="Number of items per positive.")
    share: float = Field(
        0.2,
        gt=0,
        lt=1,
        description="Share of these pairs in the total weight of negatives, if there are dislikes (pointwise losses).",
    )

    @abstractmethod
    def build_pairs(self, dataset: Dataset) -> PairDraws:
        """Return the draws of pairs. Raises ConfigError if the dataset does not allow them."""


class PairDraws(ABC):
    """Draws of items for negative pairs."""

    @abstractmethod
    def can_draw(self, users: Shaped[Codes, "n"]) -> Shaped[Bools, "n"]:
        """Return a mask of the users with an item to draw."""

    @abstractmethod
    def draw(self, users: Shaped[Ints, "n"], rng: np.random.Generator) -> Shaped[Codes, "n"]:
        """Draw one item row for each user, ascending, who has an item to draw."""


class NegativeSampler:
    """Sampler of a source in one training. A sampler without state inherits these methods."""

    def begin_epoch(self, factors: Callable[[], Factors], epoch: int) -> None:
        """Prepare epoch `epoch` (0, 1, …). `factors` computes the vectors of all users and items by the current
        model."""

    def state(self) -> dict[str, Shaped[Tensor, "*_"]]:
        """Return the tensors that later draws depend on, by name."""
        return {}

    def load_state(self, state: dict[str, Shaped[Tensor, "*_"]]) -> None:
        """Continue from a state, empty if the checkpoint has no state of this source."""


class Memory(NamedTuple):
    """M item vectors of earlier batches, without gradient, each a candidate."""

    items: I64[Tensor, "M"]
    vectors: Float[Tensor, "M D"]
    draws: F32[Tensor, "M"]
    """Number of draws of each, the weight of its positive."""


def catalogue_rows(dataset: Dataset, cold: bool) -> Shaped[Ints, "n"]:
    """Return the rows of all items, or without `cold` of the items with a training interaction."""
    return np.arange(len(dataset.items)) if cold else np.flatnonzero(dataset.item_counts)


class SharedSampler(NegativeSampler, ABC):
    """Draws candidates of every positive of a batch."""

    memory: Memory | None = None
    """Vectors that are candidates in addition to the drawn items."""
    draws_positives: ClassVar[bool] = False
    """True if `draw` returns the batch's positives, which then count by their weights."""

    @abstractmethod
    def draw(self, item: Shaped[Codes, "B"], rng: np.random.Generator) -> Shaped[Ints, "n"]:
        """Draw item rows for a batch with the positives `item`; an item that is drawn k times counts k times."""

    @abstractmethod
    def expected(self, items: Shaped[Ints, "n"], positives: float) -> Shaped[Doubles, "n"]:
        """Return the expected number of draws of each item, for a batch with the total weight `positives`.

        The log-q correction uses the sum over all sources.
        """

    def remember(self, items: I64[Tensor, "B"], vectors: Float[Tensor, "B D"], weights: F32[Tensor, "B"]) -> None:
        """Store the positives of a batch after its loss. Such a source has `remembered` above 0."""


class Positives(NamedTuple):
    """B positives to draw per-positive negatives for."""

    user: Shaped[Codes, "B"]
    item: Shaped[Codes, "B"]
    interactions: Shaped[Ints, "B"]
    """Indices of their interactions."""
    later: bool
    """True if a negative that is an interaction must be later than the positive: histories are causal and hold
    dislikes."""
    others: float
    """Number of other candidates of each positive, without weights: shared and `easy` ones."""

    def take(self, part: slice) -> Positives:
        return self._replace(user=self.user[part], item=self.item[part], interactions=self.interactions[part])


class PerPositiveSampler(NegativeSampler, ABC):
    """Draws candidates of one positive only."""

    gives_interactions: ClassVar[bool] = False
    """True if `draw` returns indices of interactions, whose items are the negatives; no history of the batch holds
    them."""
    easy: int = 0
    """Number of negatives of a positive that count as easy for sources with a ratio."""
    margin: float = -np.inf
    """Negatives that score within this margin of the positive are left out. -inf: none."""

    @abstractmethod
    def draw(self, positives: Positives, rng: np.random.Generator) -> Shaped[Ints, "B n"]:
        """Draw n item rows for each positive, -1 for none. n may change between epochs.

        The positive, and with `mask_positives` the user's other positives, are left out afterwards.
        """


def positive_shares(dataset: Dataset) -> Shaped[Doubles, "items"]:
    """Return the share of each item in the training positives, by their weights."""
    counts = dataset.item_positive_counts.astype(np.float64)
    shares: Doubles = counts / counts.sum()
    return shares


class WeightedItems(SharedSampler):
    """Draws n items for each batch, item i with probability w_i / sum_j w_j."""

    def __init__(self, weights: Shaped[Doubles, "items"], n: int) -> None:
        """Take the weights of all items, at least 0, and at least one above 0."""
        self._n = n
        self._share = weights / weights.sum()
        self._cumulative = np.cumsum(self._share)

    def draw(self, item: Shaped[Codes, "B"], rng: np.random.Generator) -> Shaped[Ints, "n"]:
        drawn = np.searchsorted(self._cumulative, rng.random(self._n), side="right")
        items: Ints = np.minimum(drawn, len(self._share) - 1)
        return items

    def expected(self, items: Shaped[Ints, "n"], positives: float) -> Shaped[Doubles, "n"]:
        expected: Doubles = self._n * self._share[items]
        return expected
