"""The store: whatever happens while publishing, what is served is whole, and what is damaged is not served."""

from __future__ import annotations

import errno
import fcntl
import functools
import io
import json
import mmap
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import kill_points
import preloaded
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from store_worlds import FACTS, content, ids, tag_of

import twotower.store.bundle
from twotower.errors import BundleError, RunError
from twotower.files.layout import MANIFEST
from twotower.store.bundle import Bundle
from twotower.store.manifest import BundleFacts, manifest_digest
from twotower.store.store import Store


def history(store: Store) -> list[Any]:
    return list(store.history())


def leftovers(store: Store) -> list[str]:
    return [p.name for p in [*store.path.iterdir(), *(store.path / "bundles").iterdir()] if p.name.startswith(".")]


def forge(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Change the manifest as an attacker would, who also corrects its digest; the folder's new path."""
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    manifest["bundle"] = f"{folder.name[:16]}-{manifest_digest(manifest)}"
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder.rename(folder.with_name(manifest["bundle"]))


@pytest.fixture
def quick(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: a kill loses nothing that was written, so syncing proves nothing."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as folder:
        yield Path(folder)


@pytest.fixture
def store(quick: Path) -> Store:
    return Store.create(quick / "store")


# ---- the way it goes when all is well -----------------------------------------------------------------------------


def test_a_reason_of_any_bytes_is_in_the_history_and_a_file_that_is_missing_is_named(store: Store) -> None:
    reason = "caf\udce9\u2028"  # what a shell gives for a byte that is no UTF-8, and a line end of some
    store.publish(content("one"), reason=reason)
    assert history(store)[-1]["reason"] == reason

    def write(folder: Path) -> BundleFacts:
        (folder / "nowhere" / "x").read_bytes()
        return BundleFacts.model_validate(FACTS)

    with pytest.raises(BundleError, match=r"nowhere/x: No such file"):
        store.publish(write)


def test_modes_do_not_depend_on_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o077)
    try:
        store = Store.create(tmp_path / "store")
        bundle = store.publish(content("one"))
    finally:
        os.umask(old)
    for path in [bundle.folder, *bundle.folder.rglob("*"), store.path / "CURRENT", store.path / "HISTORY.jsonl"]:
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644), path


def test_a_file_with_another_name_keeps_its_mode_there(tmp_path: Path) -> None:
    (tmp_path / "own").write_bytes(b"private")
    (tmp_path / "own").chmod(0o600)

    def write(folder: Path) -> BundleFacts:
        facts = content("tag", count=1)(folder)
        os.link(tmp_path / "own", folder / "linked")
        return facts

    bundle = Store.create(tmp_path / "store").publish(write)
    assert (tmp_path / "own").stat().st_mode & 0o777 == 0o600
    assert (bundle.folder / "linked").stat().st_mode & 0o777 == 0o644
    assert (bundle.folder / "linked").read_bytes() == b"private"


def test_a_folder_that_is_not_a_store_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"not a store; `publish\(run, store='.*'\)` creates one") as caught:
        Store(tmp_path)
    assert caught.value.reason == "store"
    (tmp_path / "thesis.doc").touch()
    with pytest.raises(BundleError, match=r"not empty and not a store \(it holds thesis.doc\)"):
        Store.create(tmp_path)
    with pytest.raises(BundleError, match="cannot create a store"):
        Store.create(tmp_path / "thesis.doc")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.doc"]
    with pytest.raises(BundleError, match="no bundle is published yet"):
        Store.create(tmp_path / "new").current()
    Store.create(tmp_path / "new").publish(content("one"))
    assert Store.create(tmp_path / "new").current() == Store(tmp_path / "new").current()


def test_the_module_is_light_and_its_error_crosses_processes() -> None:
    code = "import sys, twotower.store.store; assert not {'torch', 'polars', 'numpy', 'onnxruntime'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    copy = pickle.loads(pickle.dumps(BundleError("damaged", "size")))
    assert (str(copy), copy.reason, copy.exit_code) == ("damaged", "size", 2)


def test_a_damaged_bundle_is_not_rolled_back_to(store: Store) -> None:
    a = store.publish(content("a"))
    b = store.publish(content("b"))
    (a.folder / "0.bin").write_bytes(b"b" + bytes(range(100)))
    with pytest.raises(BundleError, match="checksum"):
        store.rollback()
    assert store.current() == b


def test_gc_removes_what_a_killed_publisher_was_writing(store: Store) -> None:
    for name in ("CURRENT", "HISTORY.jsonl", "COLLECTIONS.json"):
        (store.path / f".{name}.7.tmp").write_text("half")
    store.publish(content("a"))
    store.gc()
    assert not leftovers(store)


# ---- A1: killed ---------------------------------------------------------------------------------------------------


def whole(store: Store, before: str, tag: str) -> bool:
    """Whether CURRENT is the new bundle; it must be that or the one before, and whole."""
    bundle = store.current()
    assert tag_of(bundle) == (before if before == tag_of(bundle) else tag)
    return tag_of(bundle) == tag


def mended(store: Store, killed: bool) -> None:
    """After a change that followed a kill: nothing is left over, and the log says what happened."""
    assert not leftovers(store)
    assert all(line.damaged is None for line in store.bundles())
    *_, before, last = history(store)
    assert last["bundle"] == store.current().id
    assert (before["action"] == "recover" and before["reason"].endswith("died")) is killed


def publish(store: Store, tag: str, count: int) -> str:
    return store.publish(content(tag, count=count)).id


def kill_publish_everywhere(folder: str, count: int) -> None:
    store = Store.create(folder)
    store.publish(content("tag0"))
    before, point, done, new = "tag0", 0, False, 0
    while not done:
        point += 1
        tag = f"tag{point}"
        done, _ = kill_points.in_a_fork(functools.partial(publish, store, tag, count), point)
        known = [line["bundle"] for line in history(store)]
        if whole(store, before, tag):
            before, new = tag, new + 1
            known.append(store.current().id)
        held = bool((store.path / "LOCK").read_bytes())
        # The next change of any kind works and leaves only what was published.
        store.rollback(store.current().id)
        mended(store, held)
        assert set(ids(store)) <= set(known)
        store.gc()
        assert len(ids(store)) <= 3
    assert before == tag
    assert new > 3
    print(point - 1)


def kill_everything_at_random(folder: str, kills: int) -> None:
    draw = random.Random(0)
    store = Store.create(folder)
    store.publish(content("tag"))
    store.publish(content("tag"))

    def life() -> None:
        while True:
            for _ in range(3):
                store.publish(content("tag", count=6))
            store.rollback()
            store.gc()

    for _ in range(kills):
        assert not kill_points.in_a_fork(life, after=draw.uniform(0.0005, 0.05))[0]
        assert tag_of(store.current()) == "tag"
        held = bool((store.path / "LOCK").read_bytes())
        store.publish(content("tag", count=1))
        mended(store, held)
    print(kills)


def kill_rollback_and_gc_everywhere(folder: str) -> None:
    store = Store.create(folder)
    store.publish(content("a"))
    point, done = 0, False
    while not done:
        point += 1
        for tag in "bc":
            store.publish(content(tag, count=1))

        def change() -> None:
            store.rollback()
            store.gc()

        done, _ = kill_points.in_a_fork(change, point)
        assert tag_of(store.current()) in "bc"
        held = bool((store.path / "LOCK").read_bytes())
        store.rollback(store.current().id)
        mended(store, held)
    print(point - 1)


@pytest.mark.parametrize(("count", "expected"), [(5, 22), pytest.param(48, 200, marks=pytest.mark.system)])
def test_fault_A1_kill_at_every_point_of_publish_leaves_the_old_or_the_new(
    quick: Path, count: int, expected: int
) -> None:
    assert preloaded.number_told(__file__, f"kill_publish_everywhere({str(quick)!r}, {count})") >= expected


@pytest.mark.parametrize("kills", [9, pytest.param(40, marks=pytest.mark.system)])
def test_fault_A1_kill_at_random_times_leaves_a_whole_store(quick: Path, kills: int) -> None:
    assert preloaded.number_told(__file__, f"kill_everything_at_random({str(quick)!r}, {kills})") == kills


def test_fault_A1_kill_at_every_point_of_rollback_and_gc(quick: Path) -> None:
    assert preloaded.number_told(__file__, f"kill_rollback_and_gc_everywhere({str(quick)!r})") >= 20


# ---- A2: no space -------------------------------------------------------------------------------------------------


def sized(path: Path, size: int) -> BundleFacts:
    path.write_bytes(bytes(size))
    return BundleFacts.model_validate(FACTS)


def publish_in_little_space(folder: str) -> None:
    import resource

    store = Store(folder)
    for limit in (0, 10, 110, 600, 2_000, 100_000, 1_000_000):
        before, said = set(ids(store)), "File too large"
        size = min(500_000, 200 * limit)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            store.publish(lambda f: sized(f / "big.bin", size))  # noqa: B023
            done = 0
        except RunError as e:
            done, said = e.exit_code, str(e)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert "File too large" in said, said
        print(limit, done, len(set(ids(store)) - before), len(leftovers(store)))


def test_fault_A2_a_full_disk_leaves_what_was_and_says_so(store: Store) -> None:
    old = store.publish(content("one"))
    process = preloaded.start_in(__file__, f"publish_in_little_space({str(store.path)!r})")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    lines = [tuple(map(int, line.split())) for line in out.splitlines()]
    assert lines == [*((limit, 2, 0, 0) for limit in (0, 10, 110, 600, 2_000, 100_000)), (1_000_000, 0, 1, 0)]
    assert store.rollback() == old


@pytest.mark.parametrize("name", ["0.bin", MANIFEST, "CURRENT", "HISTORY.jsonl"])
def test_fault_A2_no_space_at_any_file(store: Store, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    old = store.publish(content("one"))
    real = Path.open

    def full(path: Path, *args: Any, **kwargs: Any) -> Any:
        if name in path.name and "wb" in args:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(RunError, match="No space left on device") as caught:
            store.publish(content("two"))
    assert caught.value.exit_code == 2
    assert not leftovers(store)
    if name == "HISTORY.jsonl":  # too late: it is served, and the message says so; the next change logs it
        new = store.current()
        assert f"CURRENT is {new.id}" in str(caught.value)
        assert store.rollback() == old
        assert [line["action"] for line in history(store)] == ["publish", "recover", "rollback"]
    else:
        assert f"CURRENT stays {old.id}" in str(caught.value)
        assert (ids(store), store.current()) == ([old.id], old)


# ---- A3, A5, A6, A7, A12: damaged, mixed and hostile --------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Store.create(tmp_path_factory.mktemp("sound") / "store").publish(content("one"))


@hypothesis_settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_fault_A3_any_bit_flipped_or_byte_cut_is_found_before_anything_is_parsed(sound: Bundle, data: Any) -> None:
    name = data.draw(st.sampled_from(["0.bin", "index/1.bin", MANIFEST]))
    path = sound.folder / name
    good = path.read_bytes()
    at = data.draw(st.integers(0, len(good) - 1))
    damaged, reasons = good[:at], {"size"}
    if data.draw(st.booleans()):
        damaged = good[:at] + bytes([good[at] ^ 1 << data.draw(st.integers(0, 7))]) + good[at + 1 :]
        reasons = {"checksum"}
    if name == MANIFEST:
        reasons = {"manifest", "checksum", "schema_version", "mismatch", "path"}
    path.write_bytes(damaged)
    try:
        with pytest.raises(BundleError) as caught:
            Bundle.open(sound.folder)
        assert caught.value.reason in reasons
    except pytest.fail.Exception:
        assert json.loads(damaged) == json.loads(good)  # a change of the manifest that says the same
    finally:
        path.write_bytes(good)
    assert Bundle.open(sound.folder) == sound


def test_fault_A3_the_old_stays_and_the_new_is_refused_with_its_reason(store: Store) -> None:
    old, new = store.publish(content("one")), store.publish(content("two"))
    (new.folder / "0.bin").write_bytes(b"TWO" + bytes(range(100)))
    with pytest.raises(BundleError, match="0.bin: damaged, or of another bundle .checksum.*rollback.store=") as caught:
        store.current()
    assert caught.value.reason == "checksum"
    assert [line.damaged for line in store.bundles()] == [None, None]  # a list reads no content
    (new.folder / "0.bin").unlink()
    assert [line.damaged for line in store.bundles()] == [None, "missing"]
    (old.folder / "notes.txt").touch()
    with pytest.raises(BundleError, match="notes.txt: not listed") as caught:
        Bundle.open(old.folder)
    assert caught.value.reason == "unlisted"
    (old.folder / "notes.txt").unlink()
    assert store.rollback() == old
    assert store.current() == old


def test_checksums_are_remembered_until_a_file_changes(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = store.publish(content("one"))
    read: list[str] = []
    real = twotower.store.bundle._sha256_of.__wrapped__

    def reading(path: str, *_: int) -> str:
        read.append(path)
        return real(path)

    monkeypatch.setattr(twotower.store.bundle, "_sha256_of", functools.lru_cache(reading))
    store.current()
    store.current()
    assert len(read) == 6  # what has just changed is not remembered
    clock = time.time_ns() + 10**10
    monkeypatch.setattr(time, "time_ns", lambda: clock)
    store.current()
    store.current()
    assert len(read) == 9
    path = bundle.folder / "0.bin"
    info = path.stat()
    path.write_bytes(b"ONE" + bytes(range(100)))
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
    with pytest.raises(BundleError, match="checksum"):
        store.current()


@pytest.mark.parametrize(
    ("change", "reason", "message"),
    [
        (lambda m: m.update(schema_version=2), "schema_version", "schema_version is 2, this version reads 7"),
        (lambda m: m.update(schema_version=True), "schema_version", "schema_version is True, this version reads 7"),
        (lambda m: m.pop("schema_version"), "schema_version", "schema_version is None, this version reads 7"),
        (lambda m: m.update(files={}), "manifest", "files: input should be a list"),
        (lambda m: m["files"].append("x"), "manifest", "files.3: input should be a valid dictionary"),
        (lambda m: m["files"][0].update(size="1"), "manifest", "files.0.size: input should be a valid integer"),
        (lambda m: m["files"][0].pop("sha256"), "manifest", "'files.0.sha256' is missing"),
        (
            lambda m: m["files"][0].update(size=10**30),
            "manifest",
            "not JSON .1000000000000000000… has more than 19 digits",
        ),
    ],
)
def test_fault_A5_a_manifest_that_says_something_else(
    store: Store, change: Callable[[dict[str, Any]], Any], reason: str, message: str
) -> None:
    folder = forge(store.publish(content("one")).folder, change)
    with pytest.raises(BundleError, match=message) as caught:
        Bundle.open(folder)
    assert caught.value.reason == reason
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 200_000, "not JSON"),
        (b"[1]", "not a JSON object"),
        (b" " * (16 << 20) + b"{}", "expected at most 16777216"),
        (None, "MANIFEST.json is missing"),
    ],
)
def test_fault_A5_a_manifest_that_is_none(store: Store, data: bytes | None, message: str) -> None:
    old, new = store.publish(content("one")), store.publish(content("two"))
    if data is None:
        (new.folder / MANIFEST).unlink()
    else:
        (new.folder / MANIFEST).write_bytes(data)
    with pytest.raises(BundleError, match=message) as caught:
        store.current()
    assert caught.value.reason == "manifest"
    assert [line.damaged for line in store.bundles()] == [None, "manifest"]
    assert store.rollback() == old


def test_fault_A6_files_or_manifest_of_another_bundle_are_refused(store: Store) -> None:
    old, new = store.publish(content("one")), store.publish(content("two"))
    shutil.copy(old.folder / "index" / "1.bin", new.folder / "index" / "1.bin")
    with pytest.raises(BundleError, match="of another bundle") as caught:
        store.current()
    assert caught.value.reason == "checksum"
    shutil.rmtree(new.folder)
    shutil.copytree(old.folder, new.folder)
    with pytest.raises(BundleError, match=f"of another bundle .'{old.id}'") as caught:
        store.current()
    assert caught.value.reason == "mismatch"
    assert store.rollback() == old


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("model", "sha-2", "model is 'sha-1'"), ("dims", 32, "dims is 64"), ("metric", "dot", "metric is 'cosine'"),
        ("items", 8, "items is 7"),
    ],
)  # fmt: skip
def test_fault_A7_model_dims_metric_and_counts_must_agree_between_files(
    sound: Bundle, field: str, value: Any, says: str
) -> None:
    facts: dict[str, Any] = {"model": "sha-1", "dims": 64, "metric": "cosine", "items": 7}
    sources = {"config.toml": facts, "item_vectors.npy": {"dims": 64, "items": 7}, "index/index.json": facts}
    sound.check_consistency(sources)
    for name in sources:
        if field in sources[name]:
            with pytest.raises(BundleError, match=f"{says} in .*, {value!r} in {name}") as caught:
                sound.check_consistency(sources | {name: sources[name] | {field: value}})
            assert caught.value.reason == "mismatch"


@pytest.mark.parametrize(
    "path",
    [
        "../../../CURRENT", "/etc/passwd", "index/../0.bin", "./0.bin", "index//1.bin", "index/", "..", ".", "",
        "0.bin\0", "index\\1.bin", "//etc/passwd", MANIFEST, "0.bin",
    ],
)  # fmt: skip
def test_fault_A12_a_path_that_leads_elsewhere_is_refused(store: Store, path: str) -> None:
    entry = {"path": path, "size": 0, "sha256": "0" * 64}
    folder = forge(store.publish(content("one")).folder, lambda m: m["files"].append(entry))
    with pytest.raises(BundleError, match="is not allowed") as caught:
        Bundle.open(folder)
    assert caught.value.reason == "path"


@pytest.mark.parametrize("what", ["file", "folder", "manifest", "bundle", "dangling", "pipe"])
def test_fault_A12_links_and_what_is_no_file_are_refused(store: Store, what: str) -> None:
    folder = store.publish(content("one")).folder
    moved = store.path.parent / "moved"
    victim = {"file": folder / "0.bin", "folder": folder / "index", "manifest": folder / MANIFEST, "bundle": folder}
    if what in victim:
        # The same content is there, on the other side of a link.
        victim[what].rename(moved)
        victim[what].symlink_to(moved)
    elif what == "dangling":
        (folder / "x").symlink_to(moved)
    else:
        os.mkfifo(folder / "x")
    # A manifest that is none is not even opened: it could be a pipe, or endless.
    with pytest.raises(
        BundleError, match="MANIFEST.json: not a regular file" if what == "manifest" else "link"
    ) as caught:
        store.current()
    assert caught.value.reason == "path"


def test_fault_A12_what_current_says_is_never_a_path(store: Store) -> None:
    bundle = store.publish(content("one"))
    for text in ("../bundles/" + bundle.id, bundle.folder.as_posix(), "x", "\x00", bundle.id + "/."):
        (store.path / "CURRENT").write_text(text)
        with pytest.raises(BundleError, match="is not the id of a bundle; available: ") as caught:
            store.current()
        assert caught.value.reason == "current"
    assert store.rollback(bundle.id) == bundle


# ---- A8: CURRENT points nowhere -----------------------------------------------------------------------------------


def make_huge(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 30)


MAKE: dict[str, Callable[[Path], Any]] = {
    "fifo": os.mkfifo,
    "folder": Path.mkdir,
    "huge": make_huge,
    "link": lambda path: path.symlink_to("/dev/zero"),
}


def ask_everything(folders: dict[str, str]) -> None:
    """How every verb that reads a store ends, and what it says; and publishing."""
    from twotower.cli.app import run_command

    verbs = (["bundles"], ["bundles", "--history"], ["recommend", "--user", "u"], ["rollback"], ["gc"])
    told: dict[str, dict[str, Any]] = {}
    for name, folder in folders.items():
        ends = told[name] = {}
        for verb, *more in verbs:
            sys.stderr = io.StringIO()
            code = run_command([verb, "--store", folder, *more])
            ends[" ".join([verb, *more])] = code, sys.stderr.getvalue()
        try:
            Store.create(folder).publish(content("new"))
            ends["publish"] = 0, ""
        except BundleError as e:
            ends["publish"] = 2, f"error: {e}"
    # Not ru_maxrss, which a process has of the one that started it.
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak is not None
    print(json.dumps({"MB": int(peak[1]) // 1000} | told))


@pytest.mark.parametrize("name", ["CURRENT", "HISTORY.jsonl", "LOCK", MANIFEST])
def test_fault_G7_what_is_no_file_of_a_store_keeps_no_verb_waiting(store: Store, name: str) -> None:
    store.publish(content("first"))
    current = store.publish(content("second")).folder
    folders: dict[str, str] = {}
    paths: dict[str, Path] = {}
    for kind, make in MAKE.items():
        folders[kind] = str(shutil.copytree(store.path, store.path.with_name(kind)))
        path = current / name if name == MANIFEST else store.path / name
        paths[kind] = Path(folders[kind]) / path.relative_to(store.path)
        paths[kind].unlink(missing_ok=True)
        make(paths[kind])
    asked = preloaded.start_in(__file__, f"ask_everything({folders!r})")
    said, _ = asked.communicate(timeout=120)
    assert asked.returncode == 0
    told = json.loads(said.splitlines()[-1])
    assert told.pop("MB") < 600  # a gigabyte is not read
    reads = {
        "CURRENT": ["bundles", "rollback", "gc", "recommend --user u", "publish"],
        "HISTORY.jsonl": ["bundles --history", "rollback", "gc", "publish"],
        "LOCK": ["rollback", "gc", "publish"],
        MANIFEST: ["recommend --user u"],
    }[name]
    for kind, ends in told.items():
        for verb, (code, text) in ends.items():
            if verb in reads and (name, kind) != ("LOCK", "huge"):  # of which a line is read
                assert code == 2, (kind, verb, text)
                assert text.startswith("error: "), (kind, verb, text)
                assert str(paths[kind]) in text, (kind, verb, text)


def test_fault_A8_current_that_points_nowhere_lists_what_there_is_and_what_to_do(store: Store) -> None:
    a, b, c = (store.publish(content(tag)) for tag in "abc")
    shutil.rmtree(c.folder)
    with pytest.raises(BundleError) as caught:
        store.current()
    assert caught.value.reason == "missing"
    assert f"{c.id}: no such bundle; available: {a.id}, {b.id}; `rollback(store='{store.path}')`" in str(caught.value)
    assert store.rollback() == b
    (store.path / "CURRENT").unlink()
    with pytest.raises(BundleError, match="no bundle is published yet"):
        store.current()
    assert store.rollback() == b
    (store.path / "CURRENT").unlink()
    (store.path / "HISTORY.jsonl").write_text('torn line{"a\n[]\n{}\n')
    with pytest.raises(BundleError, match="choose one with `to`"):
        store.rollback()
    assert store.rollback(a.id) == a
    assert store.publish(content("d")).id > b.id
    assert store.rollback() == a


# ---- A9, E8: two at once, and clocks ------------------------------------------------------------------------------


def hold(folder: str) -> None:
    def write(folder: Path) -> BundleFacts:
        facts = content("held")(folder)
        print(os.getpid(), flush=True)
        sys.stdin.read(1)
        return facts

    Store(folder).publish(write)


def test_fault_A9_of_two_publishers_one_is_refused_and_a_killed_one_is_in_nobodys_way(store: Store) -> None:
    old = store.publish(content("one"))
    other = preloaded.start_in(__file__, f"hold({str(store.path)!r})")
    assert other.stdout is not None
    pid = int(other.stdout.readline())
    for act in (lambda: store.publish(content("two")), store.rollback, store.gc):
        with pytest.raises(BundleError, match=rf"another publish is running \(pid {pid} on ") as caught:
            act()
        assert (caught.value.reason, caught.value.exit_code) == ("locked", 2)
    assert store.current() == old
    assert len(leftovers(store)) == 1  # the other's, which goes on
    other.kill()
    other.communicate()
    new = store.publish(content("two"))
    assert store.current() == new
    assert not leftovers(store)
    line = history(store)[1]
    assert (line["action"], line["bundle"]) == ("recover", old.id)
    assert line["reason"].startswith(f"publish (pid {pid} on ")
    assert line["reason"].endswith("died")
    patient = preloaded.start_in(__file__, f"hold({str(store.path)!r})")
    assert patient.stdout is not None
    assert patient.stdin is not None
    patient.stdout.readline()
    patient.stdin.write("x")
    patient.communicate()
    assert patient.returncode == 0
    assert tag_of(store.current()) == "held"


def test_fault_A9_text_left_in_the_lock_never_costs_a_published_bundle(store: Store) -> None:
    a, b = store.publish(content("a")), store.publish(content("b"))
    # As after a loss of power that the emptying of the file did not survive.
    (store.path / "LOCK").write_text(f"publish 1 host {a.id[:16]}\n")
    assert store.rollback() == a
    assert ids(store) == [a.id, b.id]
    (store.path / "LOCK").write_bytes(b"\xff\0 * ..")
    assert store.rollback(b.id) == b
    assert (store.path / "LOCK").read_bytes() == b""


def test_fault_E8_bundles_are_in_the_order_of_publishing_when_the_clock_jumps_back(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock(datetime):
        present = datetime(2031, 1, 1, tzinfo=UTC)

        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return cls.present

    monkeypatch.setattr(twotower.store.bundle, "datetime", Clock)
    names = [store.publish(content("a")).id, store.publish(content("b")).id]
    Clock.present = datetime(2020, 1, 1, tzinfo=UTC)
    names += [store.publish(content("c")).id for _ in range(3)]
    shutil.rmtree(store.path / "bundles" / names[-1])
    names.append(store.publish(content("d")).id)
    assert [name[:16] for name in names] == [f"20310101T00000{i}Z" for i in range(6)]
    assert store.current().id == names[-1]


@pytest.mark.parametrize("name", ["99991231T235959Z-abcdef", "20990101T000000Z-abcdef", "20261399T000000Z-abcdef"])
def test_fault_G20_a_folder_of_a_time_that_has_not_come_is_in_nobodys_way(store: Store, name: str) -> None:
    first = store.publish(content("first"))
    stray = store.path / "bundles" / name
    shutil.copytree(first.folder, stray)
    second, third = store.publish(content("second")), store.publish(content("third"))
    now = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    assert first.id < second.id < third.id
    assert third.id[:8] == now[:8] or now[9:13] == "0000"
    assert store.rollback().id == second.id
    assert store.rollback(third.id).id == third.id
    assert store.gc(keep=2) == [name, first.id]  # it is not the newest for ever
    assert not stray.exists()
    assert store.publish(content("fourth")).id[:4] == now[:4]


def test_fault_G20_a_last_bundle_of_all_times_that_was_current_is_followed_all_the_same(store: Store) -> None:
    store.publish(content("first"))
    last = "99991231T235959Z-abcdef"
    shutil.copytree(store.current().folder, store.path / "bundles" / last)
    (store.path / "CURRENT").write_text(last + "\n")
    second = store.publish(content("second"))
    assert second.id < last
    assert store.current().id == second.id
    third = store.publish(content("third"))
    assert last in store.gc()
    assert ids(store) == [second.id, third.id]


# ---- A10, A13: readers --------------------------------------------------------------------------------------------


def test_fault_A10_fifty_publishes_and_rollbacks_leak_nothing_and_end_where_they_say(store: Store) -> None:
    def handles() -> int:
        """Return the number of open files of the store; those of other tests may be closed at any time."""
        found = 0
        for entry in Path("/proc/self/fd").iterdir():
            with suppress(FileNotFoundError):  # the folder that is being listed
                found += entry.readlink().is_relative_to(store.path.resolve())
        return found

    store.publish(content("first"))
    before_all, last = handles(), ""
    for i in range(50):
        before = store.current()
        bundle = store.publish(content(str(i)))
        assert store.current() == bundle
        assert bundle.id > last
        last = bundle.id
        if i % 2:
            assert store.rollback() == before
            assert store.current() == before
        with store.current().lease():
            assert len(store.gc()) <= 2
    assert handles() == before_all
    assert len(ids(store)) <= 4


def test_fault_A10_a_bundle_that_vanishes_while_it_is_verified_is_missing(
    sound: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(twotower.store.bundle, "_walk", lambda folder: iter(()))
    with pytest.raises(BundleError, match="missing") as caught:
        Bundle.open(sound.folder)
    assert caught.value.reason == "missing"


def test_fault_A13_gc_leaves_a_leased_bundle_alone_until_the_reader_ends_or_is_killed(store: Store) -> None:
    a, b = store.publish(content("a")), store.publish(content("b"))
    with a.lease(), b.lease():
        for tag in "cdef":
            store.publish(content(tag))
        reader = preloaded.start_in(
            __file__, f"with Bundle.open({str(a.folder)!r}).lease():\n print('in', flush=True)\n sys.stdin.read(1)"
        )
        assert reader.stdout is not None
        assert reader.stdout.readline() == "in\n"
        assert len(store.gc()) == 2
        assert ids(store)[:2] == [a.id, b.id]
    assert store.gc() == [b.id]
    reader.kill()
    reader.communicate()
    assert store.gc() == [a.id]
    with pytest.raises(BundleError, match=r"no lease \(it was removed\)") as caught, a.lease():
        pass
    assert caught.value.reason == "missing"


def test_fault_A13_a_bundle_removed_while_its_lease_is_taken_is_not_leased(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = store.publish(content("a"))
    real = fcntl.flock

    def late(handle: int, how: int) -> None:
        shutil.rmtree(bundle.folder)
        real(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(BundleError, match="it was removed"), bundle.lease():
        pass


def test_fault_A13_an_open_mapping_outlives_gc_without_a_lease(store: Store) -> None:
    a = store.publish(content("a", count=1))
    with (a.folder / "0.bin").open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        for tag in "bcd":
            store.publish(content(tag))
        assert a.id in store.gc()
        assert not a.folder.exists()
        assert mapped[:] == b"a" + bytes(range(100))


# ---- A11: the recall check ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("recall_check", [None, {}, {"recall": 0.9}, {"recall": "0.9", "threshold": 0.5}, [1],
                                  {"recall": float("nan"), "threshold": 0.5}])  # fmt: skip
def test_fault_A11_a_recall_that_was_not_measured_is_not_published(store: Store, recall_check: Any) -> None:
    with pytest.raises(BundleError, match="not published, CURRENT stays unset: '?recall_check") as caught:
        store.publish(content("one", recall_check=recall_check), force=True)
    assert caught.value.reason == "recall"


@pytest.mark.parametrize("kind", ["nope", "os:path", "numpy:f2py.main"])
def test_a_manifest_that_names_no_index_is_an_error_of_its_bundle(store: Store, kind: str) -> None:
    bundle = store.publish(content("a"))
    manifest = bundle.manifest.model_copy(update={"index": bundle.manifest.index.model_copy(update={"kind": kind})})
    with pytest.raises(BundleError, match=f"bundle {bundle.id}: .*{re.escape(kind)}") as caught:
        manifest.read_sections()
    assert caught.value.reason == "manifest"
