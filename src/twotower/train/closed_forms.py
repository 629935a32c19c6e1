"""Closed forms of the pairs of a model: their values, which are the best on validation."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from twotower.arrays.types import F32
from twotower.data.dataset import Dataset
from twotower.data.splits import VALIDATION
from twotower.distributed import DistributedContext
from twotower.errors import TrainingError
from twotower.evaluation.added_scores import SparseScores
from twotower.evaluation.config import EvaluationConfig
from twotower.evaluation.factors import Factors
from twotower.evaluation.moments import VersionFactors
from twotower.features.side import SIDES
from twotower.features.values import UNKNOWN
from twotower.model.embeddings import FieldEmbeddings
from twotower.model.inputs.side_tensors import SideTensors
from twotower.model.pooling import resolve
from twotower.model.pooling.pooling import Pooling
from twotower.model.pooling.ridge import RidgeLayer
from twotower.model.two_tower import TwoTower
from twotower.scorers.choices import BLOCK_SCORES
from twotower.scorers.positives import PositiveMatrix
from twotower.scorers.scorer import terms_of
from twotower.scorers.start import PairValues, Start, search
from twotower.train.factors import model_factors
from twotower.train.recipe import Recipe
from twotower.train.stopping import at_once

log = logging.getLogger(__name__)

USUAL = 3.0
"""Root mean square of the scores of a term while values are compared, in standard deviations of a user's scores."""
PAIRS = 256
"""Validation pairs whose users' scores give the standard deviation."""
MAX_SCORES = 2_000_000_000
"""Scores of users and items of one comparison, some 15 seconds of a processor core for vectors of 128 numbers."""
MIN_USERS = 1000
"""Users of a comparison at least, whatever the scores."""


def evaluation_of_search(config: EvaluationConfig, n_items: int) -> EvaluationConfig:
    """Return how values are compared: as in a training, with no more users, drawn once, than MAX_SCORES have for all
    items."""
    fits = max(MIN_USERS, MAX_SCORES // n_items)
    return config.model_copy(update={"max_users": min(config.max_users or fits, fits)})


class ClosedForm(NamedTuple):
    """A pair whose values are solved, and the start with those that are chosen."""

    pair: int
    start: Start


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
        """Overwrite a pair with the values of its closed form that are best, and return it. Raises TrainingError if no
        values are finite, and what `check_stop` raises."""
        positives = self._positives(pair, start, self.dataset)
        found = self.best(pair, start, positives)
        self._solve(pair, found, positives)
        log.info(f"pair {pair} by {start.kind}: {found.describe() or 'no values to choose'}")
        return ClosedForm(pair, found)

    def solve_again(self, form: ClosedForm, dataset: Dataset, weight: float) -> None:
        """Solve a closed form from the train part of another dataset. Its strengths and its weight stay."""
        self._solve(form.pair, form.start, self._positives(form.pair, form.start, dataset))
        scale_pair(self.model, form.pair, weight)

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
            metrics = self.measure(self._with_term(self.vectors(pair)), self._evaluation)
            score = self.score_of(metrics)
            line = f"pair {pair} by {start.kind}: {start.describe()}: {monitor} = {metrics[monitor]:.4f}"
        log.info(line)
        return score

    @cached_property
    def _usual(self) -> SparseScores | None:
        """Scores of a term, to which a closed form is added while its values are compared."""
        return next((scores for term in terms_of(self.model) if (scores := term.usual(self.dataset))), None)

    def _with_term(self, found: Factors) -> Factors:
        """Return scores with those of a term, where there is one: the values of a closed form are compared by what it
        adds to these."""
        if self._usual is None or not len(self._usual.values):
            return found
        size = float(np.sqrt(np.square(self._usual.values, dtype=np.float64).mean())) or 1.0
        factor = np.float32(USUAL * spread_of_scores(found, self.dataset) / size)
        return replace(found, added=(replace(self._usual, values=self._usual.values * factor),))

    def _positives(self, pair: int, start: Start, dataset: Dataset) -> PositiveMatrix | None:
        """Return the positives that a closed form is solved from, on rank 0."""
        return start.positives(dataset, self.model.config.pairs[pair]) if self.context.is_main else None

    def _solve(self, pair: int, start: Start, positives: PositiveMatrix | None) -> None:
        """Overwrite a pair with the values of its closed form, those of rank 0 on all ranks."""
        user, item = (self.model.towers(side)[pair].embeddings for side in SIDES)
        first, names, seed = user.fields[0], self.model.config.pairs[pair], self.recipe.train.seed
        found = self.context.broadcast(
            None if positives is None else _values(start, positives, resolve(first.pooling), first.width, seed)
        )
        if isinstance(found, str):
            raise TrainingError(found)
        tables = (found.source, *found.further, *found.targets) if found else ()
        if not found or not all(bool(torch.isfinite(table).all()) for table in tables):
            raise _not_finite(start)
        if found.penalty is not None:
            (layer,) = user.encoders.values()
            assert isinstance(layer, RidgeLayer)
            try:
                layer.set_penalties(found.penalty.to(layer.factor.device), found.rate)
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
                raise _not_finite(start) from None
        _write(user, names.user.fields, (found.source, *found.further)[: len(names.user.fields)])
        _write(item, names.item.fields, found.targets)

    def vectors(self, pair: int) -> Factors:
        """Return the vectors of users and items of a pair, without columns of biases."""
        found = model_factors(self.model, self.users, self.items, self.context, pairs=[pair])
        (place,) = self.model.parts_of_pairs([pair])
        return Factors(found.users[:, place], found.items[:, place])


def spread_of_scores(found: Factors, dataset: Dataset) -> float:
    """Return the standard deviation of a user's products over all items, a mean over users of the validation part."""
    scorer, rows = VersionFactors.of_part(found, dataset, VALIDATION), dataset.part_indices(VALIDATION)
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), PAIRS)).astype(int)]
    users, size = dataset.pairs.user[rows], max(1, BLOCK_SCORES // len(dataset.items))
    blocks = [slice(start, start + size) for start in range(0, len(rows), size)]
    each = [scorer.catalogue_scores(users[some], rows[some]).std(1) for some in blocks]
    return float(torch.cat(each).double().mean())


def scale_pair(model: TwoTower, pair: int, weight: float) -> None:
    """Multiply the items of a pair, and so its scores, by a weight."""
    item = model.towers("item")[pair].embeddings
    with torch.no_grad():
        for name in model.config.pairs[pair].item.fields:
            item.rows_of(name).mul_(weight)


def _write(tower: FieldEmbeddings, names: Sequence[str], tables: Sequence[F32[Tensor, "_ F"]]) -> None:
    """Overwrite the rows of fields; the unknown one with zeros."""
    with torch.no_grad():
        for name, values in zip(names, tables, strict=True):
            rows = tower.rows_of(name)
            rows.copy_(values)
            rows[UNKNOWN].zero_()


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
