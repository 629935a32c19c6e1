"""The batches of an epoch, and the loss of each.

Several ranks train one batch together: each rank runs the user tower for its own positives and the item tower for its part of
the batch's candidates, and the item vectors of all ranks are gathered, gradients included. So a batch, and its loss, do not
depend on the number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from twotower.arrays.types import Ints
from twotower.data.dataset import Dataset
from twotower.distributed import DistributedContext
from twotower.evaluation.factors import Factors
from twotower.features.schema import Sequence
from twotower.model.inputs.carriers import Inputs
from twotower.model.inputs.side_tensors import SideTensors
from twotower.model.two_tower import TwoTower
from twotower.train.batches import Batcher
from twotower.train.contrastive import contrastive_loss
from twotower.train.data_parallel import BothTowers, distributed_data_parallel
from twotower.train.losses import binary_cross_entropy, mimic
from twotower.train.negatives.cross_batch_memory import CrossBatchMemory
from twotower.train.negatives.mixture import CandidateSampler
from twotower.train.order import Epoch, Examples
from twotower.train.pair_sampler import PairSampler
from twotower.train.positive_sampler import PositiveSampler
from twotower.train.preconditions import check_recipe
from twotower.train.recipe import Recipe
from twotower.train.state import Stateful, join_states, load_states
from twotower.train.torchrec.embeddings import TorchRecEmbeddings


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
        check_recipe(dataset, recipe, context)
        seed, shuffle, shards = recipe.train.seed, recipe.train.shuffle, recipe.train.data_shards
        self.sampler: PairSampler | PositiveSampler
        self.candidates: CandidateSampler | None = None
        self.memory = CrossBatchMemory(recipe.negatives.cross_batch_memory, device)
        self._parts: dict[str, Stateful] = {"memory": self.memory}
        if recipe.loss.kind == "bce":
            self.sampler = PairSampler(dataset, recipe.negatives, seed, shuffle, shards)
        else:
            self.sampler = PositiveSampler(dataset, seed, shuffle, self.causal, shards)
            self.candidates = CandidateSampler(dataset, recipe.negatives, seed)
            if self.candidates.hard:
                self._parts["hard_negatives"] = self.candidates.hard
        self.steps_per_epoch = math.ceil(len(self.sampler) / recipe.train.batch_size)
        self._towers: Callable[[Inputs, Inputs], tuple[Tensor, Tensor]] = BothTowers(model)
        if context.world_size > 1:
            self._towers = distributed_data_parallel(
                BothTowers(model), torchrec.shards_by_parameter if torchrec else ()
            )

    def __call__(self, epoch: Epoch, batch: int, step: int) -> tuple[int, Tensor, Tensor]:
        """Return the number of rows of a batch of an epoch, and this rank's part of its loss and of its mimic loss, scalars.

        The number of rows is that of all ranks.
        """
        return self._contrastive(epoch, batch, step) if self.candidates else self._pointwise(epoch, batch)

    def state(self) -> dict[str, Tensor]:
        """Return the cross-batch memory and the hard negatives."""
        return join_states(self._parts)

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from a state; what the settings no longer use is left out."""
        load_states(self._parts, state)

    def detach_from_group(self) -> None:
        """Drop the wrapper that averages gradients, which holds the process group."""
        self._towers = BothTowers(self.model)

    def refresh_hard_negatives(self, factors: Callable[[], Factors], epoch: int) -> None:
        """Rank hard negatives with the present model, at the start of every `hard_every`-th epoch but the first."""
        if self.candidates and (hard := self.candidates.hard) and hard.is_due(epoch):
            current = factors()
            hard.refresh(current.users, current.items, epoch)

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

    def _precision(self) -> AbstractContextManager[None]:
        bf16 = self.recipe.train.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16) if bf16 else nullcontext()
