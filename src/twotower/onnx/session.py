"""Sessions of onnxruntime over the bytes of a tower."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from twotower.errors import ConfigError, RunError, first_line

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

_memory_limits: list[int] = []
"""Bytes that calls of towers may use together: at most one entry; empty without a limit."""


class TowerError(RunError):
    """Error of a file that is not a tower or exceeds the inspection limits. `reason` labels counters."""

    reason = "tower"


def read_tower(path: Path) -> bytes:
    """Return the bytes of a file. (onnxruntime resolves paths in a model only if it is given a path.) Raises RunError."""
    try:
        return path.read_bytes()
    except OSError as e:
        raise RunError(f"{path}: cannot be read ({e.strerror})") from None


def limit_memory(memory: int) -> None:
    """Limit the memory of calls of all towers that this process loads later to `memory` bytes together, without their
    tables; a call that needs more raises. The first limit stays."""
    if not _memory_limits:
        import onnxruntime

        kinds = onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, onnxruntime.OrtMemType.DEFAULT
        cpu = onnxruntime.OrtMemoryInfo("Cpu", kinds[0], 0, kinds[1])
        onnxruntime.create_and_register_allocator(cpu, onnxruntime.OrtArenaCfg({"max_mem": memory}))
        _memory_limits.append(memory)


def create_session(data: bytes, threads: int) -> InferenceSession:
    """Create an onnxruntime session for inspected bytes, or within the child process that inspects them.

    Raises TowerError if they cannot be loaded, ConfigError if onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ImportError:
        raise ConfigError("running an exported tower needs onnxruntime: pip install onnx onnxruntime") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.load_model_format", "ONNX")  # else bytes may be read as the ORT format
    if _memory_limits:
        options.add_session_config_entry("session.use_env_allocators", "1")
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    options.enable_mem_pattern = False  # onnxruntime would keep a memory plan for every T
    options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(data, options, ["CPUExecutionProvider"])
    except Exception as e:  # the errors of onnxruntime have no other common base
        raise TowerError(f"cannot be loaded ({first_line(e)})") from None
