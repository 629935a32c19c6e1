"""The service as a process: workers and signals (rows A10, E3, E4 and E7 of the faults)."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import resource
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_process import Start, wait_until

import twotower
from twotower.cli.app import run_command
from twotower.errors import ConfigError
from twotower.reports.messages import printed_messages
from twotower.serve import api_keys, json_log, listener, supervisor
from twotower.serve.settings import METRICS_FOLDER, ServeSettings
from twotower.store.store import Store


def test_it_answers_says_where_it_is_and_ends_well(serve: Start) -> None:
    served = serve("--no-access-log").wait()
    assert re.fullmatch(r"serving \S+ on http://127\.0\.0\.1:\d+  \(console: \S+/\)\n", served.said)
    reply = httpx.post(served.url + "/v1/recommend", json={"user_id": "u1"})
    assert len(reply.json()["items"]) == 10
    code, log = served.end()
    assert code == 0
    lines = [json.loads(line) for line in log.splitlines()]
    assert [line["event"] for line in lines if line["level"] != "info"] == []
    assert "bundle is current" in [line["event"] for line in lines]


def test_no_torch_in_the_process(serve: Start) -> None:
    served = serve(preload=False).wait()
    httpx.post(served.url + "/v1/recommend", json={"user_id": "u1", "history": ["i1"]})
    httpx.get(served.url + "/")
    maps = Path(f"/proc/{served.process.pid}/maps").read_text()
    assert "onnxruntime" in maps
    assert "libtorch" not in maps
    assert "/torch/" not in maps


def test_fault_E3_sigterm_under_load_loses_no_request(serve: Start) -> None:
    waits = ("--max-wait", "5000", "--target-wait", "5000")  # a busy machine is no overload
    served = serve("--drain", "0.6", "--grace", "5", "--no-access-log", *waits).wait()
    answered, refused, lost = [0], [0], []
    stop = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=served.url) as client:
            while not stop.is_set():
                try:
                    reply = client.post("/v1/recommend", json={"user_id": "u1"})
                    assert reply.status_code == 200, reply.text
                    answered[0] += 1
                except httpx.ConnectError:
                    refused[0] += 1  # it does not listen any more, so the request was never sent
                    return
                except httpx.HTTPError as e:
                    lost.append(repr(e))
                    return

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    wait_until(lambda: answered[0] > 20)
    started = time.monotonic()
    served.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert httpx.get(served.url + "/readyz").status_code == 503
    served.process.wait(timeout=20)
    spent = time.monotonic() - started
    for thread in threads:  # they end when nobody listens any more
        thread.join(timeout=10)
    stop.set()
    code, log = served.end()
    assert code == 0, log
    assert not lost
    assert answered[0] > 50
    assert refused[0] == 4
    assert 0.6 <= spent < 6


@pytest.mark.parametrize("sig", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.system)])
def test_fault_E3_a_signal_to_the_whole_group_drains_as_one_to_the_first(serve: Start, sig: int) -> None:
    """As systemd and a terminal send it: to the process that watches and to every worker."""
    served = serve("--workers", "2", "--drain", "0.8", "--grace", "5", group=True).wait()
    started = time.monotonic()
    os.killpg(served.process.pid, sig)
    time.sleep(0.3)
    assert httpx.get(served.url + "/livez").status_code == 200  # everything is answered while it drains
    served.process.wait(timeout=20)
    assert 0.8 <= time.monotonic() - started < 6
    assert served.end()[0] == 0


def test_fault_E3_another_signal_ends_it_at_once(serve: Start) -> None:
    served = serve("--drain", "30").wait()
    served.process.send_signal(signal.SIGTERM)
    time.sleep(0.6)
    assert served.process.poll() is None
    started = time.monotonic()
    served.process.send_signal(signal.SIGTERM)
    served.process.wait(timeout=20)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("pause", [0.0, 0.3, 0.6, 1.2])
def test_fault_E3_a_signal_while_workers_begin_ends_them_all(serve: Start, pause: float) -> None:
    served = serve("--workers", "3")
    time.sleep(pause)
    code, log = served.end()
    assert code == 0, log
    assert "Traceback" not in log, log
    assert served.workers() == []


def test_fault_E3_a_signal_while_a_bundle_is_loaded_does_not_wait_for_it(serve: Start, tmp_path: Path) -> None:
    loading = tmp_path / "loading"
    slow = (
        "import pathlib, sys, time\nfrom twotower.__main__ import main\nfrom twotower.serve import bundles\n"
        f"bundles.check_answers = lambda retriever: (pathlib.Path({str(loading)!r}).touch(), time.sleep(30))\n"
        "sys.argv[0] = 'twotower'\nmain()"
    )
    served = serve(code=slow)
    wait_until(loading.exists)
    started = time.monotonic()
    code, log = served.end()
    assert code == 0, log
    assert time.monotonic() - started < 10


def test_fault_E4_a_worker_that_is_killed_is_replaced_and_the_others_answer(serve: Start) -> None:
    served = serve("--workers", "2", "--no-access-log").wait()
    wait_until(lambda: len(served.workers()) == 2)
    first = served.workers()
    for _ in range(20):
        assert httpx.post(served.url + "/v1/recommend", json={"user_id": "u1"}).status_code == 200
    os.kill(first[0], signal.SIGKILL)
    failed = 0
    for _ in range(40):
        try:
            assert httpx.post(served.url + "/v1/recommend", json={"user_id": "u1"}).status_code == 200
        except httpx.HTTPError:
            failed += 1  # requests that the killed worker had accepted
        time.sleep(0.02)
    assert failed <= 2
    wait_until(lambda: len(served.workers()) == 2 and first[0] not in served.workers())
    text = httpx.get(served.url + "/metrics").text
    counted = sum(
        float(line.split()[-1])
        for line in text.splitlines()
        if line.startswith("twotower_requests_total{") and '"/v1/recommend"' in line and '"200"' in line
    )
    assert counted >= 60 - failed - 2  # those of the killed worker too
    assert float(re.search(r"^twotower_in_flight_requests (\S+)", text, re.M)[1]) == 1  # type: ignore[index]
    code, log = served.end()
    assert code == 0
    assert "worker died" in log


@pytest.mark.system
def test_workers_end_with_the_process_that_watches_them(serve: Start) -> None:
    served = serve("--workers", "2").wait()
    workers = served.workers()
    assert workers
    served.end(signal.SIGKILL)
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))


def test_fault_E7_workers_are_spawned_and_never_forked(store: Path) -> None:
    methods: list[str] = []

    class Context(SpawnContext):
        def Process(self, **_: Any) -> SpawnProcess:  # type: ignore[override]
            raise KeyboardInterrupt

    def get_context(method: str) -> Context:
        methods.append(method)
        return Context()

    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(KeyboardInterrupt):
            supervisor.supervise_workers(ServeSettings(store=store, workers=2), [], get_context)
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])
        os.environ.pop(METRICS_FOLDER, None)
    assert methods == ["spawn"]


@pytest.mark.system
def test_fault_A10_swaps_under_requests_fail_none_and_leak_nothing(serve: Start, store: Path) -> None:
    served = serve("--poll", "0.05", "--no-access-log").wait()
    first, second = (b.id for b in Store(store).bundles())
    pid, stop = served.process.pid, threading.Event()
    statuses: list[int] = []
    bundles: set[str] = set()
    errors: list[str] = []

    def ask() -> None:
        with httpx.Client(base_url=served.url, timeout=20) as client:
            while not stop.is_set():
                try:
                    reply = client.post("/v1/recommend", json={"user_id": "u1"})
                    statuses.append(reply.status_code)
                    bundles.add(reply.json()["bundle_id"])
                except httpx.HTTPError as e:
                    errors.append(repr(e))
                time.sleep(0.005)  # which leaves a core to the loads

    watcher = httpx.Client(base_url=served.url, timeout=20)

    def swap(to: str) -> None:
        Store(store).rollback(to)
        wait_until(lambda: watcher.get("/livez").json()["bundle_id"] == to)

    def held() -> tuple[int, int]:
        resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
        return resident, len(list(Path(f"/proc/{pid}/fd").iterdir()))

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        for n in range(10):
            swap((first, second)[n % 2])
        memory, files = held()
        for n in range(40):
            swap((first, second)[n % 2])
        time.sleep(0.3)
        more_memory, more_files = held()
    finally:
        stop.set()
        thread.join()
        watcher.close()
    assert not errors
    assert set(statuses) == {200}
    assert bundles == {first, second}
    assert more_memory < memory * 1.05
    assert more_files <= files + 2
    assert httpx.get(served.url + "/livez").json()["bundle_id"] == second


def test_fault_A8_a_store_with_nothing_to_serve_starts_alive_and_takes_up_what_comes(
    serve: Start, tmp_path: Path
) -> None:
    Store.create(tmp_path / "empty")
    served = serve(store=tmp_path / "empty")
    wait_until(lambda: "no bundle is published yet" in httpx.get(served.url + "/readyz", timeout=20).json()["detail"])
    assert httpx.get(served.url + "/readyz").status_code == 503
    assert httpx.get(served.url + "/livez").status_code == 200


HANGS = """
import functools, os, sys, threading
from twotower.serve import service
from twotower.serve.bundles import BundleLimits
service.Service = functools.partial(service.Service, bundle_limits=BundleLimits(check_timeout=1.0))
plain = os.open
def hangs(path, *more, **named):
    if str(path).endswith({name!r}) and os.path.exists({flag!r}):
        plain({flag!r} + "-hung", os.O_CREAT)
        threading.Event().wait()
    return plain(path, *more, **named)
os.open = hangs
from twotower.cli.app import main
main()
"""


@pytest.mark.parametrize(("name", "cold"), [("CURRENT", False), ("CURRENT", True), ("MANIFEST.json", False)])
def test_fault_G7_a_store_that_hangs_stops_neither_answers_nor_sigterm(
    serve: Start, store: Path, tmp_path: Path, name: str, cold: bool
) -> None:
    """A read that never comes back, as of a file system on a network."""
    copy, flag = tmp_path / "store", tmp_path / "hang"
    shutil.copytree(store, copy)
    if cold:
        flag.touch()
    served = serve("--poll", "0.05", "--grace", "5", store=copy, code=HANGS.format(name=name, flag=str(flag)))
    if not cold:
        served.wait()
        flag.touch()
        Store(copy).rollback(Store(copy).bundles()[0].id)
    wait_until(Path(f"{flag}-hung").exists, 60)
    if name == "CURRENT":  # reading another file belongs to loading, which may take minutes
        failures = 'load_failures_total{reason="store"}'
        wait_until(lambda: failures in httpx.get(served.url + "/metrics", timeout=60).text, 60)
    assert httpx.get(served.url + "/livez").status_code == 200
    if cold:
        assert httpx.get(served.url + "/readyz").status_code == 503
    else:
        assert len(httpx.post(served.url + "/v1/recommend", json={"user_id": "u1"}).json()["items"]) == 10
    asked = time.monotonic()
    code, log = served.end()
    assert code == 0, log
    assert time.monotonic() - asked < 15
    if name == "CURRENT":
        assert "the store does not answer" in log


def test_the_admin_port_is_another_one(serve: Start, store: Path, tmp_path: Path) -> None:
    key, lines = api_keys.make_key("boss", True)
    (tmp_path / "keys.toml").write_text(lines)
    served = serve("--keys", str(tmp_path / "keys.toml"), "--admin-port", "0", "--poll", "0.05").wait()
    admin = re.search(r"admin: (http://\S+)\)", served.said)[1]  # type: ignore[index]
    headers = {"authorization": f"Bearer {key}"}
    first, second = (b.id for b in Store(store).bundles())
    assert httpx.post(served.url + "/v1/rollback", json={"to": first}, headers=headers).status_code == 404
    assert httpx.post(admin + "/v1/rollback", json={"to": first}, headers=headers).json()["current"] == first
    assert httpx.get(served.url + "/v1/bundle", headers=headers).json()["bundle_id"] == first
    assert httpx.post(admin + "/v1/rollback", json={"to": second}, headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--host", "0.0.0.0"], "can be reached from other machines"),
        (["--host", "no.such.name.invalid"], "no such address"),
        (["--port", "70000"], "expected 0 to 65535"),
        (["--workers", "0"], "at least 1"),
        (["--workers", "100000"], "--workers is 100,000, at most"),
        (["--threads", "100000"], "--threads is 100,000, at most"),
        (["--max-connections", "1000000000"], "the limit of open files"),
        (["--max-connections", "10", "--max-per-address", "11"], "at most the 10 of --max-connections"),
        (["--event-store", "http://x"], "allowed: memory"),
        (["--live", "memory"], "--live is renamed to --event-store"),
        (["--live-seconds=5"], "--live-seconds is renamed to --event-ttl"),
        (["--unknown-user", "maybe"], "allowed: popular, 404"),
        (["--admin-port", "0"], "--admin-port needs --keys"),
        (["--keys", "none.toml"], "none.toml"),
        (["--max-wait", "0"], "more than 0"),
        (["--rate", "nan"], "--rate"),
        (["--rate", "inf"], "finite"),
        (["--burst", "3"], "--burst goes with --rate"),
        (["--max-k", "20000"], "at most 10,000"),
        (["--target-wait", "200"], "at most --max-wait"),
        (["--trusted-proxies", "nonsense/33"], "no address or network"),
    ],
)
def test_settings_that_cannot_be_end_with_one_line_and_code_2(
    two_bundles: Path, flags: list[str], said: str, capfd: pytest.CaptureFixture[str], open_files: None
) -> None:
    code = run_command(["serve", "--store", str(two_bundles), "--port", "0", *flags])
    out, err = capfd.readouterr()
    assert code == 2
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("error: ")
    assert said in err


@pytest.fixture
def open_files() -> Iterator[None]:
    """The limit of open files as it was, after a test that raises it."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_no_store_and_a_taken_port_are_told_at_once(store: Path, tmp_path: Path) -> None:
    with pytest.raises(twotower.TwoTowerError, match="not a store"):
        supervisor.run_service(ServeSettings(store=tmp_path))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match="cannot listen on"):
            listener.listen("127.0.0.1", taken.getsockname()[1])


def test_a_key_is_made_by_a_verb(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(["key", "shop", "--admin"]) == 0
    out, err = capfd.readouterr()
    secret = err.split()[-1]
    (tmp_path / "keys.toml").write_text(out)
    found = api_keys.ApiKeys(tmp_path / "keys.toml").find(secret)
    assert found is not None
    assert (found.name, found.admin) == ("shop", True)


def test_fault_G13_an_emptied_or_deleted_file_of_keys_lets_nobody_in(serve: Start, tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    (shop, lines), (boss, more) = api_keys.make_key("shop", False), api_keys.make_key("boss", True)
    file.write_text(lines + more)
    quick = (
        "import functools, sys\nfrom twotower.__main__ import main\nfrom twotower.serve import api_keys\n"
        "api_keys.ApiKeys = functools.partial(api_keys.ApiKeys, poll=0.1)\nsys.argv[0] = 'twotower'\nmain()"
    )
    served = serve("--keys", str(file), "--admin-port", "0", code=quick).wait()
    admin = re.search(r"admin: (http://\S+)\)", served.said)[1]  # type: ignore[index]

    def statuses() -> tuple[int, int]:
        asked = httpx.get(served.url + "/v1/bundle", headers={"authorization": f"Bearer {shop}"})
        return asked.status_code, httpx.get(
            admin + "/v1/bundles", headers={"authorization": f"Bearer {boss}"}
        ).status_code

    def until(wanted: tuple[int, int]) -> None:
        wait_until(lambda: statuses() == wanted)

    until((200, 200))
    for harm in (lambda: file.write_text(""), file.unlink):
        harm()
        until((401, 401))
        for path in ("/livez", "/readyz"):
            assert httpx.get(served.url + path).status_code == 200
        (tmp_path / "new.toml").write_text(lines + more)
        (tmp_path / "new.toml").replace(file)
        until((200, 200))
    text = httpx.get(served.url + "/metrics", headers={"authorization": f"Bearer {shop}"}).text
    assert float(re.search(r"^twotower_keys_failures_total (\S+)", text, re.M)[1]) >= 2  # type: ignore[index]
    code, log = served.end()
    assert code == 0
    said = [json.loads(line) for line in log.splitlines()]
    assert [line["event"] for line in said if line["level"] == "error"] == [
        "key file cannot be used, every key is refused"
    ] * 2
    assert shop not in log


@pytest.mark.parametrize(
    "told_by", [*(pytest.param(by, marks=pytest.mark.system) for by in ("keys", "a proxy")), "nothing"]
)
def test_fault_G16_the_largest_requests_of_few_clients_leave_others_their_share(
    serve: Start, tmp_path: Path, told_by: str
) -> None:
    """Eight connections, of one key, of four addresses behind a proxy, or of the one address that all have."""
    made = [api_keys.make_key(f"client {n}", False) for n in range(2)]
    (tmp_path / "keys.toml").write_text("".join(lines for _, lines in made))
    cases: dict[str, tuple[list[str], list[dict[str, str]]]] = {
        "keys": (["--keys", str(tmp_path / "keys.toml")], [{"authorization": f"Bearer {key}"} for key, _ in made]),
        "a proxy": (["--trusted-proxies", "127.0.0.1"], [{"x-forwarded-for": f"192.0.2.{n}"} for n in range(5)]),
        "nothing": ([], [{}, {}]),
    }
    flags, (ordinary, *greedy) = cases[told_by]
    served = serve(*flags, "--no-access-log").wait()
    many = [f"i{n % 40}" for n in range(3_000)]  # each such request takes several times --max-wait
    largest = json.dumps(
        {"k": 1000, "history": many, "events": many, "allow": many, "ban": [f"x{i}" for i in many]}
    ).encode()
    stop, statuses = threading.Event(), []

    def ask(who: dict[str, str]) -> None:
        headers = {"content-type": "application/json"} | who
        while not stop.is_set():
            with contextlib.suppress(httpx.HTTPError), httpx.Client(base_url=served.url, timeout=30) as http:
                while not stop.is_set():
                    statuses.append(http.post("/v1/recommend", content=largest, headers=headers).status_code)

    threads = [threading.Thread(target=ask, args=(who,)) for who in greedy for _ in range(8 // len(greedy))]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: len(statuses) >= 10)
        with httpx.Client(base_url=served.url, headers=ordinary, timeout=30) as http:
            answered = [http.post("/v1/recommend", json={"user_id": f"u{n % 60}"}).status_code for n in range(40)]
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert answered.count(200) >= 38
    assert statuses.count(200) >= 5  # they have their share too
    assert set(statuses) <= {200, 503}


def test_the_log_of_a_service_replaces_the_messages_of_the_command_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    levels = {logger: logger.level for logger in (logging.getLogger(), logging.getLogger("uvicorn.error"))}
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    try:
        with printed_messages():
            json_log.log_as_json()
            supervisor.log.warning("a message")
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
    out, err = capsys.readouterr()
    assert (out, json.loads(err)["event"]) == ("", "a message")
