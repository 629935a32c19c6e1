"""A service, its publishers, its bucket and its Valkey on hosts of their own, which are cut off and switched off."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from hosts import HOME, Command, Host, network
from object_server import ObjectServer, environment

pytestmark = pytest.mark.hosts
KILL_POINTS, WIRE = (Path(__file__).resolve().parent.parent / name for name in ("kill_points.py", "wire.py"))
MILVUS = Path(sys.executable).parent / "milvus-lite"


@dataclass
class Site:
    """Hosts that share a bucket: the service runs on `server`, and whoever asks it on `operator`."""

    bucket: Host
    publisher: Host
    other_publisher: Host
    server: Host
    operator: Host
    valkey: Host
    link: Host
    milvus: Host
    objects: ObjectServer
    url: str
    port: int = 8000
    """Port of the service that is asked."""
    endpoint: str = ""
    """Address by which commands and services reach the bucket, another one than its own."""

    def twotower(self, host: Host, *words: Any, until: str = "") -> Command:
        """Start a command with the store, which SIGSTOP holds at a point."""
        program = [KILL_POINTS, until] if until else ["-m", "twotower"]
        variables = environment(self.endpoint or self.objects.address)
        return host.start("python", *program, *words, "--store", self.url, env=variables)

    def done(self, host: Host, *words: Any) -> str:
        """Run a command with the store to its end, which must be good, and return what it has said."""
        command = self.twotower(host, *words)
        assert command.wait(600) == 0, command.said
        return command.said

    def wire(self, target: str) -> tuple[Command, str]:
        """Start a wire to a port on the host `link`, and return it and its address."""
        wire = self.link.start("python", WIRE, self.link.address, target)
        return wire, wire.until(r"http://\S+\n")[0].strip()

    def serve(self, *words: Any) -> Command:
        """Start the service on its port, and wait until it is ready."""
        words = ("serve", "--host", self.server.address, "--port", self.port, "--insecure", *words)
        served = self.twotower(self.server, *words)
        served.until(rf"on http://\S+:{self.port}")
        deadline = time.monotonic() + 300
        while self.operator.call(ready, f"http://{self.server.address}:{self.port}/readyz") != 200:
            assert served.poll() is None, served.said
            assert time.monotonic() < deadline, served.said
            time.sleep(0.1)
        return served

    def ask(self, method: str, path: str, body: Any = None, expected: int = 200) -> Any:
        """Return the reply of the service in JSON."""
        url = f"http://{self.server.address}:{self.port}{path}"
        reply = self.operator.call(httpx.request, method, url, json=body, timeout=60, trust_env=False)
        assert reply.status_code == expected, reply.text
        return reply.json()

    def answer(self, **more: Any) -> dict[str, Any]:
        """Return the answer to a request, which must be good."""
        found: dict[str, Any] = self.ask("POST", "/v1/recommend", {"user_id": "u3", "k": 5, **more})
        assert len(found["items"]) == 5
        return found

    def until_served(self, bundle: str) -> None:
        """Ask until a bundle answers. All answers before must be good."""
        deadline = time.monotonic() + 300
        while (found := self.answer()["bundle_id"]) != bundle:
            assert time.monotonic() < deadline, f"{found} is served, not {bundle}"
            time.sleep(0.05)

    def failures_of_valkey(self) -> float:
        """Return how often the service has waited for Valkey in vain."""
        url = f"http://{self.server.address}:{self.port}/metrics"
        text = self.operator.call(httpx.get, url, timeout=60, trust_env=False).text
        return sum(map(float, re.findall(r"event_store_errors_total\{.*\} (\S+)", text)))

    def bundles(self) -> list[str]:
        """Return the ids of the bundles of the store, which `twotower bundles` lists."""
        return [line.split()[0] for line in self.done(self.operator, "bundles").splitlines() if line[:2] == "20"]

    def folders(self) -> set[str]:
        """Return the ids of the bundles, whole or not, of which the bucket has an object."""

        def listed() -> str:
            bucket, _, prefix = self.url.removeprefix("s3://").partition("/")
            at = f"{self.objects.address}/{bucket}?list-type=2&prefix={prefix}/bundles/"
            with urllib.request.urlopen(at, timeout=60) as reply:
                return str(reply.read().decode())

        return set(re.findall(r"/bundles/([^/<]+)/", self.operator.call(listed)))


@pytest.fixture(scope="module")
def site(two_bundles: Path) -> Iterator[Site]:
    """The service answers from the bundle of the first of two runs, which all publishers have."""
    with network("bucket", "publisher", "other", "server", "operator", "valkey", "link", "milvus") as hosts:
        bucket, publisher, other, server, operator, valkey, link, milvus = hosts
        objects = ObjectServer.on(bucket)
        url = f"s3://{bucket.call(objects.new_bucket)}/store"
        site = Site(bucket, publisher, other, server, operator, valkey, link, milvus, objects, url)
        for host in (site.publisher, site.other_publisher, site.operator):
            for run in ("run1", "run2"):
                host.give(two_bundles.parent / run, HOME / run)
        site.valkey.start("valkey-server", "--bind", site.valkey.address, "--protected-mode", "no", "--save", "").until(
            "Ready to accept connections"
        )
        site.done(site.publisher, "publish", "run1")
        site.serve("--event-store", "redis://valkey:6379/0", "--event-timeout", 2000)
        yield site


def ready(url: str) -> int:
    try:
        return httpx.get(url, timeout=60, trust_env=False).status_code
    except httpx.HTTPError:
        return 0


def test_what_one_host_publishes_another_serves_and_a_third_takes_back(site: Site) -> None:
    first = site.answer()["bundle_id"]
    site.done(site.publisher, "publish", "run2")
    (second,) = set(site.bundles()) - {first}
    site.until_served(second)
    assert site.done(site.operator, "rollback").endswith(f"current: {first}\n")
    site.until_served(first)


@pytest.mark.parametrize("how", ["cut off", "switched off"])
def test_fault_A1_a_publisher_whose_host_is_lost_leaves_the_old_bundle_and_is_in_nobodys_way(
    site: Site, how: str
) -> None:
    host = site.publisher if how == "cut off" else site.other_publisher
    before, known = site.answer()["bundle_id"], set(site.bundles())
    publishing = site.twotower(host, "publish", "run2", until="bucket.file:hang")
    stopped = host.wait_stopped()
    (half,) = site.folders() - known
    if how == "cut off":
        host.cut_off()
        os.kill(stopped, signal.SIGCONT)
    else:
        host.close()
    assert site.answer()["bundle_id"] == before
    site.done(site.operator, "publish", "run1")  # nobody waits for the lease
    (after,) = set(site.bundles()) - known
    site.until_served(after)
    if how == "cut off":
        assert publishing.wait(900) == 2, publishing.said
        assert re.search(r"error: .* does not answer", publishing.said), publishing.said
        host.heal()
    site.done(site.operator, "gc")
    assert half in site.folders(), "its lease has not ended"
    site.operator.call(site.objects.age_leases)
    site.done(site.operator, "publish", "run2")
    assert half not in site.folders()
    assert site.folders() == set(site.bundles())


def test_fault_A9_a_publisher_that_comes_back_after_another_has_published_is_refused(site: Site) -> None:
    """As a machine that is paused and goes on, between the manifest and CURRENT."""
    known = set(site.bundles())
    publishing = site.twotower(site.publisher, "publish", "run1", until="bucket.manifest:hang")
    stopped = site.publisher.wait_stopped()
    site.publisher.cut_off()
    listed = site.bundles()
    site.done(site.operator, "publish", "run2")
    (after,) = set(site.bundles()) - set(listed)
    site.publisher.heal()
    os.kill(stopped, signal.SIGCONT)
    assert publishing.wait(900) == 2, publishing.said
    assert f"another process has made {after} current meanwhile; call again" in publishing.said
    site.until_served(after)
    assert set(site.bundles()) == known | {after}
    site.done(site.publisher, "publish", "run1")
    (last,) = set(site.bundles()) - known - {after}
    site.until_served(last)


def test_fault_A2_a_service_whose_bucket_is_cut_off_answers_on_and_says_so(site: Site) -> None:
    before = site.answer()["bundle_id"]
    site.bucket.cut_off()
    deadline = time.monotonic() + 300
    try:
        while site.ask("GET", "/readyz")["store"] != "silent":
            assert site.answer()["bundle_id"] == before
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert site.answer()["bundle_id"] == before
    finally:
        site.bucket.heal()
    known = set(site.bundles())
    site.done(site.operator, "publish", "run2")
    (after,) = set(site.bundles()) - known
    site.until_served(after)
    assert site.ask("GET", "/readyz")["store"] == "answers"


def test_fault_F1_a_valkey_that_is_cut_off_leaves_answers_without_its_events_and_comes_back(site: Site) -> None:
    def add(item: str) -> dict[str, Any]:
        found: dict[str, Any] = site.ask("POST", "/v1/events", {"user_id": "u3", "events": [item]}, expected=202)
        return found

    assert add("i1") == {"recent_events": 1, "shared": True}
    assert site.answer()["recent_events"] == 1
    site.valkey.cut_off()
    try:
        assert site.answer()["recent_events"] == 0, "Valkey alone has it"
        assert add("i2")["shared"] is False
        assert site.answer()["recent_events"] == 1, "the worker has it"
        failed = site.failures_of_valkey()
        assert failed >= 1
        for _ in range(30):
            site.answer()
        assert site.failures_of_valkey() - failed < 20, "an answer does not wait for Valkey each time"
    finally:
        site.valkey.heal()
    deadline = time.monotonic() + 300
    while not add("i2")["shared"]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert site.answer()["recent_events"] >= 3


def test_fault_F1_a_store_and_a_valkey_are_used_behind_slow_links_and_done_without_behind_slower_ones(
    site: Site,
) -> None:
    """The service and a publisher reach the bucket and Valkey through wires, whose delay is a part of each exchange."""
    to_bucket, endpoint = site.wire(site.objects.address.removeprefix("http://"))
    to_valkey, address = site.wire("valkey:6379")
    events = ("--event-store", f"redis://{address.removeprefix('http://')}/1", "--event-timeout", 3000)
    far = replace(site, url=f"{site.url}-far", port=8002, endpoint=endpoint)
    for wire in (to_bucket, to_valkey):
        wire.tell("0.03 300000")
        wire.until("now 0.03 300000")
    far.done(far.publisher, "publish", "run1")
    served = far.serve(*events)

    def add(item: str) -> dict[str, Any]:
        found: dict[str, Any] = far.ask("POST", "/v1/events", {"user_id": "u5", "events": [item]}, expected=202)
        return found

    before = far.answer()["bundle_id"]
    assert add("i1") == {"recent_events": 1, "shared": True}
    far.done(far.publisher, "publish", "run2")
    (after,) = set(far.bundles()) - {before}
    far.until_served(after)
    for wire in (to_bucket, to_valkey):
        wire.tell("20 0")
        wire.until("now 20 0")
    deadline = time.monotonic() + 300
    while far.ask("GET", "/readyz")["store"] != "silent":
        assert far.answer()["bundle_id"] == after
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert add("i2")["shared"] is False
    assert far.failures_of_valkey() >= 1
    for wire in (to_bucket, to_valkey):
        wire.tell("0 0")
        wire.until("now 0 0")
    deadline = time.monotonic() + 300
    while not (add("i3")["shared"] and far.ask("GET", "/readyz")["store"] == "answers"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert served.poll() is None
    for command in (served, to_bucket, to_valkey):
        command.close()


def test_fault_F1_a_milvus_whose_host_is_cut_off_is_done_without_and_comes_back(site: Site) -> None:
    """The publisher, the service and Milvus are on hosts of their own; two services fall back to popular items and to
    503."""
    server = site.milvus.start(
        MILVUS, "server", "--data-dir", HOME / "vectors", "--host", site.milvus.address, "--port", 19530
    )

    def answers() -> bool:
        with socket.socket() as s:
            s.settimeout(5)
            return s.connect_ex((site.milvus.address, 19530)) == 0

    deadline = time.monotonic() + 300
    while not site.operator.call(answers):
        assert server.poll() is None, server.said
        assert time.monotonic() < deadline, server.said
        time.sleep(0.1)
    index = {"kind": "milvus", "uri": "http://milvus:19530", "prefix": "films"}
    popular = replace(site, url=f"{site.url}-milvus", port=8003)
    popular.done(site.publisher, "publish", "run1", *(f"--set=index.{name}={value}" for name, value in index.items()))
    refusing = replace(popular, port=8004)
    popular.serve("--index-timeout", 3000)
    refusing.serve("--index-timeout", 3000, "--index-down", "503")
    request = {"user_id": "u3", "k": 5}
    assert popular.answer()["source"] == "model"
    assert refusing.answer()["source"] == "model"
    site.milvus.cut_off()
    try:
        for _ in range(5):
            assert popular.answer()["source"] == "fallback"
            assert refusing.ask("POST", "/v1/recommend", request, expected=503)["type"].endswith("index-unavailable")
        assert popular.ask("GET", "/readyz")["status"] == "ok"
    finally:
        site.milvus.heal()

    def source(service: Site) -> str:
        url = f"http://{service.server.address}:{service.port}/v1/recommend"
        reply = service.operator.call(httpx.post, url, json=request, timeout=60, trust_env=False)
        return str(reply.json().get("source"))

    deadline = time.monotonic() + 300
    while {source(popular), source(refusing)} != {"model"}:
        assert time.monotonic() < deadline
        time.sleep(0.1)
