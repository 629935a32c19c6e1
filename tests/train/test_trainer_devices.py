"""A training step on another device than the processor: tensors without numbers show where each one is.

The device is "meta", as PyTorch without CUDA aborts at a gradient of a fake tensor on "cuda". Operations of tensors on
two devices raise as they would there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import pytest
import torch
from model_worlds import world
from torch import Tensor, nn
from torch._subclasses import fake_impls
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from worlds import settings

from twotower.train.objective import BatchLoss, Objective
from twotower.train.trainer import Trainer

DEVICE = torch.device("meta")


def tensors_in(value: object) -> Iterator[Tensor]:
    """The tensors of a value, of its parts, and of theirs."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)
    elif is_dataclass(value):
        yield from tensors_in([getattr(value, field.name) for field in fields(value)])


def moved(module: nn.Module, device: torch.device) -> nn.Module:
    """A module with its weights on a device. `nn.Module.to` swaps tensors, which fake ones do not allow."""
    made: dict[Tensor, Tensor] = {}
    for part in module.modules():
        of: list[dict[str, Any]] = [part._parameters, part._buffers]
        for tensors in of:
            for name, tensor in list(tensors.items()):
                if tensor is not None and tensor not in made:
                    there = tensor.detach().to(device)
                    is_weight = isinstance(tensor, nn.Parameter)
                    made[tensor] = nn.Parameter(there, tensor.requires_grad) if is_weight else there
                if tensor is not None:
                    tensors[name] = made[tensor]
    return module


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors without numbers in the test. Where numbers are read they are 0, a sum of them is 1, and a count is 1."""

    def repeated_once(mode: FakeTensorMode, function: object, counts: Tensor, **more: object) -> Tensor:
        with mode:
            return torch.empty_like(counts)

    def zeros(tensor: Tensor) -> np.ndarray[Any, Any]:
        return np.zeros(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))

    monkeypatch.setattr(nn.Module, "to", moved)
    monkeypatch.setattr(FakeTensor, "numpy", zeros)
    monkeypatch.setattr(FakeTensor, "item", lambda tensor: 1.0)
    repeat: Any = torch.ops.aten.repeat_interleave.Tensor
    monkeypatch.setitem(fake_impls.op_implementations_dict, repeat, repeated_once)
    world()  # others use it too
    with FakeTensorMode():
        yield


@pytest.mark.parametrize(
    ("loss", "optimizer"), [("bce", "Adam"), ("softmax", "AdamW"), ("softmax", "Adagrad"), ("softmax", "SGD")]
)
def test_a_step_leaves_weights_batches_and_losses_on_the_device(
    loss: str, optimizer: str, fake: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(loss={"kind": loss}, train={"precision": "fp32", "batch_size": 64, "optimizer": optimizer})
    trainer = Trainer(world().data, config, device=DEVICE)
    seen: dict[str, list[Tensor]] = {}
    vectors, call = Objective.vectors, type(trainer.objective).__call__

    def seen_vectors(self: Any, *inputs: Any) -> Any:
        found = vectors(self, *inputs)
        seen.update(inputs=[*tensors_in(inputs)], vectors=[*tensors_in(found)])
        return found

    def seen_loss(self: Any, *batch: Any) -> BatchLoss:
        found: BatchLoss = call(self, *batch)
        seen["losses"] = [*tensors_in(found)]
        return found

    monkeypatch.setattr(Objective, "vectors", seen_vectors)
    monkeypatch.setattr(type(trainer.objective), "__call__", seen_loss)
    trainer.step(trainer.objective.sampler.epoch(0), 0)
    weights = list[Tensor](trainer.model.parameters())
    seen |= {"weights": weights, "gradients": [*tensors_in([w.grad for w in weights])]}
    seen |= {"buffers": list(trainer.model.buffers()), "ema": [*tensors_in(trainer.ema.state())]}
    seen["optimizer"] = [t for t in tensors_in(trainer.optimizer.state()) if t.dim()]  # Adam counts on the processor
    assert [name for name, found in seen.items() if {t.device for t in found} - {DEVICE}] == []
    assert len(seen["gradients"]) == len(weights) > 10
    assert len(seen["losses"]) == len(seen["vectors"]) == 2
    assert len(seen["inputs"]) > 10
