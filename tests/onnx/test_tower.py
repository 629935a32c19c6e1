"""Towers that somebody else wrote: what they hold is looked at before anything of it is done."""

from __future__ import annotations

import hashlib
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import hostile_towers
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from worlds import CHECKERBOARD_SCHEMA, checkerboard, settings

import twotower
from twotower import api, limited_process
from twotower.cli.app import run_command
from twotower.errors import BundleError, RunError
from twotower.files import inspections
from twotower.files.layout import WEIGHTS
from twotower.kinds import Kind
from twotower.onnx import export
from twotower.onnx.allow_list import disallowed_content
from twotower.onnx.export import build_graph, export_tower
from twotower.onnx.tower import INSPECT_FUNCTION, InspectionLimits, OnnxTower, TowerError, inspect_towers
from twotower.publishing import publisher
from twotower.retrieval.retriever import Retriever
from twotower.runs import Run
from twotower.store.store import Store

Change = Callable[[Any], Any]
LOOKUP = {"lookup": np.zeros((1, 2), np.int64)}
SESSION = """
from onnx import TensorProto, helper
from twotower.onnx.tower import create_session
from pathlib import Path
import os
x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [x], [y])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
create_session(model.SerializeToString(), 1, Path("."))
print(os.environ["ORT_DISABLE_TELEMETRY"])
"""


def called(change: Change) -> str:
    return change.__name__


def peak() -> int:
    """Bytes of memory that this process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The present folder, with a file of numbers in it that nobody shall see."""
    (tmp_path / hostile_towers.SECRET).write_bytes(np.full(100, 7.0, np.float32).tobytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that child processes inspect in the test."""
    looked: list[str] = []
    look = limited_process.run_limited

    def counted(work: str, paths: list[Path], **limits: Any) -> Any:
        looked.extend(path.name for path in paths)
        return look(work, paths, **limits)

    monkeypatch.setattr(limited_process, "run_limited", counted)
    return looked


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    users, items, actions = checkerboard()
    folder = tmp_path_factory.mktemp("runs") / "run"
    return twotower.fit((users, items, actions.head(900)), CHECKERBOARD_SCHEMA, settings(), folder=folder)


@pytest.fixture(scope="module")
def published(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("published") / "store"
    api.publish(run, store)
    return store


@pytest.fixture
def store(published: Path, tmp_path: Path) -> Path:
    """A copy of a store with one bundle."""
    shutil.copytree(published, tmp_path / "store")
    return tmp_path / "store"


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The errors of all towers that hold something foreign, by the name of the change, from one child process.

    Its folder holds a file of numbers that nobody shall read.
    """
    folder = tmp_path_factory.mktemp("hostile")
    (folder / hostile_towers.SECRET).write_bytes(np.full(100, 7.0, np.float32).tobytes())
    paths = [Path(f"{called(change)}.onnx") for change in (*hostile_towers.PLACES, *hostile_towers.FOREIGN)]
    for path, change in zip(paths, (*hostile_towers.PLACES, *hostile_towers.FOREIGN), strict=True):
        (folder / path).write_bytes(change(hostile_towers.plain()).SerializeToString())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        results = limited_process.run_limited(INSPECT_FUNCTION, paths, timeout=120, memory=1 << 30)
    return {path.stem: result.error for path, result in results.items()}


def test_a_tower_gives_its_vectors(beside: Path) -> None:
    data = hostile_towers.plain().SerializeToString()
    (beside / "tower.onnx").write_bytes(data)
    for source in (data, beside / "tower.onnx", "tower.onnx"):
        assert OnnxTower(source)(LOOKUP).tolist() == [[2.0] * hostile_towers.WIDTH]


@pytest.mark.parametrize("change", [*hostile_towers.PLACES, *hostile_towers.FOREIGN], ids=called)
def test_fault_G1_what_no_tower_holds_is_refused(change: Change, refusals: dict[str, str]) -> None:
    assert re.fullmatch(r"not a tower: .*publish the model again", refusals[called(change)])


def test_fault_G1_a_foreign_tower_is_refused_as_a_file_and_as_bytes(beside: Path) -> None:
    data = hostile_towers.initialiser(hostile_towers.plain()).SerializeToString()
    (beside / "tower.onnx").write_bytes(data)
    for source, name in ((data, "tower"), ("tower.onnx", "tower.onnx")):
        with pytest.raises(RunError, match=rf"^{name}: not a tower: .*publish the model again$"):
            OnnxTower(source)


def test_fault_G1_a_tower_reads_no_file_but_the_weights_beside_it(beside: Path) -> None:
    def naming(location: str, **more: str) -> bytes:
        model = hostile_towers.initialiser(hostile_towers.plain())
        tensor = next(t for t in model.graph.initializer if t.name == "file")
        for entry in tensor.external_data:
            entry.value = {"location": location, **more}.get(entry.key, entry.value)
        data: bytes = model.SerializeToString()
        return data

    (beside / "tower").mkdir()
    path, weights = beside / "tower" / "tower.onnx", beside / "tower" / WEIGHTS
    shutil.copyfile(beside / hostile_towers.SECRET, beside / WEIGHTS)
    for location in (hostile_towers.SECRET, f"../{WEIGHTS}", f"../tower/{WEIGHTS}", str(beside / WEIGHTS)):
        path.write_bytes(naming(location))
        with pytest.raises(TowerError, match="not a tower: it holds the tensor 'file' in another file"):
            OnnxTower(path)
    path.write_bytes(naming(WEIGHTS))
    for source in (path, path.read_bytes()):  # the present folder has the file
        with pytest.raises(TowerError, match="cannot be loaded"):
            OnnxTower(source)
    weights.write_bytes(np.full(100, 3.0, np.float32).tobytes())
    assert OnnxTower(path)(LOOKUP).tolist() == [[8.0] * hostile_towers.WIDTH]
    with pytest.raises(TowerError, match="cannot be loaded"):
        OnnxTower(path.read_bytes())
    for more in ({"offset": "396"}, {"length": "999999999"}, {"length": "-1"}, {"offset": "x"}):
        path.write_bytes(naming(WEIGHTS, **more))
        with pytest.raises(TowerError, match="cannot be loaded"):
            OnnxTower(path)


def naming_weights(model: Any) -> Any:
    """The tower with an initializer of float32 in the file of weights, "file"."""
    tensor = hostile_towers.outside(model, "file")
    tensor.external_data[0].value = WEIGHTS
    model.graph.initializer.append(tensor)
    return model


def a_repeated_key(model: Any) -> Any:
    """Whoever takes the first value reads another file than one that takes the last."""
    file = model.graph.initializer[-1]
    file.external_data[0].value = "elsewhere"
    file.external_data.add(key="location", value=WEIGHTS)
    return model


def numbers_of_another_type(model: Any) -> Any:
    model.graph.initializer[-1].data_type = onnx.TensorProto.INT64
    return model


def data_of_its_own_too(model: Any) -> Any:
    model.graph.initializer[-1].raw_data = b""
    return model


def no_initializer(model: Any) -> Any:
    file = model.graph.initializer.pop()
    file.dims[:], file.external_data[2].value = [1], "4"
    return hostile_towers.plus(
        model, "filled",
        helper.make_node("Shape", ["vector before"], ["shape"]),
        helper.make_node("ConstantOfShape", ["shape"], ["filled"], value=file),
    )  # fmt: skip


@pytest.mark.parametrize(
    "change", [a_repeated_key, numbers_of_another_type, data_of_its_own_too, no_initializer], ids=called
)
def test_fault_G1_only_an_initializer_of_float32_names_the_weights_and_once(change: Change) -> None:
    model = naming_weights(hostile_towers.plain())
    assert disallowed_content(model.SerializeToString(), {}) == ""
    assert "holds the tensor 'file' in another file" in disallowed_content(change(model).SerializeToString(), {})


def of_as_many_numbers_as_a_weight_says(model: Any) -> Any:
    """A tower that takes four bytes for each unit of its first weight."""
    model = naming_weights(model)
    model.graph.initializer.append(numpy_helper.from_array(np.array([0]), "first"))
    value = numpy_helper.from_array(np.array([0.5], np.float32))
    return hostile_towers.plus(
        model, "much",
        helper.make_node("Gather", ["file", "first"], ["number"], axis=0),
        helper.make_node("Cast", ["number"], ["shape"], to=onnx.TensorProto.INT64),
        helper.make_node("ConstantOfShape", ["shape"], ["filled"], value=value),
        helper.make_node("ReduceMax", ["filled"], ["much"], keepdims=0),
    )  # fmt: skip


def weights_of(first: float) -> bytes:
    return np.full(hostile_towers.WIDTH, first, np.float32).tobytes()


def test_fault_G34_weights_that_were_changed_after_a_pass_are_inspected_again(tmp_path: Path) -> None:
    path, weights = tmp_path / "tower.onnx", tmp_path / WEIGHTS
    path.write_bytes(of_as_many_numbers_as_a_weight_says(hostile_towers.plain()).SerializeToString())
    weights.write_bytes(weights_of(3))
    assert OnnxTower(path)(LOOKUP).tolist() == [[2.5] * hostile_towers.WIDTH]
    weights.write_bytes(weights_of(1 << 31))
    with pytest.raises(TowerError, match="loading it takes more than 537 MB"):
        OnnxTower(path)
    weights.write_bytes(weights_of(3))
    assert OnnxTower(path)(LOOKUP).tolist() == [[2.5] * hostile_towers.WIDTH]


def test_fault_G34_weights_that_change_while_they_are_inspected_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "tower.onnx"
    path.write_bytes(of_as_many_numbers_as_a_weight_says(hostile_towers.plain()).SerializeToString())
    (tmp_path / WEIGHTS).write_bytes(weights_of(4))
    for digest in ("", "0" * 64):
        with pytest.raises(TowerError, match="was changed while it was read"):
            inspect_towers({path: hashlib.sha256(path.read_bytes()).hexdigest()}, digest)


def test_fault_G34_only_a_pass_of_the_same_check_spares_another_process_the_inspection(
    tmp_path: Path, looked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path, bad = tmp_path / "tower.onnx", tmp_path / "bad.onnx"
    path.write_bytes(hostile_towers.plain().SerializeToString())
    bad.write_bytes(hostile_towers.foreign_operator(hostile_towers.plain()).SerializeToString())

    class Outside(Kind):
        operators: ClassVar[dict[str, set[str]]] = {}

    def process(*options: Any) -> list[str]:
        monkeypatch.setattr(inspections, "_here", set())
        looked.clear()
        OnnxTower(path, 1, *options)
        return looked

    assert process() == ["tower.onnx"]
    assert process() == []
    assert process(InspectionLimits(cpu_seconds=20)) == ["tower.onnx"]
    assert process(InspectionLimits(max_memory=1 << 28)) == ["tower.onnx"]
    assert process(InspectionLimits(max_memory=1 << 50)) == []  # that bounds nothing
    Outside.operators = {"ReduceLogSum": set()}
    assert process() == ["tower.onnx"]
    Outside.operators = {}
    monkeypatch.setattr("twotower.onnx.tower._versions", lambda: ("next", "next"))
    assert process() == ["tower.onnx"]
    for _ in range(2):
        with pytest.raises(TowerError, match="the operator 'Abs'"):
            OnnxTower(bad)
    assert looked == ["tower.onnx", "bad.onnx", "bad.onnx"]


def test_fault_G27_an_operator_is_allowed_only_if_an_imported_kind_declares_it(beside: Path) -> None:
    model = hostile_towers.plus(
        hostile_towers.plain(), "shift", helper.make_node("ReduceLogSum", ["rows", "axes"], ["shift"], keepdims=0)
    )
    data = model.SerializeToString()
    (beside / "tower.onnx").write_bytes(data)
    with pytest.raises(
        TowerError, match="the operator 'ReduceLogSum', which .* no kind of the modules `kinds` declares"
    ):
        OnnxTower(beside / "tower.onnx")

    class Outside(Kind):
        operators = {"ReduceLogSum": {"axes"}}

    with pytest.raises(TowerError, match="the attribute 'keepdims' of ReduceLogSum"):
        OnnxTower(beside / "tower.onnx")
    Outside.operators = {"ReduceLogSum": {"keepdims"}}
    assert np.isfinite(OnnxTower(beside / "tower.onnx")(LOOKUP)).all()
    Outside.operators = {}
    branches = {"If": {"then_branch", "else_branch"}}
    reads_a_file = hostile_towers.subgraph(hostile_towers.plain()).SerializeToString()
    assert "AttributeProto.g" in disallowed_content(reads_a_file, branches)


def test_fault_G1_a_file_is_read_as_what_was_looked_at() -> None:
    """onnxruntime takes bytes with these letters at this place for a format of its own, which nobody has looked at."""
    model = hostile_towers.plain()
    model.producer_name = "ORTM"
    data = model.SerializeToString()
    assert data[4:8] == b"ORTM"
    assert OnnxTower(data)(LOOKUP).tolist() == [[2.0] * hostile_towers.WIDTH]


def test_fault_G1_a_file_that_changes_while_it_is_looked_at_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tower.onnx"
    model = hostile_towers.plain()
    model.producer_name = "another"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(RunError, match="was changed while it was read"):
        inspect_towers({path: "0" * 64})


@pytest.mark.parametrize("change", hostile_towers.GREEDY, ids=called)
def test_fault_G2_a_tower_that_asks_for_gigabytes_is_refused_and_they_are_never_taken(change: Change) -> None:
    before = peak()
    with pytest.raises(RunError, match=r"^tower: loading it takes more than 537 MB$"):
        OnnxTower(change(hostile_towers.plain()).SerializeToString())
    assert peak() - before < 1 << 30


def test_fault_G2_a_tower_that_never_ends_is_refused() -> None:
    with pytest.raises(RunError, match=r"^tower: loading it takes more than \d+(\.\d+)? seconds$"):
        OnnxTower(
            hostile_towers.years(hostile_towers.plain()).SerializeToString(), limits=InspectionLimits(cpu_seconds=0.3)
        )


def test_fault_G2_a_tower_may_take_what_is_free_and_no_more(store: Path) -> None:
    def filled(model: Any) -> Any:
        nodes = [hostile_towers._filled(model, "filled", [1 << 25])]  # 128 MiB
        return hostile_towers.plus(
            model, "much", *nodes, onnx.helper.make_node("ReduceMax", ["filled"], ["much"], keepdims=0)
        )

    Store(store).rollback(hostile_towers.forged(store, {"user_tower.onnx": hostile_towers.of(filled)}))
    bundle = Store(store).current()
    with pytest.raises(RunError, match=r"user_tower.onnx: loading it takes more than 50 MB"):
        Retriever(bundle, tower_memory=50_000_000)
    assert Retriever(bundle).loaded.tower.width


# ---- wherever a bundle is loaded


def test_a_tower_is_looked_at_once_and_our_own_not_at_all(run: Run, store: Path, looked: list[str]) -> None:
    api.publish(run, store)
    Retriever(Store(store).current())
    assert looked == []

    def other(model: Any) -> Any:
        model.producer_version = "of another process"
        return model

    Store(store).rollback(
        hostile_towers.forged(
            store, {"user_tower.onnx": hostile_towers.of(other), "item_tower.onnx": hostile_towers.of(other)}
        )
    )
    for _ in range(2):
        Retriever(Store(store).current())
        OnnxTower(Store(store).current().folder / "item_tower.onnx")
    assert sorted(looked) == ["item_tower.onnx", "user_tower.onnx"]


@pytest.mark.parametrize("file", ["user_tower.onnx", "item_tower.onnx"])
@pytest.mark.parametrize("change", [hostile_towers.subgraph, hostile_towers.bomb_at_load], ids=called)
@pytest.mark.parametrize("command", ["recommend", "evaluate"])
def test_fault_G1_G2_no_command_loads_a_foreign_tower(
    command: str, change: Change, file: str, store: Path, beside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Store(store).rollback(hostile_towers.forged(store, {file: hostile_towers.of(change)}))
    words = {"recommend": ["--store", str(store), "--user", "1", "--method", "2"], "evaluate": [str(store)]}[command]
    before = peak()
    assert run_command([command, *words]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert f"{file}: " in said.err
    assert ("the operator 'If'" if change is hostile_towers.subgraph else "takes more than") in said.err
    assert peak() - before < 1 << 30


def test_fault_G1_a_foreign_tower_is_not_published(
    run: Run, store: Path, beside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (store / "CURRENT").read_text()

    def another(model: Any, side: Any, fields: Any, path: Path, *more: Any) -> float:
        found = export_tower(model, side, fields, path, *more)
        path.write_bytes(hostile_towers.of(hostile_towers.scan)(path.read_bytes()))
        return found

    monkeypatch.setattr(publisher, "export_tower", another)
    with pytest.raises(BundleError, match=r"not published, .* not a tower: it holds the operator 'Scan'") as caught:
        api.publish(run, store)
    assert caught.value.reason == "tower"
    assert (store / "CURRENT").read_text() == before
    assert len(Store(store).bundles()) == 1


def test_fault_G1_the_exporter_writes_no_other_tower(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*inputs: Any) -> bytes:
        return hostile_towers.of(hostile_towers.initialiser)(build_graph(*inputs))

    monkeypatch.setattr(export, "build_graph", build)
    fields = run.dataset.encoders.fields("user")
    with pytest.raises(RunError, match="x.onnx: not a tower: it holds the tensor"):
        export_tower(run.model, "user", fields, tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


def test_fault_G32_a_session_sends_nothing_home_and_leaves_no_file_there(tmp_path: Path) -> None:
    """onnxruntime would make an id of the machine and a queue of what is to be sent in the folder of caches."""
    env = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    env |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", SESSION], env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    asked = subprocess.run(
        [sys.executable, "-c", "import os, twotower.onnx; print(os.environ['ORT_DISABLE_TELEMETRY'])"],
        env=env | {"ORT_DISABLE_TELEMETRY": "0"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert asked.stdout == "0\n"
