"""Changes of the current bundle beside a load."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.lib.machine import Numbers
from benchmarks.lib.processes import Server, usage
from twotower.store.bundle import Bundle
from twotower.store.manifest import BundleFacts
from twotower.store.store import Store


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


def swapping(pipe: Connection, path: Path, server: Server, swaps: int, gap: float, cores: set[int], key: str) -> None:
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
        # The old bundle goes when its last request is answered.
        time.sleep(2.0 if number in (4, swaps - 1) else 0.2)
        out.append({"seconds": seconds, "usage": usage(server.pid)})
    pipe.send((out, time.process_time() - cpu))
