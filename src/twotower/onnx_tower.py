"""An exported tower, run by onnxruntime: for services, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from twotower.errors import ConfigError, RunError

OUTPUT = "vector"


class OnnxTower:
    """Inputs of U rows, as `data.feed.feed` makes them -> vectors (U, D). Several threads may call one tower."""

    def __init__(self, source: Path | str | bytes, threads: int = 1) -> None:
        """`source` is an ONNX file or its bytes; `threads` work on one call.

        Raises RunError if it is no exported tower, ConfigError if onnxruntime is not installed.
        """
        try:
            import onnxruntime
        except ImportError:
            raise ConfigError("running an exported tower needs onnxruntime: pip install onnx onnxruntime") from None
        self.name = "tower" if isinstance(source, bytes) else str(source)
        if not isinstance(source, bytes):
            try:
                # As bytes, so that no file beside it is read, whatever it names.
                source = Path(source).read_bytes()
            except OSError as e:
                raise RunError(f"{self.name}: cannot be read ({e.strerror})") from None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.enable_mem_pattern = False  # a plan of the memory is kept for every shape, and T may be anything
        options.log_severity_level = 4
        try:
            self._session: Any = onnxruntime.InferenceSession(source, options, ["CPUExecutionProvider"])
        except Exception as e:  # onnxruntime's own errors share no other base
            raise RunError(f"{self.name}: damaged, or not an ONNX file ({_line(e)})") from None
        outputs = self._session.get_outputs()
        if [o.name for o in outputs] != [OUTPUT]:
            raise RunError(f"{self.name}: not a tower (it gives {', '.join(o.name for o in outputs)}, not '{OUTPUT}')")
        self.width = int(outputs[0].shape[1])
        self.inputs = tuple(i.name for i in self._session.get_inputs())
        about = self._session.get_modelmeta().custom_metadata_map
        self.side, self.model = str(about.get("side", "")), str(about.get("model", ""))  # whose, and the model's digest

    def __call__(self, feed: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[np.float32]:
        """(U, D). Raises RunError if the inputs are not the tower's, or a code is in none of its tables."""
        if feed.keys() != set(self.inputs):
            raise RunError(
                f"{self.name}: found the inputs {', '.join(feed)}, expected {', '.join(self.inputs)}; "
                "the tower belongs to other features"
            )
        try:
            return cast(npt.NDArray[np.float32], self._session.run([OUTPUT], dict(feed))[0])
        except Exception as e:
            raise RunError(f"{self.name}: the inputs do not fit the tower ({_line(e)})") from None


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
