"""Results in shards on a disk and in a bucket: the same calls, and what two writers at once leave."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from object_server import Fault, ObjectServer

from twotower import files
from twotower.errors import RunError
from twotower.files import places
from twotower.files.object_stores import ObjectClient, ObjectError
from twotower.files.sharded_result import ShardedResult, shard_name
from twotower.files.urls import Url

PLAN: dict[str, Any] = {"format": 2, "side": "item", "model": "m", "table (a.parquet)": [9, 1, 6]}
LIST = "_vectors.json"


@pytest.fixture(params=["disk", "bucket"])
def at(request: pytest.FixtureRequest, tmp_path: Path) -> Path | Url:
    """A folder that is not there yet."""
    if request.param == "disk":
        return tmp_path / "a" / "out"
    return Url.parse(f"{request.getfixturevalue('bucket')}/a/out")


@pytest.fixture
def remote(bucket: str) -> Url:
    return Url.parse(f"{bucket}/out")


def result(at: Path | Url, **changes: Any) -> ShardedResult:
    return ShardedResult(at, "vectors", LIST, PLAN | changes)


def rows(
    values: list[int], before: Callable[[], object] = lambda: None
) -> Callable[[], tuple[pl.DataFrame, dict[str, Any]]]:
    """Return what makes a shard, and does something `before` it ends."""

    def write() -> tuple[pl.DataFrame, dict[str, Any]]:
        before()
        return pl.DataFrame({"id": values}), {"rows": len(values)}

    return write


def begun(at: Path | Url, **changes: Any) -> ShardedResult:
    """A result whose call has begun, and was killed."""
    found = result(at, **changes)
    with found.writing(overwrite=False):
        found.look()
    return found


def names(at: Path | Url) -> list[str]:
    """The names in a folder, but the lock's."""
    return [name for name in places.names(at) if name != "_lock"]


def values(at: Path | Url, name: str) -> list[int]:
    data = places.read(at / name)
    assert data is not None
    return pl.read_parquet(data)["id"].to_list()


def test_a_shard_is_made_once_and_again_if_its_file_is_another(at: Path | Url) -> None:
    first = result(at)
    with first.writing(overwrite=False):
        first.look()
        assert names(at) == ["_plan_vectors.json"]
        assert places.read_json(at / LIST) is None
        made = first.make(0, rows([1]))
        assert made.is_new
        first.finish([made], {"shards": [made.file]})
    assert names(at) == ["_plan_vectors.json", LIST, made.file]
    assert begun(at).make(0, rows([2])) == made._replace(is_new=False)
    places.write(at / made.file, b"of somebody else")
    other = begun(at)
    again = other.make(0, rows([1]))
    assert again == made
    assert places.read_json(at / LIST) is None, "a list of shards that are not there is no list"
    assert values(at, made.file) == [1]


def test_another_plan_is_refused_until_asked_for_and_then_nothing_of_the_first_stays(at: Path | Url) -> None:
    first = begun(at)
    first.finish([first.make(0, rows([1]))], {})
    other = result(at, model="n")
    with pytest.raises(RunError, match=r"its vectors are of another `model` \(m then, n now\)"):
        other.writing(overwrite=False).__enter__()
    assert len(names(at)) == 3
    with other.writing(overwrite=True):
        assert names(at) == ["_plan_vectors.json"]
        other.look()
        assert other.make(0, rows([1])).is_new


def test_a_refusal_shows_twelve_digits_of_a_digest(tmp_path: Path) -> None:
    one, other = (hashlib.sha256(text).hexdigest() for text in (b"one", b"other"))
    call = begun(tmp_path, model=one)
    call.make(0, rows([1]))
    with pytest.raises(RunError, match=rf"another `model` \({one[:12]} then, {other[:12]} now\)"):
        begun(tmp_path, model=other)


def test_files_of_something_else_are_refused(at: Path | Url) -> None:
    at.mkdir(parents=True) if isinstance(at, Path) else None
    places.write(at / "letter.txt", b"x")
    for overwrite in (False, True):
        with pytest.raises(RunError, match=r"not a folder of vectors \(it holds letter.txt\); choose another folder"):
            result(at).writing(overwrite).__enter__()
    assert places.names(at) == ["letter.txt"]


@pytest.mark.parametrize("held", ["_answers.json", "_plan_answers.json"])
def test_the_folder_of_another_kind_of_result_is_refused(at: Path | Url, held: str) -> None:
    """Else its shards would go, of a call that was killed too."""
    answers = ShardedResult(at, "recommendations", "_answers.json", PLAN | {"k": 5})
    with answers.writing(overwrite=False):
        answers.look()
        made = answers.make(0, rows([1]))
        if held == "_answers.json":
            answers.finish([made], {})
    places.write(at / "_SUCCESS", b"")
    before = places.names(at)
    for overwrite in (False, True):
        with pytest.raises(RunError, match=rf"not a folder of vectors \(it holds {held}\); choose another folder"):
            result(at).writing(overwrite).__enter__()
    assert places.names(at) == before
    with answers.writing(overwrite=True):
        pass


@pytest.mark.parametrize("text", [b"{", b"[1]", b"{}"])
def test_a_damaged_plan_is_another(at: Path | Url, text: bytes) -> None:
    begun(at).make(0, rows([1]))
    places.write(at / "_plan_vectors.json", text)
    with pytest.raises(RunError, match=r"its vectors are of another `format` \(none then, 2 now\)"):
        result(at).writing(overwrite=False).__enter__()


def test_a_shard_of_another_plan_is_none(at: Path | Url) -> None:
    """What a lost host sends late, into the folder of a call that began meanwhile."""
    late = begun(at, model="n").make(0, rows([1]))
    data = places.read(at / late.file)
    assert data is not None
    places.remove(at, [late.file])
    here = begun(at)
    made = here.make(0, rows([2]))
    places.write(at / late.file, data)
    again = begun(at)
    assert again.make(0, rows([3])) == made._replace(is_new=False)
    again.finish([made], {})
    assert names(at) == ["_plan_vectors.json", LIST, made.file], "the list's alone stay"


def test_who_was_taken_for_lost_makes_the_same_file(at: Path | Url) -> None:
    """Another process makes the shard while this one stands still."""
    call = begun(at)
    found = call.make(0, rows([1], lambda: begun(at).make(0, rows([1]))))
    assert names(at) == ["_plan_vectors.json", found.file]


def test_a_list_names_no_shard_that_another_call_has_removed(at: Path | Url) -> None:
    """Two calls of one plan at once, whose shards differ in their bytes, as those of two processors do."""
    first, second = begun(at), begun(at)
    ours, theirs = first.make(0, rows([1])), second.make(0, rows([2]))
    assert ours.file != theirs.file
    first.finish([ours], {"shards": [ours.file]})
    with pytest.raises(RunError, match=rf"{theirs.file} was removed meanwhile, as by a call at the same time; call"):
        second.finish([theirs], {"shards": [theirs.file]})
    assert names(at) == ["_plan_vectors.json", LIST, ours.file]
    assert places.read_json(at / LIST) == PLAN | {"shards": [ours.file]}


def test_a_list_goes_before_the_shards_that_it_names(remote: Url, s3: ObjectServer) -> None:
    """A call that ends while it removes them: for another plan, or for other files of its shards."""
    first = begun(remote)
    late = first.make(0, rows([1]))
    data = places.read(remote / late.file)
    assert data is not None
    places.remove(remote, [late.file])
    made = first.make(0, rows([2]))
    first.finish([made], {"shards": [made.file]})
    s3.let_happen(Fault("^POST", 503, times=99, skip=1))
    with pytest.raises(ObjectError):
        result(remote, model="n").writing(overwrite=True).__enter__()
    assert names(remote) == ["_plan_vectors.json", made.file]
    s3.let_happen()
    first.finish([made], {"shards": [made.file]})
    places.write(remote / late.file, data)
    s3.let_happen(Fault("^PUT", 503, times=99))
    with pytest.raises(ObjectError):
        first.finish([late], {"shards": [late.file]})
    assert names(remote) == ["_plan_vectors.json", late.file]


def test_nothing_is_written_into_the_folder_of_another_call(at: Path | Url) -> None:
    """The shard takes so long that a call of another plan begins."""

    def other() -> None:
        with result(at, model="n").writing(overwrite=True):
            pass

    call = begun(at)
    for act in (lambda: call.make(0, rows([1], other)), lambda: call.finish([], {}), call.look):
        with pytest.raises(RunError, match="or one of another call"):
            act()
    assert names(at) == ["_plan_vectors.json"]


def test_an_object_that_marks_a_folder_is_no_file(remote: Url) -> None:
    ObjectClient(remote).write("out/", b"")
    begun(remote)
    assert names(remote) == ["_plan_vectors.json"]


def test_a_silent_bucket_is_neither_another_plan_nor_a_missing_shard(remote: Url, s3: ObjectServer) -> None:
    call = begun(remote)
    call.make(0, rows([1]))
    call.look()
    s3.let_happen(Fault("^GET .*(json|parquet)$", 503, times=99))
    for act in (
        lambda: call.make(0, rows([1])),
        call.check,
        lambda: result(remote).writing(True).__enter__(),
    ):
        with pytest.raises(ObjectError, match="does not answer as expected"):
            act()


def test_a_shard_whose_answer_is_lost_is_there_once(remote: Url, s3: ObjectServer) -> None:
    call = begun(remote)
    s3.let_happen(Fault("^PUT .*part-00000", 500, done=True))
    made = call.make(0, rows([1]))
    assert names(remote) == ["_plan_vectors.json", made.file]


def test_a_shard_costs_the_same_among_many(tmp_path: Path) -> None:
    """By the calls of Python and of its library; else a job of thousands of files spends minutes on names."""
    counts = list[int]()
    for n in (1, 3, 300):
        call = begun(tmp_path / str(n))
        for number in range(n):
            files.write(tmp_path / str(n) / shard_name(number), b"")
        call.look()
        calls = Counter[str]()
        sys.setprofile(lambda frame, event, arg, calls=calls: calls.update([event]))  # type: ignore[misc]
        try:
            call.make(n, rows([1]))
        finally:
            sys.setprofile(None)
        counts.append(calls.total())
    assert counts[2] < counts[1] + 100  # the first imports


def test_what_a_killed_write_has_left_is_removed(tmp_path: Path) -> None:
    begun(tmp_path)
    (tmp_path / "._plan_vectors.json.123.tmp").write_bytes(files.json_bytes({}))
    (tmp_path / ".hidden").touch()
    begun(tmp_path)
    assert names(tmp_path) == [".hidden", "_plan_vectors.json"]
