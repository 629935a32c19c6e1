"""Bundles of small files, for tests of stores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from worlds import CHECKERBOARD_SCHEMA

from twotower import files
from twotower.data.split import SplitConfig
from twotower.errors import BundleError, Interrupted
from twotower.store.bundle import Bundle
from twotower.store.manifest import BundleFacts
from twotower.store.store import Store

FACTS: dict[str, Any] = {
    "model": "sha-1", "dims": 64, "metric": "cosine", "counts": {"users": 5, "items": 7}, "schema": CHECKERBOARD_SCHEMA,
    "split": SplitConfig(), "similarity": "cosine", "bias": False, "keep_seen": False, "history_term": None,
    "moves": False, "learned": {"rows": 9, "until": 8}, "remembered": {"rows": 9, "until": None},
    "challenge": None,
    "recall_check": {"recall": 0.97, "threshold": 0.95, "k": 10, "queries": 5},
    "index": {"kind": "exact", "params": {}, "search_params": {}, "rejected": 0},
    "parity": {"user": 1e-7, "item": 1e-7}, "schema_hash": "abc", "vocab_hash": "def",
    "versions": {"twotower": "0.1.0"},
}  # fmt: skip


def content(tag: str, count: int = 3, **facts: Any) -> Callable[[Path], BundleFacts]:
    """A writer whose every file says `tag`."""

    def write(folder: Path) -> BundleFacts:
        (folder / "index").mkdir()
        for i in range(count):
            with (folder / ("index" if i % 2 else ".") / f"{i}.bin").open("wb") as f:
                f.write(tag.encode())
                f.flush()
                files.point("test.half")
                f.write(bytes(range(100)))
            files.point("test.file")
        return BundleFacts.model_validate(FACTS | facts)

    return write


def check_failed_writes(store: Store, old: Bundle) -> None:
    """Check that no error or interrupt of a writer publishes its bundle."""

    def fail(error: BaseException) -> Callable[[Path], BundleFacts]:
        def write(folder: Path) -> BundleFacts:
            content("two")(folder)
            raise error

        return write

    for error in (KeyboardInterrupt(), Interrupted("SIGTERM")):
        with pytest.raises(type(error)):
            store.publish(fail(error))
    with pytest.raises(BundleError, match=f"not published, CURRENT stays {old.id}: no such column") as caught:
        store.publish(fail(ValueError("no such column")))
    assert caught.value.reason == "write"


def tag_of(bundle: Bundle) -> str:
    tags = {(bundle.folder / entry.path).read_bytes()[:-100].decode() for entry in bundle.manifest.files}
    assert len(tags) == 1, tags
    return str(tags.pop())


def ids(store: Store) -> list[str]:
    return [line.id for line in store.bundles()]
