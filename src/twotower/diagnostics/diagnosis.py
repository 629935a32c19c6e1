"""A diagnosis: its input, which several diagnoses share, and its findings."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import attrgetter
from typing import Literal

import numpy as np
import torch

from twotower.arrays.pieces import pieces
from twotower.arrays.ragged import rows_of
from twotower.arrays.sets import find_in_sorted
from twotower.arrays.types import Codes, Ints
from twotower.config.experiment import Config
from twotower.config.toml import parse_config
from twotower.data.dataset import Dataset
from twotower.data.evidence import OrderEvidence
from twotower.data.side import Side
from twotower.data.split import PART_NAMES
from twotower.data.splits import TEST
from twotower.evaluation.factors import Factors
from twotower.features.side import SIDES, SideName
from twotower.model.inputs.code_layout import Inputs
from twotower.model.inputs.side_tensors import SideTensors
from twotower.progress import Summary
from twotower.runs import Run
from twotower.suggestion.recipes import read_recipe, recipe_names
from twotower.train.contrastive import contrastive_loss
from twotower.train.defaults import STEPS_OF_EPOCH, batch_of, training_rows
from twotower.train.losses.loss import PointwiseLoss
from twotower.train.negatives.candidates import Candidates
from twotower.train.negatives.mixture import CandidateSampler
from twotower.train.preconditions import training_order
from twotower.train.samplers import PairSampler, PositiveSampler

log = logging.getLogger(__name__)

MAX_SAMPLE_ROWS = 2_000
"""Rows of each side that a diagnosis samples."""
MAX_SAMPLE_PAIRS = 2**18
"""Interactions of the users for whom pairs, batches and negatives are sampled again."""
MAX_BATCH_POSITIVES = 256
"""Positives of a batch whose candidates are examined."""
MAX_BATCH_CELLS = 2**22
"""Cells (positive, candidate) of a batch that are examined."""
_OF_RECIPE = (
    "loss", "train.lr", "train.optimizer", "train.schedule", "train.embedding_weight_decay",
    "model.similarity", "model.temperature",
)  # fmt: skip
"""Options that `suggest` copies from a recipe."""
Severity = Literal["error", "warning", "ok"]


@dataclass(frozen=True)
class Finding:
    """Finding of a diagnosis: `text` names the problem and the remedy, `evidence` has the numbers."""

    severity: Severity
    name: str
    text: str
    evidence: dict[str, float] = field(default_factory=dict)


def or_ok(found: Iterable[Finding], name: str, text: str) -> Iterator[Finding]:
    """Return the findings, or one of severity "ok" if there are none."""
    return iter([*found] or [Finding("ok", name, text)])


def describe_findings(findings: list[Finding]) -> Iterator[str]:
    """Yield printable lines: each finding with its evidence, then the count of each severity."""
    for f in findings:
        yield f"{f.severity:<8} {f.name}: {f.text}"
        if f.evidence and f.severity != "ok":
            yield f"{'':<9}({', '.join(f'{k} {v:.4g}' for k, v in f.evidence.items())})"
    n = {s: sum(f.severity == s for f in findings) for s in ("error", "warning", "ok")}
    errors, warnings = (f"{n[s]} {s}{'s' * (n[s] != 1)}" for s in ("error", "warning"))
    yield f"{errors}, {warnings}, {n['ok']} ok"


@dataclass(frozen=True)
class DiagnosisContext:
    """Input of every diagnosis: the run and cached values derived from it."""

    run: Run
    max_rows: int = MAX_SAMPLE_ROWS
    max_pairs: int = MAX_SAMPLE_PAIRS

    @property
    def data(self) -> Dataset:
        """Dataset of the run."""
        return self.run.dataset

    @property
    def config(self) -> Config:
        """Config of the run."""
        return self.run.config

    @cached_property
    def factors(self) -> Factors:
        """Vectors of all rows, from the data and the versions before the test part."""
        factors = self.run.factors_at_once(TEST)
        return replace(factors, users=factors.users.cpu(), items=factors.items.cpu())

    @cached_property
    def finite(self) -> bool:
        """True if all vectors are finite."""
        return bool(torch.isfinite(self.factors.users).all()) and bool(torch.isfinite(self.factors.items).all())

    @cached_property
    def trained_rows(self) -> dict[SideName, Ints]:
        """Rows of each side with training interactions, rising, at most `max_rows`."""
        counted: dict[SideName, Ints] = {"user": self.data.user_counts, "item": self.data.item_counts}
        return {side: sample(np.flatnonzero(n), self.max_rows) for side, n in counted.items()}

    @cached_property
    def sampled(self) -> Dataset:
        """Dataset with the interactions of some random users, at most `max_pairs`, or the whole dataset."""
        data = self.data
        if len(data.pairs) <= self.max_pairs:
            return data
        order = np.random.default_rng(0).permutation(len(data.users))
        n_pairs = np.sum([data.grouped(part).lengths for part in range(len(PART_NAMES))], axis=0)
        ends = np.cumsum(n_pairs[order])
        users = order[: max(1, int(np.searchsorted(ends, self.max_pairs, side="right")))]
        summary = Summary("users", read=len(order))
        summary.drop(f"are beyond the sample of {self.max_pairs:,} interactions", len(order) - len(users))
        log.info(f"repeated training of {summary}")
        return _with_interactions_of(data, users)

    @cached_property
    def sides_at_test(self) -> dict[SideName, Side]:
        """Columns of each side from the data before the test part."""
        return {side: self.data.side_before(side, TEST) for side in SIDES}

    def inputs(self, side: SideName, *rows: Ints) -> list[Inputs]:
        """Return the tower inputs of each array of `rows`."""
        device = next(self.run.model.parameters()).device
        tensors = SideTensors(self.sides_at_test[side], self.data.encoders.fields(side), device)
        return [tensors.take(r) for r in rows]

    @cached_property
    def batch(self) -> tuple[Codes, Candidates]:
        """Items of a batch of positives of the sampled users, at most MAX_BATCH_POSITIVES, and their candidates."""
        config = self.config
        by_user = config.train.history_scope == "causal"
        size = config.train.batch_size
        epoch = PositiveSampler(self.sampled, config.train.seed, config.train.shuffle, by_user).epoch(0)
        some = epoch.take(0, slice(0, size + config.negatives.remembered))
        batch, earlier = some[:size], some[size:]
        sampler = CandidateSampler(self.sampled, config.negatives, config.train.seed)
        if self.finite:
            sampler.begin_epoch(lambda: self.factors, 1)
        if len(earlier):
            items, weights = (torch.from_numpy(a) for a in (earlier.item.astype(np.int64), earlier.weight))
            sampler.remember(items, torch.zeros(len(earlier), 1), weights)
        drawn = sampler(batch, 0)
        columns = max(1, len(drawn.log_q) + drawn.per_positive.shape[1])
        rows = sample(np.arange(len(batch)), max(1, min(MAX_BATCH_POSITIVES, MAX_BATCH_CELLS // columns)))
        return batch.item[rows], drawn.take(torch.from_numpy(rows))

    @cached_property
    def follows_recipe(self) -> bool:
        """True if a recipe has the loss, the optimizer and the score of the run.

        A run without epochs also needs a start whose values validation chooses."""
        settings, config = attrgetter(*_OF_RECIPE), self.config
        trains = config.train.epochs > 0
        if not trains and not any(start.several for start in config.train.solved):
            return False
        recipes = (parse_config(read_recipe(name))[1] for name in recipe_names())
        return any(settings(r) == settings(config) and (r.train.epochs > 0) == trains for r in recipes)

    def remedy(self, change: str) -> str:
        """Return `change`, a sentence about settings; for the settings of a recipe a sentence about other recipes."""
        if not self.follows_recipe:
            return change
        return (
            "These are the settings of a recipe: train another one, or keep this run, as the log may allow no better."
        )

    @property
    def temperature(self) -> float:
        """Temperature of the model."""
        return float(self.run.model.temperature.detach())

    def loss_at_cosine(self, cosine: float) -> float:
        """Return the loss for the logit `cosine` / T of every positive and -`cosine` / T of everything else."""
        loss = self.config.loss
        if loss.pointwise:
            return self._loss_of_pairs(loss, cosine / self.temperature, -cosine / self.temperature)
        positives, drawn = self.batch
        distinct, which = np.unique(positives, return_inverse=True)
        # One direction for each distinct positive; the last direction is common to all items.
        items = torch.zeros(len(drawn.items) + len(drawn.memory_items), len(distinct) + 1)
        items[:, -1] = 1
        rows = np.concatenate([drawn.items, drawn.memory_items.numpy()])
        at, same = find_in_sorted(distinct, rows)
        items[torch.from_numpy(np.flatnonzero(same)), torch.from_numpy(at[same])] = 1
        users = torch.zeros(len(which), len(distinct) + 1)
        users[torch.arange(len(which)), torch.from_numpy(which)] = 2
        users[:, -1] = -1
        users *= cosine / self.temperature if cosine else 0.0
        return float(contrastive_loss(users, items, drawn, loss, len(self.data.items)))

    def _loss_of_pairs(self, loss: PointwiseLoss, positive: float, negative: float) -> float:
        """Return the loss of the first epoch's pairs with one logit for all positives and one for all negatives."""
        share = self._positive_share
        pairs = torch.tensor([[positive, negative], [1.0, 0.0], [share, 1 - share]], dtype=torch.float64)
        return float(loss(*pairs))

    @cached_property
    def _positive_share(self) -> float:
        train = self.config.train
        pairs = PairSampler(self.sampled, self.config.negatives, train.seed, train.shuffle).epoch(0).all
        return float(np.average(pairs.label, weights=pairs.weight))

    @cached_property
    def constant_loss(self) -> float:
        """Loss of a model with the same logit for every pair."""
        loss = self.config.loss
        if loss.pointwise:
            return min(self._loss_of_pairs(loss, logit, logit) for logit in np.linspace(-15, 15, 601).tolist())
        return self.loss_at_cosine(0.0)

    @cached_property
    def losses(self) -> list[float]:
        """Mean training loss of each epoch; without the first if a source of negatives warms up."""
        losses = [float(h["train.loss"]) for h in self.run.history if "train.loss" in h]
        changes = not self.config.loss.pointwise and any(s.warms_up for s in self.config.negatives.sources)
        return losses[1:] if changes else losses

    @property
    def is_untrained(self) -> bool:
        """True if the last training loss is about `constant_loss`."""
        near = 0.95 if self.few_steps else 0.98  # the last, smaller batch has fewer candidates and so a lower loss
        return bool(self.losses) and self.losses[-1] > near * self.constant_loss

    @property
    def few_steps(self) -> int:
        """Number of steps of an epoch if they are few, else 0."""
        rows = training_rows(self.data, self.config)
        steps = -(-rows // (self.config.train.batch_size or batch_of(rows)))
        return steps if steps < STEPS_OF_EPOCH else 0

    @property
    def to_learn(self) -> str:
        """Settings to change for a model that has not learned yet: more steps or larger ones."""
        train, n = self.config.train, self.few_steps
        few = f"set train.batch_size = 0 ({train.batch_size} makes {n} steps an epoch) or " if n else ""
        return f"{few}raise train.lr (now {train.lr:g})"

    @cached_property
    def monitored(self) -> list[tuple[int, float]]:
        """(epoch, value) of the metric `train.monitor`."""
        monitor = self.config.train.monitor
        return [(int(h["epoch"]), float(h[monitor])) for h in self.run.history if monitor in h and "epoch" in h]

    @property
    def best_epoch(self) -> tuple[int, float]:
        """(epoch, value) of the first best value in `monitored`."""
        higher = self.config.evaluation.metric_set.find(self.config.train.monitor).higher_is_better
        return max(self.monitored, key=lambda at: at[1] if higher else -at[1])

    @cached_property
    def order(self) -> OrderEvidence | None:
        """Evidence of an order in the training interactions of the sampled users; None without times."""
        return training_order(self.sampled)


def _with_interactions_of(data: Dataset, users: Ints) -> Dataset:
    """Return the dataset in memory with the interactions of `users` only, and all users and items."""
    chosen = np.zeros(len(data.users), bool)
    chosen[users] = True
    rows = [part.start + np.flatnonzero(chosen[data.pairs.user[part]]) for part in pieces(len(data.pairs))]
    keep = np.concatenate(rows)
    pairs, parts = data.pairs.take(keep), data.parts[keep]
    found = Dataset(data.schema, data.encoders, data.users, data.items, pairs, parts, data.times[keep], data.split)
    vars(found)["context"] = {name: rows_of(column, keep) for name, column in data.context.items()}
    return found


def sample(rows: Ints, n: int) -> Ints:
    """Return at most `n` of the rows, in their order: all, or a fixed random sample."""
    if len(rows) <= n:
        return rows
    return np.sort(np.random.default_rng(0).choice(rows, n, replace=False))
