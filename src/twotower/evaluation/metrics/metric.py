"""Protocol of the metrics: three families, and the facts of a metric that its readers need."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterable
from enum import IntEnum
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from twotower.arrays.types import Doubles, Ints, Shaped
from twotower.evaluation.metrics.measured import Rankings, ScoredPairs
from twotower.features.side import SideName
from twotower.kinds import Kind

if TYPE_CHECKING:
    from twotower.data.dataset import Dataset


class Prominence(IntEnum):
    """The tables that show a metric; a table shows all metrics down to its own level."""

    EPOCH = 1
    """The line of an epoch, and the learning curves."""
    SERVED = 2
    """The table of a bundle's metrics by way of search."""
    REPORT = 3
    """The table of a run's metrics and of the baselines."""
    FILE = 4
    """metrics.json only."""


class UserValues(NamedTuple):
    """A metric by user: its value over all users is the weighted mean."""

    users: Shaped[Ints, "n"]
    values: Shaped[Doubles, "n"]
    weights: Shaped[Doubles, "n"]


class Metric(Kind):
    """Measure of scores or rankings, of any family."""

    name: ClassVar[str]
    """Name in metrics.json and in tables, before the cut-off. Of a class that sets none: that of its kind, or of the
    class in small letters, hit_rate for HitRate."""
    at_cut_offs: ClassVar[bool]
    """True for a metric of rankings, which is measured at every cut-off of evaluation.k."""
    always = True
    """False for a registered metric that is measured only where evaluation.metrics names it."""
    prominence: ClassVar[Prominence] = Prominence.REPORT
    higher_is_better: ClassVar[bool] = True
    slices: ClassVar[tuple[SideName, ...]] = ()
    """Sides for whose slices, such as new users or tail items, the metric is reported too. Of a metric of rankings: at
    the first cut-off; for items by their targets alone."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "name" not in cls.__dict__:
            word = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()
            cls.name = word if ":" in cls.kind else cls.kind

    def is_defined(self, pairs: ScoredPairs) -> bool:
        """Return True if a part with these pairs has a value of the metric, as far as pairs tell."""
        return True

    def check(self, dataset: Dataset) -> None:
        """Raise ConfigError if the metric cannot be measured on a dataset, before a training starts."""


class PairMetric(Metric):
    """Metric of the scored pairs of a part."""

    at_cut_offs = False
    of_logits: ClassVar[bool] = False
    """True for a metric that reads scores as logits. The scores of the baselines are none."""

    @abstractmethod
    def value(self, pairs: ScoredPairs) -> float:
        """Return the metric; NaN if it is undefined."""

    def is_defined(self, pairs: ScoredPairs) -> bool:
        value = self.value(pairs)
        return value == value

    def by_user(self, pairs: ScoredPairs) -> UserValues | None:
        """Return the metric by user, for intervals and comparisons; None if it is no mean over users."""
        return None

    def resampled(self, pairs: ScoredPairs, draws: Iterable[Shaped[Doubles, "_ U"]]) -> Shaped[Doubles, "R"] | None:
        """Return the metric of each of R resamples, for comparisons; None without. `draws` are blocks of the number of
        times that a resample draws each of U users."""
        return None


class RankingMetric(Metric):
    """Metric of one user's ranking; its mean over users is reported, with an interval."""

    at_cut_offs = True

    @abstractmethod
    def values(self, rankings: Rankings) -> Shaped[Doubles, "Q"]:
        """Return the metric of each of the Q rankings."""


class CatalogueMetric(Metric):
    """Metric of all rankings together."""

    at_cut_offs = True

    @abstractmethod
    def value(self, rankings: Rankings) -> float:
        """Return the metric; NaN if it is undefined."""
