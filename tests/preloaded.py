"""Processes that have torch and the package loaded when they start, for tests that need a process and not its imports.

One process of a session, the zygote, imports what is slow and then only forks: a command of its own starts in
milliseconds instead of seconds. A child has its own arguments, environment, folder, standard streams and limits, and
ends as a process of `python` does. What is read while libraries are loaded (`OMP_NUM_THREADS`, `PYTHONPATH`, `-W`) and
peak memory are those of the zygote: tests of these start `sys.executable`.

    done = run("-m", "twotower", "train", config, "--run", folder)
    with start("-c", code, stdout=PIPE) as process: …
"""

from __future__ import annotations

import array
import atexit
import contextlib
import gc
import itertools
import json
import os
import resource
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

PIPE, STDOUT, DEVNULL = subprocess.PIPE, subprocess.STDOUT, subprocess.DEVNULL
IMPORTS = (
    "torch", "torch.distributed", "torch._dynamo", "polars", "numpy", "faiss", "onnx", "twotower.api",
    "twotower.cli.app",
    "twotower.diagnostics", "twotower.legacy.training_script", "twotower.cli.demo", "twotower.serve.supervisor",
    "twotower.serve.routes",
)  # fmt: skip


class Process:
    """A child of the zygote, with the part of `subprocess.Popen` that tests use."""

    def __init__(self, link: socket.socket, pid: int, args: list[str], streams: list[IO[str] | None]) -> None:
        self._link, self.pid, self.args = link, pid, args
        self.stdin, self.stdout, self.stderr = streams
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, or minus the signal that ended it; None while it runs."""
        return self._ended(0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; return the code. Raises subprocess.TimeoutExpired."""
        code = self._ended(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return code

    def _ended(self, timeout: float | None) -> int | None:
        if self.returncode is None:
            self._link.settimeout(timeout)
            try:
                found = self._link.recv(64)
            except (BlockingIOError, TimeoutError):
                return None
            assert found, "the zygote is gone"
            self.returncode = int(found)
            self._link.close()
        return self.returncode

    def send_signal(self, sig: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it ends just now
                os.kill(self.pid, sig)

    def wait_stopped(self, timeout: float = 120, or_ended: bool = False) -> None:
        """Wait until SIGSTOP holds it, or it ends if that will do. Raises AssertionError if it ends where it should
        not."""
        until = time.monotonic() + timeout
        while time.monotonic() < until:
            if self.poll() is not None:
                assert or_ended, f"it ended with {self.returncode}"
                return
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ends just now
                if Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T":
                    return
            time.sleep(0.01)
        raise AssertionError("it was not stopped")

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Read its streams to their ends and wait. Raises subprocess.TimeoutExpired."""
        if self.stdin:
            self.stdin.close()
        until = None if timeout is None else time.monotonic() + timeout
        found: dict[str, bytes] = {"stdout": b"", "stderr": b""}
        with selectors.DefaultSelector() as selector:
            for name in found:
                if (stream := getattr(self, name)) and not stream.closed:
                    selector.register(stream.fileno(), selectors.EVENT_READ, name)
            while selector.get_map():
                left = None if until is None else until - time.monotonic()
                if left is not None and left <= 0:
                    raise subprocess.TimeoutExpired(self.args, timeout or 0)
                for key, _ in selector.select(left):
                    data = os.read(key.fd, 65_536)
                    found[key.data] += data
                    if not data:
                        selector.unregister(key.fd)
        self.wait(None if until is None else max(until - time.monotonic(), 0.01))
        self._close()
        return found["stdout"].decode(errors="replace"), found["stderr"].decode(errors="replace")

    def _close(self) -> None:
        for stream in (self.stdin, self.stdout, self.stderr):
            if stream:
                stream.close()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._close()
        self.wait()


def start(
    *arguments: Any,
    env: Mapping[str, str] | None = None,
    cwd: Path | str | None = None,
    stdin: int | IO[Any] | None = DEVNULL,
    stdout: int | IO[Any] | None = None,
    stderr: int | IO[Any] | None = None,
    start_new_session: bool = False,
    limits: Mapping[int, tuple[int, int]] | None = None,
) -> Process:
    """Start `python ARGUMENTS`, where the arguments begin with `-m MODULE`, `-c CODE` or a script; `limits` are
    resource limits, soft and hard; a hard one of -1 stays."""
    streams: list[IO[str] | None] = [None, None, None]
    handles: list[int] = []
    ours: list[int] = []
    for i, what in enumerate((stdin, stdout, stderr)):
        if what == PIPE:
            read, write = os.pipe()
            theirs, mine = (read, write) if i == 0 else (write, read)
            streams[i] = os.fdopen(mine, "w" if i == 0 else "r", encoding="utf-8", errors="replace")
            handles.append(theirs)
            ours.append(theirs)
        elif what == DEVNULL:
            handles.append(os.open(os.devnull, os.O_RDWR))
            ours.append(handles[-1])
        elif what == STDOUT:
            handles.append(handles[1])
        elif what is None:
            handles.append(i)
        else:
            handles.append(what if isinstance(what, int) else what.fileno())
    words = [str(a) for a in arguments]
    request = {
        "arguments": words,
        "env": dict(os.environ if env is None else env),
        "cwd": str(cwd or Path.cwd()),
        "session": start_new_session,
        "limits": list((limits or {}).items()),
    }
    link = _connect()
    data = json.dumps(request).encode()
    link.sendmsg([len(data).to_bytes(4, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", handles))])
    link.sendall(data)
    for handle in ours:
        os.close(handle)
    pid = int(link.recv(64))
    return Process(link, pid, words, streams)


def load(*modules: str) -> None:
    """Import modules into the zygote, so that the children from here on have them."""
    with _connect() as link:
        data = json.dumps({"modules": modules}).encode()
        link.sendall(len(data).to_bytes(4, "big") + data)
        assert link.recv(64) == b"0"


def run(
    *arguments: Any,
    env: Mapping[str, str] | None = None,
    cwd: Path | str | None = None,
    timeout: float = 120,
    check: bool = False,
    limits: Mapping[int, tuple[int, int]] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` to its end, its output captured. Raises subprocess.TimeoutExpired after killing it."""
    process = start(*arguments, env=env, cwd=cwd, stdout=PIPE, stderr=PIPE, limits=limits)
    try:
        out, err = process.communicate(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise
    assert process.returncode is not None
    if check and process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args, out, err)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def start_in(file: str, code: str) -> Process:
    """Start code that knows the names of a test's file, in a process without threads."""
    load("hypothesis", "pytest")
    here = Path(file)
    folders = [str(here.parent), str(Path(__file__).parent)]
    imports = f"import sys; sys.path[:0] = {folders}; from {here.stem} import *"
    return start("-c", f"{imports}\n{code}", stdin=PIPE, stdout=PIPE)


def number_told(file: str, code: str, timeout: float = 120) -> int:
    """The number that such code prints."""
    process = start_in(file, code)
    try:
        out, _ = process.communicate(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise
    assert process.returncode == 0
    return int(out)


def start_ranks(n: int, *arguments: Any, env: Mapping[str, str] | None = None, **more: Any) -> list[Process]:
    """Start `n` ranks of one job on this machine, with the environment that torchrun gives them."""
    port = _free_port()
    common = dict(os.environ if env is None else env) | {
        "WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    return [
        start(*arguments, env=common | {"RANK": str(i), "LOCAL_RANK": str(i)}, stdout=PIPE, stderr=STDOUT, **more)
        for i in range(n)
    ]


_ports = itertools.count(os.getpid() * 97)


def _free_port() -> int:
    """Return a port that nothing listens on, below those that the kernel gives to clients meanwhile."""
    while True:
        port = 20_000 + next(_ports) % 12_000
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def run_ranks(
    n: int, *arguments: Any, env: Mapping[str, str] | None = None, timeout: float = 300
) -> tuple[list[int], list[str]]:
    """Run a job of `n` ranks; return their codes and outputs. When a rank fails the others are
    ended a second later, as torchrun does."""
    ranks = start_ranks(n, *arguments, env=env)
    outputs = [b""] * n
    until, failed = time.monotonic() + timeout, None
    with selectors.DefaultSelector() as selector:
        for i, rank in enumerate(ranks):
            assert rank.stdout is not None
            selector.register(rank.stdout.fileno(), selectors.EVENT_READ, i)
        while selector.get_map():
            now = time.monotonic()
            if failed is None and any(rank.poll() for rank in ranks):
                failed = now
            for seconds, sig in ((1, signal.SIGTERM), (30, signal.SIGKILL)):
                if now > min(until, (failed or now) + seconds):
                    for rank in ranks:
                        rank.send_signal(sig)
            for key, _ in selector.select(0.1):
                data = os.read(key.fd, 65_536)
                outputs[key.data] += data
                if not data:
                    selector.unregister(key.fd)
    codes = [rank.wait(30) for rank in ranks]
    for rank in ranks:
        rank._close()
    return codes, [o.decode(errors="replace") for o in outputs]


NAME_VARIABLE = "TWOTOWER_TESTS_ZYGOTE"
"""The zygote of a session of several pytest processes: its abstract socket."""
_zygote: list[subprocess.Popen[bytes]] = []


def start_zygote() -> None:
    """Start the zygote for this process and those that it starts. It ends with this process."""
    name = f"twotower-tests-{os.getpid()}"  # abstract: nothing is left on the disk
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    _zygote.append(subprocess.Popen([sys.executable, __file__, name], stdin=subprocess.PIPE, env=environment))
    os.environ[NAME_VARIABLE] = name
    atexit.register(_stop)


def _connect() -> socket.socket:
    """Connect to the zygote, which is started if no process did."""
    if NAME_VARIABLE not in os.environ:
        start_zygote()
    link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    until = time.monotonic() + 120
    while True:
        try:
            link.connect("\0" + os.environ[NAME_VARIABLE])
            return link
        except ConnectionRefusedError:  # it imports
            assert time.monotonic() < until, "the zygote did not start"
            assert not any(process.poll() for process in _zygote), "the zygote ended"
            time.sleep(0.02)


def _stop() -> None:
    for process in _zygote:
        assert process.stdin is not None
        process.stdin.close()  # which ends it
        process.wait()
    _zygote.clear()


# ---- the zygote


def _serve(name: str) -> dict[str, Any] | None:
    """Fork a child for each request. Return the request in a child, None in the zygote when its input closes."""
    import importlib

    for module in IMPORTS:
        importlib.import_module(module)
    _use_once()
    os.fsync = lambda fd: None  # as in the tests' own processes
    gc.freeze()  # what is loaded is not looked at again
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind("\0" + name)
    listener.listen(64)
    wake, woken = os.pipe()
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(woken)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    children: dict[int, socket.socket] = {}
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        selector.register(wake, selectors.EVENT_READ)
        selector.register(0, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fd == wake:
                    os.read(wake, 4096)
                elif key.fd == 0:
                    return None
                else:
                    link = listener.accept()[0]
                    request, handles = _receive(link)
                    if "modules" in request:
                        for module in request["modules"]:
                            importlib.import_module(module)
                        link.sendall(b"0")
                        link.close()
                        continue
                    pid = os.fork()
                    if not pid:
                        signal.set_wakeup_fd(-1)
                        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                        for open_ in (listener, link, *children.values()):
                            open_.close()
                        for handle in (wake, woken):
                            os.close(handle)
                        return request | {"handles": handles}
                    for handle in handles:
                        os.close(handle)
                    children[pid] = link
                    link.sendall(str(pid).encode())
            _reap(children)


def _use_once() -> None:
    """Use what loads the rest of itself when it is first used: the command line."""
    from twotower.cli.app import app
    from twotower.cli.flags import command_of

    command_of(app)


def _reap(children: dict[int, socket.socket]) -> None:
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        link = children.pop(pid)
        with contextlib.suppress(OSError):  # nobody waits for it
            link.sendall(str(os.waitstatus_to_exitcode(status)).encode())
        link.close()


def _receive(link: socket.socket) -> tuple[dict[str, Any], list[int]]:
    size, handles, _, _ = socket.recv_fds(link, 4, 3)
    left, data = int.from_bytes(size, "big"), b""
    while len(data) < left:
        data += link.recv(left - len(data))
    return json.loads(data), handles


def _become(request: dict[str, Any]) -> None:
    """Run the command of a request in this process."""
    if request["session"]:
        os.setsid()
    handles: Iterable[int] = request["handles"]
    for i, handle in enumerate(handles):
        os.dup2(handle, i)
    for handle in set(handles):
        if handle > 2:
            os.close(handle)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    for kind, (soft, hard) in request["limits"]:
        resource.setrlimit(kind, (soft, resource.getrlimit(kind)[1] if hard < 0 else hard))
    streams: Any = (
        open(i, mode, encoding="utf-8", errors=errors, buffering=buffering, closefd=False)  # noqa: SIM115
        for i, mode, errors, buffering in (
            (0, "r", "strict", -1),
            (1, "w", "strict", -1),
            (2, "w", "backslashreplace", 1),
        )
    )
    for name, stream in zip(("stdin", "stdout", "stderr"), streams, strict=True):
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    sys.path[0] = request["cwd"]  # the folder of this file, where a child has its own
    kind, *rest = request["arguments"]
    if kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
    elif kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [kind, *rest]
        sys.path[0] = str(Path(kind).resolve().parent)
        runpy.run_path(kind, run_name="__main__")


def _code(request: dict[str, Any]) -> int:
    """Run a request and what Python does at its end but taking its modules apart, which is slow; return the exit
    code."""
    code = 0
    try:
        _become(request)
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    return code


if __name__ == "__main__":
    found = _serve(sys.argv[1])
    if found is not None:
        os._exit(_code(found))
