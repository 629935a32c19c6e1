"""Changes of the current bundle beside a load."""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks.lib.machine import Numbers
from benchmarks.lib.processes import Server, usage
from twotower.store.bundle import Bundle
from twotower.store.manifest import BundleFacts
from twotower.store.store import Store


@contextmanager
def store_copy(path: Path) -> Iterator[Path]:
    """Yield a copy of the store with at least two bundles, whose files are links and stay unchanged."""
    with tempfile.TemporaryDirectory(dir=path.absolute().parent, prefix=f".{path.name}-swap-") as folder:
        copy = Path(folder) / "store"
        shutil.copytree(path, copy, ignore=lambda folder, _: ["bundles"] if Path(folder) == path else [])
        shutil.copytree(path / "bundles", copy / "bundles", copy_function=os.link)
        store = Store(copy)
        if len(store.bundles()) < 2:
            republish(store, store.current())
        yield copy


def republish(store: Store, bundle: Bundle) -> Bundle:
    def write(folder: Path) -> BundleFacts:
        shutil.copytree(bundle.folder, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("MANIFEST.json"))
        return bundle.manifest

    return store.publish(write, force=True)


def swapping(folder: str, pid: int, port: int, swaps: int, gap: float) -> tuple[list[Numbers], float]:
    """Change the current bundle `swaps` times, every fifth time by a publish, and wait until it is served.

    Prints a line at the start. Returns the usage of the server after each change, with the seconds until it was served,
    and its own CPU seconds.
    """
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))  # the generator, on this core, goes before
    server, store = Server(pid, port, 0.0), Store(Path(folder))
    out: list[Numbers] = []
    other, current = [b.id for b in store.bundles() if not b.current][-1], store.current().id
    print(json.dumps("begin"), flush=True)
    started, cpu = time.perf_counter(), time.process_time()
    for number in range(swaps):
        time.sleep(max(0.0, started + number * gap - time.perf_counter()))
        old = Bundle.open(store.path / "bundles" / other)
        wanted = (republish(store, old) if number % 5 == 4 else store.rollback(to=other)).id
        flipped, seconds = time.perf_counter(), None
        while seconds is None and time.perf_counter() < flipped + 20:
            with suppress(OSError, ValueError):
                if server.get("/v1/bundle")["bundle_id"] == wanted:
                    seconds = time.perf_counter() - flipped
            time.sleep(0.02)
        other, current = current, wanted
        for name in {b.id for b in store.bundles()} - {other, current}:
            shutil.rmtree(store.path / "bundles" / name)
        # The old bundle goes when its last request is answered.
        time.sleep(2.0 if number in (4, swaps - 1) else 0.2)
        out.append({"seconds": seconds, **usage(pid)})
    return out, time.process_time() - cpu
