"""Closed forms of the pairs of a model: their values, the best on validation, and the terms that the mix weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from twotower.arrays.types import F32, Int
from twotower.data.dataset import Dataset
from twotower.data.pairs import Pairs
from twotower.distributed import DistributedContext
from twotower.errors import TrainingError
from twotower.evaluation.config import EvaluationConfig
from twotower.evaluation.factors import Factors
from twotower.evaluation.metrics.metric import PairMetric
from twotower.features.side import SideName
from twotower.features.values import UNKNOWN
from twotower.model.embeddings import FieldEmbeddings
from twotower.model.inputs.side_tensors import SideTensors
from twotower.model.pooling import resolve
from twotower.model.pooling.pooling import Pooling
from twotower.model.pooling.ridge import RidgeLayer
from twotower.model.two_tower import TwoTower
from twotower.scorers.choices import Choices
from twotower.scorers.positives import PositiveMatrix
from twotower.scorers.start import PairValues, Start, search
from twotower.train.factors import gathered_factors
from twotower.train.recipe import Recipe
from twotower.train.stopping import at_once

log = logging.getLogger(__name__)

MAX_SCORES = 2_000_000_000
"""Scores of users and items of one comparison, some 15 seconds of a processor core for vectors of 128 numbers."""
MIN_USERS = 1000
"""Users of a comparison at least, whatever the scores."""


def evaluation_of_search(config: EvaluationConfig, n_items: int) -> EvaluationConfig:
    """Return how values are compared: as in a training, with no more users, drawn once, than MAX_SCORES have for all
    items."""
    fits = max(MIN_USERS, MAX_SCORES // n_items)
    return config.model_copy(update={"max_users": min(config.max_users or fits, fits)})


def users_told(config: EvaluationConfig, monitor: str, validation: Pairs) -> str:
    """Return what a line about a value says of the users who compare it: nothing if they are all of validation, as for
    a metric of pairs."""
    if isinstance(config.metric_set.find(monitor), PairMetric):
        return ""
    users = len(np.unique(validation.user[validation.target]))
    return f" by {config.max_users:,} of {users:,} users of validation" if config.max_users < users else ""


class FormTerm(NamedTuple):
    """A term of the score: the products of one closed form of a pair, in all dimensions or in a part of them."""

    name: str
    users: F32[Tensor, "U e"]
    items: F32[Tensor, "I e"]


class PairPart(NamedTuple):
    """Part of the vectors of a pair by one of its closed forms: what a column of the items has in a piece of the
    pooling."""

    targets: str
    """Name of the rows of `PairValues`."""
    column: int
    """Number of the column among the fields of the item tower."""
    dimensions: Int[Tensor, "k"]


@dataclass(frozen=True)
class ClosedForm:
    """A pair whose values are solved, and its terms, each with the weight 1."""

    pair: int
    start: Start
    values: PairValues
    parts: Sequence[PairPart]
    """Part that each term is; empty for one term."""
    terms: Sequence[FormTerm]

    def scores(self, choices: Choices) -> list[F32[Tensor, "n k"]]:
        """Return the scores of the terms."""
        return [choices.products(term.users, term.items) for term in self.terms]

    def write(self, model: TwoTower, weights: Sequence[float], values: PairValues | None = None) -> None:
        """Overwrite the items of the pair with the weighted terms of its values, or of others of the same start."""
        values = values or self.values
        if not self.parts:
            write_targets(model, self.pair, [weights[0] * rows for rows in values.targets])
            return
        sums = [torch.zeros_like(rows) for rows in values.targets]
        for (targets, column, dimensions), weight in zip(self.parts, weights, strict=True):
            sums[column][:, dimensions] += weight * getattr(values, targets)[column][:, dimensions]
        write_targets(model, self.pair, sums)


class ClosedForms:
    """Gives pairs the values of their closed forms, each those that are best on validation by the pair alone."""

    def __init__(
        self, model: TwoTower, dataset: Dataset, recipe: Recipe, users: SideTensors, items: SideTensors,
        context: DistributedContext, measure: Callable[[Factors, EvaluationConfig], Mapping[str, float]],
        score_of: Callable[[Mapping[str, float]], float], check_stop: Callable[[], None],
    ) -> None:  # fmt: skip
        """`users` and `items` are the inputs of all rows. `measure` returns metrics of validation, and `score_of` the
        monitored one, higher is better. `check_stop` raises Interrupted if a rank is to stop."""
        self.model, self.dataset, self.recipe = model, dataset, recipe
        self.users, self.items, self.context = users, items, context
        self.measure, self.score_of, self.check_stop = measure, score_of, check_stop
        self._evaluation = evaluation_of_search(recipe.evaluation, len(dataset.items))

    def fill(self, pair: int, start: Start) -> ClosedForm:
        """Overwrite a pair with the values of its closed form that are best, and return its terms. Raises TrainingError
        if no values are finite, and what `check_stop` raises."""
        positives = self._positives(pair, start, self.dataset)
        found = self.best(pair, start, positives)
        values = self._solve(pair, found, positives)
        log.info(f"pair {pair} by {start.kind}: {found.describe() or 'no values to choose'}")
        if not values.alternative:
            of_pair = self._factors(pair)
            return ClosedForm(pair, found, values, (), [FormTerm(start.kind, of_pair.users, of_pair.items)])
        parts, terms = list[PairPart](), list[FormTerm]()
        for targets, also in (("alternative", ", equal values"), ("targets", "")):  # what is written last stays
            if rows := getattr(values, targets):
                write_targets(self.model, pair, rows)
                of_pair = self._factors(pair)
                for column, name, piece, dimensions in _parts(self.model, pair, rows):
                    users, items = of_pair.users[:, dimensions], of_pair.items[:, dimensions]
                    parts.append(PairPart(targets, column, dimensions))
                    terms.append(FormTerm(f"{name} ({piece}{also})", users, items))
        return ClosedForm(pair, found, values, parts, terms)

    def solve_again(self, form: ClosedForm, dataset: Dataset, weights: Sequence[float] | None) -> None:
        """Solve a closed form from the train part of another dataset. Its strengths and weights stay; None: it has
        none."""
        values = self._solve(form.pair, form.start, self._positives(form.pair, form.start, dataset))
        if weights is not None:
            form.write(self.model, weights, values)

    def best(self, pair: int, start: Start, positives: PositiveMatrix | None) -> Start:
        """Return the closed form with the values that are best. May overwrite its pair."""
        return search(start, lambda one: self.score(pair, one, positives)) if start.several else start.alternatives()[0]

    def score(self, pair: int, start: Start, positives: PositiveMatrix | None) -> float:
        """Return the validation metric of a pair with these values, alone; higher is better, minus infinity for values
        that cannot be solved. Raises what `check_stop` raises."""
        self.check_stop()
        try:
            self._solve(pair, start, positives)
        except TrainingError as e:
            score, line = -math.inf, f"left out of the values that are tried: {str(e).partition(';')[0]}"
        else:
            monitor = self.recipe.train.monitor
            metrics = self.measure(self._factors(pair), self._evaluation)
            score, by = self.score_of(metrics), users_told(self._evaluation, monitor, self.dataset.validation)
            line = f"pair {pair} by {start.kind}: {start.describe()}: {monitor} = {metrics[monitor]:.4f}{by}"
        log.info(line)
        return score

    def _positives(self, pair: int, start: Start, dataset: Dataset) -> PositiveMatrix | None:
        """Return the positives that a closed form is solved from, on rank 0."""
        return start.positives(dataset, self.model.config.pairs[pair]) if self.context.is_main else None

    def _solve(self, pair: int, start: Start, positives: PositiveMatrix | None) -> PairValues:
        return solve_pair(self.model, pair, start, positives, self.recipe.train.seed, self.context)

    def _factors(self, pair: int) -> Factors:
        """Return the vectors of a pair, without columns of biases."""
        found = gathered_factors(self.model, self.users, self.items, self.context, pairs=[pair])
        (place,) = self.model.parts_of_pairs([pair])
        return Factors(found.users[:, place], found.items[:, place])


def solve_pair(
    model: TwoTower, pair: int, start: Start, positives: PositiveMatrix | None, seed: int, context: DistributedContext
) -> PairValues:
    """Overwrite a pair with the values of its closed form, those of rank 0 on all ranks, and return them. `positives`
    are on rank 0."""
    user = _embeddings(model, "user", pair)
    first = user.fields[0]
    found = context.broadcast(
        None if positives is None else _values(start, positives, resolve(first.pooling), first.width, seed)
    )
    if isinstance(found, str):
        raise TrainingError(found)
    tables = (found.source, *found.further, *found.targets, *found.alternative) if found else ()
    if not found or not all(bool(torch.isfinite(table).all()) for table in tables):
        raise _not_finite(start)
    if found.penalty is not None:
        (layer,) = user.encoders.values()
        assert isinstance(layer, RidgeLayer)
        try:
            layer.set_penalties(found.penalty.to(layer.factor.device), found.rate)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            raise _not_finite(start) from None
    names = model.config.pairs[pair].user.fields
    _write(user, names, (found.source, *found.further)[: len(names)])
    write_targets(model, pair, found.targets)
    return found


def write_targets(model: TwoTower, pair: int, targets: Sequence[F32[Tensor, "_ F"]]) -> None:
    """Overwrite the rows of the fields of a pair's item tower."""
    _write(_embeddings(model, "item", pair), model.config.pairs[pair].item.fields, targets)


def clear_pair(model: TwoTower, pair: int) -> None:
    """Overwrite the items of a pair with zeros, so that its scores are 0."""
    item, names = _embeddings(model, "item", pair), model.config.pairs[pair].item.fields
    write_targets(model, pair, [torch.zeros_like(item.rows_of(name)) for name in names])


def _embeddings(model: TwoTower, side: SideName, pair: int) -> FieldEmbeddings:
    return model.towers(side)[pair].embeddings


def _write(tower: FieldEmbeddings, names: Sequence[str], tables: Sequence[F32[Tensor, "_ F"]]) -> None:
    """Overwrite the rows of fields; the unknown one with zeros."""
    with torch.no_grad():
        for name, values in zip(names, tables, strict=True):
            rows = tower.rows_of(name)
            rows.copy_(values)
            rows[UNKNOWN].zero_()


def _parts(
    model: TwoTower, pair: int, targets: Sequence[F32[Tensor, "_ F"]]
) -> list[tuple[int, str, str, Int[Tensor, "k"]]]:
    """Return the parts of the vectors that are not 0: number and name of a column of the items, piece of the pooling in
    words, and dimensions."""
    user, found = _embeddings(model, "user", pair), list[tuple[int, str, str, Int[Tensor, "k"]]]()
    pooling = resolve(user.fields[0].pooling)
    pieces = torch.arange(user.widths[0]).chunk(pooling.pieces)
    for column, (name, rows) in enumerate(zip(model.config.pairs[pair].item.fields, targets, strict=True)):
        used = rows[UNKNOWN + 1 :].any(0).cpu()
        for rate, dimensions in zip(pooling.decay_rates, pieces, strict=True):
            if (own := dimensions[used[dimensions]]).numel():
                found.append((column, name, f"rate {rate:g}", own))
    return found


def _values(
    start: Start, positives: PositiveMatrix, pooling: Pooling, width: int, seed: int
) -> PairValues | str | None:
    """Return the values of a closed form; why there are none, or None where float32 cannot solve for them."""
    try:
        with at_once():
            return start.solve(positives, pooling, width, seed)
    except TrainingError as e:
        return str(e)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return None


def _not_finite(start: Start) -> TrainingError:
    defaults = [f"{name} nearer its default, {type(start).model_fields[name].default[0]:g}" for name in start.choices]
    return TrainingError(
        f"the scorer '{start.kind}' ({start.describe()}) has values that are not finite; "
        + (f"set {', '.join(defaults)}" if defaults else "leave it out of scorers")
    )
