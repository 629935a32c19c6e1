"""Measure the service under load over HTTP: latency at a rate, swaps of the bundle, overload and recovery, start."""

from __future__ import annotations

import multiprocessing
import os
import shlex
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lib.machine import Numbers
from benchmarks.lib.processes import Server, busy, free_port, ready, serving, usage
from benchmarks.lib.report import Report, declared, number
from benchmarks.serving.open_loop import Generator, Log, recovery, schedule
from benchmarks.serving.requests import pool, request
from benchmarks.serving.swaps import store_copy, swapping
from twotower.store.store import Store

ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "POLARS_MAX_THREADS")
WINDOW = 0.5
"""Seconds of the windows in which the recovery from overload is looked at."""
DECLARED: Numbers = declared(__file__)


def main(chosen: Namespace, report: Report) -> None:
    allowed, bench = os.sched_getaffinity(0), Bench(chosen)
    if not bench.server_core | bench.generator_core <= allowed:
        sys.exit(f"error: this process may use the cores {sorted(allowed)}")
    if "swap" in chosen.only and chosen.swaps < 10:
        sys.exit(f"error: --swaps {chosen.swaps}: growth is counted from the fifth on; take at least 10")
    if bench.server_core & bench.generator_core:
        print("!! INVALID: the server and the generator share a core")
    bundle = Store(bench.store).current().manifest
    report.facts["index"] = bundle.index.kind
    os.sched_setaffinity(0, bench.generator_core)
    for name in [*([] if chosen.no_floor else ["floor"]), *chosen.only]:
        own: Callable[[], None] | None = getattr(bench, name, None)
        if own:
            own()
        else:
            bench.steady(name)
    os.sched_setaffinity(0, allowed)  # the machine's limits are those of all its cores
    tell(report, bench.found, bench.doubts, bundle.counts.items)


class Bench:
    """The scenarios and their measurements."""

    def __init__(self, chosen: Namespace) -> None:
        self.chosen, self.store = chosen, Path(chosen.store)
        self.server_core, self.generator_core = set(chosen.server_core), set(chosen.generator_core)
        self.found: Numbers = {}
        self.doubts: dict[str, str] = {}  # by scenario

    def serve(self, store: Path) -> AbstractContextManager[Server]:
        """Start the service on its core."""
        environment = os.environ | dict.fromkeys(ONE_THREAD, "1")
        return serving(store, shlex.split(self.chosen.extra), environment, self.server_core)

    def requests(self, kind: str) -> list[bytes]:
        """Return the requests of a scenario."""
        shares = DECLARED["mixed"] if kind == "mixed" else {kind: 1.0}
        return pool(shares, self.store, self.chosen.seed, self.chosen.key)

    def rate(self, scenario: str) -> float:
        return float(self.chosen.rate or DECLARED["rates"][scenario])

    def load(
        self, server: Server, pieces: Sequence[tuple[float, float]], requests: list[bytes],
        stop: Callable[[], bool] = bool, bundles: bool = False,
    ) -> tuple[Log, Numbers]:  # fmt: skip
        """Return one open-loop run and its cost: CPU as shares of a core."""
        due = schedule(pieces, self.chosen.seed)
        which = np.random.default_rng(self.chosen.seed + 1).integers(0, len(requests), len(due))
        cores = self.server_core | self.generator_core
        before, worked = usage(server.pid), busy(cores)
        log = Generator(server.port, self.chosen.connections, self.chosen.timeout, bundles).run(
            due, requests, which, stop
        )
        after, worked = usage(server.pid), busy(cores) - worked
        spent = after["cpu_s"] - before["cpu_s"]
        others = max(0.0, worked - spent - log.cpu)
        shares = {"server": spent / log.wall, "generator": log.cpu / log.wall, "others": others / log.wall}
        return log, shares | {"rss_mb": after["rss_mb"]}

    def measure(
        self, name: str, server: Server, rate: float, start: float, seconds: float, ask: list[bytes]
    ) -> Numbers:
        """Return the numbers of some seconds at a rate, after `start` seconds of it."""
        log, cost = self.load(server, [(rate, start + seconds)], ask)
        return self.line(name, log.within(start, start + seconds), cost)

    def line(self, name: str, numbers: Numbers, cost: Numbers | None = None) -> Numbers:
        """Print the numbers of a load, and doubts about it."""
        told = {key: numbers[key] for key in ("offered", "goodput", "ok", "503", "429", "other", "errors")}
        told |= {key: numbers[key] for key in ("p50", "p99", "max")} | {"lag": numbers["lag"]["p99"]} | (cost or {})
        print(f"{name:<20}", "  ".join(f"{key} {number(value)}" for key, value in told.items()), flush=True)
        scenario = name.partition(": ")[0].replace("peak", "overload")
        if not numbers["lag_ok"]:
            self.doubt(scenario, f"INVALID: {name}: the generator was late, lag p99 {numbers['lag']['p99']} ms")
        if cost and cost["others"] > 0.1:
            self.doubt(scenario, f"DOUBTFUL: {name}: others used {cost['others']:.0%} of a core meanwhile")
        return numbers

    def doubt(self, scenario: str, text: str) -> None:
        self.doubts.setdefault(scenario, text)
        print(f"!! {text}", flush=True)

    def steady(self, name: str) -> None:
        """Measure a scenario at a rate below saturation."""
        requests, chosen = self.requests(name), self.chosen
        with self.serve(self.store) as server:
            require_answers(server, requests, name)
            found = self.measure(name, server, self.rate(name), chosen.warm_up, chosen.seconds, requests)
        self.found[name] = found

    def swap(self) -> None:
        """Measure the same rate without swaps, then while bundles change."""
        chosen, rate, requests = self.chosen, self.rate("swap"), self.requests("method1")
        with store_copy(self.store) as store, self.serve(store) as server:
            require_answers(server, requests, "method1")
            quiet = min(30.0, chosen.seconds)
            before = self.measure("swap: none", server, rate, chosen.warm_up, quiet, requests)
            ours, theirs = multiprocessing.Pipe()
            given = (
                theirs,
                store,
                server,
                chosen.swaps,
                chosen.seconds / chosen.swaps,
                self.generator_core,
                chosen.key,
            )
            swapper = multiprocessing.get_context("spawn").Process(target=swapping, args=given)
            swapper.start()
            assert ours.poll(60), "the process that publishes did not start"
            ours.recv()
            # Until it is through: every swap is waited for.
            limit = 4 * chosen.seconds + 10 * chosen.swaps
            log, cost = self.load(server, [(rate, limit)], requests, lambda: not swapper.is_alive(), bundles=True)
            if not ours.poll(1):
                sys.exit("error: the process that publishes has failed, see above")
            swaps, spent = ours.recv()
            swapper.join(10)
        cost["others"] = max(0.0, cost["others"] - spent / log.wall)
        during = self.line(f"swap: {len(swaps)}", log.within(0.0, float(log.due[-1]) + 1e-9), cost)
        early, late = swaps[4]["usage"], swaps[-1]["usage"]
        taken = [s["seconds"] for s in swaps if s["seconds"] is not None]
        self.found["swap"] = {
            "without": before, "with": during, "swaps": len(swaps), "unserved": len(swaps) - len(taken),
            "bundles": len(log.bundles), "ratio": during["p99"] / before["p99"], "taken": taken,
            "growth": 100 * (late["rss_mb"] / early["rss_mb"] - 1),
            "files": late["files"] - early["files"], "mapped": late["mapped"] - early["mapped"],
        }  # fmt: skip

    def overload(self) -> None:
        """Measure three times the peak, in one run with normal load before and after."""
        chosen, normal, requests = self.chosen, self.rate("overload"), self.requests("method1")
        start = 2 + max(5.0, min(20.0, chosen.seconds / 3))  # the first two seconds warm it up
        stop, after = start + chosen.seconds, 15.0
        with self.serve(self.store) as server:
            require_answers(server, requests, "method1")
            self.load(server, [(normal, chosen.warm_up)], requests)
            peak = self.peak(server, requests, normal)
            time.sleep(1)
            log, cost = self.load(server, [(normal, start), (3 * peak, chosen.seconds), (normal, after)], requests)
        self.line("overload: normal", log.within(2.0, start))
        over = self.line("overload: 3x peak", log.within(start, stop), cost)
        recovered, _ = recovery(log.windows(2.0, start, WINDOW), log.windows(stop, stop + after, WINDOW))
        self.line("overload: after", log.within(stop + (recovered or 0.0), stop + after))
        share, broken = 100 * over["goodput"] / peak, over["errors"] + over["other"]
        if share > 110:
            self.doubt("overload", "INVALID: overload: goodput is above the peak that was found")
        told = {"peak": peak, "over": over, "goodput_of_peak": share, "lost": 100 - share, "broken": broken}
        self.found["overload"] = told | {"recovered_s": after if recovered is None else recovered}

    def peak(self, server: Server, requests: list[bytes], rate: float) -> float:
        """Return the best goodput of rising rates, until two bring no more, and of rates near it (a peak that is too low would
        make the overload look better)."""

        def goodput(rate: float) -> float:
            return float(self.measure(f"peak: {rate:,.0f}/s", server, rate, 1.0, self.chosen.step, requests)["goodput"])

        best, worse = 0.0, 0
        while worse < 2:
            found, rate = goodput(rate), 1.4 * rate
            worse = 0 if found > 1.03 * best else worse + 1
            best = max(best, found)
        return max(best, *(goodput(share * best) for share in (0.9, 1.0, 1.1)))

    def cold(self) -> None:
        """Measure the time until ready, in three starts."""
        self.found["cold"] = []
        for _ in range(3):
            with self.serve(self.store) as server:
                self.found["cold"].append(round(server.seconds, 3))

    def floor(self) -> None:
        """Measure the limit of the machine: a constant reply, at the peak and at the rate of method1."""
        port = free_port()
        process = multiprocessing.get_context("spawn").Process(target=bare, args=(port, self.server_core))
        process.start()
        while not ready(port):
            if not process.is_alive():
                sys.exit("error: the bare application does not start")
            time.sleep(0.01)
        try:
            assert process.pid is not None
            ask = [request("POST", "/v1/recommend", {"user_id": str(n), "k": 10}) for n in range(1000)]
            most = 5_000.0
            for seconds in (1, 4):  # all are due at once: 32 connections that never rest
                due = np.zeros(round(most * seconds))
                busiest = Generator(port, 32, 60.0).run(due, ask, np.arange(len(due)) % len(ask))
                most = float((busiest.status == 200).sum() / busiest.wall)
            found = self.measure("floor", Server(process.pid, port, 0.0), self.rate("method1"), 1.0, 4.0, ask)
        finally:
            process.terminate()
            process.join(10)
        self.found["floor"] = {"peak": round(most), "at_rate": found}


def require_answers(server: Server, requests: list[bytes], name: str) -> None:
    """Exit unless the first requests are answered with 200."""
    log = Generator(server.port).run(np.zeros(20), requests, np.arange(20))
    if bad := sorted({int(s) for s in log.status if not 200 <= s < 300}):
        sys.exit(f"error: {name}: the service answers {bad} instead of 200; see its log, or give --key")


def bare(port: int, cores: set[int]) -> None:
    """An ASGI application that reads the body and answers a constant of 1,000 bytes."""
    os.sched_setaffinity(0, cores)
    import uvicorn

    body = b'{"items":"' + b"x" * 988 + b'"}'
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]

    async def application(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    quiet: Numbers = {"lifespan": "off", "access_log": False, "log_level": "warning"}
    uvicorn.run(application, host="127.0.0.1", port=port, loop="uvloop", http="httptools", **quiet)


def tell(report: Report, found: Numbers, doubts: dict[str, str], items: int) -> None:
    """Add the results that load.toml declares, with doubts about their scenario, and print the checks that failed."""

    def at(path: str) -> Any:
        value: Any = found
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return value

    for entry in DECLARED["results"]:
        for of in entry.get("of", [""]):
            name, value = entry["name"].format(of=of, items=items), at(entry["value"].format(of=of))
            if value is None:
                continue
            scenario = name.partition(", ")[0]
            given: Numbers = {"more": entry.get("more", False), "items": items}
            given |= {"doubt": doubts[scenario]} if scenario in doubts else {}
            given |= {"floor": at(entry["floor"])} if "floor" in entry else {}
            beside = {peer: [at(path.format(of=of))] for peer, path in entry.get("peer", {}).items()}
            report.add(name, value, entry.get("unit", "ms"), peers=beside, **given)
    for name, (path, most) in DECLARED["checks"].items():
        if (value := at(path)) is not None and value > most:
            print(f"!! {name}: {number(value)}, wanted at most {most}")
