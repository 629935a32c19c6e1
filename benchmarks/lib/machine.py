"""The machine of a measurement: its description, its limits, and the time of a call."""

import ctypes
import os
import platform
import re
import time
import tomllib
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

Numbers = dict[str, Any]
DECLARED: Numbers = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))


def machine() -> Numbers:
    """Describe the machine and the installed packages."""
    model = re.search(r"model name\s*:\s*(.*)", read("/proc/cpuinfo"))
    memory = re.search(r"MemTotal:\s*(\d+)", read("/proc/meminfo"))
    system = {"system": f"{platform.system()} {platform.release()}", "python": platform.python_version()}
    environment = {name: os.environ[name] for name in DECLARED["environment"] if name in os.environ}
    return system | {
        "cpu": model[1].strip() if model else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(int(memory[1]) / 2**20, 1) if memory else None,
        "versions": {name: given for name in DECLARED["packages"] if (given := installed(name))},
        "environment": environment,
        "blas": blas(),
    }


def blas() -> dict[str, str]:
    """Return the kernels of every OpenBLAS in this process, by the package that contains it."""
    found = {}
    for path in set(re.findall(r"/\S*openblas\S*\.so\S*", read("/proc/self/maps"))):
        library = ctypes.CDLL(path)
        for name in ("openblas_get_corename", "scipy_openblas_get_corename64_", "scipy_openblas_get_corename"):
            if hasattr(library, name):
                core = getattr(library, name)
                core.restype = ctypes.c_char_p
                package = re.search(r"(\w+?)(_cpu)?\.libs", path)
                found[package[1] if package else Path(path).name] = core().decode()
    return found


def read(path: str) -> str:
    """Return the text of a file; empty if it cannot be read."""
    with suppress(OSError):
        return Path(path).read_text(encoding="utf-8")
    return ""


def installed(package: str) -> str:
    """Return the version of a package; empty if it is not installed."""
    with suppress(PackageNotFoundError):
        return version(package)
    return ""


def tool(package: str) -> str:
    """Return a package and its version, the label in the tables."""
    return f"{package} {installed(package)}".strip()


def limits(threads: int) -> Numbers:
    """Measure the limits of the machine: products in both precisions, and reading memory."""
    fp32, bf16 = (product_rate(dtype, 0.3) / 1e9 for dtype in ("float32", "bfloat16"))
    return {"threads": threads, "fp32_gflops": fp32, "bf16_gflops": bf16, "read_gb_per_s": read_rate(threads) / 1e9}


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
    """Return the bytes per second of the best of many passes over an array larger than the caches, by all threads."""
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np

    shares = np.array_split(np.ones(megabytes * 2**17), threads)
    with ThreadPoolExecutor(threads) as pool:
        return megabytes * 2**20 / min(repeat(lambda: list(pool.map(np.sum, shares)), seconds))


def repeat(work: Callable[[], object], seconds: float) -> list[float]:
    """Return the seconds of each call, until their sum reaches `seconds`; at least two calls."""
    times = [timed(work), timed(work)]
    while sum(times) < seconds:
        times.append(timed(work))
    return times


def timed(work: Callable[[], object]) -> float:
    """Return the seconds of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
