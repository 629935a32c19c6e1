"""Measure the service under load over HTTP: latency at a rate, swaps of the bundle, overload and recovery, start.

    python benchmarks/serve_load.py --store runs/c100k-store --seconds 60 --json runs/serve.json
    python benchmarks/serve_load.py --store runs/c100k-store --only method2 --rate 400 --event-store memory
    python benchmarks/serve_load.py --store runs/c100k-store --only overload --extra "--max-wait 20"

`benchmarks/catalogue.py` makes the stores. The script starts `twotower serve` on one core and sends requests from another. Scenarios:

method1   known users at random, ten items from the stored vector
method2   known users with a history of 50 items at random (of items with interactions), by the user tower
mixed     70 % method1, 20 % method2, 5 % similar items, 5 % events (which change what their users get)
swap      method1 without swaps, then while bundles are published and rolled back; memory and files after
overload  the peak of goodput, then three times that rate, then a normal rate again, without a pause
cold      seconds from the start of the process to /readyz

The load is an open loop: the due time of each request is drawn beforehand, it is sent then, and its latency counts from
then, so a service that pauses is charged for all requests due meanwhile (no coordinated omission). Latencies are those of
2xx replies; failures are counted separately. Lag is the delay of the generator itself: where it is not small beside the
latencies, or other processes used the cores, the line says so and the run must not be used. Goodput counts the 2xx
replies within the time.

`floor` is the limit of this machine: a bare uvicorn and httptools application that answers a constant of the same size, on
the same core, with the same generator. Compare numbers of other machines as ratios to it.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import polars as pl
from measure import machine, result, save
from open_loop import QUANTILES, Generator, Log, Numbers, percentiles, recovery, request, schedule

from twotower.store.bundle import Bundle
from twotower.store.manifest import BundleFacts
from twotower.store.store import Store

RATES = {"method1": 800.0, "method2": 500.0, "mixed": 600.0, "swap": 300.0, "overload": 300.0}
POOL = 20_000
"""Different requests of a scenario."""
HISTORY = 50
ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "POLARS_MAX_THREADS")
WINDOW = 0.5
"""Seconds of the windows in which the recovery from overload is looked at."""

# ---- processes


def family(pid: int) -> list[int]:
    """Return a process and all its descendants."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = path.read_text().rsplit(")", 1)[1].split()
            parents.setdefault(int(fields[1]), []).append(int(path.parent.name))
    out = [pid]
    for parent in out:
        out += parents.get(parent, [])
    return out


def usage(pid: int) -> dict[str, float]:
    """Return what a process and its descendants use: resident memory in MB (total, and private), CPU seconds, numbers of open
    files and sockets, and of mapped files of bundles."""
    out = dict.fromkeys(("rss_mb", "anonymous_mb", "cpu_s", "files", "sockets", "mapped"), 0.0)
    for member in family(pid):
        with suppress(OSError):
            folder = Path(f"/proc/{member}")
            status = (folder / "status").read_text()
            for name, label in (("rss_mb", "VmRSS"), ("anonymous_mb", "RssAnon")):
                found = re.search(rf"{label}:\s+(\d+)", status)
                out[name] += int(found[1]) / 1024 if found else 0.0
            fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
            out["cpu_s"] += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
            out["mapped"] += len(set(re.findall(r"\S*/bundles/.*", (folder / "maps").read_text())))
            for handle in (folder / "fd").iterdir():
                with suppress(OSError):
                    out["sockets" if handle.readlink().name.startswith("socket:") else "files"] += 1
    return out


def busy(cores: Sequence[int]) -> float:
    """Return the busy seconds of the cores since the machine started, stolen time included."""
    total = 0.0
    for line in Path("/proc/stat").read_text().splitlines():
        name, *fields = line.split()
        if name in {f"cpu{core}" for core in cores}:
            user, nice, system, _, _, irq, soft, steal = map(int, fields[:8])
            total += user + nice + system + irq + soft + steal
    return total / os.sysconf("SC_CLK_TCK")


@dataclass
class Server:
    """A ready service."""

    pid: int
    port: int
    seconds: float  # from its start to ready

    def get(self, path: str, body: Any = None, key: str = "") -> Any:
        data = None if body is None else json.dumps(body).encode()
        ask = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data)
        ask.add_header("Content-Type", "application/json")
        if key:
            ask.add_header("Authorization", f"Bearer {key}")
        with urllib.request.urlopen(ask, timeout=10) as reply:
            return json.loads(reply.read() or b"null")


@contextmanager
def serving(chosen: argparse.Namespace, store: Path) -> Iterator[Server]:
    """Run the service on its core during the block. If it does not start, print its log and exit."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [w.format(store=store, port=port) for w in shlex.split(chosen.command)]
    words += [*(["--event-store", chosen.event_store] if chosen.event_store else []), *shlex.split(chosen.extra)]
    with tempfile.NamedTemporaryFile(suffix=".log") as log:
        started = time.perf_counter()
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ | dict.fromkeys(ONE_THREAD, "1"),
            preexec_fn=functools.partial(os.sched_setaffinity, 0, chosen.server_core),
        )
        try:
            while not ready(port):
                if process.poll() is not None or time.perf_counter() > started + chosen.start_timeout:
                    tail = Path(log.name).read_text(errors="replace")[-2000:]
                    sys.exit(f"error: `{shlex.join(words)}` is not ready:\n{tail}")
                time.sleep(0.005)
            yield Server(process.pid, port, time.perf_counter() - started)
            if process.poll() is not None:
                print(f"!! the server ended unexpectedly, status {process.returncode}")
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                print("!! the server did not end within 30 s of SIGTERM; killed")
                for pid in reversed(family(process.pid)):
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                process.wait()
            told = Path(log.name).read_text(errors="replace").splitlines()
            if errors := [line for line in told if '"level":"error"' in line.replace(" ", "")]:
                print(f"!! the server logged {len(errors):,} errors, the first: {errors[0][:500]}")


def ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=2) as reply:
            return bool(reply.status == 200)
    except (OSError, urllib.error.URLError):
        return False


# ---- requests


def pool(kind: str, store: Path, seed: int, key: str) -> list[bytes]:
    """Return up to POOL different requests of a scenario, of users and items of the store's current bundle."""
    rng, bundle = np.random.default_rng(seed), Store(store).current()
    schema = tomllib.loads((bundle.folder / "config.toml").read_text(encoding="utf-8"))["schema"]
    users = ids(bundle, "users", schema["user_id"])
    met = pl.read_parquet(bundle.folder / "interactions.parquet", columns=["item"])["item"].unique().sort()
    items = np.array(ids(bundle, "items", schema["item_id"]), object)[met.to_numpy()].tolist()
    asked = rng.permutation(np.resize(np.array(users, object), POOL)).tolist()

    def one(kind: str, user: str) -> bytes:
        if kind == "method1":
            return request("POST", "/v1/recommend", {"user_id": user, "k": 10}, key)
        some = [items[i] for i in rng.integers(0, len(items), HISTORY)]
        if kind == "method2":
            body = {"user_id": user, "history": some, "k": 10, "method": 2}
            return request("POST", "/v1/recommend", body, key)
        if kind == "similar":
            return request("GET", f"/v1/items/{quote(some[0], safe='')}/similar?k=10", None, key)
        return request("POST", "/v1/events", {"user_id": user, "events": some[:1]}, key)

    if kind != "mixed":
        return [one(kind, user) for user in asked]
    kinds = rng.choice(["method1", "method2", "similar", "events"], len(asked), p=[0.7, 0.2, 0.05, 0.05])
    return [one(str(k), user) for k, user in zip(kinds, asked, strict=True)]


def ids(bundle: Bundle, table: str, column: str) -> list[str]:
    series = pl.read_parquet(bundle.folder / f"{table}.parquet", columns=[column])[column]
    return series.cast(pl.String).to_list()


# ---- the scenarios


class Bench:
    """The scenarios and their measurements."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        self.chosen = chosen
        self.found: Numbers = {}
        self.checks: list[Numbers] = []
        self.doubts: list[str] = []

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
        due = schedule(pieces, chosen.seed, chosen.arrivals)
        which = np.random.default_rng(chosen.seed + 1).integers(0, len(requests), len(due))
        cores = sorted({*chosen.server_core, *chosen.generator_core})
        generator = Generator(server.port, chosen.connections, chosen.timeout, bundles)
        before, worked = usage(server.pid), busy(cores)
        log = generator.run(due, requests, which, stop)
        after, worked = usage(server.pid), busy(cores) - worked
        spent = after["cpu_s"] - before["cpu_s"]
        return log, {
            "server_cpu": round(spent / log.wall, 3),
            "generator_cpu": round(log.cpu / log.wall, 3),
            "others_cpu": round(max(0.0, worked - spent - log.cpu) / log.wall, 3),
            "connections": log.connections,
            "before": before,
            "after": after,
        }

    def line(self, name: str, numbers: Numbers) -> None:
        """Print a line of the table."""
        shown = [f"{name:<20}"]
        for column in ("offered", "goodput"):
            shown.append(f"{numbers[column]:>9,.1f}")
        shown += [f"{numbers[column]:>7,}" for column in ("ok", "503", "429", "other", "errors")]
        shown += [cell(numbers[column], 9) for column in QUANTILES]
        shown += [cell(numbers["lag"]["p99"], 8)]
        cost = numbers.get("cost")
        if cost:
            shown.append(f"{cost['server_cpu']:>7.0%}{cost['generator_cpu']:>6.0%}{cost['after']['rss_mb']:>8,.0f}")
        print(" ".join(shown), flush=True)
        if not numbers["lag_ok"]:
            lag = numbers["lag"]
            self.doubt(f"INVALID: {name}: the generator was late, lag p99 {lag['p99']} ms, max {lag['max']} ms")
        if cost and cost["others_cpu"] > 0.1:
            self.doubt(f"DOUBTFUL: {name}: others used {cost['others_cpu']:.0%} of a core meanwhile")

    def doubt(self, text: str) -> None:
        self.doubts.append(text)
        print(f"!! {text}", flush=True)

    def check(self, name: str, value: float | None, limit: str, ok: bool) -> None:
        self.checks.append({"name": name, "value": value, "limit": limit, "ok": ok})
        print(f"   {'ok  ' if ok else 'FAIL'} {name}: {cell(value, 0)} (wanted: {limit})", flush=True)

    def steady(self, name: str) -> None:
        """Measure a scenario at a rate below saturation."""
        chosen = self.chosen
        rate = chosen.rate or RATES[name]
        requests = pool(name, chosen.store, chosen.seed, chosen.key)
        with serving(chosen, chosen.store) as server:
            require_answers(server, requests, name)
            log, cost = self.load(server, [(rate, chosen.warm_up + chosen.seconds)], requests)
        numbers = log.within(chosen.warm_up, chosen.warm_up + chosen.seconds) | {"cost": cost}
        self.found[name] = numbers
        self.line(name, numbers)
        failed = numbers["count"] - numbers["ok"]
        self.check("requests that were not answered (percentiles leave them out)", failed, "0", failed == 0)

    def swap(self) -> None:
        """Measure the same rate without swaps, then while bundles change."""
        chosen = self.chosen
        rate, quiet = chosen.rate or RATES["swap"], min(30.0, chosen.seconds)
        requests = pool("method1", chosen.store, chosen.seed, chosen.key)
        with store_copy(chosen.store) as store, serving(chosen, store) as server:
            require_answers(server, requests, "method1")
            log, cost = self.load(server, [(rate, chosen.warm_up + quiet)], requests)
            before = log.within(chosen.warm_up, chosen.warm_up + quiet) | {"cost": cost}
            self.line("swap: none", before)
            ours, theirs = multiprocessing.Pipe()
            context = multiprocessing.get_context("spawn")
            gap = chosen.seconds / chosen.swaps
            swapper = context.Process(
                target=swapping,
                args=(theirs, store, server, chosen.swaps, gap, chosen.generator_core, chosen.key),
            )
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
            cost["others_cpu"] = round(max(0.0, cost["others_cpu"] - spent / log.wall), 3)
        during = log.within(0.0, float(log.due[-1]) + 1e-9) | {"cost": cost}
        self.line(f"swap: {len(swaps)}", during)
        early, late = swaps[min(4, len(swaps) - 1)]["usage"], swaps[-1]["usage"]
        growth = {
            name: late[name] / early[name] - 1 for name in ("rss_mb", "anonymous_mb", "files", "mapped") if early[name]
        }
        taken = [s["seconds"] for s in swaps if s["seconds"] is not None]
        order = np.argsort(log.done, kind="stable")
        answered = log.bundle[order][log.bundle[order] >= 0]
        self.found["swap"] = {
            "without": before,
            "with": during,
            "swaps": swaps,
            "publishes": sum(s["action"] == "publish" for s in swaps),
            "bundles_seen": len(log.bundles),
            "changes_seen": int((np.diff(answered) != 0).sum()),
            "seconds_to_take_effect": percentiles(np.array(taken) / 1e3) if taken else None,
            "growth": growth,
        }
        failed = during["count"] - during["ok"]
        self.check("failed requests during swaps", failed, "0", failed == 0)
        served = len(taken)
        self.check("swaps that were served", served, f"{len(swaps)}", served == len(swaps))
        if before["p99"] and during["p99"]:
            ratio = during["p99"] / before["p99"]
            self.check("p99 with swaps / without", ratio, "at most 3", ratio <= 3)
        self.check(
            "memory growth after the first five, %", 100 * growth["rss_mb"], "at most 5", growth["rss_mb"] <= 0.05
        )
        for name in ("files", "mapped"):
            more = late[name] - early[name]
            self.check(f"{name} more than after the first five", more, "0", more <= 0)
        if taken:
            print(f"   a swap was served after {np.median(taken):.2f} s (median), {max(taken):.2f} s (most)")

    def overload(self) -> None:
        """Measure three times the peak, in one run with normal load before and after."""
        chosen = self.chosen
        normal = chosen.rate or RATES["overload"]
        requests = pool("method1", chosen.store, chosen.seed, chosen.key)
        with serving(chosen, chosen.store) as server:
            require_answers(server, requests, "method1")
            self.load(server, [(normal, chosen.warm_up)], requests)
            peak, steps = self.peak(server, requests, normal)
            time.sleep(1)
            calm, after = max(5.0, min(20.0, chosen.seconds / 3)), 15.0
            before = usage(server.pid)
            log, cost = self.load(server, [(normal, 2 + calm), (3 * peak, chosen.seconds), (normal, after)], requests)
        start, stop = 2 + calm, 2 + calm + chosen.seconds  # the first two seconds warm it up
        usual, over = log.within(2.0, start), log.within(start, stop) | {"cost": cost}
        recovered, bound = recovery(log.windows(2.0, start, WINDOW), log.windows(stop, stop + after, WINDOW))
        later = log.within(stop + (recovered or 0.0), stop + after)
        for name, numbers in (("overload: normal", usual), ("overload: 3x peak", over), ("overload: after", later)):
            self.line(name, numbers)
        share = over["goodput"] / peak
        self.found["overload"] = {
            "steps": steps,
            "peak": peak,
            "normal": usual,
            "over": over,
            "after": later,
            "goodput_of_peak": share,
            "share_of_503": over["503"] / max(1, over["count"]),
            "recovered_s": recovered,
            "normal_window_p99_bound_ms": bound,
            "memory_before": before,
        }
        print(
            f"   peak goodput {peak:,.0f}/s; offered {over['offered']:,.0f}/s; {over['503'] / max(1, over['count']):.1%} 503"
        )
        if share > 1.1:
            self.doubt("INVALID: overload: goodput is above the peak that was found; the search was disturbed")
        self.check("goodput under overload / peak", share, "at least 0.8", share >= 0.8)
        if usual["p99"] and over["p99"]:
            print(f"   p99 of accepted {over['p99']} ms, {over['p99'] / usual['p99']:.1f} times that at normal load")
        missing = over["retry_after_missing"]
        self.check("503 and 429 without Retry-After", missing, "0", missing == 0)
        broken = over["errors"] + over["other"]
        self.check("requests that got no proper answer", broken, "0", broken == 0)
        self.check("seconds until normal again", recovered, "at most 5", recovered is not None and recovered <= 5)

    def peak(self, server: Server, requests: list[bytes], start: float) -> tuple[float, list[Numbers]]:
        """Return the best goodput of rising rates, until two bring no more, and of rates near it (a peak that is too low would
        make the overload look better)."""
        chosen = self.chosen
        best, worse, steps = 0.0, 0, []

        def goodput(rate: float) -> float:
            log, cost = self.load(server, [(rate, 1 + chosen.step)], requests)
            numbers = log.within(1.0, 1.0 + chosen.step) | {"cost": cost}
            steps.append({"rate": rate} | numbers)
            self.line(f"peak: {rate:,.0f}/s", numbers)
            return float(numbers["goodput"])

        rate = start
        while worse < 2:
            found, rate = goodput(rate), 1.4 * rate
            worse = 0 if found > 1.03 * best else worse + 1
            best = max(best, found)
        return max(best, *(goodput(share * best) for share in (0.9, 1.0, 1.1))), steps

    def cold(self) -> None:
        """Measure the time until ready, in three starts."""
        seconds, memory = [], 0.0
        for _ in range(3):
            with serving(self.chosen, self.chosen.store) as server:
                seconds.append(round(server.seconds, 3))
                memory = usage(server.pid)["rss_mb"]
        self.found["cold"] = {"seconds": seconds, "rss_mb": memory}
        print(f"{'cold':<20} ready after {', '.join(f'{s:.2f}' for s in seconds)} s, {memory:,.0f} MB", flush=True)

    def floor(self) -> None:
        """Measure the limit of the machine: a constant reply, at the peak and at the rate of method1."""
        chosen = self.chosen
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        process = multiprocessing.get_context("spawn").Process(target=bare, args=(port, chosen.server_core))
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
            rate = chosen.rate or RATES["method1"]
            log, cost = self.load(server, [(rate, 1 + seconds)], ask)
        finally:
            process.terminate()
            process.join(10)
        numbers = log.within(1.0, 1.0 + seconds) | {"cost": cost}
        self.found["floor"] = {"peak": round(most), "at_rate": numbers}
        self.line("floor", numbers)
        print(f"   floor: a bare uvicorn gives {self.found['floor']['peak']:,}/s at most on this core")


def cell(value: float | None, width: int) -> str:
    return f"{'-' if value is None else f'{value:,.3f}' if isinstance(value, float) else f'{value:,}':>{width}}"


def require_answers(server: Server, requests: list[bytes], name: str) -> None:
    """Exit unless the first requests are answered with 200."""
    log = Generator(server.port).run(np.zeros(20), requests, np.arange(20))
    if bad := sorted({int(s) for s in log.status if not 200 <= s < 300}):
        sys.exit(f"error: {name}: the service answers {bad} instead of 200; see its log, or give --key")


# ---- what runs beside


def bare(port: int, cores: set[int]) -> None:
    """An ASGI application that reads the body and answers a constant of 1,000 bytes."""
    os.sched_setaffinity(0, cores)
    import uvicorn

    body = b'{"items":"' + b"x" * 988 + b'"}'
    head = {
        "type": "http.response.start",
        "status": 200,
        "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())],
    }

    async def application(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        await send(head)
        await send({"type": "http.response.body", "body": body})

    uvicorn.run(
        application, host="127.0.0.1", port=port, loop="uvloop", http="httptools", lifespan="off", access_log=False,
        log_level="warning",
    )  # fmt: skip


@contextmanager
def store_copy(path: Path) -> Iterator[Path]:
    """Yield a copy of the store with at least two bundles, for changes."""
    copy = path.absolute().with_name(f".{path.name}-swap-{os.getpid()}")

    def link(source: str, target: str) -> None:
        if "bundles" in Path(source).relative_to(path).parts:
            os.link(source, target)  # nothing writes to the files of a bundle
        else:
            shutil.copy2(source, target)

    try:
        shutil.copytree(path, copy, copy_function=link)
        store = Store(copy)
        if len(store.bundles()) < 2:
            republish(store, store.current())
        yield copy
    finally:
        shutil.rmtree(copy, ignore_errors=True)


def republish(store: Store, bundle: Bundle) -> Bundle:
    """Publish the contents of a bundle again."""

    def write(folder: Path) -> BundleFacts:
        for entry in bundle.manifest.files:
            (folder / entry.path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.folder / entry.path, folder / entry.path)
        return bundle.manifest

    return store.publish(write, force=True)


def swapping(pipe: Pipe, path: Path, server: Server, swaps: int, gap: float, cores: set[int], key: str) -> None:
    """Change the current bundle `swaps` times, every fifth time by a publish, and wait until the service answers from it.

    Sends a word at the start, and at the end the list of changes, each with the time until it was served and the usage
    of the server, and its own CPU seconds.
    """
    os.sched_setaffinity(0, cores)
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))  # the generator, on this core, goes before
    store = Store(path)
    other, current = ([b.id for b in store.bundles() if not b.current][-1], store.current().id)
    out: list[Numbers] = []
    pipe.send("begin")
    started, cpu = time.perf_counter(), time.process_time()
    for number in range(swaps):
        time.sleep(max(0.0, started + number * gap - time.perf_counter()))
        publish = number % 5 == 4
        if publish:
            wanted = republish(store, Bundle.open(path / "bundles" / other)).id
        else:
            wanted = store.rollback(to=other).id
        flipped, seconds = time.perf_counter(), None
        while seconds is None and time.perf_counter() < flipped + 20:
            with suppress(OSError, ValueError):
                if server.get("/v1/bundle", key=key)["bundle_id"] == wanted:
                    seconds = time.perf_counter() - flipped
            time.sleep(0.02)
        other, current = current, wanted
        if publish:
            for name in {b.id for b in store.bundles()} - {other, current}:
                shutil.rmtree(path / "bundles" / name)
        last = number in (4, swaps - 1)
        time.sleep(2.0 if last else 0.2)  # the old bundle goes when its last request is answered
        action = "publish" if publish else "rollback"
        out.append({"action": action, "to": wanted, "seconds": seconds, "usage": usage(server.pid)})
    pipe.send((out, time.process_time() - cpu))


def describe_environment(chosen: argparse.Namespace) -> Numbers:
    """Describe the machine and the bundle."""
    bundle = Store(chosen.store).current()
    described = bundle.manifest.model_dump(include={"bundle", "counts", "dims", "metric", "index"})
    return machine() | {"load": os.getloadavg()[0], "bundle": described}


def results(found: Numbers, bundle: Numbers, doubts: Sequence[str] = ()) -> list[Numbers]:
    """Return the results for the documents, in milliseconds of 2xx replies; the limit is that of the bare application.

    Doubts about a scenario go with its results.
    """
    shared = {"items": bundle["counts"]["items"], "index": bundle["index"]["kind"]}
    floor = found.get("floor", {}).get("at_rate", {})
    out: list[Numbers] = []

    def add(name: str, value: float | None, unit: str = "ms", more: bool = False, **extra: Any) -> None:
        scenario = name.partition(",")[0]
        about = [d for d in doubts if d.split(": ")[1].replace("peak", "overload") == scenario]
        if value is not None:
            told: dict[str, Any] = {"doubt": about[0]} if about else {}
            out.append(result(f"serve_load: {name}", value, unit, more=more, **shared, **extra, **told))

    for name in ("method1", "method2", "mixed"):
        if numbers := found.get(name):
            for quantile in ("p50", "p99"):
                add(f"{name}, {quantile}", numbers[quantile], floor=floor.get(quantile))
            add(f"{name}, requests a second", numbers["goodput"], "/s", True)
            add(f"{name}, requests not answered", numbers["count"] - numbers["ok"], "")
    if swap := found.get("swap"):
        for quantile in ("p50", "p99"):
            add(f"swap, {quantile}", swap["with"][quantile], peers={"without swaps": [swap["without"][quantile]]})
        add("swap, swaps", len(swap["swaps"]), "", True)
        add("swap, failed requests", swap["with"]["count"] - swap["with"]["ok"], "")
        add("swap, growth of memory", 100 * swap["growth"]["rss_mb"], "%")
    if over := found.get("overload"):
        for quantile in ("p50", "p99"):
            add(f"overload, {quantile} of accepted", over["over"][quantile])
        add("overload, peak", over["peak"], "/s", True)
        add("overload, goodput of the peak", 100 * over["goodput_of_peak"], "%", True)
        add("overload, seconds until normal again", over["recovered_s"], "s")
    if floor:
        for quantile in ("p50", "p99"):
            add(f"floor, {quantile}", floor[quantile])
        add("floor, peak", found["floor"]["peak"], "/s", True)
    if cold := found.get("cold"):
        out.append(
            result(f"serve_load: ready after the start, {shared['items']:,} items", cold["seconds"], "s", more=False)
        )
    return out


def cores(text: str) -> set[int]:
    found = {int(part) for part in text.split(",")}
    if not found <= os.sched_getaffinity(0):
        raise argparse.ArgumentTypeError(f"{text}: this process may use {sorted(os.sched_getaffinity(0))}")
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    everything = ["method1", "method2", "mixed", "swap", "overload", "cold"]
    options.add_argument("--store", type=Path, required=True)
    options.add_argument("--only", default=",".join(everything), help="scenarios to run, separated by commas")
    options.add_argument("--seconds", type=float, default=60.0, help="measured seconds of a scenario")
    options.add_argument("--warm-up", type=float, default=5.0, help="seconds of load before the measurement")
    options.add_argument("--rate", type=float, help=f"requests a second; by default {RATES}")
    options.add_argument("--arrivals", choices=["poisson", "constant"], default="poisson")
    options.add_argument("--swaps", type=int, default=50)
    options.add_argument("--step", type=float, default=4.0, help="seconds of each rate in the search for the peak")
    options.add_argument("--connections", type=int, default=512, help="maximum number of connections")
    options.add_argument(
        "--timeout", type=float, default=10.0, help="timeout of a request, in seconds from its due time"
    )
    options.add_argument("--start-timeout", type=float, default=120.0)
    options.add_argument("--event-store", default="", help="--event-store of the server")
    options.add_argument("--extra", default="", help="more flags of the server, in one argument")
    options.add_argument("--key", default="", help="API key to send, where --extra has --keys")
    own = shlex.join([str(Path(sys.executable).with_name("twotower")), "serve"]) + " --store {store} --port {port}"
    options.add_argument("--command", default=own, help="command of another service to start")
    options.add_argument(
        "--server-core", type=cores, default="0", help="core of the server, or several separated by commas"
    )
    options.add_argument("--generator-core", type=cores, default="1")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--no-floor", action="store_true", help="skip the limit of the machine")
    options.add_argument("--json", type=Path, help="JSON file for all measurements")
    options.add_argument("--out", type=Path, help="JSON file of results, in the form of benchmarks/measure.py")
    chosen = options.parse_args()
    names = chosen.only.split(",")
    if strange := sorted(set(names) - set(everything)):
        options.error(f"--only: no scenario {strange[0]!r}; choose {', '.join(everything)}")
    if "swap" in names and chosen.swaps < 10:
        options.error(f"--swaps {chosen.swaps}: growth is counted from the fifth on; take at least 10")
    told = describe_environment(chosen)
    if chosen.server_core & chosen.generator_core:
        print("!! INVALID: the server and the generator share a core")
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, chosen.generator_core)
    print(f"{told['cpu']}, {told['cores']} cores, load {told['load']:.2f}; {told['bundle']['counts']['items']:,} items")
    columns = ["ok", "503", "429", "other", "errors"]
    print(
        f"{'':<20} {'offered':>9} {'goodput':>9} {' '.join(f'{c:>7}' for c in columns)} "
        f"{' '.join(f'{q:>9}' for q in QUANTILES)} {'lag p99':>8} {'server':>7}{'gen.':>6}{'MB':>8}"
    )
    bench = Bench(chosen)
    scenarios: dict[str, Callable[[], None]] = {"swap": bench.swap, "overload": bench.overload, "cold": bench.cold}
    if not chosen.no_floor:
        bench.floor()
    for name in names:
        scenarios.get(name, functools.partial(bench.steady, name))()
    if bench.doubts:
        print(f"!! {len(bench.doubts)} lines are invalid; stop other work on these cores and run again")
    if chosen.json:
        settings = {
            n: sorted(v) if isinstance(v, set) else str(v) if isinstance(v, Path) else v
            for n, v in vars(chosen).items()
        }
        out = {"machine": told, "settings": settings, **bench.found, "checks": bench.checks, "doubts": bench.doubts}
        chosen.json.write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")
    os.sched_setaffinity(0, allowed)  # the machine's limits are those of all its cores
    save(chosen.out, results(bench.found, told["bundle"], bench.doubts), len(allowed))
    if failed := [check["name"] for check in bench.checks if not check["ok"]]:
        print(f"!! {len(failed)} checks failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
