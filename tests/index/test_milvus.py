"""Bundles whose vectors are in Milvus: publishing, alias, going back, clearing up, and rows F1 to F3 of the faults."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import preloaded
import pytest
from milvus_server import Server
from server_process import Served
from wire import Wire
from worlds import EVERYTHING_SCHEMA, everything, settings

import twotower
from twotower import api
from twotower.cli.app import run_command
from twotower.config.toml import parse_config
from twotower.errors import BundleError, ConfigError, DataError, RunError, Unavailable
from twotower.index import build_index, load_index
from twotower.index.exact import Exact
from twotower.index.milvus.client import CHANNEL_OPTIONS, CollectionError, MilvusConnection
from twotower.index.milvus.milvus import Milvus
from twotower.index.milvus.milvus_index import MilvusIndex
from twotower.index.protocol import deadline
from twotower.retrieval.request import Request
from twotower.retrieval.retriever import Retriever, explain, stored_items
from twotower.runs import Run
from twotower.serve import schemas
from twotower.serve.bundles import BundleLimits
from twotower.serve.console import ItemMap
from twotower.serve.problems import Problem
from twotower.serve.search_executor import RemoteSearchExecutor
from twotower.serve.service import Service
from twotower.serve.settings import ServeSettings
from twotower.store import remote_collections
from twotower.store.bundle import Bundle
from twotower.store.store import Store

K = 5


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    """Two models of one world with 300 items; the second has narrower vectors."""
    folder, tables = tmp_path_factory.mktemp("runs"), everything(60, 300, 3000)
    narrow: dict[str, object] = {"pairs": [{"user": {"layers": [4]}, "item": {"layers": [4]}}]}
    return (
        twotower.fit(tables, EVERYTHING_SCHEMA, settings(), folder=folder / "a"),
        twotower.fit(tables, EVERYTHING_SCHEMA, settings(model=narrow), folder=folder / "b"),
    )


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that no test kills; every test takes a prefix of its own."""
    server = Server(tmp_path_factory.mktemp("milvus"))
    yield server
    server.kill()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A server of the test's own."""
    own = Server(tmp_path / "milvus")
    yield own
    own.kill()


@pytest.fixture
def server_wire(shared: Server) -> Iterator[Wire]:
    slow = Wire(shared.port)
    yield slow
    slow.close()


@pytest.fixture
def prefix(request: pytest.FixtureRequest) -> str:
    return str(request.node.name.partition("[")[0])


@pytest.fixture
def client(shared: Server) -> Any:
    from pymilvus import MilvusClient

    return MilvusClient(shared.uri, grpc_options=CHANNEL_OPTIONS)


def there(uri: str, prefix: str, **more: Any) -> Milvus:
    return Milvus(uri=uri, prefix=prefix, k=K, **more)


def flat(server: Server, prefix: str) -> Milvus:
    return Milvus(uri=server.uri, prefix=prefix, type="FLAT")


def collection(bundle: Bundle) -> str:
    return bundle.manifest.index.collection


def of_test(client: Any, prefix: str) -> list[str]:
    return [name for name in client.list_collections() if name.startswith(prefix)]


def alias(client: Any, prefix: str) -> str:
    return str(client.describe_alias(prefix)["collection_name"])


def body(**what: Any) -> schemas.RecommendRequest:
    return schemas.RecommendRequest(**({"user_id": "u3", "k": K} | what))


# ---- the same answers


@pytest.mark.parametrize("where", ["server", "file"])
def test_both_methods_give_what_an_exact_index_gives(
    runs: tuple[Run, Run], shared: Server, tmp_path: Path, prefix: str, where: str, messages: list[str]
) -> None:
    uri = shared.uri if where == "server" else str(tmp_path / "milvus.db")
    kind = "IVF_FLAT" if where == "server" else "HNSW"
    config = there(uri, f"{prefix}_{where}", type=kind, min_recall=0.9)
    bundle = api.publish(runs[0], tmp_path / "store", config)
    api.publish(runs[0], tmp_path / "exact", Exact(k=K))
    assert any(f"index: milvus {kind} (set by index.type)" in line for line in messages)
    assert any(line.startswith("recall check: ") for line in messages)
    assert bundle.manifest.index.kind == "milvus"
    assert {p.name for p in (bundle.folder / "index").iterdir()} == {"index.json", "rows.npy"}
    ours, exact = api.retriever(tmp_path / "store"), api.retriever(tmp_path / "exact")
    ours.index.search_params |= ours.index.search_limits()
    assert isinstance(ours.index, MilvusIndex)
    ours.index.exact_max_rows = 8
    many = [f"i{n}" for n in range(0, 300, 2)]
    request = Request("u3", events=[("i5", True)])
    ways: list[dict[str, Any]] = [
        {}, {"ban": many}, {"allow": many}, {"allow": many[:6]}, {"allow": []}, {"where": {"brand": "brand2"}},
        {"keep_seen": True}, {"ban": [f"i{n}" for n in range(298)]},
    ]  # fmt: skip
    for way in ways:
        for who, method in ((Request("u3"), 1), (request, 2)):
            got, wanted = (r.recommend(who, K, method, **way) for r in (ours, exact))  # type: ignore[arg-type]
            assert (got.items, got.source, got.truncated) == (wanted.items, wanted.source, wanted.truncated), way
    for who, method in ((Request("u3"), 1), (request, 2)):
        vector = ours.embed_request(who, method).vector  # type: ignore[arg-type]
        for scored, told in zip(*(r.index.search(vector, K, exact=True) for r in (ours, exact)), strict=True):
            np.testing.assert_array_equal(scored, told)
    assert explain(ours, request).vector.tolist() == explain(exact, request).vector.tolist()
    for item in ("i7", "i8"):
        got, wanted = ours.similar(item, K), exact.similar(item, K)
        np.testing.assert_allclose([i.score for i in got.items], [i.score for i in wanted.items], atol=1e-5)
        assert item not in [i.id for i in got.items]
    np.testing.assert_array_equal(ours.index.vectors(np.arange(300)), exact.index.vectors(np.arange(300)))
    rows = np.arange(300)
    np.testing.assert_allclose(ItemMap(ours).points(rows), ItemMap(exact).points(rows), atol=1e-3)
    found, plain = api.evaluate_bundle(ours), api.evaluate_bundle(exact)
    assert found["index"] == pytest.approx(plain["index"])
    if where == "file":
        from milvus_lite.server_manager import server_manager_instance

        del ours  # another process, elsewhere, opens the file
        server_manager_instance.release_server(uri)
        command = ("recommend", "--store", tmp_path / "store", "--user", "u3", "-k", K, "--json")
        done = preloaded.run("-m", "twotower", *command)
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        assert (told["source"], len(told["items"])) == ("model", K)


def test_large_filters_are_answered_whatever_it_takes(shared: Server, prefix: str, tmp_path: Path) -> None:
    """Neither few enough to fetch nor to name, and all of the best are banned: more is asked for, then every page."""
    rng = np.random.default_rng(0)
    vectors, queries = rng.standard_normal((3000, 6)).astype(np.float32), rng.standard_normal((2, 6)).astype(np.float32)
    index = flat(shared, prefix).build(vectors, np.arange(3000), "dot")
    index.save(tmp_path / "index")
    away, exact = load_index(tmp_path / "index"), build_index("exact", vectors, np.arange(3000), "dot")
    assert isinstance(away, MilvusIndex)
    away.exact_max_rows, away.named_max_rows, away.max_hits = 10, 20, 400
    best = exact.search(queries, 1000)[0]
    for allowed, banned in (
        (np.arange(0, 3000, 2), None),
        (None, list(best)),
        (np.arange(900, 2900), list(best)),
        (rng.permutation(3000)[:40], None),
    ):
        for found, wanted in zip(
            away.search(queries, 20, allowed=allowed, banned=banned),
            exact.search(queries, 20, allowed=allowed, banned=banned),
            strict=True,
        ):
            np.testing.assert_array_equal(found, wanted)


# ---- publishing, going back, clearing up


def test_the_story_of_a_store_in_milvus(
    runs: tuple[Run, Run], shared: Server, client: Any, prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = ["--store", str(tmp_path / "store")]
    options = [f"index.{o}" for o in ("kind=milvus", f"uri={shared.uri}", f"prefix={prefix}", f"k={K}")]
    sets = [part for option in options for part in ("--set", option)]

    def call(*arguments: str) -> str:
        assert run_command([*arguments]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    names = []
    for run in (runs[0], runs[1], runs[0]):
        assert f"alias {prefix}: {prefix}_" in call("publish", str(run.folder), *store, *sets)
        names.append(collection(Store(tmp_path / "store").current()))
        assert alias(client, prefix) == names[-1]
    assert len(set(names)) == 3
    assert json.loads(call("recommend", *store, "--user", "u3", "--json"))["source"] == "model"
    assert f"alias {prefix}: {names[1]}" in call("rollback", *store)
    assert alias(client, prefix) == names[1]
    call("publish", str(runs[0].folder), *store, *sets)
    names.append(collection(Store(tmp_path / "store").current()))
    out = call("gc", *store)
    assert f"dropped: {names[0]}" in out
    assert sorted(of_test(client, prefix)) == sorted(names[1:])
    assert "removed: nothing" in call("gc", *store)
    call("publish", str(runs[0].folder), *store)  # an index here: the collection stays for a rollback
    assert alias(client, prefix) == names[-1]
    assert f"alias {prefix}" in call("rollback", *store)


def test_a_publish_below_the_recall_threshold_drops_its_collection(
    runs: tuple[Run, Run], shared: Server, client: Any, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = api.publish(runs[0], tmp_path / "store", there(shared.uri, prefix))
    with monkeypatch.context() as m:
        m.setattr("twotower.publishing.publisher.measure_recall", lambda index, queries, k, banned: 0.5)
        with pytest.raises(BundleError, match=r"recall 0\.5"):
            api.publish(runs[1], tmp_path / "store", there(shared.uri, prefix, type="HNSW"))
    assert Store(tmp_path / "store").current().id == first.id
    assert of_test(client, prefix) == [collection(first)]
    assert alias(client, prefix) == collection(first)
    with monkeypatch.context() as m:  # an interrupt while rows are put in
        m.setattr(
            "twotower.index.milvus.client.MilvusConnection.build_index",
            lambda *a: (_ for _ in ()).throw(KeyboardInterrupt),
        )
        with pytest.raises(KeyboardInterrupt):
            api.publish(runs[1], tmp_path / "store", there(shared.uri, prefix, type="FLAT"), force=True)
    assert of_test(client, prefix) == [collection(first)]
    with monkeypatch.context() as m:
        # Steps that take longer than they may, but for the first: a collection that is made too late is left to gc.
        create = MilvusConnection.create_collection
        m.setattr(MilvusConnection, "create_collection", lambda self, *a: create(MilvusConnection(self.uri), *a))
        with pytest.raises(RunError, match="Milvus reports an error"):
            api.publish(runs[1], tmp_path / "store", there(shared.uri, prefix, timeout=1e-6))
    assert of_test(client, prefix) == [collection(first)]
    assert api.retriever(tmp_path / "store").bundle.id == first.id


def test_a_collection_goes_with_its_bundle_and_not_before(
    runs: tuple[Run, Run], shared: Server, client: Any, prefix: str, tmp_path: Path
) -> None:
    store = Store.create(tmp_path / "store")
    old = api.publish(runs[0], store.path, there(shared.uri, prefix))
    reader = Retriever(old)
    for _ in range(3):
        api.publish(runs[0], store.path, Exact(k=K))
    assert old.id not in remote_collections.gc(store.path)[0]
    assert len(reader.recommend(Request("u3"), K).items) == K  # it is still there
    del reader
    gone, dropped = remote_collections.gc(store.path)
    assert old.id in gone
    assert dropped == [collection(old)]
    assert of_test(client, prefix) == []


# ---- what cannot be asked for


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "milvus", "uri": "redis://x"}, "expected http://HOST:PORT"),
        ({"kind": "milvus", "uri": "https://root:secret@x"}, "TWOTOWER_MILVUS_TOKEN"),
        (
            {"kind": "ivf", "uri": "a.db"},
            "unknown key 'index.uri'; did you mean 'queries'? (allowed: min_recall, k, queries, nlist)",
        ),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match="index") as refused:
        parse_config({"index": options})
    assert said in str(refused.value)
    assert "secret" not in str(refused.value)


def test_locations_that_cannot_be_are_refused(tmp_path: Path) -> None:
    vectors, rows = np.eye(3, dtype=np.float32), np.arange(3)
    with pytest.raises(ConfigError, match="nlist is an option of type = 'IVF_FLAT' or 'IVF_SQ8', not of 'HNSW'"):
        build_index("milvus", vectors, rows, "dot", {"uri": "a.db", "type": "HNSW", "nlist": 3})
    with pytest.raises(ConfigError, match="type: input should be 'auto', 'FLAT'"):
        build_index("milvus", vectors, rows, "dot", {"uri": "a.db", "type": "IVF_PQ"})
    with pytest.raises(ConfigError, match="does not exist; create it"):
        Milvus(uri=str(tmp_path / "no" / "a.db")).build(vectors, rows, "dot").save(tmp_path / "x")
    nowhere = Milvus(uri="http://127.0.0.1:1").build(vectors, rows, "dot")
    assert isinstance(nowhere, MilvusIndex)
    nowhere.connect_timeout = 0.3
    with pytest.raises(Unavailable, match="no Milvus server answers"):
        nowhere.save(tmp_path / "x")
    (tmp_path / "taken.db").write_text("")  # no folder of milvus-lite
    with pytest.raises(Unavailable, match="has another process opened it"):
        Milvus(uri=str(tmp_path / "taken.db")).build(vectors, rows, "dot").save(tmp_path / "x")


def test_the_token_comes_from_the_environment_and_goes_nowhere(
    runs: tuple[Run, Run], shared: Server, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pymilvus import MilvusClient

    given: list[str] = []

    def listening(uri: str, token: str = "", **more: Any) -> Any:
        given.append(token)
        return MilvusClient(uri, **more)

    listening.create_schema, listening.prepare_index_params = (  # type: ignore[attr-defined]
        MilvusClient.create_schema, MilvusClient.prepare_index_params,
    )  # fmt: skip
    monkeypatch.setattr("twotower.index.milvus.client.MilvusClient", listening)
    monkeypatch.setenv("TWOTOWER_MILVUS_TOKEN", "root:s3cret")
    bundle = api.publish(runs[0], tmp_path / "store", there(shared.uri, prefix))
    assert given
    assert set(given) == {"root:s3cret"}
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and b"s3cret" in p.read_bytes()]
    assert bundle.manifest.index.uri == shared.uri


def test_index_folders_that_say_something_else_are_refused(shared: Server, prefix: str, tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).standard_normal((40, 4)).astype(np.float32)
    index = flat(shared, prefix).build(vectors, np.arange(40), "dot")
    index.save(tmp_path / "index")
    file = tmp_path / "index" / "index.json"
    good = json.loads(file.read_text())
    for name, value in [("uri", 3), ("collection", ""), ("type", "IVF_PQ"), ("width", 0), ("n", 39), ("nlist", None),
                        ("search_params", 3), ("max_norm", -1), ("params", {"nlist": 3}),
                         ("rejected", ["a"])]:  # fmt: skip
        file.write_text(json.dumps(good | {name: value}))
        with pytest.raises(RunError, match="not a usable index"):
            load_index(tmp_path / "index")
    file.write_text(json.dumps(good))
    for rows in (np.arange(39), np.arange(40)[::-1], np.arange(40.0), np.arange(40) - 1):
        np.save(tmp_path / "index" / "rows.npy", rows)
        with pytest.raises(RunError, match="not a usable index"):
            load_index(tmp_path / "index")


# ---- F1: it is down, dies, is slow


class Serving:
    """A service of this process, on an event loop that is watched."""

    def __init__(self, store: Path, limits: BundleLimits = BundleLimits(), **settings: Any) -> None:
        self.service = Service(ServeSettings(store=store, **settings), bundle_limits=limits)
        self.service.search_executor.breaker.pause = 0.05

    async def __aenter__(self) -> Service:
        await self.service.bundles.refresh()
        return self.service

    async def __aexit__(self, *_: object) -> None:
        await self.service.stop()


async def until(done: Callable[[], Any], seconds: float = 30) -> None:
    """Wait until what is awaited is true."""
    for _ in range(int(seconds * 20)):
        if await done():
            return
        await asyncio.sleep(0.05)
    raise AssertionError("it does not come")


def closed(service: Service) -> bool:
    """True if searches go to Milvus."""
    return service.search_executor.breaker.closed


async def source(service: Service) -> str:
    return (await service.recommend(body())).source


def test_fault_F1_milvus_down_at_the_start_is_not_ready_and_comes_back(
    runs: tuple[Run, Run], server: Server, prefix: str, tmp_path: Path
) -> None:
    api.publish(runs[0], tmp_path / "store", there(server.uri, prefix))
    server.kill()

    async def world() -> None:
        async with Serving(tmp_path / "store", BundleLimits(retry_pauses=(0.1,))) as service:
            with pytest.raises(Problem, match="Milvus (does not )?answer") as refused:
                await service.recommend(body())
            assert refused.value.name == "no-bundle"
            assert str(server.port) not in str(refused.value)  # where it is is not a client's business
            assert refused.value.headers["Retry-After"]
            server.start()  # which has forgotten that the collection was loaded
            await until(service.bundles.refresh)
            assert await source(service) == "model"

    asyncio.run(world())


@pytest.mark.parametrize("what", ["popular", pytest.param("503", marks=pytest.mark.system)])
def test_fault_F1_milvus_killed_in_the_middle_falls_back_and_comes_back(
    runs: tuple[Run, Run], server: Server, prefix: str, tmp_path: Path, what: Any
) -> None:
    api.publish(runs[0], tmp_path / "store", there(server.uri, prefix))

    async def world() -> None:
        async with Serving(tmp_path / "store", index_down=what, index_timeout=1500.0) as service:

            async def answers() -> bool:
                try:
                    return await source(service) == "model"
                except Problem:
                    return False

            await until(answers)
            server.kill()
            started = time.perf_counter()
            for _ in range(30):
                if what == "503":
                    with pytest.raises(Problem) as refused:
                        await service.recommend(body())
                    assert (refused.value.name, refused.value.status) == ("index-unavailable", 503)
                    assert refused.value.headers["Retry-After"]
                    continue
                reply = await service.recommend(body(ban=["i1"], where={"brand": "brand2"}))
                assert reply.source == "fallback"
                wanted = service.bundles.current.recommend(
                    Request(), K, ban=["i1", *stored_items(service.bundles.current, "u3")], where={"brand": "brand2"}
                )
                assert reply.items == wanted.items
            assert time.perf_counter() - started < 20  # a few seconds at most: then nobody asks any more
            assert not closed(service)
            assert b"twotower_index_errors_total 0.0" not in service.metrics.render()
            with pytest.raises(Unavailable):
                await service.similar("i7", K)
            server.start()

            await until(answers)
            assert closed(service)
            assert (await service.similar("i7", K)).items

    asyncio.run(world())


def test_fault_F1_a_slow_milvus_costs_a_bounded_time_and_blocks_nobody(
    runs: tuple[Run, Run], shared: Server, server_wire: Wire, prefix: str, tmp_path: Path
) -> None:
    """A hundred times slower than usual: the loop goes on, the answer is in time, and then nobody asks for a while."""
    api.publish(runs[0], tmp_path / "store", there(server_wire.uri, prefix))

    async def world() -> None:
        async with Serving(tmp_path / "store", index_timeout=800.0) as service:

            async def quick_again() -> bool:
                return await source(service) == "model"

            await until(quick_again)
            ticks: list[float] = []

            async def clock() -> None:
                while True:
                    ticks.append(time.perf_counter())
                    await asyncio.sleep(0.01)

            ticking = asyncio.create_task(clock())
            server_wire.delay = 2.5
            began = time.perf_counter()
            found = await asyncio.gather(*(source(service) for _ in range(5)))
            assert time.perf_counter() - began < 10
            assert found == ["fallback"] * 5
            assert len(ticks) > 10  # a search in the loop's own thread would have let it tick twice
            for _ in range(3):
                await source(service)
            assert not service.search_executor.breaker.closed
            quick = time.perf_counter()
            assert await source(service) == "fallback"
            assert time.perf_counter() - quick < 5
            ticking.cancel()
            server_wire.delay = 0.0
            await until(quick_again)

    asyncio.run(world())


def test_fault_F1_searches_are_bounded_and_a_mistake_is_no_failure() -> None:
    async def world() -> None:
        failed: list[int] = []
        remote = RemoteSearchExecutor(0.5, lambda: failed.append(1))
        gate = threading.Event()
        waiting = [asyncio.create_task(remote.run(lambda: gate.wait(5))) for _ in range(32)]
        await asyncio.sleep(0.05)
        with pytest.raises(Unavailable, match="32 searches are running or waiting"):
            await remote.run(lambda: 1)
        gate.set()
        assert await asyncio.gather(*waiting) == [True] * 32
        with pytest.raises(DataError, match="mine"):
            await remote.run(lambda: (_ for _ in ()).throw(DataError("mine")))
        assert not failed
        with pytest.raises(Unavailable, match="gone"):
            await remote.run(lambda: (_ for _ in ()).throw(CollectionError("gone", "collection")))
        assert failed
        assert await remote.run(lambda: 3) == 3
        remote.close()

    asyncio.run(world())


def test_fault_F1_what_only_reads_is_tried_again_while_there_is_time(
    shared: Server, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pymilvus import MilvusClient
    from pymilvus.exceptions import MilvusException

    vectors = np.random.default_rng(0).standard_normal((300, 4)).astype(np.float32)
    index = flat(shared, prefix).build(vectors, np.arange(300), "dot")
    wanted = index.search(vectors[:2], 3)[0]
    real, fails = MilvusClient.search, 1

    def failing(self: Any, *arguments: Any, **more: Any) -> Any:
        nonlocal fails
        fails -= 1
        if fails >= 0:
            raise MilvusException(code=1, message="not now")
        return real(self, *arguments, **more)

    monkeypatch.setattr(MilvusClient, "search", failing)
    np.testing.assert_array_equal(index.search(vectors[:2], 3)[0], wanted)
    fails, started = 1000, time.monotonic()
    with deadline(started + 3.0), pytest.raises(Unavailable, match="not now|the time for the search is over"):
        index.search(vectors[:2], 3)
    assert 990 < fails < 999
    assert time.monotonic() - started < 30


@pytest.mark.system
def test_fault_F1_over_http_popular_items_come_while_milvus_is_down(
    runs: tuple[Run, Run], server: Server, prefix: str, tmp_path: Path
) -> None:
    api.publish(runs[0], tmp_path / "store", there(server.uri, prefix))
    served = Served(tmp_path / "store", "--index-timeout", "1500").wait()
    try:

        def ask() -> Any:
            return httpx.post(served.url + "/v1/recommend", json={"user_id": "u3", "k": K}, timeout=30)

        def explain() -> Any:
            return httpx.post(served.url + "/v1/console/explain", json={"user_id": "u3", "k": K}, timeout=30).json()

        def search() -> Any:
            return httpx.post(served.url + "/v1/search", json={"text": "more", "k": K}, timeout=30).json()

        def answers() -> None:
            for _ in range(600):
                if ask().json()["source"] == "model":
                    return
                time.sleep(0.05)
            raise AssertionError("Milvus does not answer")

        answers()
        assert search()["source"] == "model"
        assert len(httpx.get(served.url + "/v1/console/map", timeout=30).json()["points"]) == 300
        assert explain()["filtered"]["items"]
        server.kill()
        assert ask().json()["source"] == search()["source"] == explain()["reply"]["source"] == "fallback"
        reply = ask()
        assert (reply.status_code, reply.json()["source"], len(reply.json()["items"])) == (200, "fallback", K)
        alike = httpx.get(served.url + "/v1/items/i7/similar", timeout=30)
        assert (alike.status_code, alike.json()["type"]) == (503, "/problems/index-unavailable")
        assert alike.headers["retry-after"]
        assert httpx.get(served.url + "/readyz", timeout=30).status_code == 200
        server.start()
        answers()
    finally:
        code, log = served.end()
    assert code == 0, log
    assert "the index fails and is not searched for a while" in log
    assert "Traceback" not in log


# ---- F2: another collection than the bundle says


def test_fault_F2_a_collection_of_another_dimension_is_refused_and_the_old_bundle_answers(
    runs: tuple[Run, Run], shared: Server, client: Any, prefix: str, tmp_path: Path
) -> None:
    """The alias may stand for anything: a bundle asks the collection that it names, and looks at it first."""
    store = tmp_path / "store"
    old = api.publish(runs[0], store, there(shared.uri, prefix))

    async def world() -> None:
        async with Serving(store) as service:
            fresh = api.publish(runs[1], store, there(shared.uri, prefix))
            name = collection(fresh)
            width, told = _facts(client, name)
            spoils: list[tuple[str, Callable[[], None]]] = [
                ("mismatch", lambda: _again(client, name, width + 1, 300, told)),
                ("mismatch", lambda: _again(client, name, width, 300, told.replace("model ", "model 0"))),
                ("mismatch", lambda: _again(client, name, width, 299, told)),
                ("collection", lambda: _gone(client, name)),
            ]
            for reason, spoil in spoils:
                spoil()
                assert not await service.bundles.refresh(retry=True)
                assert service.bundles.current.bundle.id == old.id
                assert name in service.bundles.last_error
                with pytest.raises(CollectionError) as refused:
                    Retriever(fresh)
                assert refused.value.reason == reason
                assert (await service.recommend(body())).bundle_id == old.id
            text = service.metrics.render().decode()
            assert 'twotower_bundle_load_failures_total{reason="mismatch"} 3.0' in text

    asyncio.run(world())


def _again(client: Any, name: str, width: int, n: int, told: str) -> None:
    """Another collection under the name of one."""
    from pymilvus import DataType

    _gone(client, name)
    schema = client.create_schema(auto_id=False)
    schema.add_field("row", DataType.INT64, is_primary=True)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=width)
    client.create_collection(name, schema=schema, properties={"twotower": told})
    client.insert(name, [{"row": row, "vector": np.ones(width, np.float32)} for row in range(n)])
    params = client.prepare_index_params()
    params.add_index("vector", index_type="FLAT", metric_type="L2")
    client.create_index(name, params, sync=False)


def _facts(client: Any, name: str) -> tuple[int, str]:
    said = client.describe_collection(name)
    return said["fields"][1]["params"]["dim"], said["properties"]["twotower"]


def _gone(client: Any, name: str) -> None:
    for alias in client.list_aliases(name)["aliases"]:
        client.drop_alias(alias)
    client.drop_collection(name)


def test_fault_F2_an_alias_that_moves_mixes_no_versions(
    runs: tuple[Run, Run], shared: Server, client: Any, prefix: str, tmp_path: Path
) -> None:
    first = api.publish(runs[0], tmp_path / "store", there(shared.uri, prefix))
    reader = Retriever(first)
    before = reader.recommend(Request("u3"), K).items
    second = api.publish(runs[1], tmp_path / "store", there(shared.uri, prefix))
    assert alias(client, prefix) == collection(second)
    assert reader.recommend(Request("u3"), K).items == before


# ---- F3: a publisher that dies half-way

_DIES = """
import os, signal, sys
from twotower import api
from twotower.index.milvus import client
from twotower.index.milvus.milvus import Milvus
real = client.MilvusConnection.insert
def insert(self, name, rows, vectors):
    real(self, name, rows[:180], vectors[:180])
    os.kill(os.getpid(), signal.SIGKILL)
client.MilvusConnection.insert = insert
run, store, uri, prefix = sys.argv[1:]
api.publish(api.load(run), store, Milvus(uri=uri, prefix=prefix, type="IVF_FLAT", k=5))
"""


@pytest.mark.parametrize("mend", ["publish", "gc"])
def test_fault_F3_a_publisher_killed_at_60_percent_leaves_nothing_that_is_served(
    runs: tuple[Run, Run], shared: Server, client: Any, tmp_path: Path, mend: str, messages: list[str]
) -> None:
    prefix, store = f"dies_{mend}", tmp_path / "store"
    first = api.publish(runs[0], store, there(shared.uri, prefix))
    done = preloaded.run("-c", _DIES, runs[1].folder, store, shared.uri, prefix)
    assert done.returncode == -9, done.stderr
    (partial,) = set(of_test(client, prefix)) - {collection(first)}
    client.flush(partial)
    assert client.get_collection_stats(partial)["row_count"] == 180
    assert alias(client, prefix) == collection(first)
    assert api.retriever(store).bundle.id == first.id
    if mend == "gc":
        assert remote_collections.gc(store) == ([], [partial])
        assert of_test(client, prefix) == [collection(first)]
    second = api.publish(runs[1], store, there(shared.uri, prefix))
    assert (f"dropped collections that no bundle names: {partial}" in messages) == (mend == "publish")
    assert sorted(of_test(client, prefix)) == sorted([collection(first), collection(second)])
    assert alias(client, prefix) == collection(second)
    assert len(api.retriever(store).recommend(Request("u3"), K).items) == K


def test_fault_F3_an_alias_that_could_not_be_moved_is_told_and_moved_later(
    runs: tuple[Run, Run], server: Server, prefix: str, tmp_path: Path
) -> None:
    from pymilvus import MilvusClient

    store = tmp_path / "store"
    first = api.publish(runs[0], store, there(server.uri, prefix))
    second = api.publish(runs[0], store, there(server.uri, prefix))
    server.kill()
    with pytest.raises(RunError, match=f"{first.id} is current, but alias {prefix} is not on its collection"):
        remote_collections.rollback(store, connect_timeout=0.5)
    assert Store(store).current().id == first.id
    server.start()
    remote_collections.gc(store)
    assert alias(MilvusClient(server.uri, grpc_options=CHANNEL_OPTIONS), prefix) == collection(first)
    assert replace(second).id in [b.id for b in Store(store).bundles()]


def test_a_filter_that_leaves_out_the_best_costs_a_few_exchanges_and_no_scan() -> None:
    vectors = np.random.default_rng(0).standard_normal((60_000, 8)).astype(np.float32)
    index = Milvus(uri="http://nowhere", type="IVF_FLAT").build(vectors, np.arange(60_000), "cosine")
    assert isinstance(index, MilvusIndex)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    best = np.argsort(-(unit @ unit[0]), kind="stable")
    asked: list[int] = []

    class Server:
        """Answers a search exactly; whoever fetches a page of the catalogue is wrong."""

        def search(self, name: str, queries: Any, k: int, *_: Any) -> Any:
            asked.append(k)
            return [[{"row": int(r), "entity": {"vector": unit[r]}} for r in best[:k]] for _ in queries]

    index._cached_connection = Server()  # type: ignore[assignment]
    index.collection, index._is_remote = "c", True
    allowed = np.sort(best[400:])
    rows, _ = index.search(unit[:1], 10, allowed=allowed)
    assert rows[0].tolist() == best[400:410].tolist()
    assert len(asked) <= 5
