"""Towers that none of ours is: what somebody could put into a bundle who can write to a store."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from twotower.files.layout import MANIFEST
from twotower.store.manifest import manifest_digest

WIDTH = 8
SECRET = "secret"
"""A file of the machine, beside which the process runs."""
FLOAT, INT = TensorProto.FLOAT, TensorProto.INT64
Model = Any


def plain(data: bytes | None = None) -> Model:
    """A tower, or the one in `data`: lookups (U, 2) -> vectors (U, 8)."""
    if data is not None:
        return onnx.load_from_string(data)
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "lookup"], ["rows"], axis=0),
            helper.make_node("ReduceSum", ["rows", "axes"], ["vector"], keepdims=0),
        ],
        "tower",
        [helper.make_tensor_value_info("lookup", INT, ["U", 2])],
        [helper.make_tensor_value_info("vector", FLOAT, ["U", WIDTH])],
        [
            numpy_helper.from_array(np.ones((5, WIDTH), np.float32), "table"),
            numpy_helper.from_array(np.array([1]), "axes"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def width(model: Model) -> int:
    return int(model.graph.output[0].type.tensor_type.shape.dim[1].dim_value)


def plus(model: Model, value: str, *nodes: Any) -> Model:
    """The tower with `value`, a number or a vector that `nodes` make, added to its vectors."""
    for node in model.graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                if name == "vector":
                    names[i] = "vector before"
    model.graph.node.extend(nodes)
    model.graph.node.append(helper.make_node("Add", ["vector before", value], ["vector"]))
    return model


def outside(model: Model, name: str = "") -> TensorProto:
    """As many float32 as a vector has, in another file."""
    tensor = TensorProto(name=name, data_type=FLOAT, dims=[width(model)], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", SECRET), ("offset", "0"), ("length", str(4 * width(model)))):
        tensor.external_data.add(key=key, value=value)
    return tensor


def _body(name: str, nodes: list[Any], model: Model, *inputs: Any, tensors: list[Any] | None = None) -> Any:
    """A graph whose last node, and whose condition "more" if there is one, are its outputs."""
    outputs = [helper.make_tensor_value_info("more", TensorProto.BOOL, [])] if nodes[0].output[0] == "more" else []
    outputs.append(helper.make_tensor_value_info(nodes[-1].output[0], FLOAT, [width(model)]))
    return helper.make_graph(nodes, name, list(inputs), outputs, tensors or [])


def _leaf(model: Model) -> Any:
    return _body("leaf", [helper.make_node("Identity", ["file"], ["read"])], model, tensors=[outside(model, "file")])


def _if(model: Model, body: Any, output: str = "read") -> list[Any]:
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), f"whether {output}"))
    return [helper.make_node("If", [f"whether {output}"], [output], then_branch=body, else_branch=body)]


def _loop(model: Model, inner: list[Any]) -> list[Any]:
    """A loop, gone through once, whose body are the nodes `inner`, one of which gives "read"."""
    body = _body(
        "body", [helper.make_node("Identity", ["go"], ["more"]), *inner], model,
        helper.make_tensor_value_info("i", INT, []), helper.make_tensor_value_info("go", TensorProto.BOOL, []),
    )  # fmt: skip
    for name, value in (("one", 1), ("yes", True), ("first", [0])):
        model.graph.initializer.append(numpy_helper.from_array(np.array(value), name))
    return [
        helper.make_node("Loop", ["one", "yes"], ["many"], body=body),
        helper.make_node("ReduceSum", ["many", "first"], ["sum"], keepdims=0),
    ]


def initialiser(model: Model) -> Model:
    rows = outside(model, "file")
    rows.dims.insert(0, 1)
    model.graph.initializer.extend([rows, numpy_helper.from_array(np.array([1]), "one")])
    return plus(
        model, "read",
        helper.make_node("Sub", ["lookup", "lookup"], ["zeros"]),
        helper.make_node("Gather", ["file", "zeros"], ["many"], axis=0),
        helper.make_node("ReduceSum", ["many", "one"], ["read"], keepdims=0),
    )  # fmt: skip


def sparse_initialiser(model: Model) -> Model:
    part = numpy_helper.from_array(np.arange(width(model)))
    sparse = helper.make_sparse_tensor(outside(model, "read"), part, [width(model)])
    model.graph.sparse_initializer.append(sparse)
    return plus(model, "read")


def constant(model: Model) -> Model:
    return plus(model, "read", helper.make_node("Constant", [], ["read"], value=outside(model)))


def sparse_constant(model: Model) -> Model:
    part = numpy_helper.from_array(np.arange(width(model)))
    sparse = helper.make_sparse_tensor(outside(model, "values"), part, [width(model)])
    return plus(model, "read", helper.make_node("Constant", [], ["read"], sparse_value=sparse))


def attribute(model: Model) -> Model:
    """In an operator that towers have."""
    model.graph.initializer.append(numpy_helper.from_array(np.array([width(model)]), "shape"))
    value = outside(model)
    value.dims[:], value.external_data[2].value = [1], "4"
    return plus(model, "read", helper.make_node("ConstantOfShape", ["shape"], ["read"], value=value))


def list_of_tensors(model: Model) -> Model:
    node = helper.make_node("Identity", ["vector before"], ["read"])
    node.attribute.append(helper.make_attribute("many", [outside(model)]))
    return plus(model, "read", node)


def subgraph(model: Model) -> Model:
    return plus(model, "read", *_if(model, _leaf(model)))


def list_of_subgraphs(model: Model) -> Model:
    node = helper.make_node("Identity", ["vector before"], ["read"])
    node.attribute.append(helper.make_attribute("many", [_leaf(model)]))
    return plus(model, "read", node)


def loop(model: Model) -> Model:
    return plus(model, "sum", *_loop(model, [helper.make_node("Constant", [], ["read"], value=outside(model))]))


def scan(model: Model) -> Model:
    body = _body(
        "body", [helper.make_node("Add", ["x", "file"], ["read"])], model,
        helper.make_tensor_value_info("x", FLOAT, [width(model)]), tensors=[outside(model, "file")],
    )  # fmt: skip
    node = helper.make_node("Scan", ["vector before"], ["read"], body=body, num_scan_inputs=1)
    return plus(model, "read", node)


def deep(model: Model) -> Model:
    """In a branch in a branch in a loop."""
    leaf = _body(
        "leaf", [helper.make_node("Identity", ["file"], ["innermost"])], model, tensors=[outside(model, "file")]
    )
    branch = _body("branch", _if(model, leaf, "inner"), model)
    return plus(model, "sum", *_loop(model, _if(model, branch)))


def function(model: Model) -> Model:
    """In a function of the model."""
    nodes = [helper.make_node("Constant", [], ["read"], value=outside(model))]
    return _with_function(model, nodes)


def default_of_a_function(model: Model) -> Model:
    node = helper.make_node("Constant", [], ["read"])
    node.attribute.append(onnx.AttributeProto(name="value", ref_attr_name="file", type=onnx.AttributeProto.TENSOR))
    model = _with_function(model, [node])
    model.functions[0].attribute_proto.append(helper.make_attribute("file", outside(model)))
    return model


def _with_function(model: Model, nodes: list[Any], domain: str = "local", name: str = "Read") -> Model:
    opsets = [helper.make_opsetid("", 18)]
    model.functions.append(helper.make_function(domain, name, [], ["read"], nodes, opsets))
    if domain:
        model.opset_import.append(helper.make_opsetid(domain, 1))
    return plus(model, "read", helper.make_node(name, [], ["read"], domain=domain))


def training(model: Model) -> Model:
    model.training_info.add().initialization.CopyFrom(_leaf(model))
    return model


PLACES: list[Callable[[Model], Model]] = [
    initialiser, sparse_initialiser, constant, sparse_constant, attribute, list_of_tensors, subgraph, list_of_subgraphs,
    loop, scan, deep, function, default_of_a_function, training,
]  # fmt: skip
"""Everywhere a tensor can stand."""


def foreign_operator(model: Model) -> Model:
    return plus(model, "read", helper.make_node("Abs", ["vector before"], ["read"]))


def foreign_domain(model: Model) -> Model:
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return plus(model, "read", helper.make_node("Gelu", ["vector before"], ["read"], domain="com.microsoft"))


def foreign_import(model: Model) -> Model:
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return model


def foreign_opset(model: Model) -> Model:
    model.opset_import[0].version = 17
    return model


def foreign_attribute(model: Model) -> Model:
    node = helper.make_node("ReduceSum", ["vector before"], ["read"], keepdims=1, noop_with_empty_axes=1)
    return plus(model, "read", node)


def function_with_a_foreign_operator(model: Model) -> Model:
    value = numpy_helper.from_array(np.array([1.0], np.float32))
    return _with_function(
        model, [helper.make_node("Constant", [], ["one"], value=value), helper.make_node("Abs", ["one"], ["read"])]
    )


def function_under_the_name_of_an_operator(model: Model) -> Model:
    value = numpy_helper.from_array(np.array([1.0], np.float32))
    return _with_function(model, [helper.make_node("Constant", [], ["read"], value=value)], "", "Sigmoid")


def bounded_loop(model: Model) -> Model:
    value = numpy_helper.from_array(np.ones(width(model), np.float32))
    return plus(model, "sum", *_loop(model, [helper.make_node("Constant", [], ["read"], value=value)]))


def endless_loop(model: Model) -> Model:
    """Its condition stays true, and it keeps nothing: it takes neither an end nor memory."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["more"]), helper.make_node("Identity", ["x"], ["read"])], "body",
        [
            helper.make_tensor_value_info("i", INT, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("x", FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("more", TensorProto.BOOL, []),
            helper.make_tensor_value_info("read", FLOAT, None),
        ],
    )  # fmt: skip
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    return plus(
        model, "last",
        helper.make_node("Loop", ["", "yes", "vector before"], ["last"], body=body),
    )  # fmt: skip


def text_tensor(model: Model) -> Model:
    model.graph.initializer.append(numpy_helper.from_array(np.array(["a"], object), "text"))
    return model


def foreign_metadata(model: Model) -> Model:
    model.metadata_props.add(key="ort_config", value='{"session_options": {"enable_profiling": 1}}')
    return model


def unknown_part(model: Model) -> Model:
    """A field that this version of ONNX has no name for."""
    return onnx.ModelProto.FromString(model.SerializeToString() + bytes([0xFA, 0x3E, 1, 65]))  # number 1007, b"A"


FOREIGN: list[Callable[[Model], Model]] = [
    foreign_operator, foreign_domain, foreign_import, foreign_opset, foreign_attribute,
    function_with_a_foreign_operator, function_under_the_name_of_an_operator, bounded_loop, endless_loop,
    text_tensor, foreign_metadata, unknown_part,
]  # fmt: skip
"""What no tower of ours holds."""


def _filled(model: Model, name: str, shape: list[int]) -> Any:
    model.graph.initializer.append(numpy_helper.from_array(np.array(shape), f"shape of {name}"))
    value = numpy_helper.from_array(np.array([0.5], np.float32))
    return helper.make_node("ConstantOfShape", [f"shape of {name}"], [name], value=value)


def bomb_at_load(model: Model) -> Model:
    """8 GiB, as soon as onnxruntime works out what is constant."""
    nodes = [_filled(model, "filled", [1 << 31]), helper.make_node("ReduceMax", ["filled"], ["much"], keepdims=0)]
    return plus(model, "much", *nodes)


def bomb_at_a_call(model: Model) -> Model:
    """8 GiB for each row."""
    model.graph.initializer.append(numpy_helper.from_array(np.array([1 << 31]), "times"))
    value = numpy_helper.from_array(np.array([0.5], np.float32))
    return plus(
        model, "much",
        helper.make_node("Shape", ["vector before"], ["n"], start=0, end=1),
        helper.make_node("Mul", ["n", "times"], ["numbers"]),
        helper.make_node("ConstantOfShape", ["numbers"], ["filled"], value=value),
        helper.make_node("ReduceMax", ["filled"], ["much"], keepdims=0),
    )  # fmt: skip


def bomb_at_a_code(model: Model) -> Model:
    """8 GiB for a row whose first code is 30 or more: it looks harmless to whoever tries others."""
    numbers = {"first": [0], "limit": 29, "zero": 0, "one": 1, "large": 1 << 31, "all": [0, 1], "as shape": [1]}
    model.graph.initializer.extend(numpy_helper.from_array(np.array(n), f"bomb {name}") for name, n in numbers.items())
    value = numpy_helper.from_array(np.array([0.5], np.float32))
    return plus(
        model, "much",
        helper.make_node("Gather", ["lookup", "bomb first"], ["code"], axis=1),
        helper.make_node("Sub", ["code", "bomb limit"], ["above"]),
        helper.make_node("Max", ["above", "bomb zero"], ["positive"]),
        helper.make_node("Min", ["positive", "bomb one"], ["switch"]),
        helper.make_node("Mul", ["switch", "bomb large"], ["numbers"]),
        helper.make_node("Add", ["numbers", "bomb one"], ["some"]),
        helper.make_node("ReduceMax", ["some", "bomb all"], ["most"], keepdims=0),
        helper.make_node("Reshape", ["most", "bomb as shape"], ["shape"]),
        helper.make_node("ConstantOfShape", ["shape"], ["filled"], value=value),
        helper.make_node("ReduceMax", ["filled"], ["much"], keepdims=0),
    )  # fmt: skip


def years(model: Model) -> Model:
    """Products of large matrices, one after the other, for years."""
    nodes = [
        _filled(model, "filled", [2048, 2048]),
        helper.make_node("ReduceMax", ["vector before"], ["number"], keepdims=0),
        helper.make_node("Add", ["filled", "number"], ["m0"]),
        *(helper.make_node("MatMul", [f"m{i}", "m0"], [f"m{i + 1}"]) for i in range(20_000)),
        helper.make_node("ReduceMax", ["m20000"], ["much"], keepdims=0),
    ]
    return plus(model, "much", *nodes)


GREEDY: list[Callable[[Model], Model]] = [bomb_at_load, bomb_at_a_call]


def forged(store: Path, files: dict[str, Callable[[bytes], bytes]], minute: int = 1, **facts: Any) -> str:
    """A copy of the current bundle with other files or facts, whose manifest and id are right; its id. CURRENT
    stays."""
    source = store / "bundles" / (store / "CURRENT").read_text().strip()
    made = source.with_name("forged")
    shutil.copytree(source, made)
    manifest = json.loads((made / MANIFEST).read_text()) | facts
    for entry in manifest["files"]:
        if entry["path"] in files:
            path = made / entry["path"]
            data = files[entry["path"]](path.read_bytes())
            path.write_bytes(data)
            entry |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest["bundle"] = f"{source.name[:9]}2359{minute:02d}Z-{manifest_digest(manifest)}"
    (made / MANIFEST).write_text(json.dumps(manifest))
    made.rename(made.with_name(manifest["bundle"]))
    return str(manifest["bundle"])


def of(make: Callable[[Model], Model]) -> Callable[[bytes], bytes]:
    """What `make` makes of a file's tower."""
    return lambda data: bytes(make(plain(data)).SerializeToString())
