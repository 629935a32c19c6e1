import tomllib
from argparse import Namespace
from itertools import product
from statistics import mean
from typing import Any

import numpy as np
import polars as pl

from benchmarks.lib.processes import ROOT
from benchmarks.lib.report import Report
from twotower import api
from twotower.config.experiment import Config
from twotower.config.toml import override_config, parse_config
from twotower.data.tables import check
from twotower.evaluation.config import WIDTH
from twotower.features.schema import Schema
from twotower.suggestion.suggest import suggest

USERS, ITEMS, CLUSTERS, OWN = 400, 120, 4, 13


def clicks(seed: int) -> pl.DataFrame:
    """Return OWN items of each user's cluster (user row modulo CLUSTERS) and one of any, in random order."""
    rng, rows = np.random.default_rng(seed), list[tuple[int, int, int]]()
    for user in range(USERS):
        own = np.arange(user % CLUSTERS, ITEMS, CLUSTERS)
        items = rng.permutation([*rng.choice(own, OWN, replace=False), rng.integers(ITEMS)])
        rows += [(user, int(item), 1_700_000_000 + 60 * at) for at, item in enumerate(items)]
    return pl.DataFrame(rows, schema=["user", "item", "clicked_at"], orient="row")


def readme() -> tuple[Schema, Config]:
    """Return the config of README.md for clicks."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("```toml\n", 1)[1].split("```")[0]
    schema, config = parse_config(tomllib.loads(text))
    assert schema is not None
    return schema, config


def main(chosen: Namespace, report: Report) -> None:
    seeds = range(1, chosen.seeds + 1)
    given: dict[str, list[str]] = {"README": [], "suggest": []}
    for lr, batch in product(chosen.lr, chosen.batch):
        given[f"README, lr {lr:g}, batch {batch}"] = [f"train.lr={lr}", f"train.batch_size={batch}"]
    found = dict[str, float]()
    for name, overrides in given.items():
        row: dict[str, Any] = report.rows().get(f"first config: {name}", {})
        for seed in map(str, seeds):
            row[seed] = row.get(seed) or recall_and_width(
                name == "suggest", clicks(int(seed)), [*overrides, f"train.seed={seed}"]
            )
        report.write({f"first config: {name}": row})
        each, widths = zip(*(row[str(seed)] for seed in seeds), strict=True)
        report.add(name, each, width=widths[0])
        found[name] = mean(each)
    best = max(list(found)[2:], key=lambda name: found[name])
    for name in ("README", "suggest"):
        report.add(f"{name} over the best of the grid", found[name] / found[best])
    report.add(f"best of the grid ({best})", found[best])


def recall_and_width(suggested: bool, log: pl.DataFrame, overrides: list[str]) -> list[float]:
    """Return recall@10 of the test part, and the width of the vectors."""
    if suggested:
        suggestion = suggest(log, overrides=overrides)
        schema, config = suggestion.schema, suggestion.config
    else:
        schema, config = readme()
        config = override_config(config, overrides)
    metrics = api.fit(check(None, None, log, schema), schema, config).metrics
    return [metrics["test.recall@10"], metrics[f"test.{WIDTH}"]]
