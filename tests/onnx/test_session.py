"""Sessions of towers in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CODE = """
from onnx import TensorProto, helper
from twotower.onnx.session import create_session
import os
x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [x], [y])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
create_session(model.SerializeToString(), 1)
print(os.environ["ORT_DISABLE_TELEMETRY"])
"""


def test_fault_G32_a_session_sends_nothing_home_and_leaves_no_file_there(tmp_path: Path) -> None:
    """onnxruntime would make an id of the machine and a queue of what is to be sent in the folder of caches."""
    env = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    env |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", CODE], env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    asked = subprocess.run(
        [sys.executable, "-c", "import os, twotower.onnx; print(os.environ['ORT_DISABLE_TELEMETRY'])"],
        env=env | {"ORT_DISABLE_TELEMETRY": "0"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert asked.stdout == "0\n"
