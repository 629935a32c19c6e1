"""Several ranks train what one trains, and end together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import kill_points
import numpy as np
import polars as pl
import preloaded
import pytest
import ranked
import torch
from worlds import CHECKERBOARD_TOML, checkerboard

from twotower import api
from twotower.cli.app import run_command
from twotower.distributed import DistributedContext
from twotower.errors import ConfigError

HERE = Path(__file__).resolve().parent


def torchrun(n: int, *arguments: Any, fails: bool = False) -> str:
    """Run a script or module in `n` ranks on this machine, as torchrun does; return their output."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    codes, outputs = preloaded.run_ranks(n, *arguments, env=env)
    said = "\n".join(outputs)
    assert any(codes) is fails, said[-6000:]
    return said


def selected(request: pytest.FixtureRequest, test: str, **of: Any) -> list[str]:
    """The cases of a test that this session runs, of those with the other parameters `of`."""
    cases = (item for item in request.session.items if getattr(item, "originalname", "") == test)
    found = (dict(item.callspec.params) for item in cases)  # type: ignore[attr-defined]
    return [params["case"] for params in found if of.items() <= params.items()]


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.system)])
def together(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path, list[str]]:
    """The cases of this session, trained by that many ranks in one go."""
    out = tmp_path_factory.mktemp(f"ranks{request.param}")
    cases = selected(request, "test_ranks_train_what_one_trains", together=request.param)
    torchrun(request.param, HERE / "ranked.py", out, *cases)
    return request.param, out, cases


@pytest.mark.parametrize("case", ranked.CASES)
def test_ranks_train_what_one_trains(together: tuple[int, Path, list[str]], case: str) -> None:
    n, out, cases = together
    number = cases.index(case)
    assert (out / f"{number}.txt").read_text(encoding="utf-8") == case
    alone = ranked.single(case)
    initial = {n.removeprefix("initial/"): alone.pop(n) for n in list(alone) if n.startswith("initial/")}
    each = [dict(np.load(out / f"{number}-{rank}.npz")) for rank in range(n)]
    read = [found.pop("shards").tolist() for found in each]
    assert alone.pop("shards").tolist() == list(range(max(map(max, read)) + 1))
    if "in shards" in case:
        assert read == np.arange(6).reshape(n, -1).tolist(), "each rank reads its own shards"
    for name, expected in alone.items():
        for found in each:
            assert np.array_equal(found[name], each[0][name]), f"{name}: the ranks have other weights"
        # Deep towers make rounding grow, and it can turn two scores round.
        bound = 2e-3 if name == "history" else 3e-4 if case == "attention" else 2e-5
        np.testing.assert_allclose(each[0][name], expected, rtol=2e-4, atol=bound, err_msg=name)
    for name, start in initial.items():
        # A softmax does not change the biases of users; a baseline that does not help has a weight of 0.
        if start.size > 1 and not name.startswith("user_bias") and "_prior." not in name:
            assert np.abs(alone[name] - start).max() > 1e-4, f"{name} did not learn"


def test_ranks_are_what_torchrun_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert DistributedContext.from_environment() == DistributedContext(0, 1, 0)
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert DistributedContext.from_environment() == DistributedContext(3, 4, 1)
    assert not DistributedContext.from_environment().is_main
    monkeypatch.setenv("RANK", "4")
    with pytest.raises(ConfigError, match=r"RANK=4, WORLD_SIZE=4.*torchrun sets"):
        DistributedContext.from_environment()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)  # as where somebody else has set WORLD_SIZE
    with pytest.raises(ConfigError, match=r"WORLD_SIZE=4: the ranks do not connect .*unset RANK"):
        DistributedContext.from_environment().process_group().__enter__()


BEGUN = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import torch
from torch import distributed
from twotower import api
from twotower.distributed import DistributedContext
from twotower.errors import ConfigError
from worlds import CHECKERBOARD_SCHEMA, checkerboard, settings

rank, n, place, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
distributed.init_process_group("gloo", init_method=place, rank=rank, world_size=n)
try:
    DistributedContext(0, 5, 0).process_group().__enter__()
except ConfigError as e:
    print(e)
for number in range(2):  # the group is as usable after a training as before
    config = settings(model={{"bias": False, "unknown_rate": 0.0}}, train={{"epochs": 1, "device": "cpu"}})
    run = api.fit(checkerboard(), CHECKERBOARD_SCHEMA, config)
    total = torch.ones(1)
    distributed.all_reduce(total)
    assert total.item() == n
distributed.destroy_process_group()
torch.save(run.model.state_dict(), f"{{out}}-{{n}}-{{rank}}.pt")
"""


def test_a_process_group_that_has_begun_is_joined_and_left(tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    for n in (1, 2):
        place = f"file://{tmp_path / f'group{n}'}"
        ranks = [
            preloaded.start(
                "-c",
                BEGUN,
                str(rank),
                str(n),
                place,
                str(tmp_path / "w"),
                env=env,
                stdout=preloaded.PIPE,
                stderr=preloaded.STDOUT,
            )
            for rank in range(n)
        ]
        for rank, process in enumerate(ranks):
            said, _ = process.communicate(timeout=300)
            assert process.returncode == 0, said
            assert f"has this process as rank {rank} of {n}" in said
    found = [torch.load(tmp_path / f"w-{name}.pt") for name in ("1-0", "2-0", "2-1")]
    for name, weight in found[0].items():
        assert torch.equal(found[1][name], found[2][name]), name
        torch.testing.assert_close(found[1][name], weight, rtol=2e-4, atol=2e-5, msg=name)


def test_a_group_that_cannot_send_from_the_cpu_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    distributed = torch.distributed
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        monkeypatch.setattr(distributed, "get_backend", lambda: "nccl")
        with pytest.raises(ConfigError, match=r"nccl alone, and train.device is 'cpu'; begin it with backend = 'gloo'"):
            DistributedContext.from_environment().process_group("cpu").__enter__()
        with DistributedContext.from_environment().process_group("cuda", always=True):
            assert distributed.is_initialized()
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("n", [0, 1, 2, 5, 100])
def test_shares_follow_one_another_and_are_as_good_as_equal(n: int) -> None:
    shares = [range(*DistributedContext(r, 3).partition(n).indices(n)) for r in range(3)]
    assert [i for share in shares for i in share] == list(range(n))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert DistributedContext(0, 3).partition(n, 2) == DistributedContext(2, 3).partition(n)


# ---- the command


CONFIG = """
data = { users = "users.csv", items = "items.csv", interactions = "interactions.csv" }
model.width = 8
train = { epochs = 3, batch_size = 100, lr = 0.02, device = "cpu", checkpoint_steps = 4, data_shards = 2, timeout = 60 }
evaluation = { k = [5], bootstrap = 0 }
loss.kind = "softmax"
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    for name, table in zip(("users", "items", "interactions"), checkerboard(), strict=True):
        table.write_csv(folder / f"{name}.csv")
    (folder / "config.toml").write_text(CONFIG + CHECKERBOARD_TOML, encoding="utf-8")
    return folder / "config.toml"


@pytest.fixture(scope="module")
def undisturbed(config: Path) -> Path:
    """A run of two ranks that nothing befell."""
    run = config.parent / "undisturbed"
    said = torchrun(2, "-m", "twotower", "train", config, "-r", run)
    assert said.count("next: twotower ") == 1, "one rank speaks for all"
    return run


def test_fault_B6_when_a_rank_dies_the_job_ends_and_a_relaunch_ends_in_the_same_bits(
    config: Path, undisturbed: Path
) -> None:
    run = config.parent / "killed"
    command = ("train", config, "-r", run)
    torchrun(2, *kill_points.program("step:10:1"), *command, fails=True)  # only the second rank dies
    assert not (run / "metrics.json").exists()
    assert [p.name for p in sorted((run / "checkpoints").glob("step-*"))][-1] == "step-000000008"
    assert api.load(run).unfinished == "stopped after epoch 1 of 3; the best is epoch 1"
    said = torchrun(2, "-m", "twotower", *command, "--resume")
    assert "resuming after step 8" in said
    weights = [(r / "model.safetensors").read_bytes() for r in (run, undisturbed)]
    assert weights[0] == weights[1]


def start_ranks(config: Path, run: Path, *options: str, until: str) -> list[preloaded.Process]:
    """Start two ranks that end at a point, without torchrun."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return preloaded.start_ranks(2, *kill_points.program(until), "train", config, "-r", run, *options, env=environment)


def test_fault_B6_a_rank_that_hangs_ends_the_job_within_the_timeout(config: Path) -> None:
    """Without torchrun, which gives a process that does not end thirty seconds more."""
    ranks = start_ranks(config, config.parent / "hung", "--set", "train.timeout=5", until="step:3:1:hang")
    try:
        said, _ = ranks[0].communicate(timeout=120)
        assert ranks[1].poll() is None, "it hangs"
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
    assert ranks[0].returncode == 1, said
    (line,) = (line for line in said.splitlines() if line.startswith("error: "))
    assert "another rank has ended, or was silent for 5 seconds (Timed out waiting" in line
    assert line.endswith("Start the same command on all hosts with --resume")
    assert "Traceback" not in said


def test_fault_G8_ranks_share_a_run_that_the_first_has_locked(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = config.parent / "shared"
    ranks = start_ranks(config, run, until="step:3:1:hang")
    ranks[1].wait_stopped()
    try:
        assert run_command(["train", str(config), "--run", str(run), "--resume"]) == 2
        assert f"another training is running (pid {ranks[0].pid} on" in capsys.readouterr().err
    finally:
        ranks[1].send_signal(signal.SIGCONT)
        said = [process.communicate()[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], said
    assert not (run / ".lock").exists()


@pytest.mark.system  # by torchrun itself
def test_fault_B2_ranks_that_are_stopped_stop_together_saved_and_go_on(config: Path) -> None:
    run = config.parent / "stopped"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "twotower",
               "train", str(config), "-r", str(run), "--set", "train.epochs=500"]  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as job:
        while not list((run / "checkpoints").glob("step-*")):
            assert job.poll() is None, "it ended before it was stopped"
            time.sleep(0.05)
        job.send_signal(signal.SIGTERM)
        said, _ = job.communicate(timeout=120)
    assert job.returncode
    assert "exitcode  : -6" not in said
    assert "stopped after step" in said
    step = int(said.split("stopped after step ")[1].split(";")[0])
    assert (run / "checkpoints" / f"step-{step:09d}").is_dir()
    said = torchrun(2, "-m", "twotower", "train", config, "-r", run, "--resume", "--override")
    assert f"resuming after step {step}" in said


def test_ranks_that_see_other_files_are_refused(config: Path) -> None:
    """As on hosts that share no file system: each rank of this script has a folder of its own."""
    script = config.parent / "apart.py"
    script.write_text(
        "import os, sys\n"
        "from pathlib import Path\n"
        "from twotower.cli.app import main\n"
        "rank = os.environ['RANK']\n"
        "extra = ['--set', 'train.lr=0.03'] if rank == '1' else []\n"
        f"sys.argv = ['twotower', 'train', {str(config)!r}, '-r', {str(config.parent)!r} + '/apart' + rank, *extra]\n"
        "main()\n",
        encoding="utf-8",
    )
    said = torchrun(2, script, fails=True)
    assert "the ranks see other settings, data or versions of the libraries" in said
    assert not (config.parent / "apart0" / "model.safetensors").exists()


def test_fault_B7_uneven_shards_and_batches_end_together(undisturbed: Path, config: Path) -> None:
    tables = checkerboard()
    folder = config.parent / "uneven"
    folder.mkdir()
    rows = tables[2].filter((pl.col("user_id") < 2) | (pl.col("item_id") < 3))  # two users have most of the rows
    for name, table in zip(("users", "items", "interactions"), (*tables[:2], rows), strict=True):
        table.write_csv(folder / f"{name}.csv")
    (folder / "config.toml").write_text(CONFIG + CHECKERBOARD_TOML, encoding="utf-8")
    runs = [folder / "two", folder / "one"]
    arguments = ("-m", "twotower", "train", folder / "config.toml", "--set", "train.batch_size=7", "-r")
    torchrun(2, *arguments, runs[0])
    torchrun(1, *arguments, runs[1])
    metrics = [json.loads((r / "metrics.json").read_text(encoding="utf-8")) for r in runs]
    assert metrics[0]["train.steps"] == metrics[1]["train.steps"]


def test_shards_that_cannot_be_dealt_are_refused(config: Path) -> None:
    said = torchrun(2, "-m", "twotower", "train", config, "-r", config.parent / "odd", "--set", "train.data_shards=3",
                    fails=True)  # fmt: skip
    assert "train.data_shards = 3 does not divide among 2 ranks; set a multiple of 2, or 1" in said
    assert not (config.parent / "odd").exists()
