"""States of the parts of a training, as checkpoints hold them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor


class Stateful(Protocol):
    """Part of a training whose state checkpoints hold."""

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that determine the part's further course, by name."""

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from a state, which other settings may have made."""


def join_states(parts: Mapping[str, Stateful]) -> dict[str, Tensor]:
    """Return the states of all parts in one, as "<part>/<name>"."""
    return {f"{part}/{name}": tensor for part, of in parts.items() for name, tensor in of.state().items()}


def load_states(parts: Mapping[str, Stateful], state: Mapping[str, Tensor]) -> None:
    """Let each part continue from its own tensors of a joined state; those of other parts are left out."""
    states: dict[str, dict[str, Tensor]] = {part: {} for part in parts}
    for key, tensor in state.items():
        part, _, name = key.partition("/")
        if part in states:
            states[part][name] = tensor
    for part, of in parts.items():
        of.load_state(states[part])
