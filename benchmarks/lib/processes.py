"""Processes of the measurements: commands with their time and memory, conversations with a worker, and the service."""

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, Self

ROOT = Path(__file__).parents[2]
PYTHON = (sys.executable, "-m")
COMPILED = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
"""Environment in which the first run leaves the bytecode of all modules, as an installation does."""
TWOTOWER = (*PYTHON, "twotower")
TORCHRUN = (*PYTHON, "torch.distributed.run", "--standalone", "--nproc-per-node")
Words = Sequence[str | int | float | Path]
Environment = Mapping[str, str] | None


class Ran(NamedTuple):
    """Seconds of a command, the peaks of private and of resident memory of its processes in MB, and its output."""

    seconds: float
    memory: float
    peak: float
    said: str


def run(words: Words, log: IO[str] | None = None, environment: Environment = None) -> Ran:
    """Run a command in the repository; its output goes to `log`, if given. Raises ChildProcessError if it fails."""
    command, started = [str(word) for word in words], time.perf_counter()
    with log or tempfile.TemporaryFile("w+") as out:
        given: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, **given)
        with Watch(process.pid) as watch:
            _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - started
        out.seek(0)
        said = "" if log else out.read()
    if process.returncode:
        raise ChildProcessError(f"{' '.join(command)} ended with {process.returncode}:\n{said[-3000:]}")
    return Ran(seconds, watch.most, used.ru_maxrss * 1024 / 1e6, said)


def code(function: Callable[..., Any], *arguments: Any) -> str:
    """Return a program that calls a function of a module and prints the JSON of its result."""
    spec = sys.modules[function.__module__].__spec__
    module = spec.name if spec else function.__module__
    return f"import json; from {module} import {function.__name__} as f; print(json.dumps(f(*{arguments!r})))"


def call(function: Callable[..., Any], *arguments: Any, environment: Environment = None) -> tuple[Ran, Any]:
    """Run a function of a module in a new process. Returns what it cost and the JSON of its result."""
    ran = run([sys.executable, "-c", code(function, *arguments)], environment=environment)
    return ran, json.loads(ran.said.splitlines()[-1])


class Watch(threading.Thread):
    """Samples the private memory of a process and its children within a block; `most` is the peak in MB."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.most, self.over = pid, 0.0, threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.1):
            self.most = max(self.most, memory(self.pid, "RssAnon"))

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.join()


def family(pid: int) -> Iterator[int]:
    """Yield a process and all its descendants."""
    yield pid
    with suppress(OSError):
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in children.read_text().split():
                yield from family(int(child))


def memory(pid: int, label: str) -> float:
    """Return the MB of a process and its descendants: resident memory ("VmRSS") or private memory ("RssAnon")."""
    found = 0
    for member in family(pid):
        with suppress(OSError):
            found += sum(map(int, re.findall(rf"{label}:\s+(\d+)", Path(f"/proc/{member}/status").read_text())))
    return found / 1024


CPUCLOCK_SCHED = 2
"""Clock of a process's own time in Linux, in the lowest bits of a clock's id, of which a process id is the others: it
counts each nanosecond, and `/proc/PID/stat` samples of 10 ms."""


def usage(pid: int) -> dict[str, float]:
    """Return resident MB, CPU seconds and numbers of open files and mapped files of bundles of a process and its
    descendants."""
    out = {"rss_mb": memory(pid, "VmRSS"), "cpu_s": 0.0, "files": 0.0, "mapped": 0.0}
    for member in family(pid):
        with suppress(OSError):
            folder = Path(f"/proc/{member}")
            out["cpu_s"] += time.clock_gettime(~member << 3 | CPUCLOCK_SCHED)
            out["mapped"] += len(set(re.findall(r"\S*/bundles/.*", (folder / "maps").read_text())))
            for handle in (folder / "fd").iterdir():
                with suppress(OSError):
                    out["files"] += not handle.readlink().name.startswith("socket:")
    return out


def busy(cores: set[int]) -> float:
    """Return the busy seconds of the cores since the machine started, stolen time included."""
    lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
    own = [fields[1:9] for fields in lines if fields[0] in {f"cpu{core}" for core in cores}]
    return sum(sum(map(int, of)) - int(of[3]) - int(of[4]) for of in own) / os.sysconf("SC_CLK_TCK")  # without idle


class Conversation:
    """A function of a module in a new process, which answers each line with a line of JSON, within a block."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, environment: Environment = None) -> None:
        given: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        command = [sys.executable, "-c", code(function, *arguments)]
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, **given)

    def hear(self) -> Any:
        """Return its next line; None at its end."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return json.loads(line) if line else None

    def is_speaking(self) -> bool:
        """Return True if its next line, or its end, can be heard at once."""
        assert self.process.stdout is not None
        return bool(select.select([self.process.stdout], [], [], 0)[0])

    def ask(self, line: str) -> Any:
        """Send a line and return the answer; None at its end."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        return self.hear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@dataclass
class Server:
    """A ready service."""

    pid: int
    port: int
    seconds: float  # from its start to ready

    def get(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        ask = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(ask, timeout=60) as reply:
            return json.loads(reply.read() or b"null")


def ready(port: int) -> bool:
    """Return True if a service answers that it is ready."""
    with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=2) as reply:
        return bool(reply.status == 200)
    return False


@contextmanager
def started(
    words: Words, is_ready: Callable[[], bool], environment: Environment = None, cores: set[int] | None = None
) -> Iterator[tuple[int, float, Path]]:
    """Run a program within the block, on its cores. Yields its id, the seconds until it was ready, and its log. Exits
    with the log if it does not start."""
    with tempfile.NamedTemporaryFile(suffix=".log") as log:
        begun, path = time.perf_counter(), Path(log.name)
        # The child begins where its parent runs: it has its cores before it has threads.
        allowed = os.sched_getaffinity(0)
        os.sched_setaffinity(0, cores or allowed)
        command = [str(word) for word in words]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        os.sched_setaffinity(0, allowed)
        try:
            while not is_ready():
                if process.poll() is not None or time.perf_counter() > begun + 600:
                    sys.exit(f"error: `{' '.join(command)}` is not ready:\n{path.read_text(errors='replace')[-2000:]}")
                time.sleep(0.005)
            yield process.pid, time.perf_counter() - begun, path
            if process.poll() is not None:
                print(f"!! {command[0]} ended unexpectedly, status {process.returncode}")
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                print("!! it did not end within 30 s of SIGTERM; killed")
                for pid in reversed([*family(process.pid)]):
                    os.kill(pid, signal.SIGKILL)
                process.wait()


@contextmanager
def serving(
    store: Path, flags: Words = (), environment: Environment = None, cores: set[int] | None = None
) -> Iterator[Server]:
    """Run `twotower serve` within the block, and tell of errors in its log."""
    port = free_port()
    words = [*TWOTOWER, "serve", "--store", store, "--port", port, *flags]
    with started(words, lambda: ready(port), environment, cores) as (pid, seconds, log):
        yield Server(pid, port, seconds)
        told = log.read_text(errors="replace").splitlines()
        if errors := [line for line in told if '"level":"error"' in line.replace(" ", "")]:
            print(f"!! the server logged {len(errors):,} errors, the first: {errors[0][:500]}")
