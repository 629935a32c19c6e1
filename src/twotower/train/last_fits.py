"""Fits to the validation part, after the last epoch, of what is added to the trained scores."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

from twotower.arrays.types import Floats, Shaped
from twotower.data.dataset import Dataset
from twotower.distributed import DistributedContext
from twotower.evaluation.config import EvaluationConfig
from twotower.evaluation.context_factors import ContextFactors
from twotower.evaluation.factors import Factors, Scorer
from twotower.evaluation.recent_scores import RecentScores
from twotower.model.inputs.side_tensors import SideTensors
from twotower.model.two_tower import TwoTower
from twotower.train.blend import Blend
from twotower.train.cold_items import ColdItems, cold_items, fit_cold_item_bias, spread_of_scores
from twotower.train.joint_fit import JointFit, WeighedPairs, joint_fit
from twotower.train.own_counts import OWN_SCORES, OwnCountsFit
from twotower.train.recent_popularity import fit_recent_popularity, popularity_beside
from twotower.train.recipe import Recipe
from twotower.train.stacking import stack
from twotower.train.starts.search import CLOSE, SCORES_BESIDE, evaluation_of_search, users_told
from twotower.train.validation import Validation

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LastFits:
    """Fits of one model; all ranks call them."""

    model: TwoTower
    dataset: Dataset
    recipe: Recipe
    context: DistributedContext
    scorer: Callable[[SideTensors | None], Factors | ContextFactors]
    """Present scores of validation, of some items or all."""
    validation: Validation

    def popularity(self, check_stop: Callable[[], None]) -> RecentScores | None:
        """Return what is popular at the times of validation, as is best added to the present scores, and change no
        model; None of a model without recent popularity, and if it adds nothing. Raises what `check_stop` raises, which
        all ranks call."""
        if not self.recipe.model.recent_popularity:
            return None
        measured = self._score(SCORES_BESIDE)

        def score(found: Scorer) -> float:
            check_stop()
            return measured(found)

        return popularity_beside(self.dataset, self._beside_own(), score, self.context, self._chance(SCORES_BESIDE))

    def fit(self, scores_of_pairs: Callable[[], Shaped[Floats, "n"]], joint: JointFit | None = None) -> WeighedPairs:
        """Overwrite stacking, recent popularity, own counts and the bias of cold items, each of a model that has it,
        one after the other. `scores_of_pairs` returns the present scores of the pairs of validation, on rank 0. Where
        the fit of columns and popularity together, or without columns that of popularity, is not clearly worse than
        they are, it replaces them. Return its columns by pair."""
        model, dataset, recipe, context = self.model, self.dataset, self.recipe, self.context
        written: WeighedPairs = {}
        some = evaluation_of_search(recipe.evaluation, len(dataset.items), OWN_SCORES)
        told, score = users_told(some, recipe.train.monitor, dataset.validation), self._score(OWN_SCORES)
        if recipe.model.stacking:
            stack(model, scores_of_pairs, dataset, context)
        if recipe.model.recent_popularity:
            found = self._beside_own()
            fit_recent_popularity(model, dataset, found, score, context, self._chance(OWN_SCORES), told)
            if not model.config.own_counts and isinstance(found, Factors) and model.recent_popularity.is_fitted:
                written = self._fit_jointly(found, joint, some)
        if recipe.model.own_counts:
            metric = self.validation.ordering(some, recipe.train.monitor)
            both: Callable[[Scorer], tuple[float, float]] = lambda found: self.validation.scores(found, some, metric)  # noqa: E731
            OwnCountsFit(model, dataset).fit(self.scorer(None), both, context, metric, told)
        if recipe.model.cold_item_bias:
            whole: Callable[[Scorer], float] = lambda found: self.validation.score(found, recipe.evaluation)  # noqa: E731
            fit_cold_item_bias(model, dataset, self.scorer, whole, context, recipe.train.seed)
        return written

    def _fit_jointly(self, found: Factors, joint: JointFit | None, some: EvaluationConfig) -> WeighedPairs:
        """Give columns and recent popularity the weights of a fit of both together, or without one that of popularity
        alone, added to the scores `found` without it, unless the metric by `some` options is lower by more than CLOSE;
        each with the best bias of cold items, which is fitted later."""
        model, dataset, seed = self.model, self.dataset, self.recipe.train.seed
        cold = cold_items(model, dataset, seed, ends=True, stand_in=False) if model.config.cold_item_bias else ""

        def score(scorer: Factors) -> float:
            blend = Blend(
                scorer, slice(0), 1.0, lambda one: self.validation.metrics(one, some), self.validation.score_of
            )
            if isinstance(cold, ColdItems):
                blend.cold, blend.spread = cold.rows, lambda one: self.context.broadcast(self._spread(one))
            blend.metrics(1.0)
            return blend.scores[1.0]

        apart, half_life = self.scorer(None), model.recent_popularity.terms.half_life
        assert isinstance(apart, Factors)
        before = score(apart)
        after = score(joint.scorer) if joint else -math.inf
        least = before - CLOSE * abs(before)
        if after < least:
            if joint:
                self._tell_joint(joint, after, before, is_taken=False)
            joint = joint_fit(found, (), dataset, seed, half_life, score, self.context, model.config.bias)
            after = score(joint.scorer) if joint else -math.inf
        written = joint.write(model, dataset) if joint and after >= least else {}
        if joint:
            self._tell_joint(joint, after, before, is_taken=after >= least)
        return written

    def _tell_joint(self, joint: JointFit, after: float, before: float, is_taken: bool) -> None:
        log.info(
            f"{'columns and ' if joint.forms else ''}the terms of recent popularity, weighed together: the monitored "
            f"metric of validation is {abs(after):.4f}, and {abs(before):.4f} by the weights before, which "
            f"{'they replace' if is_taken else 'stay'}"
        )

    def _spread(self, factors: Factors) -> float:
        return spread_of_scores(factors, self.dataset) if self.context.is_main else 0.0

    def _beside_own(self) -> Factors | ContextFactors:
        """Return the present scores, with own counts of the usual weight of a model that has them."""
        found = self.scorer(None)
        return OwnCountsFit(self.model, self.dataset).beside(found) if self.recipe.model.own_counts else found

    def _score(self, scores: int) -> Callable[[Scorer], float]:
        """Return the function to the monitored metric, measured by so many scores at most."""
        some = evaluation_of_search(self.recipe.evaluation, len(self.dataset.items), scores)
        return lambda found: self.validation.score(found, some)

    def _chance(self, scores: int) -> Callable[[Scorer, Scorer], float]:
        """Return the function to how much better one scorer may be than another by chance: two standard errors of the
        difference."""
        some = evaluation_of_search(self.recipe.evaluation, len(self.dataset.items), scores)
        return lambda better, other: 2 * self.validation.tolerance(better, some)(other)
