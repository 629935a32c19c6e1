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
from multiprocessing.connection import wait
from typing import Any

import orjson
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from twotower.errors import ConfigError, TwoTowerError
from twotower.serve.settings import ServeSettings

METRICS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
HEAD = 32 << 10
"""Bytes that the head of a request may have."""
SWITCH = 0.0005
"""Seconds after which the thread that loads a bundle lets the one that serves go on."""
LAST_WORD = 0.5
"""Seconds that a connection made just before the end has for its request."""
SHORT_LIVED, TRIES = 5.0, 5
"""A worker that dies within so many seconds, so many times in a row, will not live."""

log = logging.getLogger("twotower.process")


def run(settings: ServeSettings, say: Callable[[str], None] = print) -> int:
    """Serve until SIGTERM or SIGINT; the exit code. Raises ConfigError, BundleError before anything listens."""
    from twotower.serve.keys import read
    from twotower.store import Store

    Store(settings.store)
    if settings.keys is not None:
        keys = read(settings.keys)
        if settings.admin_port is not None and not any(key.admin for key in keys):
            raise ConfigError(f"--admin-port: no key in {settings.keys} has scope admin; `twotower key NAME --admin`")
    sockets = [listen(settings.host, settings.port)]
    if settings.admin_port is not None:
        sockets.append(listen(settings.host, settings.admin_port))
    with contextlib.ExitStack() as open_sockets:
        for s in sockets:
            open_sockets.callback(s.close)
        url = address(sockets[0])
        there = f"  (console: {url}/)" if settings.console else ""
        admin = f"  (admin: {address(sockets[1])})" if len(sockets) > 1 else ""
        say(f"serving {settings.store} on {url}{there}{admin}")
        if settings.workers == 1:
            return work(settings, sockets)
        return supervise(settings, sockets)


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


def address(s: socket.socket) -> str:
    host, port = s.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


# ---- one worker


def work(settings: ServeSettings, sockets: list[socket.socket]) -> int:
    """Serve in this process."""
    log_as_json()
    sys.setswitchinterval(SWITCH)
    loop = uvicorn.Config("", loop="auto", log_config=None).get_loop_factory()
    with asyncio.Runner(loop_factory=loop) as runner:
        return runner.run(_serve(settings, sockets))


async def _serve(settings: ServeSettings, sockets: list[socket.socket]) -> int:
    from twotower.serve.app import create, create_admin
    from twotower.serve.door import Door
    from twotower.serve.keys import Keys
    from twotower.serve.service import Service

    service = Service(settings)
    keys = Keys(settings.keys) if settings.keys else None
    servers = [_Server(_config(Door(create(service), service, keys), settings))]
    if len(sockets) > 1:
        servers.append(_Server(_config(Door(create_admin(service), service, keys, admin=True), settings)))
    stopping: list[asyncio.Task[None]] = []

    async def stop() -> None:
        service.drain()
        log.info("draining", extra={"told": {"seconds": settings.drain}})
        await asyncio.sleep(settings.drain)
        for server in servers:
            server.should_exit = True

    def asked_to_stop() -> None:
        if not stopping:
            stopping.append(asyncio.create_task(stop()))
        else:  # a second time: at once
            for server in servers:
                server.should_exit = server.force_exit = True

    loop = asyncio.get_running_loop()
    for sig in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(sig, asked_to_stop)
    tasks = [asyncio.create_task(_refresh(keys))] if keys else []
    if settings.workers > 1:
        tasks.append(asyncio.create_task(_follow(os.getppid(), asked_to_stop)))
    await service.start()
    try:
        await asyncio.gather(*(server.serve([s]) for server, s in zip(servers, sockets, strict=True)))
    finally:
        for task in tasks:
            task.cancel()
        await service.stop()
    return 0


async def _follow(parent: int, stop: Callable[[], None]) -> None:
    """A worker whose watcher was killed must not go on answering alone, unseen."""
    while os.getppid() == parent:
        await asyncio.sleep(1)
    log.error("the process that watches the workers is gone")
    stop()


async def _refresh(keys: Any) -> None:
    """A changed file of keys is taken up without a new start."""
    while True:
        await asyncio.sleep(2)
        try:
            if keys.refresh():
                log.info("keys were read again")
        except TwoTowerError as e:
            log.error("keys stay as they were", extra={"told": {"detail": str(e)}})


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the worker's: they drain before they stop."""
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Closing a socket resets the connections that wait in its queue, whose requests are on the way: they are
        taken out first."""
        loop = asyncio.get_running_loop()
        waiting = [s.dup() for s in sockets or ()]
        for server in self.servers:
            server.close()
        for s in waiting:
            s.setblocking(False)
            with s:
                for connection in _queued(s):
                    connection.setblocking(False)
                    await loop.connect_accepted_socket(self._protocol, connection)
        await super().shutdown(sockets)

    def _protocol(self) -> asyncio.Protocol:
        config: Any = self.config
        protocol: asyncio.Protocol = config.http_protocol_class(
            config=config, server_state=self.server_state, app_state={}, _loop=asyncio.get_running_loop()
        )
        return protocol


def _queued(listener: socket.socket) -> Iterator[socket.socket]:
    """The connections in the queue of a socket that does not block."""
    while True:
        try:
            yield listener.accept()[0]
        except BlockingIOError:
            return


def _config(app: Any, s: ServeSettings) -> uvicorn.Config:
    class Protocol(_Protocol):
        head_timeout = s.head_timeout

    return uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=s.keep_alive,  # type: ignore[arg-type]
        timeout_graceful_shutdown=s.grace,  # type: ignore[arg-type]
        proxy_headers=bool(s.trusted_proxies),
        forwarded_allow_ips=s.trusted_proxies or None,
    )


class _Protocol(HttpToolsProtocol):
    """uvicorn's, and nobody holds a connection by sending the head of a request for ever, or without an end."""

    head_timeout = 10.0
    _timer: asyncio.TimerHandle | None = None
    _size = 0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._rest()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """Close the connection; one that was made just now, when its request may be on the way, a moment later."""
        cycle: Any = self.cycle
        if cycle is None:
            self.loop.call_later(LAST_WORD, self._give_up)
        else:
            super().shutdown()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._size = 0
        self._wait()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._grow(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._grow(len(name) + len(value) + 4)

    def on_headers_complete(self) -> None:
        self._rest()
        super().on_headers_complete()

    def _grow(self, n: int) -> None:
        self._size += n
        if self._size > HEAD:
            raise ValueError("the head of the request is too long")

    def _wait(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self.head_timeout, self._give_up)

    def _rest(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        self._timer = None
        cycle: Any = self.cycle
        answering = cycle is not None and not cycle.response_complete
        if not answering and not self.transport.is_closing():
            self.transport.close()


# ---- several


def supervise(settings: ServeSettings, sockets: list[socket.socket]) -> int:
    """Keep `settings.workers` processes alive until a signal; the exit code."""
    log_as_json()
    folder = tempfile.mkdtemp(prefix="twotower-metrics-")
    os.environ[METRICS_FOLDER] = folder
    context = multiprocessing.get_context("spawn")
    stopping = False

    def stop(*_: object) -> None:
        nonlocal stopping
        stopping = True
        for s in sockets:
            s.close()  # the workers have theirs; the last of them ends the queue
        for worker, _started in workers:
            if worker.is_alive() and worker.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker.pid, signal.SIGTERM)

    def begin() -> tuple[Any, float]:
        worker = context.Process(target=_worker, args=(settings, sockets), name="twotower-worker")
        worker.start()
        return worker, time.monotonic()

    workers: list[tuple[Any, float]] = []
    short = 0
    try:
        for sig in (signal.SIGTERM, signal.SIGINT):
            signal.signal(sig, stop)
        workers.extend(begin() for _ in range(settings.workers))
        while not stopping:
            wait([worker.sentinel for worker, _ in workers], timeout=0.5)
            for place, (worker, started) in enumerate(workers):
                if worker.is_alive() or stopping:
                    continue
                worker.join()
                log.error("worker died", extra={"told": {"pid": worker.pid, "code": worker.exitcode}})
                short = short + 1 if time.monotonic() - started < SHORT_LIVED else 0
                if short >= TRIES:
                    log.error("workers die as soon as they start; giving up")
                    stop()
                    return 1
                workers[place] = begin()
        return 0
    finally:
        until = time.monotonic() + settings.drain + settings.grace + 5
        for worker, _ in workers:
            worker.join(max(0.0, until - time.monotonic()))
            if worker.is_alive():
                worker.kill()
                worker.join()
        shutil.rmtree(folder, ignore_errors=True)


def _worker(settings: ServeSettings, sockets: list[socket.socket]) -> None:
    sys.exit(work(settings, sockets))


# ---- the log


class _Json(logging.Formatter):
    """One JSON object a line: time, level, who speaks, what, and what was told with it. Nothing of users or items."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        } | getattr(record, "told", {})
        if record.exc_info and record.exc_info[0] is not None:
            line["error"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode()


def log_as_json() -> None:
    """Every logger of the process writes JSON lines to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
