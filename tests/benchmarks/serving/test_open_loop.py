"""The load generator of the benchmarks: its schedule, what it reads of answers, and that standing still is charged."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from benchmarks.serving import open_loop as loop
from benchmarks.serving.requests import request

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


def test_a_schedule_is_drawn_beforehand_and_keeps_its_rates() -> None:
    due = loop.schedule([(1000, 10), (100, 10)], seed=1)
    assert (np.diff(due) >= 0).all()
    assert abs((due < 10).sum() - 10_000) < 500
    assert abs((due >= 10).sum() - 1000) < 150
    assert due.max() < 20
    gaps = np.diff(due[due < 10])
    assert gaps.std() / gaps.mean() == pytest.approx(1, abs=0.1)  # of a Poisson process
    assert (due == loop.schedule([(1000, 10), (100, 10)], seed=1)).all()
    assert len(loop.schedule([(0, 5)], seed=1)) == 0


def test_percentiles_are_of_answers_that_were() -> None:
    found = loop.percentiles(np.arange(1, 1001) / 1e3)
    assert found == {"p50": 500, "p99": 990, "max": 1000}
    assert loop.percentiles(np.zeros(0))["p99"] is None


def test_an_answer_is_read_once_it_is_whole() -> None:
    whole = b'HTTP/1.1 503 Slow Down\r\nretry-after: 1\r\nContent-Length: 4\r\nConnection: close\r\n\r\n{"a"'
    for cut in range(len(whole)):
        assert loop.parse(whole[:cut]) is None
    assert loop.parse(whole) == (503, len(whole), True, True)
    assert loop.parse(OK) == (200, len(OK), False, False)
    empty = b"HTTP/1.1 204 No Content\r\n\r\n"
    assert loop.parse(empty) == (204, len(empty), False, False)


@pytest.mark.parametrize("data", [b"SSH-2.0", b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 no\r\nContent-Length: 0\r\n\r\n"])
def test_what_is_no_answer(data: bytes) -> None:
    with pytest.raises(ValueError):
        loop.parse(data)


def test_numbers_of_a_part_of_a_run() -> None:
    n = 6
    due: loop.Times = np.arange(n, dtype=np.float64)
    status = np.array([200, 200, 503, 429, loop.TIMEOUT, 202], np.int16)
    done = np.array([0.1, 1.3, 2.1, 3.1, 14.0, 7.5])
    retry = np.array([0, 0, 1, 0, 0, 0], bool)
    log = loop.Log(due, due + 0.001, done, status, retry, 0.1, 8.0)
    found = log.within(1.0, 6.0)
    assert [found[x] for x in ("ok", "unanswered", "503", "429", "other", "errors")] == [2, 3, 1, 1, 0, 1]
    assert found["retry_after_missing"] == 1
    assert found["offered"] == 1
    assert found["goodput"] == pytest.approx(1 / 5)  # the answer after the end is none of it
    assert found["max"] == 2500
    assert found["p50"] == 300
    assert found["lag"] == pytest.approx(1)


@contextmanager
def _server(stands_still: float = 0.0, hangs_up: int = -1) -> Iterator[tuple[int, list[socket.socket]]]:
    """One connection at a time is answered; it stands still once, at its 20th request, or hangs up on one."""
    listening = socket.create_server(("127.0.0.1", 0))
    seen, accepted = 0, []

    def serve(connection: socket.socket) -> None:
        nonlocal seen
        with connection:
            while data := connection.recv(65_536):
                assert data.startswith(b"GET")
                with one:
                    seen += 1
                    if seen == hangs_up:
                        return
                    if seen == 20:
                        time.sleep(stands_still)
                    connection.sendall(OK)

    def accept() -> None:
        while True:
            try:
                accepted.append(listening.accept()[0])
            except OSError:
                return
            threading.Thread(target=serve, args=(accepted[-1],), daemon=True).start()

    one = threading.Lock()
    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield listening.getsockname()[1], accepted
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join(5)


@pytest.mark.parametrize("connections", [1, 64])
def test_a_server_that_stands_still_is_charged_for_all_who_came(connections: int) -> None:
    """A closed loop would have found one slow answer of a hundred; a fifth of them wait, by the schedule."""
    due = np.arange(100) / 100
    with _server(stands_still=0.3) as (port, accepted):
        log = loop.Generator(port, most=connections).run(due, [request("GET", "/")], np.zeros(100, int))
    assert (log.status == 200).all()
    latency = log.done - log.due
    assert (latency > 0.05).sum() >= 20
    assert 0.25 < latency.max() < 3
    assert len(accepted) <= connections
    assert np.median(log.taken - log.due) < 0.05


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    log = loop.Generator(port).run(np.zeros(3), [request("GET", "/")], np.zeros(3, int))
    assert (log.status == loop.REFUSED).all()
