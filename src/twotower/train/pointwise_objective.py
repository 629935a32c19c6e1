"""The loss of a batch of labelled pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from twotower.arrays.types import Float
from twotower.evaluation.factors import Factors
from twotower.train.losses.loss import PointwiseLoss
from twotower.train.objective import BatchLoss, Objective
from twotower.train.order import Epoch, Examples
from twotower.train.pair_sampler import PairSampler

LABELLED = "labelled"
"""Name of the negatives that interactions are, in the tally."""


class PointwiseObjective(Objective[PointwiseLoss]):
    """Batches of labelled pairs, which are training interactions and random negatives, and their pointwise loss."""

    def make_sampler(self) -> PairSampler:
        """Return the source of the pairs."""
        config = self.recipe.train
        return PairSampler(self.dataset, self.recipe.negatives, config.seed, config.shuffle, config.data_shards)

    def begin_epoch(self, factors: Callable[[], Factors], epoch: int) -> None:
        """Do nothing: pairs do not depend on the model."""

    def __call__(self, epoch: Epoch, batch: int, step: int) -> BatchLoss:
        """Return the loss of a batch."""
        whole, _, own_part = self.examples(epoch, batch)
        # A rank without a row runs the towers for one row of weight 0: all ranks take part in every collective.
        own = whole[own_part] if own_part.start < own_part.stop else replace(whole[:1], weight=np.zeros(1, np.float32))
        user = self.dataset.input_rows("user", own.user, own.source)
        item = self.dataset.input_rows("item", own.item, own.source)
        pairs = self.batcher(user, item, own.label, own.weight, whole.source, own.source)
        users, items = self.vectors(pairs.users, pairs.items)
        with self.precision():
            logits = (users.index_select(0, pairs.user) * items.index_select(0, pairs.item)).sum(1)
        total = 0.0 if self.context.world_size == 1 else float(whole.weight.sum(dtype=np.float64))
        if whole.weight.any():
            loss = self.loss(logits, pairs.label, pairs.weight, total)
        else:  # of interactions of weight 0 alone
            loss = logits.sum() * 0
        if batch == self.tallied_batch:
            (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
            self._tally(own, logits.detach().float(), gradient.float())
        mimic_loss = torch.zeros((), device=self.device)
        if self.loss.mimic:
            positive = (pairs.label > 0) & (pairs.weight > 0)
            mimic_loss = self.mimic_loss(
                pairs.users, pairs.items, users, items, pairs.user[positive], pairs.item[positive],
                float((whole.label * whole.weight).sum(dtype=np.float64)),
                weights=None if self.dataset.pairs.weight is None else pairs.weight[positive],
            )  # fmt: skip
        return BatchLoss(len(whole), loss, mimic_loss)

    def _tally(self, own: Examples, logits: Float[Tensor, "B"], gradient: Float[Tensor, "B"]) -> None:
        """Count the negatives of a batch: the labelled ones, and those that sources drew. One is above as many of the batch's
        positives as score less."""
        drawn = "+".join(source.kind for source in self.recipe.negatives.pairs)
        self.tally.begin([LABELLED, *([drawn] if drawn else [])])
        counted = own.weight > 0
        positive, scores = counted & (own.label > 0), logits.cpu().numpy()
        lower = np.sort(scores[positive])
        for kind, of_kind in ((LABELLED, own.source >= 0), (drawn, own.source < 0)):
            rows = np.flatnonzero(counted & (own.label == 0) & of_kind)
            if len(rows) and len(lower):
                above = np.searchsorted(lower, scores[rows]) / len(lower)
                sizes = gradient.abs()[torch.from_numpy(rows).to(gradient.device)]
                self.tally.add_sums(kind, float(sizes.double().sum()), len(rows), float(above.sum()))
        self.tally.end(len(lower), self.context)
