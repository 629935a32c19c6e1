"""A store in an object store, on a local S3 server: the rows A of the faults as on a disk."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import kill_points
import preloaded
import pytest
from object_server import Fault, ObjectServer
from store_worlds import content, ids, tag_of

from twotower import files
from twotower.errors import BundleError
from twotower.files.layout import MANIFEST
from twotower.files.object_stores import ObjectClient
from twotower.files.urls import Url
from twotower.store.bundle import Bundle
from twotower.store.cache import BundleCache
from twotower.store.leases import LeaseTimes
from twotower.store.manifest import BundleFacts, manifest_digest
from twotower.store.object_place import ObjectChange, ObjectPlace
from twotower.store.store import Store

TIMES = LeaseTimes(seconds=3600, margin=0.0)


def opened(url: str, cache: Path, kept: int = 3) -> Store:
    """The store at a URL, which is created if needed, with a cache of its own."""
    return Store.create(url, ObjectPlace(Url.parse(url), TIMES, BundleCache(url, cache, kept)))


def keys(store: Store, below: str = "") -> list[str]:
    """The keys of the objects of a store."""
    assert isinstance(store.at, Url)
    prefix = store.at.key
    listed = ObjectClient(store.at).list(prefix)
    return [key for o in listed if (key := o.key.removeprefix(f"{prefix}/")).startswith(below)]


def put(store: Store, path: str, data: bytes) -> None:
    assert isinstance(store.at, Url)
    ObjectClient(store.at).write(f"{store.at.key}/{path}", data)


def get(store: Store, path: str) -> bytes:
    return store.place.read(path, 1 << 20)


def whole_and_tidy(store: Store) -> None:
    """Nothing but whole bundles is there, the history ends with the current one, and no lease is left."""
    listed = store.bundles()
    assert all(line.damaged is None for line in listed)
    inside = {key.split("/")[1] for key in keys(store, "bundles/")}
    assert inside == {line.id for line in listed}
    became = [line for line in store.history() if line["action"] in ("publish", "rollback")]
    assert became[-1]["bundle"] == store.current().id
    assert not keys(store, "leases/")


@pytest.fixture
def url(bucket: str) -> str:
    return f"{bucket}/a prefix/store"


@pytest.fixture
def store(url: str, tmp_path: Path) -> Store:
    return opened(url, tmp_path / "cache")


@pytest.fixture
def elsewhere(store: Store, tmp_path: Path) -> Store:
    """The same store, as another machine sees it."""
    return opened(str(store.at), tmp_path / "elsewhere")


# ---- the way it goes when all is well -----------------------------------------------------------------------------


def test_a_prefix_that_is_no_store_is_refused(bucket: str, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"not a store; `publish\(run, store='s3://.*'\)` creates one"):
        Store(f"{bucket}/none")
    client = ObjectClient(Url.parse(bucket))
    client.write("taken/thesis.doc", b"x")
    with pytest.raises(BundleError, match=r"taken: not empty and not a store \(it holds thesis.doc\)"):
        Store.create(f"{bucket}/taken")
    with pytest.raises(BundleError, match="needs a folder or an object store"):
        Store("https://host/store")
    with pytest.raises(BundleError, match=r"no such bucket \(no-lake\)") as caught:
        Store.create("s3://no-lake/store")
    assert caught.value.reason == "store"
    with pytest.raises(BundleError, match="no bundle is published yet"):
        opened(bucket.replace(bucket, f"{bucket}/new"), tmp_path).current()


def test_readers_load_again_when_current_is_touched_and_only_then(store: Store) -> None:
    with pytest.raises(BundleError, match="no bundle is current"):
        store.touch_current()
    store.publish(content("a"))
    before = store.current_stamp()
    assert store.current_stamp() == before
    store.touch_current()
    after = store.current_stamp()
    assert (after[0], after[1] != before[1]) == (before[0], True)
    store.publish(content("b"))
    assert [line["action"] for line in store.history()] == ["publish", "publish"]


def test_the_cache_keeps_the_bundles_used_last_and_mends_a_damaged_copy(
    store: Store, tmp_path: Path, messages: list[str]
) -> None:
    reader = opened(str(store.at), tmp_path / "small", kept=2)
    for tag in "abcd":
        store.publish(content(tag))
        assert tag_of(reader.current()) == tag
    kept = list((tmp_path / "small").rglob(MANIFEST))
    assert len(kept) == 2
    fetched = [line for line in messages if "fetching bundle" in line]
    bundle = reader.current()
    assert [line for line in messages if "fetching bundle" in line] == fetched, "it is there"
    (bundle.folder / "0.bin").write_bytes(b"x")
    assert tag_of(reader.current()) == "d"
    assert any("damaged and is fetched again" in line for line in messages)


def test_a_copy_with_another_manifest_is_not_the_bundle(store: Store, tmp_path: Path, messages: list[str]) -> None:
    bundle = store.publish(content("a"))
    cache = BundleCache(str(store.at), tmp_path / "cache")
    assert cache.find(bundle.id, bundle.manifest) == bundle
    assert cache.find(bundle.id, bundle.manifest.model_copy(update={"created": "later"})) is None
    assert any("of another bundle with this id" in line for line in messages)
    assert tag_of(store.current()) == "a"


def test_copies_that_another_process_removes_meanwhile_are_not_counted(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.publish(content("a"))
    reader = opened(str(store.at), tmp_path / "other cache")
    first = reader.current().folder
    store.publish(content("b"))
    found = type(first).iterdir

    def then_removed(folder: Path) -> list[Path]:
        names = [*found(folder)]
        if first in names:
            shutil.rmtree(first)
        return names

    monkeypatch.setattr(type(first), "iterdir", then_removed)
    assert tag_of(reader.current()) == "b"
    assert not first.exists()


def test_a_cache_that_cannot_be_written_says_where_to_put_it(store: Store, tmp_path: Path) -> None:
    store.publish(content("a"))
    (tmp_path / "file").touch()
    with pytest.raises(BundleError, match="the cache cannot be written .* XDG_CACHE_HOME") as caught:
        opened(str(store.at), tmp_path / "file").current()
    assert caught.value.reason == "cache"


# ---- A1: killed ---------------------------------------------------------------------------------------------------


def look(url: str, cache: Path) -> tuple[str, str]:
    """The current bundle and its tag, read by a machine that has nothing yet."""
    bundle = opened(url, cache).current()
    return bundle.id, tag_of(bundle)


def publish_one(url: str, cache: Path, tag: str, count: int) -> str:
    return opened(url, cache).publish(content(tag, count=count)).id


def settle(url: str, cache: Path) -> int:
    """The change after a kill and the end of all leases: nothing is left over."""
    store = opened(url, cache)
    store.rollback(store.current().id)
    store.gc()
    whole_and_tidy(store)
    return len(ids(store))


def kill_publish(url: str, folder: str, address: str, count: int, points: list[str]) -> None:
    """Kill publishers at points by name, or with none at each point by number until one comes to its end."""
    server = ObjectServer.at(address)
    cache, new, n, done = Path(folder), 0, 0, False
    _, before = kill_points.in_a_fork(partial(publish_one, url, cache / "mine", "tag0", count))
    while not done and (not points or n < len(points)):
        point = points[n] if points else n + 1
        n += 1
        tag = f"tag{n}"
        done, _ = kill_points.in_a_fork(partial(publish_one, url, cache / "mine", tag, count), point)
        _, (name, found) = kill_points.in_a_fork(partial(look, url, cache / f"reader{n}"))
        assert (name == before) == (found != tag), (point, found)
        new += name != before
        server.age_leases()
        assert kill_points.in_a_fork(lambda: settle(url, cache / "mine"))[1] <= 3
        before = name
    assert new >= 1
    print(n)


def kill_at_random(url: str, folder: str, address: str, kills: int) -> None:
    server, cache, draw = ObjectServer.at(address), Path(folder), random.Random(0)
    kill_points.in_a_fork(lambda: [opened(url, cache / "mine").publish(content("tag")).id for _ in range(2)])

    def life() -> None:
        store = opened(url, cache / "mine")
        while True:
            for _ in range(3):
                store.publish(content("tag", count=6))
            store.rollback()
            store.gc()

    for n in range(kills):
        assert kill_points.in_a_fork(life, after=draw.uniform(0.02, 0.8)) == (False, None)
        assert kill_points.in_a_fork(partial(look, url, cache / f"reader{n % 3}"))[1][1] == "tag"
        server.age_leases()
        kill_points.in_a_fork(lambda: settle(url, cache / "mine"))
    print(kills)


def kill_changes(url: str, folder: str, address: str, points: list[str]) -> None:
    server, cache = ObjectServer.at(address), Path(folder)
    kill_points.in_a_fork(lambda: opened(url, cache / "mine").publish(content("a")).id)

    def change() -> None:
        store = opened(url, cache / "mine")
        store.rollback()
        store.gc()

    for point in points:
        kill_points.in_a_fork(lambda: [opened(url, cache / "mine").publish(content(tag, count=1)).id for tag in "bcd"])
        assert kill_points.in_a_fork(change, point) == (False, None), point
        assert kill_points.in_a_fork(lambda: look(url, cache / "reader"))[1][1] in "bcd"
        server.age_leases()
        kill_points.in_a_fork(lambda: settle(url, cache / "mine"))
    print(len(points))


ALL = ["store.locked", "test.half", "cache.renamed", "bucket.held", "bucket.file", "bucket.manifest", "bucket.current"]


@pytest.mark.parametrize("points", [["bucket.current"], pytest.param(ALL, marks=pytest.mark.system)])
def test_fault_A1_a_publisher_killed_at_any_step_leaves_the_old_or_the_new(
    points: list[str], url: str, tmp_path: Path, s3: ObjectServer
) -> None:
    assert preloaded.number_told(
        __file__, f"kill_publish({url!r}, {str(tmp_path)!r}, {s3.address!r}, 3, {points!r})", 3000
    ) == len(points)


@pytest.mark.system
def test_fault_A1_kill_at_200_points_of_publish_leaves_the_old_or_the_new(
    url: str, tmp_path: Path, s3: ObjectServer
) -> None:
    assert (
        preloaded.number_told(__file__, f"kill_publish({url!r}, {str(tmp_path)!r}, {s3.address!r}, 48, [])", 3000)
        >= 200
    )


@pytest.mark.system
def test_fault_A1_kill_at_random_times_leaves_a_whole_store_in_the_bucket(
    url: str, tmp_path: Path, s3: ObjectServer
) -> None:
    assert (
        preloaded.number_told(__file__, f"kill_at_random({url!r}, {str(tmp_path)!r}, {s3.address!r}, 40)", 3000) == 40
    )


@pytest.mark.parametrize(
    "points",
    [
        ["bucket.unlisted"],
        pytest.param(
            ["bucket.current", "bucket.logged", "bucket.unlisted", "bucket.deleting", "bucket.deleted"],
            marks=pytest.mark.system,
        ),
    ],
)
def test_fault_A1_rollback_and_gc_killed_at_any_step_leave_a_whole_store(
    points: list[str], url: str, tmp_path: Path, s3: ObjectServer
) -> None:
    assert preloaded.number_told(
        __file__, f"kill_changes({url!r}, {str(tmp_path)!r}, {s3.address!r}, {points!r})", 3000
    ) == len(points)


# ---- A2: writes refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["bundles/.*/0.bin", f"bundles/.*/{MANIFEST}", "CURRENT"])
def test_fault_A2_a_write_that_is_refused_leaves_what_was_and_says_so(
    place: str, store: Store, s3: ObjectServer
) -> None:
    old = store.publish(content("one"))
    before = keys(store)
    s3.let_happen(Fault(f"^PUT .*/{place}$", 403, times=99))
    with pytest.raises(BundleError, match=f"not published, CURRENT stays {old.id}: .*access is refused") as caught:
        store.publish(content("two"))
    assert caught.value.reason == "write"
    assert keys(store) == before
    s3.let_happen()
    assert tag_of(store.publish(content("two"))) == "two"
    whole_and_tidy(store)


def test_fault_A2_without_the_right_to_write_a_store_is_read_and_not_changed(
    store: Store, elsewhere: Store, s3: ObjectServer
) -> None:
    name = store.publish(content("one")).id
    s3.let_happen(Fault("^(PUT|POST|DELETE) ", 403, times=999))
    assert tag_of(elsewhere.current()) == "one"
    assert elsewhere.current_stamp(name)[0] == name
    for change in (
        lambda: elsewhere.publish(content("two")),
        elsewhere.rollback,
        elsewhere.gc,
        elsewhere.touch_current,
    ):
        with pytest.raises(BundleError, match="access is refused"):
            change()
    s3.let_happen()
    whole_and_tidy(store)


def test_fault_A2_a_server_that_fails_for_a_while_is_asked_again(store: Store, s3: ObjectServer) -> None:
    s3.let_happen(Fault("^PUT .*/0.bin$", 503, times=2), Fault("^GET .*CURRENT", 500, times=1))
    store.publish(content("one"))
    whole_and_tidy(store)


def test_fault_A2_an_answer_that_is_lost_is_no_failure(store: Store, s3: ObjectServer) -> None:
    """The write of CURRENT takes place, its answer is lost, and the repeated write finds CURRENT changed, by itself."""
    store.publish(content("one"))
    s3.let_happen(Fault("^PUT .*/CURRENT$", 500, done=True), Fault("^PUT .*/HISTORY.jsonl$", 500, done=True))
    bundle = store.publish(content("two"))
    assert store.current().id == bundle.id
    assert [line["action"] for line in store.history()] == ["publish", "publish"]
    whole_and_tidy(store)


def test_fault_A2_a_store_that_falls_silent_at_the_last_write_is_not_said_to_be_unchanged(
    store: Store, s3: ObjectServer
) -> None:
    store.publish(content("one"))
    s3.let_happen(
        Fault("^PUT .*/CURRENT$", 500, times=1, done=True), Fault("/CURRENT$", 500, times=99, since="^PUT .*/CURRENT$")
    )
    with pytest.raises(BundleError, match="it is unknown if .* became current, list the bundles") as caught:
        store.publish(content("two"))
    assert caught.value.reason == "store"
    s3.let_happen()
    assert tag_of(store.current()) == "two", "it did, and its files are there"
    store.gc()
    whole_and_tidy(store)


# ---- A3, A5, A8, A11, A12: what is there is not believed ------------------------------------------------------------


def test_fault_A3_a_damaged_object_is_refused_and_the_copy_of_before_stays(store: Store, elsewhere: Store) -> None:
    old = store.publish(content("one"))
    kept = elsewhere.current()
    new = store.publish(content("two"))
    data = get(store, f"bundles/{new.id}/0.bin")
    for damaged, reason in {data[:-1] + b"?": "checksum", data[:-1]: "size", data + b"?": "size"}.items():
        put(store, f"bundles/{new.id}/0.bin", damaged)
        with pytest.raises(BundleError, match=r"0.bin: damaged.*`rollback\(store='s3://") as caught:
            elsewhere.current()
        assert caught.value.reason == reason
        assert [line.damaged for line in store.bundles()] == [None, "size" if reason == "size" else None]
    assert tag_of(kept) == "one"
    assert store.rollback().id == old.id
    assert tag_of(elsewhere.current()) == "one"


def test_fault_A5_a_manifest_that_is_none_is_refused(store: Store, elsewhere: Store) -> None:
    name = store.publish(content("one")).id
    whole = get(store, f"bundles/{name}/{MANIFEST}")
    for data, reason in {
        b"{": "manifest",
        b"[]": "manifest",
        whole.replace(b'"dims": 64', b'"dims": 65'): "checksum",
    }.items():
        put(store, f"bundles/{name}/{MANIFEST}", data)
        with pytest.raises(BundleError) as caught:
            elsewhere.current()
        assert caught.value.reason == reason
        assert str(caught.value).startswith(f"{store.at}/bundles/{name}/{MANIFEST}: ")


def test_fault_A6_objects_or_manifest_of_another_bundle_are_refused(store: Store, elsewhere: Store) -> None:
    old, new = store.publish(content("one")), store.publish(content("two"))
    mine = {name: get(store, f"bundles/{new.id}/{name}") for name in ("index/1.bin", MANIFEST)}
    for name, said, reason in (
        ("index/1.bin", rf"/bundles/{new.id}/index/1\.bin: damaged, or another file", "checksum"),
        (MANIFEST, f"of another bundle .'{old.id}'", "mismatch"),
    ):
        put(store, f"bundles/{new.id}/{name}", get(store, f"bundles/{old.id}/{name}"))
        with pytest.raises(BundleError, match=said) as caught:
            elsewhere.current()
        assert caught.value.reason == reason
        put(store, f"bundles/{new.id}/{name}", mine[name])
    assert tag_of(elsewhere.current()) == "two"


def test_fault_A8_current_that_names_no_bundle_lists_what_there_is(store: Store) -> None:
    name = store.publish(content("one")).id
    put(store, "CURRENT", b"20260101T000000Z-000000\n")
    with pytest.raises(BundleError, match=rf"no such bundle; available: {name}; `rollback\(store="):
        store.current()
    assert store.rollback(name).id == name
    assert [line["action"] for line in store.history()] == ["publish", "recover", "rollback"]


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../x", "", "index//1.bin"])
def test_fault_A12_a_key_that_leads_elsewhere_is_refused(
    path: str, store: Store, elsewhere: Store, tmp_path: Path
) -> None:
    name = store.publish(content("one")).id
    manifest = json.loads(get(store, f"bundles/{name}/{MANIFEST}"))
    manifest["files"][0]["path"] = path
    forged = f"{name[:16]}-{manifest_digest(manifest)}"
    manifest["bundle"] = forged
    put(store, f"bundles/{forged}/{MANIFEST}", json.dumps(manifest).encode())
    put(store, "CURRENT", forged.encode())
    before = {p for p in tmp_path.rglob("*") if "elsewhere" not in str(p)}
    with pytest.raises(BundleError, match="is not allowed") as caught:
        elsewhere.current()
    assert caught.value.reason == "path"
    assert {p for p in tmp_path.rglob("*") if "elsewhere" not in str(p)} == before
    for text in ("../../elsewhere", "/", "x" * 5000):
        put(store, "CURRENT", text.encode())
        with pytest.raises(BundleError, match="is not the id of a bundle"):
            elsewhere.current()


# ---- A9: two at once ----------------------------------------------------------------------------------------------


def test_fault_A9_of_two_publishers_the_later_write_of_current_is_refused(store: Store, elsewhere: Store) -> None:
    first: list[Bundle] = []

    def slow(folder: Path) -> BundleFacts:
        first.append(elsewhere.publish(content("quick")))
        return content("slow")(folder)

    with pytest.raises(BundleError, match="another process has made .* current meanwhile; call again") as caught:
        store.publish(slow)
    assert caught.value.reason == "locked"
    assert store.current().id == first[0].id
    assert [line["bundle"] for line in store.history()] == [first[0].id]
    whole_and_tidy(store)
    assert tag_of(store.publish(content("slow"))) == "slow"


def test_fault_A9_a_first_publisher_beside_another_takes_its_line_for_no_change_by_hand(
    store: Store, elsewhere: Store
) -> None:
    place = store.place
    assert isinstance(place, ObjectPlace)
    with ExitStack() as held, place.leases.held(place.leases.new("publish")) as lease:
        change = ObjectChange(place, lease, held)
        bundle = elsewhere.publish(content("one"))
        change.recover("publish")
    assert [(line["action"], line["bundle"]) for line in store.history()] == [("publish", bundle.id)]


def test_fault_A9_a_killed_publisher_is_in_nobodys_way(store: Store) -> None:
    put(store, "leases/none/publish.3600.x", b"{}")
    put(store, "leases/20260101T000000Z-000000/publish.3600.x", b"{}")
    put(store, "bundles/20260101T000000Z-000000/0.bin", b"half")
    assert tag_of(store.publish(content("one"))) == "one"
    assert ids(store) == [store.current().id]


# ---- A10, A13: readers --------------------------------------------------------------------------------------------


class WhileFetching:
    """Hooks that act once, after the first file of a bundle is fetched."""

    def __init__(self, act: Callable[[], object]) -> None:
        self._act: Callable[[], object] | None = act

    def point(self, name: str) -> None:
        act = self._act
        if name == "cache.file" and act is not None:
            self._act = None
            act()


def test_fault_A13_gc_leaves_a_bundle_alone_while_it_is_fetched(
    store: Store, elsewhere: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [store.publish(content(tag)).id for tag in "abcd"]
    removed: list[list[str]] = []
    monkeypatch.setattr(files, "hooks", WhileFetching(lambda: removed.append(store.gc())))
    assert tag_of(elsewhere.open(names[0])) == "a"
    assert removed == [[names[1]]]
    monkeypatch.setattr(files, "hooks", files.Hooks())
    assert store.gc() == [names[0]]
    assert tag_of(elsewhere.open(names[2])) == "c"


def test_fault_A13_gc_leaves_what_a_server_serves_until_its_lease_ends(
    store: Store, elsewhere: Store, s3: ObjectServer
) -> None:
    names = [store.publish(content(tag)).id for tag in "abcd"]
    elsewhere.current_stamp(serving=names[0])
    assert store.gc() == [names[1]]
    elsewhere.current_stamp(serving=names[3])
    assert store.gc() == [names[0]]
    names += [store.publish(content(tag)).id for tag in "ef"]
    assert store.gc() == [names[2]]
    s3.age_leases()  # the server was killed
    store.publish(content("g"))
    assert names[3] in store.gc()


def test_fault_A13_a_lease_that_is_taken_while_the_bundle_is_removed_keeps_it(
    store: Store, elsewhere: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [store.publish(content(tag)).id for tag in "abc"]

    class Unlisted:
        def point(self, name: str) -> None:
            if name == "bucket.unlisted":
                elsewhere.current_stamp(serving=names[0])

    monkeypatch.setattr(files, "hooks", Unlisted())
    assert store.gc() == []
    assert ids(store) == names
    assert tag_of(elsewhere.open(names[0])) == "a"


def test_a_publish_is_no_other_publish(store: Store, elsewhere: Store) -> None:
    with store.place.changing("publish"):
        assert not store.place.is_published_to()
        assert elsewhere.place.is_published_to()
        with elsewhere.place.changing("publish"):
            assert store.place.is_published_to()
    assert not store.place.is_published_to()


def test_fault_A13_a_killed_download_is_continued(
    store: Store, elsewhere: Store, monkeypatch: pytest.MonkeyPatch, s3: ObjectServer
) -> None:
    name = store.publish(content("one", count=6)).id

    def fail() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "hooks", WhileFetching(fail))
    with pytest.raises(KeyboardInterrupt):
        elsewhere.open(name)
    monkeypatch.setattr(files, "hooks", files.Hooks())
    assert isinstance(elsewhere.place, ObjectPlace)
    whole = [p.name for p in elsewhere.place.cache.folder.rglob("*.bin") if p.stat().st_size == 103]
    assert whole
    s3.let_happen(*(Fault(f"GET .*/{name}$", 403, times=9) for name in whole))
    assert tag_of(elsewhere.open(name)) == "one", "what was fetched is not asked for again"


def test_a_bundle_is_fetched_while_another_is(
    store: Store, elsewhere: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (store.publish(content(tag)).id for tag in "ab")
    other = opened(str(store.at), tmp_path / "elsewhere", kept=1)
    with ThreadPoolExecutor(1) as pool:
        found: list[str] = []
        fetching = WhileFetching(lambda: found.append(tag_of(pool.submit(other.open, second).result(timeout=60))))
        monkeypatch.setattr(files, "hooks", fetching)
        assert tag_of(elsewhere.open(first)) == "a", "nobody removes what is being fetched"
    assert found == ["b"]
    assert not list((tmp_path / "elsewhere").rglob("*.copying"))


@pytest.fixture(autouse=True)
def _no_faults_are_left(s3: ObjectServer) -> Iterator[None]:
    yield
    s3.let_happen()


# ---- foreign keys, and damaged lines ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    [
        "leases/none/publish.²².x",
        f"leases/none/publish.{'9' * 400}.{'0' * 32}",
        "leases/none/../x",
        "leases//x",
        "bundles//x",
        "bundles/20250101T000000Z-abcdef/../x",
    ],
)
def test_foreign_keys_are_skipped_and_named(store: Store, s3: ObjectServer, key: str, messages: list[str]) -> None:
    s3.put(f"{store.at}/{key}", b"not ours")
    a, b = store.publish(content("a")), store.publish(content("b"))
    assert store.rollback() == a
    assert ids(store) == [a.id, b.id]
    assert store.gc() == []
    (named,) = {message for message in messages if "skipped" in message}
    assert f"{key}'" in named


def test_a_foreign_key_that_hides_leases_is_named_and_nothing_is_removed(store: Store, s3: ObjectServer) -> None:
    first = store.publish(content("a"))
    s3.put(f"{store.at}/leases/none/publish\x7f", b"not ours")
    for act in (store.gc, store.rollback, lambda: store.publish(content("b"))):
        with pytest.raises(
            BundleError, match=r"leases/none/publish\\x7f' has .* control character.*; delete or rename"
        ):
            act()
    assert ids(store) == [first.id]


def test_gc_leaves_foreign_folders_and_what_looks_like_a_lease(store: Store, tmp_path: Path) -> None:
    foreign = ["bundles/notes/a.txt", "leases/none/report.2024.csv"]
    for key in foreign:
        put(store, key, b"not ours")
    assert isinstance(store.at, Url)
    old = LeaseTimes(seconds=60, margin=-3600.0)  # all that was not written within an hour from now is old
    Store(store.at, ObjectPlace(store.at, old, BundleCache(str(store.at), tmp_path))).gc()
    assert [key for key in keys(store) if key in foreign] == foreign


def test_a_current_that_was_edited_and_touched_has_no_line_of_the_history(store: Store) -> None:
    a, b = store.publish(content("a")), store.publish(content("b"))
    put(store, "CURRENT", f"{a.id}\n".encode())
    store.touch_current()
    assert store.history()[-1]["bundle"] == b.id
    assert store.rollback(b.id) == b
    assert [line["action"] for line in store.history()] == ["publish", "publish", "recover", "rollback"]


def test_damaged_lines_of_a_bucket_are_skipped_and_named(store: Store, messages: list[str]) -> None:
    a, b, _ = (store.publish(content(tag)) for tag in "abc")
    lines = get(store, "HISTORY.jsonl").decode().splitlines()
    lines.insert(1, '{"bundle": "x"}')
    put(store, "HISTORY.jsonl", "\n".join(lines).encode())  # the last line lacks its end
    assert store.rollback() == b
    assert [line["action"] for line in store.history()] == [*["publish"] * 3, "rollback"]
    assert len([m for m in messages if f"{store.at}/HISTORY.jsonl: skipped damaged line 2;" in m]) == 1
    assert store.rollback() == a
