"""Exported towers, run by onnxruntime without torch.

A child process inspects a file first, and refuses content that the exporter does not write.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from pydantic import JsonValue, TypeAdapter, ValidationError

from twotower import limited_process
from twotower.errors import ConfigError, RunError, first_line
from twotower.files import JsonData, inspections
from twotower.files.layout import WEIGHTS
from twotower.files.readers import file_digest, read_checked
from twotower.kinds import outside_operators
from twotower.onnx.allow_list import disallowed_content

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

INSPECT_FUNCTION = "twotower.onnx.check:inspect_tower"
"""Function of the child process that inspects a tower."""
INSPECT_SECONDS = 30.0
"""CPU seconds for the inspection of a small tower."""

_built: set[tuple[str, str]] = set()
"""SHA-256 of the towers that this process has built, each with the SHA-256 of the weights beside it."""


@dataclass(frozen=True)
class InspectionLimits:
    """Limits of the child process that inspects towers."""

    cpu_seconds: float = INSPECT_SECONDS
    """CPU seconds, without the seconds for the size of the file. Wall time is limited to four times as long."""
    bytes_per_cpu_second: float = 2e7
    """Bytes of the tower and its weights per additional CPU second."""
    memory: int = 1 << 29
    """Bytes of memory in addition to four times the tower and its weights."""
    max_memory: int | None = None
    """Bytes of memory in total. None: no further limit."""

    def seconds(self, size: int) -> float:
        """Return the CPU seconds for a tower and weights of `size` bytes."""
        return self.cpu_seconds + size / self.bytes_per_cpu_second

    def total_memory(self, size: int) -> int:
        """Return the bytes of memory for a tower and weights of `size` bytes."""
        memory = self.memory + 4 * size
        return memory if self.max_memory is None else max(0, min(memory, self.max_memory))


INSPECTION_LIMITS = InspectionLimits()


def inspect_towers(
    towers: Mapping[Path, str], weights: str = "", *, limits: InspectionLimits = INSPECTION_LIMITS, name: str = ""
) -> None:
    """Inspect tower files, with their SHA-256, in a child process: content, loading and a call.

    `weights` is the SHA-256 of the weights in their folder, empty without weights. Towers that this process has built
    are skipped, and towers that have passed the same check of the same content within the same limits, here or in
    another process of the user. Errors name a file by `name`, or if empty by its path. Raises TowerError if a file is
    refused or a digest differs, RunError if it cannot be read, ConfigError if onnx or onnxruntime is not installed.
    """
    declared: dict[str, JsonValue] = {name: [*sorted(names)] for name, names in outside_operators().items()}
    passes, sizes = dict[Path, str](), dict[Path, int]()
    for path, digest in towers.items():
        if (digest, weights) in _built:
            continue
        try:
            size = _size(path)
        except OSError as e:
            raise RunError(f"{e.filename}: cannot be read ({e.strerror})") from None
        within = limits.seconds(size), limits.total_memory(size)
        facts: list[JsonData] = [digest, weights, *within, *_versions(), declared]
        passed = inspections.pass_name(INSPECT_FUNCTION, Path(__file__).parent, facts)
        if not inspections.has_passed(passed):
            passes[path], sizes[path] = passed, size
    largest = max(sizes.values(), default=0)
    seconds, memory = limits.seconds(largest), limits.total_memory(largest)
    results = limited_process.run_limited(
        INSPECT_FUNCTION, [*passes], timeout=4 * seconds, cpu_seconds=seconds, memory=memory,
        options={"declared": declared},
    )  # fmt: skip
    for path, result in results.items():
        if result.error:
            raise TowerError(f"{name or path}: {result.error}")
        digest, _, used = result.value.partition(" ")
        if digest != towers[path] or used not in ("", weights):
            raise TowerError(f"{name or path}: was changed while it was read")
        inspections.keep_pass(passes[path])


@cache
def _versions() -> tuple[str, str]:
    """Return the versions of the libraries that inspect. Raises ConfigError if one is not installed."""
    try:
        import onnxruntime

        return metadata.version("onnx"), onnxruntime.__version__
    except ImportError:
        raise ConfigError("checking a tower needs onnx and onnxruntime: pip install onnx onnxruntime") from None


def _size(path: Path) -> int:
    """Return the bytes of a tower and of the weights beside it."""
    weights = path.parent / WEIGHTS
    return path.stat().st_size + (weights.stat().st_size if weights.is_file() else 0)


def trust_tower(data: bytes, name: str, weights: str = "") -> None:
    """Mark a tower of this process as inspected, with the SHA-256 of its `weights`. Raises TowerError for content that
    is not allowed."""
    if reason := disallowed_content(data):
        raise TowerError(f"{name}: {reason}")
    _built.add((hashlib.sha256(data).hexdigest(), weights))


def inspect_bytes(data: bytes, path: Path | None, weights: str, limits: InspectionLimits) -> None:
    """Inspect the bytes of a tower, read from `path`, as `inspect_towers` does. Without `path`, only a tower that this
    process has built may name weights."""
    digest = hashlib.sha256(data).hexdigest()
    if (digest, weights) in _built:
        return
    if path is not None:
        inspect_towers({path: digest}, weights, limits=limits)
        return
    with TemporaryDirectory() as folder:
        (Path(folder) / "tower.onnx").write_bytes(data)
        inspect_towers({Path(folder) / "tower.onnx": digest}, limits=limits, name="tower")


_memory_limits: list[int] = []
"""Bytes that calls of all towers may use: one entry, or empty without a limit."""


class TowerError(RunError):
    """Error of a file that is not a tower or exceeds the inspection limits. `reason` labels counters."""

    reason = "tower"


def read_tower(path: Path) -> bytes:
    """Return the bytes of a file; onnxruntime then resolves no paths that it names. Raises RunError."""
    try:
        return path.read_bytes()
    except OSError as e:
        raise RunError(f"{path}: cannot be read ({e.strerror})") from None


def limit_memory(memory: int) -> None:
    """Limit the memory of calls of all towers loaded later to `memory` bytes in total, without their tables.

    A call that needs more raises. The first limit stays."""
    if not _memory_limits:
        import onnxruntime

        kinds = onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, onnxruntime.OrtMemType.DEFAULT
        cpu = onnxruntime.OrtMemoryInfo("Cpu", kinds[0], 0, kinds[1])
        onnxruntime.create_and_register_allocator(cpu, onnxruntime.OrtArenaCfg({"max_mem": memory}))
        _memory_limits.append(memory)


def create_session(data: bytes, threads: int, folder: Path) -> InferenceSession:
    """Create an onnxruntime session of inspected bytes, or of any bytes in the child process that inspects them.

    Tensors that are not in the bytes are mapped from `WEIGHTS` in `folder`. Raises TowerError if the bytes cannot be
    loaded, ConfigError if onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ImportError:
        raise ConfigError("running an exported tower needs onnxruntime: pip install onnx onnxruntime") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.load_model_format", "ONNX")  # else bytes may be read as the ORT format
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    if _memory_limits:
        options.add_session_config_entry("session.use_env_allocators", "1")
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    options.enable_mem_pattern = False  # onnxruntime would keep a memory plan for every T
    options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(data, options, ["CPUExecutionProvider"])
    except Exception as e:  # the errors of onnxruntime have no other common base
        raise TowerError(f"cannot be loaded ({first_line(e)})") from None


VECTOR_OUTPUT, GATES_OUTPUT = "vector", "gates"


@dataclass(frozen=True)
class GateInfo:
    """SENet gate of a tower: a weight in (0, 1) for each of `fields`, the features of the tower.

    `name` is "pair 1" for the gate of a tower, "pair 2, branch 3 (fm)" for the gate of a branch.
    """

    name: str
    fields: tuple[str, ...]


_GATES = TypeAdapter(list[GateInfo])


class OnnxTower:
    """Exported tower: inputs of U rows, as `gather.feed` makes them -> vectors (U, D). Threads may share one tower.

    `gates` are its SENet gates, for each pair the gate of the tower before the gates of its branches.
    """

    def __init__(
        self, source: Path | str | bytes, threads: int = 1, limits: InspectionLimits = INSPECTION_LIMITS,
        folder: Path | None = None, weights: str = "",
    ) -> None:  # fmt: skip
        """Load an ONNX file or its bytes. A call runs on `threads` threads, the inspection within `limits`.

        `folder` has the weights that bytes lack; a file has them in its own folder. `weights` is their SHA-256; if
        empty, the weights are read. Raises RunError if it is no exported tower, ConfigError if onnxruntime is not
        installed.
        """
        self.name = "tower" if isinstance(source, bytes) else str(source)
        path = None if isinstance(source, bytes) else Path(source)
        data = source if isinstance(source, bytes) else read_tower(Path(source))
        folder = folder or (path.parent if path else Path(os.devnull))
        if not weights and (folder / WEIGHTS).is_file():
            weights = read_checked(folder / WEIGHTS, file_digest)
        inspect_bytes(data, path, weights, limits)
        try:
            self._session = create_session(data, threads, folder)
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
            self.gates = _GATES.validate_json(about.get(GATES_OUTPUT, "[]"), strict=True)
        except ValidationError:
            raise RunError(f"{self.name}: damaged (its metadata '{GATES_OUTPUT}' is not a list of gates)") from None
        self.side, self.model = str(about.get("side", "")), str(about.get("model", ""))  # "user" or "item"; its digest
        gates = outputs[GATES_OUTPUT][1] if GATES_OUTPUT in outputs else 0
        if gates != (expected := sum(len(gate.fields) for gate in self.gates)):
            raise RunError(f"{self.name}: damaged (its gates return {gates} weights, its metadata lists {expected})")

    def __call__(self, feed: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[np.float32]:
        """Return vectors (U, D). Raises RunError for inputs of other features, and for codes beyond a table."""
        return self._run(feed, VECTOR_OUTPUT)[0]

    def explain(
        self, feed: Mapping[str, npt.NDArray[Any]]
    ) -> tuple[npt.NDArray[np.float32], list[npt.NDArray[np.float32]]]:
        """Return the vectors (U, D), and the weights (U, fields) of each of `gates`. Raises as a call."""
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
