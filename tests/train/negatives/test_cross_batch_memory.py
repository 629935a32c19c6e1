"""The memory is a queue without gradient that continues from its state."""

from __future__ import annotations

import torch
from trainers import same

from twotower.train.negatives.cross_batch_memory import CrossBatchMemory


def test_the_memory_holds_the_latest_positives_and_their_vectors_without_gradient() -> None:
    assert CrossBatchMemory(5).vectors is None
    memory = CrossBatchMemory(5)
    weight = torch.ones(1, requires_grad=True)
    for start in (0, 3, 6):
        items = torch.arange(start, start + 3)
        memory.enqueue(items, items[:, None].float() * weight)
    assert memory.items.tolist() == [4, 5, 6, 7, 8]
    assert memory.vectors is not None
    assert memory.vectors[:, 0].tolist() == [4, 5, 6, 7, 8]
    assert not memory.vectors.requires_grad
    none = CrossBatchMemory(0)
    none.enqueue(torch.arange(3), torch.zeros(3, 2))
    assert none.vectors is None
    assert not len(none.items)


def test_a_memory_continues_from_its_state() -> None:
    whole, again, none = CrossBatchMemory(5), CrossBatchMemory(5), CrossBatchMemory(0)
    again.load_state(whole.state())
    assert not again.state()
    whole.enqueue(torch.arange(4), torch.randn(4, 2))
    again.load_state(whole.state())
    none.load_state(whole.state())
    assert not none.state()
    for memory in (whole, again):
        memory.enqueue(torch.arange(4, 7), torch.ones(3, 2))
    assert same(whole.state(), again.state())
