import tempfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import polars as pl

from benchmarks.lib.report import Report
from benchmarks.quality.recipes import LOGS, SEED
from twotower import api
from twotower.data.source import read
from twotower.evaluation.config import WIDTH
from twotower.suggestion.suggest import suggest

TEST, VALIDATION = 0.2, 0.1
"""Shares of each user's rows."""


def main(chosen: Namespace, report: Report) -> None:
    pairs = LOGS[chosen.log](chosen.sequences).interactions.select("user_id", "item_id")
    pairs = pairs.with_columns(drawn=pl.Series(np.random.default_rng(SEED).random(len(pairs))))
    place = (pl.col("drawn").rank("ordinal") - 0.5) / pl.len()
    pairs = pairs.select("user_id", "item_id", place=place.over("user_id"))
    test, rest = pairs.filter(pl.col("place") < TEST), pairs.filter(pl.col("place") >= TEST)
    held = pl.col("place") < TEST + VALIDATION
    folders = {
        "with validation": {"train": rest.filter(~held), "validation": rest.filter(held), "test": test},
        "without validation": {"train": rest, "test": test},
    }
    found = dict[str, float]()
    for name, parts in folders.items():
        with tempfile.TemporaryDirectory() as folder:
            for part, rows in parts.items():
                rows.drop("place").write_csv(Path(folder, f"{part}.csv"))
            suggestion = suggest(folder, folder=folder, overrides=filter(None, chosen.set))
            metrics = api.fit(*read(suggestion.config, suggestion.schema), suggestion.config).metrics
        for metric in ("ndcg@20", "recall@20"):
            report.add(f"{name}, {metric}", metrics[f"test.{metric}"], width=metrics[f"test.{WIDTH}"])
            report.add(f"{name}, {metric}, popularity", metrics[f"baseline.popularity.{metric}"])
        found[name] = metrics["test.ndcg@20"]
    report.add("without validation over with, ndcg@20", found["without validation"] / found["with validation"])
