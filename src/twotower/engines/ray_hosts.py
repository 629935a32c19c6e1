"""The hosts of a Ray that is joined, as the process of a job sees them: the head, the lost ones, and free CPUs."""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

HEAD_SILENCE = 30.0
"""Seconds from the first connection to the head that fails, without one that succeeds, after which a job ends. After 60 without the head
Ray ends the process itself."""
HEAD_LOOKS = 6
"""Connections to the head that are tried within these seconds."""
CONNECTION = 5.0
"""Seconds for which a connection to the head is waited."""
HOST_CONNECTION = 2.0
"""Seconds for which one to another host is waited, whose shards may be made elsewhere if it is slow."""
CONNECTIONS = 64
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


def dead_hosts() -> frozenset[str]:
    """Return the ids of the hosts that Ray has taken for lost since it began, without those that have left."""
    import ray

    lost = [n for n in ray.nodes() if not n["Alive"] and n.get("DeathReason") not in LEFT]  # type: ignore[no-untyped-call]
    return frozenset(n["NodeID"] for n in lost)


def silent_hosts() -> frozenset[str]:
    """Return the ids of the hosts that take no connection, which Ray notices later, and asks for CPUs until then; none by Ray's client, whose
    process may reach the head alone."""
    import ray

    hosts = [n for n in ray.nodes() if n["Alive"]] if head_address() else []  # type: ignore[no-untyped-call]
    with ThreadPoolExecutor(CONNECTIONS) as threads:
        answers = threads.map(_answers, [f"{n['NodeManagerAddress']}:{n['NodeManagerPort']}" for n in hosts])
        return frozenset(n["NodeID"] for n, is_there in zip(hosts, answers, strict=True) if not is_there)


def _answers(address: str) -> bool:
    """Return True if HOST:PORT takes a connection."""
    with suppress(OSError):
        connect(address, HOST_CONNECTION)
        return True
    return False


def free_cpus() -> str:
    """Return the free and all CPUs of Ray, as "3 of 8 free CPUs"."""
    import ray

    free, all_ = ray.available_resources(), ray.cluster_resources()  # type: ignore[no-untyped-call]
    return f"{free.get('CPU', 0):g} of {all_.get('CPU', 0):g} free CPUs"
