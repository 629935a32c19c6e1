"""Prometheus metrics, served at /metrics. With several workers they are the sum over all workers.

prometheus-client keeps a worker's values in files of the folder in the environment variable METRICS_FOLDER, which must
be set before this module is imported.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from functools import lru_cache
from pathlib import Path
from typing import Literal

import psutil
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from twotower.serve.settings import METRICS_FOLDER

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS_BUCKETS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
GaugeMode = Literal["livemostrecent", "livesum", "livemin"]
STAGES = ("wait", "events", "tower", "search")


class ServeMetrics:
    """All metrics of a service, in a registry of their own."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a series for each, of no use for rates
        registry = self._registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"twotower_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, *labels: str) -> Histogram:
            return Histogram(f"twotower_{name}", text, labels, registry=registry, buckets=SECONDS_BUCKETS)

        def gauge(name: str, text: str, *labels: str, mode: GaugeMode = "livemostrecent") -> Gauge:
            return Gauge(f"twotower_{name}", text, labels, registry=registry, multiprocess_mode=mode)

        self.requests = counter("requests_total", "Requests by route and status", "route", "status")
        self.seconds = histogram(
            "request_seconds", "Seconds from the start of a request to the end of its reply", "route"
        )
        self.stage = histogram("stage_seconds", "Seconds of an answer by stage: wait, events, tower, search", "stage")
        self.answers = counter("answers_total", "Answers by bundle, method and source", "bundle", "method", "source")
        self.truncated = counter("truncated_answers_total", "Answers with fewer items than requested")
        self.unknown = counter(
            "unknown_features_total",
            "Feature values of requests that are not in the vocabulary of the model",
            "feature",
        )
        self.unknown_items = counter("unknown_items_total", "Items of histories that are not in the bundle")
        self.refused = counter("refused_total", "Requests refused before any work, by problem", "problem")
        self.in_flight = gauge("in_flight_requests", "Requests in progress", mode="livesum")
        self.connections = gauge("connections", "Open connections", mode="livesum")
        self.connections_ended = counter(
            "connections_ended_total", "Connections refused or closed by the server, by reason", "reason"
        )
        self.bundle = gauge("bundle", "1 for the current bundle", "bundle")
        self.recall = gauge("bundle_recall", "Recall of the index when the bundle was published", "bundle")
        self.loads = counter("bundle_loads_total", "Bundles loaded and made current")
        self.load_seconds = gauge("bundle_load_seconds", "Seconds of the last load")
        self.load_failures = counter("bundle_load_failures_total", "Bundles refused, by reason", "reason")
        self.store_answers = gauge("store_answers", "1 while the store says which bundle is current", mode="livemin")
        self.event_store_errors = counter(
            "event_store_errors_total", "Failures of the event store, by operation", "operation"
        )
        self.event_memory = gauge("event_memory_bytes", "Bytes of recent events in the process", mode="livesum")
        self.events_dropped = counter(
            "events_dropped_total", "Users dropped to stay within the setting event_memory", "what"
        )
        self.index_errors = counter("index_errors_total", "Failures of a remote index (Milvus)")
        self.keys_failures = counter(
            "keys_failures_total", "Reads of the key file that found no usable keys, so that every key was refused"
        )
        self.ready = gauge("ready", "1 while /readyz answers 200", mode="livemin")
        self.ready.set(0)
        self.stages = {name: self.stage.labels(name) for name in STAGES}
        # prometheus-client looks a label up in ten calls.
        self._answer = lru_cache(256)(self.answers.labels)
        self._reply = lru_cache(1_024)(self.requests.labels)
        self._seconds = lru_cache(256)(self.seconds.labels)

    def count_answer(
        self, bundle: str, method: int, source: str, unknown: list[str], features: Collection[str], short: bool
    ) -> None:
        """Count one answer. Names in `unknown` that are no features are items, which are counted without their ids."""
        self._answer(bundle, method, source).inc()
        if short:
            self.truncated.inc()
        for name in unknown:
            if name in features:
                self.unknown.labels(name).inc()
            else:
                self.unknown_items.inc()

    def count_reply(self, route: str, status: int, seconds: float) -> None:
        """Count one reply."""
        self._reply(route, status).inc()
        self._seconds(route).observe(seconds)

    def set_bundle(self, bundle: str, recall: float, before: str | None) -> None:
        """Record that `bundle` replaces `before` as current. `recall`: of its index when it was published."""
        if before:
            self.bundle.labels(before).set(0)
            self.recall.labels(before).set(0)
            if not os.environ.get(METRICS_FOLDER):  # the files of several workers cannot drop a label
                for gauge in (self.bundle, self.recall):
                    gauge.remove(before)
        self.ready.set(1)
        self.bundle.labels(bundle).set(1)
        self.recall.labels(bundle).set(recall)

    def render(self) -> bytes:
        """Return the metrics in the text format of Prometheus."""
        folder = os.environ.get(METRICS_FOLDER)
        if not folder:
            return bytes(generate_latest(self._registry))
        for path in Path(folder).glob("gauge_live*_*.db"):  # a killed worker does not clean up
            pid = path.stem.rpartition("_")[2]
            if pid.isdigit() and not psutil.pid_exists(int(pid)):
                mark_process_dead(int(pid))  # type: ignore[no-untyped-call]
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return bytes(generate_latest(registry))
