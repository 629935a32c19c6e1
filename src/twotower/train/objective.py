"""The batches of an epoch, and the loss of each.

Several ranks train one batch together: each rank runs the user tower for its own positives and the item tower for its part of
the batch's candidates, and the item vectors of all ranks are gathered, gradients included. So a batch, and its loss, do not
depend on the number of ranks.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from twotower.arrays.types import Ints
from twotower.data.dataset import Dataset
from twotower.distributed import DistributedContext
from twotower.errors import ConfigError, DataError
from twotower.evaluation.factors import Factors
from twotower.features.schema import Sequence
from twotower.model.inputs.carriers import Inputs
from twotower.model.inputs.side_tensors import SideTensors
from twotower.model.two_tower import TwoTower
from twotower.train.batches import Batcher
from twotower.train.candidates import CandidateSampler, CrossBatchMemory
from twotower.train.losses import binary_cross_entropy, contrastive_loss, mimic
from twotower.train.negatives import PairSampler, PositiveSampler
from twotower.train.order import Epoch, Examples
from twotower.train.recipe import Recipe
from twotower.train.sharded import TorchRecEmbeddings

log = logging.getLogger(__name__)


class Objective:
    """The batches of an epoch in their order, and the loss of each: pointwise or contrastive.

    Every draw depends on (seed, epoch, step).
    """

    def __init__(
        self,
        dataset: Dataset,
        recipe: Recipe,
        model: TwoTower,
        device: torch.device,
        context: DistributedContext,
        torchrec: TorchRecEmbeddings | None,
    ) -> None:
        """Check the settings and build the samplers. Raises ConfigError, or DataError if the training part holds nothing to
        learn with these settings."""
        self.dataset, self.recipe, self.model = dataset, recipe, model
        self.device, self.context, self.torchrec = device, context, torchrec
        self.causal = recipe.train.history_scope == "causal"
        timeline = dataset.timeline if self.causal else None
        self.users = SideTensors(
            dataset.users, dataset.encoders.fields("user"), device, timeline, dataset.grouped_by_user
        )
        self.items = SideTensors(dataset.items, dataset.encoders.fields("item"), device)
        self.batcher = Batcher(self.users, self.items)
        sequences = [f for f in dataset.schema.features if isinstance(f, Sequence)]
        self._histories_hold_dislikes = any(f.interactions != "positive" for f in sequences)
        _check_learnable(dataset, recipe)
        _check_histories(dataset, recipe)
        _check_shards(recipe, context)
        seed, shuffle, shards = recipe.train.seed, recipe.train.shuffle, recipe.train.data_shards
        self.sampler: PairSampler | PositiveSampler
        self.candidates: CandidateSampler | None = None
        self.memory = CrossBatchMemory(recipe.negatives.cross_batch_memory)
        if recipe.loss.kind == "bce":
            self.sampler = PairSampler(dataset, recipe.negatives, seed, shuffle, shards)
        else:
            self.sampler = PositiveSampler(dataset, seed, shuffle, self.causal, shards)
            self.candidates = CandidateSampler(dataset, recipe.negatives, seed)
        self.steps_per_epoch = math.ceil(len(self.sampler) / recipe.train.batch_size)
        self._towers: Callable[[Inputs, Inputs], tuple[Tensor, Tensor]] = _Towers(model)
        if context.world_size > 1:
            self._towers = _distributed_data_parallel(_Towers(model), torchrec.shards_by_parameter if torchrec else ())

    def __call__(self, epoch: Epoch, batch: int, step: int) -> tuple[int, Tensor, Tensor]:
        """Return the number of rows of a batch of an epoch, and this rank's part of its loss and of its mimic loss, scalars.

        The number of rows is that of all ranks.
        """
        return self._contrastive(epoch, batch, step) if self.candidates else self._pointwise(epoch, batch)

    def detach_from_group(self) -> None:
        """Drop the wrapper that averages gradients, which holds the process group."""
        self._towers = _Towers(self.model)

    def refresh_hard_negatives(self, factors: Callable[[], Factors], epoch: int) -> None:
        """Rank hard negatives with the present model, at the start of every `hard_every`-th epoch but the first."""
        negatives = self.recipe.negatives
        if self.candidates and negatives.hard and epoch and (epoch - 1) % negatives.hard_every == 0:
            current = factors()
            self.candidates.refresh_hard_negatives(current.users, current.items, epoch)

    def examples(self, epoch: Epoch, batch: int) -> tuple[Examples, Ints, slice]:
        """Return the examples of a batch, the end of each shard's part of it, and the slice that is this rank's."""
        parts, context = epoch.batch_slices(batch, self.recipe.train.batch_size), self.context
        ends = np.cumsum([p.stop - p.start for p in parts])
        if context.world_size == 1 or len(parts) == 1:
            whole = Examples.concatenate([epoch.take(s, part) for s, part in enumerate(parts)])
            return whole, ends, context.partition(len(whole))
        counts = [int(n) for n in np.diff(ends, prepend=0).reshape(context.world_size, -1).sum(1)]  # of each rank
        own = context.partition(len(parts))
        read = Examples.concatenate([epoch.take(s, parts[s]) for s in range(own.start, own.stop)])
        whole = Examples.unpack(context.all_gather_array(read.pack(), counts))
        first = sum(counts[: context.rank])
        return whole, ends, slice(first, first + len(read))

    def _vectors(self, users: Inputs, items: Inputs) -> tuple[Tensor, Tensor]:
        """Return the vectors (U, D) and (I, D) of some users and items."""
        if self.torchrec:
            self.torchrec.fetch(users, items)
        with self._precision():
            return self._towers(users, items)

    def _pointwise(self, epoch: Epoch, batch: int) -> tuple[int, Tensor, Tensor]:
        """Return the rows, loss and mimic loss of a batch of labelled pairs."""
        whole, _, own_part = self.examples(epoch, batch)
        # A rank without a row runs the towers for one row of weight 0: all ranks take part in every collective.
        own = whole[own_part] if own_part.start < own_part.stop else replace(whole[:1], weight=np.zeros(1, np.float32))
        pairs = self.batcher(own.user, own.item, own.label, own.weight, whole.source)
        users, items = self._vectors(pairs.users, pairs.items)
        with self._precision():
            logits = (users.index_select(0, pairs.user) * items.index_select(0, pairs.item)).sum(1)
        total = 0.0 if self.context.world_size == 1 else float(whole.weight.sum(dtype=np.float64))
        loss = binary_cross_entropy(logits, pairs.label, pairs.weight, total)
        mimic_loss = torch.zeros((), device=self.device)
        if self.recipe.loss.mimic:
            positive = (pairs.label > 0) & (pairs.weight > 0)
            mimic_loss = self._mimic(
                pairs.users, pairs.items, users, items, pairs.user[positive], pairs.item[positive],
                int(whole.label.sum()),
            )  # fmt: skip
        return len(whole), loss, mimic_loss

    def _contrastive(self, epoch: Epoch, batch: int, step: int) -> tuple[int, Tensor, Tensor]:
        """Return the rows, loss and mimic loss of a batch of positives against its candidates."""
        assert self.candidates is not None
        config, memory, context = self.recipe, self.memory, self.context
        whole, ends, own_part = self.examples(epoch, batch)
        own = whole[own_part]
        # A disliked negative must not be in the positive's history; a causal history holds the earlier interactions.
        source = whole.source if self.causal and self._histories_hold_dislikes else None
        drawn = self.candidates(whole.user, whole.item, step, memory.items, self.device, source, ends, own_part)
        part = context.partition(drawn.shared)
        sizes = context.partition_sizes(drawn.shared)
        rows = np.concatenate([drawn.items[part], drawn.items[drawn.shared :]])
        left_out = self._left_out(whole.source, drawn.disliked)
        # All ranks take part in every collective: a rank without a row embeds one, and drops it.
        embedded, embedded_items = own if len(own) else whole[:1], rows if len(rows) else drawn.items[:1]
        positives = self.batcher.contrastive_batch(
            embedded.user, embedded.source, embedded_items, self.causal, left_out
        )
        users, items = self._vectors(positives.users, positives.items)
        n = part.stop - part.start

        def gather(local: Tensor) -> Tensor:
            """Return the rows (I, …) of all `drawn.items`, from those of this rank's `rows`."""
            if context.world_size == 1:
                return local
            return torch.cat([context.all_gather(local[:n], sizes), local[n : len(rows)]])

        items = gather(items)
        mimic_loss = torch.zeros((), device=self.device)
        if config.loss.mimic:
            user = torch.arange(len(embedded), device=users.device) if positives.user is None else positives.user
            mimic_loss = self._mimic(
                positives.users, positives.items, users, items, user[: len(own)], drawn.positive, len(whole), gather
            )
        if positives.user is not None:
            users = users.index_select(0, positives.user)
        columns = items if memory.vectors is None else torch.cat([items, memory.vectors])
        loss = contrastive_loss(
            users[: len(own)], columns, drawn, config.loss, len(self.dataset.items), config.negatives.hard_margin,
            torch.bfloat16 if config.train.precision == "bf16" else torch.float32, len(whole),
        )  # fmt: skip
        if memory.size:
            latest = torch.from_numpy(whole.item.astype(np.int64)).to(self.device)
            memory.enqueue(latest, items.index_select(0, drawn.batch_positive))
        return len(whole), loss, mimic_loss

    def _left_out(self, source: Ints, disliked: Ints) -> Ints:
        """Return the interactions that no history of the batch may hold: the batch's, and those of disliked negatives."""
        # A rank without a row of the batch has drawn nothing, and leaves out what the others drew.
        drawn_apart = self.recipe.train.data_shards > 1 or len(source) < self.context.world_size
        if self.context.world_size > 1 and drawn_apart and self.recipe.negatives.disliked:
            counts = self.context.all_gather_array(np.array([len(disliked)]), [1] * self.context.world_size)
            disliked = self.context.all_gather_array(disliked, [int(n) for n in counts])
        return np.concatenate([source, disliked]) if len(disliked) else source

    def _mimic(
        self, user_inputs: Inputs, item_inputs: Inputs, users: Tensor, items: Tensor, user: Tensor, item: Tensor,
        n: int, gather: Callable[[Tensor], Tensor] = lambda local: local,
    ) -> Tensor:  # fmt: skip
        """Return the weighted mimic losses of P positives (user[p], item[p]), indices into `users` and `items`.

        The P positives are a part of `n`. `gather` turns rows of `item_inputs` into rows of `items`.
        """
        model = self.model
        terms = [mimic(a[user], v[item], n) for a, v in model.augmented("user", user_inputs, items)]
        terms += [mimic(gather(a)[item], v[user], n) for a, v in model.augmented("item", item_inputs, users)]
        return self.recipe.loss.mimic * torch.stack(terms).sum()

    def _precision(self) -> AbstractContextManager[Any]:
        bf16 = self.recipe.train.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16) if bf16 else nullcontext()


class _Towers(nn.Module):
    """Both towers in one call, which DistributedDataParallel needs."""

    def __init__(self, model: TwoTower) -> None:
        super().__init__()
        self.model = model

    def forward(self, users: Inputs, items: Inputs) -> tuple[Tensor, Tensor]:
        return self.model.user_vectors(users), self.model.item_vectors(items)


def _distributed_data_parallel(towers: _Towers, local_parameters: Iterable[str]) -> nn.parallel.DistributedDataParallel:
    """Return the towers with gradients averaged over the ranks, except for `local_parameters` of the model, of which each
    rank holds its own piece."""
    kind: Any = nn.parallel.DistributedDataParallel
    constants = [name for name, _ in towers.named_buffers()]  # equal on all ranks
    ignored = [*constants, *(f"model.{name}" for name in local_parameters)]
    kind._set_params_and_buffers_to_ignore_for_model(towers, ignored)
    wrapped: nn.parallel.DistributedDataParallel = kind(towers)
    return wrapped


def _check_learnable(dataset: Dataset, recipe: Recipe) -> None:
    """Raise DataError or ConfigError, before anything is written, if the training part has one class only and nothing adds
    the other, or if the monitor cannot be measured."""
    only_positives = bool(dataset.train.positive.all())
    if recipe.loss.kind == "bce" and only_positives and not recipe.negatives.random:
        raise DataError(
            "every training interaction is a positive, and negatives.random is 0; set negatives.random = 5, "
            "or loss.kind = 'softmax', or name a label and schema.positive_above"
        )
    if recipe.negatives.disliked and only_positives:
        raise ConfigError(
            "negatives.disliked draws interactions that the user did not like, and every training interaction is a "
            "positive; drop it, or name a label and schema.positive_above"
        )
    positive, monitor = dataset.validation.positive, recipe.train.monitor
    k = recipe.evaluation.k[0]
    if monitor in ("validation.auc", "validation.gauc") and (positive.all() or not positive.any()):
        raise ConfigError(
            f"train.monitor '{monitor}' cannot be measured: the validation part has one class only; "
            f"use train.monitor = 'validation.recall@{k}'"
        )


def _check_histories(dataset: Dataset, recipe: Recipe) -> None:
    """Raise ConfigError if a sequence does not go with `train.history_scope`."""
    causal = recipe.train.history_scope == "causal"
    for f in dataset.schema.features:
        if not isinstance(f, Sequence):
            continue
        if not causal and f.pooling == "decay":
            raise ConfigError(
                f"feature '{f.name}': pooling = 'decay' needs the order of time; set train.history_scope = 'causal'"
            )
        if causal and (f.side == "item" or (f.max_length and not f.attends)):
            what = "on the item side" if f.side == "item" else "with max_length"
            raise ConfigError(
                f"feature '{f.name}': a sequence {what} does not go with train.history_scope = 'causal'; drop it or "
                "set train.history_scope = 'leave_batch_out'"
            )
    n = recipe.negatives
    if causal and not (n.full or n.random or n.uniform or n.popularity or n.cross_batch_memory):
        log.warning(
            "with train.history_scope = 'causal' a batch holds few users, so the batch alone gives few "
            "candidates; add negatives.uniform, or negatives.full = true"
        )
    if causal and dataset.times is None:
        raise ConfigError("train.history_scope = 'causal' needs a time; name its column in schema.time")


def _check_shards(recipe: Recipe, context: DistributedContext) -> None:
    """Raise ConfigError if the shards do not divide among the ranks, or a batch has no row for each."""
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
