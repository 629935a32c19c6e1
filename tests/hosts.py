"""Hosts of tests: namespaces of the kernel on a switch of their own, as machines that share a network and nothing else.

A host has a network, a host name, processes, and the folders /tmp and /dev/shm of its own; it sees all other files, and
cannot write them. Its processes end, and its links go, with its first process, which ends with the test that made it:
nothing is left, even after a kill. Run as a script this says whether hosts can be made here: exit code 1 and one line
if not.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

Value = TypeVar("Value")
ROOT = Path(__file__).resolve().parent.parent
HOME = Path("/tmp/home")
"""Folder of a host in which its programs start."""
CLONE_NEWNET = 0x40000000


class NoHostsError(Exception):
    """This machine or this user cannot make hosts."""


def children(pid: int) -> list[int]:
    """Return the children of a process; none of one that has ended."""
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def state(pid: int) -> str:
    """Return the state of a process as /proc has it, such as "T" of a stopped one; "" of one that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


class Command:
    """A program that runs on a host."""

    def __init__(self, words: Sequence[str], environment: Mapping[str, str]) -> None:
        self.words = list(words)
        # A pipe that nobody reads would stop the program.
        self._log = tempfile.TemporaryFile("w+b")  # noqa: SIM115
        self._process = subprocess.Popen(
            self.words, stdin=subprocess.PIPE, stdout=self._log, stderr=subprocess.STDOUT, env=environment
        )

    @property
    def said(self) -> str:
        """What it has written until now."""
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), size, 0).decode(errors="replace")

    def poll(self) -> int | None:
        """Return its exit code, or None while it runs."""
        if state(self._process.pid) == "T" and not any(state(pid) == "T" for pid in children(self._process.pid)):
            self._process.send_signal(signal.SIGCONT)  # what has entered the host stops with the program, and stays so
        return self._process.poll()

    def wait(self, seconds: float = 300) -> int:
        """Return its exit code. Fails, with what it has said, if it does not end."""
        deadline = time.monotonic() + seconds
        while (code := self.poll()) is None:
            assert time.monotonic() < deadline, f"it does not end: {self.words}\n{self.said[-6000:]}"
            time.sleep(0.05)
        return code

    def until(self, pattern: str, seconds: float = 300) -> re.Match[str]:
        """Wait until its output has a pattern. Fails if it ends before."""
        deadline = time.monotonic() + seconds
        while True:
            ended = self.poll()
            if found := re.search(pattern, self.said):
                return found
            assert ended is None, f"it ended with {ended}\n{self.said[-6000:]}"
            assert time.monotonic() < deadline, f"{pattern} does not come\n{self.said[-6000:]}"
            time.sleep(0.05)

    def tell(self, line: str) -> None:
        """Write a line to its standard input."""
        assert self._process.stdin
        self._process.stdin.write(f"{line}\n".encode())
        self._process.stdin.flush()

    def send_signal(self, sig: int) -> None:
        """Send a signal to the program, which is the child of the one that entered the host."""
        for child in children(self._process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, sig)

    def close(self) -> None:
        """End it, whatever it does, and its output."""
        self.send_signal(signal.SIGKILL)
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.kill()
        self._process.wait()
        self._log.close()


class Namespaces:
    """Namespaces that a process holds; they go with it."""

    def __init__(self, name: str, lines: Sequence[str]) -> None:
        """Make them, and run the `lines` of a shell in them. Raises NoHostsError."""
        script = "\n".join(["set -e", f"hostname {name}", "ip link set lo up", *lines, "echo ready", "exec cat"])
        self.name = name
        try:
            self._holder = subprocess.Popen(
                ["unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc",
                 "sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
        except FileNotFoundError as e:
            raise NoHostsError(f"{e.filename} is not installed") from None
        assert self._holder.stdout
        assert self._holder.stderr
        if self._holder.stdout.readline() != "ready\n":
            said = self._holder.stderr.read().strip().splitlines() or ["no reason given"]
            self.close()
            raise NoHostsError(said[0])

    @property
    def pid(self) -> int:
        """A process that is in all of them but the one of the processes."""
        return self._holder.pid

    def entered(self, *words: str) -> list[str]:
        """Return the command that runs `words` in the namespaces."""
        return ["nsenter", "--target", str(self.pid), "--net", "--mount", "--uts", "--ipc",
                f"--pid=/proc/{self.pid}/ns/pid_for_children", *words]  # fmt: skip

    def ip(self, *words: str) -> None:
        """Change the network by iproute2, which knows the processes of this machine. Raises NoHostsError if that
        fails."""
        done = subprocess.run(
            ["nsenter", "--target", str(self.pid), "--net", "ip", *words], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise NoHostsError(f"ip {shlex.join(words)}: {done.stderr.strip()}")

    def close(self) -> None:
        """End the processes in them, and them."""
        self._holder.kill()  # which kills the first process inside, and the kernel the others
        self._holder.wait()
        for stream in (self._holder.stdin, self._holder.stdout, self._holder.stderr):
            assert stream
            with contextlib.suppress(BrokenPipeError):
                stream.close()


class Host(Namespaces):
    """One host of a network. `address` is that of its only interface."""

    def __init__(self, name: str, address: str, switch: Namespaces, names: Mapping[str, str]) -> None:
        """`names` are the addresses of all hosts by name, which a host knows as of its /etc/hosts."""
        self.address, self._switch = address, switch
        self._port = f"port{address.rpartition('.')[2]}"
        self._commands: list[Command] = []
        known = "".join(rf"{at} {other}\n" for other, at in {"localhost": "127.0.0.1", **names}.items())
        super().__init__(
            name, [*_own_folders(), f"printf '{known}' > /tmp/names", "mount --bind /tmp/names /etc/hosts"]
        )
        try:
            switch.ip("link", "add", self._port, "type", "veth", "peer", "name", "eth0", "netns", str(self.pid))
            switch.ip("link", "set", self._port, "master", "switch", "up")
            self.ip("address", "add", f"{address}/24", "dev", "eth0")
            self.ip("link", "set", "eth0", "up")
        except NoHostsError:
            self.close()
            raise

    def folder(self, path: str | Path) -> Path:
        """Return the path by which this process reads and writes an absolute path of the host."""
        return Path(f"/proc/{self.pid}/root{path}")

    def give(self, source: Path, target: str | Path) -> None:
        """Copy a file or folder of this process to an absolute path of the host."""
        to = self.folder(target)
        to.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, to)
        else:
            shutil.copy(source, to)

    def start(self, *words: Any, env: Mapping[str, str] | None = None) -> Command:
        """Start a program in the folder HOME; "python" is that of the tests."""
        program = [sys.executable if word == "python" else str(word) for word in words]
        kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LANG") if name in os.environ}
        environment = (
            kept
            | {"HOME": str(HOME), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore"}
            | dict(env or {})
        )
        command = Command(self.entered("env", "-C", str(HOME), *program), environment)
        self._commands.append(command)
        return command

    def twotower(self, *words: Any, env: Mapping[str, str] | None = None) -> Command:
        """Start the command line."""
        return self.start("python", "-m", "twotower", *words, env=env)

    def call(self, function: Callable[..., Value], *arguments: Any, **named: Any) -> Value:
        """Return what a function returns in a thread of this process whose sockets are on the host's network."""
        found: list[Value] = []
        errors: list[BaseException] = []

        def there() -> None:
            try:
                with Path(f"/proc/{self.pid}/ns/net").open() as namespace:
                    libc = ctypes.CDLL(None, use_errno=True)
                    if libc.setns(namespace.fileno(), CLONE_NEWNET):
                        raise OSError(ctypes.get_errno(), "setns")
                found.append(function(*arguments, **named))
            except BaseException as e:
                errors.append(e)

        thread = threading.Thread(target=there)
        thread.start()
        thread.join()
        if errors:
            raise errors[0]
        return found[0]

    def processes(self) -> Iterator[tuple[int, str]]:
        """Yield the processes of the host but the first: number, as this machine counts them, and state of /proc."""
        with contextlib.suppress(OSError):
            space, first = Path(f"/proc/{self.pid}/ns/pid_for_children").readlink(), children(self.pid)
            for path in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):
                    if int(path.name) not in first and (path / "ns/pid").readlink() == space:
                        yield int(path.name), state(int(path.name))

    def wait_stopped(self, seconds: float = 300) -> int:
        """Wait until SIGSTOP holds a process of the host, and return its number on this machine."""
        deadline = time.monotonic() + seconds
        while not (found := [pid for pid, how in self.processes() if how == "T"]):
            said = "\n".join(command.said[-3000:] for command in self._commands)
            assert time.monotonic() < deadline, f"nothing stops on {self.name}\n{said}"
            assert any(command.poll() is None for command in self._commands), f"all ended on {self.name}\n{said}"
            time.sleep(0.05)
        return found[0]

    def cut_off(self) -> None:
        """Let nothing through from now on, as if the cable were out: nobody is told."""
        self._switch.ip("link", "set", self._port, "down")

    def heal(self) -> None:
        """Let everything through again."""
        self._switch.ip("link", "set", self._port, "up")

    def close(self) -> None:
        """Switch the host off."""
        super().close()
        for command in self._commands:
            command.close()
        self._commands.clear()


def _own_folders() -> Iterator[str]:
    """Yield the lines of a shell that make all mounts read-only and give folders of its own to a host."""
    trees = {str(p) for p in (ROOT, Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve())}
    hidden = sorted(tree for tree in trees if tree.startswith("/tmp/"))
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        where = line.split()[4].encode().decode("unicode_escape")
        if not re.match(r"/(proc|sys|dev|tmp)(/|$)", where):  # where a mount hides another one it fails
            yield f"mount -o remount,bind,ro {shlex.quote(where)} 2>/dev/null || :"
    yield "mount -t tmpfs host /dev/shm"
    for i, tree in enumerate(hidden):
        yield f"mkdir /dev/shm/{i} && mount --bind {shlex.quote(tree)} /dev/shm/{i}"
        yield f"mount -o remount,bind,ro /dev/shm/{i}"
    yield "mount -t tmpfs host /tmp"
    for i, tree in enumerate(hidden):
        yield f"mkdir -p {shlex.quote(tree)} && mount --move /dev/shm/{i} {shlex.quote(tree)} && rmdir /dev/shm/{i}"
    yield f"mkdir {HOME}"


@contextlib.contextmanager
def network(*names: str) -> Iterator[list[Host]]:
    """Make hosts of these names on one switch. Raises NoHostsError.

    Their addresses are 10.77.0.1, 10.77.0.2, …, which no other network sees."""
    addresses = {name: f"10.77.0.{i + 1}" for i, name in enumerate(names)}
    with contextlib.ExitStack() as held:
        switch = Namespaces("switch", ["ip link add switch type bridge", "ip link set switch up"])
        held.callback(switch.close)
        hosts = []
        for name, address in addresses.items():
            hosts.append(Host(name, address, switch, addresses))
            held.callback(hosts[-1].close)
        yield hosts


def missing() -> str:
    """Return why no hosts can be made here, or nothing."""
    if os.geteuid():
        return "hosts are namespaces of the kernel, and only root makes them; run it as root"
    try:
        with network("probe1", "probe2"):
            return ""
    except NoHostsError as e:
        return f"no hosts can be made here ({e})"


if __name__ == "__main__":
    if said := missing():
        print(said)
        sys.exit(1)
