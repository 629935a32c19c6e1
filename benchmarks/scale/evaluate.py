import shutil
from argparse import Namespace
from pathlib import Path

from benchmarks.lib.processes import TWOTOWER, call, run
from benchmarks.lib.report import Report
from benchmarks.scale.world import write_world

SETTINGS = ["split.test=0.1", "split.validation=0.05", "evaluation.max_users=0", "evaluation.k=[10]"]


def main(chosen: Namespace, report: Report) -> None:
    folder, memory = Path(chosen.folder).resolve() / "evaluate", list[float]()
    for size in chosen.sizes:
        rows, users = map(int, size.split("x"))
        config = write_world(folder, users, chosen.items, rows)
        call(make_run, str(folder), str(config))
        ran = run([*TWOTOWER, "evaluate", folder / "run", "--threads", chosen.threads])
        report.add_cost(f"{rows:,} interactions of {users:,} users, evaluate", ran)
        memory.append(ran.memory)
        shutil.rmtree(folder)
    report.add("memory of evaluate, the last size / the first", memory[-1] / memory[0], more=False)


def make_run(folder: str, config: str) -> None:
    """Write a run of random weights on prepared data."""
    import torch

    from twotower import api, runs
    from twotower.config.toml import load_config
    from twotower.model.two_tower import TwoTower

    schema, settings = load_config(Path(config), SETTINGS)
    assert schema is not None
    data = api.prepare_folder(settings, schema, Path(folder, "prepared"))
    torch.manual_seed(0)
    model = TwoTower(settings.model, data.encoders.fields("user"), data.encoders.fields("item")).eval()
    to = Path(folder, "run")
    to.mkdir()
    runs.start_run(to, data, settings)
    epoch = {"epoch": 1, "step": 1, "train.loss": 0.7}
    runs.save_run(to, runs.Run(to, settings, data, model, {"train.best_epoch": 1}, [epoch]))
