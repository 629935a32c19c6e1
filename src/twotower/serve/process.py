"""Sockets, processes and signals of a service.

One worker is this process; several are processes of their own, started anew (never forked: threads of FAISS and
onnxruntime do not survive a fork) and on the same sockets, watched by this one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from typing import Any

import orjson
import uvicorn

from twotower.errors import ConfigError
from twotower.serve.connections import Connections, HttpProtocol, connection_limits
from twotower.serve.settings import METRICS_FOLDER, ServeSettings

THREAD_SWITCH_INTERVAL = 0.0005
"""Seconds after which the thread that loads a bundle lets the one that serves go on."""
SIGNAL_REPEAT_INTERVAL = 0.5
"""Seconds after which another signal is another wish: a terminal and systemd send one to every process of a group."""
SHORT_LIFE_SECONDS, MAX_SHORT_LIVES = 5.0, 5
"""Workers of which each dies within so many seconds, so many times in a row, will not live."""
MAX_RESTART_DELAY = 10.0
"""Seconds before a worker that keeps dying is begun again."""

log = logging.getLogger("twotower.process")


def run_service(settings: ServeSettings) -> int:
    """Serve until SIGTERM or SIGINT; the exit code. Raises ConfigError, BundleError before anything listens."""
    from twotower.serve.api_keys import read_keys
    from twotower.store import Store

    Store(settings.store)
    if settings.keys is not None:
        keys = read_keys(settings.keys)
        if settings.admin_port is not None and not any(key.admin for key in keys):
            raise ConfigError(f"--admin-port: no key in {settings.keys} has scope admin; `twotower key NAME --admin`")
    connections, each = connection_limits(settings.max_connections, settings.max_per_address)
    settings = replace(settings, max_connections=connections, max_per_address=each)
    sockets = [listen(settings.host, settings.port)]
    if settings.admin_port is not None:
        sockets.append(listen(settings.host, settings.admin_port))
    with contextlib.ExitStack() as open_sockets:
        for s in sockets:
            open_sockets.callback(s.close)
        for sig in (signal.SIGTERM, signal.SIGINT):
            signal.signal(sig, lambda *_: sys.exit(0))  # until somebody is there who drains
        url = socket_url(sockets[0])
        there = f"  (console: {url}/)" if settings.console else ""
        admin = f"  (admin: {socket_url(sockets[1])})" if len(sockets) > 1 else ""
        log.info(f"serving {settings.store} on {url}{there}{admin}")
        if settings.workers == 1:
            return run_worker(settings, sockets)
        return supervise_workers(settings, sockets)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises ConfigError if the address is taken or not of this machine."""
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with contextlib.ExitStack() as unless_it_listens:
            s = unless_it_listens.enter_context(socket.socket(family, kind, protocol))
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            s.bind(where)
            s.listen(2048)
            unless_it_listens.pop_all()
    except OSError as e:
        raise ConfigError(
            f"{host}:{port} cannot be listened on ({e.strerror or e}); choose another --port or --host"
        ) from None
    return s


def socket_url(s: socket.socket) -> str:
    host, port = s.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


# ---- one worker


def run_worker(settings: ServeSettings, sockets: list[socket.socket]) -> int:
    """Serve in this process."""
    log_as_json()
    if settings.workers == 1:
        os.environ.pop(METRICS_FOLDER, None)  # one process needs no files to add up its numbers
    sys.setswitchinterval(THREAD_SWITCH_INTERVAL)
    loop = uvicorn.Config("", loop="auto", log_config=None).get_loop_factory()
    with asyncio.Runner(loop_factory=loop) as runner:
        if runner.run(_serve(settings, sockets)):  # Python would wait for the thread, however long it is at the store
            logging.shutdown()
            sys.stdout.flush()
            os._exit(0)
    return 0


async def _serve(settings: ServeSettings, sockets: list[socket.socket]) -> bool:
    """Serve until a signal; whether a thread is still at the store."""
    from twotower.serve.api_keys import ApiKeys
    from twotower.serve.app import create_admin_app, create_app
    from twotower.serve.middleware import RequestMiddleware
    from twotower.serve.service import Service

    service = Service(settings)
    keys = ApiKeys(settings.keys) if settings.keys else None
    connections = Connections(settings, service.metrics)
    servers = [_Server(_uvicorn_config(RequestMiddleware(create_app(service), service, keys), settings, connections))]
    if len(sockets) > 1:
        admin = RequestMiddleware(create_admin_app(service), service, keys, admin=True)
        servers.append(_Server(_uvicorn_config(admin, settings, connections)))
    for server in servers:
        server.alone = settings.workers == 1
    stopping: list[tuple[float, asyncio.Task[None]]] = []

    async def stop() -> None:
        service.drain()
        log.info("draining", extra={"fields": {"seconds": settings.drain}})
        await asyncio.sleep(settings.drain)
        for server in servers:
            server.should_exit = True

    def asked_to_stop() -> None:
        now = time.monotonic()
        if not stopping:
            stopping.append((now, asyncio.create_task(stop())))
        elif now - stopping[0][0] > SIGNAL_REPEAT_INTERVAL:  # at once
            for server in servers:
                server.should_exit = server.force_exit = True

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, asked_to_stop)
    # A terminal's Ctrl-C reaches every process; of several, the one that watches them passes it on.
    loop.add_signal_handler(signal.SIGINT, asked_to_stop if settings.workers == 1 else lambda: None)
    tasks = [asyncio.create_task(connections.watch())]
    if keys:
        tasks.append(asyncio.create_task(keys.follow(service.metrics.keys_failures.inc)))
    if settings.workers > 1:
        tasks.append(asyncio.create_task(_watch_supervisor(os.getppid(), asked_to_stop)))
    # Who listens before there is anything to answer with takes requests from workers that could answer them.
    first = asyncio.create_task(service.bundles.refresh())
    while not first.done() and not stopping:
        await asyncio.wait([first], timeout=0.1)
    await service.start()
    try:
        await asyncio.gather(*(server.serve([s]) for server, s in zip(servers, sockets, strict=True)))
    finally:
        for task in tasks:
            task.cancel()
        loading = service.bundles.busy or bool(keys and keys.busy)
        await service.stop()
    return loading


async def _watch_supervisor(parent: int, stop: Callable[[], None]) -> None:
    """A worker whose watcher was killed must not go on answering alone, unseen."""
    while os.getppid() == parent:
        await asyncio.sleep(1)
    log.error("the process that watches the workers is gone")
    stop()


class _Server(uvicorn.Server):
    alone = True
    """Whether no other process listens on the same sockets."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the worker's: they drain before they stop."""
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Closing a socket resets the connections that wait in its queue, whose requests are on the way: they are
        taken out first."""
        loop = asyncio.get_running_loop()
        listening = [s.dup() for s in sockets or ()]
        for server in self.servers:
            server.close()
        for s in listening:
            s.setblocking(False)
            with s:
                waiting = list(_accept_queued(s))
                if self.alone:  # now, and not when the loop gets round to closing it: others may come meanwhile
                    s.shutdown(socket.SHUT_RD)
            for connection in waiting:
                connection.setblocking(False)
                await loop.connect_accepted_socket(self._protocol, connection)
        await super().shutdown(sockets)

    def _protocol(self) -> asyncio.Protocol:
        config: Any = self.config
        protocol: asyncio.Protocol = config.http_protocol_class(
            config=config, server_state=self.server_state, app_state={}, _loop=asyncio.get_running_loop()
        )
        return protocol


def _accept_queued(listener: socket.socket) -> Iterator[socket.socket]:
    """The connections in the queue of a socket that does not block."""
    while True:
        try:
            yield listener.accept()[0]
        except BlockingIOError:
            return


def _uvicorn_config(app: Any, s: ServeSettings, those: Connections) -> uvicorn.Config:
    class OfThisWorker(HttpProtocol):
        lanes, most_body = those, s.max_body

    return uvicorn.Config(
        app,
        http=OfThisWorker,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=s.grace,  # type: ignore[arg-type]
        proxy_headers=bool(s.trusted_proxies),
        forwarded_allow_ips=s.trusted_proxies or None,
    )


# ---- several


@dataclass
class _WorkerSlot:
    """Where one of several workers runs."""

    process: Any = None
    began: float = 0.0
    short: int = 0
    """How many in a row died as soon as they had begun."""
    again: float = 0.0
    """When the next may begin."""

    def tend(self, begin: Callable[[], Any]) -> None:
        """Begin another process if there is none, or none alive any more."""
        now = time.monotonic()
        if self.process is not None and not self.process.is_alive():
            log.error("worker died", extra={"fields": {"pid": self.process.pid, "code": self.process.exitcode}})
            self.process.join()
            self.process = None
            self.short = self.short + 1 if now - self.began < SHORT_LIFE_SECONDS else 0
            self.again = now + (min(MAX_RESTART_DELAY, 0.1 * 2.0**self.short) if self.short else 0.0)
        if self.process is None and now >= self.again:
            self.process, self.began = begin(), now


def supervise_workers(settings: ServeSettings, sockets: list[socket.socket]) -> int:
    """Keep `settings.workers` processes alive until a signal; the exit code."""
    log_as_json()
    folder = tempfile.mkdtemp(prefix="twotower-metrics-")
    os.environ[METRICS_FOLDER] = folder
    context = multiprocessing.get_context("spawn")
    asked: list[int] = []
    wake, woken = socket.socketpair()
    woken.setblocking(False)
    for sig in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sig, lambda sig, frame: asked.append(sig))
    signal.set_wakeup_fd(woken.fileno(), warn_on_full_buffer=False)
    places = [_WorkerSlot() for _ in range(settings.workers)]

    def begin() -> Any:
        worker = context.Process(target=_worker_main, args=(settings, sockets), name="twotower-worker")
        worker.start()
        return worker

    try:
        while not asked:
            for place in places:
                if not asked:
                    place.tend(begin)
            if min(place.short for place in places) >= MAX_SHORT_LIVES:
                log.error("workers die as soon as they begin; giving up")
                return 1
            wait([wake, *(place.process.sentinel for place in places if place.process is not None)], timeout=0.5)
        return 0
    finally:
        signal.set_wakeup_fd(-1)
        for s in sockets:
            s.close()  # the workers have theirs; the last of them ends the queue
        _stop_workers([place.process for place in places if place.process is not None], settings, asked)
        wake.close()
        woken.close()
        shutil.rmtree(folder, ignore_errors=True)


def _stop_workers(workers: list[Any], settings: ServeSettings, asked: list[int]) -> None:
    """Ask workers to stop, wait as long as they may take, or until one more signal, and kill the rest."""
    for worker in workers:
        if worker.is_alive():
            worker.terminate()
    now = began = time.monotonic()
    until, before = began + settings.drain + settings.grace + 5, len(asked)
    while now < until and any(worker.is_alive() for worker in workers):
        if len(asked) > before and now - began > SIGNAL_REPEAT_INTERVAL:
            break
        wait([worker.sentinel for worker in workers if worker.is_alive()], timeout=0.2)
        now = time.monotonic()
    for worker in workers:
        if worker.is_alive():
            worker.kill()
        worker.join()


def _worker_main(settings: ServeSettings, sockets: list[socket.socket]) -> None:
    sys.exit(run_worker(settings, sockets))


# ---- the log


class _JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, who speaks, what, and what was told with it. Nothing of users or items."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        } | getattr(record, "fields", {})
        if record.exc_info and record.exc_info[0] is not None:
            line["error"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode()


def log_as_json() -> None:
    """Every logger of the process writes JSON lines to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    logging.getLogger("twotower").handlers.clear()  # the command line's, which prints messages as plain lines
    root.setLevel(logging.INFO)
    # Below errors it speaks of every stranger who sends no HTTP.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
