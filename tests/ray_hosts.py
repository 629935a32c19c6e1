"""A cluster of Ray over hosts that share a bucket and nothing else, for tests and for benchmarks/scale/hosts.py."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hosts import HOME, ROOT, Command, Host, network
from object_server import ObjectServer, environment, use

from twotower.files.object_stores import ObjectClient, ObjectInfo
from twotower.files.urls import Url

RAY = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4, "RAY_USAGE_STATS_ENABLED": "0"}
STOP = HOME / "stop"
"""A file of a host. While it is there, each process of Ray that starts on that host stands still at the point that it
names."""
POINTS = f"""
import sys
from pathlib import Path
if (stop := Path("{STOP}")).exists():
    sys.path.append("{ROOT}/tests")
    import kill_points
    kill_points.install(stop.read_text() + ":hang")
"""


@dataclass
class Cluster:
    """A cluster of Ray: `head` shares out what `workers` compute. `caller` is a host outside. `caller` and `head` have
    the folder HOME/run, and workers get the run through the bucket."""

    bucket: Host
    caller: Host
    head: Host
    workers: list[Host]
    objects: ObjectServer
    url: str

    @property
    def environment(self) -> dict[str, str]:
        return environment(self.objects.address) | RAY

    def put(self, table: Path, name: str = "items") -> None:
        """Write the files of a folder below the URL, as a table of that name."""
        for path in table.iterdir():
            self.bucket.call(self.objects.put, f"{self.url}/{name}/{path.name}", path.read_bytes())

    def embed(self, host: Host, out: str, engine: str = "ray", rows: int = 100, threads: int = 1) -> Command:
        """Start the job on a host, by an address of Ray, by "ray" on the cluster of the head, or by "local" on that
        host alone."""
        words = ("embed", "run", f"{self.url}/items", "--out", f"{self.url}/{out}", "--shard-rows", rows)
        return self.call(host, *words, engine=engine, threads=threads)

    def call(self, host: Host, *words: Any, engine: str, threads: int = 1) -> Command:
        """Start a verb that shares its work, with its run, if it has one, through the bucket."""
        joined = {"RAY_ADDRESS": "head:6379"} if engine == "ray" else {}
        share = ("--share", f"{self.url}/runs") if engine != "local" and "run" in words else ()
        return host.twotower(
            *words, *share, "--engine", engine, "--threads", threads, env=self.environment | joined,
        )  # fmt: skip

    def leave(self, host: Host) -> None:
        """Stop the Ray of a host as its administrator does."""
        words = ("python", "-m", "ray.scripts.scripts", "stop", "--grace-period", 5)
        stopped = host.start(*words, env=self.environment)
        assert stopped.wait(600) == 0, stopped.said

    def join(self, host: Host) -> None:
        """Start the Ray of a host, with one CPU."""
        _wait_started(self, host, 1, "--address", "head:6379")

    def deaths(self) -> list[str]:
        """Return the reasons that Ray has for the end of hosts."""
        dead = "n['DeathReasonMessage'] for n in ray.nodes() if not n['Alive']"
        code = f"import ray; ray.init('head:6379'); print('deaths', *({dead}), sep=';')"
        asked = self.head.start("python", "-c", code, env=self.environment)
        assert asked.wait(600) == 0, asked.said
        (line,) = re.findall("^deaths;(.*)$", asked.said, re.MULTILINE)
        return str(line).split(";")

    def listed(self, out: str) -> dict[str, ObjectInfo]:
        """Return the objects of a result by their paths in it."""
        at = Url.parse(f"{self.url}/{out}")
        return {o.key.removeprefix(f"{at.key}/"): o for o in self.bucket.call(ObjectClient(at).list, at.key)}

    def read(self, out: str, name: str) -> bytes:
        """Return an object of a result."""
        at = Url.parse(f"{self.url}/{out}")
        data: bytes = self.bucket.call(ObjectClient(at).read, f"{at.key}/{name}", 10**10).data
        return data

    def done(self, out: str) -> list[str]:
        """Return the files of finished shards of a result."""
        return [name for name in self.listed(out) if name.startswith("part-")]


@contextmanager
def ray_cluster(run: Path, workers: Sequence[str]) -> Iterator[Cluster]:
    """Start a cluster whose workers have these names and one CPU each. `run` is copied as HOME/run to the hosts that
    call."""
    with pytest.MonkeyPatch.context() as patch, network("bucket", "caller", "head", *workers) as hosts:
        bucket, caller, head, *others = hosts
        objects = ObjectServer.on(bucket)
        use(objects.address, patch)
        cluster = Cluster(bucket, caller, head, others, objects, f"s3://{bucket.call(objects.new_bucket)}")
        for host in (caller, head):
            host.give(run, HOME / "run")
        words = ("--head", "--port", 6379, "--ray-client-server-port", 10001, "--include-dashboard=false")
        _wait_started(cluster, head, 0, *words)
        for host in others:
            cluster.join(host)
        yield cluster


def _wait_started(cluster: Cluster, host: Host, cpus: int, *words: Any) -> None:
    """Start Ray on a host, at most three times: it ends by itself where its processes are not up within seconds, as on
    a busy machine."""
    for left in reversed(range(3)):
        ray = _start(cluster, host, cpus, *words)
        try:
            ray.until("Ray runtime started", 600)
            return
        except AssertionError:
            if not left or ray.poll() is None:
                raise
            for pid, _ in host.processes():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def _start(cluster: Cluster, host: Host, cpus: int, *words: Any) -> Command:
    hooks = host.folder(HOME / "hooks")
    hooks.mkdir(exist_ok=True)
    (hooks / "sitecustomize.py").write_text(POINTS)
    return host.start(
        "python", "-m", "ray.scripts.scripts", "start", "--block", "--node-ip-address", host.address,
        "--num-cpus", cpus,
        "--object-store-memory", 100_000_000, *words,
        env=cluster.environment | {"PYTHONPATH": f"{HOME}/hooks:{ROOT}/src"},
    )  # fmt: skip


def made(said: str) -> int:
    """Return the number of shards that a call says it has made."""
    return len(re.findall(r"items embedded, .* shard \d+ of", said))
