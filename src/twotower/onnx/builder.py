"""Builder of ONNX graphs: nodes, constants and inputs with numbered names."""

from __future__ import annotations

import json
from collections.abc import Hashable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from twotower.errors import ConfigError, RunError
from twotower.files.layout import WEIGHTS
from twotower.model.lowering import MAX_TABLE_BYTES
from twotower.onnx.allow_list import IR_VERSION, OPSET, allowed_operators
from twotower.onnx.tower import GATES_OUTPUT, VECTOR_OUTPUT, GateInfo
from twotower.version import __version__

if TYPE_CHECKING:
    from onnx import NodeProto, TensorProto, ValueInfoProto


class StoredWeights:
    """Places of the weights of a model in its safetensors file, which a graph names in place of a copy."""

    def __init__(self, model: nn.Module, path: Path, smallest: int = 4_096) -> None:
        """Read where `path` has the weights of `model`, which must be those in it.

        A constant of fewer bytes than `smallest` is copied."""
        self._smallest = smallest
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        self._places = [
            (weights.data_ptr(), weights.nbytes, 8 + size + header[name]["data_offsets"][0])
            for name, weights in model.named_parameters()
            if header[name]["dtype"] == "F32" and weights.is_contiguous()
        ]

    def place(self, value: Tensor) -> int | None:
        """Return the offset in the file of a tensor that is all or neighbouring rows of a weight, else None."""
        if value.nbytes < self._smallest or not value.is_contiguous():
            return None
        start, n = value.data_ptr(), value.nbytes
        return next(
            (at + start - first for first, size, at in self._places if first <= start <= first + size - n), None
        )


class GraphBuilder:
    """Builder of an ONNX graph: nodes, constants and inputs with numbered names."""

    def __init__(self, max_table_bytes: int = MAX_TABLE_BYTES, stored: StoredWeights | None = None) -> None:
        try:
            import onnx
        except ImportError:
            raise ConfigError("exporting a tower needs onnx and onnxruntime: pip install onnx onnxruntime") from None
        self.onnx = onnx
        self.nodes: list[NodeProto] = []
        self.inputs: list[ValueInfoProto] = []
        self.constants: list[TensorProto] = []
        self.gates: dict[GateInfo, str] = {}  # each with the name of its weights (U, fields)
        self.size, self.max_table_bytes = 0, max_table_bytes
        self._stored = stored
        self._operators = allowed_operators()
        self._known: dict[Hashable, str] = {}

    def input(self, name: str, kind: type[np.generic], shape: Sequence[str | int]) -> str:
        """Add an input of the graph and return its name."""
        elements = self.onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind))
        self.inputs.append(self.onnx.helper.make_tensor_value_info(name, elements, shape))
        return name

    def add_gate(self, name: str, fields: Sequence[str], weights: str) -> None:
        """Add the weights (U, fields) of a SENet gate to the second output."""
        self.gates[GateInfo(name, tuple(fields))] = weights

    def constant(
        self, value: Tensor | npt.NDArray[Any] | Sequence[int] | int | float, key: Hashable | None = None
    ) -> str:
        """Add a constant of int64 or float32, once per `key`, and return its name. Small arrays are their own key.

        A stored weight is named by its place."""
        place = None
        if isinstance(value, Tensor):
            place = self._stored.place(value) if self._stored else None
            value = value.detach().cpu().numpy()
        array = np.asarray(value)
        array = array.astype(np.float32 if array.dtype.kind == "f" else np.int64)
        if key is None and array.size <= 64:
            key = (array.dtype, array.shape, array.tobytes())
        if key is not None and key in self._known:
            return self._known[key]
        self.size += array.nbytes if place is None else 0
        if self.size > self.max_table_bytes:
            raise RunError(
                f"the tables of the tower exceed the {self.max_table_bytes / 2**30:.1f} GiB of one ONNX file; "
                "reduce its vocabularies (min_count, hash_buckets) or the widths of its fields"
            )
        name = f"c{len(self.constants)}"
        if place is None:
            tensor = self.onnx.numpy_helper.from_array(array.copy(order="C"), name)
        else:
            float32, elsewhere = self.onnx.TensorProto.FLOAT, self.onnx.TensorProto.EXTERNAL
            tensor = self.onnx.TensorProto(name=name, data_type=float32, dims=array.shape, data_location=elsewhere)
            for about, fact in (("location", WEIGHTS), ("offset", place), ("length", array.nbytes)):
                tensor.external_data.add(key=about, value=str(fact))
        self.constants.append(tensor)
        if key is not None:
            self._known[key] = name
        return name

    def __call__(self, kind: str, *inputs: str, **attributes: int | float | Sequence[int] | TensorProto) -> str:
        """Add a node with one output and return its name."""
        return self._node(kind, inputs, 1, attributes)[0]

    def _node(
        self, kind: str, inputs: Sequence[str], outputs: int,
        attributes: dict[str, int | float | Sequence[int] | TensorProto],
    ) -> list[str]:  # fmt: skip
        """Add a node and return the names of its outputs."""
        if kind not in self._operators or not attributes.keys() <= self._operators[kind]:
            raise ConfigError(
                f"the ONNX operator {kind} or one of its attributes ({', '.join(attributes)}) is not declared; add it "
                "to the operators of the kind that writes it"
            )
        names = [f"v{len(self.nodes)}"] if outputs == 1 else [f"v{len(self.nodes)}.{i}" for i in range(outputs)]
        node = self.onnx.helper.make_node(kind, inputs, names)
        node.attribute.extend(self.onnx.helper.make_attribute(*pair) for pair in sorted(attributes.items()))
        self.nodes.append(node)
        return names

    def reshape(self, x: str, *shape: int) -> str:
        """Reshape (U, …) to (U, *shape)."""
        return self("Reshape", x, self.constant([0, *shape]))

    def reduce(self, kind: str, x: str, axis: int, keep: bool = True) -> str:
        """Reduce one axis by "Sum", "Mean", "Max" or "SumSquare"."""
        return self(f"Reduce{kind}", x, self.constant([axis]), keepdims=int(keep))

    def split(self, x: str, widths: Sequence[int]) -> list[str]:
        """Split (U, sum of `widths`) into one array per width."""
        if len(widths) == 1:
            return [x]
        return self._node("Split", [x, self.constant(list(widths))], len(widths), {"axis": 1})

    def halves(self, x: str) -> list[str]:
        """Split (…, 2 n) into two arrays (…, n)."""
        return self._node("Split", [x], 2, {"axis": -1, "num_outputs": 2})

    def concat(self, parts: Sequence[str]) -> str:
        """Concatenate arrays (U, n) along the second axis."""
        return parts[0] if len(parts) == 1 else self("Concat", *parts, axis=1)

    def filled(self, like: str, value: float) -> str:
        """Return an array filled with `value` in the shape of `like`."""
        number = self.onnx.numpy_helper.from_array(np.array([value], np.float32))
        return self("ConstantOfShape", self("Shape", like), value=number)

    def serialize(self, output: str, width: int, metadata: dict[str, str]) -> bytes:
        """Return the ONNX file of the graph with the output `output` (U, width), and the gates if any."""
        helper = self.onnx.helper
        outputs = {VECTOR_OUTPUT: (output, width)}
        if self.gates:
            joined = self.concat(list(self.gates.values()))
            outputs[GATES_OUTPUT] = joined, sum(len(gate.fields) for gate in self.gates)
            metadata = metadata | {GATES_OUTPUT: json.dumps([asdict(gate) for gate in self.gates])}
        self.nodes += [helper.make_node("Identity", [value], [name]) for name, (value, _) in outputs.items()]
        shapes = [
            helper.make_tensor_value_info(name, self.onnx.TensorProto.FLOAT, ["U", size])
            for name, (_, size) in outputs.items()
        ]
        graph = helper.make_graph(self.nodes, "tower", self.inputs, shapes, self.constants)
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION,
            producer_name="twotower", producer_version=__version__,
        )  # fmt: skip
        helper.set_model_props(model, metadata)
        data: bytes = model.SerializeToString()
        return data
