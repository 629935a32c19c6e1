"""Sockets, processes, signals and the log of a service.

A single worker is this process. Several workers are processes on the same sockets, spawned (never forked: threads of FAISS
and onnxruntime do not survive a fork) and supervised by this one.
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
"""Switch interval of Python threads in seconds: how long loading a bundle may delay an answer."""
SIGNAL_REPEAT_INTERVAL = 0.5
"""Seconds after which another signal counts as a second one: a terminal and systemd signal every process of a group."""
SHORT_LIFE_SECONDS, MAX_SHORT_LIVES = 5.0, 5
"""The service gives up when every worker has died within SHORT_LIFE_SECONDS of its start MAX_SHORT_LIVES times in a row."""
MAX_RESTART_DELAY = 10.0
"""Longest pause in seconds before a worker that keeps dying is restarted."""

log = logging.getLogger("twotower.process")


def run_service(settings: ServeSettings) -> int:
    """Serve until SIGTERM or SIGINT, and return the exit code. Raises ConfigError, BundleError before a socket listens."""
    from twotower.serve.api_keys import read_keys
    from twotower.store.store import Store

    Store(settings.store)
    if settings.keys is not None:
        keys = read_keys(settings.keys)
        if settings.admin_port is not None and not any(key.admin for key in keys):
            raise ConfigError(
                f"`admin_port`: no key in {settings.keys} has scope admin; `make_key(name, admin=True)` makes one"
            )
    connections, each = connection_limits(settings.max_connections, settings.max_per_address)
    settings = replace(settings, max_connections=connections, max_per_address=each)
    sockets = [listen(settings.host, settings.port)]
    if settings.admin_port is not None:
        sockets.append(listen(settings.host, settings.admin_port))
    with contextlib.ExitStack() as open_sockets:
        for s in sockets:
            open_sockets.callback(s.close)
        for sig in (signal.SIGTERM, signal.SIGINT):
            signal.signal(sig, lambda *_: sys.exit(0))  # until workers handle signals
        url = socket_url(sockets[0])
        console = f"  (console: {url}/)" if settings.console else ""
        admin = f"  (admin: {socket_url(sockets[1])})" if len(sockets) > 1 else ""
        log.info(f"serving {settings.store} on {url}{console}{admin}")
        if settings.workers == 1:
            return run_worker(settings, sockets)
        log_as_json()
        return supervise_workers(settings, sockets)


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises ConfigError if the address is in use or not of this machine."""
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with contextlib.ExitStack() as on_failure:
            s = on_failure.enter_context(socket.socket(family, kind, protocol))
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


# ---- one worker


def run_worker(settings: ServeSettings, sockets: list[socket.socket]) -> int:
    """Serve in this process until a signal; return the exit code."""
    log_as_json()
    if settings.workers == 1:
        os.environ.pop(METRICS_FOLDER, None)  # one process needs no files to sum its metrics
    sys.setswitchinterval(THREAD_SWITCH_INTERVAL)
    loop = uvicorn.Config("", loop="auto", log_config=None).get_loop_factory()
    with asyncio.Runner(loop_factory=loop) as runner:
        if runner.run(_serve(settings, sockets)):  # Python would wait for a thread that hangs in a read
            logging.shutdown()
            sys.stdout.flush()
            os._exit(0)
    return 0


async def _serve(settings: ServeSettings, sockets: list[socket.socket]) -> bool:
    """Serve until a signal; return True if a thread is still reading the store or the key file."""
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
        server.exclusive = settings.workers == 1
    shutdown: list[tuple[float, asyncio.Task[None]]] = []

    async def drain_and_stop() -> None:
        service.drain()
        log.info("draining", extra={"fields": {"seconds": settings.drain}})
        await asyncio.sleep(settings.drain)
        for server in servers:
            server.should_exit = True

    def request_shutdown() -> None:
        now = time.monotonic()
        if not shutdown:
            shutdown.append((now, asyncio.create_task(drain_and_stop())))
        elif now - shutdown[0][0] > SIGNAL_REPEAT_INTERVAL:  # a second signal: stop at once
            for server in servers:
                server.should_exit = server.force_exit = True

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, request_shutdown)
    # A terminal's Ctrl-C reaches every process; with several workers the supervisor passes it on.
    loop.add_signal_handler(signal.SIGINT, request_shutdown if settings.workers == 1 else lambda: None)
    tasks = [asyncio.create_task(connections.watch())]
    if keys:
        tasks.append(asyncio.create_task(keys.watch(service.metrics.keys_failures.inc)))
    if settings.workers > 1:
        tasks.append(asyncio.create_task(_watch_supervisor(os.getppid(), request_shutdown)))
    # A worker that accepts connections before its bundle is loaded takes requests from workers that could answer them.
    first = asyncio.create_task(service.bundles.refresh())
    while not first.done() and not shutdown:
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
    """Call `stop` when the supervisor has died: a worker must not run without one."""
    while os.getppid() == parent:
        await asyncio.sleep(1)
    log.error("supervisor died, worker stops")
    stop()


class _Server(uvicorn.Server):
    """uvicorn's server, which accepts the connections that are still queued before it closes its sockets."""

    exclusive = True
    """True if no other process listens on the same sockets."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the worker, which drains before it stops."""
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept queued connections, whose requests are on the way, before closing: closing would reset them."""
        loop = asyncio.get_running_loop()
        listening = [s.dup() for s in sockets or ()]
        for server in self.servers:
            server.close()
        for s in listening:
            s.setblocking(False)
            with s:
                queued = list(_accept_queued(s))
                if self.exclusive:  # now, not when the loop closes the socket: more connections could arrive meanwhile
                    s.shutdown(socket.SHUT_RD)
            for connection in queued:
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
    """Accept and yield the connections in the queue of a non-blocking socket."""
    while True:
        try:
            yield listener.accept()[0]
        except BlockingIOError:
            return


def _uvicorn_config(app: Any, s: ServeSettings, connections: Connections) -> uvicorn.Config:
    class WorkerProtocol(HttpProtocol):
        all_connections, max_body = connections, s.max_body

    return uvicorn.Config(
        app,
        http=WorkerProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=s.grace,  # type: ignore[arg-type]
        proxy_headers=bool(s.trusted_proxies),
        forwarded_allow_ips=s.trusted_proxies or None,
    )


# ---- several workers


@dataclass
class _WorkerSlot:
    """One of several workers: its process, and the history of its restarts."""

    process: Any = None
    started: float = 0.0
    """Time of the last start, in seconds of the monotonic clock."""
    short_lives: int = 0
    """Number of processes in a row that died within SHORT_LIFE_SECONDS."""
    restart_at: float = 0.0
    """Earliest time of the next start, in seconds of the monotonic clock."""

    def ensure_running(self, start: Callable[[], Any]) -> None:
        """Start a process if none is alive."""
        now = time.monotonic()
        if self.process is not None and not self.process.is_alive():
            log.error("worker died", extra={"fields": {"pid": self.process.pid, "code": self.process.exitcode}})
            self.process.join()
            self.process = None
            self.short_lives = self.short_lives + 1 if now - self.started < SHORT_LIFE_SECONDS else 0
            self.restart_at = now + (min(MAX_RESTART_DELAY, 0.1 * 2.0**self.short_lives) if self.short_lives else 0.0)
        if self.process is None and now >= self.restart_at:
            self.process, self.started = start(), now


def supervise_workers(
    settings: ServeSettings,
    sockets: list[socket.socket],
    get_context: Callable[[str], Any] = multiprocessing.get_context,
) -> int:
    """Keep `settings.workers` processes alive until a signal; return the exit code. The caller has set up the log."""
    folder = tempfile.mkdtemp(prefix="twotower-metrics-")
    os.environ[METRICS_FOLDER] = folder
    context = get_context("spawn")
    signals: list[int] = []
    wake, woken = socket.socketpair()
    woken.setblocking(False)
    for sig in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sig, lambda sig, frame: signals.append(sig))
    signal.set_wakeup_fd(woken.fileno(), warn_on_full_buffer=False)
    slots = [_WorkerSlot() for _ in range(settings.workers)]

    def start() -> Any:
        worker = context.Process(target=_worker_main, args=(settings, sockets), name="twotower-worker")
        worker.start()
        return worker

    try:
        while not signals:
            for slot in slots:
                if not signals:
                    slot.ensure_running(start)
            if min(slot.short_lives for slot in slots) >= MAX_SHORT_LIVES:
                log.error("workers die right after their start, giving up")
                return 1
            wait([wake, *(slot.process.sentinel for slot in slots if slot.process is not None)], timeout=0.5)
        return 0
    finally:
        signal.set_wakeup_fd(-1)
        for s in sockets:
            s.close()  # workers hold their own; the last one to close it ends the queue
        _stop_workers([slot.process for slot in slots if slot.process is not None], settings, signals)
        wake.close()
        woken.close()
        shutil.rmtree(folder, ignore_errors=True)


def _stop_workers(workers: list[Any], settings: ServeSettings, signals: list[int]) -> None:
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


# ---- the log


class _JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, event, and the fields of the record. No ids of users or items."""

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
    """Make every logger of the process write JSON lines to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    ours = logging.getLogger("twotower")
    ours.handlers.clear()  # the command line's, which prints messages as plain lines and hands none on
    ours.propagate = True
    root.setLevel(logging.INFO)
    # Below errors uvicorn logs every client that sends no valid HTTP.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
