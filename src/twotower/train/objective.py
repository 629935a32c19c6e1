"""Objectives: the loss of a batch of labelled pairs, and of positives against candidates.

Several ranks train one batch together. Each rank runs the user tower for its own positives and the item tower for its
part of the candidates, then all ranks gather the item vectors, gradients included. So a batch and its loss do not
depend on the number of ranks.

A tower runs once per distinct user or item of a batch, and a user tower that reads the context once per distinct
interaction. No history holds an interaction of the batch, so no history contains its target.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from twotower.arrays.sets import DistinctRows
from twotower.arrays.types import F32, I64, Float, Floats, Ints, Shaped, WholeNumbers
from twotower.data.dataset import Dataset
from twotower.distributed import DistributedContext
from twotower.evaluation.factors import Factors
from twotower.model.inputs.code_layout import Inputs
from twotower.model.inputs.gather import NO_ROWS
from twotower.model.inputs.side_tensors import SideTensors
from twotower.model.two_tower import TwoTower
from twotower.train.checkpoint import Stateful, join_states, load_states
from twotower.train.contrastive import contrastive_loss
from twotower.train.losses.loss import ContrastiveLoss, Loss, PointwiseLoss
from twotower.train.negatives.candidates import CandidateVersions
from twotower.train.negatives.mixture import CandidateSampler
from twotower.train.order import Epoch, Examples
from twotower.train.preconditions import check_recipe
from twotower.train.recipe import Recipe
from twotower.train.samplers import PairSampler, PositiveSampler
from twotower.train.torchrec.embeddings import TorchRecEmbeddings


@dataclass(frozen=True)
class Batch:
    """B pairs over U distinct users and I distinct items."""

    users: Inputs
    items: Inputs
    user: I64[Tensor, "B"]  # into the U users
    item: I64[Tensor, "B"]  # into the I items
    label: F32[Tensor, "B"]  # 0 or 1
    weight: F32[Tensor, "B"]

    def __len__(self) -> int:
        return len(self.label)


@dataclass(frozen=True)
class ContrastiveBatch:
    """B positives and the items of their candidates."""

    users: Inputs
    items: Inputs
    user: I64[Tensor, "B"] | None  # into the users; None: user b belongs to positive b


class Batcher:
    """Makes batches on the device from aligned arrays of pairs."""

    def __init__(self, users: SideTensors, items: SideTensors) -> None:
        self.users, self.items = users, items
        self._distinct_users, self._distinct_items = DistinctRows(users.n), DistinctRows(items.n)

    def __call__(
        self, user: Shaped[WholeNumbers, "B"], item: Shaped[WholeNumbers, "B"], label: Shaped[Floats, "B"],
        weight: Shaped[Floats, "B"], source: Shaped[Ints, "n"], moments: Shaped[Ints, "B"],
    ) -> Batch:  # fmt: skip
        """Return B labelled pairs, the whole batch or one rank's part of it.

        `source` holds the interaction indices of the whole batch, negative for drawn pairs. `moments` holds the indices
        of the B pairs; a drawn pair ~i has the context of interaction i.
        """
        if self.users.has_context:
            interactions, first, user_index = np.unique(
                np.maximum(moments, ~moments), return_index=True, return_inverse=True
            )
            users = user[first].astype(np.int64)
        else:
            interactions = NO_ROWS
            users, user_index = self._distinct_users(user)
        items, item_index = self._distinct_items(item)
        left_out = source[source >= 0] if self.users.has_sequences or self.items.has_sequences else None
        rows = self.users.take(users, left_out, interactions), self.items.take(items, left_out)
        arrays = (user_index, item_index, label, weight)
        return Batch(*rows, *(torch.from_numpy(array).to(self.users.device) for array in arrays))

    def contrastive_batch(
        self, user: Shaped[WholeNumbers, "B"], source: Shaped[Ints, "B"], items: Shaped[Ints, "I"], earlier: bool,
        batch: Shaped[Ints, "n"] | None = None,
    ) -> ContrastiveBatch:  # fmt: skip
        """Return the inputs of the positives with the interaction indices `source`, and of the item rows `items`.

        With `earlier`, user b has the history before interaction b. Otherwise each distinct user, or with a context
        each positive, has one row, and no sequence holds an interaction of `batch`, or of `source` if `batch` is None.
        """
        if earlier:
            return ContrastiveBatch(self.users.take_before(user.astype(np.int64), source), self.items.take(items), None)
        left_out = None
        if self.users.has_sequences or self.items.has_sequences:
            left_out = source if batch is None else batch
        if self.users.has_context:
            inputs = self.users.take(user.astype(np.int64), left_out, source)
            return ContrastiveBatch(inputs, self.items.take(items, left_out), None)
        users, index = self._distinct_users(user)
        rows = self.users.take(users, left_out), self.items.take(items, left_out)
        return ContrastiveBatch(*rows, torch.from_numpy(index).to(self.users.device))


class BatchLoss(NamedTuple):
    """Number of rows of a batch on all ranks, and a rank's part of its loss."""

    rows: int
    loss: Float[Tensor, ""]
    mimic: Float[Tensor, ""]


L = TypeVar("L", bound=Loss)


class Objective(ABC, Generic[L]):
    """Batches of an epoch in order, and the loss of each. Every draw depends on (seed, epoch, step)."""

    sampler: PairSampler | PositiveSampler

    def __init__(
        self, loss: L, dataset: Dataset, recipe: Recipe, model: TwoTower, device: torch.device,
        context: DistributedContext, torchrec: TorchRecEmbeddings | None,
    ) -> None:  # fmt: skip
        """Check the settings and build the sampler. Raises ConfigError, or DataError if nothing can be learned."""
        self.loss, self.dataset, self.recipe, self.model = loss, dataset, recipe, model
        self.device, self.context, self.torchrec = device, context, torchrec
        self.causal = recipe.train.history_scope == "causal"
        timeline = dataset.timeline if self.causal else None
        self.users = SideTensors(
            dataset.users.by_version(), dataset.encoders.fields("user"), device, timeline, dataset.grouped_by_user,
            dataset.context,
        )  # fmt: skip
        self.items = SideTensors(dataset.items.by_version(), dataset.encoders.fields("item"), device)
        self.batcher = Batcher(self.users, self.items)
        if not dataset.is_whole:  # whose recipe is chosen
            check_recipe(dataset, recipe, context)
        self.parts = dict[str, Stateful]()
        self.sampler = self.make_sampler()
        self.steps_per_epoch = math.ceil(len(self.sampler) / recipe.train.batch_size)
        self._towers: Callable[[Inputs, Inputs], tuple[Tensor, Tensor]] = BothTowers(model, recipe.trained_pairs)
        if context.world_size > 1:
            self._towers = distributed_data_parallel(
                BothTowers(model, recipe.trained_pairs), torchrec.shards_by_parameter if torchrec else ()
            )

    @abstractmethod
    def make_sampler(self) -> PairSampler | PositiveSampler:
        """Return the source of the examples. Raises ConfigError."""

    @abstractmethod
    def __call__(self, epoch: Epoch, batch: int, step: int) -> BatchLoss:
        """Return the loss of batch `batch` of an epoch, which is step `step` of the training."""

    @abstractmethod
    def begin_epoch(self, factors: Callable[[], Factors], epoch: int) -> None:
        """Prepare epoch `epoch` (0, 1, …); `factors` computes the vectors of the current model."""

    def state(self) -> dict[str, Shaped[Tensor, "*_"]]:
        """Return the tensors of earlier batches and epochs that later ones depend on."""
        return join_states(self.parts)

    def load_state(self, state: dict[str, Shaped[Tensor, "*_"]]) -> None:
        """Continue from a state; ignore parts that the settings no longer use."""
        load_states(self.parts, state)

    def detach_from_group(self) -> None:
        """Drop the wrapper that averages gradients, which holds the process group."""
        self._towers = BothTowers(self.model, self.recipe.trained_pairs)

    def examples(self, epoch: Epoch, batch: int) -> tuple[Examples, Shaped[Ints, "s"], slice]:
        """Return the examples of a batch, the end of each shard's part, and the slice of this rank."""
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

    def vectors(self, users: Inputs, items: Inputs) -> tuple[Float[Tensor, "U D"], Float[Tensor, "I D"]]:
        if self.torchrec:
            self.torchrec.fetch(users, items)
        with self.precision():
            return self._towers(users, items)

    def mimic_loss(
        self, user_inputs: Inputs, item_inputs: Inputs, users: Float[Tensor, "U D"], items: Float[Tensor, "I D"],
        user: I64[Tensor, "P"], item: I64[Tensor, "P"], weights: Float[Tensor, "P"], total_weight: float,
        gather: Callable[[Float[Tensor, "r d"]], Float[Tensor, "I d"]] = lambda local: local,
    ) -> Float[Tensor, ""]:  # fmt: skip
        """Return the weighted mimic losses of P positives (user[p], item[p]), indices into `users` and `items`.

        The positives are a part of a batch of `total_weight`. `gather` turns rows of `item_inputs` into rows of
        `items`.
        """
        pairs, of = self.recipe.trained_pairs, (weights, total_weight)
        of_users = self.model.augmented("user", user_inputs, items, pairs)
        of_items = self.model.augmented("item", item_inputs, users, pairs)
        terms = [mimic(a[user], v[item], *of) for a, v in of_users]
        terms += [mimic(gather(a)[item], v[user], *of) for a, v in of_items]
        return self.loss.mimic * torch.stack(terms).sum()

    def precision(self) -> AbstractContextManager[None]:
        """Return the context of matrix products in `train.precision`."""
        bf16 = self.recipe.train.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16) if bf16 else nullcontext()


class BothTowers(nn.Module):
    """Both towers of some pairs, or of all, in one call, as DistributedDataParallel needs it."""

    def __init__(self, model: TwoTower, pairs: Sequence[int] | None) -> None:
        super().__init__()
        self.model, self.pairs = model, pairs

    def forward(self, users: Inputs, items: Inputs) -> tuple[Float[Tensor, "U D"], Float[Tensor, "I D"]]:
        return self.model.user_vectors(users, self.pairs), self.model.item_vectors(items, self.pairs)


def distributed_data_parallel(
    towers: BothTowers, local_parameters: Iterable[str]
) -> nn.parallel.DistributedDataParallel:
    """Return the towers with gradients averaged over the ranks. Each rank holds its own piece of `local_parameters`."""
    kind = nn.parallel.DistributedDataParallel
    constants = [name for name, _ in towers.named_buffers()]  # equal on all ranks
    ignored = [*constants, *(f"model.{name}" for name in local_parameters)]
    kind._set_params_and_buffers_to_ignore_for_model(towers, ignored)  # type: ignore[no-untyped-call]
    return kind(towers)


class PointwiseObjective(Objective[PointwiseLoss]):
    """Batches of labelled pairs, training interactions and drawn negatives, and their pointwise loss."""

    def make_sampler(self) -> PairSampler:
        config = self.recipe.train
        return PairSampler(self.dataset, self.recipe.negatives, config.seed, config.shuffle, config.data_shards)

    def begin_epoch(self, factors: Callable[[], Factors], epoch: int) -> None:
        """Do nothing: pairs do not depend on the model."""

    def __call__(self, epoch: Epoch, batch: int, step: int) -> BatchLoss:
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
        else:  # all interactions have weight 0
            loss = logits.sum() * 0
        mimic_loss = torch.zeros((), device=self.device)
        if self.loss.mimic:
            positive = (pairs.label > 0) & (pairs.weight > 0)
            mimic_loss = self.mimic_loss(
                pairs.users, pairs.items, users, items, pairs.user[positive], pairs.item[positive],
                pairs.weight[positive], float((whole.label * whole.weight).sum(dtype=np.float64)),
            )  # fmt: skip
        return BatchLoss(len(whole), loss, mimic_loss)


class ContrastiveObjective(Objective[ContrastiveLoss]):
    """Batches of training positives with candidates from a mixture of sources, and their contrastive loss."""

    def make_sampler(self) -> PositiveSampler:
        config, negatives = self.recipe.train, self.recipe.negatives
        sampler = PositiveSampler(self.dataset, config.seed, config.shuffle, self.causal, config.data_shards)
        self.candidates = CandidateSampler(self.dataset, negatives, config.seed, self.device)
        self.parts |= self.candidates.samplers
        histories = self.dataset.schema.histories()
        self._histories_hold_dislikes = any(h.interactions != "positive" for h in histories)
        return sampler

    def begin_epoch(self, factors: Callable[[], Factors], epoch: int) -> None:
        self.candidates.begin_epoch(factors, epoch)

    def __call__(self, epoch: Epoch, batch: int, step: int) -> BatchLoss:
        config, context = self.recipe, self.context
        whole, ends, own_part = self.examples(epoch, batch)
        own = whole[own_part]
        # A negative must not be in the positive's history; a causal history holds the earlier interactions.
        later, total_weight = self.causal and self._histories_hold_dislikes, float(whole.weight.sum(dtype=np.float64))
        drawn = self.candidates(whole, step, later, ends, own_part)
        versions = CandidateVersions(drawn, self.dataset.items, self.dataset.times[whole.source], self.device)
        every, shared = versions.rows, versions.shared
        part = context.partition(shared)
        sizes = context.partition_sizes(shared)
        rows = np.concatenate([every[part], every[shared:]])
        left_out = self._left_out(whole.source, drawn.interactions)
        # All ranks take part in every collective: a rank without a row embeds one, and drops it.
        embedded, embedded_items = own if len(own) else whole[:1], rows if len(rows) else every[:1]
        user_rows = self.dataset.input_rows("user", embedded.user, embedded.source)
        positives = self.batcher.contrastive_batch(user_rows, embedded.source, embedded_items, self.causal, left_out)
        users, items = self.vectors(positives.users, positives.items)
        n = part.stop - part.start

        def gather(local: Float[Tensor, "r d"]) -> Float[Tensor, "I d"]:
            """Return the vectors of `every` row, from those of this rank's `rows`."""
            if context.world_size == 1:
                return local
            return torch.cat([context.all_gather(local[:n], sizes), local[n : len(rows)]])

        items = gather(items)
        seen, positive = None, drawn.positive
        if versions.several:
            seen = versions.seen_at(self.dataset.times[own.source])
            positive = seen.find(positive[:, None])[:, 0]
        mimic_loss = torch.zeros((), device=self.device)
        if self.loss.mimic:
            user = torch.arange(len(embedded), device=users.device) if positives.user is None else positives.user
            mimic_loss = self.mimic_loss(
                positives.users, positives.items, users, items, user[: len(own)], positive,
                drawn.weights, total_weight, gather,
            )  # fmt: skip
        if positives.user is not None:
            users = users.index_select(0, positives.user)
        columns = items if drawn.memory_vectors is None else torch.cat([items, drawn.memory_vectors])
        dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        # Columns of the vectors that have a loss of their own: all, or those of each pair that is trained apart.
        apart = config.train.pairs == "apart"
        parts = self.model.parts_of_pairs(config.trained_pairs) if apart else [slice(None)]
        loss = torch.stack([
            contrastive_loss(
                users[: len(own), dims], columns[:, dims], drawn, self.loss, len(self.dataset.items), dtype,
                total_weight, versions=seen,
            )
            for dims in parts
        ]).sum()  # fmt: skip
        if config.negatives.remembered:
            latest = torch.from_numpy(whole.item.astype(np.int64)).to(self.device)
            vectors = items.index_select(0, drawn.batch_positive)
            self.candidates.remember(latest, vectors, torch.from_numpy(whole.weight).to(self.device))
        return BatchLoss(len(whole), loss, mimic_loss)

    def _left_out(self, source: Shaped[Ints, "B"], drawn: Shaped[Ints, "n"]) -> Shaped[Ints, "m"]:
        """Return the interactions that no history may hold: those of the batch and those `drawn` as negatives."""
        # A rank without a row has drawn nothing, and leaves out what the other ranks drew.
        drawn_apart = self.recipe.train.data_shards > 1 or len(source) < self.context.world_size
        if self.context.world_size > 1 and drawn_apart and self.candidates.gives_interactions:
            counts = self.context.all_gather_array(np.array([len(drawn)]), [1] * self.context.world_size)
            drawn = self.context.all_gather_array(drawn, [int(n) for n in counts])
        return np.concatenate([source, drawn]) if len(drawn) else source


def mimic(
    augmented: Float[Tensor, "P D"],
    vectors: Float[Tensor, "P D"],
    weights: Float[Tensor, "P"],
    total_weight: float = 0.0,
) -> Float[Tensor, ""]:
    """Return the adaptive-mimic loss: the weighted mean over P positives of |a - v|^2; 0 without positives.

    `augmented` are augmented vectors a of one side, `vectors` the other side's vectors v, which get no gradient.
    With `total_weight` the positives are a part of a batch of that weight, and the result is their part of its mean.

    Use it with `augment = true` on both towers, so that each side's augmented vector learns from the other tower (dual
    augmented two-tower model, DAT, Yu et al. 2021, section 3.2, the terms of positive pairs; those of negative pairs
    are constant).
    """
    distances = (augmented - vectors.detach()).square()
    total = total_weight or float(weights.sum())
    return (distances * weights[:, None]).sum() / (total or 1.0)
