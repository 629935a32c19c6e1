"""An exported tower, run by onnxruntime: for services, without torch.

A file is first read and run in a process of its own, which refuses what the exporter does not write.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from twotower import limited_process, onnx_graph
from twotower.errors import ConfigError, RunError

VECTOR_OUTPUT, GATES_OUTPUT = "vector", "gates"
INSPECT_FUNCTION = "twotower.onnx_check:inspect_tower"
"""The work of a process that looks at a tower."""
INSPECT_SECONDS, INSPECT_BYTES_PER_SECOND = 30.0, 2e7
"""Seconds that it may compute, and bytes of a file for which it may do one more. On a busy machine that takes longer."""
INSPECT_MEMORY = 1 << 29
"""Bytes that it may take, beside four times the file."""

_inspected: set[str] = set()
"""SHA-256 of the towers that this process has looked at, or made."""
_memory_limits: list[int] = []
"""Bytes that calls of towers may take, if they are bounded: one number."""


class TowerError(RunError):
    """A file that is no tower, or takes more than one may. `reason` is a word for counters."""

    reason = "tower"


@dataclass(frozen=True)
class GateInfo:
    """A SENet gate of a tower: it gives each of `fields`, the features it reads, a weight in (0, 1).

    `name` is "pair 1" for the gate of a tower, by the number of its pair of towers, and "pair 2, branch 3 (fm)" for
    that of a branch.
    """

    name: str
    fields: tuple[str, ...]


class OnnxTower:
    """Inputs of U rows, as `data.feed.feed` makes them -> vectors (U, D). Several threads may call one tower.

    `gates` are its SENet gates, pair by pair the tower's own before its branches'; none in files of older versions.
    """

    def __init__(self, source: Path | str | bytes, threads: int = 1) -> None:
        """`source` is an ONNX file or its bytes; `threads` work on one call.

        Raises RunError if it is no exported tower, ConfigError if onnxruntime is not installed.
        """
        self.name = "tower" if isinstance(source, bytes) else str(source)
        data = source if isinstance(source, bytes) else read_tower(Path(source))
        digest = hashlib.sha256(data).hexdigest()
        if digest not in _inspected and not isinstance(source, bytes):
            inspect_towers({Path(source): digest})
        elif digest not in _inspected:
            with TemporaryDirectory() as folder:
                (Path(folder) / "tower.onnx").write_bytes(data)
                inspect_towers({Path(folder) / "tower.onnx": digest}, name=self.name)
        try:
            self._session = create_session(data, threads)
        except TowerError as e:
            raise TowerError(f"{self.name}: {e}") from None
        outputs = {o.name: o.shape for o in self._session.get_outputs()}
        if list(outputs) not in ([VECTOR_OUTPUT], [VECTOR_OUTPUT, GATES_OUTPUT]):
            raise RunError(f"{self.name}: not a tower (it gives {', '.join(outputs)}, not '{VECTOR_OUTPUT}')")
        if not all(len(shape) == 2 and isinstance(shape[1], int) for shape in outputs.values()):
            raise RunError(f"{self.name}: not a tower (its outputs have the shapes {list(outputs.values())})")
        self.width: int = outputs[VECTOR_OUTPUT][1]
        self.inputs = tuple(i.name for i in self._session.get_inputs())
        try:
            about = self._session.get_modelmeta().custom_metadata_map
            self.gates = _parse_gates(about.get(GATES_OUTPUT, "[]"))
        except (ValueError, TypeError, KeyError, RecursionError):
            raise RunError(f"{self.name}: damaged (its metadata '{GATES_OUTPUT}' is no list of gates)") from None
        self.side, self.model = str(about.get("side", "")), str(about.get("model", ""))  # whose, and the model's digest
        weights = outputs[GATES_OUTPUT][1] if GATES_OUTPUT in outputs else 0
        if weights != (told := sum(len(gate.fields) for gate in self.gates)):
            raise RunError(f"{self.name}: damaged (its gates give {weights} weights, its metadata says {told})")

    def __call__(self, feed: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[np.float32]:
        """(U, D). Raises RunError if the inputs are not the tower's, or a code is in none of its tables."""
        return self._run(feed, VECTOR_OUTPUT)[0]

    def explain(
        self, feed: Mapping[str, npt.NDArray[Any]]
    ) -> tuple[npt.NDArray[np.float32], list[npt.NDArray[np.float32]]]:
        """The vectors (U, D), and for each of `gates` its weights (U, fields). Raises RunError as a call does."""
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
            return cast(list[npt.NDArray[np.float32]], self._session.run(outputs, dict(feed)))
        except Exception as e:
            raise RunError(f"{self.name}: the inputs do not fit the tower ({_first_line(e)})") from None


# ---- before it is trusted


def inspect_towers(
    towers: Mapping[Path, str], *, room: int | None = None, name: str = "", base_seconds: float = INSPECT_SECONDS
) -> None:
    """Look at towers, by their SHA-256, in a process of its own: what they hold, whether they load, whether they answer.

    One that was looked at before, under whatever name, is not looked at again. `room` in bytes is the most that one may
    take, if that is less than four times its file and half a GiB. Raises TowerError, ConfigError if onnx or onnxruntime is
    not installed.
    """
    new = [path for path, digest in towers.items() if digest not in _inspected]
    try:
        largest = max((path.stat().st_size for path in new), default=0)
    except OSError as e:
        raise RunError(f"{e.filename}: cannot be read ({e.strerror})") from None
    most = INSPECT_MEMORY + 4 * largest
    memory = most if room is None else max(0, min(most, room))
    seconds = base_seconds + largest / INSPECT_BYTES_PER_SECOND
    looks = limited_process.run_limited(INSPECT_FUNCTION, new, timeout=4 * seconds, computing=seconds, memory=memory)
    for path, seen in looks.items():
        if seen.error:
            raise TowerError(f"{name or path}: {seen.error}")
        if seen.value != towers[path]:
            raise TowerError(f"{name or path}: was changed while it was read")
        _inspected.add(seen.value)


def trust_tower(data: bytes, name: str) -> None:
    """Let a tower that this process has built itself be loaded without another that looks at it first.

    Raises TowerError if it holds what no tower does.
    """
    if wrong := onnx_graph.disallowed_content(data):
        raise TowerError(f"{name}: {wrong}")
    _inspected.add(hashlib.sha256(data).hexdigest())


def limit_memory(memory: int) -> None:
    """Let the calls of all towers that this process loads from now on take at most `memory` bytes together, without their
    tables; a call that needs more is an error. The first bound stays."""
    if not _memory_limits:
        import onnxruntime

        kinds = onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, onnxruntime.OrtMemType.DEFAULT
        place = onnxruntime.OrtMemoryInfo("Cpu", kinds[0], 0, kinds[1])
        onnxruntime.create_and_register_allocator(place, onnxruntime.OrtArenaCfg({"max_mem": memory}))
        _memory_limits.append(memory)


def read_tower(path: Path) -> bytes:
    """As bytes, so that no file beside it is read, whatever it names. Raises RunError."""
    try:
        return path.read_bytes()
    except OSError as e:
        raise RunError(f"{path}: cannot be read ({e.strerror})") from None


def create_session(data: bytes, threads: int) -> Any:
    """Of onnxruntime. The bytes have been looked at, or this is the process that does it."""
    try:
        import onnxruntime
    except ImportError:
        raise ConfigError("running an exported tower needs onnxruntime: pip install onnx onnxruntime") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.load_model_format", "ONNX")  # or bytes could be taken for its own format
    if _memory_limits:
        options.add_session_config_entry("session.use_env_allocators", "1")
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    options.enable_mem_pattern = False  # a plan of the memory is kept for every shape, and T may be anything
    options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(data, options, ["CPUExecutionProvider"])
    except Exception as e:  # onnxruntime's own errors share no other base
        raise TowerError(f"cannot be loaded ({_first_line(e)})") from None


def _parse_gates(text: str) -> list[GateInfo]:
    """Of the metadata of a file. Raises ValueError, TypeError, KeyError or RecursionError if it is something else."""
    gates = []
    for entry in json.loads(text):
        name, fields = entry["name"], entry["fields"]
        if not isinstance(name, str) or not isinstance(fields, list) or not all(isinstance(f, str) for f in fields):
            raise TypeError
        gates.append(GateInfo(name, tuple(fields)))
    return gates


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
