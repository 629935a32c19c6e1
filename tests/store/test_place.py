"""What a store promises in a folder and in a bucket alike, as several machines see it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from store_worlds import FACTS, check_failed_writes, content, ids, tag_of

from twotower.errors import BundleError, ConfigError
from twotower.files.object_stores import ObjectClient
from twotower.files.urls import Url
from twotower.store.bundle import Bundle
from twotower.store.cache import BundleCache
from twotower.store.manifest import BundleFacts
from twotower.store.object_place import ObjectPlace
from twotower.store.store import Store

Machine = Callable[[str], Store]
"""Opens the store, as the machine of a name, which in a bucket has a cache of its own."""


@pytest.fixture(params=["folder", "bucket"])
def machine(request: pytest.FixtureRequest, tmp_path: Path) -> Machine:
    if request.param == "folder":
        return lambda name: Store.create(tmp_path / "store")
    url = f"{request.getfixturevalue('bucket')}/a prefix/store"
    return lambda name: Store.create(url, ObjectPlace(Url.parse(url), cache=BundleCache(url, tmp_path / name)))


@pytest.fixture
def store(machine: Machine) -> Store:
    return machine("mine")


@pytest.fixture
def elsewhere(machine: Machine, store: Store) -> Store:
    return machine("elsewhere")


def files_of(store: Store) -> set[str]:
    """Every file or object but CURRENT, HISTORY.jsonl and the lock."""
    if isinstance(store.at, Url):
        names = [o.key.removeprefix(f"{store.at.key}/") for o in ObjectClient(store.at).list(store.at.key)]
    else:
        names = [p.relative_to(store.at).as_posix() for p in store.at.rglob("*") if p.is_file()]
    return {*names} - {"CURRENT", "HISTORY.jsonl", "LOCK"}


def test_what_is_published_is_current_whole_and_read_elsewhere(store: Store, elsewhere: Store) -> None:
    probed: list[Bundle] = []
    bundle = store.publish(content("one", items=7), probed.append, reason="the first")
    assert probed == [bundle]
    about = bundle.manifest
    assert [entry.path for entry in about.files] == ["0.bin", "2.bin", "index/1.bin"]
    assert (about.bundle, about.dims, about.forced, about.schema_version) == (bundle.id, 64, False, 7)
    assert store.current() == bundle
    there = elsewhere.current()
    assert (there.manifest, tag_of(there)) == (about, "one")
    (line,) = elsewhere.history()
    assert (line["action"], line["bundle"], line["from"], line["reason"]) == ("publish", bundle.id, "", "the first")
    assert line["recall_check"] == about.recall_check.model_dump()
    (listed,) = elsewhere.bundles()
    assert (listed.id, listed.created, listed.current, listed.damaged) == (bundle.id, about.created, True, None)
    assert listed.size == 3 * 103
    assert store.place.read("CURRENT", 1 << 20).decode().startswith(f"{bundle.id}\n")
    assert files_of(store) == {f"bundles/{bundle.id}/{path}" for path in ("MANIFEST.json", *about.sha256)}


def test_rollback_goes_back_further_each_time_and_forward_by_id_only(store: Store, elsewhere: Store) -> None:
    a, b, c = (store.publish(content(tag)).id for tag in "abc")
    assert store.rollback(reason="c is bad").id == b
    assert store.current().id == b
    assert store.rollback().id == a
    with pytest.raises(BundleError, match=f"no bundle was current before; available: {a}, {b}, {c}; .* `to`"):
        store.rollback()
    assert store.rollback(c).id == c
    assert store.rollback().id == a
    d = store.publish(content("d")).id
    assert store.rollback().id == a
    with pytest.raises(BundleError, match=f"no bundle 20260101T000000Z-000000; available: {a}, {b}, {c}, {d}"):
        store.rollback("20260101T000000Z-000000")
    with pytest.raises(BundleError, match=r"no bundle \.\./x"):
        store.rollback("../x")
    assert elsewhere.current().id == a
    assert elsewhere.recent_ids(2) == [a, d]
    rollback = elsewhere.history()[3]
    assert [rollback[key] for key in ("action", "from", "bundle", "reason")] == ["rollback", c, b, "c is bad"]


def test_gc_keeps_the_newest_the_current_and_the_one_to_go_back_to(store: Store, elsewhere: Store) -> None:
    names = [store.publish(content(tag)).id for tag in "abcdef"]
    assert store.rollback(names[1]).id == names[1]
    assert elsewhere.gc() == [names[2], names[3]]
    assert ids(store) == [names[0], names[1], names[4], names[5]]
    assert {path.split("/")[1] for path in files_of(store)} == {*ids(store)}
    with pytest.raises(ConfigError, match="keep is 1, expected at least 2"):
        store.gc(1)
    assert [line["bundle"] for line in store.history() if line["action"] == "gc"] == [names[2], names[3]]


def test_fault_A1_an_error_or_interrupt_while_writing_leaves_nothing(store: Store, tmp_path: Path) -> None:
    old = store.publish(content("one"))
    before, copies = files_of(store), {*tmp_path.rglob("*.bin")}
    check_failed_writes(store, old)
    with pytest.raises(BundleError, match="stays .*: dims: input should be a valid integer, got 'x'"):
        store.publish(content("two", dims="x"))
    rest = {name: value for name, value in FACTS.items() if name != "metric"}
    with pytest.raises(BundleError, match="stays .*: 'metric' is missing"):
        store.publish(lambda folder: BundleFacts.model_validate(rest))

    def linked(folder: Path) -> BundleFacts:
        (folder / "x").symlink_to(old.folder / "0.bin")
        return BundleFacts.model_validate(FACTS)

    with pytest.raises(BundleError, match="a link"):
        store.publish(linked)
    assert (files_of(store), store.current()) == (before, old)
    assert ({*tmp_path.rglob("*.bin")}, [*tmp_path.rglob("twotower-publish-*")]) == (copies, [])
    assert [line["action"] for line in store.history()] == ["publish"]


def test_fault_A1_a_bundle_that_fails_its_probe_is_removed(store: Store, elsewhere: Store) -> None:
    old = store.publish(content("one"))
    before = files_of(store)

    def probe(bundle: Bundle) -> None:
        assert tag_of(bundle) == "two"
        assert elsewhere.current().id == old.id
        raise RuntimeError("the query found nothing")

    with pytest.raises(BundleError, match="not published.* the query found nothing") as caught:
        store.publish(content("two"), probe)
    assert caught.value.reason == "probe"
    with pytest.raises(BundleError, match="dims is 64 in MANIFEST.json, 32 in index") as caught:
        store.publish(content("two"), lambda bundle: bundle.check_consistency({"index": {"dims": 32}}))
    assert caught.value.reason == "mismatch"
    assert (files_of(store), store.current()) == (before, old)


def test_fault_A9_of_many_at_once_each_wins_or_is_told(machine: Machine, store: Store) -> None:
    won, told = list[str](), list[str]()

    def publish(n: int) -> None:
        try:
            won.append(machine(str(n)).publish(content(f"tag{n}", count=1)).id)
        except BundleError as e:
            told.append(e.reason)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(publish, range(9)))
    assert won
    assert (len(won) + len(told), {*told} - {"locked"}) == (9, set())
    assert sorted(won) == ids(store)
    assert store.current().id == max(won)
    lines = [(line["from"], line["bundle"]) for line in store.history()]
    assert {new for _, new in lines} == {*won}
    assert [new for _, new in lines[:-1]] == [old for old, _ in lines[1:]], "each knew the one before it"


def test_fault_A10_readers_always_find_a_whole_bundle_while_it_is_replaced_and_collected(
    machine: Machine, store: Store
) -> None:
    store.publish(content("0"))
    stop, errors, seen = threading.Event(), list[BundleError](), list[str]()

    def read(name: str) -> None:
        while not stop.is_set():
            try:
                seen.append(machine(name).current().id)
            except BundleError as e:
                errors.append(e)

    readers = [threading.Thread(target=read, args=(name,)) for name in ("one", "another", "mine")]
    for t in readers:
        t.start()
    for i in range(4 if isinstance(store.at, Url) else 40):
        store.publish(content(str(i)))
        if i % 3 == 2:
            store.rollback()
        store.gc()
    stop.set()
    for t in readers:
        t.join()
    assert not errors
    assert len(set(seen)) > 1


def test_fault_A10_a_reader_overtaken_by_publish_and_gc_reads_current_again(
    store: Store, elsewhere: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = store.publish(content("old"))
    real, asked = elsewhere.open, list[str]()

    def slow(name: str) -> Bundle:
        asked.append(name)
        if len(asked) == 1:
            for tag in "abc":
                store.publish(content(tag))
            store.gc()
        return real(name)

    monkeypatch.setattr(elsewhere, "open", slow)
    assert tag_of(elsewhere.current()) == "c"
    assert len(asked) == 2
    assert old.id not in ids(store)


POOR: dict[str, Any] = {"recall": 0.93, "threshold": 0.95, "k": 10, "queries": 5}


@pytest.mark.parametrize("recall", [0.93, -1, 0])
def test_fault_A11_a_recall_below_the_threshold_is_refused_with_the_numbers(store: Store, recall: float) -> None:
    old = store.publish(content("one"))
    before = files_of(store)
    with pytest.raises(
        BundleError,
        match=f"stays {old.id}: recall {recall:g} is below the threshold 0.95, k 10, queries 5; .* `force=True`",
    ) as caught:
        store.publish(content("two", recall_check=POOR | {"recall": recall}))
    assert caught.value.reason == "recall"
    assert (files_of(store), store.current()) == (before, old)
    line = store.history()[-1]
    assert (line["action"], line["from"]) == ("refused", old.id)
    assert "is below the threshold 0.95" in str(line["reason"])


def test_fault_A11_force_publishes_and_is_written_down(store: Store) -> None:
    bundle = store.publish(content("two", recall_check=POOR), reason="the fair is on Friday", force=True)
    assert store.current() == bundle
    assert bundle.manifest.forced
    line = store.history()[-1]
    assert (line["action"], line["forced"], line["reason"]) == ("publish", True, "the fair is on Friday")
    assert line["recall_check"] == POOR
    # Where nothing had to be forced, nothing was.
    assert store.publish(content("three"), force=True).manifest.forced is False
