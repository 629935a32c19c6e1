"""What a batch is, and what the model loses by it.

Several ranks train one batch together: each runs the user tower for its own positives and the item tower for its part of
the batch's candidates, and the item vectors of all are gathered, gradients included. So the batch is what it is for one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from twotower.config import Config
from twotower.data.batches import Batcher, Inputs, SideTensors
from twotower.data.dataset import Dataset
from twotower.distributed import DistributedContext
from twotower.encoders import Ints
from twotower.errors import ConfigError, DataError
from twotower.evaluation import Factors
from twotower.model.two_tower import TwoTower
from twotower.schema import Sequence
from twotower.train.candidates import CandidateSampler, CrossBatchMemory
from twotower.train.losses import binary_cross_entropy, contrastive_loss, mimic
from twotower.train.negatives import PairSampler, PositiveSampler
from twotower.train.order import Epoch, Examples
from twotower.train.sharded import TorchRecEmbeddings

log = logging.getLogger(__name__)


class Objective:
    """The batches of an epoch in their order, and the loss of each: labelled pairs, or positives against candidates.

    Everything drawn depends on (seed, epoch, step).
    """

    def __init__(
        self,
        dataset: Dataset,
        config: Config,
        model: TwoTower,
        device: torch.device,
        context: DistributedContext,
        sharded: TorchRecEmbeddings | None,
    ) -> None:
        """Raises ConfigError, DataError if there is nothing to learn, or not as the settings want it."""
        self.dataset, self.config, self.model = dataset, config, model
        self.device, self.context, self.sharded = device, context, sharded
        self.earlier = config.train.history_scope == "causal"
        timeline = dataset.timeline if self.earlier else None
        self.users = SideTensors(dataset.users, dataset.encoders.fields("user"), device, timeline, dataset.by_user)
        self.items = SideTensors(dataset.items, dataset.encoders.fields("item"), device)
        self.batcher = Batcher(self.users, self.items)
        sequences = [f for f in dataset.schema.features if isinstance(f, Sequence)]
        self._tells_dislikes = any(f.interactions != "positive" for f in sequences)
        _check_learnable(dataset, config)
        _check_histories(dataset, config)
        _check_shards(config, context)
        seed, shuffle, shards = config.train.seed, config.train.shuffle, config.train.data_shards
        self.sampler: PairSampler | PositiveSampler
        self.candidates: CandidateSampler | None = None
        self.memory = CrossBatchMemory(config.negatives.cross_batch_memory)
        if config.loss.kind == "bce":
            self.sampler = PairSampler(dataset, config.negatives, seed, shuffle, shards)
        else:
            self.sampler = PositiveSampler(dataset, seed, shuffle, self.earlier, shards)
            self.candidates = CandidateSampler(dataset, config.negatives, seed)
        self.steps_per_epoch = math.ceil(len(self.sampler) / config.train.batch_size)
        self._towers: Callable[[Inputs, Inputs], tuple[Tensor, Tensor]] = _Towers(model)
        if context.world_size > 1:
            self._towers = _distributed_data_parallel(_Towers(model), sharded.names if sharded else ())

    def __call__(self, epoch: Epoch, number: int, step: int) -> tuple[int, Tensor, Tensor]:
        """Rows of batch `number` of an epoch, of all ranks, and this rank's part of its loss and of its mimic loss, ()."""
        return self._contest(epoch, number, step) if self.candidates else self._pairs(epoch, number)

    def detach_from_group(self) -> None:
        """No other rank is waited for from now on, and nothing holds their group."""
        self._towers = _Towers(self.model)

    def refresh_hard_negatives(self, factors: Callable[[], Factors], epoch: int) -> None:
        """Hard candidates from the present model, at the start of every `hard_every`-th epoch but the first."""
        negatives = self.config.negatives
        if self.candidates and negatives.hard and epoch and (epoch - 1) % negatives.hard_every == 0:
            found = factors()
            self.candidates.refresh_hard_negatives(found.users, found.items, epoch)

    def examples(self, epoch: Epoch, number: int) -> tuple[Examples, Ints, slice]:
        """The examples of a batch, where those of each shard end, and which are this rank's."""
        parts, context = epoch.cut(number, self.config.train.batch_size), self.context
        ends = np.cumsum([p.stop - p.start for p in parts])
        if context.world_size == 1 or len(parts) == 1:
            whole = Examples.join([epoch.of(s, part) for s, part in enumerate(parts)])
            return whole, ends, context.partition(len(whole))
        counts = [
            int(n) for n in np.diff(ends, prepend=0).reshape(context.world_size, -1).sum(1)
        ]  # of as many shards each
        own = context.partition(len(parts))
        read = Examples.join([epoch.of(s, parts[s]) for s in range(own.start, own.stop)])
        whole = Examples.unpack(context.all_gather_array(read.pack(), counts))
        first = sum(counts[: context.rank])
        return whole, ends, slice(first, first + len(read))

    def _both(self, users: Inputs, items: Inputs) -> tuple[Tensor, Tensor]:
        """The vectors of these users and items."""
        if self.sharded:
            self.sharded.fetch(users, items)
        with self._precision():
            return self._towers(users, items)

    def _pairs(self, epoch: Epoch, number: int) -> tuple[int, Tensor, Tensor]:
        """Number, loss and mimic loss of a batch of labelled pairs."""
        whole, _, mine = self.examples(epoch, number)
        # Who has none runs the towers for one, of weight nothing: all ranks take part in every step.
        own = whole[mine] if mine.start < mine.stop else replace(whole[:1], weight=np.zeros(1, np.float32))
        batch = self.batcher(own.user, own.item, own.label, own.weight, whole.source)
        users, items = self._both(batch.users, batch.items)
        with self._precision():
            logits = (users.index_select(0, batch.user) * items.index_select(0, batch.item)).sum(1)
        total = 0.0 if self.context.world_size == 1 else float(whole.weight.sum(dtype=np.float64))
        loss = binary_cross_entropy(logits, batch.label, batch.weight, total)
        mimicry = torch.zeros((), device=self.device)
        if self.config.loss.mimic:
            liked = (batch.label > 0) & (batch.weight > 0)
            mimicry = self._mimic(
                batch.users, batch.items, users, items, batch.user[liked], batch.item[liked], int(whole.label.sum())
            )
        return len(whole), loss, mimicry

    def _contest(self, epoch: Epoch, number: int, step: int) -> tuple[int, Tensor, Tensor]:
        """Number, loss and mimic loss of a batch of positives against its candidates."""
        assert self.candidates is not None
        config, memory, context = self.config, self.memory, self.context
        whole, ends, mine = self.examples(epoch, number)
        own = whole[mine]
        # An observed candidate must not be readable from a history either; what was met before is in an earlier one.
        moments = whole.source if self.earlier and self._tells_dislikes else None
        drawn = self.candidates(whole.user, whole.item, step, memory.items, self.device, moments, ends, mine)
        share = context.partition(drawn.shared)
        sizes = context.partition_sizes(drawn.shared)
        rows = np.concatenate([drawn.items[share], drawn.items[drawn.shared :]])
        known = self._left_out(whole.source, drawn.observed)
        # All ranks take part in every step: who has nothing to embed embeds something, and drops it.
        asked, items_asked = own if len(own) else whole[:1], rows if len(rows) else drawn.items[:1]
        batch = self.batcher.contrastive_batch(asked.user, asked.source, items_asked, self.earlier, known)
        users, items = self._both(batch.users, batch.items)
        n = share.stop - share.start

        def everything(mine: Tensor) -> Tensor:
            """What is known of the rank's items -> of `drawn.items`."""
            return (
                mine
                if context.world_size == 1
                else torch.cat([context.all_gather(mine[:n], sizes), mine[n : len(rows)]])
            )

        items = everything(items)
        mimicry = torch.zeros((), device=self.device)
        if config.loss.mimic:
            of = torch.arange(len(asked), device=users.device) if batch.user is None else batch.user
            mimicry = self._mimic(
                batch.users, batch.items, users, items, of[: len(own)], drawn.positive, len(whole), everything
            )
        if batch.user is not None:
            users = users.index_select(0, batch.user)
        columns = items if memory.vectors is None else torch.cat([items, memory.vectors])
        loss = contrastive_loss(
            users[: len(own)], columns, drawn, config.loss, len(self.dataset.items), config.negatives.hard_margin,
            torch.bfloat16 if config.train.precision == "bf16" else torch.float32, len(whole),
        )  # fmt: skip
        if memory.size:
            latest = torch.from_numpy(whole.item.astype(np.int64)).to(self.device)
            memory.keep(latest, items.index_select(0, drawn.batch))
        return len(whole), loss, mimicry

    def _left_out(self, source: Ints, observed: Ints) -> Ints:
        """The interactions of the batch, which no sequence may hold."""
        # A rank that has none of a batch has drawn nothing, and leaves out what the others drew.
        apart = self.config.train.data_shards > 1 or len(source) < self.context.world_size
        if self.context.world_size > 1 and apart and self.config.negatives.disliked:
            counts = [
                int(n) for n in self.context.all_gather_array(np.array([len(observed)]), [1] * self.context.world_size)
            ]
            observed = self.context.all_gather_array(observed, counts)
        return np.concatenate([source, observed]) if len(observed) else source

    def _mimic(
        self, user_rows: Inputs, item_rows: Inputs, users: Tensor, items: Tensor, user: Tensor, item: Tensor,
        n: int, everything: Callable[[Tensor], Tensor] = lambda mine: mine,
    ) -> Tensor:  # fmt: skip
        """Weighted `mimic` losses of the positives (user[p], item[p]), indices into `users` and `items`; they are a part
        of `n`. `everything` turns what belongs to `item_rows` into what belongs to `items`."""
        model = self.model
        found = [mimic(a[user], v[item], n) for a, v in model.augmented("user", user_rows, items)]
        found += [mimic(everything(a)[item], v[user], n) for a, v in model.augmented("item", item_rows, users)]
        return self.config.loss.mimic * torch.stack(found).sum()

    def _precision(self) -> Any:
        bf16 = self.config.train.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16) if bf16 else nullcontext()


class _Towers(nn.Module):
    """Both towers in one call, as DistributedDataParallel wants it."""

    def __init__(self, model: TwoTower) -> None:
        super().__init__()
        self.model = model

    def forward(self, users: Inputs, items: Inputs) -> tuple[Tensor, Tensor]:
        return self.model.user_vectors(users), self.model.item_vectors(items)


def _distributed_data_parallel(towers: _Towers, pieces: Iterable[str]) -> nn.parallel.DistributedDataParallel:
    """The towers with gradients that are averaged over the ranks, but for the `pieces`, parameters of the model of which
    each rank has its own."""
    kind: Any = nn.parallel.DistributedDataParallel
    constants = [name for name, _ in towers.named_buffers()]  # the same on all ranks for ever
    kind._set_params_and_buffers_to_ignore_for_model(towers, [*constants, *(f"model.{name}" for name in pieces)])
    wrapped: nn.parallel.DistributedDataParallel = kind(towers)
    return wrapped


def _check_learnable(dataset: Dataset, config: Config) -> None:
    """Raises, before anything is written, if there is nothing to learn or nothing to choose epochs by."""
    pairs = config.loss.kind == "bce"
    if pairs and dataset.train.positive.all() and not config.negatives.random:
        raise DataError(
            "every training interaction is a positive, and negatives.random is 0; set negatives.random = 5, "
            "or loss.kind = 'softmax', or name a label and schema.positive_above"
        )
    if config.negatives.disliked and dataset.train.positive.all():
        raise ConfigError(
            "negatives.disliked draws items that were met and not liked, and every training interaction is a "
            "positive; drop it, or name a label and schema.positive_above"
        )
    positive, monitor = dataset.validation.positive, config.train.monitor
    k = config.evaluation.k[0]
    if monitor in ("validation.auc", "validation.gauc") and (positive.all() or not positive.any()):
        raise ConfigError(
            f"train.monitor '{monitor}' cannot be measured: the validation part has one class only; "
            f"use train.monitor = 'validation.recall@{k}'"
        )


def _check_histories(dataset: Dataset, config: Config) -> None:
    """Raises ConfigError if the sequences cannot be had as `train.history_scope` wants them."""
    earlier = config.train.history_scope == "causal"
    for f in dataset.schema.features:
        if not isinstance(f, Sequence):
            continue
        if not earlier and f.pooling == "decay":
            raise ConfigError(
                f"feature '{f.name}': pooling = 'decay' goes with the order of time; set train.history_scope = 'causal'"
            )
        if earlier and (f.side == "item" or (f.max_length and not f.attends)):
            what = "on the item side" if f.side == "item" else "with max_length"
            raise ConfigError(
                f"feature '{f.name}': a sequence {what} cannot be had as it was at every earlier moment; drop it or "
                "set train.history_scope = 'leave_batch_out'"
            )
    n = config.negatives
    if earlier and not (n.full or n.random or n.uniform or n.popularity or n.cross_batch_memory):
        log.warning(
            "with train.history_scope = 'causal' a batch holds few users, so the batch alone gives few "
            "candidates; add negatives.uniform, or negatives.full = true"
        )
    if earlier and dataset.times is None:
        raise ConfigError("train.history_scope = 'causal' needs a time; name its column in schema.time")


def _check_shards(config: Config, context: DistributedContext) -> None:
    """Raises ConfigError if the shards cannot be dealt to the ranks, or to a batch."""
    shards = config.train.data_shards
    if shards > 1 and shards % context.world_size:
        raise ConfigError(
            f"train.data_shards = {shards} cannot be dealt to {context.world_size} ranks; set a multiple, or 1: then every "
            "rank reads all shards"
        )
    if shards > config.train.batch_size:
        raise ConfigError(
            f"train.data_shards = {shards} and train.batch_size = {config.train.batch_size}: some batches would be empty; "
            "set no more shards than a batch has rows"
        )
