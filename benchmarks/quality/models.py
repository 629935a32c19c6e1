import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from benchmarks.lib.columns import without_columns
from benchmarks.lib.machine import Numbers
from benchmarks.lib.processes import ROOT
from benchmarks.lib.report import Report, declared
from benchmarks.quality.films import Films
from twotower import api
from twotower.config.experiment import Config
from twotower.config.toml import load_config, override_config, parse_config
from twotower.evaluation.config import WIDTH
from twotower.features.schema import Schema
from twotower.features.side import SIDES
from twotower.reports.progress import Progress
from twotower.runs import Run

TABLES: dict[str, Numbers] = declared(__file__)["tables"]


def main(chosen: Namespace, report: Report) -> None:
    table = TABLES[chosen.table]
    report.name = f"{table['name']}: "
    if (bare := table.get("bare", False)) and not chosen.sequences:
        sys.exit(f"--table {chosen.table} needs the archive of its sequences: --sequences path/to/sequences.zip")
    films = Films.read(chosen.sequences) if bare or table.get("films") else None
    baselines = dict(table.get("baselines", {}))
    for name, row in table["rows"].items():
        if chosen.only not in name:
            continue
        schema, config = configured(table, row, [*row.get("set", []), *table["settings"], *filter(None, [chosen.set])])
        tables = None if films is None else films.tables(bare or row.get("ids", False))
        key = f"{table['name']}: {name}"
        seeds: dict[str, Numbers] = report.rows().get(key, {})
        for seed in range(chosen.first_seed, chosen.first_seed + chosen.seeds):
            seeds[str(seed)] = seeds.get(str(seed)) or train(tables, schema, config, seed).metrics
            report.write({key: seeds})
        runs = list(seeds.values())
        while baselines:
            what, metric = baselines.popitem()
            report.add(what, runs[0][metric])
        for what, metric in table["metrics"].items():
            ends = [runs[-1].get(f"{metric}.{end}") for end in ("low", "high")]
            given: Numbers = {"interval": ends} if None not in ends else {}
            given |= {"unit": "s", "more": False} if metric == "train.seconds" else {}
            width = runs[0].get(f"test.{WIDTH}")
            report.add(f"{name}, {what}", [run[metric] for run in runs], width=width, **given)


def configured(table: Numbers, row: Numbers, settings: list[str]) -> tuple[Schema | None, Config]:
    if "file" in row:
        schema, config = load_config(ROOT / row["file"], settings)
        return schema, beside(config, row["pairs"]) if "pairs" in row else config
    pairs: Numbers = {"model": {"pairs": [dict.fromkeys(SIDES, row["tower"])]}} if "tower" in row else {}
    return None, override_config(parse_config(table["plain"] | pairs)[1], settings)


def beside(config: Config, changes: list[Numbers]) -> Config:
    """Return the config with its first pair once for each of some `changes` of its user tower, each trained apart if
    there are several, without the other pairs, closed forms and narrow vectors."""
    given = config.model_dump(mode="json")
    first = given["model"]["pairs"][0]
    given["model"]["pairs"] = [first | {"user": first["user"] | changed} for changed in changes]
    given["train"] |= {"pairs": "apart" if len(changes) > 1 else "together", "solved": []}
    given["narrow"] = {"width": 0}
    return Config.model_validate(given)


def train(tables: Any, schema: Schema | None, config: Config, seed: int, folder: Path | None = None) -> Run:
    config = override_config(config, [f"train.seed={seed}"])
    if tables is None:
        tables, schema = api.read(config, schema)
    else:
        assert schema is not None
        schema, config = without_columns(
            schema.model_copy(update={"time_unit": "order"}), config, tables[0].columns, tables[1].columns
        )
    return api.fit(tables, schema, config, folder=folder, callback=Progress())
