"""Tables in pieces train what whole ones train, and leave the same files."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path
from typing import Any

import kill_points
import numpy as np
import preloaded
import pytest
import ranked
import torch
from safetensors.torch import load_file
from test_distributed import CONFIG, HERE, selected, torchrun
from worlds import CHECKERBOARD_TOML, checkerboard, settings

import twotower
from twotower import api
from twotower.config.toml import load_config, parse_config
from twotower.data.dataset import Dataset
from twotower.distributed import DistributedContext
from twotower.errors import ConfigError, TrainingError
from twotower.model.tables import Table, named_tables
from twotower.train.progress import Callback
from twotower.train.torchrec.embeddings import import_torchrec, is_installed
from twotower.train.torchrec.shard import padded_width
from twotower.train.trainer import Trainer

ALONE = DistributedContext()


@pytest.fixture(scope="module", autouse=True)
def loaded() -> None:
    """TorchRec takes seconds to import."""
    preloaded.load("torchrec", "twotower.train.torchrec.table_group")


@pytest.fixture(scope="module")
def together(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The cases of this session, trained by two ranks in one go."""
    out = tmp_path_factory.mktemp("torchrec")
    cases = selected(request, "test_two_ranks_train_with_pieces_what_one_trains_with_whole_tables")
    torchrun(2, HERE / "ranked.py", out, *cases)
    return out, cases


def close(found: dict[str, Any], expected: dict[str, Any], bound: float = 2e-5) -> None:
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-4, atol=bound, err_msg=name)


@pytest.mark.parametrize("case", ranked.TORCHREC)
def test_two_ranks_train_with_pieces_what_one_trains_with_whole_tables(
    together: tuple[Path, list[str]], case: str
) -> None:
    out, cases = together
    number, (of, train) = cases.index(case), ranked.TORCHREC[case]
    alone = ranked.single(of, **{k: v for k, v in train.items() if k != "embedding_sharding"})
    names = [n.removeprefix("initial/") for n in alone if n.startswith("initial/")]
    first, second = (dict(np.load(out / f"{number}-{rank}.npz")) for rank in range(2))
    deep = of == "attention"  # deep towers make rounding grow
    close({n: first[n] for n in names}, {n: alone[n] for n in names}, 3e-4 if deep else 2e-5)
    np.testing.assert_allclose(first["history"], alone["history"], rtol=2e-4, atol=1e-3 if deep else 2e-5)
    assert np.array_equal(first["history"], second["history"])
    # The second rank holds no table whole that was to be cut, and no piece that is as large as all tables.
    tables = [n for n in names if ".tables." in n or n.endswith("table.weight")]
    held = sum(second[n].size for n in tables)
    assert 0 < held < 0.8 * sum(np.prod([alone[n].shape[0], padded_width(alone[n].shape[1])]) for n in tables)
    if train["embedding_sharding"] in ("column_wise", "row_wise"):
        cut = [n for n in tables if alone[n].shape[1] >= 8]
        assert cut
        assert all(second[n].size < 0.6 * alone[n].size for n in cut)


def test_one_process_trains_with_torchrec_what_it_trains_without() -> None:
    for case, train in (
        ("earlier", {}),
        ("beside", {}),
        ("pairs", {"optimizer": "Adagrad", "lr": 0.05}),
        ("pairs", {"optimizer": "Adam"}),
    ):
        alone = {n: a for n, a in ranked.single(case, **train).items() if not n.startswith("initial/")}
        with ALONE.process_group(always=True):
            found = ranked.results(ranked.trainer(case, embedding_placement="torchrec", **train))
        close(found, alone, 2e-5)


# ---- checkpoints


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    body = CONFIG + CHECKERBOARD_TOML
    for name, table in zip(("users", "items", "interactions"), checkerboard(), strict=True):
        table.write_csv(folder / f"{name}.csv")
    # Nothing that ranks draw by themselves, and no softmax: it leaves the biases of users to rounding.
    for old, new in (
        (
            "lr = 0.02",
            'lr = 0.1, optimizer = "Adagrad", embedding_placement = "torchrec", embedding_sharding = "column_wise"',
        ),
        ("model.width = 8", "model = { width = 8, unknown_rate = 0.0 }"),
        ('loss.kind = "softmax"', 'loss.kind = "bce"'),
    ):
        assert old in CONFIG
        body = body.replace(old, new)
    (folder / "config.toml").write_text(body, encoding="utf-8")
    return folder / "config.toml"


@pytest.fixture(scope="module")
def undisturbed(config: Path) -> Path:
    run = config.parent / "undisturbed"
    torchrun(2, "-m", "twotower", "train", config, "-r", run)
    return run


@pytest.fixture(scope="module")
def killed(config: Path) -> Path:
    """A run of two ranks of which the second died after step 15; its checkpoint is of step 12, amid an epoch."""
    run = config.parent / "killed"
    torchrun(2, *kill_points.program("step:15:1"), "train", config, "-r", run, fails=True)
    assert [p.name for p in sorted((run / "checkpoints").glob("step-*"))][-1] == "step-000000012"
    return run


def fit(config: Path, run: Path, resume: bool = True, **train: Any) -> None:
    schema, chosen = load_config(config, [f"train.{k}={json.dumps(v)}" for k, v in train.items()])
    tables, schema = api.read(chosen, schema)
    api.fit(tables, schema, chosen, folder=run, resume=resume)


REPLICATED = {"embedding_placement": "replicated", "embedding_sharding": "auto"}


def weights(run: Path) -> dict[str, Any]:
    return {n: t.numpy() for n, t in load_file(run / "model.safetensors").items()}


def test_a_killed_run_goes_on_to_the_same_bits(config: Path, killed: Path, undisturbed: Path) -> None:
    run = shutil.copytree(killed, config.parent / "again")
    said = torchrun(2, "-m", "twotower", "train", config, "-r", run, "--resume")
    assert "resuming after step 12" in said
    assert (run / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()


def test_a_killed_run_of_pieces_is_read_at_its_best_epoch(killed: Path) -> None:
    found = api.load(killed)
    assert found.unfinished == "stopped after epoch 1 of 3; the best is epoch 1"
    measured = api.evaluate(found)
    validated = {name: v for name, v in found.history[0].items() if name in measured}
    assert len(validated) > 5
    assert validated == pytest.approx({name: measured[name] for name in validated}, abs=1e-6)


@pytest.mark.parametrize("train", [REPLICATED, {"embedding_sharding": "auto"}])
def test_a_run_of_pieces_goes_on_with_whole_tables_and_with_other_ranks(
    config: Path, killed: Path, undisturbed: Path, train: dict[str, Any]
) -> None:
    run = shutil.copytree(killed, config.parent / f"on-{train.get('embedding_placement', 'torchrec')}")
    fit(config, run, **train)
    close(weights(run), weights(undisturbed))


@pytest.mark.system
def test_a_run_of_whole_tables_goes_on_in_pieces(config: Path, undisturbed: Path) -> None:
    run = config.parent / "whole"

    class Stop(Callback):
        def on_step_end(self, number: int, of: int, loss: float) -> None:
            if number == 5:
                raise TrainingError("stop")

    schema, chosen = load_config(config, [f"train.{k}={v}" for k, v in REPLICATED.items()])
    tables, schema = api.read(chosen, schema)
    with pytest.raises(TrainingError, match="stop"):
        api.fit(tables, schema, chosen, folder=run, callback=Stop())
    last = sorted((run / "checkpoints").glob("step-*"))[-1]
    before = {n: t.shape for n, t in load_file(last / "tensors.safetensors").items()}
    said = torchrun(2, "-m", "twotower", "train", config, "-r", run, "--resume")
    assert "resuming after step 4" in said
    close(weights(run), weights(undisturbed))
    after = {
        n: t.shape
        for n, t in load_file(sorted((run / "checkpoints").glob("step-*"))[-1] / "tensors.safetensors").items()
    }
    assert {n: s for n, s in after.items() if not n.startswith("best/")} == before


def test_a_run_of_pieces_leaves_a_plain_run(undisturbed: Path) -> None:
    done = api.load(undisturbed)
    assert all(type(table) is Table for _, table in named_tables(done.model))
    measured = api.evaluate(done)
    assert measured["test.auc"] == pytest.approx(done.metrics["test.auc"], abs=1e-6)


# ---- what is refused


def trainer(board: Dataset, folder: Path | None = None, **train: Any) -> Trainer:
    return Trainer(board, settings(train={"device": "cpu", "embedding_placement": "torchrec"} | train), folder)


def test_without_a_group_it_is_refused(board: Dataset) -> None:
    with pytest.raises(ConfigError, match=r"needs a process group, which twotower.fit makes; here set train"):
        trainer(board)


def test_without_torchrec_it_is_refused(board: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torchrec", None)
    with pytest.raises(
        ConfigError, match=r"needs TorchRec .*pip install --no-deps 'torchrec==1\.\d+\.\*' 'fbgemm-gpu-cpu"
    ):
        trainer(board)


def test_a_sharding_of_whole_tables_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"embedding_sharding = 'row_wise' goes with embedding_placement = 'torchrec'; set that too"
    ):
        parse_config({"train": {"embedding_sharding": "row_wise"}})


def test_a_piece_says_that_it_is_one(board: Dataset) -> None:
    with ALONE.process_group(always=True):
        made = trainer(board)
        with pytest.raises(RuntimeError, match="a shard of the table and no batch rows"):
            made.model.user_vectors(made.objective.users.take(np.arange(3)))


def test_a_loss_that_is_not_finite_leaves_the_pieces_as_they_were(board: Dataset) -> None:
    with ALONE.process_group(always=True):
        made = trainer(board, optimizer="SGD")
        before = {n: p.detach().clone() for n, p in made.model.named_parameters()}
        with torch.no_grad():
            made.model.global_bias.fill_(torch.inf)
        with pytest.raises(TrainingError, match="the loss is"):
            made.step(made.objective.sampler.epoch(0), 0)
        for name, parameter in made.model.named_parameters():
            assert name == "global_bias" or torch.equal(parameter, before[name]), name


def test_a_checkpoint_saved_again_without_a_step_keeps_the_sums_of_adagrad(board: Dataset, tmp_path: Path) -> None:
    with ALONE.process_group(always=True):
        made = trainer(board, tmp_path, optimizer="Adagrad")
        for batch in range(made.objective.steps_per_epoch):
            made.step(made.objective.sampler.epoch(0), batch)
        made.checkpoints.save(made.progress)  # of an epoch's last step, before the epoch has ended
        expected = made.optimizer.state()
        assert [name for name in expected if name.startswith("sum/") and ".tables." in name]
        for _ in range(2):
            again = trainer(board, tmp_path, optimizer="Adagrad")
            assert again.resume()
            assert again.progress.batch == again.objective.steps_per_epoch
            state = again.optimizer.state()
            assert state.keys() == expected.keys()
            assert all(torch.equal(state[name], value) for name, value in expected.items())
            again.checkpoints.save(again.progress)


@pytest.mark.parametrize(
    ("kind", "message"), [("mps", "not on 'mps'"), ("cuda", "needs fbgemm-gpu, and its CPU build")]
)
def test_devices_that_cannot_do_it_are_refused(kind: str, message: str) -> None:
    if kind == "cuda" and is_installed("fbgemm-gpu"):
        pytest.fail("this machine has the kernels of a GPU: look at what the test says of their absence")
    with pytest.raises(ConfigError, match=message):
        import_torchrec(torch.device(kind))


def test_an_installation_of_the_checkout_and_of_the_extra_keeps_torch_at_one_bound() -> None:
    root = Path(twotower.__file__).parents[2]
    extras = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    (bound,) = (requirement for requirement in extras["torchrec"] if requirement.startswith("torch<"))
    assert f"\nTORCH = {bound}\n" in (root / "Makefile").read_text(encoding="utf-8")
    major, minor = map(int, torch.__version__.split(".")[:2])
    assert (major, minor) < tuple(map(int, bound.removeprefix("torch<").split(".")))
