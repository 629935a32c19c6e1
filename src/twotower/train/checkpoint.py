"""Checkpoints: the complete state of a run, from which it resumes as if it had never stopped.

A checkpoint is a folder `step-<n>` with `state.json` and `tensors.safetensors`, renamed into place when complete. No pickle is
read or written.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from twotower import files
from twotower.errors import RunError

log = logging.getLogger(__name__)

FORMAT = 2
"""Number of the present format, in `state.json`; a checkpoint of another format is refused."""
CHECKPOINTS_KEPT = 2
"""The newest, and the one before it in case the newest is damaged."""

_TYPES = {torch.int64: "I64", torch.float32: "F32", torch.int32: "I32"}
"""Names of the types in a safetensors file, in the order of the file."""


@dataclass(frozen=True)
class TensorBlocks:
    """A float32 tensor (rows, width) as a stream of blocks of rows, for tables that no rank holds whole."""

    shape: tuple[int, int]
    rows: Iterable[Tensor]


def save(folder: Path, step: int, tensors: Mapping[str, Tensor | TensorBlocks], state: dict[str, Any]) -> Path:
    """Write checkpoint `step` into `folder` and remove all but the newest `CHECKPOINTS_KEPT`. Raises RunError if it cannot
    be written."""
    path = folder / f"step-{step:09d}"
    with files.new_folder(path) as temporary:
        state = state | {
            "format": FORMAT,
            "step": step,
            "sha256": write_tensors(temporary / "tensors.safetensors", tensors),
        }
        (temporary / "state.json").write_text(json.dumps(state), encoding="utf-8")
    for old in _checkpoint_folders(folder)[:-CHECKPOINTS_KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def remove_leftovers(folder: Path) -> None:
    """Remove incomplete checkpoints of killed processes. The caller holds the run's lock."""
    files.remove_leftovers(folder, lambda name: name.startswith("step-"))


def file_order(tensors: Mapping[str, Tensor | TensorBlocks]) -> list[str]:
    """Return the names in the order of the safetensors file: by type, then by name."""
    places = {kind: place for place, kind in enumerate(_TYPES)}
    return sorted(tensors, key=lambda name: (places[_dtype(tensors[name])], name))


def write_tensors(path: Path, tensors: Mapping[str, Tensor | TensorBlocks]) -> str:
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

        def write(data: Any) -> None:
            file.write(data)
            digest.update(data)

        write(len(text).to_bytes(8, "little"))
        write(text)
        for name in header:
            tensor = tensors[name]
            for part in [tensor] if isinstance(tensor, Tensor) else tensor.rows:
                write(part.detach().cpu().contiguous().numpy().data.cast("B") if part.numel() else b"")
    return digest.hexdigest()


def _dtype(tensor: Tensor | TensorBlocks) -> torch.dtype:
    return torch.float32 if isinstance(tensor, TensorBlocks) else tensor.dtype


def newest(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return the tensors and the state of the newest intact checkpoint, or None; log each damaged one.

    Raises RunError if a checkpoint has another format.
    """
    for path in reversed(_checkpoint_folders(folder)):
        try:
            return _load(path)
        except _OtherFormatError as e:
            raise RunError(str(e)) from None
        except RunError as e:
            log.warning(f"{e}; falling back to the checkpoint before it")
    return None


class _OtherFormatError(RunError):
    """A checkpoint of another version."""


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    state = files.read_json(path / "state.json")
    if isinstance(state, dict) and (written := state.get("format", 1)) != FORMAT:
        raise _OtherFormatError(
            f"checkpoint {path} has format {written!r}, and this version reads format {FORMAT}; start a new run"
        )
    try:
        file = path / "tensors.safetensors"
        with file.open("rb") as data:
            if hashlib.file_digest(data, "sha256").hexdigest() != state["sha256"]:
                raise RunError(f"checkpoint {path} is damaged (checksum)")
        if not isinstance(state["step"], int) or not all(
            isinstance(state[n], dict) for n in ("fingerprint", "progress")
        ):
            raise TypeError("step, fingerprint or progress")
        return load_file(file), state
    except (OSError, SafetensorError, KeyError, TypeError) as e:
        raise RunError(f"checkpoint {path} is damaged ({type(e).__name__}: {e})") from None


def _checkpoint_folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step-*") if p.is_dir()) if folder.is_dir() else []


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str]) -> dict[str, Tensor]:
    """Return the optimizer's state as tensors `optimizer/<slot>/<parameter>`; `names` are those of the parameters."""
    return {
        f"optimizer/{slot}/{name}": value
        for parameter, name in names.items()
        for slot, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str], tensors: dict[str, Tensor]
) -> None:
    """Load the tensors of `optimizer_tensors` into an optimizer, in place."""
    for parameter, name in names.items():
        slots = {
            key.split("/", 2)[1]: value for key, value in tensors.items()
            if key.startswith("optimizer/") and key.split("/", 2)[2] == name
        }  # fmt: skip
        if slots:
            optimizer.state[parameter] = {
                slot: value if slot == "step" else value.to(parameter.device) for slot, value in slots.items()
            }
