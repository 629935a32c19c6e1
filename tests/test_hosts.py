"""Hosts of tests share a network and nothing else, can be cut off, and leave nothing."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hosts import HOME, network

ROOT = Path(__file__).resolve().parent.parent
HERE = Path(__file__).resolve().parent


def answers(address: str, seconds: float) -> bool:
    """True if the server of a host answers with its file within some seconds."""
    try:
        with socket.create_connection((address, 8000), timeout=seconds) as link:
            link.settimeout(seconds)
            link.sendall(b"GET /given.txt HTTP/1.0\r\n\r\n")
            return link.makefile("rb").read().endswith(b"given by the test")
    except OSError:
        return False


@pytest.mark.hosts
def test_hosts_share_a_network_and_no_file_they_can_write(tmp_path: Path) -> None:
    (tmp_path / "given.txt").write_text("given by the test")
    with network("a", "b") as (a, b):
        for host in (a, b):
            host.give(tmp_path / "given.txt", HOME / "given.txt")
        names = a.start("sh", "-c", "hostname; cat given.txt; ls /proc | sort -n | grep -m 1 '^[0-9]'; getent hosts b")
        assert names.wait() == 0
        said = names.said.split()
        assert said[:5] == ["a", "given", "by", "the", "test1"], "and its processes are its own"
        assert said[-2:] == [b.address, "b"]
        for where in (HOME, Path("/dev/shm"), Path("/tmp")):
            assert a.start("touch", where / "here").wait() == 0
            assert a.folder(where / "here").exists()
            assert not b.folder(where / "here").exists()
            assert not (where / "here").exists()
        for where in {ROOT, tmp_path, Path(sys.prefix), Path("/var/tmp"), Path("/root"), Path("/etc")}:
            assert a.start("touch", where / "there").wait() != 0
            assert not (where / "there").exists(), "hosts write nothing that others see"
        server = b.start("python", "-m", "http.server", "8000", "--bind", b.address)
        server.until("Serving HTTP")
        assert a.call(answers, b.address, 60)
        assert not answers(b.address, 1), "this machine is not in their network"
        b.cut_off()
        assert not a.call(answers, b.address, 1)
        b.heal()
        assert a.call(answers, b.address, 60)
        assert server.poll() is None
        b.close()
        assert not a.call(answers, b.address, 1)


@pytest.mark.hosts
@pytest.mark.parametrize("ends", ["an error", "a kill"])
def test_nothing_is_left_of_hosts(ends: str) -> None:
    code = (
        "import sys, time\n"
        f"sys.path.insert(0, {str(HERE)!r})\n"
        "from hosts import network\n"
        "with network('a', 'b') as hosts:\n"
        "    command = hosts[1].start('setsid', 'sleep', '600')\n"
        "    while not (found := [pid for pid, _ in hosts[1].processes()]): time.sleep(0.05)\n"
        "    print(hosts[0].pid, hosts[1].pid, *found, flush=True)\n"
        f"    {'raise KeyError' if ends == 'an error' else 'time.sleep(600)'}\n"
    )
    links = {path.name for path in Path("/sys/class/net").iterdir()}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout
        pids = [int(word) for word in process.stdout.readline().split()]
        assert len(pids) >= 3
        if ends == "a kill":
            process.send_signal(signal.SIGKILL)
    assert process.returncode
    deadline = time.monotonic() + 60
    while left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
    assert {path.name for path in Path("/sys/class/net").iterdir()} == links
