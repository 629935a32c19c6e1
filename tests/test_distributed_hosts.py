"""One training over several hosts with their own disks: the weights of one process, an end when a host is lost."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import preloaded
import pytest
from hosts import HOME, Command, Host, network
from object_server import ObjectServer, environment
from safetensors.numpy import load_file
from worlds import CHECKERBOARD_TOML, checkerboard

pytestmark = pytest.mark.hosts
HERE = Path(__file__).resolve().parent
CONFIG = """
data = { users = "users.parquet", items = "items.parquet", interactions = "interactions.parquet" }
model = { width = 8, unknown_rate = 0, bias = false }
train = { epochs = 3, batch_size = 100, lr = 0.02, device = "cpu", checkpoint_steps = 4, data_shards = 6, timeout=120 }
evaluation = { k = [5], bootstrap = 0 }
loss.kind = "softmax"
"""
"""Nothing is drawn that differs between ranks, and the shards divide among two and three.

A softmax gives biases of users no gradient but rounding, which Adam makes steps of."""


def command(*words: Any) -> None:
    """Run the command line in one process on this machine."""
    preloaded.run("-m", "twotower", *words, check=True, timeout=600)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tables, the config of a training on them, and the same tables prepared."""
    folder = tmp_path_factory.mktemp("world")
    for name, table in zip(("users", "items", "interactions"), checkerboard(), strict=True):
        table.write_parquet(folder / f"{name}.parquet")
    (folder / "config.toml").write_text(CONFIG + CHECKERBOARD_TOML, encoding="utf-8")
    command("prepare", folder / "config.toml", "--out", folder / "prepared")
    return folder


@pytest.fixture(scope="module")
def alone(world: Path) -> Path:
    """The run of one process."""
    command("train", world / "config.toml", "-r", world / "alone")
    return world / "alone"


def train(
    hosts: Sequence[Host], *options: Any, program: Sequence[str] = ("-m", "twotower"), **more: Any
) -> list[Command]:
    """Start a rank of one training on each host, by torchrun; its rendezvous is on the first."""
    return [
        host.start(
            "python", "-m", "torch.distributed.run", "--nnodes", len(hosts), "--nproc-per-node", 1,
            "--rdzv-backend", "c10d",
            "--rdzv-endpoint", f"{hosts[0].name}:29400", "--rdzv-id", "job", *program, "train", "world/config.toml",
            *(() if "-r" in options else ("-r", "run")), *options, **more,
        )
        for host in hosts
    ]  # fmt: skip


def weights(run: Path) -> dict[str, np.ndarray[Any, Any]]:
    return dict(load_file(run / "model.safetensors"))


def same_to_rounding(run: Path, other: Path) -> None:
    """Fails unless two runs have the same weights to rounding, and the same epochs."""
    ours, theirs = weights(run), weights(other)
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        np.testing.assert_allclose(ours[name], expected, rtol=2e-4, atol=2e-5, err_msg=name)


def end(commands: Sequence[Command], *codes: int) -> list[str]:
    """Wait for programs, which must end with these codes; return what they said."""
    found = [command.wait(600) for command in commands]
    said = [command.said for command in commands]
    assert found == list(codes), "\n".join(text[-4000:] for text in said)
    return said


@pytest.fixture(scope="module")
def pair(world: Path) -> Iterator[list[Host]]:
    """Two hosts that have the world, and have trained on it together: `run` on the first."""
    with network("node0", "node1") as hosts:
        for host in hosts:
            host.give(world, HOME / "world")
        said = end(train(hosts), 0, 0)
        assert said[0].count("next: twotower ") == 1, "one rank speaks for all"
        assert "next:" not in said[1]
        yield hosts


def test_two_hosts_train_what_one_process_trains(pair: list[Host], alone: Path) -> None:
    same_to_rounding(pair[0].folder(HOME / "run"), alone)
    assert not pair[1].folder(HOME / "run").exists(), "rank 0 writes the run, on its own disk"


def test_two_hosts_with_a_copy_of_a_prepared_folder_each_train_what_one_process_trains(
    pair: list[Host], world: Path
) -> None:
    prepared = ("-r", "of-prepared", "--set", "data.prepared=prepared")
    end(train(pair, *prepared), 0, 0)
    command("train", world / "config.toml", "-r", world / "of-prepared", *prepared[2:])
    same_to_rounding(pair[0].folder(HOME / "of-prepared"), world / "of-prepared")


def test_three_hosts_read_tables_of_a_bucket_and_train_what_one_process_trains(world: Path, alone: Path) -> None:
    with network("bucket", "node0", "node1", "node2") as (at, *hosts):
        server = ObjectServer.on(at)
        url = f"s3://{at.call(server.new_bucket)}"
        options = []
        for name in ("users", "items", "interactions"):
            data = (world / f"{name}.parquet").read_bytes()
            at.call(server.put, f"{url}/tables/{name}.parquet", data)
            options += ["--set", f"data.{name}={url}/tables/{name}.parquet"]
        for host in hosts:
            host.give(world / "config.toml", HOME / "world" / "config.toml")
        end(train(hosts, *options, env=environment(server.address)), 0, 0, 0)
        same_to_rounding(hosts[0].folder(HOME / "run"), alone)


def test_a_run_that_is_there_ends_all_ranks(pair: list[Host]) -> None:
    """Only the host of rank 0 has it."""
    said = end(train(pair), 1, 1)
    assert "error: run: holds a run already" in said[0]


@pytest.mark.parametrize("lost", [1, 0])
def test_fault_B6_a_host_that_is_cut_off_ends_the_job_and_a_relaunch_ends_in_the_same_bits(
    pair: list[Host], lost: int
) -> None:
    """The network is cut while a rank of that host is between two steps; the rendezvous is on host 0."""
    run = f"lost{lost}"
    again = ("-r", run)
    for host in pair:  # until the kernel gives up a silent connection, which takes a quarter of an hour by default
        end([host.start("sh", "-c", "echo 5 > /proc/sys/net/ipv4/tcp_retries2")], 0)
    jobs = train(
        pair, "--set", "train.timeout=10", *again, program=[str(HERE / "kill_points.py"), f"step:10:{lost}:hang"]
    )
    stopped = pair[lost].wait_stopped()
    pair[lost].cut_off()
    os.kill(stopped, signal.SIGCONT)
    try:
        for rank, told in enumerate(end(jobs, 1, 1)):
            (line,) = (line for line in told.splitlines() if line.startswith("error: "))
            assert line.startswith(
                f"error: rank {rank} of 2, on node{rank}: another rank has ended, or was silent for 10 s"
            )
            assert line.endswith("Start the same command on all hosts with --resume")
    finally:
        pair[lost].heal()
    folder = pair[0].folder(HOME / run)
    assert [p.name for p in sorted((folder / "checkpoints").iterdir())][-1] == "step-000000008"
    assert not (folder / "metrics.json").exists()
    said = end(train(pair, *again, "--resume"), 0, 0)
    assert "sending the checkpoint of step 8 to 1 of 2 ranks, which lack it" in said[0]
    assert "resuming after step 8" in said[0]
    expected = pair[0].folder(HOME / "run" / "model.safetensors").read_bytes()
    assert (folder / "model.safetensors").read_bytes() == expected
    assert not pair[1].folder(HOME / run).exists()


def test_fault_B6_a_host_that_is_switched_off_ends_the_job(world: Path, alone: Path) -> None:
    """A relaunch on the remaining hosts resumes from the checkpoint; its weights are as of one process, to rounding."""
    with network("node0", "node1", "node2") as hosts:
        for host in hosts:
            host.give(world, HOME / "world")
        jobs = train(hosts, "--set", "train.timeout=10", program=[str(HERE / "kill_points.py"), "step:10:2:hang"])
        hosts[2].wait_stopped()
        hosts[2].close()
        for told in end(jobs[:2], 1, 1):
            assert told.count("another rank has ended, or was silent for 10 seconds") == 1
        said = end(train(hosts[:2], "--resume"), 0, 0)
        assert "resuming after step 8" in said[0]
        same_to_rounding(hosts[0].folder(HOME / "run"), alone)
