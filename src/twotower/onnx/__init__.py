"""Towers as ONNX graphs: their export, their inspection, and their sessions without torch.

onnxruntime (seen in 1.32) sends data on its use to its maker, and keeps an id of the machine in the home folder, unless its variable
ORT_DISABLE_TELEMETRY is 1 before it is loaded. Here it is, unless it is set already.
"""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
