"""What a bundle holds agrees with itself, or is refused."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from worlds import CHECKERBOARD_SCHEMA, checkerboard, settings

import twotower
from twotower import api
from twotower.arrays.ragged import Ragged
from twotower.cli.app import run_command
from twotower.data.splits import TEST, VALIDATION
from twotower.errors import BundleError, RunError
from twotower.features.sequence import Sequence
from twotower.files.object_stores import ObjectClient
from twotower.files.urls import Url
from twotower.index import Index, load_index, tune_index
from twotower.index.faiss.faiss_index import FAISS_MIN_VECTORS
from twotower.index.faiss.hnsw import Hnsw
from twotower.index.faiss.ivf import Ivf
from twotower.publishing import publisher
from twotower.publishing.publisher import _probe, _write
from twotower.retrieval import loaded_bundle
from twotower.retrieval.request import Request
from twotower.retrieval.retriever import Retriever
from twotower.runs import Run
from twotower.store.bundle import Bundle
from twotower.store.manifest import BundleFacts
from twotower.store.store import Store


def world() -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """A checkerboard on which nobody has met everything."""
    users, items, actions = checkerboard()
    return users, items, actions.head(700)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    """Two models of one world; the second has narrower vectors."""
    folder = tmp_path_factory.mktemp("runs")
    narrow: dict[str, object] = {"pairs": [{"user": {"layers": [4]}, "item": {"layers": [4]}}]}
    return (
        twotower.fit(world(), CHECKERBOARD_SCHEMA, settings(), folder=folder / "a"),
        twotower.fit(world(), CHECKERBOARD_SCHEMA, settings(model=narrow), folder=folder / "b"),
    )


def opens(bundle: Bundle) -> None:
    Retriever(bundle)


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The place of a new store: on the disk, or in a bucket."""
    if request.param == "folder":
        return str(tmp_path / "store")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return f"{request.getfixturevalue('bucket')}/store"


def check_old_answers(store: Store, old: Bundle) -> None:
    """Check that a refused bundle has left the old one, and nothing else."""
    assert Retriever(store.current()).recommend(Request("1"), 3).bundle_id == old.id
    assert [line.id for line in store.bundles()] == [old.id]
    if isinstance(store.at, Url):
        objects = ObjectClient(store.at).list(f"{store.at.key}/bundles")
        assert {o.key.split("/")[2] for o in objects} == {old.id}


def with_file_of_another(run: Run, other: Run, names: list[str]) -> Callable[[Path], BundleFacts]:
    """A writer of bundles that puts some files of another run's bundle beside this one's."""

    def write(folder: Path) -> BundleFacts:
        theirs = folder.parent.parent / "theirs"
        theirs.mkdir()
        _write(other, other.config.index, theirs)
        facts = _write(run, run.config.index, folder)
        for name in names:
            if (theirs / name).is_dir():
                shutil.rmtree(folder / name)
                shutil.copytree(theirs / name, folder / name)
            else:
                shutil.copyfile(theirs / name, folder / name)
        shutil.rmtree(theirs)
        return facts

    return write


def test_fault_A6_a_tower_of_another_model_is_refused_and_the_old_bundle_answers(
    runs: tuple[Run, Run], place: str
) -> None:
    old = api.publish(runs[0], place)
    store = Store(place)
    with pytest.raises(BundleError, match="model is") as caught:
        store.publish(with_file_of_another(runs[0], runs[1], ["user_tower.onnx"]), opens)
    assert caught.value.reason == "mismatch"
    check_old_answers(store, old)


@pytest.mark.parametrize(
    ("names", "field"),
    [(["user_vectors.npy"], "dims"), (["index"], "dims"), (["users.parquet"], "users"), (["items.parquet"], "items")],
)
def test_fault_A7_dims_metric_or_counts_that_differ_are_refused(
    runs: tuple[Run, Run], tmp_path: Path, place: str, names: list[str], field: str
) -> None:
    small = checkerboard(30, 20)
    other = runs[1]
    if field in ("users", "items"):
        other = twotower.fit(small, CHECKERBOARD_SCHEMA, settings(), folder=tmp_path / "small")
        names = [*names, "interactions.parquet"] if field == "users" else names
    store = Store.create(place)
    with pytest.raises(RunError, match=field) as caught:
        store.publish(with_file_of_another(runs[0], other, names), opens)
    assert getattr(caught.value, "reason", "") in ("mismatch", "probe")
    assert store.bundles() == []


@pytest.fixture(scope="module")
def many_items(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A model of more items than an index without a file of FAISS has."""
    tables = checkerboard(40, FAISS_MIN_VECTORS + 10)
    config = settings(train={"epochs": 1, "batch_size": 2_000})
    return twotower.fit(tables, CHECKERBOARD_SCHEMA, config, folder=tmp_path_factory.mktemp("many") / "run")


def test_fault_A4_a_hostile_index_is_refused_at_publish_and_the_old_bundle_answers(many_items: Run, place: str) -> None:
    old = api.publish(many_items, place, Hnsw(k=5))
    store = Store(place)

    def write(folder: Path) -> BundleFacts:
        facts = _write(many_items, Hnsw(k=5), folder)
        file = folder / "index" / "index.faiss"
        data = bytearray(file.read_bytes())
        data[40:200] = b"\xff" * 160
        file.write_bytes(data)  # before the manifest is made: the digest will agree
        return facts

    with pytest.raises(RunError, match=r"index\.faiss: not a usable FAISS index"):
        store.publish(write, opens)
    check_old_answers(store, old)


def test_fault_A3_a_damaged_file_is_refused_before_it_is_parsed(runs: tuple[Run, Run], tmp_path: Path) -> None:
    bundle = api.publish(runs[0], tmp_path / "store")
    for path in sorted(p for p in bundle.folder.rglob("*") if p.is_file()):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.chmod(0o644)
        path.write_bytes(data)
        with pytest.raises(BundleError):
            api.retriever(tmp_path / "store")
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    assert api.retriever(tmp_path / "store").recommend(Request("1"), 3).items


@pytest.mark.parametrize("which", ["memory", "folder", "measured"])
def test_files_of_another_model_than_the_one_in_memory_are_not_published(
    runs: tuple[Run, Run], tmp_path: Path, which: str
) -> None:
    """Trained on after loading, or trained or measured anew in the same folder meanwhile: no bundle holds both."""
    folder = tmp_path / "run"
    shutil.copytree(str(runs[0].folder), folder)
    run = twotower.load(folder)
    if which == "memory":
        with torch.no_grad():
            next(run.model.parameters()).add_(0.1)
    elif which == "measured":
        config = run.config.model_copy(update={"evaluation": run.config.evaluation.model_copy(update={"k": (3,)})})
        again = twotower.fit(world(), CHECKERBOARD_SCHEMA, config, folder=folder, resume=True)
        assert (again.sha256, again.metrics != run.metrics) == (run.sha256, True)
    else:
        shutil.rmtree(folder)
        twotower.fit(world(), CHECKERBOARD_SCHEMA, settings(train={"seed": 5}), folder=folder)
    with pytest.raises(BundleError, match="holds another run than the one in memory"):
        api.publish(run, tmp_path / "store")
    assert Store(tmp_path / "store").bundles() == []
    api.publish(twotower.load(folder), tmp_path / "store")


def test_the_methods_must_agree_on_more_than_the_first_user(runs: tuple[Run, Run], tmp_path: Path) -> None:
    def write(folder: Path) -> BundleFacts:
        facts = _write(runs[0], runs[0].config.index, folder)
        vectors = np.load(folder / "user_vectors.npy")
        vectors[20] = vectors[21]
        np.save(folder / "user_vectors.npy", vectors)
        return facts

    with pytest.raises(BundleError, match="give different answers"):
        Store.create(tmp_path / "store").publish(write, _probe)


def test_fault_A13_gc_leaves_a_bundle_alone_while_it_is_loaded(
    runs: tuple[Run, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = api.publish(runs[0], tmp_path / "store")
    real = load_index

    def overtaken(folder: Path, **how: bool) -> object:
        monkeypatch.setattr(loaded_bundle, "load_index", real)
        for _ in range(2):
            api.publish(runs[0], tmp_path / "store")
        assert Store(tmp_path / "store").gc() == []
        return real(folder, **how)

    monkeypatch.setattr(loaded_bundle, "load_index", overtaken)
    loaded = Retriever(old)
    assert Store(tmp_path / "store").gc() == [old.id]
    assert len(loaded.recommend(Request("1"), 3, 2).items) == 3


def test_fault_C10_zero_and_broken_vectors_are_counted_and_never_found(
    runs: tuple[Run, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: list[str]
) -> None:
    run = twotower.fit(checkerboard(), CHECKERBOARD_SCHEMA, settings(model={"bias": False}), folder=tmp_path / "cosine")
    factors = run.factors(TEST)
    items = factors.items.clone()
    items[3] = 0.0
    items[4] = torch.nan
    monkeypatch.setattr(Run, "factors", lambda self, part=TEST: type(factors)(factors.users, items))
    bundle = api.publish(run, tmp_path / "store")
    assert any("2 of 30 item vectors are zero or not finite" in line for line in messages)
    assert bundle.manifest.index.rejected == 2
    retriever = api.retriever(tmp_path / "store")
    answer = retriever.recommend(Request("1"), 30, keep_seen=True)
    assert len(answer.items) == 28
    assert answer.truncated
    assert {"3", "4"}.isdisjoint(i.id for i in answer.items)
    assert np.isfinite([i.score for i in answer.items]).all()
    found = api.evaluate_bundle(retriever)
    assert np.isfinite(found["index"]["recall@5"])
    monkeypatch.setattr(Run, "factors", lambda self, part=TEST: type(factors)(factors.users * torch.nan, items))
    with pytest.raises(RunError, match="40 user vectors are not finite"):
        api.publish(run, tmp_path / "store")
    assert Store(tmp_path / "store").current().id == bundle.id


def test_fault_A11_an_index_below_the_recall_threshold_is_refused_unless_forced(
    runs: tuple[Run, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("twotower.publishing.publisher.measure_recall", lambda index, queries, k, banned: 0.5)
    assert runs[0].folder is not None
    arguments = ["publish", str(runs[0].folder), "--store", str(tmp_path / "store")]
    assert run_command(arguments) == 2
    assert "0.5" in capsys.readouterr().err
    assert run_command([*arguments, "--force", "--reason", "a trial"]) == 0
    last = Store(tmp_path / "store").history()[-1]
    assert (last["action"], last["forced"], last["reason"]) == ("publish", True, "a trial")


def test_the_index_aims_above_the_threshold_it_must_reach(
    runs: tuple[Run, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def tune(index: Index, queries: np.ndarray, k: int, target: float, banned: list[np.ndarray] | None) -> float:
        asked.append(target)
        return tune_index(index, queries, k, target, banned)

    monkeypatch.setattr(publisher, "tune_index", tune)
    api.publish(runs[0], tmp_path / "store", Ivf(k=5, min_recall=0.9))
    assert asked == [pytest.approx(0.92)] * 2, "of answers that leave out what was seen, and of new users"


def test_publishing_warns_of_rows_that_are_in_no_history_of_the_bundle(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    users, items, log = checkerboard()
    history = Sequence(name="h", side="user")
    for features, told in (((), False), ((history,), True)):
        schema = CHECKERBOARD_SCHEMA.model_copy(update={"features": (*CHECKERBOARD_SCHEMA.features, *features)})
        with caplog.at_level(logging.INFO, "twotower"):
            run = api.fit((users, items, log), schema, settings(train={"epochs": 1}), folder=tmp_path / str(told))
            api.publish(run, tmp_path / "store")
        n = len(run.dataset.part_indices(VALIDATION)) + len(run.dataset.part_indices(TEST))
        line = (
            f"the histories of the bundle lack the {n:,} rows of the validation and test part, but answers leave out "
            "their items; train with a smaller split.validation and split.test to serve with nearly all rows"
        )
        assert (line in caplog.messages) == told
    histories = run.dataset.side_before("user", TEST).columns["h"]
    assert isinstance(histories, Ragged)
    assert len(histories.values) == len(run.dataset.pairs) - n


@pytest.mark.parametrize("keeps", [False, True])
def test_the_recall_check_leaves_out_what_answers_leave_out(
    runs: tuple[Run, Run], keeps: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[np.ndarray, list[np.ndarray] | None]] = []

    def check(index: Index, queries: np.ndarray, k: int, banned: list[np.ndarray] | None) -> float:
        told.append((queries, banned))
        return 1.0 if banned is None else 0.97

    monkeypatch.setattr(publisher, "measure_recall", check)
    run = runs[0]
    if keeps:
        kept = run.config.evaluation.model_copy(update={"repeats": "allow"})
        run = replace(run, config=run.config.model_copy(update={"evaluation": kept}))
    bundle = api.publish(run, tmp_path / "store", force=True)
    assert told[-1][1] is None
    if keeps:
        assert len(told) == 1
        return
    assert bundle.manifest.recall_check.recall == 0.97, "the lower of both"
    (queries, banned), _ = told
    assert banned
    vectors = run.factors(TEST).users.cpu().numpy()
    for query, rows in zip(queries, banned, strict=True):
        users = np.flatnonzero((vectors == query).all(1))
        assert any(set(rows) == set(run.dataset.interacted_items.row(int(user))) for user in users)


def test_the_story_of_a_store(runs: tuple[Run, Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = ["--store", str(tmp_path / "store")]

    def call(*arguments: str, code: int = 0) -> str:
        assert run_command([*arguments]) == code
        said = capsys.readouterr()
        return said.out if code == 0 else said.err

    assert "not a store" in call("recommend", *store, "--user", "1", code=2)
    assert "recall check: 1.0000" in call("publish", str(runs[0].folder), *store)
    first = json.loads(call("recommend", *store, "--user", "1", "--json"))
    assert first["source"] == "model"
    call("publish", str(runs[1].folder), *store, "--set", "index.kind=ivf", "--set", "index.k=5")
    second = json.loads(call("recommend", *store, "--user", "1", "--method", "2", "--json"))
    assert second["bundle_id"] != first["bundle_id"]
    listed = call("bundles", *store).splitlines()
    assert [line.split()[0] for line in listed] == [first["bundle_id"], second["bundle_id"]] or len(listed) == 2
    assert "current" in next(line for line in listed if line.startswith(second["bundle_id"]))
    assert first["bundle_id"] in call("rollback", *store)
    again = json.loads(call("recommend", *store, "--user", "1", "--json"))
    assert (again["items"], again["bundle_id"]) == (first["items"], first["bundle_id"])
    assert [json.loads(line)["action"] for line in call("bundles", *store, "--history").splitlines()] == [
        "publish", "publish", "rollback",
    ]  # fmt: skip
    assert "removed: nothing" in call("gc", *store)
    table = call("evaluate", str(tmp_path / "store"))
    assert "method 1, index" in table
    served = json.loads(call("evaluate", str(tmp_path / "store"), "--json"))
    assert served["index"]["recall@5"] == pytest.approx(runs[0].metrics["test.recall@5"], abs=1e-9)
    file = tmp_path / "who.json"
    file.write_text('{"history": ["0", "2"]}', encoding="utf-8")
    assert "an unknown user by the tower alone" in call("recommend", *store, "--features", str(file))
    assert "popular" in call("recommend", *store, "--user", "nobody", "-k", "2")
    file.write_text("{", encoding="utf-8")
    assert "not readable as JSON" in call("recommend", *store, "--features", str(file), code=2)
    assert "name a user" in call("recommend", *store, code=2)
    assert "COLUMN=VALUE" in call("recommend", *store, "--user", "1", "--where", "x", code=2)
    assert len(call("similar", *store, "--item", "2", "-k", "3").splitlines()) == 4
    assert "index.* only" in call("publish", str(runs[0].folder), *store, "--set", "train.epochs=3", code=2)
    assert "no folder" in _refused_without_a_folder(runs[0], tmp_path)
    assert "the current bundle" in call("publish", str(runs[0].folder), *store)
    (Store(tmp_path / "store").current().folder / "users.parquet").unlink()
    assert "users.parquet: missing" in call("recommend", *store, "--user", "1", code=2)


def _refused_without_a_folder(run: Run, folder: Path) -> str:
    from dataclasses import replace

    with pytest.raises(RunError) as caught:
        api.publish(replace(run, folder=None), folder / "store")
    return str(caught.value)


@pytest.mark.parametrize("repeats", ["only", "allow"])
def test_a_ranking_that_no_service_gives_is_told(
    repeats: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    users, items, actions = world()
    schema = CHECKERBOARD_SCHEMA.model_copy(update={"duplicates": "keep"})
    config = settings(train={"epochs": 1}, evaluation={"repeats": repeats})
    run = twotower.fit((users, items, pl.concat([actions, actions])), schema, config, folder=tmp_path / "run")
    with caplog.at_level("WARNING", "twotower"):
        twotower.publish(run, tmp_path / "store")
    assert ("evaluation.repeats = 'only' measures rankings of the items that a user has taken" in caplog.text) == (
        repeats == "only"
    )
