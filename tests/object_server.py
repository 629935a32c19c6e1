"""A local S3 server (moto) on loopback, in a process of its own, for tests. Run as a script it is that process."""

from __future__ import annotations

import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count

import pytest

_numbers = count()


class ObjectServer:
    """The process; it ends with its standard input."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self.process.stdout
        self.port = int(self.process.stdout.readline())

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def new_bucket(self) -> str:
        """Create an empty bucket and return its name."""
        name = f"lake-{next(_numbers)}"
        request = urllib.request.Request(f"{self.address}/{name}", method="PUT", headers={"Content-Length": "0"})
        with urllib.request.urlopen(request) as reply:
            assert reply.status == 200
        return name

    def close(self) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@contextmanager
def object_server() -> Iterator[ObjectServer]:
    server = ObjectServer()
    try:
        yield server
    finally:
        server.close()


def use(server_address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the environment of this process to a server, whatever it was, and no other address to ask for credentials."""
    settings = {
        "AWS_ENDPOINT_URL": server_address, "AWS_ACCESS_KEY_ID": "tester", "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1", "AWS_METADATA_ENDPOINT": "http://127.0.0.1:9",
    }  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_ENDPOINT", "AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION", "AWS_SKIP_SIGNATURE"):
        monkeypatch.delenv(name, raising=False)


if __name__ == "__main__":
    import contextlib
    import io

    from moto.server import ThreadedMotoServer

    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    with contextlib.redirect_stdout(io.StringIO()):
        moto.start()
    print(moto.get_host_and_port()[1], flush=True)
    sys.stdin.read()
