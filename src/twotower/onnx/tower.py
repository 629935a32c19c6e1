"""Exported towers, run by onnxruntime without torch.

A file is first inspected in a child process, which refuses content that the exporter does not write.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from twotower.errors import RunError, first_line
from twotower.onnx.inspection import INSPECTION_LIMITS, InspectionLimits, inspect_bytes
from twotower.onnx.session import TowerError, create_session, read_tower

VECTOR_OUTPUT, GATES_OUTPUT = "vector", "gates"


@dataclass(frozen=True)
class GateInfo:
    """SENet gate of a tower: a weight in (0, 1) for each of `fields`, the features of the tower.

    `name` is "pair 1" for the gate of a tower, by the number of its pair of towers, and "pair 2, branch 3 (fm)" for
    that of a branch.
    """

    name: str
    fields: tuple[str, ...]


class OnnxTower:
    """Exported tower: inputs of U rows, as `inputs.feed.feed` makes them -> vectors (U, D). Threads may share one tower.

    `gates` are its SENet gates, for each pair the tower's own before its branches'; empty without any.
    """

    def __init__(
        self, source: Path | str | bytes, threads: int = 1, limits: InspectionLimits = INSPECTION_LIMITS
    ) -> None:
        """Load an ONNX file or its bytes; one call runs on `threads` threads, the inspection within `limits`.

        Raises RunError if it is not an exported tower, ConfigError if onnxruntime is not installed.
        """
        self.name = "tower" if isinstance(source, bytes) else str(source)
        path = None if isinstance(source, bytes) else Path(source)
        data = source if isinstance(source, bytes) else read_tower(Path(source))
        inspect_bytes(data, path, limits)
        try:
            self._session = create_session(data, threads)
        except TowerError as e:
            raise TowerError(f"{self.name}: {e}") from None
        outputs = {o.name: o.shape for o in self._session.get_outputs()}
        if list(outputs) not in ([VECTOR_OUTPUT], [VECTOR_OUTPUT, GATES_OUTPUT]):
            raise RunError(
                f"{self.name}: not a tower (its outputs are {', '.join(outputs)}, expected '{VECTOR_OUTPUT}')"
            )
        if not all(len(shape) == 2 and isinstance(shape[1], int) for shape in outputs.values()):
            raise RunError(f"{self.name}: not a tower (its outputs have the shapes {list(outputs.values())})")
        self.width: int = outputs[VECTOR_OUTPUT][1]
        self.inputs = tuple(i.name for i in self._session.get_inputs())
        try:
            about = self._session.get_modelmeta().custom_metadata_map
            self.gates = _parse_gates(about.get(GATES_OUTPUT, "[]"))
        except (ValueError, TypeError, KeyError, RecursionError):
            raise RunError(f"{self.name}: damaged (its metadata '{GATES_OUTPUT}' is not a list of gates)") from None
        self.side, self.model = str(about.get("side", "")), str(about.get("model", ""))  # "user" or "item"; its digest
        weights = outputs[GATES_OUTPUT][1] if GATES_OUTPUT in outputs else 0
        if weights != (expected := sum(len(gate.fields) for gate in self.gates)):
            raise RunError(f"{self.name}: damaged (its gates return {weights} weights, its metadata lists {expected})")

    def __call__(self, feed: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[np.float32]:
        """Return vectors (U, D). Raises RunError for inputs of other features and for codes beyond a table."""
        return self._run(feed, VECTOR_OUTPUT)[0]

    def explain(
        self, feed: Mapping[str, npt.NDArray[Any]]
    ) -> tuple[npt.NDArray[np.float32], list[npt.NDArray[np.float32]]]:
        """Return the vectors (U, D), and for each of `gates` its weights (U, fields). Raises RunError as a call does."""
        if not self.gates:
            return self(feed), []
        vectors, weights = self._run(feed, VECTOR_OUTPUT, GATES_OUTPUT)
        ends = np.cumsum([len(gate.fields) for gate in self.gates])
        return vectors, np.split(weights, ends[:-1], axis=1)

    def _run(self, feed: Mapping[str, npt.NDArray[Any]], *outputs: str) -> list[npt.NDArray[np.float32]]:
        if feed.keys() != set(self.inputs):
            raise RunError(
                f"{self.name}: found the inputs {', '.join(feed)}, expected {', '.join(self.inputs)}; "
                "the tower belongs to other features"
            )
        try:
            vectors: list[npt.NDArray[np.float32]] = self._session.run(outputs, dict(feed))
        except Exception as e:
            raise RunError(f"{self.name}: the inputs do not fit the tower ({first_line(e)})") from None
        return vectors


def _parse_gates(text: str) -> list[GateInfo]:
    """Parse the metadata "gates" of a file. Raises ValueError, TypeError, KeyError or RecursionError if it is
    malformed."""
    gates = []
    for entry in json.loads(text):
        name, fields = entry["name"], entry["fields"]
        if not isinstance(name, str) or not isinstance(fields, list) or not all(isinstance(f, str) for f in fields):
            raise TypeError
        gates.append(GateInfo(name, tuple(fields)))
    return gates
