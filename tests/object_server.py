"""A local S3 server (moto) on loopback, in a process of its own, for tests. Run as a script it is that process, on the
address that it is given."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import count
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment
    from hosts import Host

_numbers = count()


class ObjectServer:
    """The process; it ends with its standard input."""

    @classmethod
    def at(cls, address: str) -> ObjectServer:
        """The server of another process."""
        server = cls.__new__(cls)
        server.address = address
        return server

    @classmethod
    def on(cls, host: Host) -> ObjectServer:
        """Start the server on a host, with which it ends. What asks it runs on a host too (`Host.call`)."""
        started = host.start("python", "-W", "ignore", __file__, host.address)
        return cls.at(started.until(r"http://\S+:\d+\n")[0].strip())

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self.process.stdout
        self.address = self.process.stdout.readline().decode().strip()

    def new_bucket(self) -> str:
        """Create an empty bucket and return its name."""
        name = f"lake-{next(_numbers)}"
        request = urllib.request.Request(f"{self.address}/{name}", method="PUT", headers={"Content-Length": "0"})
        with urllib.request.urlopen(request) as reply:
            assert reply.status == 200
        return name

    def put(self, url: str, data: bytes) -> None:
        """Write the object of an address s3://…, whose key may have parts that no client of the package writes."""
        at = f"{self.address}/{quote(url.removeprefix('s3://'))}"
        request = urllib.request.Request(at, data, {"Content-Type": "application/octet-stream"}, method="PUT")
        with urllib.request.urlopen(request, timeout=60) as reply:
            assert reply.status == 200

    def let_happen(self, *faults: Fault) -> None:
        """Let faults happen from now on, instead of those before."""
        self._post("set", json.dumps([asdict(fault) for fault in faults]).encode())

    def age_leases(self, seconds: int = 10_000) -> None:
        """Let time pass for all leases."""
        self._post(f"age?{seconds}")

    def _post(self, what: str, data: bytes = b"") -> None:
        with urllib.request.urlopen(urllib.request.Request(f"{self.address}/_faults/{what}", data, method="POST")):
            pass

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


@dataclass(frozen=True)
class Fault:
    """Answers of the server that are not those of S3: to `times` requests whose "METHOD PATH" a pattern finds, after
    `skip` others. With `done` the request takes effect, and its answer is lost. `since` finds the request with which it
    begins."""

    requests: str
    status: int = 503
    times: int = 1
    skip: int = 0
    done: bool = False
    since: str = ""


class _Faults:
    """WSGI application that lets faults happen in front of another; POST /_faults/NAME is not for the other."""

    def __init__(self, inner: WSGIApplication) -> None:
        self._inner, self._left = inner, list[dict[str, Any]]()

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        if path == "/_faults/set":
            self._left = json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
        elif path == "/_faults/age":
            age_leases(int(environ["QUERY_STRING"]))
        else:
            return self._answer(environ, start_response, f"{method} {path}")
        start_response("204 No Content", [])
        return []

    def _answer(self, environ: WSGIEnvironment, start_response: StartResponse, what: str) -> Iterable[bytes]:
        fault = next((f for f in self._left if not f["since"] and f["times"] and re.search(f["requests"], what)), None)
        for waiting in self._left:
            if waiting["since"] and re.search(waiting["since"], what):
                waiting["since"] = ""
        if fault is None:
            return self._inner(environ, start_response)
        if fault["skip"]:
            fault["skip"] -= 1
            return self._inner(environ, start_response)
        fault["times"] -= 1
        if fault["done"]:
            for _ in self._inner(environ, lambda *_: lambda data: None):
                pass
        else:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        start_response(f"{fault['status']} Fault", [("Content-Length", "0")])
        return []


class _InTurn:
    """WSGI application that gives requests to another one after the other, each as it is whole: a client that stands
    still in the middle of a request is in nobody's way."""

    def __init__(self, inner: WSGIApplication) -> None:
        self._inner, self._turn = inner, threading.Lock()

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        size = int(environ.get("CONTENT_LENGTH") or 0)
        body = environ["wsgi.input"].read(size) if size else b""
        if len(body) < size:  # the client is gone
            start_response("400 Incomplete", [("Content-Length", "0")])
            return []
        if size:
            environ["wsgi.input"] = io.BytesIO(body)
        with self._turn:
            return list(self._inner(environ, start_response))


def age_leases(seconds: int) -> None:
    """Make the leases of all stores older, in the server."""
    from moto.s3.models import s3_backends

    for account in s3_backends.values():
        for backend in account.values():
            for bucket in backend.buckets.values():
                for key in bucket.keys.values():
                    if "/leases/" in key.name:
                        key.last_modified -= timedelta(seconds=seconds)


def serve(host: str = "127.0.0.1") -> None:
    """Serve S3 on a free port of an address, and print its URL, until standard input ends."""
    from moto.moto_server.werkzeug_app import create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log(self, type: str, message: str, *args: object) -> None:
            """Write nothing."""

    app = _InTurn(_Faults(create_backend_app("s3")))
    server = make_server(host, 0, app, threaded=True, request_handler=Quiet)
    print(f"http://{host}:{server.server_port}", flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()


def environment(server_address: str) -> dict[str, str]:
    """Return the variables of a client of a server, with no other address to ask for credentials."""
    return {
        "AWS_ENDPOINT_URL": server_address, "AWS_ACCESS_KEY_ID": "tester", "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1", "AWS_METADATA_ENDPOINT": "http://127.0.0.1:9",
    }  # fmt: skip


def use(server_address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the environment of this process to a server, whatever it was."""
    for name, value in environment(server_address).items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_ENDPOINT", "AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION", "AWS_SKIP_SIGNATURE"):
        monkeypatch.delenv(name, raising=False)


if __name__ == "__main__":
    serve(*sys.argv[1:])
