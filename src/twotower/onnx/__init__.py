"""Towers as ONNX graphs: export, inspection and sessions without torch.

onnxruntime (seen in 1.32) reports its use to its maker, and writes an id of the machine into the home folder, unless
ORT_DISABLE_TELEMETRY is 1 before it is loaded. It is set here, unless it is set already.
"""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
