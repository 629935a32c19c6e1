"""One worker as a process: answers, swaps, drains and ends (rows A8, A10, D8, E3, G7, G13, G16 and G33 of the
faults)."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from server_process import Start, wait_until

from twotower.serve import api_keys
from twotower.serve.worker import accept_queued, stop_arrivals
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


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can filter what arrives at a listening socket")
def test_fault_E3_no_connection_arrives_between_the_last_accept_and_the_close() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as before:
        listener.setblocking(False)
        stop_arrivals(listener)
        with pytest.raises(TimeoutError):
            socket.create_connection(listener.getsockname(), timeout=0.3)
        (accepted,) = accept_queued(listener)
        with accepted:
            before.sendall(b"request")
            accepted.settimeout(5)
            assert accepted.recv(16) == b"request"


def test_fault_E3_a_request_that_came_while_the_process_stood_still_is_answered(serve: Start) -> None:
    served = serve("--drain", "0.2", "--grace", "5", "--no-access-log").wait()
    address = urlsplit(served.url)
    with socket.create_connection((address.hostname, address.port), timeout=10) as client:
        served.process.send_signal(signal.SIGTERM)
        wait_until(lambda: _refuses(served.url))
        served.process.send_signal(signal.SIGSTOP)
        client.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
        time.sleep(0.8)  # longer than a connection without a request stays open
        served.process.send_signal(signal.SIGCONT)
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 200")
    served.process.wait(timeout=20)
    assert served.end()[0] == 0


def _refuses(url: str) -> bool:
    """Return True if nobody listens at an address."""
    try:
        httpx.get(url + "/livez")
    except httpx.ConnectError:
        return True
    return False


def test_fault_E3_another_signal_ends_it_at_once(serve: Start) -> None:
    served = serve("--drain", "30").wait()
    served.process.send_signal(signal.SIGTERM)
    time.sleep(0.6)
    assert served.process.poll() is None
    started = time.monotonic()
    served.process.send_signal(signal.SIGTERM)
    served.process.wait(timeout=20)
    assert time.monotonic() - started < 5


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
    given: dict[str, Any] = {"headers": {"authorization": f"Bearer {key}"}, "timeout": 120}
    first, second = (b.id for b in Store(store).bundles())
    assert httpx.post(served.url + "/v1/rollback", json={"to": first}, **given).status_code == 404
    assert httpx.post(admin + "/v1/rollback", json={"to": first}, **given).json()["current"] == first
    assert httpx.get(served.url + "/v1/bundle", **given).json()["bundle_id"] == first
    assert httpx.post(admin + "/v1/rollback", json={"to": second}, **given).status_code == 200


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


@pytest.mark.system
@pytest.mark.parametrize("told_by", ["keys", "a proxy", "nothing"])
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


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_fault_G33_a_new_connection_waits_for_few_requests_of_another_address(serve: Start, loop: str) -> None:
    """And what clients that have left have sent is not answered (D8)."""
    plain = "import sys\nsys.modules['uvloop'] = None\nfrom twotower.cli.app import main\nmain()"
    waits = ("--max-wait", "60000", "--target-wait", "60000")  # nothing is refused
    served = serve(*waits, code=plain if loop == "asyncio" else "").wait()

    def post(body: dict[str, Any]) -> bytes:
        data = json.dumps(body).encode()
        head = "POST /v1/recommend HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
        return f"{head}\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data

    with contextlib.ExitStack() as stack:
        greedy = [stack.enter_context(served.connect("127.0.0.2")) for _ in range(48)]
        for connection in greedy:
            connection.sendall(post({"k": 1000, "history": [f"i{n % 40}" for n in range(10_000)]}))
        for request in (post({"user_id": "u1"}), b"GET /readyz HTTP/1.1\r\nHost: localhost\r\n\r\n"):
            with served.connect("127.0.0.3") as ordinary:
                ordinary.sendall(request)
                assert ordinary.recv(100).startswith(b"HTTP/1.1 200")
    text = ""

    def have_left() -> bool:
        nonlocal text
        text = httpx.get(served.url + "/metrics", timeout=60).text
        return "twotower_in_flight_requests 1.0" in text

    wait_until(have_left)
    assert float(re.search(r'requests_total\{route="gone",status="0"\} (\S+)', text)[1]) >= 36  # type: ignore[index]
    replies = re.findall(r'"route": ?"(/v1/recommend|/readyz)", ?"status": ?200', served.end()[1])
    before = replies[: len(replies) - replies[::-1].index("/readyz")]  # in the order of the server's own log
    assert 1 <= before.count("/v1/recommend") <= 1 + 8  # of the first of the two, and four for each
