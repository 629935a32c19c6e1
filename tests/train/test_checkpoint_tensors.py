"""Tensors written block by block make the file that safetensors makes."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save as save_tensors

from twotower.train.checkpoint import TensorBlocks, write_tensors


def test_a_checkpoint_is_the_file_that_safetensors_would_write(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(5, 3),
        "a": torch.tensor(2.0),
        "n": torch.arange(7),
        "d": torch.tensor(-torch.inf, dtype=torch.float64),
        "é": torch.zeros(2, 0),
    }
    tensors |= {"i": torch.arange(6, dtype=torch.int32).view(2, 3).T}
    blocks = TensorBlocks((5, 3), (tensors["b"][i : i + 2] for i in range(0, 5, 2)))
    write_tensors(tmp_path / "t", {**tensors, "b": blocks})
    assert (tmp_path / "t").read_bytes() == save_tensors({n: t.contiguous() for n, t in tensors.items()})
