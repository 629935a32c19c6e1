"""The loss of a batch: what pairs and candidates have in common.

Several ranks train one batch together: each rank runs the user tower for its own positives and the item tower for its part of
the batch's candidates, and the item vectors of all ranks are gathered, gradients included. So a batch, and its loss, do not
depend on the number of ranks.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from twotower.arrays.types import I64, Float, Ints, Shaped
from twotower.data.dataset import Dataset
from twotower.distributed import DistributedContext
from twotower.evaluation.factors import Factors
from twotower.model.inputs.code_layout import Inputs
from twotower.model.inputs.side_tensors import SideTensors
from twotower.model.two_tower import TwoTower
from twotower.train.batches import Batcher
from twotower.train.checkpoint import Stateful, join_states, load_states
from twotower.train.losses.loss import Loss
from twotower.train.losses.mimic import mimic
from twotower.train.negatives.source_tally import SourceTally
from twotower.train.order import Epoch, Examples
from twotower.train.preconditions import check_recipe
from twotower.train.recipe import Recipe
from twotower.train.torchrec.embeddings import TorchRecEmbeddings


class Sampler(Protocol):
    """Examples of every epoch."""

    def __len__(self) -> int:
        """Return the number of examples of an epoch."""

    def epoch(self, index: int) -> Epoch:
        """Return the examples of epoch `index` (0, 1, …)."""


class BatchLoss(NamedTuple):
    """A rank's part of the loss of a batch, and the number of rows of the batch on all ranks."""

    rows: int
    loss: Float[Tensor, ""]
    mimic: Float[Tensor, ""]


L = TypeVar("L", bound=Loss)


class Objective(ABC, Generic[L]):
    """The batches of an epoch in their order, and the loss of each. Every draw depends on (seed, epoch, step)."""

    sampler: Sampler
    tallied_batch: int
    """Batch of each epoch, the middle one, whose negatives are counted in `tally`."""

    def __init__(
        self,
        loss: L,
        dataset: Dataset,
        recipe: Recipe,
        model: TwoTower,
        device: torch.device,
        context: DistributedContext,
        torchrec: TorchRecEmbeddings | None,
    ) -> None:
        """Check the settings and build the sampler. Raises ConfigError, or DataError if the training part holds nothing to
        learn with these settings."""
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
        check_recipe(dataset, recipe, context)
        self.tally = SourceTally()
        self.parts: dict[str, Stateful] = {"tally": self.tally}
        self.sampler = self.make_sampler()
        self.steps_per_epoch = math.ceil(len(self.sampler) / recipe.train.batch_size)
        self.tallied_batch = (self.steps_per_epoch - 1) // 2
        self._towers: Callable[[Inputs, Inputs], tuple[Tensor, Tensor]] = BothTowers(model, recipe.trained_pairs)
        if context.world_size > 1:
            self._towers = distributed_data_parallel(
                BothTowers(model, recipe.trained_pairs), torchrec.shards_by_parameter if torchrec else ()
            )

    @abstractmethod
    def make_sampler(self) -> Sampler:
        """Return the source of the examples. Raises ConfigError."""

    @abstractmethod
    def __call__(self, epoch: Epoch, batch: int, step: int) -> BatchLoss:
        """Return the loss of batch `batch` of an epoch, which is step `step` of the training."""

    @abstractmethod
    def begin_epoch(self, factors: Callable[[], Factors], epoch: int) -> None:
        """Prepare epoch `epoch` (0, 1, …) with the vectors of the present model."""

    def state(self) -> dict[str, Shaped[Tensor, "*_"]]:
        """Return the tensors of earlier batches and epochs that later ones depend on."""
        return join_states(self.parts)

    def load_state(self, state: dict[str, Shaped[Tensor, "*_"]]) -> None:
        """Continue from a state; what the settings no longer use is left out."""
        load_states(self.parts, state)

    def detach_from_group(self) -> None:
        """Drop the wrapper that averages gradients, which holds the process group."""
        self._towers = BothTowers(self.model, self.recipe.trained_pairs)

    def examples(self, epoch: Epoch, batch: int) -> tuple[Examples, Shaped[Ints, "s"], slice]:
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

    def vectors(self, users: Inputs, items: Inputs) -> tuple[Float[Tensor, "U D"], Float[Tensor, "I D"]]:
        """Return the vectors of some users and items."""
        if self.torchrec:
            self.torchrec.fetch(users, items)
        with self.precision():
            return self._towers(users, items)

    def mimic_loss(
        self,
        user_inputs: Inputs,
        item_inputs: Inputs,
        users: Float[Tensor, "U D"],
        items: Float[Tensor, "I D"],
        user: I64[Tensor, "P"],
        item: I64[Tensor, "P"],
        total_weight: float,
        gather: Callable[[Float[Tensor, "r d"]], Float[Tensor, "I d"]] = lambda local: local,
        weights: Float[Tensor, "P"] | None = None,
    ) -> Float[Tensor, ""]:
        """Return the weighted mimic losses of P positives (user[p], item[p]), indices into `users` and `items`.

        The P positives, which weigh 1 or have `weights`, are a part of a batch of `total_weight`. `gather` turns rows of `item_inputs` into rows of `items`.
        """
        model = self.model
        of = (total_weight, weights)
        terms = [
            mimic(a[user], v[item], *of)
            for a, v in model.augmented("user", user_inputs, items, self.recipe.trained_pairs)
        ]
        terms += [
            mimic(gather(a)[item], v[user], *of)
            for a, v in model.augmented("item", item_inputs, users, self.recipe.trained_pairs)
        ]
        return self.loss.mimic * torch.stack(terms).sum()

    def precision(self) -> AbstractContextManager[None]:
        """Return the context of matrix products in `train.precision`."""
        bf16 = self.recipe.train.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16) if bf16 else nullcontext()


class BothTowers(nn.Module):
    """Both towers of some pairs, or of all, in one call, which DistributedDataParallel needs."""

    def __init__(self, model: TwoTower, pairs: Sequence[int] | None) -> None:
        super().__init__()
        self.model, self.pairs = model, pairs

    def forward(self, users: Inputs, items: Inputs) -> tuple[Float[Tensor, "U D"], Float[Tensor, "I D"]]:
        return self.model.user_vectors(users, self.pairs), self.model.item_vectors(items, self.pairs)


def distributed_data_parallel(
    towers: BothTowers, local_parameters: Iterable[str]
) -> nn.parallel.DistributedDataParallel:
    """Return the towers with gradients averaged over the ranks, except for `local_parameters` of the model, of which each
    rank holds its own piece."""
    kind = nn.parallel.DistributedDataParallel
    constants = [name for name, _ in towers.named_buffers()]  # equal on all ranks
    ignored = [*constants, *(f"model.{name}" for name in local_parameters)]
    kind._set_params_and_buffers_to_ignore_for_model(towers, ignored)  # type: ignore[no-untyped-call]
    return kind(towers)
