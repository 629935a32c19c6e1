"""Tensors written to a safetensors file one block after another."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from twotower.arrays.types import F32, Shaped

_TYPES = {torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32"}
"""Names of the types in a safetensors file, in the order of the file."""


@dataclass(frozen=True)
class TensorBlocks:
    """A float32 tensor (rows, width) as a stream of blocks of rows, for tables that no rank holds whole."""

    shape: tuple[int, int]
    rows: Iterable[F32[Tensor, "_ _"]]


def file_order(tensors: Mapping[str, Shaped[Tensor, "*_"] | TensorBlocks]) -> list[str]:
    """Return the names in the order of the safetensors file: by type, then by name."""
    places = {kind: place for place, kind in enumerate(_TYPES)}
    return sorted(tensors, key=lambda name: (places[_dtype(tensors[name])], name))


def write_tensors(path: Path, tensors: Mapping[str, Shaped[Tensor, "*_"] | TensorBlocks]) -> str:
    """Write the bytes of `safetensors.torch.save`, one tensor after another, and return the file's SHA-256."""
    header, end = {}, 0
    for name in file_order(tensors):
        tensor = tensors[name]
        start, end = end, end + math.prod(tensor.shape) * _dtype(tensor).itemsize
        header[name] = {"dtype": _TYPES[_dtype(tensor)], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:

        def write(data: bytes | memoryview) -> None:
            file.write(data)
            digest.update(data)

        write(len(text).to_bytes(8, "little"))
        write(text)
        for name in header:
            tensor = tensors[name]
            for part in [tensor] if isinstance(tensor, Tensor) else tensor.rows:
                write(part.detach().cpu().contiguous().numpy().data.cast("B") if part.numel() else b"")
    return digest.hexdigest()


def _dtype(tensor: Shaped[Tensor, "*_"] | TensorBlocks) -> torch.dtype:
    return torch.float32 if isinstance(tensor, TensorBlocks) else tensor.dtype
