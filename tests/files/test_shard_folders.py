"""Folders of shards on a disk and in a bucket: the same calls, and what two writers at once leave."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from object_server import Fault, ObjectServer

from twotower import files
from twotower.embedding.folder import part_names
from twotower.embedding.shards import EmbeddingWork
from twotower.errors import ConfigError, RunError
from twotower.files.object_stores import ObjectClient, ObjectError
from twotower.files.shard_folders import PUTS, BucketFolder, ShardFolder, shard_folder
from twotower.files.urls import Url

PLAN = {"side": "item", "model": "m", "table": [["a.parquet", 9, 1, 6]]}
NAME = part_names(0)[0]


@pytest.fixture(params=["disk", "bucket"])
def at(request: pytest.FixtureRequest, tmp_path: Path) -> ShardFolder:
    """A folder that is not there yet."""
    if request.param == "disk":
        return shard_folder(tmp_path / "a" / "out")
    return shard_folder(f"{request.getfixturevalue('bucket')}/a/out")


@pytest.fixture
def remote(bucket: str) -> BucketFolder:
    return BucketFolder(Url.parse(f"{bucket}/out"))


def made(data: bytes, before: Callable[[], object] = lambda: None) -> Callable[[Path], dict[str, Any]]:
    """Return the writer of a shard of one file, which does something `before` it ends."""

    def write(folder: Path) -> dict[str, Any]:
        (folder / NAME).write_bytes(data)
        before()
        return {"rows": 1}

    return write


def nothing() -> None:
    """Find nothing wrong."""


def names(at: ShardFolder) -> list[str]:
    """The names of files and folders in a folder."""
    return sorted({path.partition("/")[0] for path in at.paths()})


def write(at: ShardFolder, path: str, value: Any) -> None:
    at.write(path, files.json_bytes(value))


def test_a_shard_is_made_once_and_again_if_its_file_is_another(at: ShardFolder, tmp_path: Path) -> None:
    begin = partial(EmbeddingWork.begin, at, PLAN, False)
    with begin() as work:
        assert names(at) == ["work"]
        assert work.read_list() is None
        assert work.make(0, made(b"one")).is_new
        assert not work.make(0, made(b"two")).is_new
        work.write_list({"shards": [NAME]})
    assert names(at) == ["embedding.json", NAME, "work"]
    (other := at.scratch("work") / f"other-{tmp_path.name}").write_bytes(b"all")
    at.put(other, NAME, nothing)
    with begin() as work:
        again = work.make(0, made(b"one"))
        assert (again.is_new, again.was_damaged) == (True, True)
        assert work.read_list() is None, "a list of shards that are not there is no list"
        assert not work.make(0, made(b"two")).is_new
    assert at.read(NAME) == b"one"


def test_another_plan_is_refused_until_asked_for_and_then_nothing_of_the_first_stays(at: ShardFolder) -> None:
    with EmbeddingWork.begin(at, PLAN, False) as work:
        work.make(0, made(b"one"))
        work.write_list({"shards": [NAME]})
    other = PLAN | {"model": "n"}
    with pytest.raises(RunError, match=r"its vectors are of another model \(m then, n now\)"):
        EmbeddingWork.begin(at, other, False).__enter__()
    assert len(names(at)) == 3
    with EmbeddingWork.begin(at, other, True) as work:
        assert names(at) == ["work"]
        assert work.record(0) is None


def test_files_of_something_else_are_refused(at: ShardFolder) -> None:
    at.place.mkdir(parents=True) if isinstance(at.place, Path) else None
    write(at, "letter.txt", {})
    for overwrite in (False, True):
        with pytest.raises(RunError, match=r"not a folder of vectors \(it holds letter.txt\); choose another folder"):
            EmbeddingWork.begin(at, PLAN, overwrite).__enter__()
    assert names(at) == ["letter.txt"]


def test_no_json_is_a_difference_and_no_record(at: ShardFolder) -> None:
    with EmbeddingWork.begin(at, PLAN, False) as work:
        values: list[Any] = [[1], {}]
        for value in values:
            write(at, "work/done-00000.json", value)
            assert work.record(0) is None
    write(at, "work/plan.json", [1])
    with pytest.raises(RunError, match=r"its vectors are of another version of twotower, or work/plan.json is damaged"):
        EmbeddingWork.begin(at, PLAN, False).__enter__()


def test_who_was_taken_for_lost_replaces_nothing(at: ShardFolder, tmp_path: Path) -> None:
    """Another process has made the shard, and finished it otherwise, while this one stood still."""
    with EmbeddingWork.begin(at, PLAN, False) as work:

        def other() -> None:
            assert work.make(0, made(b"of the other")).is_new

        found = work.make(0, made(b"of the lost", other))
        assert not found.is_new
        assert found.record == work.record(0)
    assert at.read(NAME) == b"of the other"


def test_a_list_is_not_written_into_the_folder_of_another_call(remote: BucketFolder) -> None:
    with (
        EmbeddingWork.begin(remote, PLAN, False) as work,
        EmbeddingWork.begin(remote, PLAN | {"model": "n"}, True),
        pytest.raises(RunError, match="or one of another call"),
    ):
        work.write_list({"shards": []})
    assert names(remote) == ["work"]


def test_an_object_is_written_where_none_is_or_in_the_place_of_the_one_that_was_seen(
    remote: BucketFolder, s3: ObjectServer, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"first")
    first = remote.put(file, NAME, nothing)
    assert remote.entry(NAME) == first
    file.write_bytes(b"other")
    s3.let_happen(Fault("^PUT .*part-00000", 412, times=PUTS))  # another process is faster each time
    with pytest.raises(ObjectError, match="was changed by another process"):
        remote.put(file, NAME, nothing)
    assert remote.entry(NAME) == first
    s3.let_happen(Fault("^PUT .*part-00000", 500, done=True))  # the answer is lost, and the second try finds the first
    second = remote.put(file, NAME, nothing)
    assert remote.entry(NAME) == second
    assert remote.entry(NAME) != first
    assert remote.read(NAME) == b"other"


@pytest.mark.parametrize("made_before", [False, True])
def test_what_a_lost_host_of_another_plan_sends_late_is_in_no_result(
    remote: BucketFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made_before: bool
) -> None:
    """The upload of plan m takes so long that a call of plan n begins, and makes its shard before it or after it."""
    there, n = BucketFolder(remote.place), PLAN | {"model": "n"}
    put, results = remote.put, []

    def make() -> None:
        with EmbeddingWork.begin(there, n, False) as work:
            results.append(work.make(0, made(b"of n")))
            work.write_list({"shards": [NAME]})

    def late(*file: Any) -> Any:
        with EmbeddingWork.begin(there, n, True):
            pass
        if made_before:
            make()
        return put(*file)

    monkeypatch.setattr(remote, "put", late)
    with EmbeddingWork.begin(remote, PLAN, False) as work, pytest.raises(RunError, match="or one of another call"):
        work.make(0, made(b"of m"))
    if not made_before:
        make()
    assert [shard.is_new for shard in results] == [True]
    assert there.read(NAME) == b"of n"
    with EmbeddingWork.begin(there, n, False) as work:
        assert not work.make(0, made(b"again")).is_new


def test_an_object_that_marks_a_folder_is_no_file(remote: BucketFolder) -> None:
    for mark in ("out/", "out/" + "work/"):
        ObjectClient(remote.place).write(mark, b"")
    with EmbeddingWork.begin(remote, PLAN, False):
        assert names(remote) == ["work"]


def test_of_two_calls_that_begin_at_once_one_is_refused(remote: BucketFolder, s3: ObjectServer) -> None:
    s3.let_happen(Fault("^PUT .*plan.json", 412))
    with pytest.raises(RunError, match="another call begins at the same time; let it end, or stop it"):
        EmbeddingWork.begin(remote, PLAN, False).__enter__()


def test_a_silent_bucket_is_neither_another_plan_nor_a_missing_shard(remote: BucketFolder, s3: ObjectServer) -> None:
    with EmbeddingWork.begin(remote, PLAN, False) as work:
        s3.let_happen(Fault("^GET .*json$", 503, times=99))
        for asked in (lambda: work.record(0), work.check_seen, EmbeddingWork.begin(remote, PLAN, True).__enter__):
            with pytest.raises(ObjectError, match="does not answer as expected"):
                asked()


def test_a_web_server_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"a server of https:// cannot be written; .*s3://BUCKET/FOLDER"):
        shard_folder("https://host/out")
