"""What Prometheus reads at /metrics. With several workers the numbers are those of all of them.

prometheus-client keeps a worker's numbers in files where METRICS_FOLDER names a folder, which must be said before this
module is imported.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from twotower.serve.settings import METRICS_FOLDER

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS_BUCKETS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
STAGES = ("wait", "events", "tower", "search")


class ServeMetrics:
    """Every metric of a service, in a registry of its own."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Any:
            return Counter(f"twotower_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, *labels: str) -> Any:
            return Histogram(f"twotower_{name}", text, labels, registry=registry, buckets=SECONDS_BUCKETS)

        def gauge(name: str, text: str, *labels: str, mode: Any = "livemostrecent") -> Any:
            return Gauge(f"twotower_{name}", text, labels, registry=registry, multiprocess_mode=mode)

        self.requests = counter("requests_total", "Requests by route and status", "route", "status")
        self.seconds = histogram(
            "request_seconds", "From the first byte of a request to the last of its reply", "route"
        )
        self.stage = histogram("stage_seconds", "Of an answer, by stage: wait, events, tower, search", "stage")
        self.answers = counter("answers_total", "Answers by bundle, method and source", "bundle", "method", "source")
        self.truncated = counter("truncated_answers_total", "Answers with fewer items than asked for")
        self.unknown = counter(
            "unknown_features_total", "Features of requests whose value the model never met", "feature"
        )
        self.unknown_items = counter("unknown_items_total", "Items of histories that the bundle does not know")
        self.refused = counter("refused_total", "Requests refused before any work, by the problem's name", "problem")
        self.in_flight = gauge("in_flight_requests", "Requests under way", mode="livesum")
        self.connections = gauge("connections", "Open connections", mode="livesum")
        self.connections_ended = counter("connections_ended_total", "Connections that were refused or closed", "reason")
        self.bundle = gauge("bundle", "1 for the bundle that answers", "bundle")
        self.recall = gauge("bundle_recall", "Recall of the index when the bundle was published", "bundle")
        self.loads = counter("bundle_loads_total", "Bundles that were loaded and became current")
        self.load_seconds = gauge("bundle_load_seconds", "Seconds that the last load took")
        self.load_failures = counter("bundle_load_failures_total", "Bundles that were refused, by reason", "reason")
        self.event_store_errors = counter(
            "event_store_errors_total", "Failures of the store of live histories", "operation"
        )
        self.event_memory = gauge("event_memory_bytes", "Bytes of live histories in the process", mode="livesum")
        self.events_dropped = counter(
            "events_dropped_total", "Live histories and events dropped for want of room", "what"
        )
        self.index_errors = counter("index_errors_total", "Failures of an index that is elsewhere")
        self.keys_failures = counter(
            "keys_failures_total", "Looks at the file of keys that could not use it, so nobody was let in"
        )
        self.ready = gauge("ready", "1 while /readyz says yes", mode="livemin")
        self.ready.set(0)
        self.stages = {name: self.stage.labels(name) for name in STAGES}
        self._routes: dict[str, Any] = {}
        self._answers: dict[tuple[str, int, str], Any] = {}
        self._statuses: dict[tuple[str, int], Any] = {}

    def count_answer(
        self, bundle: str, method: int, source: str, unknown: list[str], features: Collection[str], short: bool
    ) -> None:
        """Count one answer; what of `unknown` is no feature is an item, whose id is nobody's business."""
        key = (bundle, method, source)
        child = self._answers.get(key)
        if child is None:
            child = self._answers[key] = self.answers.labels(*map(str, key))
        child.inc()
        if short:
            self.truncated.inc()
        for name in unknown:
            if name in features:
                self.unknown.labels(name).inc()
            else:
                self.unknown_items.inc()

    def count_reply(self, route: str, status: int, seconds: float) -> None:
        """Count one reply."""
        key = (route, status)
        child = self._statuses.get(key)
        if child is None:
            child = self._statuses[key] = self.requests.labels(route, str(status))
        child.inc()
        timer = self._routes.get(route)
        if timer is None:
            timer = self._routes[route] = self.seconds.labels(route)
        timer.observe(seconds)

    def set_bundle(self, bundle: str, recall: float, before: str | None) -> None:
        """Another bundle answers."""
        if before:
            self.bundle.labels(before).set(0)
            self.recall.labels(before).set(0)
            self._answers = {key: child for key, child in self._answers.items() if key[0] != before}
            if not os.environ.get(METRICS_FOLDER):  # files of several workers keep what was
                for gauge in (self.bundle, self.recall):
                    gauge.remove(before)
        self.ready.set(1)
        self.bundle.labels(bundle).set(1)
        self.recall.labels(bundle).set(recall)

    def render(self) -> bytes:
        """The text that Prometheus reads."""
        folder = os.environ.get(METRICS_FOLDER)
        if not folder:
            return bytes(generate_latest(self._registry))
        for path in Path(folder).glob("gauge_live*_*.db"):  # a worker that was killed could not say so
            pid = path.stem.rpartition("_")[2]
            if pid.isdigit() and not Path(f"/proc/{pid}").exists():
                mark_process_dead(int(pid))  # type: ignore[no-untyped-call]
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return bytes(generate_latest(registry))
