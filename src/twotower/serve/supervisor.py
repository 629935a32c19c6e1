"""Processes of a service and their listening sockets.

A single worker is this process. Several workers are processes on the same sockets, spawned (never forked: threads of
FAISS and onnxruntime do not survive a fork) and supervised by this one.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.context import SpawnContext
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Literal

from twotower.errors import BundleError, ConfigError
from twotower.kinds import import_modules
from twotower.serve.connections import connection_limits
from twotower.serve.settings import METRICS_FOLDER, ServeSettings
from twotower.serve.worker import SIGNAL_REPEAT_INTERVAL, log_as_json, run_worker
from twotower.store.store import Store

SHORT_LIFE_SECONDS, MAX_SHORT_LIVES = 5.0, 5
"""The service gives up when no worker is alive and each has died within SHORT_LIFE_SECONDS, MAX_SHORT_LIVES times in a
row."""
MAX_RESTART_DELAY = 10.0
"""Longest pause in seconds before a worker that keeps dying is restarted."""
SIGNAL_INTERVAL = 0.1
"""Seconds between two checks for a signal."""

log = logging.getLogger("twotower.process")


def run_service(settings: ServeSettings) -> int:
    """Serve until SIGTERM or SIGINT, and return the exit code. Raises ConfigError and BundleError before it listens."""
    from twotower.serve.api_keys import read_keys

    import_modules(settings.kinds)
    refuse_unknown_kinds(Store(settings.store))
    if settings.keys is not None:
        keys = read_keys(settings.keys)
        if settings.admin_port is not None and not any(key.admin for key in keys):
            raise ConfigError(
                f"`admin_port`: no key in {settings.keys} has scope admin; `make_key(name, admin=True)` makes one"
            )
    connections, each = connection_limits(settings.max_connections, settings.max_per_address)
    settings = settings.model_copy(update={"max_connections": connections, "max_per_address": each})
    sockets = [listen(settings.host, settings.port)]
    if settings.admin_port is not None:
        sockets.append(listen(settings.host, settings.admin_port))
    with contextlib.ExitStack() as open_sockets:
        for s in sockets:
            open_sockets.callback(s.close)
        signals: list[int] = []

        def leave(sig: int, _: FrameType | None) -> None:
            signals.append(sig)  # which stays where the exception is lost, as in a callback of the garbage collection
            sys.exit(0)

        for sig in (signal.SIGTERM, signal.SIGINT):
            signal.signal(sig, leave)  # until workers handle signals
        url = socket_url(sockets[0])
        console = f"  (console: {url}/)" if settings.console else ""
        admin = f"  (admin: {socket_url(sockets[1])})" if len(sockets) > 1 else ""
        log.info(f"serving {settings.store} on {url}{console}{admin}")
        if settings.workers == 1:
            return run_worker(settings, sockets)
        log_as_json()
        return supervise_workers(settings, sockets, signals=signals)


def refuse_unknown_kinds(store: Store) -> None:
    """Raise BundleError if the current bundle names a kind of another package that is not imported.

    The worker handles all other faults of the bundle, and a store that does not answer within 5 seconds."""
    refused: list[BundleError] = []

    def look() -> None:
        try:
            store.manifest(store.current_stamp()[0]).read_sections()
        except BundleError as e:
            if e.reason == "kinds":
                refused.append(e)

    reading = threading.Thread(target=look, name="kinds", daemon=True)  # a read that hangs cannot be cancelled
    reading.start()
    reading.join(5.0)
    if refused:
        raise refused[0]


def supervise_workers(
    settings: ServeSettings,
    sockets: list[socket.socket],
    get_context: Callable[[Literal["spawn"]], SpawnContext] = multiprocessing.get_context,
    signals: list[int] | None = None,
) -> int:
    """Keep `settings.workers` processes alive until a signal; return the exit code. The caller has set up the log.

    `signals` that have already arrived end it at once."""
    os.environ[METRICS_FOLDER] = folder = tempfile.mkdtemp(prefix="twotower-metrics-")
    context = get_context("spawn")
    signals = [] if signals is None else signals
    for sig in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sig, lambda sig, frame: signals.append(sig))
    workers: dict[BaseProcess, float] = {}  # with the times of their starts, in seconds of the monotonic clock
    short_lives, restart_at = 0, 0.0
    try:
        while not signals:
            now = time.monotonic()
            for worker in [worker for worker in workers if not worker.is_alive()]:
                log.error("worker died", extra={"fields": {"pid": worker.pid, "code": worker.exitcode}})
                worker.join()
                short_lives = short_lives + 1 if now - workers.pop(worker) < SHORT_LIFE_SECONDS else 0
                pause = 0.1 * 2.0 ** min(short_lives / settings.workers, 10) if short_lives else 0.0
                restart_at = now + min(pause, MAX_RESTART_DELAY)
            if not workers and short_lives >= MAX_SHORT_LIVES * settings.workers:
                log.error("workers die right after their start, giving up")
                return 1
            while len(workers) < settings.workers and now >= restart_at and not signals:
                worker = context.Process(target=_worker_main, args=(settings, sockets), name="twotower-worker")
                worker.start()
                workers[worker] = time.monotonic()
            if workers:
                wait([worker.sentinel for worker in workers], timeout=SIGNAL_INTERVAL)
            else:
                time.sleep(SIGNAL_INTERVAL)
        return 0
    finally:
        for s in sockets:
            s.close()  # workers hold their own; the last one to close it ends the queue
        _stop_workers([*workers], settings, signals)
        shutil.rmtree(folder, ignore_errors=True)


def _stop_workers(workers: list[BaseProcess], settings: ServeSettings, signals: list[int]) -> None:
    """Signal workers to stop, wait for drain and grace or until one more signal, and kill the rest."""
    for worker in workers:
        if worker.is_alive():
            worker.terminate()
    now = started = time.monotonic()
    deadline, before = started + settings.drain + settings.grace + 5, len(signals)
    while now < deadline and any(worker.is_alive() for worker in workers):
        if len(signals) > before and now - started > SIGNAL_REPEAT_INTERVAL:
            break
        wait([worker.sentinel for worker in workers if worker.is_alive()], timeout=0.2)
        now = time.monotonic()
    for worker in workers:
        if worker.is_alive():
            worker.kill()
        worker.join()


def _worker_main(settings: ServeSettings, sockets: list[socket.socket]) -> None:
    sys.exit(run_worker(settings, sockets))


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises ConfigError if the address is in use or not of this machine."""
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with contextlib.ExitStack() as on_failure:
            s = on_failure.enter_context(socket.socket(family, kind, protocol))
            if sys.platform != "win32":  # where it lets two services listen on one port
                s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            s.bind(where)
            s.listen(2048)
            on_failure.pop_all()
    except OSError as e:
        raise ConfigError(
            f"cannot listen on {host}:{port} ({e.strerror or e}); choose another `port` or `host`"
        ) from None
    return s


def socket_url(s: socket.socket) -> str:
    """Return the URL of a listening socket."""
    host, port = s.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
