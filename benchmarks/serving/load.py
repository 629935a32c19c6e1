import json
import os
import shlex
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lib.machine import Numbers
from benchmarks.lib.processes import Conversation, Server, busy, call, code, free_port, ready, serving, started, usage
from benchmarks.lib.report import Report, declared, number
from benchmarks.lib.rounds import in_turns
from benchmarks.serving.open_loop import Generator, Log, recovery, schedule
from benchmarks.serving.requests import pool, request
from benchmarks.serving.swaps import store_copy, swapping
from twotower.retrieval.request import Request
from twotower.retrieval.retriever import Retriever
from twotower.store.store import Store

ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "POLARS_MAX_THREADS")
WINDOW = 0.5  # seconds of the windows in which the recovery from overload is looked at
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
    report.facts |= {"index": bundle.index.kind, "width": bundle.dims}
    os.sched_setaffinity(0, bench.generator_core)
    found: Numbers = {}
    own = {"floor": bench.floor, "swap": bench.swap, "overload": bench.overload, "cold": bench.cold, "cost": bench.cost}
    for name in [*([] if chosen.no_floor else ["floor"]), *chosen.only]:
        found[name] = own[name]() if name in own else bench.steady(name)
    if {"cost", "overload"} <= set(found):
        refused = found["cost"]["refusal"] / statistics.median(found["cost"]["method1"])
        left = max(0.0, (1 - 3 * refused) / (1 - refused))  # of the peak's answers, at three times its rate
        found["overload"]["of_left"] = found["overload"]["goodput_of_peak"] / (100 * left) if left else None
    os.sched_setaffinity(0, allowed)  # the machine's limits are those of all its cores
    tell(report, found, bench.doubts, bundle.counts.items)


class Bench:
    def __init__(self, chosen: Namespace) -> None:
        self.chosen, self.store = chosen, Path(chosen.store)
        self.server_core, self.generator_core = set(chosen.server_core), set(chosen.generator_core)
        self.service = (shlex.split(chosen.extra), os.environ | dict.fromkeys(ONE_THREAD, "1"), self.server_core)
        self.doubts: dict[str, str] = {}  # by scenario

    @contextmanager
    def asked(self, store: Path, kind: str) -> Iterator[tuple[Server, list[bytes]]]:
        """Run the service within the block. Yields it and the requests of a scenario, the first one answered."""
        shares = DECLARED["mixed"] if kind == "mixed" else {kind: 1.0}
        requests = pool(shares, self.store)
        with serving(store, *self.service) as server:
            log = Generator(server.port).run(np.zeros(20), requests, np.arange(20))
            if bad := sorted({int(s) for s in log.status if not 200 <= s < 300}):
                sys.exit(f"error: {kind}: the service answers {bad} instead of 200; see its log")
            yield server, requests

    def rate(self, scenario: str) -> float:
        return float(self.chosen.rate or DECLARED["rates"][scenario])

    def load(
        self, server: Server, pieces: Sequence[tuple[float, float]], requests: list[bytes],
        stop: Callable[[], bool] = bool,
    ) -> tuple[Log, Numbers]:  # fmt: skip
        """Return one open-loop run and its cost: CPU as shares of a core."""
        due, cores = schedule(pieces), self.server_core | self.generator_core
        which = np.random.default_rng(1).integers(0, len(requests), len(due))
        generator = Generator(server.port, self.chosen.connections, self.chosen.timeout)
        before, worked = usage(server.pid), busy(cores)
        log = generator.run(due, requests, which, stop)
        after, worked = usage(server.pid), busy(cores) - worked
        spent = {"server": after["cpu_s"] - before["cpu_s"], "generator": log.cpu}
        spent["others"] = max(0.0, worked - sum(spent.values()))
        return log, {who: seconds / log.wall for who, seconds in spent.items()} | {"rss_mb": after["rss_mb"]}

    def measure(
        self, name: str, server: Server, rate: float, start: float, seconds: float, ask: list[bytes]
    ) -> Numbers:
        """Return the numbers of some seconds at a rate, after `start` seconds of it."""
        log, cost = self.load(server, [(rate, start + seconds)], ask)
        return self.line(name, log.within(start, start + seconds), cost)

    def line(self, name: str, numbers: Numbers, cost: Numbers) -> Numbers:
        """Print the numbers of a load, and doubts about it."""
        told = {key: value for key, value in numbers.items() if key != "lag_ok"} | cost
        print(f"{name:<20}", "  ".join(f"{key} {number(value)}" for key, value in told.items()), flush=True)
        scenario = name.partition(": ")[0].replace("peak", "overload")
        if not numbers["lag_ok"]:
            self.doubt(scenario, f"INVALID: {name}: the generator was late, lag p99 {numbers['lag']} ms")
        if cost.get("others", 0.0) > 0.1:
            self.doubt(scenario, f"DOUBTFUL: {name}: others used {cost['others']:.0%} of a core meanwhile")
        return numbers

    def doubt(self, scenario: str, text: str) -> None:
        self.doubts.setdefault(scenario, text)
        print(f"!! {text}", flush=True)

    def steady(self, name: str) -> Numbers:
        """Measure a scenario at a rate below saturation."""
        with self.asked(self.store, name) as (server, requests):
            return self.measure(name, server, self.rate(name), self.chosen.warm_up, self.chosen.seconds, requests)

    def swap(self) -> Numbers:
        """Measure the same rate without swaps, then while bundles change."""
        chosen, rate = self.chosen, self.rate("swap")
        with store_copy(self.store) as store, self.asked(store, "method1") as (server, requests):
            quiet = min(30.0, chosen.seconds)
            before = self.measure("swap: none", server, rate, chosen.warm_up, quiet, requests)
            given = (str(store), server.pid, server.port, chosen.swaps, chosen.seconds / chosen.swaps)
            with Conversation(swapping, *given) as swapper:
                swapper.hear()  # it begins
                limit = 4 * chosen.seconds + 10 * chosen.swaps  # every swap is waited for
                log, cost = self.load(server, [(rate, limit)], requests, swapper.is_speaking)
                if not (told := swapper.hear()):
                    sys.exit("error: the process that publishes has failed, see above")
        swaps, spent = told
        cost["others"] = max(0.0, cost["others"] - spent / log.wall)
        during = self.line(f"swap: {len(swaps)}", log.within(0.0, float(log.due[-1]) + 1e-9), cost)
        early, late = swaps[4], swaps[-1]
        taken = [s["seconds"] for s in swaps if s["seconds"] is not None]
        return {
            "without": before, "with": during, "swaps": len(swaps), "unserved": len(swaps) - len(taken), "taken": taken,
            "ratio": during["p99"] / before["p99"], "growth": 100 * (late["rss_mb"] / early["rss_mb"] - 1),
            "files": late["files"] - early["files"], "mapped": late["mapped"] - early["mapped"],
        }  # fmt: skip

    def overload(self) -> Numbers:
        """Measure three times the peak, in one run with normal load before and after."""
        chosen, normal = self.chosen, self.rate("overload")
        start = 2 + max(5.0, min(20.0, chosen.seconds / 3))  # the first two seconds warm it up
        stop, after = start + chosen.seconds, 15.0
        with self.asked(self.store, "method1") as (server, requests):
            self.load(server, [(normal, chosen.warm_up)], requests)
            peak = self.peak(server, requests, normal)
            time.sleep(1)
            log, cost = self.load(server, [(normal, start), (3 * peak, chosen.seconds), (normal, after)], requests)
        self.line("overload: normal", log.within(2.0, start), {})
        over = self.line("overload: 3x peak", log.within(start, stop), cost)
        recovered = recovery(log.windows(2.0, start, WINDOW), log.windows(stop, stop + after, WINDOW))
        self.line("overload: after", log.within(stop + (recovered or 0.0), stop + after), {})
        share, broken = 100 * over["goodput"] / peak, over["errors"] + over["other"]
        if share > 110:
            self.doubt("overload", "INVALID: overload: goodput is above the peak that was found")
        told = {"peak": peak, "over": over, "goodput_of_peak": share, "lost": 100 - share, "broken": broken}
        return told | {"recovered_s": after if recovered is None else recovered}

    def peak(self, server: Server, requests: list[bytes], rate: float) -> float:
        """Return the best goodput of rising rates, until two bring no more, and of rates near it (a peak that is too
        low would make the overload look better)."""

        def goodput(rate: float) -> float:
            return float(self.measure(f"peak: {rate:,.0f}/s", server, rate, 1.0, self.chosen.step, requests)["goodput"])

        best, worse = 0.0, 0
        while worse < 2:
            found, rate = goodput(rate), 1.4 * rate
            worse = 0 if found > 1.03 * best else worse + 1
            best = max(best, found)
        return max(best, *(goodput(share * best) for share in (0.9, 1.0, 1.1)))

    def cold(self) -> list[float]:
        """Return the seconds until ready of three starts."""
        taken = []
        for _ in range(3):
            with serving(self.store, *self.service) as server:
                taken.append(round(server.seconds, 3))
        return taken

    def cost(self) -> Numbers:
        """Measure the processor time of a request of each method and of the bare server, in turns, that of the user
        tower alone, and that of a refusal."""
        rounds, count = self.chosen.rounds, self.chosen.requests
        given = (str(self.store), min(count, 500), rounds)
        with self.bare() as (server, ask), self.asked(self.store, "method1") as (ours, method1):
            method2 = pool({"method2": 1.0}, self.store)
            kinds = {"bare": (server, ask), "method1": (ours, method1), "method2": (ours, method2)}
            works = {name: partial(self.spent, *of, count) for name, of in kinds.items()}
            found: Numbers = {name: of[1:] for name, of in in_turns(works, rounds + 1).items()}  # the first warms up
            found["limit"] = statistics.median(found["bare"])
            own = statistics.median(found["method1"])
            log, cost = self.load(ours, [(6e3 / own, self.chosen.step)], method1)
            answered = log.status == 200
            found["refusal"] = (cost["server"] * log.wall * 1e3 - answered.sum() * own) / max(1, (~answered).sum())
        os.sched_setaffinity(0, self.server_core)  # which the child takes over
        found["tower"] = call(tower_times, *given, environment=self.service[1])[1]
        os.sched_setaffinity(0, self.generator_core)
        beyond = statistics.median(found["method2"]) - own
        found["of_tower"] = beyond / statistics.median(found["tower"])
        print("cost", "  ".join(f"{name} {np.round(of, 4)}" for name, of in found.items()), flush=True)
        return found

    def spent(self, server: Server, requests: list[bytes], count: int) -> float:
        """Return the ms of processor time of a request, of many that four connections send without a rest."""
        before = usage(server.pid)["cpu_s"]
        log = Generator(server.port, 4, 60.0).run(np.zeros(count), requests, np.arange(count) % len(requests))
        if bad := sorted({int(status) for status in log.status if status != 200}):
            sys.exit(f"error: cost: the server answers {bad} instead of 200")
        return 1e3 * (usage(server.pid)["cpu_s"] - before) / count

    def floor(self) -> Numbers:
        """Measure the limit of the machine: a constant reply, at the peak and at the rate of method1."""
        with self.bare() as (server, ask):
            # All are due at once: 32 connections that never rest.
            busiest = Generator(server.port, 32, 60.0).run(np.zeros(40_000), ask, np.arange(40_000) % len(ask))
            found = self.measure("floor", server, self.rate("method1"), 1.0, 4.0, ask)
        return {"peak": round((busiest.status == 200).sum() / busiest.wall), "at_rate": found}

    @contextmanager
    def bare(self) -> Iterator[tuple[Server, list[bytes]]]:
        """Run the bare server within the block. Yields it and its requests."""
        port = free_port()
        words = [sys.executable, "-c", code(bare, port)]
        with started(words, lambda: ready(port), cores=self.server_core) as (pid, _, _):
            ask = [request("POST", "/v1/recommend", {"user_id": str(n), "k": 10}) for n in range(1000)]
            yield Server(pid, port, 0.0), ask


def bare(port: int) -> None:
    """An ASGI application that reads the body and answers a constant of 1,000 bytes."""
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


def tower_times(store: str, count: int, rounds: int) -> list[float]:
    """Return the ms of processor time of a run of the user tower on the inputs of requests of method 2, of each
    round."""
    retriever = Retriever(Store(store).current())
    bodies = [json.loads(one.partition(b"\r\n\r\n")[2]) for one in pool({"method2": 1.0}, Path(store))[:count]]
    asked = [Request(body["user_id"], history=body["history"]) for body in bodies]
    feeds = [retriever.user_inputs.read(retriever.query(one)).feed for one in asked]
    found = []
    for _ in range(rounds + 1):
        before = time.process_time()
        for feed in feeds:
            retriever.loaded.tower(feed)
        found.append(1e3 * (time.process_time() - before) / count)
    return found[1:]


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
            facts: Numbers = {"doubt": doubts[scenario]} if scenario in doubts else {}
            facts |= {"width": None} if scenario == "floor" else {}  # it has no vectors
            beside = {peer: [at(path.format(of=of))] for peer, path in entry.get("peer", {}).items()}
            given: Numbers = {"more": entry.get("more", False), "peers": beside, "floor": at(entry.get("floor", ""))}
            report.add(name, value, entry.get("unit", "ms"), items=items, **given, **facts)
    for name, (path, most) in DECLARED["checks"].items():
        if (value := at(path)) is not None and value > most:
            print(f"!! {name}: {number(value)}, wanted at most {most}")
