"""Preconditions of a training: the recipe fits the dataset, its order of time and the ranks."""

from __future__ import annotations

import logging
from typing import NamedTuple

import numpy as np

from twotower.arrays.pieces import ones
from twotower.data.dataset import Dataset
from twotower.data.evidence import MAX_ROWS, OrderEvidence, contexts_of_items, order_evidence
from twotower.data.split import SplitConfig
from twotower.distributed import DistributedContext
from twotower.errors import ConfigError, DataError, listed
from twotower.evaluation.metrics.measured import ScoredPairs
from twotower.evaluation.metrics.metric import PairMetric
from twotower.evaluation.slices import UserSlices
from twotower.features.schema import Schema
from twotower.features.side import SIDES
from twotower.model.pooling import check_poolings, resolve
from twotower.train.defaults import STEPS_OF_EPOCH, batch_of, training_rows
from twotower.train.recipe import Recipe

log = logging.getLogger(__name__)

MEAN_WEIGHTS = 0.1, 10.0
"""Range of the mean weight of training targets outside which a warning is logged."""
MIN_PAIRS = 1000
"""Minimum number of adjacent pairs for a statement about an order."""
MIN_EXPECTED = 25.0
"""Minimum number of agreements expected of shuffled histories, so that a lift of two has a z-score of five or more."""


def check_recipe(dataset: Dataset, recipe: Recipe, context: DistributedContext) -> None:
    """Raise ConfigError if the recipe does not fit the data or the ranks, DataError if nothing can be learned."""
    if recipe.evaluation.repeats != "exclude" and dataset.schema.duplicates != "keep":
        raise ConfigError(
            f"evaluation.repeats = '{recipe.evaluation.repeats}' ranks pairs that a user repeats, and "
            f"schema.duplicates = '{dataset.schema.duplicates}' leaves none; set schema.duplicates = 'keep', or "
            "evaluation.repeats = 'exclude' for a log without repeats"
        )
    _check_learnable(dataset, recipe)
    _check_context(dataset)
    _check_histories(dataset, recipe)
    _check_shards(recipe, context)
    if dataset.items.versioned and recipe.negatives.remembered:
        raise ConfigError(
            "negatives.cross_batch_memory keeps item vectors of other times, and with schema.valid_from a positive "
            "sees items as they were at its own; leave it out"
        )
    if dataset.schema.side("context") and recipe.train.embedding_placement == "torchrec":
        raise ConfigError(
            "train.embedding_placement = 'torchrec' does not go with features of the context; set 'replicated', or "
            "drop them"
        )
    _check_fitted(dataset, recipe)
    for term in recipe.terms:
        if recipe.model.stacking:
            raise ConfigError(
                f"model.stacking weighs the terms of a logit, and the scorer '{term.kind}' would be added to it; leave "
                "one of them out"
            )
        term.check(dataset, recipe.model, recipe.evaluation)
    fitted = [f"'{term.kind}'" for term in recipe.terms]
    if recipe.last_starts and not recipe.model.stacking:  # which calibrates them
        fitted += [f"'{start.kind}'" for start in recipe.last_starts.values()]
    of_pairs = isinstance(recipe.evaluation.metric_set.find(recipe.train.monitor), PairMetric)
    if fitted and recipe.loss.pointwise and not of_pairs:
        log.warning(
            f"the mix fits {listed(fitted)} to what users took: the "
            f"logits are no longer log-odds of labels, which loss.kind = '{recipe.loss.kind}' learns, and log_loss "
            "says nothing; set train.monitor = 'validation.log_loss' to keep them"
        )
    size = recipe.train.batch_size
    steps = -(-training_rows(dataset, recipe) // size)
    if recipe.train.epochs and steps < STEPS_OF_EPOCH and size > batch_of(len(dataset.pairs)):
        log.warning(
            f"train.batch_size = {size} makes {steps} steps an epoch, too few to learn much; set 0, which "
            "follows the number of rows, or a smaller one"
        )
    _check_towers(recipe)
    _check_scorers(dataset, recipe)
    _check_narrow(dataset, recipe)
    for pair, start in (recipe.first_starts | recipe.last_starts).items():
        start.check(dataset, recipe.model, pair)
    for metric in recipe.evaluation.metrics:
        metric.check(dataset)
    for column in recipe.evaluation.slices:
        UserSlices.of(dataset.users.frame, column)
    if recipe.evaluation.weighted and not dataset.pairs.weighted:
        raise ConfigError(
            "evaluation.weighted = true needs weights, and the schema has none; name a column in schema.weight, or "
            "give types in schema.events weights other than 1"
        )


def _check_fitted(dataset: Dataset, recipe: Recipe) -> None:
    """Raise ConfigError if validation lacks what is fitted to it after the last epoch, or chosen by it."""
    if recipe.train.refit and not len(dataset.validation):
        raise ConfigError(
            "train.refit trains for the epochs that validation chooses, and the split has no validation part; give one "
            "(split.validation), or set train.refit = false"
        )
    options = [f"model.{name}" for name in ("stacking", "cold_item_bias") if getattr(recipe.model, name)]
    scorers = [f"the scorer '{scorer.kind}'" for scorer in (*recipe.terms, *recipe.last_starts.values())]
    if not len(dataset.validation) and (fitted := [*options, *scorers]):
        way = f"set {fitted[0]} = false" if options else "leave it out of scorers"
        raise ConfigError(f"{fitted[0]} is fitted to the validation part, and the split has none; {way}, or give one")
    if recipe.model.stacking and not recipe.loss.pointwise:
        raise ConfigError(
            "model.stacking fits weights to the labels of the validation part by log loss, and loss.kind = "
            f"'{recipe.loss.kind}' is not one of labels; set model.stacking = false"
        )


def _check_scorers(dataset: Dataset, recipe: Recipe) -> None:
    """Raise ConfigError if closed forms do not go with versions of items or the context."""
    starts = [*recipe.first_starts.values(), *recipe.last_starts.values()]
    if not starts:
        return
    kinds = listed([f"'{kind}'" for kind in dict.fromkeys(start.kind for start in starts)])
    if dataset.items.versioned:
        out = "leave it out of scorers, or leave out schema.valid_from"
        if not recipe.train.epochs:
            out = (
                "leave out schema.valid_from, or use a recipe that is trained: cold-start, which reads columns of "
                "items, or sequence-short"
            )
        raise ConfigError(f"the closed form {kinds} does not go with schema.valid_from of items; {out}")
    context = [f"'{f.name}'" for f in dataset.schema.side("context")]
    if recipe.train.epochs and recipe.last_starts and context:
        raise ConfigError(
            f"the closed form {kinds} is added to trained towers, whose vectors depend on {listed(context)}; "
            "leave it out of scorers, or leave out the features of the context"
        )


def _check_narrow(dataset: Dataset, recipe: Recipe) -> None:
    """Raise ConfigError if there is no one vector of each user, or nothing that a width can be chosen by."""
    context = [f"'{f.name}'" for f in dataset.schema.side("context")]
    if recipe.narrow.width == "auto" and context:
        log.info(f"vectors of users depend on {listed(context)}: narrow.width = 'auto' keeps those of all pairs")
        return
    if recipe.narrow.width and context:
        raise ConfigError(
            f"narrow.width is fitted to one vector of each user, and those here depend on {listed(context)}; set "
            "narrow.width = 0, or leave out the features of the context"
        )
    if recipe.narrow.width == "auto" and not len(dataset.validation):
        raise ConfigError(
            "narrow.width = 'auto' is chosen on the validation part, and the split has none; set a width, such as 128"
        )


def _check_towers(recipe: Recipe) -> None:
    """Warn of options for hidden units in a tower without any."""
    for number, pair in enumerate(recipe.model.pairs):
        for side, tower in zip(SIDES, (pair.user, pair.item), strict=True):
            if names := tower.without_effect:
                verb, them = ("change", "them") if len(names) > 1 else ("changes", "it")
                last = ", of which the last is the width of the vector" if tower.layers else ""
                log.warning(
                    f"model.pairs.{number}.{side}: {' and '.join(names)} {verb} nothing, as the tower has no hidden "
                    f"units (layers = {[*tower.layers]}{last}); give layers two widths or more, or leave {them} out"
                )


def _check_learnable(dataset: Dataset, recipe: Recipe) -> None:
    """Raise DataError if the training part has one class and no source adds the other, ConfigError if the monitor
    cannot be measured."""
    only_positives = bool(dataset.train.labels.all())
    if recipe.loss.pointwise and only_positives and not recipe.negatives.pairs:
        schema, more = dataset.schema, ""
        of = " of a weight above 0" if schema.weighted else ""
        if schema.label:
            more = f", as '{schema.label}' is above schema.positive_above = {schema.positive_above:g}"
        raise DataError(
            f"every training interaction{of} is a positive{more}, and no source of negatives gives pairs; set "
            "negatives.random = 5, or loss.kind = 'softmax'"
        )
    for source in recipe.negatives.sources:
        source.check(dataset)
    if dataset.pairs.weighted and not recipe.loss.pointwise:
        _check_scale(dataset)
    pairs, monitor = dataset.validation, recipe.train.monitor
    if not len(pairs):
        if recipe.train.patience:
            raise ConfigError(
                f"train.patience = {recipe.train.patience} needs a validation part, and the split has none; set "
                "train.patience = 0, or give a validation part"
            )
        log.info("no validation part: training runs train.epochs epochs and keeps the last one")
        return
    labels = pairs.labels
    if not len(labels):
        raise ConfigError(
            "no row of the validation part has a weight above 0, so no epoch can be measured; set split.validation = "
            "0, or give a validation part with weights"
        )
    if labels.all() or not labels.any():
        metric = recipe.evaluation.metric_set.find(monitor)
        if not metric.is_defined(ScoredPairs.of(ones(len(pairs)), pairs)):
            raise ConfigError(
                f"train.monitor '{monitor}' cannot be measured: the validation part has one class only; "
                f"use train.monitor = 'validation.recall@{recipe.evaluation.k[0]}'"
            )


def _check_context(dataset: Dataset) -> None:
    """Raise ConfigError if the item determines a feature of the context."""
    for name, found in contexts_of_items(dataset).items():
        raise ConfigError(
            f"feature '{name}' of the context is a function of the item: {found.same:,} of {found.rows:,} rows have "
            "the most frequent value of their item, so it gives the answer away, and no request knows it before the "
            "item; put its column in the table of items (data.items), and set side = 'item', or leave the feature out"
        )


def _check_scale(dataset: Dataset) -> None:
    """Warn if weights are far from 1. Contrastive losses read them as numbers of rows."""
    mean = float(dataset.item_positive_counts.sum()) / len(dataset.positive_indices)
    if not MEAN_WEIGHTS[0] <= mean <= MEAN_WEIGHTS[1]:
        log.warning(
            f"the mean weight of the training targets is {mean:.3g}, and a loss over candidates reads a weight as a "
            "number of rows; scale schema.weight and schema.events so that it is near 1, or set schema.weight_scale = "
            "'log'"
        )


def _check_histories(dataset: Dataset, recipe: Recipe) -> None:
    """Raise ConfigError if a sequence contradicts `train.history_scope`."""
    check_poolings(dataset.schema)
    causal = recipe.train.history_scope == "causal"
    for f in dataset.schema.features:
        if not f.history:
            continue
        is_read = recipe.reads_in_steps(f.side, f.name)
        if not causal and f.pools and resolve(f.pools).needs_time_order and (is_read or not dataset.schema.time):
            candidates = " and loss.kind = 'softmax'" if recipe.loss.pointwise else ""
            scope = f"set train.history_scope = 'causal'{candidates}" if is_read else ""
            time = "name the column of times in schema.time" if not dataset.schema.time else ""
            raise ConfigError(
                f"feature '{f.name}': pooling = '{f.pools.kind}' needs the order of time; "
                f"{', and '.join(filter(None, (scope, time)))}, or pooling = 'mean'"
            )
        if causal and (f.side == "item" or f.history.max_length):
            what = "on the item side" if f.side == "item" else "with max_length"
            raise ConfigError(
                f"feature '{f.name}': a sequence {what} does not go with train.history_scope = 'causal'; drop it or "
                "set train.history_scope = 'leave_batch_out'"
            )
    if causal and not any(s.beyond_batch for s in recipe.negatives.sources):
        log.warning(
            "with train.history_scope = 'causal' a batch holds few users, so the batch alone gives few "
            "candidates; add negatives.uniform, or negatives.full = true"
        )
    if causal and not dataset.schema.time:
        raise ConfigError(
            "train.history_scope = 'causal' needs a time; name its column in schema.time, or set train.history_scope = "
            "'leave_batch_out'"
        )
    check_order(dataset, recipe)


def _check_shards(recipe: Recipe, context: DistributedContext) -> None:
    """Raise ConfigError if the ranks cannot share the shards equally, or a batch has fewer rows than shards."""
    shards = recipe.train.data_shards
    if shards > 1 and shards % context.world_size:
        raise ConfigError(
            f"train.data_shards = {shards} does not divide among {context.world_size} ranks; set a multiple of "
            f"{context.world_size}, or 1, with which every rank reads all interactions"
        )
    if shards > recipe.train.batch_size:
        raise ConfigError(
            f"train.data_shards = {shards} and train.batch_size = {recipe.train.batch_size}: some batches would be "
            "empty; set train.data_shards to at most train.batch_size"
        )


class OrderReaders(NamedTuple):
    """Settings that need an order of time, and settings to use instead, as texts."""

    readers: list[str]
    instead: list[str]

    @classmethod
    def of(cls, schema: Schema, recipe: Recipe, split: SplitConfig | None = None) -> OrderReaders:
        """Find the settings of a recipe, its schema and a split. Raises ConfigError for an unknown pooling."""
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
        self.readers.append(reader)
        self.instead.append(instead)

    @property
    def way_out(self) -> str:
        return listed(self.instead)

    def __str__(self) -> str:
        return f"{listed(self.readers)} {'need' if len(self.readers) > 1 else 'needs'}"


def check_times(schema: Schema, split: SplitConfig, recipe: Recipe) -> None:
    """Raise ConfigError if settings need times and the log has none; name the settings to use instead."""
    if schema.time:
        return
    if (found := OrderReaders.of(schema, recipe, split)).readers:
        raise ConfigError(
            f"{found} a time, and schema.time is empty; name its column in schema.time, or set {found.way_out}"
        )


def check_order(dataset: Dataset, recipe: Recipe) -> None:
    """Warn if the recipe needs an order that the log does not show. Raises ConfigError if each user's times are
    equal."""
    found = OrderReaders.of(dataset.schema, recipe)
    if not found.readers or (evidence := training_order(dataset)) is None:
        return
    if evidence.ties == 1 and evidence.pairs >= MIN_PAIRS:
        raise ConfigError(
            f"{found} an order, and all times of '{dataset.schema.time}' are equal for each user; name another column "
            f"in schema.time, or set {found.way_out}"
        )
    if problem := order_problem(evidence):
        log.warning(f"{found} an order, and {problem}; set {found.way_out} if the times are not those of the events")


def training_order(dataset: Dataset, max_rows: int = MAX_ROWS) -> OrderEvidence | None:
    """Measure the order of about `max_rows` training interactions of users drawn at random; None without times."""
    if not dataset.schema.time:
        return None
    timeline = dataset.timeline
    users = np.random.default_rng(0).permutation(len(timeline))
    n = int(np.searchsorted(np.cumsum(timeline.lengths[users]), max_rows, side="right"))
    rows = timeline.take(users[: max(1, n)]).values
    user, item = (column[rows].astype(np.int64) for column in (dataset.pairs.user, dataset.pairs.item))
    return order_evidence(user, item, dataset.times[rows])


def order_problem(evidence: OrderEvidence) -> str:
    """Return why there is no order; empty if there is one, or too few pairs to decide."""
    if evidence.exists or evidence.pairs < MIN_PAIRS or max(evidence.expected, evidence.agreements) < MIN_EXPECTED:
        return ""
    return f"the log shows none: {evidence}"
