"""Listening sockets: made, named, emptied."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

from twotower.errors import ConfigError


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


def accept_queued(listener: socket.socket) -> Iterator[socket.socket]:
    """Accept and yield the connections in the queue of a non-blocking socket."""
    while True:
        try:
            yield listener.accept()[0]
        except BlockingIOError:
            return
