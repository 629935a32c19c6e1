"""The training loop: from a dataset and a recipe to the best weights.

Everything random depends on (seed, epoch, step) alone. A run that is killed at any step resumes from its checkpoint to
the same weights, on a CPU bit for bit.
"""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from pydantic import JsonValue
from torch import Tensor

from twotower import files
from twotower.arrays.types import Float, Floats, Shaped
from twotower.data.dataset import Dataset
from twotower.data.splits import TEST, VALIDATION
from twotower.distributed import DistributedContext, choose_device
from twotower.errors import ConfigError, Interrupted, TrainingError
from twotower.evaluation.config import EvaluationConfig
from twotower.evaluation.factors import Factors, Scorer
from twotower.evaluation.moments import ContextFactors, VersionFactors
from twotower.evaluation.part_evaluation import evaluate_part
from twotower.features.side import SIDES
from twotower.features.values import UNKNOWN
from twotower.machine import peak_memory_mb
from twotower.model.two_tower import TwoTower
from twotower.train.build import build_model
from twotower.train.checkpoint import Checkpoint, Checkpoints, Stateful
from twotower.train.closed_forms import ClosedForm, ClosedForms, evaluation_of_search, scale_pair
from twotower.train.defaults import with_defaults, with_precision
from twotower.train.factors import (
    context_factors,
    factors_before,
    has_finite_vectors,
    model_factors,
    newest_factors,
    with_added,
)
from twotower.train.mix import Mix, MixWeights, climbed, cold_items
from twotower.train.narrow import Narrowing
from twotower.train.objective import ContrastiveObjective, PointwiseObjective
from twotower.train.order import Epoch
from twotower.train.progress import Callback, EpochRecord, TrainingProgress
from twotower.train.recipe import Recipe
from twotower.train.stacking import StackWeights, stack
from twotower.train.stopping import StopNow, StopSignals, at_once
from twotower.train.weights import BestWeights, ModelOptimizer, MovingAverage, Weights

log = logging.getLogger(__name__)
SHARES = (1.0, 0.3, 0.1)
"""Shares of the weights of the mix that are measured: the likeliest weights are not always those of the best lists."""


@dataclass
class TrainingResult:
    """A model with its best weights, one record per epoch, and the metrics `train.…` of the whole run.

    They hold those of validation too where the mix has measured them, or where its rows are learned afterwards.
    """

    model: TwoTower
    history: list[EpochRecord]
    metrics: dict[str, float]


class Trainer:
    """Trains one model on one dataset. With several ranks it runs inside `context.process_group()`."""

    def __init__(
        self, dataset: Dataset, recipe: Recipe, folder: Path | None = None, callback: Callback | None = None,
        context: DistributedContext | None = None, device: torch.device | None = None, earlier: JsonValue = None,
    ) -> None:  # fmt: skip
        """Settle the recipe, and build the model, its objective and its optimizer.

        `folder` receives the checkpoints; None writes none. Without `device` the device is `train.device`. `earlier` is
        the precision of a training that is resumed. Raises ConfigError, or DataError if nothing can be learned.
        """
        self.context = context or DistributedContext()
        self.callback = callback or Callback()
        self.device = device or choose_device(recipe.train.device, self.context.local_rank)
        recipe = with_precision(with_defaults(recipe, dataset), dataset, self.device, self.context, earlier)
        self.dataset, self.recipe = dataset, recipe
        self.model, self.torchrec = build_model(recipe, dataset.encoders, self.context, self.device)
        config = recipe.train
        for pair in recipe.solved if config.epochs else ():  # without epochs the optimizer still needs parameters
            for side in SIDES:
                self.model.towers(side)[pair].requires_grad_(False)
        loss, parts = recipe.loss, (dataset, recipe, self.model, self.device, self.context, self.torchrec)
        self.objective: PointwiseObjective | ContrastiveObjective = (
            PointwiseObjective(loss, *parts) if loss.pointwise else ContrastiveObjective(loss, *parts)
        )
        self._measured_pairs = recipe.pairs_of_epochs
        self.solved = list[tuple[ClosedForm, float]]()
        """Closed forms and their weights, to solve them again."""
        self.mixed: MixWeights | None = None
        self.stacked: StackWeights | None = None
        self.last_epoch = config.epochs  # unless patience runs out
        self.narrowing = Narrowing(self.model, dataset, recipe, self.context)
        for pair in recipe.last_starts:
            scale_pair(self.model, pair, 0.0)  # until it has its values
        steps = self.objective.steps_per_epoch
        self.optimizer = ModelOptimizer(self.model, config, steps, self.device, self.context, self.torchrec)
        self.weights = Weights(self.model, self.context, sharded=self.torchrec is not None)
        self.ema = MovingAverage(self.weights, config.ema_decay)
        monitored = self.recipe.evaluation.metric_set.find(config.monitor)
        self.best = BestWeights(config.monitor, config.patience, monitored.higher_is_better)
        self.progress = TrainingProgress()
        stateful: dict[str, Stateful] = {
            "model": self.weights, "ema": self.ema, "best": self.best,
            "objective": self.objective, "optimizer": self.optimizer,
        }  # fmt: skip
        self.checkpoints = Checkpoints(folder, stateful, self.torchrec)
        self._signals = StopSignals(self.callback.ends_process, self.context.world_size)
        self._stop = self._save_due = False  # of all ranks, since their last agreement
        self._last_saved = time.monotonic()

    def run(self) -> TrainingResult:
        """Train to the last epoch or until patience runs out, and load the best weights.

        Raises TrainingError if the loss or a weight is not finite. Raises Interrupted at SIGTERM or SIGINT, after the
        present step or, between steps, at once; the last step has a checkpoint.
        """
        p = self.progress
        with self.stoppable(), torch.random.fork_rng(devices=[]):
            if self.recipe.first_starts and not p.step:
                self.callback.on_phase("closed forms", self.recipe)
                with self._at_once():
                    self._begin()
            if self.checkpoints.has_changed and p.step:
                self._measure_best_again()
            if p.epoch < self.last_epoch and not self.best.out_of_patience:
                self.callback.on_phase("epochs", self.recipe, p.epoch)
            while p.epoch < self.last_epoch and not self.best.out_of_patience:
                self._train_epoch(self.objective.sampler.epoch(p.epoch))
            self.weights.load_state(self.best.weights)
            with self._at_once():
                self._check_stop()
                validated = self._solve_again(self._narrow(self._fit_last()))
        if self.torchrec:
            self.torchrec.gather_tables()
        self.objective.detach_from_group()
        metrics = p.metrics(self.best.epoch) | {"train.peak_memory_mb": peak_memory_mb()} | validated
        return TrainingResult(self.model, p.history, metrics)

    @contextmanager
    def stoppable(self, where: str = "") -> Iterator[None]:
        """Turn SIGTERM or SIGINT in the training, or on rank 0 in the later block `where`, into Interrupted."""
        with self._signals.handled():
            try:
                try:
                    with at_once() if where else nullcontext():
                        yield
                except StopNow:
                    error = self._interrupted(where)
                    # Other ranks wait for the result of this one.
                    raise (error if where else self.context.broadcast(error)) from None
            except Interrupted:
                if self.progress.batch:
                    self._save()
                self.objective.detach_from_group()
                raise

    def _begin(self) -> None:
        """Solve `first_starts`."""
        started, config, closed = time.perf_counter(), self.recipe.train, self._closed_forms
        for pair, start in self.recipe.first_starts.items():
            self.solved.append((closed.fill(pair, start), 1.0))
        self.ema.restart()
        self.progress.seconds += time.perf_counter() - started
        if found := self._measure(0):
            log.info(
                f"started in {time.perf_counter() - started:.1f} s: {config.monitor} = {found[config.monitor]:.4f}"
            )

    def _fit_last(self) -> dict[str, float]:
        """Fit what the last epoch leaves open: closed forms, stacking and the mix. Return the validation metrics, where
        the mix has measured them."""
        recipe, started = self.recipe, time.perf_counter()
        if not (recipe.fitted_last and len(self.dataset.validation)):
            return {}
        forms = self._solve_last()
        self.callback.on_phase("fits to validation", recipe)
        if recipe.model.stacking:  # which has the weights of the pairs
            self.solved += [(form, 1.0) for form in forms]
            self._measured_pairs, forms = None, []
            self.stacked = stack(self.model, self._validation_scores, self.dataset, self.context)
        known = self._mix(forms) if recipe.is_mixed else None
        self.progress.seconds += time.perf_counter() - started
        return self._validation_metrics(self._scorer(known)) if recipe.is_mixed else {}

    def _solve_last(self) -> list[ClosedForm]:
        """Solve `last_starts`; one that has no values adds nothing, with a line in the log."""
        closed, forms = self._closed_forms, list[ClosedForm]()
        if self.recipe.last_starts:
            self.callback.on_phase("closed forms after the epochs", self.recipe)
        for pair, start in self.recipe.last_starts.items():
            self._check_stop()
            try:
                forms.append(closed.fill(pair, start))
            except TrainingError as e:
                log.warning(f"{e} (it adds nothing)")
                scale_pair(self.model, pair, 0.0)
        return forms

    def _mix(self, forms: list[ClosedForm]) -> Float[Tensor, "U D"] | None:
        """Add closed forms and other terms to the present scores by the weights of the mix, or by the share of these
        weights, down to nothing, whose monitored metric of validation is the best. Return the vectors of users; None
        with a context."""
        self._check_stop()
        recipe, mix = self.recipe, Mix(self.model, self.dataset, self.recipe, self.context)
        state, self._measured_pairs = self.weights.copy(), None
        whole = self._scorer()
        known = whole.users if isinstance(whole, Factors) else None  # the weights are those of items
        vectors = [self._vectors_of(form.pair, whole) for form in forms]
        for form in forms:
            scale_pair(self.model, form.pair, 0.0)
        first = self._scorer(known)
        some = evaluation_of_search(recipe.evaluation, len(self.dataset.items))
        before, found = self._score(first, some), mix.fit(first, forms, vectors)
        scores, weights = {0.0: before}, found or mix.nothing(forms)

        def write(share: float) -> None:
            self.weights.load_state(state)
            mix.write(weights.times(share), forms)

        for share in SHARES if weights != weights.times(0.0) else ():  # a bias of cold items alone has no share
            self._check_stop()
            write(share)
            scores[share] = self._score(self._scorer(known), some)
        best = max(scores, key=lambda share: (scores[share], share))
        write(best)
        if len(scores) > 1:
            assert found
            log.info(
                f"mix, in standard deviations of the first scores: {mix.describe(found)}; the share {best:g} of these "
                f"weights is best: {recipe.train.monitor} = {abs(scores[best]):.4f}, without them {abs(before):.4f}"
            )
        self.solved += zip(forms, weights.times(best).forms, strict=True)
        self.mixed = weights.times(best)
        if weights.cold is not None:
            biases = (weights.cold, best * weights.cold, 0.0)
            cold = self._raise_cold_items(self._scorer(known), biases, weights.unit, some)
            self.mixed = replace(self.mixed, cold=cold)
        return known

    def _vectors_of(self, pair: int, whole: Factors | ContextFactors) -> Factors:
        """Return the vectors of a pair, of those of all pairs or, with a context, by its towers."""
        if not isinstance(whole, Factors):
            return self._closed_forms.vectors(pair)
        part = self.model.parts_of_pairs()[pair]
        return Factors(whole.users[:, part], whole.items[:, part])

    def _raise_cold_items(
        self, found: Factors | ContextFactors, given: Sequence[float], unit: float, some: EvaluationConfig
    ) -> float:
        """Give cold items the bias whose monitored metric of validation is the best: of those given, and then near it.
        Return it. `found` are the scores without it, `some` says which users are ranked."""
        items, cold = self.dataset.items.by_version(), cold_items(self.dataset)
        raised = torch.from_numpy(cold if items.owners is None else cold[items.owners]).to(found.items)

        @cache
        def score(bias: float) -> float:
            vectors = found.items.clone()
            vectors[:, -1] += bias * raised
            return self._score(replace(found, items=vectors), some)

        bias = climbed(score, max(given, key=score), unit)
        with torch.no_grad():
            self.model.cold_items.values[UNKNOWN] = bias
        log.info(
            f"bias of cold items: {bias:.2f}, the standard deviation of the first scores is {unit:.2f}; "
            f"{self.recipe.train.monitor} = {abs(score(bias)):.4f}, without the bias {abs(score(0.0)):.4f}"
        )
        return bias

    def _solve_again(self, validated: dict[str, float]) -> dict[str, float]:
        """Solve the pairs that no step reads on all of train, if validation is a part of it.

        Return the validation metrics from before, which are `validated` where they are known; none if they are not
        known and nothing is solved.
        """
        again = [(form, weight) for form, weight in self.solved if weight]
        if not (again and self.dataset.split.from_train):
            return validated
        layer, self.model.narrow = self.model.narrow, None
        validated, whole = validated or self._validation_metrics(self._scorer()), self.dataset.with_all_of_train()
        log.info(
            f"closed forms are solved again on all {len(whole.train):,} training rows, with the chosen values and "
            "weights"
        )
        for form, weight in again:
            self._closed_forms.solve_again(form, whole, weight)
        if layer is not None:
            self.narrowing.add_again(factors_before(self.model, self.dataset, TEST), whole, layer.width)
        return validated

    def _narrow(self, validated: dict[str, float]) -> dict[str, float]:
        """Add the narrow layer. Return the validation metrics by narrow vectors, and of each width as `narrow.…`."""
        if not self.recipe.narrow.width or self.objective.users.has_context:
            return validated
        self._check_stop()
        self.callback.on_phase("narrow vectors", self.recipe)
        started, some = time.perf_counter(), evaluation_of_search(self.recipe.evaluation, len(self.dataset.items))

        def measure(found: Factors) -> float:
            self._check_stop()
            return self._score(found, some)

        every = self._scorer()
        assert isinstance(every, Factors)
        found, curve = self.narrowing.add(every, measure if len(self.dataset.validation) else None)
        self.progress.seconds += time.perf_counter() - started
        if not len(self.dataset.validation):
            return validated
        # Also of wide vectors, before closed forms are solved again.
        return curve | (validated if found is None and validated else self._validation_metrics(found or every))

    @property
    def _closed_forms(self) -> ClosedForms:
        parts = (self.dataset, self.recipe, self.objective.users, self.objective.items, self.context)
        measures = (self._validation_metrics, self.best.score_of)
        return ClosedForms(self.model, *parts, *measures, self._check_stop)

    def _at_once(self) -> AbstractContextManager[None]:
        """Return a block that a signal ends at once, unless there are other ranks, which would wait for this one."""
        return at_once() if self.context.world_size == 1 else nullcontext()

    def _check_stop(self) -> None:
        """Raise Interrupted if a rank must stop before the first step or after the last."""
        if any(self.context.all_reduce_sum(float(self._signals.received))):
            raise self._interrupted()

    def _interrupted(self, when: str = "") -> Interrupted:
        """Return the error of a training that stops between two steps."""
        p = self.progress
        is_over = self.best.out_of_patience or p.epoch == self.last_epoch
        after = f"after {'the last step' if is_over else f'step {p.step}'}" if p.step else "before the first step"
        has_saved = p.step and self.checkpoints.folder
        error = Interrupted(f"stopped {when or after}; {'a' if has_saved else 'no'} checkpoint is written")
        error.exit_code = 128 + (self._signals.received or signal.SIGTERM)
        return error

    def _train_epoch(self, epoch: Epoch) -> None:
        p = self.progress
        started = time.perf_counter()
        if not p.batch:
            with self._at_once():
                self.objective.begin_epoch(self.factors, p.epoch)
        p.seconds += time.perf_counter() - started
        while p.batch < self.objective.steps_per_epoch:
            started = time.perf_counter()
            self.step(epoch, p.batch)
            p.seconds += time.perf_counter() - started
            if self._stop or (self._signals.received and self.context.world_size == 1):
                raise self._interrupted()
            if self._checkpoint_due():
                self._save()
        started = time.perf_counter()
        metrics = self._validate()
        p.history.append(
            {
                "epoch": p.epoch + 1,
                "step": p.step,
                "train.loss": p.loss_sum / self.objective.steps_per_epoch,
                **({"train.mimic": p.mimic_sum / self.objective.steps_per_epoch} if self.recipe.loss.mimic else {}),
                "train.seconds": round(p.seconds, 3),
                "lr": self.optimizer.learning_rate(max(p.step - 1, 0)),
                **metrics,
                "validation.seconds": round(time.perf_counter() - started, 3),
            }
        )
        p.epoch, p.batch, p.loss_sum, p.mimic_sum = p.epoch + 1, 0, 0.0, 0.0
        self._save()
        self.callback.on_epoch_end(p.history)

    def step(self, epoch: Epoch, batch: int) -> None:
        """Update the weights with batch `batch` (0, 1, …) of an epoch. Raises TrainingError if the loss is not
        finite."""
        p = self.progress
        self._seed(p.step)
        self.optimizer.zero_grad()
        rows, loss, mimic_loss = self.objective(epoch, batch, p.step)
        # Ranks average gradients, and each rank's loss is its part of the batch's mean: multiply to get the sum.
        ((loss + mimic_loss) * self.context.world_size).backward()  # type: ignore[no-untyped-call]
        value, mimic_value = self._agree(loss.item(), mimic_loss.item())
        if not math.isfinite(value + mimic_value):
            source = self.objective.examples(epoch, batch)[0].source
            read = ", ".join(str(s) for s in source[source >= 0][:5])
            raise TrainingError(
                f"the loss is {value + mimic_value} at step {p.step + 1} (interactions {read}, …); {self._advice()}"
            )
        self.optimizer.step(p.step)
        p.step, p.batch, p.rows, p.loss_sum = p.step + 1, p.batch + 1, p.rows + rows, p.loss_sum + value
        p.mimic_sum += mimic_value
        self.ema.update(p.step)
        self.callback.on_step_end(p.batch, self.objective.steps_per_epoch, value)
        files.point(f"step:{p.step}:{self.context.rank}")

    def _agree(self, loss: float, mimic_loss: float) -> tuple[float, float]:
        """Return the losses summed over the ranks, and agree on stopping and saving after this step.

        All ranks stop if one must stop, and all save by rank 0's clock.
        """
        if self.context.world_size == 1:
            return loss, mimic_loss
        late = self.context.is_main and time.monotonic() - self._last_saved > self.recipe.train.checkpoint_seconds
        loss, mimic_loss, stop, save = self.context.all_reduce_sum(
            loss, mimic_loss, float(self._signals.received), float(late)
        )
        self._stop, self._save_due = stop > 0, save > 0
        return loss, mimic_loss

    def _seed(self, step: int) -> None:
        """Seed torch for a step: dropout and unknown values depend on (seed, step, rank) alone."""
        self.context.seed_torch((self.recipe.train.seed << 32) + step, self.device)

    def _validate(self) -> dict[str, float]:
        """Return the validation metrics every `validate_every` epochs and after the last, else none."""
        p, config = self.progress, self.recipe.train
        due = not (p.epoch + 1) % config.validate_every or p.epoch + 1 == self.last_epoch
        return self._measure(p.epoch + 1) if due or not len(self.dataset.validation) else {}

    def _measure(self, epoch: int) -> dict[str, float]:
        """Return the validation metrics of the current weights, and keep these weights if they are the best.

        Without a validation part there are no metrics, and the last epoch is the best. Raises TrainingError if a weight
        or a vector is not finite, ConfigError if the monitor cannot be measured.
        """
        self._check_finite()
        with self._loaded(self.ema.weights):
            if not len(self.dataset.validation):
                users, items = self.objective.users, self.objective.items
                self._check_vectors(has_finite_vectors(self.model, users, items, self.context, self.torchrec))
                self.best.keep(epoch, self.weights)
                return {}
            with self._at_once():
                scorer = self._scorer()
                self._check_vectors(scorer.are_finite())
                found = self._validation_metrics(scorer)
            self.best.observe(found, epoch, self.weights)
        return found

    def _measure_best_again(self) -> None:
        """Measure the best weights again, to compare them with epochs after a change of data or settings."""
        if self.best.weights and len(self.dataset.validation):
            with self._loaded(self.best.weights):
                self.best.score = self._score(self._scorer())

    @contextmanager
    def _loaded(self, weights: dict[str, Shaped[torch.Tensor, "*_"]]) -> Iterator[None]:
        """Load weights, if there are any, for the block. The current weights return in any case: a stop saves them."""
        present = self.weights.copy()
        try:
            if weights:
                self.weights.load_state(weights)
            yield
        finally:
            self.weights.load_state(present)

    def _check_vectors(self, are_finite: bool) -> None:
        if not are_finite:
            raise TrainingError(f"a vector is not finite after step {self.progress.step}; {self._advice()}")

    def _validation_metrics(self, scorer: Scorer, config: EvaluationConfig | None = None) -> dict[str, float]:
        """Return the validation metrics of a scorer on all ranks; `config` None is the recipe's."""
        metrics = {}
        if self.context.is_main:
            with at_once():
                scorer = VersionFactors.of_part(scorer, self.dataset, VALIDATION)
                metrics = evaluate_part(scorer, self.dataset, VALIDATION, config or self.recipe.evaluation)
            if config:
                self.callback.on_value()
        return self.context.broadcast({f"validation.{m}": v for m, v in metrics.items() if not math.isnan(v)})

    def _score(self, scorer: Scorer, config: EvaluationConfig | None = None) -> float:
        return self.best.score_of(self._validation_metrics(scorer, config))

    def _validation_scores(self) -> Shaped[Floats, "n"]:
        """Return the scores of the validation pairs by the current weights on rank 0, nothing on the others."""
        scorer = VersionFactors.of_part(self._scorer(), self.dataset, VALIDATION)
        if not self.context.is_main:
            return np.empty(0, np.float32)
        return scorer.part_scores(self.dataset, VALIDATION)

    def factors(self) -> Factors:
        """Return the vectors of all users and items by the current weights; of versions, at the latest training time.

        Raises ConfigError if the model reads the context, as a user then has several vectors.
        """
        every = self._scorer()
        if not isinstance(every, Factors):
            raise ConfigError(
                "one vector for each user is needed, as by negatives.hard, and the model reads the context; drop that "
                "option"
            )
        return newest_factors(every, self.dataset)

    def _scorer(self, known: Float[Tensor, "U D"] | None = None) -> Factors | ContextFactors:
        """Return the vectors of all rows `by_version`; with a context, user vectors on demand. `known` are vectors of
        users that have been computed."""
        users, items = self.objective.users, self.objective.items
        added = partial(with_added, model=self.model, dataset=self.dataset, part=VALIDATION)
        if users.has_context:
            return added(context_factors(self.model, users, items, self.dataset))
        pairs = self._measured_pairs
        return added(model_factors(self.model, users, items, self.context, self.torchrec, pairs, known))

    def resume(self, override: bool = False, checkpoint: Checkpoint | None = None) -> bool:
        """Continue from a checkpoint, by default the newest intact one of the folder. Return False if there is none.

        Raises RunError with the differences if the fingerprint has changed, unless `override`.
        """
        found = self.checkpoints.resume(override, checkpoint)
        self.progress = found or self.progress
        return found is not None

    def _save(self) -> None:
        """Write a checkpoint, if there is a folder. Raises TrainingError if a weight is not finite, RunError if it
        fails."""
        self._last_saved = time.monotonic()
        if self.checkpoints.folder is not None and (self.context.is_main or self.torchrec):
            self._check_finite()
            self.checkpoints.save(self.progress)

    def _checkpoint_due(self) -> bool:
        config = self.recipe.train
        if config.checkpoint_steps:
            return self.progress.step % config.checkpoint_steps == 0
        if self.context.world_size > 1:
            return self._save_due
        return time.monotonic() - self._last_saved > config.checkpoint_seconds

    def _check_finite(self) -> None:
        if not self.weights.are_finite():
            raise TrainingError(f"a weight is not finite after step {self.progress.step}; {self._advice()}")

    def _advice(self) -> str:
        last = f"last intact checkpoint: {self.checkpoints.last}" if self.checkpoints.last else "no checkpoint yet"
        return f"{last}; try a lower train.lr, or train.clip_norm = 1"
