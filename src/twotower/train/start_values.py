"""Values of the starts of a model: those that are best on validation, before the first step, or with trained pairs
after the last."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from twotower.arrays.types import F32
from twotower.data.dataset import Dataset
from twotower.distributed import DistributedContext
from twotower.errors import TrainingError
from twotower.evaluation.factors import Factors
from twotower.evaluation.recent_scores import RecentScores
from twotower.model.inputs.side_tensors import SideTensors
from twotower.model.two_tower import TwoTower
from twotower.train.blend import ENOUGH, Blend
from twotower.train.cold_items import ColdItems, cold_items, spread_of_scores
from twotower.train.factors import gathered_factors
from twotower.train.item_biases import add_biases, has_biases, log_popularity
from twotower.train.joint_fit import JointFit, PairForm, WeighedPairs, joint_fit
from twotower.train.part_weights import part_weights, without_user_bias
from twotower.train.recipe import Recipe
from twotower.train.starts.pair import (
    PairPart,
    WeighedParts,
    parts_of_pair,
    scale_pair,
    start_pair,
    targets_kept,
    told_spreads,
    weigh_parts,
    write_targets,
)
from twotower.train.starts.positives import PositiveMatrix
from twotower.train.starts.search import (
    MAX_SCORES,
    SCORES_BESIDE,
    best_weight,
    evaluation_of_search,
    search,
    users_told,
)
from twotower.train.starts.start import PairValues, Start
from twotower.train.tried_starts import TriedStarts
from twotower.train.validation import Validation

log = logging.getLogger(__name__)

MAX_COMPARED = 4_000_000
"""Positives of a start up to which all of them compare its values, if those of some users can."""


class StartValues:
    """Gives pairs the values of their starts, each those that are best on validation by the pair alone, and then its
    weight relative to the pairs before it."""

    def __init__(
        self, model: TwoTower, dataset: Dataset, recipe: Recipe, users: SideTensors, items: SideTensors,
        context: DistributedContext, validation: Validation, check_stop: Callable[[], None],
        trained: Sequence[int] = (), recent: RecentScores | None = None, tried: TriedStarts | None = None,
    ) -> None:  # fmt: skip
        """`users` and `items` are the inputs of all rows. `check_stop` raises Interrupted if a rank is to stop.
        `trained` are pairs that have their values, after the last epoch: with them, cold items are raised by a
        bias, the best one for each weight, if the model has one and validation has positives of them, and `recent` is
        what is popular, to which the weight of a pair is fitted. `tried` keeps the scores of values."""
        self.model, self.dataset, self.recipe = model, dataset, recipe
        self.users, self.items, self.context = users, items, context
        self.validation, self.check_stop = validation, check_stop
        self._scores = tried or TriedStarts(None, {})
        scores = SCORES_BESIDE if trained else MAX_SCORES
        self._evaluation = evaluation_of_search(recipe.evaluation, len(dataset.items), scores)
        raises = bool(trained) and recipe.model.cold_item_bias and not recipe.model.own_counts
        cold = cold_items(model, dataset, recipe.train.seed, recent is not None, stand_in=False) if raises else ""
        self._cold = cold if isinstance(cold, ColdItems) else None
        self._filled = [*trained]
        """Pairs that have their values."""
        self._trained, self._recent = bool(trained), recent
        self._tried: tuple[Start, Factors] | None = None
        """The start that was solved last, by the weight 1 of its biases, and its vectors."""
        self._values: PairValues | None = None
        """Values of the start that was solved last."""
        self._weighed = list[tuple[Start, PairValues]]()
        """Pairs whose columns are weighed."""
        self._chosen = list[tuple[Start, float, Sequence[WeighedParts], F32[Tensor, "items"] | None]]()
        """Starts with the values that are best, the factor of their scores, the weights of their parts, and what they
        add to the biases."""
        self._compares = False
        """True while values are compared."""
        self._positives = dict[int, PositiveMatrix]()
        """Positives of the start of a pair while its values are tried; on rank 0."""

    def fill(self, start: Start) -> None:
        """Overwrite the pair of a start with the values that are best. A pair for which nothing can be solved has the
        weight 0, if it may have it among others, or others are trained already. Raises TrainingError if no values are
        finite, and what `check_stop` raises."""
        found, weight, adds = self.best(start), 0.0, "nothing"
        try:
            self._start(found)
        except TrainingError as e:
            if 0 not in start.blend and not self._trained:
                raise
            (log.info if 0 in start.blend else log.warning)(str(e))
            scale_pair(self.model, start.pair, 0.0)
        else:
            self._chosen.append((found, 1.0, [], None))
            weight = self._blend(found) if found.blend else 1.0
            if self._cold and not start.tells_cold(self.dataset, self.model.config):
                adds = f"less than {ENOUGH:.0%} with cold items"
        finally:
            self._positives.clear()
        self._filled.append(start.pair)
        told = f", blend = {weight:g}" if found.blend else ""
        later = (
            self._recent is not None and start.weighs_parts and len(set(start.blend)) > 1
        )  # together with what is popular
        told += "" if weight else f" (it adds {adds}{'' if later else ', and vectors are shorter without the pair'})"
        values = (found.describe() + told).removeprefix(", ") or "no values to choose"
        log.info(f"start of pair {start.pair} by {start.kind}: {values}")

    def best(self, start: Start) -> Start:
        """Return the start with the values that are best. May overwrite its pair."""
        is_open = len(start.alternatives()) > 1 and start.has_choice(self.dataset, self.model.config)
        self._compares = is_open or len(set(start.bias_weights)) > 1
        found = search(start, self.score, is_fine=not self._trained) if is_open else start.alternatives()[0]
        if len(set(found.bias_weights)) > 1:
            found = found.with_biases(best_weight(found.bias_weights, lambda w: self.score(found.with_biases(w))))
        self._compares, self._tried = False, None
        return found

    def score(self, start: Start) -> float:
        """Return the validation metric of a pair that starts so, alone, by the best weight of its biases; higher is
        better, minus infinity for a start that cannot be solved. Raises what `check_stop` raises."""
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
            found = {w: self._metrics(self._factors_of(start, w)) for w in start.bias_weights or (0.0,)}
        except TrainingError as e:
            return -math.inf, f"left out of the values that are tried: {str(e).partition(';')[0]}"
        best, monitor = max(found, key=lambda w: self.validation.score_of(found[w])), self.recipe.train.monitor
        return self.validation.score_of(found[best]), (
            f"start of pair {start.pair} by {start.kind}: {start.with_biases(best).describe()}: {monitor} = "
            f"{found[best][monitor]:.4f}{self._told}"
        )

    @property
    def _told(self) -> str:
        """Return what a line about a value says of the users who compare it."""
        return users_told(self._evaluation, self.recipe.train.monitor, self.dataset.validation)

    def _blend(self, start: Start) -> float:
        """Give a pair that has started the weight that is best with the pairs before it, and return the weight."""
        pairs, monitor = [*self._filled, start.pair], self.recipe.train.monitor
        is_weighed, beside = self._weigh_parts(start, pairs) if start.weighs_parts else (False, None)
        cold, part = self._cold, self.model.parts_of_pairs(pairs)[-1]
        every = replace(self._factors(pairs), recent=self._recent)
        unit: float = self.context.broadcast(
            1.0 if is_weighed else _unit(without_user_bias(every) if self.model.config.bias else every, part)
        )
        blend = Blend(every, part, unit, self._metrics, self.validation.score_of, beside=beside)
        if cold:
            blend.cold, blend.spread = cold.rows, self._spread
            blend.tells_cold = start.tells_cold(self.dataset, self.model.config)
        if is_weighed:
            blend.tolerance = lambda best: self.validation.tolerance(best, self._evaluation)
        others = "the trained ones" if self._trained else "those before it"

        def score(weight: float) -> float:
            self.check_stop()
            found = blend.metrics(weight)
            told = f", {cold} raised by {blend.raised[weight]:.2f}" if cold else ""
            log.info(
                f"start of pair {start.pair} by {start.kind}, added to {others}: blend = {weight:g}{told}: {monitor} = "
                f"{found[monitor]:.4f}{self._told}"
            )
            return blend.scores[weight]

        weight = blend.best(start.blend, score)
        scale_pair(self.model, start.pair, weight * unit)
        if beside is not None:
            add_biases(self.model, self.dataset, weight * beside)
        added = None if beside is None else weight * beside
        self._chosen[-1] = (start, weight * unit, self._parts if is_weighed else [], added)
        return weight

    def _weigh_parts(self, start: Start, pairs: list[int]) -> tuple[bool, F32[Tensor, "items"] | None]:
        """Give the parts of a pair the weights under which what users of validation take anew is most likely with the
        pairs before it, and return True, and what the popularity of each item adds to them, of a model with biases
        and without recent popularity; False and None, with nothing changed and a line in the log, where nothing tells
        them."""
        assert self._values is not None
        self._weighed.append((start, self._values))
        every, forms = self._beside_forms(pairs, [self._weighed[-1]])
        every = replace(without_user_bias(every) if self.model.config.bias else every, recent=self._recent)
        seed, weights = self.recipe.train.seed, None
        adds_popularity = has_biases(self.model, self.dataset) and not self.model.config.recent_popularity
        popular = log_popularity(self.dataset) if adds_popularity else None
        cold = self._cold.which if self._cold else None
        if self.context.is_main:
            dimensions = [one for form in forms for one in form.dimensions]
            weights = part_weights(every, dimensions, self.dataset, seed, cold, popular)
        weights = self.context.broadcast(weights)
        told = f"start of pair {start.pair} by {start.kind}: "
        if weights is None:
            log.info(
                f"{told}its columns weigh alike, as validation does not tell their weights: too few rows of new "
                "items, too many columns, or no other score"
            )
            return False, None
        (factors, spreads), beside = weights, None
        if popular is not None:
            beside = factors.pop(), spreads.pop()
        if not any(spreads):
            log.info(f"{told}no user of validation tells a weight of its columns")
            return False, None
        of_columns, weighed = list[str](), list[WeighedParts]()
        for form in forms:
            n = len(form.parts)
            of_columns += told_spreads(form.parts, spreads[:n], second=bool(weighed))
            weighed.append(WeighedParts(form.targets, form.parts, factors[:n]))
            factors, spreads = factors[n:], spreads[n:]
        weigh_parts(self.model, start, weighed)
        self._parts = weighed
        log.info(
            f"{told}weighed by validation, the scores of its columns have these standard deviations, in that of the "
            f"other pairs: {', '.join(of_columns)}"
            + (f"; added to them log(1 + count) {beside[1]:.2f}" if beside else "")
        )
        return True, None if popular is None or beside is None else beside[0] * popular

    def weigh_together(self) -> JointFit | None:
        """Return weights of the columns of all pairs whose `blend` has several values, and of what is popular, that are
        fitted together; None where no pair has such weights, nothing is popular, or validation does not tell them.
        Changes no value of the model."""
        weighed = [(start, values) for start, values in self._weighed if len(set(start.blend)) > 1]
        if not weighed or self._recent is None or self.recipe.model.own_counts:
            return None
        every, forms = self._beside_forms(self._filled, weighed)
        half_life, seed, bias = self._recent.terms.half_life, self.recipe.train.seed, self.model.config.bias
        return joint_fit(every, forms, self.dataset, seed, half_life, self._score_raised, self.context, bias)

    def solve_again(self, dataset: Dataset, fitted: WeighedPairs) -> None:
        """Solve the chosen starts from the train part of another dataset. Their values and weights stay; `fitted` has
        columns, by pair, that were weighed anew."""
        has_new_biases = False
        for start, factor, weighed, added in self._chosen:
            if start.pair in fitted:
                factor, weighed = 1.0, fitted[start.pair]
            if not factor:
                continue
            found = start.positives(dataset, self.model.config) if self.context.is_main else None
            values = start_pair(self.model, start, found, self.recipe.train.seed, self.context, self._trained)
            if weighed:
                forms = zip(weighed, (values.targets, values.alternative), strict=False)
                weigh_parts(self.model, start, [form._replace(targets=targets) for form, targets in forms])
            scale_pair(self.model, start.pair, factor)
            has_new_biases |= bool(start.bias_weight) and not (self._trained or start.blend)
            if added is not None and has_new_biases:
                add_biases(self.model, self.dataset, added)

    def _score_raised(self, found: Factors) -> float:
        """Return the metric of scores with the bias of cold items that is best for them. Raises what `check_stop`
        raises."""
        self.check_stop()
        blend = Blend(found, slice(0), 1.0, self._metrics, self.validation.score_of)
        if self._cold:
            blend.cold, blend.spread = self._cold.rows, self._spread
        blend.metrics(1.0)
        return blend.scores[1.0]

    def _beside_forms(
        self, pairs: list[int], weighed: Sequence[tuple[Start, PairValues]]
    ) -> tuple[Factors, list[PairForm]]:
        """Return the vectors of some pairs, in which those of some starts have the weight 1 of all parts, after those
        of their second closed forms, and all forms."""
        every, forms = self._factors(pairs), list[PairForm]()
        places = dict(zip(pairs, self.model.parts_of_pairs(pairs), strict=True))
        seconds = [start.pair for start, values in weighed if values.alternative]
        ends = [*accumulate((places[pair].stop - places[pair].start for pair in seconds), initial=0)]
        users, items = (
            every.users.new_zeros(len(every.users), ends[-1]),
            every.items.new_zeros(len(every.items), ends[-1]),
        )
        users, items = torch.cat([users, every.users], 1), torch.cat([items, every.items], 1)
        for start, values in weighed:
            own, parts = self._of_targets(start, values.targets)
            begin, size = ends[-1] + places[start.pair].start, own.items.shape[1]
            items[:, begin : begin + size] = own.items
            forms.append(PairForm(start, values.targets, parts, [begin + one.dimensions for one in parts]))
            if values.alternative:
                own, parts = self._of_targets(start, values.alternative)
                begin = ends[seconds.index(start.pair)]
                users[:, begin : begin + size], items[:, begin : begin + size] = own.users, own.items
                forms.append(PairForm(start, values.alternative, parts, [begin + one.dimensions for one in parts]))
        return replace(every, users=users, items=items), forms

    def _of_targets(self, start: Start, targets: Sequence[F32[Tensor, "_ F"]]) -> tuple[Factors, list[PairPart]]:
        """Return the vectors of a pair alone whose items have some rows, and its parts."""
        (place,) = self.model.parts_of_pairs([start.pair])
        with targets_kept(self.model, start):
            write_targets(self.model, start, targets)
            own, parts = self._factors([start.pair]), parts_of_pair(self.model, start)
        return replace(own, users=own.users[:, place], items=own.items[:, place]), parts

    def _spread(self, factors: Factors) -> float:
        """Return the standard deviation of a user's scores, on all ranks."""
        return self.context.broadcast(spread_of_scores(factors, self.dataset) if self.context.is_main else 0.0)

    def _metrics(self, factors: Factors) -> Mapping[str, float]:
        return self.validation.metrics(factors, self._evaluation)

    def _start(self, start: Start) -> None:
        if self.context.is_main and start.pair not in self._positives:
            self._positives[start.pair] = start.positives(self.dataset, self.model.config)
        found = self._positives.get(start.pair)
        if found is not None and self._compares and start.compares_by_few:
            every = found
            found = every.once("compared", lambda: self._compared(start, every))
        seed = self.recipe.train.seed
        self._values = start_pair(self.model, start, found, seed, self.context, keeps_biases=self._trained)

    def _compared(self, start: Start, every: PositiveMatrix) -> PositiveMatrix:
        """Return the positives that compare the values of a start."""
        few = every.drawn(MAX_COMPARED, self.recipe.train.seed)
        if few is not every:
            log.info(
                f"start of pair {start.pair} by {start.kind}: {len(few.values):,} of {len(every.values):,} positives, "
                "those of users who are drawn, compare its values"
            )
        return few

    def _factors_of(self, start: Start, biases: float) -> Factors:
        """Return the vectors of a pair that starts so, alone, with a weight of its biases. Those of the start before
        are kept."""
        unit = start.with_biases(1.0) if any(start.bias_weights) else start
        if self._tried is None or self._tried[0] != unit:
            self._tried = None
            self._start(unit)
            self._tried = unit, self._factors([start.pair])
        found = self._tried[1]
        if not self.model.config.bias:
            return found
        own = biases if start.bias_weight else 0.0  # without those of another start
        return replace(found, items=torch.cat([found.items[:, :-1], found.items[:, -1:] * own], 1))

    def _factors(self, pairs: list[int]) -> Factors:
        return gathered_factors(self.model, self.users, self.items, self.context, pairs=pairs)


def check_started(model: TwoTower, recipe: Recipe) -> None:
    """Raise TrainingError if a pair lacks the values that it has before the first step: a checkpoint that is resumed
    under other settings may hold it as one that is weighed after the last. A weight of 0 after pairs that start before
    it is one."""
    for start in recipe.first_starts:
        items = model.towers("item")[start.pair].embeddings
        may_be_zero = start.blend and recipe.train.epochs
        if not (may_be_zero or any(items.rows_of(field.name).any() for field in items.fields)):
            raise TrainingError(
                f"train.start of pair {start.pair} has its values before the first step, and the checkpoint is of a "
                "training that gives them after the last; leave its blend, its learn and train.epochs as they were, "
                "or train anew"
            )


def _unit(factors: Factors, part: slice) -> float:
    """Return the root mean square of the scores without the columns of `part`, over that of theirs alone; 1 if either
    is 0."""
    squares = (factors.users.T @ factors.users).double() * (factors.items.T @ factors.items).double()
    others = torch.ones(len(squares), dtype=torch.bool)
    others[part] = False
    before, own = squares[others][:, others].sum(), squares[part, part].sum()
    return float(before / own) ** 0.5 if before > 0 and own > 0 else 1.0
