"""Exported towers against the model, their files, and vectors of whole tables."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import polars as pl
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import save
from worlds import EVERYTHING_SCHEMA, checkerboard, everything, settings

from twotower.arrays import npy_writer
from twotower.arrays.ragged import Ragged
from twotower.config.experiment import Config
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.side import Side
from twotower.data.tables import check
from twotower.embedding.bulk import embed
from twotower.embedding.folder import EmbeddingsFolder
from twotower.errors import RunError
from twotower.features.categorical import Categorical
from twotower.features.field import PoolingSpec
from twotower.features.schema import Schema
from twotower.features.sequence import Sequence
from twotower.features.side import SIDES, SideName
from twotower.features.text import Text
from twotower.files.layout import WEIGHTS
from twotower.model.inputs.code_layout import pad
from twotower.model.inputs.gather import feed
from twotower.model.inputs.side_tensors import SideTensors
from twotower.model.pooling.ridge import Ridge
from twotower.model.towers import TowerConfig
from twotower.model.two_tower import ModelConfig, TwoTower
from twotower.onnx import export
from twotower.onnx.allow_list import ELEMENT_TYPES, MESSAGE_FIELDS, METADATA_KEYS, OPERATORS, PLACE_KEYS
from twotower.onnx.builder import GraphBuilder, StoredWeights
from twotower.onnx.check import inspect_tower
from twotower.onnx.export import MAX_DIFFERENCE, allowed_difference, build_graph, export_tower, parity
from twotower.onnx.tower import GateInfo, OnnxTower, trust_tower
from twotower.runs import Run

ROOT = Path(__file__).resolve().parents[2]


def trained(dataset: Dataset, moved: float = 0.3, **model: Any) -> TwoTower:
    """A model whose every parameter has moved from where it began, the same in every order of the tests."""
    torch.manual_seed(0)
    made = TwoTower(settings(model=model).model, dataset.encoders.fields("user"), dataset.encoders.fields("item"))
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn_like(p) * moved)
    return made.eval()


LEAST = 256
"""Bytes of the smallest weight that `stored` names."""


def stored(model: TwoTower, folder: Path) -> StoredWeights:
    """The weights of a model in a file, as a run has it."""
    path = folder / WEIGHTS
    path.write_bytes(save({name: p.detach().contiguous() for name, p in model.named_parameters()}))
    return StoredWeights(model, path, smallest=LEAST)


def pair(user: dict[str, Any] | None = None, item: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"user": {"layers": [8]} | (user or {}), "item": {"layers": [8]} | (item or {})}


def both(**tower: Any) -> list[dict[str, Any]]:
    return [pair(tower, tower)]


# Some fields wider than others, so that the towers split them.
UNEVEN = EVERYTHING_SCHEMA.model_copy(
    update={
        "features": tuple(
            f.model_copy(update={"width": 5}) if f.name in ("city", "brand", "picture", "age", "fans") else f
            for f in EVERYTHING_SCHEMA.features
        )
    }
)
SHARED = EVERYTHING_SCHEMA.model_copy(
    update={
        "features": tuple(
            Text(name="motto", side="user", share_with="label", max_length=9) if f.name == "motto" else f
            for f in EVERYTHING_SCHEMA.features
        )
    }
)
DECAY = EVERYTHING_SCHEMA.model_copy(
    update={
        "features": tuple(
            f.model_copy(update={"pooling": PoolingSpec(kind="power" if f.name == "disliked" else "decay")})
            if isinstance(f, Sequence) else f for f in EVERYTHING_SCHEMA.features
        )
    }
)  # fmt: skip


def attending(**options: Any) -> Schema:
    """All sequences are read by attention, the transformers with these options."""
    liked, fans = ({"kind": "transformer", "window": n} | options for n in (5, 40))
    changed: dict[str, dict[str, Any]] = {
        "liked": {"pooling": PoolingSpec.model_validate(liked)},
        "disliked": {"pooling": PoolingSpec(kind="attention", window=40)},
        "fans": {"pooling": PoolingSpec.model_validate(fans), "share_embedding": False},
    }
    features = (f.model_copy(update=changed.get(f.name, {})) for f in EVERYTHING_SCHEMA.features)
    return EVERYTHING_SCHEMA.model_copy(update={"features": tuple(features)})


WORLDS = {
    "even": EVERYTHING_SCHEMA,
    "uneven": UNEVEN,
    "decay": DECAY,
    "shared": SHARED,
    "attention": attending(),
    "plain block": attending(block="plain", blocks=1, heads=2, dropout=0.5),
    "three blocks": attending(blocks=3, heads=1, dropout=0.5),
}
PRODUCTS: dict[str, dict[str, Any]] = {
    "fm": {"kind": "fm"},
    "cin": {"kind": "cin", "widths": [5, 4, 3]},
    **{f"bilinear {m}": {"kind": "bilinear", "matrices": m} for m in ("all", "each", "interaction")},
}
MODELS: dict[str, dict[str, Any]] = {
    "cosine": {},
    "dot": {"similarity": "dot", "bias": True},
    "temperature": {"temperature": 0.03, "learn_temperature": False, "bias": False},
    "bias": {"bias": True},
    "bias, no layers": {"bias": True, "pairs": [{"user": {"fields": ["uid"]}, "item": {"fields": ["iid"]}}]},
    "no bias": {"bias": False, "pairs": both(layers=[16, 8])},
    "stacking": {"stacking": True, "bias": True, "pairs": 2 * both(layers=[16, 8])},
    "cold items": {"cold_item_bias": True, "bias": True},
    "cold items, stacking": {"cold_item_bias": True, "stacking": True, "bias": True},
    "cold items, no bias": {"cold_item_bias": True, "bias": False, "similarity": "dot"},
    "stacking, no bias": {"stacking": True, "bias": False, "pairs": 2 * both()},
    **{
        f"senet {s}": {"pairs": both(senet={"enabled": True, "squeeze": s, "reduction": 3})}
        for s in ("mean", "sum", "max")
    },
    "join sum": {"pairs": both(join="sum", layers=[8, 8])},
    "join sum, no layers": {"pairs": both(join="sum", layers=[])},
    "field_norm": {"pairs": both(field_norm=True)},
    "residual": {"pairs": both(residual=True, layers=[12, 8])},
    "activate_last": {"pairs": both(activate_last=True, activation="Tanh"), "bias": True},
    "activate_last, all else": {
        "pairs": both(activate_last=True, residual=True, output_norm=True, layers=[12, 8]), "bias": False,
    },
    "layer_norm": {"pairs": both(layer_norm=True, layers=[12, 8])},
    "output_norm": {"pairs": both(output_norm=True), "bias": True},
    "output_norm, no bias": {"pairs": both(output_norm=True, layers=[12, 8]), "bias": False},
    "dropout": {"pairs": both(dropout=0.5, field_dropout=0.5, layers=[12, 8]), "unknown_rate": 0.5,
        "user_id_dropout": 0.3, "item_id_dropout": 0.3},
    **{
        a: {"pairs": both(activation=a, layers=[12, 8])}
        for a in ("LeakyReLU", "ReLU", "GELU", "SiLU", "Tanh", "Sigmoid", "Identity")
    },
    **{
        f"branch {name}": {"pairs": both(branches=[b], layers=[12, 8])}
        for name, b in {
            "mlp": {"kind": "mlp", "layers": [9, 7], "activation": "GELU", "layer_norm": True, "dropout": 0.5},
            "cross": {"kind": "cross", "depth": 3},
            "cross of a rank": {"kind": "cross", "rank": 2},
            "identity": {"kind": "identity", "senet": {"enabled": True, "squeeze": "max"}},
        }.items()
    },
    **{
        f"branch {name}": {"pairs": both(branches=[b | {"senet": {"enabled": True}}], layers=[12, 8])}
        for name, b in PRODUCTS.items()
    },
    "gates": {
        "bias": True,
        "pairs": [
            pair({"senet": {"enabled": True}, "branches": [{"kind": "mlp"}, {"kind": "identity",
                "senet": {"enabled": True}}]}),
            pair(
                {"fields": ["liked", "age", "uid"], "branches": [{"kind": "cross", "senet": {"enabled": True}}]},
                {"fields": ["tags", "iid"], "senet": {"enabled": True, "squeeze": "sum"}},
            ),
        ],
    },
    "branches, no layers": {
        "pairs": [pair(*({"layers": [], "branches": [{"kind": "mlp", "layers": [5]}, {"kind": "mlp"}]},) * 2)],
        "bias": True,
    },
    "augment": {"pairs": [pair({"augment": True}), pair({"layers": [6]}, {"layers": [6], "augment": True})]},
    "pairs": {
        "bias": True,
        "pairs": [
            pair({"fields": ["uid", "city"]}, {"fields": ["fans", "tags"], "layers": [8]}),
            pair({"fields": ["liked", "age"], "layers": [12, 8]}, {"fields": ["brand", "iid"], "residual": True}),
        ],
    },
    "one field": {"pairs": [pair({"fields": ["disliked"]}, {"fields": ["picture"]})]},
    "all of it": {
        "bias": True,
        "pairs": both(
            senet={"enabled": True}, field_norm=True, layer_norm=True, residual=True, output_norm=True, layers=[16, 8],
            activation="SiLU", augment=True, branches=[{"kind": "cross"}, {"kind": "mlp"}, {"kind": "identity"}],
        ),
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def worlds() -> dict[str, Dataset]:
    return {
        name: build_dataset(check(*everything(), schema), schema, Config().split) for name, schema in WORLDS.items()
    }


def _refused(name: str, world: str) -> bool:
    """Whether the model is none for the world: it adds or multiplies fields of several widths."""
    tower = MODELS[name].get("pairs", [{}])[0].get("user", {})
    if "block" in world:
        return name != "cosine"
    if world == "even":
        return False
    products = any(b["kind"] in ("fm", "cin", "bilinear") for b in tower.get("branches", []))
    return tower.get("join") == "sum" or (products and world == "uneven")


@pytest.mark.parametrize(("name", "world"), [(n, w) for n in MODELS for w in WORLDS if not _refused(n, w)])
def test_an_exported_tower_gives_the_vectors_of_the_model(
    name: str, world: str, worlds: dict[str, Dataset], tmp_path: Path
) -> None:
    # Blocks and crosses multiply what each parameter is moved by; 0.3 of all is far from where any training ends.
    data, model = (
        worlds[world],
        trained(worlds[world], 0.3 if world in ("even", "uneven", "decay", "shared") else 0.1, **MODELS[name]),
    )
    for side in SIDES:
        fields, path = data.encoders.fields(side), tmp_path / f"{side}.onnx"
        found = export_tower(model, side, fields, path, data.side(side), "digest")
        assert found < 2e-5
        tensors = sum(numpy_helper.to_array(t).nbytes for t in onnx.load(path).graph.initializer)
        assert -32 <= tensors - model.exported_bytes(side) <= 0.03 * tensors + 3_000, (
            "small constants alone are not counted"
        )
        tower = OnnxTower(path)
        if world == "even":
            assert parity(tower, model, side, data.side(side), fields) <= found
        assert (tower.side, tower.model) == (side, "digest")
        for rows in (np.arange(len(data.side(side))), np.array([3]), np.array([7, 7, 0])):
            inputs = SideTensors(data.side(side), fields).take(rows)
            with torch.no_grad():
                wanted = (model.user_vectors if side == "user" else model.item_vectors)(inputs).numpy()
            got = tower(feed(fields, data.side(side).columns, rows))
            assert got.shape == wanted.shape == (len(rows), tower.width)
            assert got.dtype == np.float32
            np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


def test_rows_of_data_may_differ_by_what_rounding_explains_and_random_ones_by_less(
    worlds: dict[str, Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps of a ridge regression depend on rounding where a user has hundreds of interactions."""
    data = worlds["even"]
    fields, side = data.encoders.fields("user"), data.side("user")
    model = trained(data, 0.3)
    ridge = tuple(replace(f, pooling=PoolingSpec(kind="ridge")) for f in fields)
    assert (allowed_difference(fields), allowed_difference(ridge)) == (MAX_DIFFERENCE, Ridge.rounding)
    found = {True: 0.0, False: 0.0}
    monkeypatch.setattr(export, "parity", lambda tower, model, name, rows, fields: found[rows is side])
    allowed = allowed_difference(fields)
    for is_of_data, difference in ((True, 1.01 * allowed), (False, 1.01 * MAX_DIFFERENCE), (True, math.nan)):
        found |= {True: 0.0, False: 0.0} | {is_of_data: difference}
        with pytest.raises(RunError, match=f"differs from the model by {difference:.1e}"):
            export_tower(model, "user", fields, tmp_path / "user.onnx", side)
        assert not (tmp_path / "user.onnx").exists()
    found |= {True: 0.99 * allowed, False: 0.5 * MAX_DIFFERENCE}
    assert export_tower(model, "user", fields, tmp_path / "user.onnx", side) == 0.99 * allowed


def test_every_setting_of_a_model_is_exported_or_only_of_training() -> None:
    """A new setting must get a row in MODELS, or be named here as one that does not change evaluation."""
    tried = {key for model in MODELS.values() for key in model}
    assert set(ModelConfig.model_fields) - tried <= {"width", "embedding_std"}
    towers = [t for m in MODELS.values() for b in m.get("pairs", []) for t in b.values()]
    tried = {key for tower in towers for key in tower}
    assert set(TowerConfig.model_fields) - tried <= {"width", "weight_decay_scale"}


@pytest.mark.parametrize("name", MODELS)
def test_a_tower_names_the_stored_weights_and_copies_none(
    name: str, worlds: dict[str, Dataset], tmp_path: Path
) -> None:
    data, model = worlds["even"], trained(worlds["even"], **MODELS[name])
    weights = stored(model, tmp_path)
    kept = [p.detach().numpy().tobytes() for p in model.parameters()]
    for side in SIDES:
        fields, whole, named = data.encoders.fields(side), tmp_path / "whole.onnx", tmp_path / "named.onnx"
        export_tower(model, side, fields, whole)
        export_tower(model, side, fields, named, weights=weights)
        inputs = feed(fields, data.side(side).columns, np.arange(len(data.side(side))))
        assert np.array_equal(OnnxTower(named)(inputs), OnnxTower(whole)(inputs))
        copies = [t.raw_data for t in onnx.load(named, load_external_data=False).graph.initializer]
        assert not [copy for copy in copies if len(copy) >= LEAST and any(copy in one for one in kept)]
        assert len(named.read_bytes()) < len(whole.read_bytes())


def test_fault_G1_the_list_of_what_a_tower_holds_is_what_the_exporter_writes(
    worlds: dict[str, Dataset], tmp_path: Path
) -> None:
    """Neither an operator nor a part of the file is allowed that no kind of model needs."""
    operators: dict[str, set[str]] = {}
    parts: dict[str, set[str]] = {}
    numbers: set[int] = set()
    about: set[str] = set()
    places: set[str] = set()

    def count(message: Any) -> None:
        kind = message.DESCRIPTOR.full_name.removeprefix("onnx.")
        parts.setdefault(kind, set()).update(field.name for field, _ in message.ListFields())
        if kind == "NodeProto":
            operators.setdefault(message.op_type, set()).update(a.name for a in message.attribute)
        if kind == "TensorProto":
            places.update(entry.key for entry in message.external_data)
        numbers.update(value for field, value in message.ListFields() if field.name in ("data_type", "elem_type"))
        for field, value in message.ListFields():
            if field.message_type is not None:
                for inner in [value] if hasattr(value, "DESCRIPTOR") else value:
                    count(inner)

    for name, settings_ in MODELS.items():
        for world in ("even", "decay", "attention", "plain block") if name == "cosine" else ("attention",):
            if _refused(name, world):
                continue
            data = worlds[world]
            model = trained(data, **settings_)
            for side in SIDES:
                weights = stored(model, tmp_path)
                graph = onnx.load_from_string(build_graph(model, side, data.encoders.fields(side), "digest", weights))
                count(graph)
                about.update(entry.key for entry in graph.metadata_props)
    assert operators == OPERATORS
    assert parts == MESSAGE_FIELDS
    assert (numbers, about, places) == (ELEMENT_TYPES, METADATA_KEYS, PLACE_KEYS)


def test_a_model_with_an_unknown_part_is_refused(worlds: dict[str, Dataset], tmp_path: Path) -> None:
    data, model = worlds["even"], trained(worlds["even"], pairs=both(layers=[12, 8]))
    model.towers("item")[0].layers[1] = torch.nn.Softplus()
    with pytest.raises(RunError, match="Softplus"):
        export_tower(model, "item", data.encoders.fields("item"), tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


def test_a_graph_that_differs_is_not_written(worlds: dict[str, Dataset], tmp_path: Path) -> None:
    data, model = worlds["even"], trained(worlds["even"])
    model.towers("item")[0].register_forward_hook(
        lambda module, inputs, out: (out[0] * torch.arange(out[0].shape[1]), out[1])
    )
    with pytest.raises(RunError, match="differs from the model"):
        export_tower(model, "item", data.encoders.fields("item"), tmp_path / "x.onnx")
    model = trained(data)
    with torch.no_grad():
        next(model.towers("item")[0].head.parameters())[0, 0] = torch.nan
    with pytest.raises(RunError, match="not finite"):
        export_tower(model, "item", data.encoders.fields("item"), tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


def test_exporting_leaves_the_mode_and_the_weights_as_they_were(worlds: dict[str, Dataset], tmp_path: Path) -> None:
    data, model = worlds["even"], trained(worlds["even"], **MODELS["dropout"]).train()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    export_tower(model, "user", data.encoders.fields("user"), tmp_path / "x.onnx", data.users)
    assert model.training
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


# ---- the file


def test_the_file_is_plain_small_and_the_same_each_time(worlds: dict[str, Dataset], tmp_path: Path) -> None:
    data, model = worlds["even"], trained(worlds["even"], **MODELS["all of it"])
    for side in SIDES:
        fields = data.encoders.fields(side)
        for name in ("a", "b"):
            export_tower(model, side, fields, tmp_path / name, digest="d")
        content = (tmp_path / "a").read_bytes()
        assert content == (tmp_path / "b").read_bytes()
        for word in (str(ROOT), ".py", "torch", str(Path.home()), sys.prefix):
            assert word.encode() not in content
        graph = onnx.load_from_string(content)
        onnx.checker.check_model(graph, full_check=True)
        assert {n.op_type for n in graph.graph.node}.isdisjoint({"Loop", "Scan", "If"})
        assert not any(n.doc_string or n.metadata_props for n in graph.graph.node)
        assert {p.key for p in graph.metadata_props} == {"side", "model", "gates"}
        assert {o.domain for o in graph.opset_import} == {""}
        shape = [d.dim_param or d.dim_value for d in graph.graph.output[0].type.tensor_type.shape.dim]
        assert shape == ["U", OnnxTower(content).width]


def test_no_gate_is_no_output_and_no_metadata(worlds: dict[str, Dataset], tmp_path: Path) -> None:
    data, path = worlds["even"], tmp_path / "x.onnx"
    fields = data.encoders.fields("user")
    export_tower(trained(data), "user", fields, path)
    graph = onnx.load(path)
    assert [o.name for o in graph.graph.output] == ["vector"]
    assert {p.key for p in graph.metadata_props} == {"side"}
    tower, inputs = OnnxTower(path), feed(fields, data.users.columns, slice(None))
    vectors, weights = tower.explain(inputs)
    assert tower.gates == weights == []
    assert np.array_equal(vectors, tower(inputs))


@pytest.mark.parametrize(
    ("name", "world"),
    [(n, w) for n in ("senet mean", "senet max", "branch fm", "gates", "all of it")
     for w in ("even", "uneven", "attention") if not _refused(n, w)],
)  # fmt: skip
def test_the_weights_of_the_gates_are_those_of_the_model(
    name: str, world: str, worlds: dict[str, Dataset], tmp_path: Path
) -> None:
    data, model = worlds[world], trained(worlds[world], 0.1, **MODELS[name])
    for side in SIDES:
        fields, path = data.encoders.fields(side), tmp_path / f"{side}.onnx"
        export_tower(model, side, fields, path, data.side(side))
        inputs = SideTensors(data.side(side), fields).take(np.arange(len(data.side(side))))
        wanted = []
        for number, (tower, config) in enumerate(zip(model.towers(side), model.config.pairs, strict=True), 1):
            with torch.no_grad():
                found = tower.gates(inputs)
            for section, weights in found.items():
                gate = f"pair {number}"
                if section != "senet":
                    place = int(section.split(".")[1])
                    gate += f", branch {place + 1} ({getattr(config, side).branches[place].kind})"
                wanted.append((GateInfo(gate, tuple(tower.field_names)), weights.numpy()))
        exported = OnnxTower(path)
        assert exported.gates == [gate for gate, _ in wanted]
        given = feed(fields, data.side(side).columns, slice(None))
        vectors, got = exported.explain(given)
        assert np.array_equal(vectors, exported(given))
        for (info, by_model), by_onnx in zip(wanted, got, strict=True):
            assert by_onnx.shape == by_model.shape == (len(vectors), len(info.fields))
            np.testing.assert_allclose(by_onnx, by_model, rtol=1e-6)
            assert by_onnx.std() > 0
        assert [w.shape[0] for w in exported.explain({n: x[:0] for n, x in given.items()})[1]] == [0] * len(got)


def _changed(content: bytes, gates: str | None, output: bool = True) -> bytes:
    """The file with other metadata, or none, and without the weights."""
    graph = onnx.load_from_string(content)
    props = {p.key: p.value for p in graph.metadata_props if p.key != "gates"}
    del graph.metadata_props[:]
    onnx.helper.set_model_props(graph, props | ({} if gates is None else {"gates": gates}))
    if not output:
        del graph.graph.output[1]
        for node in [n for n in graph.graph.node if "gates" in n.output]:
            graph.graph.node.remove(node)
    data = bytes(graph.SerializeToString())
    trust_tower(data, "changed")  # a process for each would take long
    return data


def test_metadata_that_does_not_fit_the_gates_is_a_run_error(worlds: dict[str, Dataset], tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    export_tower(trained(worlds["even"], **MODELS["senet mean"]), "user", worlds["even"].encoders.fields("user"), path)
    content, (gate,) = path.read_bytes(), OnnxTower(path).gates
    named = [{"name": gate.name, "fields": list(gate.fields)}]
    assert OnnxTower(_changed(content, json.dumps(named))).gates == [gate]
    for gates in (
        "", "null", "[" * 100_000, "[3]", "[{}]", json.dumps(named[0]), json.dumps([named[0] | {"name": 1}]),
        json.dumps([named[0] | {"fields": "a" * len(gate.fields)}]),
        json.dumps([named[0] | {"fields": [1] * len(gate.fields)}]),
    ):  # fmt: skip
        with pytest.raises(RunError, match="not a list of gates"):
            OnnxTower(_changed(content, gates))
    others = (None, "[]", json.dumps(named * 2), json.dumps([{"name": gate.name, "fields": gate.fields[1:]}]))
    for other in others:
        with pytest.raises(RunError, match="weights"):
            OnnxTower(_changed(content, other))
    with pytest.raises(RunError, match="return 0 weights"):
        OnnxTower(_changed(content, json.dumps(named), output=False))
    odd = onnx.load_from_string(content)
    odd.graph.output[1].name = "weights"
    odd.graph.node[-1].output[0] = "weights"
    with pytest.raises(RunError, match="not a tower"):
        OnnxTower(odd.SerializeToString())


def test_of_the_other_tower_only_the_shared_rows_are_in_the_file(tmp_path: Path) -> None:
    features = (
        Categorical(name="user_id", side="user"),
        Sequence(name="seen", side="user"),
        Categorical(name="item_id", side="item"),
        Categorical(name="shop", side="item", column="item_id", hash_buckets=50_000),
    )
    schema = Schema(label="liked", time="at", time_unit="order", features=features)
    data = build_dataset(check(*checkerboard(), schema), schema, Config().split)
    model = trained(data, width=8, bias=True, pairs=[pair()])
    path = tmp_path / "user.onnx"
    export_tower(model, "user", data.encoders.fields("user"), path, data.users)
    shapes = [tuple(t.dims) for t in onnx.load(path).graph.initializer]
    assert (31, 8) in shapes  # 30 items and the unknown one, out of a table that 50,001 shops are in too
    assert path.stat().st_size < 40_000


def test_tables_that_no_file_holds_are_refused() -> None:
    graph = GraphBuilder(max_table_bytes=4000)
    graph.constant(np.zeros(900, np.float32))
    with pytest.raises(RunError, match="min_count"):
        graph.constant(np.ones(200, np.float32))


def test_a_damaged_or_foreign_file_is_a_run_error(worlds: dict[str, Dataset], tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    export_tower(trained(worlds["even"]), "user", worlds["even"].encoders.fields("user"), path)
    content = path.read_bytes()
    for damaged in (b"", b"no graph", content[: len(content) // 2], b"\xff" * 100):
        path.write_bytes(damaged)
        with pytest.raises(RunError, match="damaged, or not an ONNX file"):
            inspect_tower(path)  # what the child process runs
    with pytest.raises(RunError, match="x.onnx: damaged"):
        OnnxTower(path)
    with pytest.raises(RunError, match="tower: damaged"):
        OnnxTower(content[: len(content) // 2])
    with pytest.raises(RunError, match="none.onnx: cannot be read"):
        OnnxTower(tmp_path / "none.onnx")
    helper = onnx.helper
    for name in ("y", "vector"):  # a name that is not the tower's, and one that is with a shape that is not
        x, y = (helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1]) for n in ("x", name))
        other = helper.make_graph([helper.make_node("Abs", ["x"], [name])], "g", [x], [y])
        with pytest.raises(RunError, match="not a tower"):
            OnnxTower(
                helper.make_model(other, opset_imports=[helper.make_opsetid("", 18)], ir_version=8).SerializeToString()
            )


def test_inputs_that_do_not_fit_are_a_run_error(worlds: dict[str, Dataset], tmp_path: Path) -> None:
    data, path = worlds["even"], tmp_path / "x.onnx"
    fields = data.encoders.fields("user")
    export_tower(trained(data), "user", fields, path)
    tower, good = OnnxTower(path), feed(fields, data.users.columns, np.arange(4))
    assert set(tower.inputs) == set(good)
    with pytest.raises(RunError, match="other features"):
        tower({n: x for n, x in good.items() if n != "lookup"})
    with pytest.raises(RunError, match="other features"):
        tower(good | {"dense99": good["lookup"]})
    with pytest.raises(RunError, match="do not fit"):
        tower(good | {"lookup": good["lookup"] + 100_000})
    with pytest.raises(RunError, match="do not fit"):
        tower(good | {"lookup": good["lookup"].astype(np.float32)})
    assert tower(good).shape == (4, tower.width)


# ---- inputs


@pytest.mark.parametrize("world", ["even", "decay", "attention"])
def test_empty_short_and_long_histories_of_one_and_of_many_rows(
    world: str, worlds: dict[str, Dataset], tmp_path: Path
) -> None:
    data, model = worlds[world], trained(worlds[world], **MODELS["all of it"])
    fields, rng = data.encoders.fields("user"), np.random.default_rng(3)
    lengths = np.array([0, 1, 2000, 2, 0, 700, 33])
    offsets = np.r_[0, np.cumsum(lengths)]
    columns = {n: c[:7] if isinstance(c, np.ndarray) else c for n, c in data.users.columns.items()}
    for f in fields:
        if f.kind == "bag":
            columns[f.name] = Ragged(rng.integers(0, f.rows, offsets[-1]).astype(np.int32), offsets)
        elif f.kind == "lookup":
            columns[f.name] = np.zeros(7, np.int32)  # values never seen
    side = Side(pl.DataFrame({"uid": np.arange(7)}), columns, "uid")
    path = tmp_path / "x.onnx"
    export_tower(model, "user", fields, path)
    tower = OnnxTower(path, threads=2)
    assert parity(tower, model, "user", side, fields) < 2e-5
    together = tower(feed(fields, columns, slice(None)))
    for row in range(7):
        alone = feed(fields, columns, np.array([row]))
        for number, f in enumerate(fields):
            if f.kind == "bag":
                assert alone[f"bag{number}"].shape[1] == max(1, min(lengths[row], f.limit or 2000))
                # More than is read may be given, and changes nothing.
                alone[f"bag{number}"] = pad(columns[f.name], np.array([row]))  # type: ignore[arg-type]
        np.testing.assert_allclose(tower(alone)[0], together[row], rtol=1e-3, atol=1e-4)
    assert model.user_vectors(SideTensors(side, fields).take(np.zeros(0, np.int64))).shape == (0, tower.width)
    assert tower(feed(fields, columns, np.zeros(0, np.int64))).shape == (0, tower.width)


# ---- whole tables


@pytest.fixture(scope="module", params=["even", "attention"])
def run(request: pytest.FixtureRequest, worlds: dict[str, Dataset]) -> Run:
    data = worlds[request.param]
    return Run(None, Config(), data, trained(data, **MODELS["all of it"]), {}, [])


def source_of(run: Run, side: SideName) -> pl.DataFrame:
    frame = run.dataset.side(side).frame
    return frame.select(c for c in frame.columns if not c.startswith("__"))


def read(out: Path) -> tuple[np.ndarray[Any, Any], pl.Series]:
    ((ids, vectors),) = EmbeddingsFolder(out).blocks()
    assert vectors.dtype == np.float32
    return vectors, ids


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("batch_rows", [7, 65_536])
def test_known_rows_get_the_vectors_of_the_run(
    run: Run, side: SideName, batch_rows: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    frame = source_of(run, side)
    frame.write_parquet(tmp_path / "t.parquet", row_group_size=9)
    caplog.set_level("INFO", "twotower")
    n = embed(run, side, tmp_path / "t.parquet", tmp_path / "out", batch_rows)
    vectors, ids = read(tmp_path / "out")
    assert n == len(frame)
    assert ids.equals(run.dataset.side(side).ids.rename("id"))
    factors = run.factors()
    wanted = factors.users if side == "user" else factors.items
    np.testing.assert_allclose(vectors, wanted.numpy(), rtol=1e-4, atol=1e-5)
    assert f"{n:,} {side}s in 1 shard have vectors" in caplog.messages[-1]


def test_new_rows_have_no_history(run: Run, tmp_path: Path) -> None:
    frame = source_of(run, "item").with_columns(iid=pl.lit("new") + pl.col("iid"))
    frame.write_parquet(tmp_path / "t.parquet")
    data = run.dataset
    columns = data.encoders.transform(
        "item", frame.with_columns(pl.lit(0.0).alias("__count:shown"),
            pl.lit(None, pl.Float64).alias("__mean:mean_stars"))
    )  # fmt: skip
    columns["fans"] = Ragged(np.zeros(0, np.int32), np.zeros(len(frame) + 1, np.int64))
    inputs = SideTensors(Side(frame, columns, "iid"), data.encoders.fields("item")).take(np.arange(len(frame)))
    with torch.no_grad():
        wanted = run.model.item_vectors(inputs).numpy()
    embed(run, "item", tmp_path / "t.parquet", tmp_path / "out")
    vectors, ids = read(tmp_path / "out")
    np.testing.assert_allclose(vectors, wanted, rtol=1e-4, atol=1e-5)
    assert ids[0] == "newi0"


def test_the_vectors_of_a_large_table_can_be_mapped_and_the_count_has_many_digits(tmp_path: Path) -> None:
    for n in (0, 9, 10**6, 10**12):
        with (tmp_path / "x.npy").open("w+b") as f:
            npy_writer.write_npy_header(f, np.zeros(66, np.float32), 0)
            size = f.tell()
            npy_writer.write_npy_header(f, np.zeros(66, np.float32), n)
            assert f.tell() == size


def test_vectors_that_are_not_finite_are_not_written(run: Run, worlds: dict[str, Dataset], tmp_path: Path) -> None:
    source_of(run, "item").write_parquet(tmp_path / "t.parquet")
    broken = trained(worlds["even"])
    with torch.no_grad():
        next(broken.towers("item")[0].head.parameters())[0, 0] = torch.nan
    with pytest.raises(RunError, match="not finite"):
        embed(Run(None, Config(), run.dataset, broken, {}, []), "item", tmp_path / "t.parquet", tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").rglob("*") if p.is_file()} == {"_plan_embedding.json", "_lock"}
