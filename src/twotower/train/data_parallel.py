"""Gradients averaged over the ranks."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from twotower.model.inputs.carriers import Inputs
from twotower.model.two_tower import TwoTower


class BothTowers(nn.Module):
    """Both towers in one call, which DistributedDataParallel needs."""

    def __init__(self, model: TwoTower) -> None:
        super().__init__()
        self.model = model

    def forward(self, users: Inputs, items: Inputs) -> tuple[Tensor, Tensor]:
        return self.model.user_vectors(users), self.model.item_vectors(items)


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
