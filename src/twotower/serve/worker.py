"""One worker of a service: its servers, its signals, its end."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import itertools
import logging
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator

import orjson
import uvicorn
from starlette.types import ASGIApp

from twotower.kinds import import_modules
from twotower.serve.connections import Connection, Connections
from twotower.serve.settings import METRICS_FOLDER, ServeSettings

THREAD_SWITCH_INTERVAL = 0.0005
"""Switch interval of Python threads in seconds: how long loading a bundle may delay an answer."""
MAX_ACCEPTED = 256
"""Most connections accepted at a time between two answers."""
TURNS_TO_READ, TURNS_TO_ACCEPT = 3, 6
"""Turns of the event loop (asyncio, uvloop) in which the requests of open and accepted connections are queued."""
SO_ATTACH_FILTER = 26
"""Option of a Linux socket that the module `socket` does not name: a filter of the packets that it receives."""
SIGNAL_REPEAT_INTERVAL = 0.5
"""Seconds after which another signal counts as a second one: a terminal and systemd signal every process of a group."""

log = logging.getLogger("twotower.process")


def run_worker(settings: ServeSettings, sockets: list[socket.socket]) -> int:
    """Serve in this process until a signal; return the exit code."""
    log_as_json()
    import_modules(settings.kinds)
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
    from twotower.serve.middleware import RequestMiddleware
    from twotower.serve.routes import create_admin_app, create_app
    from twotower.serve.service import Service

    service = Service(settings)
    keys = ApiKeys(settings.keys) if settings.keys else None
    connections = Connections(settings, service.metrics)
    public = create_app(service)
    apps = [RequestMiddleware(public, service, keys)]
    if len(sockets) > 1:
        apps.append(RequestMiddleware(create_admin_app(service), service, keys, admin=True))
    servers = [DrainingServer(app, settings, connections) for app in apps]
    service.admission.accept = lambda: max(server.accept_waiting() for server in servers)
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
    _on_signal(loop, signal.SIGTERM, request_shutdown)
    # A terminal's Ctrl-C reaches every process; with several workers the supervisor passes it on.
    _on_signal(loop, signal.SIGINT, request_shutdown if settings.workers == 1 else lambda: None)
    tasks = [asyncio.create_task(connections.watch())]
    if keys:
        tasks.append(asyncio.create_task(keys.watch(service.metrics.keys_failures.inc)))
    if settings.workers > 1:
        tasks.append(asyncio.create_task(_watch_supervisor(os.getppid(), request_shutdown)))
    # A worker that accepts connections before its bundle is loaded takes requests from workers that could answer them.
    first = asyncio.create_task(service.bundles.refresh())
    await asyncio.sleep(0)  # it loads in a thread
    public.openapi()  # a tenth of a second, which no request waits for
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


def _on_signal(loop: asyncio.AbstractEventLoop, sig: signal.Signals, call: Callable[[], None]) -> None:
    """Call `call` in the loop for each signal, also where the loop has no handlers of signals (Windows)."""
    try:
        loop.add_signal_handler(sig, call)
    except NotImplementedError:
        signal.signal(sig, lambda *_: loop.call_soon_threadsafe(call))


async def _watch_supervisor(parent: int, stop: Callable[[], None]) -> None:
    """Call `stop` when the supervisor has died: a worker must not run without one."""
    while os.getppid() == parent:
        await asyncio.sleep(1)
    log.error("supervisor died, worker stops")
    stop()


class DrainingServer(uvicorn.Server):
    """uvicorn's server, which accepts all queued connections between two answers and before it closes its sockets."""

    def __init__(self, app: ASGIApp, settings: ServeSettings, connections: Connections) -> None:
        class WorkerConnection(Connection):
            all_connections = connections

        config = uvicorn.Config(
            app,
            http=WorkerConnection,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=settings.grace,  # type: ignore[arg-type]
            proxy_headers=bool(settings.trusted_proxies),
            forwarded_allow_ips=settings.trusted_proxies or None,
        )
        super().__init__(config)
        self._connection_class = WorkerConnection
        self._exclusive = settings.workers == 1
        """True if no other process listens on the same sockets."""
        self._listening: list[socket.socket] = []
        self._accepted = set[asyncio.Task[tuple[asyncio.Transport, Connection]]]()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the worker, which drains before it stops."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._listening = [s.dup() for s in sockets or ()]  # the loop closes the others
        for s in self._listening:
            s.setblocking(False)
        await super().startup(sockets)

    def accept_waiting(self, most: int | None = MAX_ACCEPTED) -> int:
        """Accept queued connections; return the turns of the event loop after which all that has arrived is read."""
        loop, before = asyncio.get_running_loop(), len(self._accepted)
        for connection in itertools.islice(itertools.chain.from_iterable(map(accept_queued, self._listening)), most):
            connection.setblocking(False)
            task = loop.create_task(loop.connect_accepted_socket(self._protocol, connection))
            self._accepted.add(task)
            task.add_done_callback(self._accepted.discard)
        return TURNS_TO_ACCEPT if len(self._accepted) > before else TURNS_TO_READ

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept queued connections, whose requests are on the way, before closing: closing would reset them."""
        for server in self.servers:
            server.close()
        for listener in self._listening if self._exclusive else ():
            stop_arrivals(listener)
        self.accept_waiting(most=None)
        while self._listening:
            with self._listening.pop() as s:
                if self._exclusive:  # now, not when the loop closes the socket: more connections could arrive meanwhile
                    with contextlib.suppress(OSError):  # Windows and macOS shut down connections only
                        s.shutdown(socket.SHUT_RD)
        await asyncio.gather(*self._accepted, return_exceptions=True)
        await super().shutdown(sockets)

    def _protocol(self) -> Connection:
        return self._connection_class(
            config=self.config, server_state=self.server_state, app_state={}, _loop=asyncio.get_running_loop()
        )


def stop_arrivals(listener: socket.socket) -> None:
    """Let no more connections into the queue of a socket, where the system can (Linux): their clients try again."""
    if sys.platform == "linux":
        drop_all = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))  # one instruction: return 0 bytes
        listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HP", 1, ctypes.addressof(drop_all)))


def accept_queued(listener: socket.socket) -> Iterator[socket.socket]:
    """Accept and yield the connections in the queue of a non-blocking socket."""
    while True:
        try:
            yield listener.accept()[0]
        except OSError:  # the queue is empty, or no file is left
            return


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, event, and the fields of the record. No ids of users or items."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
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
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    ours = logging.getLogger("twotower")
    ours.handlers.clear()  # the command line's, which prints messages as plain lines and hands none on
    ours.propagate = True
    root.setLevel(logging.INFO)
    # Below errors uvicorn logs every client that sends no valid HTTP.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    # Below warnings FAISS logs which of its libraries this processor does not use.
    logging.getLogger("faiss.loader").setLevel(logging.WARNING)
