"""Options of an evaluation, and the metrics that it measures."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field, field_validator

from twotower.evaluation.metrics import METRICS
from twotower.evaluation.metrics.metric import CatalogueMetric, Metric, PairMetric, Prominence, RankingMetric
from twotower.features.side import SideName
from twotower.kinds import Added
from twotower.section import Positive, Section

Repeats = Literal["exclude", "allow", "only"]
Metrics = dict[str, float]
"""Values by name: auc, recall@10, test.recall@10, …"""
WIDTH = "width"
"""Name of the number of numbers of an item's vector, beside the metrics of a model."""


class MetricSet:
    """Metrics that are measured together: the registered ones that always are, and added ones."""

    def __init__(self, added: Iterable[Metric] = ()) -> None:
        self._hold([*(kind() for kind in METRICS if kind.always), *added])

    def _hold(self, measured: list[Metric]) -> None:
        self.of_pairs = [m for m in measured if isinstance(m, PairMetric)]
        self.of_users = [m for m in measured if isinstance(m, RankingMetric)]
        self.of_catalogue = [m for m in measured if isinstance(m, CatalogueMetric)]
        self._all: list[Metric] = [*self.of_pairs, *self.of_users, *self.of_catalogue]

    def of_slices(self, side: SideName) -> MetricSet:
        """Return the metrics that are reported by slices of a side."""
        found = MetricSet()
        found._hold([m for m in self._all if side in m.slices])
        return found

    def names(self, k: Iterable[int], prominence: Prominence = Prominence.FILE) -> list[str]:
        """Return the names down to a level of prominence, without the part's name: auc, …, recall@10, …"""
        return self._names(k, [m for m in self._all if m.prominence <= prominence])

    def sliced(self, k: int) -> list[str]:
        """Return the names of the metrics that are reported by slice, at a cut-off."""
        return self._names((k,), [m for m in self._all if m.slices])

    @staticmethod
    def _names(k: Iterable[int], shown: list[Metric]) -> list[str]:
        at_once = [m.name for m in shown if not m.at_cut_offs]
        return at_once + [f"{m.name}@{n}" for n in k for m in shown if m.at_cut_offs]

    def judged_by(self, monitor: str) -> str:
        """Return the name of the metric that compares a model with baselines: ndcg@10 of monitor validation.ndcg@10,
        or `auc` for a metric of logits, which baselines do not have."""
        metric = self.find(monitor)
        return "auc" if isinstance(metric, PairMetric) and metric.of_logits else monitor.rpartition(".")[2]

    def find(self, name: str) -> Metric:
        """Return a metric by a name such as recall@10 or validation.recall@10. Raises KeyError if it is unknown."""
        return {m.name: m for m in self._all}[name.rpartition(".")[2].partition("@")[0]]


class EvaluationConfig(Section):
    """Metrics and slices of the report.

    `repeats` is about items that a user has seen in an earlier part. exclude: they are not ranked, and no targets.
    allow: they are ranked as all others. only: they alone are ranked, for items that a user takes again; a service
    ranks all items unless a request allows these alone. More than 10 different numbers in a column of `slices` are cut
    at their quartiles."""

    start_here = ("k",)
    research = ("head_share", "new_user_below", "new_item_below", "slice_min_users")

    k: tuple[Positive, ...] = Field(
        (10, 50), min_length=1, description="Cut-offs of the ranking metrics, the headline first."
    )
    metrics: Annotated[tuple[Annotated[Metric, METRICS], ...], Added] = Field(
        (),
        description="Metrics added to those that are always measured: names, or sections of a kind and its options.",
    )
    repeats: Repeats = Field(
        "exclude",
        description="Treatment of items that a user has seen in an earlier part. exclude: not ranked. "
        "allow: ranked as all others. only: ranked alone.",
    )
    max_users: int = Field(
        0, ge=0, description="Maximum number of users in the ranking metrics, drawn once. 0: all users."
    )
    bootstrap: int = Field(
        200, ge=0, le=1_000_000, description="Bootstrap resamples of the users for 95 % intervals. 0: no intervals."
    )
    head_share: float = Field(0.2, gt=0, lt=1, description="Share of items, the most popular ones, in the head slice.")
    new_user_below: int = Field(
        5, ge=1, description="Number of training interactions below which a user counts as new."
    )
    new_item_below: int = Field(
        5, ge=1, description="Number of training interactions below which an item counts as new."
    )

    slices: tuple[str, ...] = Field(
        (),
        description="Columns of the users' table, such as gender, whose values are measured apart.",
    )
    slice_min_users: int = Field(
        20, ge=1, description="Number of ranked users below which a value of a column of slices is left out."
    )
    weighted: bool = Field(
        False,
        description="Weigh rows in metrics by schema.weight and schema.events. "
        "false: all rows of a weight above 0 count alike.",
    )

    @field_validator("slices")
    @classmethod
    def _sliced_once(cls, slices: tuple[str, ...]) -> tuple[str, ...]:
        if twice := next((name for name in slices if slices.count(name) > 1), ""):
            raise ValueError(f"'{twice}' stands there twice; name each column once")
        return slices

    @field_validator("metrics")
    @classmethod
    def _measured_once(cls, metrics: tuple[Metric, ...]) -> tuple[Metric, ...]:
        names = [*(kind.name for kind in METRICS if kind.always), *(m.name for m in metrics)]
        if twice := next((name for name in names if names.count(name) > 1), ""):
            raise ValueError(f"'{twice}' is measured already; leave it out, or give the class another name")
        return metrics

    @property
    def metric_set(self) -> MetricSet:
        """All metrics that are measured."""
        return MetricSet(self.metrics)
