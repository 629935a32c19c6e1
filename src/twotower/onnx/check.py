"""Inspection of a tower file. It runs in a child process with limits, before the parent process loads the file.

onnx and onnxruntime are imported here, so that the memory limit does not count them.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnx  # noqa: F401
import onnxruntime  # noqa: F401

from twotower.errors import first_line
from twotower.files.layout import WEIGHTS
from twotower.files.readers import file_digest
from twotower.kinds import Operators
from twotower.onnx.allow_list import disallowed_content
from twotower.onnx.tower import TowerError, create_session, read_tower

PROBE_SHAPES = ((1, 1), (4, 128), (1, 1_000))
"""(rows, codes per bag) of the inputs on which a tower is run."""
NOTHING_DECLARED: Operators = MappingProxyType({})


def inspect_tower(path: Path, declared: Operators = NOTHING_DECLARED) -> str:
    """Read a tower, check its content, load it, and run it on zeros of `PROBE_SHAPES`; return its SHA-256, followed by
    a space and the SHA-256 of the weights if it names them.

    `declared` are the ONNX operators of user-defined kinds that the caller has imported. Raises TowerError if the file
    is no tower or the run fails, MemoryError if the run exceeds the memory limit.
    """
    data = read_tower(path)
    if reason := disallowed_content(data, declared):
        raise TowerError(reason)
    digests = [hashlib.sha256(data).hexdigest()]
    weights = path.parent / WEIGHTS
    if WEIGHTS.encode() in data and weights.is_file():  # the allow-list accepts no other spelling
        digests.append(file_digest(weights))
    try:
        tower = create_session(data, 1, path.parent)
        for rows, length in PROBE_SHAPES:
            feed = {}
            for i in tower.get_inputs():
                shape = [rows, *(n if isinstance(n, int) else length for n in i.shape[1:])]
                feed[i.name] = np.zeros(shape, np.float32 if i.type == "tensor(float)" else np.int64)
            tower.run(None, feed)
    except Exception as e:  # the errors of onnxruntime have no other common base
        message = first_line(e)
        if isinstance(e, MemoryError) or "bad_alloc" in message or "Failed to allocate memory" in message:
            raise MemoryError from None
        raise TowerError(message if isinstance(e, TowerError) else f"returns no vectors ({message})") from None
    return " ".join(digests)
