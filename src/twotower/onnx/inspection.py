"""Inspection of tower files in a child process, which refuses content that the exporter does not write."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from pydantic import JsonValue

from twotower import limited_process
from twotower.errors import RunError
from twotower.kinds import outside_operators
from twotower.onnx.allow_list import disallowed_content
from twotower.onnx.session import TowerError

INSPECT_FUNCTION = "twotower.onnx.check:inspect_tower"
"""Function of the child process that inspects a tower."""
INSPECT_SECONDS = 30.0
"""CPU seconds that the inspection of a small tower may take."""

_inspected: set[str] = set()
"""SHA-256 of the towers that this process has inspected or built."""


@dataclass(frozen=True)
class InspectionLimits:
    """Limits of the child process that inspects towers."""

    cpu_seconds: float = INSPECT_SECONDS
    """CPU seconds, in addition to those for the size of the file; the limit of wall time is four times as long."""
    bytes_per_cpu_second: float = 2e7
    """Bytes of the file for which one more CPU second is allowed."""
    memory: int = 1 << 29
    """Bytes of memory, in addition to four times the file."""
    max_memory: int | None = None
    """Bytes of memory in all. None: no further limit."""


INSPECTION_LIMITS = InspectionLimits()


def inspect_towers(towers: Mapping[Path, str], *, limits: InspectionLimits = INSPECTION_LIMITS, name: str = "") -> None:
    """Inspect tower files, given with their SHA-256, in a child process: their content, loading, and a call.

    A digest that was inspected before is skipped. Errors name a file by `name`, or by its path if that is empty. Raises
    TowerError if a file is refused or its digest differs, RunError if it cannot be read, ConfigError if onnx or
    onnxruntime is not installed.
    """
    new = [path for path, digest in towers.items() if digest not in _inspected]
    try:
        largest = max((path.stat().st_size for path in new), default=0)
    except OSError as e:
        raise RunError(f"{e.filename}: cannot be read ({e.strerror})") from None
    memory = limits.memory + 4 * largest
    if limits.max_memory is not None:
        memory = max(0, min(memory, limits.max_memory))
    declared: dict[str, JsonValue] = {name: [*sorted(names)] for name, names in outside_operators().items()}
    seconds = limits.cpu_seconds + largest / limits.bytes_per_cpu_second
    results = limited_process.run_limited(
        INSPECT_FUNCTION, new, timeout=4 * seconds, cpu_seconds=seconds, memory=memory, options={"declared": declared}
    )
    for path, result in results.items():
        if result.error:
            raise TowerError(f"{name or path}: {result.error}")
        if result.value != towers[path]:
            raise TowerError(f"{name or path}: was changed while it was read")
        _inspected.add(result.value)


def trust_tower(data: bytes, name: str) -> None:
    """Mark a tower that this process has built as inspected, so that it loads without a child process.

    Raises TowerError if it holds content that the allow-list lacks.
    """
    if reason := disallowed_content(data):
        raise TowerError(f"{name}: {reason}")
    _inspected.add(hashlib.sha256(data).hexdigest())


def inspect_bytes(data: bytes, path: Path | None, limits: InspectionLimits) -> None:
    """Inspect the bytes of a tower, read from `path`, unless they were inspected before. Raises as `inspect_towers`."""
    digest = hashlib.sha256(data).hexdigest()
    if digest in _inspected:
        return
    if path is not None:
        inspect_towers({path: digest}, limits=limits)
        return
    with TemporaryDirectory() as folder:
        (Path(folder) / "tower.onnx").write_bytes(data)
        inspect_towers({Path(folder) / "tower.onnx": digest}, limits=limits, name="tower")
