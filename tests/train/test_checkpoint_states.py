"""The state of several parts is one, and each part gets its own back."""

from __future__ import annotations

import torch
from torch import Tensor

from twotower.train.checkpoint import join_states, load_states


class Part:
    def __init__(self, **tensors: Tensor) -> None:
        self.tensors = tensors

    def state(self) -> dict[str, Tensor]:
        return self.tensors

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.tensors = state


def test_states_are_joined_and_given_back_also_of_parts_within_parts() -> None:
    one = Part(a=torch.ones(1), **{"inner/b": torch.zeros(2)})
    joined = join_states({"one": one, "two": Part(a=torch.ones(3))})
    assert joined.keys() == {"one/a", "one/inner/b", "two/a"}
    again, other = Part(), Part(a=torch.ones(9))
    load_states({"one": again, "other": other}, joined)
    assert again.tensors.keys() == {"a", "inner/b"}
    assert not other.tensors, "a part without tensors in the state is told so"
