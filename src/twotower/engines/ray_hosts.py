"""The hosts of a Ray as the process of a job sees them: the head, the lost ones, and free CPUs."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from threading import Thread
from typing import NamedTuple, TypeVar

Said = TypeVar("Said")

HEAD_SILENCE = 30.0
"""Seconds from the first connection to the head that fails, without one that succeeds, after which a job ends. After 60 without the head
Ray ends the process itself."""
HEAD_LOOKS = 6
"""Connections to the head that are tried within these seconds."""
CONNECTION = 5.0
"""Seconds for which a connection to the head is waited."""
HOST_CONNECTION = 2.0
"""Seconds for which one to another host is waited, whose shards may be made elsewhere if it is slow."""
CONNECTIONS = 256
"""Hosts that are connected to at a time."""
LEFT = frozenset({1, 4})
"""Ray's reasons of a death (NodeDeathInfo) that no shard is lost by: a host that was told to stop has ended its processes, whose shards Ray
repeats at once, and an idle one that was scaled down had none."""
NODE = "ray.io/node-id"
"""Label that Ray gives to a host."""


class Head:
    """The process that keeps the state of a Ray. Where it is lost, Ray waits without a word, and ends the calling process after a minute;
    so the job looks at it."""

    def __init__(self, address: str, silence: float) -> None:
        """Take the address, "" for a Ray that tells of its loss, and the seconds of silence that are too many."""
        self._address, self._silence, self.answers = address, silence, True
        self.every = silence / HEAD_LOOKS
        self._looked = self._lost = time.monotonic()

    def look(self) -> None:
        """Connect to the head, unless that has just been done. Raises ConnectionError for one that has been silent for long."""
        begun = time.monotonic()
        if not self._address or begun - self._looked < self.every:
            return
        try:
            connect(self._address)
            self.answers = True
        except OSError as e:
            if self.answers:  # whoever has not looked has heard nothing, so that is no silence
                self._lost, self.answers = begun, False
            if (silent := time.monotonic() - self._lost) >= self._silence:
                raise ConnectionError(f"its head, {self._address}, is silent for {silent:,.0f} seconds: {e}") from e
        self._looked = time.monotonic()


def connect(address: str, seconds: float = CONNECTION) -> None:
    """Connect to HOST:PORT within these seconds, and hang up. Raises OSError."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), seconds).close()


def head_address() -> str:
    """Return the address of the head of Ray, "" for Ray's client, whose connection tells of its loss."""
    import ray

    is_client = ray.util.client.ray.is_connected()  # type: ignore[no-untyped-call]
    return "" if is_client else str(ray.get_runtime_context().gcs_address)


class Hosts:
    """The hosts of a Ray that are lost: those that Ray has taken for lost, and those that take no connection, which it takes for lost up to a
    minute later and may ask for CPUs until then. By Ray's client none is connected to: its process may reach the head alone."""

    def __init__(self, every: float) -> None:
        """Take the seconds from one look to the next."""
        self._every, self._head = every, head_address()
        self._lost = {h.id for h in _hosts() if h.is_lost}
        self._looked = time.monotonic()
        self.silent: frozenset[str] = frozenset()
        """Hosts that take no connection, those among them that Ray has taken for lost since too."""

    def look(self) -> list[str]:
        """Look at all hosts, unless that has just been done or the head is silent. Return the addresses of those that are lost since the last look.
        Where all are silent that have CPUs, this process is cut off, or may open no connection, and none is lost."""
        if time.monotonic() - self._looked < self._every:
            return []
        self._looked = time.monotonic()
        if self._head and not _answers(self._head):
            return []  # nor would Ray answer
        hosts = _hosts()
        alive = [h for h in hosts if h.is_alive] if self._head else []
        with ThreadPoolExecutor(CONNECTIONS) as threads:
            answers = dict(zip(alive, threads.map(_answers, [h.address for h in alive]), strict=True))
        if not all(answers.values()):
            hosts = _hosts()  # one may have left meanwhile
        silent = {h.id for h, is_there in answers.items() if not is_there}
        if not any(is_there for h, is_there in answers.items() if h.has_cpus):
            silent = set()
        dead = {h.id for h in hosts if h.is_lost}
        self.silent = frozenset(silent & {h.id for h in hosts if h.is_alive} | self.silent & dead)
        lost = dead | self.silent
        found = [h.address for h in hosts if h.id in lost - self._lost]
        self._lost, self._looked = lost, time.monotonic()
        return found


def elsewhere(hosts: frozenset[str]) -> dict[str, str] | None:
    """Return the selector of all hosts but these, None for all."""
    return {NODE: f"!in({','.join(sorted(hosts))})"} if hosts else None


class _Host(NamedTuple):
    """A host of a Ray, and whether Ray has taken it for lost; one that has left is neither alive nor lost."""

    id: str
    address: str
    """HOST:PORT of Ray's process there."""
    is_alive: bool
    is_lost: bool
    has_cpus: bool


def ask(question: Callable[[], Said], seconds: float = HEAD_SILENCE) -> Said:
    """Return what Ray says to a question. Raises ConnectionError without an answer within these seconds, as of a head that was lost meanwhile, for
    which Ray waits until it ends the process."""
    answer = Future[Said]()

    def wait() -> None:
        try:
            answer.set_result(question())
        except Exception as e:
            answer.set_exception(e)

    Thread(target=wait, daemon=True).start()  # no end of this process waits for it
    try:
        return answer.result(seconds)
    except TimeoutError as e:
        raise ConnectionError(f"its head gives no answer within {seconds:g} seconds") from e


def _hosts() -> list[_Host]:
    import ray

    return [
        _Host(
            n["NodeID"], f"{n['NodeManagerAddress']}:{n['NodeManagerPort']}", n["Alive"],
            not n["Alive"] and n.get("DeathReason") not in LEFT, n.get("Resources", {}).get("CPU", 0) > 0,
        )
        for n in ask(ray.nodes)
    ]  # fmt: skip


def _answers(address: str) -> bool:
    """Return True if HOST:PORT takes a connection."""
    with suppress(OSError):
        connect(address, HOST_CONNECTION)
        return True
    return False


def free_cpus() -> str:
    """Return the free and all CPUs of Ray, as "3 of 8 free CPUs"."""
    import ray

    free, all_ = ask(ray.available_resources), ask(ray.cluster_resources)
    return f"{free.get('CPU', 0):g} of {all_.get('CPU', 0):g} free CPUs"
