"""The memory is a queue without gradient that continues from its state."""

from __future__ import annotations

import numpy as np
import torch
from trainers import same

from twotower.train.negatives.cross_batch_memory import VectorQueue

SHARES = np.full(9, 1 / 9)


def test_the_memory_holds_the_latest_positives_and_their_vectors_without_gradient() -> None:
    queue = VectorQueue(5, SHARES)
    assert not queue.state()
    weight = torch.ones(1, requires_grad=True)
    for start in (0, 3, 6):
        items = torch.arange(start, start + 3)
        queue.remember(items, items[:, None].float() * weight)
    assert queue.memory is not None
    assert queue.memory.items.tolist() == [4, 5, 6, 7, 8]
    assert queue.memory.vectors[:, 0].tolist() == [4, 5, 6, 7, 8]
    assert not queue.memory.vectors.requires_grad


def test_a_memory_continues_from_its_state() -> None:
    whole, again = VectorQueue(5, SHARES), VectorQueue(5, SHARES)
    again.load_state(whole.state())
    assert not again.state()
    whole.remember(torch.arange(4), torch.randn(4, 2))
    again.load_state(whole.state())
    for queue in (whole, again):
        queue.remember(torch.arange(4, 7), torch.ones(3, 2))
    assert same(whole.state(), again.state())
