"""The current bundle of a running service: replacement, damage, hostile towers, memory, a store that hangs."""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import hostile_towers
import pytest
from service_client import Client, Make, bearer, fields, problem

from twotower.serve.api_keys import ApiKeys
from twotower.serve.bundles import BundleLimits, BundleManager
from twotower.serve.middleware import RequestMiddleware
from twotower.serve.routes import create_app
from twotower.store.store import Store


def test_fault_A8_current_that_points_nowhere_is_alive_and_not_ready(store: Path, make: Make, tmp_path: Path) -> None:
    broken = tmp_path / "store"
    shutil.copytree(store, broken)
    (broken / "CURRENT").write_text("20200101T000000Z-abcdef\n")
    client = make(at=broken)
    assert client.get("/livez").status_code == 200
    told = problem(client.get("/readyz"), "no-bundle")
    assert "available: " in told["detail"]
    problem(client.post("/v1/recommend", {}), "no-bundle")
    assert 'twotower_bundle_load_failures_total{reason="missing"} 1.0' in client.get("/metrics").text
    Store(broken).rollback(Store(broken).bundles()[0].id)
    client.run(client.service.bundles.refresh())
    assert client.get("/readyz").status_code == 200


@pytest.mark.parametrize("name", ["CURRENT", "HISTORY.jsonl", "MANIFEST.json"])
@pytest.mark.parametrize("kind", ["fifo", "folder", "huge", "link"])
@pytest.mark.parametrize("cold", [True, False])
def test_fault_G7_what_is_no_file_of_a_store_changes_nothing_but_a_counter(
    store: Path, make: Make, tmp_path: Path, name: str, kind: str, cold: bool
) -> None:
    copy = tmp_path / "store"
    shutil.copytree(store, copy)
    first, second = (b.id for b in Store(copy).bundles())
    Store(copy).rollback(first)
    client = make(at=copy, load=not cold)
    path = copy / "bundles" / second / name if name == "MANIFEST.json" else copy / name
    (copy / "CURRENT").write_text(second + "\n")
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to("/dev/zero")
    else:
        path.touch()
        os.truncate(path, 1 << 30)
    client.run(asyncio.wait_for(client.service.bundles.refresh(), 60))
    assert client.get("/livez").status_code == 200
    if name == "HISTORY.jsonl":  # tells where recent events may be, and no more
        assert client.get("/v1/bundle").json()["bundle_id"] == second
    else:
        if cold:
            assert str(tmp_path) not in problem(client.get("/readyz"), "no-bundle")["detail"]
        else:
            assert client.get("/v1/bundle").json()["bundle_id"] == first
            assert len(client.post("/v1/recommend", {"user_id": "u1"}).json()["items"]) == 10
        assert "twotower_bundle_load_failures_total{reason=" in client.get("/metrics").text
    listed = client.get("/v1/console/bundles")
    if name == "CURRENT":
        assert "CURRENT: cannot be read" in problem(listed, "bundle-store")["detail"]
    else:
        assert [b["id"] for b in listed.json()["bundles"]] == [first, second]


def until_free(bundles: BundleManager) -> None:
    """Wait until no thread is at the store."""
    while bundles.busy:
        time.sleep(0.01)


def test_fault_G7_a_store_that_hangs_holds_one_thread_and_the_old_bundle_answers(
    store: Path, make: Make, monkeypatch: pytest.MonkeyPatch, key_file: tuple[Path, str, str]
) -> None:
    limits = BundleLimits(check_timeout=0.2, retry_pauses=(0.0,))
    client = make(limits=limits)
    go_on, hanging, plain = threading.Event(), threading.Event(), os.open

    def hangs(path: Any, *more: Any, **named: Any) -> int:
        if str(path).endswith("CURRENT"):
            hanging.set()
            go_on.wait(60)
        return plain(path, *more, **named)

    admin = make(keys=key_file[0], admin=True, limits=limits)
    before = threading.active_count()
    monkeypatch.setattr("os.open", hangs)
    try:
        for _ in range(5):
            assert not client.run(client.service.bundles.refresh())
        assert hanging.is_set()
        assert client.service.bundles.last_error == "the store does not answer"
        assert 'twotower_bundle_load_failures_total{reason="store"} 5.0' in client.get("/metrics").text
        assert client.get("/readyz").status_code == 200
        assert len(client.post("/v1/recommend", {"user_id": "u1"}).json()["items"]) == 10
        problem(client.get("/v1/console/bundles"), "bundle-store")
        problem(client.post("/v1/console/explain?bundle=20200101T000000Z-abcdef", {"user_id": "u1"}), "unknown-bundle")
        for method, path in (("GET", "/v1/bundles"), ("POST", "/v1/rollback"), ("POST", "/v1/reload")):
            told = admin.ask(method, path, {} if method == "POST" else None, headers=bearer(key_file[2]))
            problem(told, "bundle-store")
        assert threading.active_count() <= before + 2  # of each service one
        assert client.service.bundles.busy
    finally:
        go_on.set()
    until_free(client.service.bundles)
    client.run(client.service.bundles.refresh())
    assert client.service.bundles.last_error == ""
    assert client.get("/v1/console/bundles").status_code == 200


def test_fault_A3_a_damaged_bundle_is_refused_counted_and_the_old_one_answers(
    store: Path, make: Make, tmp_path: Path
) -> None:
    copy = tmp_path / "store"
    shutil.copytree(store, copy)
    first, second = (b.id for b in Store(copy).bundles())
    Store(copy).rollback(first)
    client = make(at=copy)
    assert client.get("/v1/bundle").json()["bundle_id"] == first
    file = copy / "bundles" / second / "index" / "vectors.npy"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    (copy / "CURRENT").write_text(second + "\n")
    client.run(client.service.bundles.refresh())
    assert client.get("/v1/bundle").json()["bundle_id"] == first
    assert client.get("/readyz").status_code == 200
    assert 'twotower_bundle_load_failures_total{reason="checksum"} 1.0' in client.get("/metrics").text
    client.run(client.service.bundles.refresh())  # not at every look
    assert 'twotower_bundle_load_failures_total{reason="checksum"} 1.0' in client.get("/metrics").text
    data[-1] ^= 1
    file.write_bytes(data)
    (copy / "CURRENT").touch()
    client.run(client.service.bundles.refresh())
    assert client.get("/v1/bundle").json()["bundle_id"] == second


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (hostile_towers.subgraph, "the operator 'If'"),
        (hostile_towers.endless_loop, "the operator 'Loop'"),
        pytest.param(hostile_towers.years, "seconds", marks=pytest.mark.system),
        (hostile_towers.bomb_at_load, "MB"),
    ],
)  # fmt: skip
def test_fault_G1_G2_a_foreign_tower_is_refused_counted_and_the_old_bundle_answers(
    change: Any, said: str, store: Path, make: Make, key_file: tuple[Path, str, str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    copy = tmp_path / "store"
    shutil.copytree(store, copy)
    (copy / hostile_towers.SECRET).write_bytes(bytes(400))
    monkeypatch.chdir(copy)
    limits = BundleLimits(inspect_seconds=1.0) if change is hostile_towers.years else BundleLimits()
    old = Store(copy).current().id
    forged = hostile_towers.forged(copy, {"user_tower.onnx": hostile_towers.of(change)})
    file, key, boss = key_file
    admin = make(at=copy, keys=file, admin=True, limits=limits)
    service = admin.service
    client = Client(service, RequestMiddleware(create_app(service), service, ApiKeys(file), False), admin.loop)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    told = admin.post("/v1/rollback", {"to": forged}, headers=bearer(boss))
    assert told.json() == {"current": forged, "serving": old}
    told = admin.post("/v1/reload", {}, headers=bearer(boss)).json()
    assert told["serving"] == old
    assert said in told["refused"]
    assert 'twotower_bundle_load_failures_total{reason="tower"} 2.0' in client.get("/metrics", headers=bearer(key)).text
    assert [fields(r)["reason"] for r in caplog.records if r.getMessage() == "bundle refused"] == ["tower"] * 2
    reply = client.post("/v1/recommend", {"user_id": "u1", "method": 2}, headers=bearer(key))
    assert reply.json()["bundle_id"] == old
    assert admin.post("/v1/rollback", {"to": old}, headers=bearer(boss)).json() == {"current": old, "serving": old}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB


def test_fault_G2_a_tower_that_asks_for_gigabytes_only_for_some_users_costs_an_error_and_no_memory(
    store: Path, make: Make, tmp_path: Path
) -> None:
    copy = tmp_path / "store"
    shutil.copytree(store, copy)
    forged = hostile_towers.forged(copy, {"user_tower.onnx": hostile_towers.of(hostile_towers.bomb_at_a_code)})
    Store(copy).rollback(forged)
    client = make(at=copy)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    asked = [client.post("/v1/recommend", {"user_id": f"u{i}", "method": 2}) for i in (0, 59, 1)]
    assert [reply.status_code for reply in asked] == [200, 500, 200]
    problem(asked[1], "internal-error")
    assert asked[2].json()["bundle_id"] == forged
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 3 << 20  # KiB


def test_fault_E5_a_bundle_that_does_not_fit_the_memory_is_refused(store: Path, make: Make) -> None:
    client = make(memory_limit=1_000_000)
    told = problem(client.get("/readyz"), "no-bundle")
    assert "MB are free" in told["detail"]
    assert 'twotower_bundle_load_failures_total{reason="memory"} 1.0' in client.get("/metrics").text


def test_a_bundle_that_was_compared_with_goes_at_the_next_swap(client: Client, store: Path) -> None:
    first, second = (b.id for b in Store(store).bundles())
    client.get(f"/v1/console/map?bundle={first}")
    other = client.service.bundles._comparison
    assert other is not None
    Store(store).rollback(first)
    client.run(client.service.bundles.refresh())
    assert client.service.bundles.retriever is other  # it was loaded already
    assert client.service.bundles._comparison is None
    client.get(f"/v1/console/map?bundle={second}")
    Store(store).rollback(second)
    client.run(client.service.bundles.refresh())
    assert client.service.bundles._comparison is None


def test_whoever_looks_for_bundles_goes_on_looking(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []

    async def broken(again: bool = False) -> bool:
        looked.append(1)
        raise ValueError("nobody thought of it")

    monkeypatch.setattr(client.service.bundles, "refresh", broken)

    async def go() -> None:
        task = asyncio.create_task(client.service.bundles.watch(0.001))
        while len(looked) < 3:
            await asyncio.sleep(0.001)
        task.cancel()

    client.run(go())


def test_recent_events_outlive_a_swap(store: Path, make: Make) -> None:
    first, second = (b.id for b in Store(store).bundles())
    client = make()
    client.post("/v1/events", {"user_id": "u1", "events": ["i1"]})
    Store(store).rollback(first)
    client.run(client.service.bundles.refresh())
    reply = client.post("/v1/recommend", {"user_id": "u1"}).json()
    assert (reply["bundle_id"], reply["recent_events"]) == (first, 1)
    Store(store).rollback(second)
    client.run(client.service.bundles.refresh())
    reply = client.post("/v1/recommend", {"user_id": "u1"}).json()
    assert (reply["bundle_id"], reply["recent_events"]) == (second, 1)
