"""A run, and what several diagnoses need of it, computed once."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from twotower.config import Config
from twotower.data.batches import Inputs, SideTensors
from twotower.data.dataset import Dataset, Pairs, Side
from twotower.data.splits import TEST
from twotower.encoders import Ints
from twotower.evaluation import Factors
from twotower.runs import Run
from twotower.schema import SIDES, SideName
from twotower.train.candidates import Candidates, CandidateSampler
from twotower.train.losses import contrastive_loss
from twotower.train.negatives import PairSampler, PositiveSampler
from twotower.train.order import Epoch

MAX_SAMPLE_ROWS = 2_000
"""Rows of a side, and test users, that are looked at."""
MAX_BATCH_POSITIVES = 256  # positives of a batch whose candidates are looked at one by one
MAX_BATCH_CELLS = 2**22  # (positive, candidate) cells that are looked at


@dataclass(frozen=True)
class DiagnosisContext:
    """All that a diagnosis is made from."""

    run: Run

    @property
    def data(self) -> Dataset:
        return self.run.dataset

    @property
    def config(self) -> Config:
        return self.run.config

    @cached_property
    def factors(self) -> Factors:
        """Vectors of all rows, as known when the test part is asked."""
        known = self.run.factors(TEST)
        return Factors(known.users.cpu(), known.items.cpu())

    @cached_property
    def finite(self) -> bool:
        return bool(torch.isfinite(self.factors.users).all()) and bool(torch.isfinite(self.factors.items).all())

    @cached_property
    def met(self) -> dict[SideName, Ints]:
        """At most SAMPLE rows of each side that have training interactions, rising."""
        train = self.data.train
        return {"user": sample(np.unique(train.user)), "item": sample(np.unique(train.item))}

    @cached_property
    def known(self) -> dict[SideName, Side]:
        """Each side as known when the test part is asked."""
        return {side: self.data.side_before(side, TEST) for side in SIDES}

    def inputs(self, side: SideName, *rows: Ints) -> list[Inputs]:
        """What the towers read of some rows, once for each of `rows`."""
        device = next(self.run.model.parameters()).device
        tensors = SideTensors(self.known[side], self.data.encoders.fields(side), device)
        return [tensors.take(r) for r in rows]

    @cached_property
    def epoch(self) -> Epoch:
        """The pairs of the first epoch of the loss 'bce'."""
        train = self.config.train
        return PairSampler(self.data, self.config.negatives, train.seed, train.shuffle).epoch(0)

    @cached_property
    def batch(self) -> tuple[Pairs, Candidates]:
        """A few positives of a batch and the candidates the whole batch is set against."""
        config = self.config
        by_user = config.train.history_scope == "causal"
        size = config.train.batch_size
        epoch = PositiveSampler(self.data, config.train.seed, config.train.shuffle, by_user).epoch(0)
        some = epoch.take(0, slice(0, size + config.negatives.cross_batch_memory))
        user, item = some.user[:size], some.item[:size]
        sampler = CandidateSampler(self.data, config.negatives, config.train.seed)
        if config.negatives.hard and self.finite:
            sampler.refresh_hard_negatives(self.factors.users, self.factors.items, 1)
        memory = torch.from_numpy(some.item[size:].astype(np.int64))
        drawn = sampler(user, item, 0, memory, torch.device("cpu"))
        columns = max(1, len(drawn.log_q) + drawn.per_positive.shape[1])
        rows = sample(np.arange(len(user)), max(1, min(MAX_BATCH_POSITIVES, MAX_BATCH_CELLS // columns)))
        few = torch.from_numpy(rows)
        drawn = replace(
            drawn, positive=drawn.positive[few], per_positive=drawn.per_positive[few],
            group=None if drawn.group is None else drawn.group[few],
        )  # fmt: skip
        return Pairs(user[rows], item[rows], np.ones(len(rows), bool)), drawn

    @property
    def temperature(self) -> float:
        return float(self.run.model.temperature.detach())

    def loss_at_cosine(self, cosine: float) -> float:
        """The loss of the batch if each positive had the logit `cosine` / T and every other candidate the opposite."""
        pairs, drawn = self.batch
        distinct, which = np.unique(pairs.item, return_inverse=True)
        # A positive's column is told from all others by its own direction; the last direction is common to all.
        items = torch.zeros(len(drawn.items) + len(drawn.memory_items), len(distinct) + 1)
        items[:, -1] = 1
        rows = np.concatenate([drawn.items, drawn.memory_items.numpy()])
        at = np.minimum(np.searchsorted(distinct, rows), len(distinct) - 1)
        same = distinct[at] == rows
        items[torch.from_numpy(np.flatnonzero(same)), torch.from_numpy(at[same])] = 1
        users = torch.zeros(len(pairs), len(distinct) + 1)
        users[torch.arange(len(pairs)), torch.from_numpy(which)] = 2
        users[:, -1] = -1
        users *= cosine / self.temperature if cosine else 0.0
        return float(contrastive_loss(users, items, drawn, self.config.loss, len(self.data.items)))

    @cached_property
    def ignorance(self) -> float:
        """The loss of a model that gives every pair the same answer."""
        if self.config.loss.kind != "bce":
            return self.loss_at_cosine(0.0)
        p = float(np.average(self.epoch.label, weights=self.epoch.weight))
        return -p * math.log(p) - (1 - p) * math.log(1 - p) if 0 < p < 1 else 0.0

    @cached_property
    def losses(self) -> list[float]:
        """Mean training loss of every epoch whose opponents are those of the last: a memory fills up and mining starts
        in the first."""
        found = [float(h["train.loss"]) for h in self.run.history if "train.loss" in h]
        changes = self.config.loss.kind != "bce" and bool(
            self.config.negatives.cross_batch_memory or self.config.negatives.hard
        )
        return found[1:] if changes else found

    @cached_property
    def monitored(self) -> list[tuple[int, float]]:
        """(epoch, value) of the metric that chooses the best epoch."""
        monitor = self.config.train.monitor
        return [(int(h["epoch"]), float(h[monitor])) for h in self.run.history if monitor in h and "epoch" in h]


def sample(rows: Ints, n: int = 0) -> Ints:
    """At most `n` of the rows (0: SAMPLE), in their order; the same every time."""
    n = n or MAX_SAMPLE_ROWS
    if len(rows) <= n:
        return rows
    return np.sort(np.random.default_rng(0).choice(rows, n, replace=False))
