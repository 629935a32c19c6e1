"""A wire to a port that can be made slow, for tests. Run as a script it is one on a host of its own:
python wire.py ADDRESS TARGET:PORT. Lines DELAY BYTES_PER_SECOND of its standard input change it; it ends with it."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time

PIECE = 8192
"""Bytes that are passed on at a time."""


class Wire:
    """Passes every byte on to a port, each piece `delay` seconds later, and at most `rate` bytes a second in each
    direction, all connections together; 0: as fast as it can. What it holds is let go in `close`."""

    def __init__(
        self, port: int, target: str = "127.0.0.1", address: str = "127.0.0.1", delay: float = 0.0, rate: float = 0.0
    ) -> None:
        self.delay, self.rate = delay, rate
        self._to, self._address, self._open = (target, port), address, True
        self._ends: list[socket.socket] = []
        self._listener = socket.create_server((address, 0))
        self.port = int(self._listener.getsockname()[1])
        self.passed = 0
        """Bytes that were passed on."""
        self._turns = threading.Lock(), threading.Lock()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    @property
    def uri(self) -> str:
        return f"http://{self._address}:{self.port}"

    def _accept(self) -> None:
        while self._open:
            with contextlib.suppress(OSError):
                near = self._listener.accept()[0]
                try:
                    far = socket.create_connection(self._to, timeout=30)
                except OSError:
                    near.close()
                    continue
                self._ends += [near, far]
                for source, sink, turn in ((near, far, self._turns[0]), (far, near, self._turns[1])):
                    thread = threading.Thread(target=self._pass, args=(source, sink, turn), daemon=True)
                    self._threads.append(thread)
                    thread.start()

    def _pass(self, source: socket.socket, sink: socket.socket, turn: threading.Lock) -> None:
        with contextlib.suppress(OSError):
            for end in (source, sink):  # a sender must not take a full buffer for a fast wire
                end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, PIECE)
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, PIECE)
            while data := source.recv(PIECE):
                if self.delay:
                    time.sleep(self.delay)
                if self.rate:
                    with turn:
                        time.sleep(len(data) / self.rate)
                sink.sendall(data)
                self.passed += len(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._open = False
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(timeout=5)
        for end in self._ends:
            end.close()


if __name__ == "__main__":
    target, _, port = sys.argv[2].rpartition(":")
    wire = Wire(int(port), target, sys.argv[1])
    print(wire.uri, flush=True)
    for line in sys.stdin:
        wire.delay, wire.rate = map(float, line.split())
        print(f"now {line}", end="", flush=True)
