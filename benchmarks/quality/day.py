import tempfile
import time
import zipfile
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

from benchmarks.lib.report import Report
from twotower import api
from twotower.arrays.types import Doubles, Shaped
from twotower.config.toml import load_config
from twotower.data.source import read
from twotower.data.tables import Tables
from twotower.evaluation.part_evaluation import MODEL
from twotower.publishing.backtest import Schedule
from twotower.reports.backtest import Backtest, Interval
from twotower.suggestion.suggest import suggest

RESAMPLES = 10_000
VARIANTS = {"all-known": Schedule(), "a-week-unknown": Schedule(gap=7)}
"""Schedule of each backtest, by the name of its folder; the first is compared with the others."""


def main(chosen: Namespace, report: Report) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(chosen.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        write_tables(chosen.log, folder)
        config = folder / "day.toml"
        if not config.exists():
            suggestion = suggest(folder / "ratings.parquet", items=folder / "movies.parquet", folder=folder)
            config.write_text(suggestion.text, encoding="utf-8")
        schema, settings = load_config(config, ["train.refit=true", *filter(None, chosen.set)])
        tables, schema = read(settings, schema)
        assert isinstance(tables, Tables)
        done = dict[str, Backtest]()
        for name, schedule in VARIANTS.items():
            started = time.perf_counter()
            out, schedule = folder / name, Schedule(folds=chosen.folds, gap=schedule.gap)
            done[name] = api.backtest(tables, schema, settings, out, schedule, latest=True)
            report.add(f"{name}, minutes", (time.perf_counter() - started) / 60, more=False)
    first, *others = VARIANTS
    for metric in done[first].metrics[:2]:
        for name, found in done.items():
            report.add(f"{name}, {metric}, the model", found.total(MODEL, metric).mean)
        for scorer in done[first].simple:
            report.add(f"{first}, {metric}, {scorer}", done[first].total(scorer, metric).mean)
        simple = done[first].simple[0]
        pairs = [fold.of(MODEL, metric) - fold.of(simple, metric) for fold in done[first].folds]
        add_difference(report, f"{first}, {metric}, the model less {simple}", pairs)
        for name in others:
            pairs = differences(done[first], done[name], metric)
            add_difference(report, f"{metric}, {first} less {name}", pairs)


def write_tables(log: str, folder: Path) -> None:
    """Write the ratings and the films of an archive as Parquet, without those that are there."""
    if (folder / "movies.parquet").exists():
        return
    if log:
        with zipfile.ZipFile(log) as archive:
            ratings, films = (
                [line.split("::") for line in archive.read(name).decode().splitlines()]
                for name in ("ratings.dat", "movies.dat")
            )
    else:
        rng = np.random.default_rng(0)
        users, items = rng.integers(0, 200, 6_000), rng.integers(0, 40, 6_000)
        items += 40 * (users % 2)
        seconds = 1_700_000_000 + np.sort(rng.integers(0, 60 * 86_400, 6_000))
        ratings = [[str(u), str(i), "8", str(t)] for u, i, t in zip(users, items, seconds, strict=True)]
        films = [[str(i), f"Film {i}", "Drama" if i < 40 else "Comedy"] for i in range(80)]
    log_table = pl.DataFrame(ratings, schema=["user", "item", "rating", "time"], orient="row")
    log_table.with_columns(pl.col("user", "rating", "time").cast(pl.Int64)).write_parquet(folder / "ratings.parquet")
    columns = [[*line, ""][:3] for line in films]
    table = pl.DataFrame(columns, schema=["item", "title", "genres"], orient="row")
    table.unique("item", maintain_order=True).write_parquet(folder / "movies.parquet")


def differences(one: Backtest, other: Backtest, metric: str) -> list[Shaped[Doubles, "n"]]:
    """Return the paired differences of the users of each fold that both have."""
    found = []
    for a, b in zip(one.folds, other.folds, strict=True):
        column = f"{MODEL} {metric}"
        both = a.values.select("user", column).join(b.values.select("user", other=column), on="user")
        found.append((both[column] - both["other"]).to_numpy())
    return found


def over_weeks_and_users(folds: Sequence[Shaped[Doubles, "n"]]) -> Interval:
    """Return the mean over users with its 95 % interval by a bootstrap over weeks, and over users within them."""
    rng, means = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        weeks = [folds[week] for week in rng.integers(0, len(folds), len(folds))]
        drawn = [values[rng.integers(0, len(values), len(values))] for values in weeks]
        means.append(sum(values.sum() for values in drawn) / sum(map(len, drawn)))
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(np.concatenate(folds).mean()), float(low), float(high))


def add_difference(report: Report, name: str, folds: Sequence[Shaped[Doubles, "n"]]) -> None:
    found = over_weeks_and_users(folds)
    report.add(name, found.mean)
    report.add(f"{name}, lower end", found.low)
    report.add(f"{name}, upper end", found.high)
