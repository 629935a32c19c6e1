"""Allow-list for the ONNX file of a tower: the content that the exporter writes, and nothing else.

The exporter reads its operators from this list. A file with other content is refused before onnxruntime reads it, as
onnxruntime follows paths and runs loops in a file.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from twotower.errors import ConfigError
from twotower.files.layout import WEIGHTS
from twotower.kinds import Operators, outside_operators

if TYPE_CHECKING:
    from google.protobuf.message import Message

OPSET, IR_VERSION = 18, 8  # of 2023: current ONNX runtimes read both

_WITHOUT_ATTRIBUTES = (
    "Add", "Div", "Erf", "Exp", "GreaterOrEqual", "Identity", "MatMul", "Max", "Min", "Mul", "Pow", "Range", "Relu",
    "Reshape", "Sigmoid", "Slice", "Sqrt", "Squeeze", "Sub", "Tanh", "Unsqueeze",
)  # fmt: skip
OPERATORS: dict[str, set[str]] = {
    **{operator: set() for operator in _WITHOUT_ATTRIBUTES},
    "Cast": {"to"},
    "Concat": {"axis"},
    "ConstantOfShape": {"value"},
    "CumSum": {"exclusive"},
    "Flatten": {"axis"},
    "Gather": {"axis"},
    "GatherElements": {"axis"},
    "Gemm": {"transB"},
    "LayerNormalization": {"axis", "epsilon"},
    "LeakyRelu": {"alpha"},
    "ReduceMax": {"keepdims"},
    "ReduceMean": {"keepdims"},
    "ReduceSum": {"keepdims"},
    "ReduceSumSquare": {"keepdims"},
    "Shape": {"end", "start"},
    "Softmax": {"axis"},
    "Split": {"axis", "num_outputs"},
    "Transpose": {"perm"},
}
"""Allowed operators of the default ONNX domain, with their allowed attributes."""
MESSAGE_FIELDS: dict[str, set[str]] = {
    "ModelProto": {"ir_version", "opset_import", "producer_name", "producer_version", "graph", "metadata_props"},
    "OperatorSetIdProto": {"domain", "version"},
    "StringStringEntryProto": {"key", "value"},
    "GraphProto": {"name", "node", "initializer", "input", "output"},
    "NodeProto": {"op_type", "input", "output", "attribute"},
    "AttributeProto": {"name", "type", "f", "i", "ints", "t"},
    "TensorProto": {"name", "data_type", "dims", "raw_data", "data_location", "external_data"},
    "ValueInfoProto": {"name", "type"},
    "TypeProto": {"tensor_type"},
    "TypeProto.Tensor": {"elem_type", "shape"},
    "TensorShapeProto": {"dim"},
    "TensorShapeProto.Dimension": {"dim_param", "dim_value"},
}
"""Allowed protobuf messages and fields: no functions, subgraphs or sparse tensors."""
ELEMENT_TYPES = {1, 7}
"""Allowed element types of tensors: float32 and int64."""
PLACE_KEYS = {"location", "offset", "length"}
"""Keys of the place of an initializer of float32 in `WEIGHTS`, the only other file, in the folder of the tower."""
METADATA_KEYS = {"side", "model", "gates"}
"""Allowed metadata keys."""


def allowed_operators(declared: Operators | None = None) -> dict[str, set[str]]:
    """Return the operators of the allow-list and the `declared` ones, by default of imported foreign kinds."""
    found = {operator: set(attributes) for operator, attributes in OPERATORS.items()}
    for operator, attributes in (outside_operators() if declared is None else declared).items():
        found.setdefault(operator, set()).update(attributes)
    return found


def disallowed_content(data: bytes, declared: Operators | None = None) -> str:
    """Describe the first content of an ONNX file that is not allowed, with the `declared` operators, else "".

    Raises ConfigError if onnx is not installed.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError:
        raise ConfigError("checking a tower needs onnx: pip install onnx onnxruntime") from None

    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError:
        return "damaged, or not an ONNX file"
    if not model.HasField("graph"):
        return "damaged, or not an ONNX file"
    part = next(_disallowed_parts(model, allowed_operators(declared)), "")
    return part and (
        f"not a tower: it holds {part}, which no exported tower holds and no kind of the modules `kinds` declares; "
        "publish the model again"
    )


def _disallowed_parts(message: Message, operators: Operators, field_of: str = "") -> Iterator[str]:
    """Yield a description of every part of a message, the value of the field `field_of`, that is not allowed."""
    from google.protobuf.message import Message
    from google.protobuf.unknown_fields import UnknownFieldSet

    kind = message.DESCRIPTOR.full_name.removeprefix("onnx.")
    if kind == "ModelProto":
        opsets = [(opset.domain, opset.version) for opset in message.opset_import]
        if (opsets, message.ir_version) != ([("", OPSET)], IR_VERSION):
            yield f"operators of {opsets!r:.80} in IR {message.ir_version}"
    elif kind == "TensorProto":
        keys, place = [e.key for e in message.external_data], {e.key: e.value for e in message.external_data}
        if (message.data_location or keys) and not (
            message.data_location == message.EXTERNAL
            and sorted(keys) == sorted(PLACE_KEYS)  # readers of a repeated key differ in the value that they take
            and place["location"] == WEIGHTS
            and (field_of, message.data_type) == ("GraphProto.initializer", message.FLOAT)
            and not message.HasField("raw_data")
        ):
            yield f"the tensor {message.name!r:.60} in another file ({place.get('location', '')!r:.60})"
        if message.data_type not in ELEMENT_TYPES:
            yield f"the tensor {message.name!r:.60} of element type {message.data_type}"
    elif kind == "TypeProto.Tensor" and message.elem_type not in ELEMENT_TYPES:
        yield f"a value of element type {message.elem_type}"
    elif kind == "StringStringEntryProto" and message.key not in METADATA_KEYS | PLACE_KEYS:
        yield f"the metadata {message.key!r:.60}"
    elif kind == "NodeProto":
        if message.domain or message.op_type not in operators:
            yield f"the operator {message.domain + ' ' * bool(message.domain) + message.op_type!r:.80}"
        elif unknown := {a.name for a in message.attribute} - {*operators[message.op_type]}:
            yield f"the attribute {min(unknown)!r:.60} of {message.op_type}"
    if len(UnknownFieldSet(message)):
        yield f"unknown parts of {kind}"
    for field, value in message.ListFields():
        if field.name not in MESSAGE_FIELDS.get(kind, ()):
            yield f"{kind}.{field.name}"
        if field.message_type is not None:
            for part in [value] if isinstance(value, Message) else value:
                yield from _disallowed_parts(part, operators, f"{kind}.{field.name}")
