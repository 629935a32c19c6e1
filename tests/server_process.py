"""`twotower serve` in a process of its own, for tests over HTTP, and the reading of replies."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import preloaded

Start = Callable[..., "Served"]


@contextlib.contextmanager
def serving(store: Path) -> Iterator[Start]:
    """Yield a function that starts services; they are stopped at the end."""
    started: list[Served] = []

    def start(*flags: str, store: Path = store, **more: Any) -> Served:
        started.append(Served(store, *flags, **more))
        return started[-1]

    yield start
    for one in started:
        if not one.log.closed:
            one.end()


class Served:
    """`twotower serve` in a process of its own."""

    def __init__(
        self,
        store: Path,
        *flags: str,
        group: bool = False,
        code: str = "",
        limits: dict[int, tuple[int, int]] | None = None,
        preload: bool = True,
    ) -> None:
        """Start the service, and wait until it listens.

        `group`: it leads a process group. `code` runs in place of the command line. `limits` are its resource limits.
        Without `preload` the interpreter starts anew, for tests of what it imports."""
        what = ["-c", code] if code else ["-m", "twotower"]
        # A pipe that nobody reads would stop the service.
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        arguments = [*what, "serve", "--store", str(store), "--port", "0", *flags]
        self.process: preloaded.Process | subprocess.Popen[str]
        if preload:
            self.process = preloaded.start(
                *arguments, stdout=preloaded.PIPE, stderr=self.log, start_new_session=group, limits=limits
            )
        else:
            self.process = subprocess.Popen(
                [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=self.log, text=True
            )
        assert self.process.stdout is not None
        self.said = self.process.stdout.readline()
        found = re.search(r"on (http://\S+)", self.said)
        if found is None:
            raise AssertionError(self.said + self.end()[1])
        self.url = found[1]
        self.port = int(self.url.rpartition(":")[2])

    def wait(self, seconds: float = 120) -> Served:
        """Wait until it is ready."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            try:
                if httpx.get(self.url + "/readyz", timeout=5).status_code == 200:
                    return self
            except httpx.HTTPError:
                pass
            time.sleep(0.05)
        raise AssertionError("not ready: " + self.end()[1])

    def connect(self, whence: str = "127.0.0.1") -> socket.socket:
        # Longer than the server waits for a head that does not end.
        return socket.create_connection(("127.0.0.1", self.port), timeout=30, source_address=(whence, 0))

    def resident(self) -> int:
        """Return its resident memory in bytes."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * 4096

    def workers(self) -> list[int]:
        """Return the ids of its worker processes."""
        found = []
        for path in Path("/proc").glob("[0-9]*/status"):
            try:
                text, line = path.read_text(), (path.parent / "cmdline").read_bytes()
            except OSError:
                continue
            if f"PPid:\t{self.process.pid}\n" in text and b"spawn_main" in line:
                found.append(int(path.parent.name))
        return found

    def end(self, sig: int = signal.SIGTERM) -> tuple[int, str]:
        """Send a signal, wait for the end, and return the exit code and the log."""
        if self.process.poll() is None:
            self.process.send_signal(sig)
        try:
            self.process.wait(timeout=120)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        with self.log as log:
            log.seek(0)
            return self.process.wait(), log.read()


def wait_until(condition: Callable[[], object], seconds: float = 120.0) -> None:
    """Wait until a condition holds. Fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition does not come true"
        time.sleep(0.02)
