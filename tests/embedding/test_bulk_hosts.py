"""Embedding by a cluster of Ray whose hosts share only a bucket: hosts and calls that are lost half-way."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import preloaded
import pytest
from hosts import HOME, Host
from ray_hosts import STOP, Cluster, made, ray_cluster
from worlds import CHECKERBOARD_TOML, checkerboard

from twotower.embedding.folder import LIST_FILE, EmbeddingsFolder

pytestmark = pytest.mark.hosts
CONFIG = """
data = { items = "items.parquet", interactions = "interactions.parquet" }
model = { width = 8 }
train = { epochs = 1, batch_size = 100, device = "cpu" }
evaluation = { k = [5], bootstrap = 0 }
"""
WEIGHT = """
[[schema.features]]
name = "weight"
side = "item"
kind = "numeric"
"""
SHARDS, ROWS = 24, 100
THIRD_SHARD = "5"
"""A shard in a bucket passes two points: its rows, its file."""


def items(first: int, n: int) -> pl.DataFrame:
    return pl.DataFrame({"item_id": np.arange(first, first + n)}).with_columns(weight=(pl.col("item_id") * 0.37).sin())


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, a table of items, and `whole`, the vectors that one process makes of it."""
    folder = tmp_path_factory.mktemp("world")
    _, _, actions = checkerboard()
    items(0, 30).write_parquet(folder / "items.parquet")
    actions.write_parquet(folder / "interactions.parquet")
    (folder / "config.toml").write_text(CONFIG + CHECKERBOARD_TOML + WEIGHT, encoding="utf-8")
    (folder / "table").mkdir()
    half = SHARDS // 2 * ROWS
    for name, first in (("a", 0), ("b", half)):
        items(first, half).write_parquet(folder / "table" / f"{name}.parquet")
    for words in (
        ("train", folder / "config.toml", "-r", folder / "run"),
        ("embed", folder / "run", folder / "table", "--out", folder / "whole", "--shard-rows", ROWS, "--threads", 1),
    ):
        preloaded.run("-m", "twotower", *map(str, words), check=True, timeout=600)
    assert len(EmbeddingsFolder(folder / "whole")) == SHARDS * ROWS
    return folder


@pytest.fixture(scope="module")
def cluster(world: Path) -> Iterator[Cluster]:
    with ray_cluster(world / "run", ("worker0", "worker1", "worker2")) as cluster:
        cluster.put(world / "table")
        yield cluster


def same(cluster: Cluster, out: str, whole: Path) -> None:
    """Fails unless a result has the rows of a folder that one process has made, each shard once, and nothing else."""
    parts = sorted(cluster.done(out))
    assert cluster.listed(out).keys() == {*parts, LIST_FILE, "_plan_embedding.json"}
    for name, path in zip(parts, sorted(whole.glob("part-*")), strict=True):
        assert name[:10] == path.name[:10]
        found, expected = pl.read_parquet(cluster.read(out, name)), pl.read_parquet(path)
        assert found.equals(expected, null_equal=False), name


def stop_at(point: str, *hosts: Host) -> None:
    """Let processes of Ray that start on these hosts from now on stand still at a point, and on no other host."""
    for host in hosts:
        host.folder(STOP).write_text(point)


def go_on(*hosts: Host) -> None:
    """Let what stands still on these hosts go on, and what starts from now on stand still nowhere."""
    for host in hosts:
        host.folder(STOP).unlink()
        for pid, how in host.processes():
            if how == "T":
                os.kill(pid, signal.SIGCONT)


def test_hosts_that_share_a_bucket_alone_measure_a_run_as_one_process_does(cluster: Cluster) -> None:
    """The call comes from outside of the cluster, whose workers have no file of the run."""
    expected = cluster.call(cluster.caller, "evaluate", "run", "--json", engine="local")
    found = cluster.call(cluster.caller, "evaluate", "run", "--json", engine="ray://head:10001")
    assert expected.wait(600) == 0, expected.said
    assert found.wait(600) == 0, found.said
    last = [json.loads(job.said[job.said.index("{") :]) for job in (expected, found)]
    assert last[0] == last[1]
    assert last[0]["test.recall@5"] >= 0
    assert not any(worker.folder(HOME / "run").exists() for worker in cluster.workers)
    assert any(list(worker.folder(HOME).glob(".cache/twotower/runs/*/metrics.json")) for worker in cluster.workers)


def test_hosts_that_share_a_bucket_alone_answer_all_users_as_one_process_does(cluster: Cluster, world: Path) -> None:
    (world / "users").mkdir()
    pl.DataFrame({"user_id": range(40)}).write_parquet(world / "users/a.parquet")
    cluster.put(world / "users", "users")
    store = f"{cluster.url}/store"
    published = cluster.caller.twotower("publish", "run", "--store", store, env=cluster.environment)
    assert published.wait(600) == 0, published.said
    words = ("recommend", "--store", store, "--users", f"{cluster.url}/users", "-k", 5, "--shard-rows", 10)
    for out, engine in (("one", "local"), ("many", "ray://head:10001")):
        job = cluster.call(cluster.caller, *words, "--out", f"{cluster.url}/{out}", engine=engine)
        assert job.wait(600) == 0, job.said
    parts = [name for name in cluster.listed("one") if name.startswith("part-")]
    assert len(parts) == 4
    for name in parts:
        assert cluster.read("many", name) == cluster.read("one", name)
    assert any(
        list(worker.folder(HOME).glob(".cache/twotower/bundles/*/*/MANIFEST.json")) for worker in cluster.workers
    )


def test_fault_C18_a_job_that_is_killed_and_called_again_makes_what_is_missing(cluster: Cluster, world: Path) -> None:
    """All three workers stand still in their third shard when the call is killed."""
    stop_at(THIRD_SHARD, *cluster.workers)
    job = cluster.embed(cluster.head, "again")
    for worker in cluster.workers:
        worker.wait_stopped(600)
    job.send_signal(signal.SIGKILL)
    job.wait(600)
    for worker in cluster.workers:
        worker.folder(STOP).unlink()
    before = cluster.listed("again")
    done = cluster.done("again")
    assert len(done) == 2 * len(cluster.workers)
    again = cluster.embed(cluster.head, "again")
    assert again.wait(600) == 0, again.said
    assert made(again.said) == SHARDS - len(done)
    same(cluster, "again", world / "whole")
    after = cluster.listed("again")
    assert {name: after[name] for name in done} == {name: before[name] for name in done}


def test_a_host_that_leaves_half_way_is_done_without(cluster: Cluster, world: Path) -> None:
    """It is told to stop while all stand still in their third shards, and joins again afterwards."""
    leaving = cluster.workers[-1]
    stop_at(THIRD_SHARD, *cluster.workers)
    job = cluster.embed(cluster.head, "left")
    for worker in cluster.workers:
        worker.wait_stopped(600)
    before = {name: at for name, at in cluster.listed("left").items() if name.startswith("part-")}
    cluster.leave(leaving)
    go_on(*cluster.workers)
    assert job.wait(600) == 0, job.said
    assert made(job.said) == SHARDS
    assert cluster.deaths() == ["received SIGTERM"]
    same(cluster, "left", world / "whole")
    assert before.items() <= cluster.listed("left").items()
    cluster.join(leaving)


@pytest.mark.parametrize("how", ["cut-off", "switched-off"])
def test_fault_C18_a_host_that_is_lost_half_way_is_done_without(how: str, cluster: Cluster, world: Path) -> None:
    """All hosts stand still in their third shards. The call comes from the head, or from outside of the cluster. Ray
    itself repeats the shards of the lost host, minutes later where no connection ends."""
    *others, lost = cluster.workers
    stop_at(THIRD_SHARD, *cluster.workers)
    if how == "cut-off":
        job = cluster.embed(cluster.head, how)
    else:
        job = cluster.embed(cluster.caller, how, "ray://head:10001")
    for worker in cluster.workers:
        worker.wait_stopped(600)
    if how == "cut-off":
        lost.cut_off()
    else:
        lost.close()
    cluster.workers.remove(lost)
    go_on(*others)
    assert job.wait(900) == 0, job.said
    assert made(job.said) == SHARDS
    same(cluster, how, world / "whole")


def test_fault_C18_a_cluster_that_is_lost_is_one_sentence(cluster: Cluster, world: Path) -> None:
    """The host of the head is switched off, with a call from outside, whose shards stand still, and one on a host of
    the cluster, which waits for a CPU. What is made stays, for the next call."""
    stop_at(THIRD_SHARD, *cluster.workers)
    job = cluster.embed(cluster.caller, "lost", "ray://head:10001")
    for worker in cluster.workers:
        worker.wait_stopped(600)
    inside = cluster.workers[0]
    inside.give(world / "run", HOME / "run")
    waiting = cluster.embed(inside, "waiting")
    waiting.until("no shard is finished for", 600)
    cluster.head.close()
    for call, where in ((job, "ray://head:10001"), (waiting, "head:6379")):
        assert call.wait(600) == 2, call.said
        (line,) = (line for line in call.said.splitlines() if line.startswith("error: "))
        assert re.fullmatch(
            rf"error: engine 'ray': {where} answers no more \(.*\); see that its hosts run and reach each other, "
            "then call again to go on",
            line,
        )
        assert call.said.rstrip().endswith(line)
        assert "Traceback" not in call.said
    assert len(cluster.done("lost")) == 2 * len(cluster.workers)
