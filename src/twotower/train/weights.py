"""Weights of a model by name: copies, loading, and the check that all are finite."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from twotower.distributed import DistributedContext


class Weights:
    """Parameters of a model by name; of a sharded table this rank's piece."""

    def __init__(self, model: nn.Module, context: DistributedContext | None = None, sharded: bool = False) -> None:
        """Name the parameters of `model`; `sharded` if each rank of `context` holds other numbers."""
        self._model, self._context, self._sharded = model, context or DistributedContext(), sharded

    def state(self) -> dict[str, Tensor]:
        """Return the parameters themselves."""
        return dict(self._model.named_parameters())

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Overwrite the parameters in place."""
        for name, parameter in self._model.named_parameters():
            parameter.copy_(state[name])

    def copy(self) -> dict[str, Tensor]:
        """Return copies of the parameters, without gradient."""
        return {name: parameter.detach().clone() for name, parameter in self._model.named_parameters()}

    def are_finite(self) -> bool:
        """Return True if every number is finite, on all ranks."""
        broken = any(not bool(torch.isfinite(p).all()) for p in self._model.parameters())
        return not (self._context.all_reduce_sum(float(broken))[0] if self._sharded else broken)
