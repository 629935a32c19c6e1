"""Checkpoints: everything a run needs to go on, as if it had never stopped.

A checkpoint is a folder `step-<n>` with `state.json` and `tensors.safetensors`, renamed into place when complete.
Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from twotower import storage
from twotower.errors import RunError

KEPT = 2  # the newest, and one before it in case the newest is damaged


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], state: dict[str, Any]) -> Path:
    """Write checkpoint `step` into `folder` and drop all but the newest. Raises RunError if it cannot be written."""
    data = save_tensors({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
    path = folder / f"step-{step:09d}"
    with storage.new_folder(path) as temporary:
        (temporary / "tensors.safetensors").write_bytes(data)
        state = state | {"step": step, "sha256": hashlib.sha256(data).hexdigest()}
        (temporary / "state.json").write_text(json.dumps(state), encoding="utf-8")
    for left in folder.glob(".step-*.tmp"):  # of a process that was killed while it wrote
        shutil.rmtree(left, ignore_errors=True)
    for old in _all(folder)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def newest(folder: Path, warn: Callable[[str], None]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The newest checkpoint that is whole, or None. Says which damaged ones were passed over."""
    for path in reversed(_all(folder)):
        try:
            return _load(path)
        except RunError as e:
            warn(f"warning: {e}; falling back to the checkpoint before it")
    return None


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    state = storage.read_json(path / "state.json")
    try:
        data = (path / "tensors.safetensors").read_bytes()
        if hashlib.sha256(data).hexdigest() != state["sha256"]:
            raise RunError(f"checkpoint {path} is damaged (checksum)")
        return load_tensors(data), state
    except (OSError, SafetensorError, KeyError, TypeError) as e:
        raise RunError(f"checkpoint {path} is damaged ({type(e).__name__}: {e})") from None


def _all(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step-*") if p.is_dir()) if folder.is_dir() else []


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str]) -> dict[str, Tensor]:
    """The optimizer's state by parameter name: `optimizer/<slot>/<parameter>`."""
    return {
        f"optimizer/{slot}/{name}": value
        for parameter, name in names.items()
        for slot, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str], tensors: dict[str, Tensor]
) -> None:
    """The reverse of `optimizer_tensors`, in place."""
    for parameter, name in names.items():
        slots = {
            key.split("/", 2)[1]: value for key, value in tensors.items()
            if key.startswith("optimizer/") and key.split("/", 2)[2] == name
        }  # fmt: skip
        if slots:
            optimizer.state[parameter] = {
                slot: value if slot == "step" else value.to(parameter.device) for slot, value in slots.items()
            }
