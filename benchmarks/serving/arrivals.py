import json
import select
import socket
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from benchmarks.lib.processes import serving
from benchmarks.lib.report import Report
from benchmarks.serving.open_loop import parse
from benchmarks.serving.requests import items, request

GREEDY, ORDINARY = "127.0.0.2", "127.0.0.3"  # addresses of clients


def main(chosen: Namespace, report: Report) -> None:
    store = Path(chosen.store)
    known = items(store)
    small = {
        "a small request": request("POST", "/v1/recommend", {"k": 10, "history": known[:1]}),
        "/readyz": request("GET", "/readyz"),
    }
    with serving(store, ["--no-access-log"]) as server:
        for kind in chosen.only:
            large = request(*largest(kind, known))
            for name, ordinary in small.items():
                found = [served_before(server.port, large, chosen.connections, ordinary) for _ in range(chosen.rounds)]
                report.add(f"{kind}, answered before {name}", [float(n) for n, _ in found], more=False)
                report.add(f"{kind}, {name}", [seconds * 1e3 for _, seconds in found], "ms")


def largest(kind: str, known: list[str]) -> tuple[str, str, Any]:
    """Return the largest request that the service allows by default, of one kind."""
    many = (known * (10_000 // len(known) + 1))[:10_000]
    if kind == "history":
        return "POST", "/v1/recommend", {"k": 1_000, "history": many}
    if kind == "lists":
        events = [{"id": item, "liked": True, "time": 1.5e9 + n} for n, item in enumerate(many)]
        return (
            "POST",
            "/v1/recommend",
            {"k": 1_000, "history": many, "events": events, "allow": many, "ban": many[::-1]},
        )
    one = {"k": 1_000, "history": []}
    room = (1 << 20) // 100 - len(json.dumps(one)) - 10
    while len(json.dumps(many, separators=(",", ":"))) > room:
        many = many[: len(many) * 9 // 10]
    return "POST", "/v1/recommend:batch", {"requests": [one | {"history": many}] * 100}


def served_before(port: int, large: bytes, connections: int, ordinary: bytes) -> tuple[int, float]:
    """Return the replies 200 to large requests of one address, all sent at once, that come before the reply to an
    ordinary one of another address, and the seconds until it comes."""
    sent: dict[socket.socket, memoryview] = {}
    read: dict[socket.socket, bytes] = {}
    for _ in range(connections):
        sent[connect(port, GREEDY)] = memoryview(large)
    newcomer, began = connect(port, ORDINARY), time.perf_counter()
    sent[newcomer] = memoryview(ordinary)
    try:
        while (reply := parse(read.get(newcomer, b""))) is None:
            reading, writing, _ = select.select([*sent], [one for one, rest in sent.items() if rest], [], 60)
            for one in writing:
                try:
                    sent[one] = sent[one][one.send(sent[one]) :]
                except BlockingIOError:
                    pass
                except OSError:  # refused and closed
                    sent[one] = sent[one][:0]
            for one in reading:
                try:
                    read[one] = read.get(one, b"") + (more := one.recv(1 << 20))
                except OSError:
                    more = b""
                if not more:
                    del sent[one]
        seconds = time.perf_counter() - began
        if reply.status != 200:
            raise SystemExit(f"error: the ordinary request got {reply.status}")
        answered = [parse(data) for one, data in read.items() if one is not newcomer]
        return sum(one is not None and one.status == 200 for one in answered), seconds
    finally:
        for one in {newcomer, *sent, *read}:
            one.close()
        time.sleep(1.5)  # the service answers what is left


def connect(port: int, address: str) -> socket.socket:
    made = socket.create_connection(("127.0.0.1", port), source_address=(address, 0))
    made.setblocking(False)
    return made
