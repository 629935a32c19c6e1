"""The work of the process that looks at a tower before others load it. It imports its libraries before its memory is counted."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx  # noqa: F401
import onnxruntime  # noqa: F401

from twotower import onnx_graph
from twotower.onnx_tower import TowerError, create_session, read_tower

PROBE_SHAPES = ((1, 1), (4, 128), (1, 1_000))
"""Rows, and codes in each of their bags, that a tower is run on."""


def inspect_tower(path: Path) -> str:
    """Read the tower, load it and run it on a few rows; its SHA-256. Raises TowerError, MemoryError."""
    data = read_tower(path)
    if wrong := onnx_graph.disallowed_content(data):
        raise TowerError(wrong)
    try:
        tower = create_session(data, 1)
        for rows, length in PROBE_SHAPES:
            feed = {}
            for i in tower.get_inputs():
                shape = [rows, *(n if isinstance(n, int) else length for n in i.shape[1:])]
                feed[i.name] = np.zeros(shape, np.float32 if i.type == "tensor(float)" else np.int64)
            tower.run(None, feed)
    except Exception as e:  # onnxruntime's own errors share no other base
        said = (str(e).splitlines() or [type(e).__name__])[0]
        if isinstance(e, MemoryError) or "bad_alloc" in said or "Failed to allocate memory" in said:
            raise MemoryError from None
        raise TowerError(said if isinstance(e, TowerError) else f"gives no vectors ({said})") from None
    return hashlib.sha256(data).hexdigest()
