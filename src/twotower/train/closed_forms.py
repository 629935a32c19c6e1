"""Closed forms of the pairs of a model: their values, the best on validation, and the terms that the mix weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from twotower.arrays.types import F32
from twotower.data.dataset import Dataset
from twotower.distributed import DistributedContext
from twotower.errors import TrainingError
from twotower.evaluation.config import EvaluationConfig
from twotower.evaluation.factors import Factors
from twotower.model.inputs.side_tensors import SideTensors
from twotower.model.two_tower import TwoTower
from twotower.scorers.choices import Choices
from twotower.scorers.positives import PositiveMatrix
from twotower.scorers.scorer import terms_of
from twotower.scorers.search import evaluation_of_search, search, users_told
from twotower.scorers.start import PairValues, Start
from twotower.train.cold_items import spread_of_scores
from twotower.train.factors import gathered_factors
from twotower.train.pair import PairPart, parts_of_pair, start_pair, targets_kept, weigh_parts, write_targets
from twotower.train.recipe import Recipe
from twotower.train.tried_starts import TriedStarts

log = logging.getLogger(__name__)

USUAL = 3.0
"""Root mean square of the scores of a term while values are compared, in standard deviations of a user's scores."""
MAX_COMPARED = 4_000_000
"""Positives of a start up to which all of them compare its values, if those of some users can."""


@dataclass(frozen=True)
class FormTerm:
    """A term of the score: the products of one closed form of a pair, in all dimensions or in a part of them."""

    name: str
    users: F32[Tensor, "U e"]
    items: F32[Tensor, "I e"]


@dataclass(frozen=True)
class ClosedForm:
    """A pair whose values are solved, and its terms, each with the weight 1."""

    start: Start
    values: PairValues
    parts: Sequence[Sequence[PairPart]]
    """Parts of the vectors by the first and, where there is one, the second closed form; empty for one term."""
    terms: Sequence[FormTerm]

    def scores(self, choices: Choices) -> list[F32[Tensor, "n k"]]:
        """Return the scores of the terms."""
        return [choices.products(term.users, term.items) for term in self.terms]

    def write(self, model: TwoTower, weights: Sequence[float], values: PairValues | None = None) -> None:
        """Overwrite the items of the pair with the weighted terms of its values, or of others of the same start."""
        values = values or self.values
        if not self.parts:
            write_targets(model, self.start, [weights[0] * rows for rows in values.targets])
            return
        left = iter(weights)
        forms = zip((values.targets, values.alternative), self.parts, strict=False)
        weigh_parts(model, self.start, [(targets, [(part, next(left)) for part in parts]) for targets, parts in forms])


class ClosedForms:
    """Gives pairs the values of their starts, each those that are best on validation by the pair alone."""

    def __init__(
        self, model: TwoTower, dataset: Dataset, recipe: Recipe, users: SideTensors, items: SideTensors,
        context: DistributedContext, measure: Callable[[Factors, EvaluationConfig], Mapping[str, float]],
        score_of: Callable[[Mapping[str, float]], float], check_stop: Callable[[], None],
        tried: TriedStarts | None = None,
    ) -> None:  # fmt: skip
        """`users` and `items` are the inputs of all rows. `measure` returns metrics of validation, and `score_of` the
        monitored one, higher is better. `check_stop` raises Interrupted if a rank is to stop. `tried` keeps the scores
        of values."""
        self.model, self.dataset, self.recipe = model, dataset, recipe
        self.users, self.items, self.context = users, items, context
        self.measure, self.score_of, self.check_stop = measure, score_of, check_stop
        self.max_compared = MAX_COMPARED
        self._scores = tried or TriedStarts(None, {})
        self._evaluation = evaluation_of_search(recipe.evaluation, len(dataset.items))
        self._usual = next((scores for term in terms_of(model) if (scores := term.usual(dataset))), None)
        """Scores of a term, to which a closed form is added while its values are compared."""
        self._compares = False
        """True while values are compared."""
        self._positives = dict[int, PositiveMatrix]()
        """Positives of the start of a pair while its values are tried; on rank 0."""

    def fill(self, start: Start) -> ClosedForm:
        """Overwrite the pair of a start with the values that are best, and return its terms. Raises TrainingError if no
        values are finite, and what `check_stop` raises."""
        found = self.best(start)
        try:
            values = self._start(found)
        finally:
            self._positives.clear()
        log.info(f"pair {start.pair} by {start.kind}: {found.describe() or 'no values to choose'}")
        if not start.weighs_parts:
            of_pair = self._factors(found)
            return ClosedForm(found, values, (), [FormTerm(start.kind, of_pair.users, of_pair.items)])
        every, terms = list[list[PairPart]](), list[FormTerm]()
        for targets, also in ((values.targets, ""), (values.alternative, ", equal values")):
            if not targets:
                continue
            with targets_kept(self.model, found):
                write_targets(self.model, found, targets)
                of_pair, parts = self._factors(found), parts_of_pair(self.model, found)
            every.append(parts)
            terms += [
                FormTerm(
                    f"{p.field} ({p.source}{also})", of_pair.users[:, p.dimensions], of_pair.items[:, p.dimensions]
                )
                for p in parts
            ]
        return ClosedForm(found, values, every, terms)

    def solve_again(self, form: ClosedForm, dataset: Dataset, weights: Sequence[float] | None) -> None:
        """Solve a closed form from the train part of another dataset. Its strengths and weights stay; None: it has
        none."""
        found = form.start.positives(dataset, self.model.config) if self.context.is_main else None
        values = start_pair(self.model, form.start, found, self.recipe.train.seed, self.context)
        if weights is not None:
            form.write(self.model, weights, values)

    def best(self, start: Start) -> Start:
        """Return the start with the values that are best. May overwrite its pair."""
        if len(start.alternatives()) == 1 or not start.has_choice(self.dataset, self.model.config):
            return start.alternatives()[0]
        self._compares = True
        found = search(start, self.score)
        self._compares = False
        return found

    def score(self, start: Start) -> float:
        """Return the validation metric of a pair that starts so, alone; higher is better, minus infinity for a start
        that cannot be solved. Raises what `check_stop` raises."""
        self.check_stop()
        if (known := self.context.broadcast(self._scores.score(start) if self.context.is_main else None)) is not None:
            return known
        score, line = self._score(start)
        if self.context.is_main:
            self._scores.add(start, score)
        log.info(line)
        return score

    def _score(self, start: Start) -> tuple[float, str]:
        """Return the score and a line that says it."""
        try:
            self._start(start)
        except TrainingError as e:
            return -math.inf, f"left out of the values that are tried: {str(e).partition(';')[0]}"
        monitor = self.recipe.train.monitor
        metrics = self.measure(self._with_term(self._factors(start)), self._evaluation)
        score = self.score_of(metrics)  # of a metric that was measured
        by = users_told(self._evaluation, monitor, self.dataset.validation)
        line = f"pair {start.pair} by {start.kind}: {start.describe()}: {monitor} = {metrics[monitor]:.4f}{by}"
        return score, line

    def _with_term(self, found: Factors) -> Factors:
        """Return scores with those of a term, where there is one: the values of a closed form are compared by what it
        adds to these."""
        if self._usual is None or not len(self._usual.values):
            return found
        size = float(np.sqrt(np.square(self._usual.values, dtype=np.float64).mean())) or 1.0
        factor = np.float32(USUAL * spread_of_scores(found, self.dataset) / size)
        return replace(found, added=(replace(self._usual, values=self._usual.values * factor),))

    def _start(self, start: Start) -> PairValues:
        if self.context.is_main and start.pair not in self._positives:
            self._positives[start.pair] = start.positives(self.dataset, self.model.config)
        found = self._positives.get(start.pair)
        if found is not None and self._compares and start.compares_by_few:
            every = found
            found = every.once("compared", lambda: self._compared(start, every))
        return start_pair(self.model, start, found, self.recipe.train.seed, self.context)

    def _compared(self, start: Start, every: PositiveMatrix) -> PositiveMatrix:
        """Return the positives that compare the values of a start."""
        few = every.drawn(self.max_compared, self.recipe.train.seed)
        if few is not every:
            log.info(
                f"pair {start.pair} by {start.kind}: {len(few.values):,} of {len(every.values):,} positives, those of "
                "users who are drawn, compare its values"
            )
        return few

    def _factors(self, start: Start) -> Factors:
        """Return the vectors of the pair of a start, without columns of biases."""
        found = gathered_factors(self.model, self.users, self.items, self.context, pairs=[start.pair])
        (place,) = self.model.parts_of_pairs([start.pair])
        return Factors(found.users[:, place], found.items[:, place])


def check_started(model: TwoTower, recipe: Recipe) -> None:
    """Raise TrainingError if a pair lacks the values that it has before the first step: a checkpoint that is resumed
    under other settings may hold it as one that gets them after the last."""
    for start in recipe.first_starts:
        items = model.towers("item")[start.pair].embeddings
        if not any(items.rows_of(field.name).any() for field in items.fields):
            raise TrainingError(
                f"train.start of pair {start.pair} has its values before the first step, and the checkpoint is of a "
                "training that gives them after the last; leave its learn and train.epochs as they were, or train anew"
            )
