"""A service whose store is in a bucket: publish, swap, rollback, and a bucket that falls silent."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from object_server import Fault, ObjectServer
from service_client import Client, Make, clients, ids
from worlds import EVERYTHING_SCHEMA, everything, settings

import twotower
from twotower.cli.app import run_command
from twotower.data.tables import check
from twotower.index.faiss.faiss_index import FAISS_MIN_VECTORS
from twotower.index.faiss.hnsw import Hnsw
from twotower.store.bundle import Bundle
from twotower.store.manifest import BundleFacts
from twotower.store.store import Store


def publish_copy(bundle: Bundle, store: Store, change: Callable[[Path], object] = lambda _: None) -> str:
    """Publish the files of a bundle in another store, after a change of them, without a probe; return the id there."""

    def write(folder: Path) -> BundleFacts:
        shutil.copytree(bundle.folder, folder, dirs_exist_ok=True)
        (folder / "MANIFEST.json").unlink()
        change(folder)
        return BundleFacts.model_validate(bundle.manifest.model_dump(by_alias=True))

    return store.publish(write).id


@pytest.fixture
def url(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return f"{bucket}/store"


@pytest.fixture
def at_url(url: str, two_bundles: Path) -> Iterator[tuple[Make, Store, list[str]]]:
    """Services of a store with the first of two bundles; the store; the ids in it."""
    first, _ = (Store(two_bundles).open(b.id) for b in Store(two_bundles).bundles())
    store = Store.create(url)
    names = [publish_copy(first, store)]
    with clients(two_bundles) as make:
        yield (lambda **more: make(at=url, **more)), store, names


def served(client: Client) -> str:
    """The bundle that answers, once the service has looked at the store."""
    client.run(client.service.bundles.refresh())
    assert len(ids(client.post("/v1/recommend", {"user_id": "u1", "k": 5}))) == 5
    return str(client.get("/v1/bundle").json()["bundle_id"])


def test_a_service_swaps_and_rolls_back_as_on_the_disk(
    at_url: tuple[Make, Store, list[str]], two_bundles: Path, tmp_path: Path
) -> None:
    make, store, names = at_url
    client = make()
    assert served(client) == names[0]
    names.append(publish_copy(Store(two_bundles).current(), store))
    assert served(client) == names[1]
    store.rollback()
    assert served(client) == names[0]
    assert [b["id"] for b in client.get("/v1/console/bundles").json()["bundles"]] == names
    store.touch_current()
    assert not client.run(client.service.bundles.refresh()), "the same bundle is not loaded again"
    assert client.get("/v1/bundle").json()["bundle_id"] == names[0]


def test_fault_A2_a_service_answers_on_while_its_bucket_is_silent_and_says_so(
    at_url: tuple[Make, Store, list[str]],
    two_bundles: Path,
    monkeypatch: pytest.MonkeyPatch,
    s3: ObjectServer,
    url: str,
) -> None:
    make, store, names = at_url
    client = make()
    assert served(client) == names[0]
    assert client.get("/readyz").json() == {"status": "ok", "bundle_id": names[0], "store": "answers"}
    names.append(publish_copy(Store(two_bundles).current(), store))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    for _ in range(2):
        assert served(client) == names[0]
    assert client.get("/readyz").json()["store"] == "silent"
    text = client.get("/metrics").text
    assert "twotower_store_answers 0.0" in text
    assert 'twotower_bundle_load_failures_total{reason="store"} 1.0' in text, "asked again after a pause"
    told = client.service.bundles.last_error
    assert "does not answer" in told
    assert "127.0.0.1" not in told
    assert url not in told
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.address)
    assert served(client) == names[1]
    assert client.get("/readyz").json()["store"] == "answers"
    assert "twotower_store_answers 1.0" in client.get("/metrics").text


def test_fault_A2_a_bundle_that_cannot_be_fetched_is_refused_and_the_old_one_answers(
    at_url: tuple[Make, Store, list[str]], two_bundles: Path, s3: ObjectServer
) -> None:
    make, store, names = at_url
    client = make()
    assert served(client) == names[0]
    names.append(publish_copy(Store(two_bundles).current(), store))
    shutil.rmtree(store.open(names[1]).folder)
    s3.let_happen(Fault(f"^GET .*/{names[1]}/user_tower.onnx", 403, times=99))
    assert served(client) == names[0]
    assert 'twotower_bundle_load_failures_total{reason="unreadable"} 1.0' in client.get("/metrics").text
    s3.let_happen()
    client.run(client.service.bundles.refresh(retry=True))
    assert served(client) == names[1]


def break_index(folder: Path, _: Path) -> None:
    data = bytearray((folder / "index/index.faiss").read_bytes())
    data[40:200] = b"\xff" * 160
    (folder / "index/index.faiss").write_bytes(data)


def take_tower(folder: Path, other: Path) -> None:
    shutil.copy(other / "user_tower.onnx", folder / "user_tower.onnx")


def narrow_vectors(folder: Path, _: Path) -> None:
    np.save(folder / "user_vectors.npy", np.load(folder / "user_vectors.npy")[:, 1:].copy())


def drop_user_vector(folder: Path, _: Path) -> None:
    np.save(folder / "user_vectors.npy", np.load(folder / "user_vectors.npy")[1:].copy())


def change_metric(folder: Path, _: Path) -> None:
    facts = json.loads((folder / "index/index.json").read_text())
    facts["metric"] = {"cosine": "dot", "dot": "cosine"}[facts["metric"]]
    (folder / "index/index.json").write_text(json.dumps(facts))


REFUSED = {
    "A4": (break_index, "broken", "index.faiss: not a usable FAISS index"),
    "A6": (take_tower, "mismatch", "model is .* in MANIFEST.json, .* in user_tower.onnx"),
    "A7-dims": (narrow_vectors, "mismatch", "dims is .* in MANIFEST.json, .* in user_vectors.npy"),
    "A7-counts": (drop_user_vector, "mismatch", "users is 60 in MANIFEST.json, 59 in user_vectors.npy"),
    "A7-metric": (change_metric, "broken", r"index\.faiss: .* vectors of \d+ numbers, expected .* by index\.json"),
}
"""Change of a bundle before its manifest is made, so that all digests match; reason and words of the service."""


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle of another model, with so many items that its index has a file of FAISS."""
    folder = tmp_path_factory.mktemp("searched")
    tables = check(*everything(n_items=FAISS_MIN_VECTORS + 10), EVERYTHING_SCHEMA)
    config = settings(model={"width": 8}, train={"epochs": 1, "batch_size": 256})
    return twotower.publish(
        twotower.fit(tables, EVERYTHING_SCHEMA, config, folder=folder / "run"), folder / "store", Hnsw(k=5)
    )


def check_refused(case: str, at_url: tuple[Make, Store, list[str]], searched: Bundle, two_bundles: Path) -> None:
    """Check that a service answers on by the first bundle when another one, of matching digests, is put into its
    bucket."""
    make, store, names = at_url
    change, reason, words = REFUSED[case]
    first = Store(two_bundles).open(Store(two_bundles).bundles()[0].id).folder
    client = make()
    assert served(client) == names[0]
    publish_copy(searched, store, lambda folder: change(folder, first))
    assert served(client) == names[0]
    assert re.search(words, client.service.bundles.last_error)
    assert f'twotower_bundle_load_failures_total{{reason="{reason}"}} 1.0' in client.get("/metrics").text
    names.append(publish_copy(searched, store))
    assert served(client) == names[1]


def test_fault_A4_a_service_refuses_a_hostile_index_in_its_bucket(
    at_url: tuple[Make, Store, list[str]], searched: Bundle, two_bundles: Path
) -> None:
    check_refused("A4", at_url, searched, two_bundles)


def test_fault_A6_a_service_refuses_a_tower_of_another_model_in_its_bucket(
    at_url: tuple[Make, Store, list[str]], searched: Bundle, two_bundles: Path
) -> None:
    check_refused("A6", at_url, searched, two_bundles)


@pytest.mark.parametrize("case", [case for case in REFUSED if case.startswith("A7")])
def test_fault_A7_a_service_refuses_files_that_differ_in_its_bucket(
    case: str, at_url: tuple[Make, Store, list[str]], searched: Bundle, two_bundles: Path
) -> None:
    check_refused(case, at_url, searched, two_bundles)


def test_the_commands_take_a_store_in_a_bucket(url: str, two_bundles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*words: object, code: int = 0) -> str:
        assert run_command([str(w) for w in words]) == code
        told = capsys.readouterr()
        return told.err if code else told.out

    assert (
        run("bundles", "--store", url, code=2)
        == f"error: {url}: not a store; `twotower publish RUN --store {url}` creates one\n"
    )
    for name in ("run1", "run2"):
        said = run("publish", two_bundles.parent / name, "--store", url)
        assert f"next: twotower recommend --store {url} --user" in said or "next: twotower search" in said
    first, second = (line.split()[0] for line in run("bundles", "--store", url).splitlines())
    assert "(id i" in run("recommend", "--store", url, "--user", "u1", "-k", 3)
    assert f"bundle {second}" in run("evaluate", url)
    assert run("rollback", "--store", url) == f"current: {first}\n"
    run("gc", "--store", url)
    assert [line.split()[0] for line in run("bundles", "--store", url).splitlines()] == [first, second]
    assert twotower.retriever(url).bundle.id == first
