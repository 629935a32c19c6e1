"""Checks of settings that read the order of time: it must be known, and exist."""

from __future__ import annotations

import logging
from typing import NamedTuple

import numpy as np

from twotower.data.dataset import Dataset
from twotower.data.order_evidence import MAX_ROWS, OrderEvidence, order_evidence
from twotower.data.split import SplitConfig
from twotower.errors import ConfigError, listed
from twotower.features.schema import Schema
from twotower.model.pooling import check_poolings, resolve
from twotower.train.recipe import Recipe

log = logging.getLogger(__name__)

MIN_PAIRS = 1000
"""Adjacent pairs below which nothing is said about an order."""
MIN_EXPECTED = 25.0
"""Agreements of shuffled histories below which nothing is said about an order: a lift of two is a z of five from here on."""


class OrderReaders(NamedTuple):
    """Settings that read an order, and those that do without it, as texts."""

    readers: list[str]
    instead: list[str]

    @classmethod
    def of(cls, schema: Schema, recipe: Recipe, split: SplitConfig | None = None) -> OrderReaders:
        """Find those of a recipe, its schema and a split. Raises ConfigError for a pooling that does not exist."""
        check_poolings(schema)
        found = cls([], [])
        if split and split.needs_time:
            found.add(f"split.kind = '{split.kind}'", "split.kind = 'random'")
        if split and split.from_train == "time":
            found.add("split.from_train = 'time'", "split.from_train = 'random'")
        if recipe.train.history_scope == "causal":
            found.add("train.history_scope = 'causal'", "train.history_scope = 'leave_batch_out'")
        for i, f in enumerate(schema.features):
            if f.history and f.pools and resolve(f.pools).needs_time_order:
                reader = f"the pooling '{f.pools.kind}' of feature '{f.name}'"
                found.add(reader, f"schema.features.{i}.pooling = 'mean'")
        return found

    def add(self, reader: str, instead: str) -> None:
        """Add a setting that reads an order, and the one without it."""
        self.readers.append(reader)
        self.instead.append(instead)

    @property
    def way_out(self) -> str:
        """The settings to set instead."""
        return listed(self.instead)

    def __str__(self) -> str:
        return f"{listed(self.readers)} {'need' if len(self.readers) > 1 else 'needs'}"


def check_times(schema: Schema, split: SplitConfig, recipe: Recipe) -> None:
    """Raise ConfigError if settings need times and the log has none; it names what to set in place of each."""
    if schema.time:
        return
    if (found := OrderReaders.of(schema, recipe, split)).readers:
        raise ConfigError(
            f"{found} a time, and schema.time is empty; name its column in schema.time, or set {found.way_out}"
        )


def check_order(dataset: Dataset, recipe: Recipe) -> None:
    """Log a warning if the recipe reads an order that the log does not show. Raises ConfigError if all times of each user are
    equal, so that the order is that of the table."""
    found = OrderReaders.of(dataset.schema, recipe)
    if not found.readers or (evidence := training_order(dataset)) is None:
        return
    if evidence.ties == 1 and evidence.pairs >= MIN_PAIRS:
        raise ConfigError(
            f"{found} an order, and all times of '{dataset.schema.time}' are equal for each user; name another column in schema.time, or "
            f"set {found.way_out}"
        )
    if problem := order_problem(evidence):
        log.warning(f"{found} an order, and {problem}; set {found.way_out} if the times are not those of the events")


def training_order(dataset: Dataset, max_rows: int = MAX_ROWS) -> OrderEvidence | None:
    """Measure the order of the training interactions of users drawn at random, who have about `max_rows` of them; None without
    times."""
    if dataset.times is None:
        return None
    timeline = dataset.timeline
    users = np.random.default_rng(0).permutation(len(timeline))
    n = int(np.searchsorted(np.cumsum(timeline.lengths[users]), max_rows, side="right"))
    rows = timeline.take(users[: max(1, n)]).values
    user, item = (column[rows].astype(np.int64) for column in (dataset.pairs.user, dataset.pairs.item))
    return order_evidence(user, item, dataset.times[rows])


def order_problem(evidence: OrderEvidence) -> str:
    """Return what is wrong with an order; empty if it exists, or if there are too few pairs to tell."""
    if evidence.exists or evidence.pairs < MIN_PAIRS or max(evidence.expected, evidence.agreements) < MIN_EXPECTED:
        return ""
    return f"the log shows none: {evidence}"
