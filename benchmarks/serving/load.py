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
from benchmarks.lib.processes import Server, free_port, ready, serving, usage
from benchmarks.lib.report import Report, declared
from benchmarks.serving.open_loop import QUANTILES, Generator, Log, recovery, schedule
from benchmarks.serving.requests import pool, request
from benchmarks.serving.swaps import store_copy, swapping
from twotower.store.store import Store

ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "POLARS_MAX_THREADS")
WINDOW = 0.5
"""Seconds of the windows in which the recovery from overload is looked at."""
DECLARED: Numbers = declared(__file__)


def busy(cores: set[int]) -> float:
    """Return the busy seconds of the cores since the machine started, stolen time included."""
    total = 0.0
    for line in Path("/proc/stat").read_text().splitlines():
        name, *fields = line.split()
        if name in {f"cpu{core}" for core in cores}:
            user, nice, system, _, _, irq, soft, steal = map(int, fields[:8])
            total += user + nice + system + irq + soft + steal
    return total / os.sysconf("SC_CLK_TCK")


class Bench:
    """The scenarios and their measurements."""

    def __init__(self, chosen: Namespace) -> None:
        self.chosen, self.store = chosen, Path(chosen.store)
        self.server_core, self.generator_core = set(chosen.server_core), set(chosen.generator_core)
        self.found: Numbers = {}
        self.doubts: dict[str, str] = {}  # by scenario
        self.failed: list[str] = []

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
        self,
        server: Server,
        pieces: Sequence[tuple[float, float]],
        requests: list[bytes],
        stop: Callable[[], bool] = lambda: False,
        bundles: bool = False,
    ) -> tuple[Log, Numbers]:
        """Return one open-loop run and its cost: CPU as shares of a core."""
        chosen = self.chosen
        due = schedule(pieces, chosen.seed)
        which = np.random.default_rng(chosen.seed + 1).integers(0, len(requests), len(due))
        cores = self.server_core | self.generator_core
        generator = Generator(server.port, chosen.connections, chosen.timeout, bundles)
        before, worked = usage(server.pid), busy(cores)
        log = generator.run(due, requests, which, stop)
        after, worked = usage(server.pid), busy(cores) - worked
        spent = after["cpu_s"] - before["cpu_s"]
        others = max(0.0, worked - spent - log.cpu)
        shares = {"server": spent / log.wall, "generator": log.cpu / log.wall, "others": others / log.wall}
        return log, shares | {"rss_mb": after["rss_mb"]}

    def line(self, name: str, numbers: Numbers, cost: Numbers | None = None) -> None:
        """Print a line of the table, and doubts about it."""
        counts = [f"{numbers[column]:>7,}" for column in ("ok", "503", "429", "other", "errors")]
        latency = [cell(numbers[column], 9) for column in QUANTILES]
        shown = [f"{name:<20} {numbers['offered']:>9,.1f} {numbers['goodput']:>9,.1f}", *counts, *latency]
        shown.append(cell(numbers["lag"]["p99"], 8))
        if cost:
            shown.append(f"{cost['server']:>7.0%}{cost['generator']:>6.0%}{cost['rss_mb']:>8,.0f}")
        print(" ".join(shown), flush=True)
        scenario = name.partition(": ")[0].replace("peak", "overload")
        if not numbers["lag_ok"]:
            lag = numbers["lag"]
            self.doubt(
                scenario, f"INVALID: {name}: the generator was late, lag p99 {lag['p99']} ms, max {lag['max']} ms"
            )
        if cost and cost["others"] > 0.1:
            self.doubt(scenario, f"DOUBTFUL: {name}: others used {cost['others']:.0%} of a core meanwhile")

    def doubt(self, scenario: str, text: str) -> None:
        self.doubts.setdefault(scenario, text)
        print(f"!! {text}", flush=True)

    def check(self, name: str, value: float | None, limit: str, ok: bool) -> None:
        print(f"   {'ok  ' if ok else 'FAIL'} {name}: {cell(value, 0)} (wanted: {limit})", flush=True)
        self.failed += [] if ok else [name]

    def steady(self, name: str) -> None:
        """Measure a scenario at a rate below saturation."""
        requests, start, stop = self.requests(name), self.chosen.warm_up, self.chosen.warm_up + self.chosen.seconds
        with self.serve(self.store) as server:
            require_answers(server, requests, name)
            log, cost = self.load(server, [(self.rate(name), stop)], requests)
        self.found[name] = numbers = log.within(start, stop)
        self.line(name, numbers, cost)
        failed = numbers["unanswered"]
        self.check("requests that were not answered (percentiles leave them out)", failed, "0", failed == 0)

    def swap(self) -> None:
        """Measure the same rate without swaps, then while bundles change."""
        chosen = self.chosen
        rate, start, quiet = self.rate("swap"), chosen.warm_up, min(30.0, chosen.seconds)
        requests = self.requests("method1")
        with store_copy(self.store) as store, self.serve(store) as server:
            require_answers(server, requests, "method1")
            log, cost = self.load(server, [(rate, start + quiet)], requests)
            before = log.within(start, start + quiet)
            self.line("swap: none", before, cost)
            ours, theirs = multiprocessing.Pipe()
            gap = chosen.seconds / chosen.swaps
            given = (theirs, store, server, chosen.swaps, gap, self.generator_core, chosen.key)
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
        during = log.within(0.0, float(log.due[-1]) + 1e-9)
        self.line(f"swap: {len(swaps)}", during, cost)
        early, late = swaps[4]["usage"], swaps[-1]["usage"]
        growth = 100 * (late["rss_mb"] / early["rss_mb"] - 1)
        taken = [s["seconds"] for s in swaps if s["seconds"] is not None]
        self.found["swap"] = {"without": before, "with": during, "swaps": len(swaps), "growth": growth}
        failed, served = during["unanswered"], len(taken)
        self.check("failed requests during swaps", failed, "0", failed == 0)
        self.check("swaps that were served", served, f"{len(swaps)}", served == len(swaps))
        self.check("bundles that answered", len(log.bundles), "at least 2", len(log.bundles) >= 2)
        if before["p99"] and during["p99"]:
            ratio = during["p99"] / before["p99"]
            self.check("p99 with swaps / without", ratio, "at most 3", ratio <= 3)
        self.check("memory growth after the first five, %", growth, "at most 5", growth <= 5)
        for name in ("files", "mapped"):
            more = late[name] - early[name]
            self.check(f"{name} more than after the first five", more, "0", more <= 0)
        if taken:
            print(f"   a swap was served after {np.median(taken):.2f} s (median), {max(taken):.2f} s (most)")

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
        usual, over = log.within(2.0, start), log.within(start, stop)
        recovered, _ = recovery(log.windows(2.0, start, WINDOW), log.windows(stop, stop + after, WINDOW))
        self.line("overload: normal", usual)
        self.line("overload: 3x peak", over, cost)
        self.line("overload: after", log.within(stop + (recovered or 0.0), stop + after))
        share = over["goodput"] / peak
        told = {"peak": peak, "over": over, "goodput_of_peak": 100 * share, "recovered_s": recovered}
        self.found["overload"] = told
        refused = over["503"] / max(1, over["count"])
        print(f"   peak goodput {peak:,.0f}/s; offered {over['offered']:,.0f}/s; {refused:.1%} 503")
        if share > 1.1:
            self.doubt(
                "overload", "INVALID: overload: goodput is above the peak that was found; the search was disturbed"
            )
        self.check("goodput under overload / peak", share, "at least 0.8", share >= 0.8)
        missing, broken = over["retry_after_missing"], over["errors"] + over["other"]
        self.check("503 and 429 without Retry-After", missing, "0", missing == 0)
        self.check("requests that got no proper answer", broken, "0", broken == 0)
        self.check("seconds until normal again", recovered, "at most 5", recovered is not None and recovered <= 5)

    def peak(self, server: Server, requests: list[bytes], rate: float) -> float:
        """Return the best goodput of rising rates, until two bring no more, and of rates near it (a peak that is too low would
        make the overload look better)."""

        def goodput(rate: float) -> float:
            log, cost = self.load(server, [(rate, 1 + self.chosen.step)], requests)
            numbers = log.within(1.0, 1.0 + self.chosen.step)
            self.line(f"peak: {rate:,.0f}/s", numbers, cost)
            return float(numbers["goodput"])

        best, worse = 0.0, 0
        while worse < 2:
            found, rate = goodput(rate), 1.4 * rate
            worse = 0 if found > 1.03 * best else worse + 1
            best = max(best, found)
        return max(best, *(goodput(share * best) for share in (0.9, 1.0, 1.1)))

    def cold(self) -> None:
        """Measure the time until ready, in three starts."""
        self.found["cold"], memory = [], 0.0
        for _ in range(3):
            with self.serve(self.store) as server:
                self.found["cold"].append(round(server.seconds, 3))
                memory = usage(server.pid)["rss_mb"]
        print(f"{'cold':<20} ready after {self.found['cold']} s, {memory:,.0f} MB", flush=True)

    def floor(self) -> None:
        """Measure the limit of the machine: a constant reply, at the peak and at the rate of method1."""
        port = free_port()
        process = multiprocessing.get_context("spawn").Process(target=bare, args=(port, self.server_core))
        process.start()
        started = time.perf_counter()
        while not ready(port):
            if not process.is_alive() or time.perf_counter() > started + 30:
                sys.exit("error: the bare application does not start")
            time.sleep(0.01)
        try:
            assert process.pid is not None
            server, seconds = Server(process.pid, port, time.perf_counter() - started), 4.0
            ask = [request("POST", "/v1/recommend", {"user_id": str(n), "k": 10}) for n in range(1000)]
            most = 5_000.0
            for last in (False, True):  # all are due at once: 32 connections that never rest
                due = np.zeros(round(most * (seconds if last else 1)))
                busiest = Generator(port, 32, 60.0).run(due, ask, np.arange(len(due)) % len(ask))
                most = float((busiest.status == 200).sum() / busiest.wall)
            log, cost = self.load(server, [(self.rate("method1"), 1 + seconds)], ask)
        finally:
            process.terminate()
            process.join(10)
        numbers = log.within(1.0, 1.0 + seconds)
        self.found["floor"] = {"peak": round(most), "at_rate": numbers}
        self.line("floor", numbers, cost)
        print(f"   floor: a bare uvicorn gives {most:,.0f}/s at most on this core")


def cell(value: float | None, width: int) -> str:
    return f"{'-' if value is None else f'{value:,.3f}' if isinstance(value, float) else f'{value:,}':>{width}}"


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

    uvicorn.run(
        application, host="127.0.0.1", port=port, loop="uvloop", http="httptools", lifespan="off", access_log=False,
        log_level="warning",
    )  # fmt: skip


def tell(report: Report, found: Numbers, doubts: dict[str, str], items: int) -> None:
    """Add the results that load.toml declares; doubts about a scenario go with its results."""

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


def main(chosen: Namespace, report: Report) -> None:
    allowed, bench = os.sched_getaffinity(0), Bench(chosen)
    if not bench.server_core | bench.generator_core <= allowed:
        sys.exit(f"error: this process may use the cores {sorted(allowed)}")
    if "swap" in chosen.only and chosen.swaps < 10:
        sys.exit(f"error: --swaps {chosen.swaps}: growth is counted from the fifth on; take at least 10")
    bundle = Store(bench.store).current().manifest
    report.facts["index"] = bundle.index.kind
    if bench.server_core & bench.generator_core:
        print("!! INVALID: the server and the generator share a core")
    os.sched_setaffinity(0, bench.generator_core)
    counts = " ".join(f"{c:>7}" for c in ("ok", "503", "429", "other", "errors"))
    latency = " ".join(f"{q:>9}" for q in QUANTILES)
    print(f"{'':<20} {'offered':>9} {'goodput':>9} {counts} {latency} {'lag p99':>8} {'server':>7}{'gen.':>6}{'MB':>8}")
    if not chosen.no_floor:
        bench.floor()
    scenarios = {"swap": bench.swap, "overload": bench.overload, "cold": bench.cold}
    for name in chosen.only:
        scenarios.get(name, lambda name=name: bench.steady(name))()
    os.sched_setaffinity(0, allowed)  # the machine's limits are those of all its cores
    tell(report, bench.found, bench.doubts, bundle.counts.items)
    if bench.doubts:
        print(f"!! {len(bench.doubts)} scenarios are invalid; stop other work on these cores and run again")
    if bench.failed:
        print(f"!! {len(bench.failed)} checks failed: {'; '.join(bench.failed)}")
