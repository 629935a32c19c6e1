"""Functions of all benchmarks: the machine and its limits, medians and ranges over rounds, and the form of a result.

A result holds the name of a measurement, its command, the results of other tools for the same work in the same run, and
the limit of the machine. A file of results (`--out`) holds the machine, its limits with these threads, and the results by
name; a script that writes into a file keeps the results of other names, so several may share one. `benchmarks/table.py`
makes the tables of the documents out of such files.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

Numbers = dict[str, Any]
PACKAGES = (
    "twotower",
    "torch",
    "numpy",
    "polars",
    "faiss-cpu",
    "onnx",
    "onnxruntime",
    "fastapi",
    "uvicorn",
    "uvloop",
    "httptools",
    "torch-rechub",
    "recbole",
    "implicit",
    "scipy",
    "scikit-learn",
    "bm25s",
)
ENVIRONMENT = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
"""Variables that change what a number is worth."""

# ---- the machine -------------------------------------------------------------------------------------------------


def machine() -> Numbers:
    """Describe the machine and the installed packages."""
    model = re.search(r"model name\s*:\s*(.*)", _read("/proc/cpuinfo"))
    memory = re.search(r"MemTotal:\s*(\d+)", _read("/proc/meminfo"))
    return {
        "cpu": model[1].strip() if model else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(int(memory[1]) / 2**20, 1) if memory else None,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": versions(),
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        "blas": blas(),
    }


def blas() -> dict[str, str]:
    """Return the kernels of every OpenBLAS in this process, by the package that contains it."""
    found = {}
    for path in set(re.findall(r"/\S*openblas\S*\.so\S*", _read("/proc/self/maps"))):
        library = ctypes.CDLL(path)
        for name in ("openblas_get_corename", "scipy_openblas_get_corename64_", "scipy_openblas_get_corename"):
            if hasattr(library, name):
                core = getattr(library, name)
                core.restype = ctypes.c_char_p
                package = re.search(r"(\w+?)(_cpu)?\.libs", path)
                found[package[1] if package else Path(path).name] = core().decode()
    return found


def _read(path: str) -> str:
    with suppress(OSError):
        return Path(path).read_text(encoding="utf-8")
    return ""


def versions(names: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Return the versions of the installed packages."""
    found = {}
    for name in names:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def tool(package: str) -> str:
    """Return a package and its version, the label in the tables."""
    return f"{package} {versions([package]).get(package, '')}".strip()


def limits(threads: int) -> Numbers:
    """Measure the limits of the machine: products in both precisions, and reading memory."""
    return {
        "threads": threads,
        "fp32_gflops": product_rate("float32", 0.3) / 1e9,
        "bf16_gflops": product_rate("bfloat16", 0.3) / 1e9,
        "read_gb_per_s": read_rate(threads) / 1e9,
    }


def product_rate(dtype: str = "float32", seconds: float = 0.5, size: int = 2048, device: str = "cpu") -> float:
    """Return the operations per second of the best of many products of two large matrices, with the present threads."""
    import torch

    a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))

    def product() -> None:
        a @ b
        if device != "cpu":
            torch.cuda.synchronize()

    product()
    return 2 * size**3 / min(repeat(product, seconds))


def read_rate(threads: int, megabytes: int = 512, seconds: float = 0.5) -> float:
    """Return the bytes per second of the best of many passes over an array larger than the caches, shared among the threads."""
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np

    shares = np.array_split(np.ones(megabytes * 2**17), threads)
    with ThreadPoolExecutor(threads) as pool:
        return megabytes * 2**20 / min(repeat(lambda: list(pool.map(np.sum, shares)), seconds))


def repeat(work: Callable[[], object], seconds: float) -> list[float]:
    """Return the seconds of each call, until their sum reaches `seconds`; at least two calls."""
    times: list[float] = []
    while len(times) < 2 or sum(times) < seconds:
        times.append(timed(work))
    return times


def timed(work: Callable[[], object]) -> float:
    """Return the seconds of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


# ---- results -----------------------------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> Numbers:
    """Return median, mean and range over rounds or seeds."""
    if not values:
        raise ValueError("no round was measured")
    return {
        "median": statistics.median(values),
        "mean": statistics.fmean(values),
        "low": min(values),
        "high": max(values),
        "rounds": len(values),
    }


def result(
    name: str,
    values: float | Sequence[float],
    unit: str,
    *,
    more: bool = True,
    peers: Mapping[str, Sequence[float]] | None = None,
    floor: float | None = None,
    **extra: Any,
) -> Numbers:
    """Return one measured number as a result.

    `more`: larger is better. `peers`: the rounds of other tools in the same unit and run, by name and version; `ratio_to_peer` is how many times as
    good as the best of them this is. `floor`: the limit of the machine in the same unit; `ratio_to_floor` is the ratio to it, 1 at
    best. `doubt`: why the number must not be used.
    """
    own = spread([values] if isinstance(values, int | float) else values)
    beside = {peer: spread(given) for peer, given in (peers or {}).items() if given}
    for found in beside.values():
        found["ratio"] = _better(own["median"], found["median"], more)
    return {
        "name": name,
        "value": own["median"],
        "unit": unit,
        "better": "more" if more else "less",
        **own,
        "peer": beside,
        "ratio_to_peer": min((found["ratio"] for found in beside.values()), default=None),
        "floor": floor,
        "ratio_to_floor": None if floor is None else _better(floor, own["median"], more),
        "script": Path(sys.argv[0]).stem,
        "command": command(),
        "load": round(os.getloadavg()[0], 2),
        **extra,
    }


def _better(one: float, other: float, more: bool) -> float | None:
    above, below = (one, other) if more else (other, one)
    return above / below if below and math.isfinite(above / below) else None


def command() -> str:
    """Return the running command without the folders of this machine and without --out."""
    words, given = [], iter(sys.argv[1:])
    for word in given:
        if word == "--out":
            next(given, None)
        elif not word.startswith("--out="):
            words.append(Path(word).name if word.startswith("/") else word)
    data = [f"TWOTOWER_DATA={Path(os.environ['TWOTOWER_DATA']).name}"] if os.environ.get("TWOTOWER_DATA") else []
    return " ".join([*data, f"python benchmarks/{Path(sys.argv[0]).name}", shlex.join(words)]).strip()


def options(doc: str | None, threads: int = 2, rounds: int = 0) -> argparse.ArgumentParser:
    """Return a command line parser with the options of every script."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=threads)
    if rounds:
        parser.add_argument(
            "--rounds", type=int, default=rounds, help="number of rounds; each tool runs once per round"
        )
    parser.add_argument("--out", type=Path, help="JSON file of results; results with other names stay in it")
    return parser


def load(path: Path | None) -> Numbers:
    """Read a file of results; empty if it is missing."""
    if path is None or not path.exists():
        return {"results": [], "rows": {}}
    found: Numbers = json.loads(path.read_text(encoding="utf-8"))
    if "results" not in found:
        raise SystemExit(f"{path}: no file of results; choose another --out")
    return found


def save(path: Path | None, results: Sequence[Numbers], threads: int, rows: Mapping[str, Any] | None = None) -> None:
    """Add results to a file; `rows`, by name, are what a script needs to continue."""
    if path is None:
        return
    old = load(path)
    names = {entry["name"] for entry in results}
    found = {
        "machine": machine(),
        "limits": old["limits"] if old.get("limits", {}).get("threads") == threads else limits(threads),
        "results": [*(entry for entry in old["results"] if entry["name"] not in names), *results],
        "rows": old.get("rows", {}) | dict(rows or {}),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def show(results: Sequence[Numbers]) -> None:
    """Print results, one per line, with their peers and limit below."""
    for entry in results:
        print(f"{entry['name']:<58} {cell(entry)} {entry['unit']}")
        for peer, found in entry["peer"].items():
            print(f"    {peer:<54} {cell(found)}   {times(found['ratio'])}")
        if entry["floor"] is not None:
            print(f"    {'the limit':<54} {number(entry['floor'])}   {times(entry['ratio_to_floor'])}")


def finish(results: Sequence[Numbers], chosen: argparse.Namespace, rows: Mapping[str, Any] | None = None) -> None:
    """Print the results and write them to the file of `--out`."""
    show(results)
    save(chosen.out, results, chosen.threads, rows)


def number(value: float | None) -> str:
    """Format a number: counts in full, other numbers with three or four significant digits."""
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    size = abs(value)
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 4
    return f"{value:,.{digits}f}"


def cell(found: Mapping[str, Any]) -> str:
    """Format a median, with its range over several rounds."""
    middle = number(found["median"])
    return middle if found["rounds"] < 2 else f"{middle} ({number(found['low'])}–{number(found['high'])})"


def times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x" if ratio < 10 else f"{ratio:,.0f}x"
