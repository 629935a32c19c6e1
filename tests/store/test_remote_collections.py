"""Collections that no bundle names are dropped by the next publish, in a folder and in a bucket."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from object_server import ObjectServer
from store_worlds import content

from twotower.store.manifest import BundleFacts
from twotower.store.remote_collections import RemoteCollections
from twotower.store.store import Store


class Dropping:
    """A server of collections that only drops."""

    def __init__(self) -> None:
        self.dropped: list[str] = []

    def drop(self, collection: str) -> None:
        self.dropped.append(collection)


@pytest.mark.parametrize("in_bucket", [False, True])
def test_a_publish_drops_collections_that_no_bundle_names(
    tmp_path: Path, bucket: str, s3: ObjectServer, in_bucket: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    store, server = Store.create(f"{bucket}/store" if in_bucket else tmp_path / "store"), Dropping()
    monkeypatch.setattr(RemoteCollections, "_connect", lambda *_: server)
    write = content("a")

    def write_after_drop(folder: Path) -> BundleFacts:
        RemoteCollections(store).drop_unreferenced()
        facts = write(folder)
        (folder / "index" / "index.json").write_text(json.dumps({"kind": "exact"}))
        return facts

    store.publish(write_after_drop)
    RemoteCollections(store).register("milvus", "http://host", "of a killed publisher")
    store.publish(write_after_drop)
    assert server.dropped == ["of a killed publisher"]
    store.publish(write_after_drop)
    assert server.dropped == ["of a killed publisher"], "it is listed no more"
