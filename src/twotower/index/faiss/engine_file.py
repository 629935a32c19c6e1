"""Files of FAISS indexes: reading within limits, and the check of a file in a child process."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from twotower import limited_process
from twotower.errors import RunError
from twotower.index.faiss.damage import find_damage
from twotower.index.faiss.engine import FaissEngine
from twotower.index.faiss.setup import faiss

FILE_ARRAY_MAX_BYTES = 1 << 40
FILE_LOOP_MAX_ITEMS = 1 << 31
"""Limits for reading a FAISS file: bytes of one array, items of one loop."""


def read_faiss(path: Path, mmap: bool = True) -> FaissEngine:
    """Read a FAISS index from a file within size limits, memory-mapped if `mmap`, and check its structure.

    Raises RunError. A damaged file can still crash the process: `verify_file` reads untrusted files in a child process.
    """
    try:
        size = path.stat().st_size
        faiss().set_deserialization_vector_byte_limit(min(FILE_ARRAY_MAX_BYTES, 2 * size + (1 << 20)))
        faiss().set_deserialization_loop_limit(min(FILE_LOOP_MAX_ITEMS, size + (1 << 20)))
        engine: FaissEngine = faiss().read_index(str(path), faiss().IO_FLAG_MMAP_IFC if mmap else 0)
        damage = find_damage(engine)
    except (OSError, RuntimeError, ValueError, MemoryError, AttributeError, OverflowError) as e:
        lines = str(e).strip().splitlines() or [type(e).__name__]
        raise RunError(f"{path}: not a usable FAISS index ({lines[-1][:200]})") from e
    if damage:
        raise RunError(f"{path}: not a usable FAISS index ({damage})")
    return engine


VERIFY_FUNCTION = "twotower.index.faiss.engine_file:load_and_search"
"""Function that a child process runs to verify a file."""


def load_and_search(path: Path) -> str:
    """Load a FAISS file and search it. Returns an empty string; raises RunError."""
    engine = read_faiss(path, mmap=False)
    try:
        engine.search(np.ones((2, engine.d), np.float32), 10)
    except Exception as e:
        raise RunError(f"{path}: a search fails ({e})") from e
    return ""


def verify_file(
    path: Path, *, timeout: float = 120.0, memory: int | None = None, function: str = VERIFY_FUNCTION
) -> None:
    """Load and search a FAISS file in a child process. Raises RunError if that process fails, dies or exceeds a limit.

    `timeout` in seconds; `memory` in bytes of address space, by default 2 GiB and four times the file; `function` as
    "module:name".
    """
    error = verify_files([path], timeout=timeout, memory=memory, function=function)[path]
    if error:
        raise RunError(error)


def verify_files(
    paths: list[Path], *, timeout: float = 120.0, memory: int | None = None, function: str = VERIFY_FUNCTION
) -> dict[Path, str]:
    """Return the error of each file, an empty string for a sound one."""
    errors = {path: f"{path}: no such file" for path in paths if not path.is_file()}
    rest = [path for path in paths if path not in errors]
    largest = max((path.stat().st_size for path in rest), default=0)
    for path, seen in limited_process.run_limited(
        function, rest, timeout=timeout, memory=memory or (2 << 30) + 4 * largest
    ).items():
        ours = not seen.error or str(path) in seen.error
        errors[path] = seen.error if ours else f"{path}: not a usable FAISS index ({seen.error})"
    return errors
