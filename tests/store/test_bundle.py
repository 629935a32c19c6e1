"""A bundle whose files are damaged and sealed again, as an attacker or a bug of another program would: one line that
says what is wrong, or an answer; never a traceback."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from damage import damages
from worlds import EVERYTHING_SCHEMA, everything, settings

import twotower
from twotower import api
from twotower.cli.app import run_command
from twotower.data import prepare
from twotower.data.config import DataConfig
from twotower.errors import BundleError, TwoTowerError
from twotower.publishing.bundle_evaluation import evaluate_bundle
from twotower.retrieval.request import Request
from twotower.retrieval.retriever import Retriever
from twotower.serve.bundles import check_answers
from twotower.store.bundle import Bundle
from twotower.store.manifest import manifest_digest
from twotower.store.store import Store

ANYTHING = {"README.md", "metrics.json", "model.json"}  # which no answer is made of


@pytest.fixture(scope="module", params=["memory", "disk"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published model that reads every kind of feature; of tables in memory, or prepared on a disk."""
    folder = tmp_path_factory.mktemp(request.param)
    schema, tables = EVERYTHING_SCHEMA, everything()
    if request.param == "memory":
        run = twotower.fit(tables, schema, settings(), folder=folder / "run")
    else:
        schema = schema.model_copy(update={"features": tuple(f for f in schema.features if f.name != "fans")})
        paths = {name: folder / f"{name}.parquet" for name in ("users", "items", "interactions")}
        for path, frame in zip(paths.values(), tables, strict=True):
            frame.with_columns(pl.col(pl.Int32).cast(pl.Int64)).write_parquet(path)
        data = DataConfig(**{name: str(path) for name, path in paths.items()})
        config = settings(split={"kind": "time"}, data={"prepared": str(folder / "out")})
        prepare.write_prepared(data, schema, config.split, folder / "out")
        given, schema_ = api.read(config, None)
        run = api.fit(given, schema_, config, folder=folder / "run")
    twotower.publish(run, folder / "store")
    return folder / "store"


class Sealed:
    """A copy of a bundle in which one file at a time is another, and the manifest agrees with it."""

    def __init__(self, store: Path, to: Path) -> None:
        self.store = Path(shutil.copytree(store, to, copy_function=os.link))
        self.folder = Store(self.store).current().folder
        self.manifest = json.loads((self.folder / "MANIFEST.json").read_text())

    def with_(self, name: str, data: bytes) -> Path:
        """The folder; it is current."""
        (self.folder / name).unlink()  # which has other names
        (self.folder / name).write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        manifest = json.loads(json.dumps(self.manifest))
        for entry in manifest["files"]:
            if entry["path"] == name:
                entry |= {"size": len(data), "sha256": digest}
        if name == "encoders.json":
            manifest["vocab_hash"] = digest
        manifest["bundle"] = f"{self.folder.name[:16]}-{manifest_digest(manifest)}"
        (self.folder / "MANIFEST.json").unlink()
        (self.folder / "MANIFEST.json").write_text(json.dumps(manifest))
        self.folder = self.folder.rename(self.folder.with_name(manifest["bundle"]))
        (self.store / "CURRENT").unlink()
        (self.store / "CURRENT").write_text(self.folder.name)
        return self.folder


def shots(data: dict[str, bytes], share: int) -> Iterator[tuple[str, str, bytes]]:
    """Yield files and their damaged contents, one of `share` ways; each array of a prepared dataset in a few ways."""
    for place, (name, whole) in enumerate(data.items()):
        few = 8 if "/arrays/" in name or name in ANYTHING else 1
        for number, (what, other) in enumerate(damages(name, whole)):
            if number % few == place % few and (number // few) % share == 0:
                yield name, what, other


@pytest.mark.parametrize("share", [12, pytest.param(1, marks=pytest.mark.system)])
def test_fault_G18_a_damaged_file_of_a_bundle_is_a_line_that_names_it_and_never_a_traceback(
    store: Path, tmp_path: Path, share: int
) -> None:
    sealed = Sealed(store, tmp_path / "store")
    data = {e["path"]: (sealed.folder / e["path"]).read_bytes() for e in sealed.manifest["files"]}
    refused = dict.fromkeys(data, 0)
    for name, what, other in shots(data, share):
        folder = sealed.with_(name, other)
        shot = f"{name}: {what}"
        try:
            with warnings.catch_warnings(action="ignore"):
                retriever = Retriever(Bundle.open(folder))
                check_answers(retriever)
                for user in retriever.user_ids[:3]:
                    retriever.recommend(Request(user, events=[(retriever.item_ids[0], True)]), 5, 2)
                retriever.similar(retriever.item_ids[0], 3)
                evaluate_bundle(retriever)
        except TwoTowerError as e:
            refused[name] += 1
            said = str(e)
            assert "\n" not in said, shot
            if what in ("empty", "cut", "noise", "a pickle", "objects", "archive", "JSON null", "JSON ["):
                assert Path(name).name in said or ("index" in name and "/index" in said), f"{shot}: {said}"
        except Exception as e:
            raise AssertionError(shot) from e
        sealed.with_(name, data[name])
    unread = {*ANYTHING, *({"encoders.json", "vocabularies.arrow"} if "prepared/encoders.json" in data else ())}
    assert [name for name, n in refused.items() if not (n or name in unread or "/arrays/" in name)] == []
    assert Retriever(Bundle.open(sealed.folder)).recommend(Request("u1"), 3).items


@pytest.mark.parametrize(
    "name", ["encoders.json", "vocabularies.arrow", "users.parquet", "user_vectors.npy", "index/index.json"]
)
def test_fault_G18_verbs_say_which_file_is_damaged_in_one_line(
    store: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sealed = Sealed(store, tmp_path / "store")
    if (sealed.folder / "prepared" / name).exists():
        name = f"prepared/{name}"
    sealed.with_(name, b"\xff\x00" * 100)
    verbs = [["evaluate"], ["recommend", "--user", "u1", "--store"], ["similar", "--item", "i1", "--store"]]
    for verb in verbs[:1] if name == "config.toml" else verbs:  # no answer depends on the settings
        assert run_command([*verb, str(sealed.store)]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: "), said
        assert len(said.splitlines()) == 1, said
        assert str(sealed.folder / (name if "index" not in name else "index")) in said


MANIFESTS: list[tuple[str, Any]] = [
    ("recall_check", {"recall": "0.9", "threshold": 0.5}),
    ("recall_check", {"recall": None, "threshold": 0.5}),
    ("recall_check", {"threshold": 0.5}),
    ("recall_check", {"recall": True, "threshold": 0.5}),
    ("recall_check", {"recall": float("nan"), "threshold": 0.5}),
    ("recall_check", {"recall": 1.0, "threshold": 0.5, "k": 10**30}),
    ("counts", {"users": "many"}),
    ("counts", {"users": -1}),
    ("counts", {"users": 10**400}),
    ("index", ["exact"]),
    ("created", "\ud800"),
]


@pytest.mark.parametrize(("field", "value"), MANIFESTS)
def test_fault_G18_a_manifest_with_another_type_deep_inside_is_refused(
    store: Path, tmp_path: Path, field: str, value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    sealed = Sealed(store, tmp_path / "store")
    sealed.manifest[field] = value
    folder = sealed.with_("README.md", b"# A model")
    with pytest.raises(BundleError) as caught:
        Store(sealed.store).current()
    assert caught.value.reason in ("manifest", "checksum")
    assert str(folder / "MANIFEST.json") in str(caught.value)
    assert run_command(["bundles", "--store", str(sealed.store)]) == 0
    assert f"current, damaged: {caught.value.reason}" in capsys.readouterr().out
    assert run_command(["recommend", "--user", "u1", "--store", str(sealed.store)]) == 2


def test_fault_G18_lines_of_the_history_that_are_none_of_ours_are_left_out(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(store, tmp_path / "store"))
    path = copy / "HISTORY.jsonl"
    whole = path.read_bytes()
    lines = [
        b"", b"null", b"3", b"[]", b'"text"', b"{", b"\xff\xfe", b"[" * 100_000, b'{"bundle": 3, "action": "publish"}',
        b'{"bundle": "x", "action": ["publish"]}', b'{"bundle": "x", "action": {}}',
        b'{"bundle": null, "action": null}',
        b'{"bundle": "\\ud800", "action": "publish"}', b'{"bundle": "x", "action": "gc", "n": ' + b"1" * 5000 + b"}",
        b'{"bundle": "x", "action": "gc", "recall_check": NaN}',
    ]  # fmt: skip
    path.write_bytes(b"\n".join([*lines, whole, *lines]) + b"\n")
    before = Store(store).history()
    assert Store(copy).history() == before
    assert run_command(["bundles", "--history", "--store", str(copy)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(before)
    assert run_command(["gc", "--store", str(copy)]) == 0
    assert run_command(["rollback", "--store", str(copy)]) == 2
    assert "no bundle was current before" in capsys.readouterr().err
