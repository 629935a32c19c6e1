"""Backtest of a recipe as it is served: train on the past of a cut, publish, and answer for the period after it.

backtest.json              what the backtest is made of
2013-04-28/run             of each cut the run while it is trained
2013-04-28/values.parquet  then a row for each user with something to find
backtest.html              the page
"""

from __future__ import annotations

import dataclasses
import io
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, tzinfo
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from zoneinfo import ZoneInfo

import numpy as np
import polars as pl

from twotower import files
from twotower.config.experiment import Config
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.parts import PART
from twotower.data.reading.times import MICROSECONDS, TIME
from twotower.data.split import SplitConfig
from twotower.data.splits import TEST, TRAIN
from twotower.data.tables import Tables, without_repeated_pairs
from twotower.errors import ConfigError, DataError, RunError
from twotower.evaluation.baselines import BASELINES, baseline_of, popularity_baseline
from twotower.evaluation.factors import CatalogueScorer
from twotower.evaluation.metrics.measured import RankedItems
from twotower.evaluation.part_evaluation import MODEL
from twotower.features.schema import Schema
from twotower.features.side import SIDES, SideName
from twotower.files import JsonData
from twotower.files.readers import read_json
from twotower.publishing.challenge import answers, measure_of, new_queries
from twotower.publishing.publisher import publish
from twotower.reports.backtest import KNOWN, RECENT, Backtest, Fold, write_page
from twotower.retrieval.retriever import Retriever
from twotower.runs import Run
from twotower.runs.folder import is_complete
from twotower.scorers import alone

log = logging.getLogger(__name__)

FACTS, VALUES, PAGE = "backtest.json", "values.parquet", "backtest.html"
Train = Callable[[Tables, Path], Run]
"""Training of tables into a folder, which goes on with what it finds there."""
DAY = 86_400 * MICROSECONDS
FIRST_SUNDAY = date(1970, 1, 4).toordinal()


@dataclass(frozen=True)
class Schedule:
    """Cuts of a backtest: the last `folds` whole periods of `every` days, counted from Sunday 1970-01-04 at midnight in
    a time zone. Rows of the last `gap` days before a cut are not known at it."""

    every: int = 7
    folds: int = 8
    gap: int = 0
    zone: str = "UTC"

    def boundaries(self, newest: int) -> list[tuple[str, int]]:
        """Return the folds + 1 dates of the boundaries and their microseconds since 1970. The last is no later than the
        end of the day of the newest row. Raises ConfigError for an unknown zone."""
        zone = _zone(self.zone)
        after = datetime.fromtimestamp(newest // MICROSECONDS, zone).toordinal() + 1
        last = after - (after - FIRST_SUNDAY) % self.every
        days = [date.fromordinal(last - self.every * n) for n in range(self.folds, -1, -1)]
        starts = [datetime(day.year, day.month, day.day, tzinfo=zone).timestamp() for day in days]
        return [(day.isoformat(), int(start) * MICROSECONDS) for day, start in zip(days, starts, strict=True)]


def days_of(text: str, option: str, least: int = 1) -> int:
    """Return the number of days of a text such as 7d. Raises ConfigError."""
    if not re.fullmatch(r"\d{1,4}d", text) or int(text[:-1]) < least:
        raise ConfigError(f"{option} {text}: expected whole days from {least}d to 9999d, such as 7d")
    return int(text[:-1])


def _zone(name: str) -> tzinfo:
    try:
        return UTC if name == "UTC" else ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        raise ConfigError(f"no time zone '{name}' on this machine; give UTC or a name such as Asia/Shanghai") from None


def measure_folds(
    tables: Tables, schema: Schema, config: Config, out: Path | str, schedule: Schedule, latest: bool, train: Train
) -> Backtest:
    """Measure each fold of a backtest, train it with `train`, and write the page, as `twotower.backtest` says."""
    out, rows = Path(out), _log_of(tables, schema, config)
    folds, (measure, _, metric) = _folds(rows, schema, schedule), measure_of(config.evaluation, "")
    _claim(out, {
        "config": config.model_dump(mode="json"), "schema": schema.model_dump(mode="json"),
        "schedule": dataclasses.asdict(schedule), "latest": latest,
        "log": [_digest(rows), _digest(tables.users), _digest(tables.items)],
    })  # fmt: skip
    for number, fold in enumerate(folds, start=1):
        values = out / fold.date / VALUES
        if not values.exists():
            files.remove_leftovers(values.parent, lambda name: name == VALUES)
            log.info(f"fold {number} of {len(folds)}: rows before {fold.date}, asked for {fold.date} to {fold.until}")
            buffer = io.BytesIO()
            _measure(fold, rows, tables, schema, config, values.parent / "run", latest, train).write_parquet(buffer)
            files.write(values, buffer.getvalue())
        shutil.rmtree(values.parent / "run", ignore_errors=True)
        fold.values = pl.read_parquet(values)
    done = Backtest(folds, metric, measure.higher_is_better)
    write_page(out / PAGE, done, f"twotower: backtest of {len(folds)} periods of {schedule.every} days")
    return done


def _log_of(tables: Tables, schema: Schema, config: Config) -> pl.DataFrame:
    """Return the interactions by time, with those that `tables` leaves out as their pair comes again. Raises
    ConfigError for what has no past."""
    if not schema.has_moments:
        raise ConfigError("a backtest cuts the log at dates, which it has none of; name schema.time, of a unit")
    if tables.versions:
        raise ConfigError("a backtest reads users and items without versions; leave schema.valid_from out")
    if config.split.is_given:
        raise ConfigError(f"split.kind = '{config.split.kind}' gives parts of the whole log; set split.kind = 'time'")
    every = [frame for frame in (tables.left_out, tables.interactions) if frame is not None]
    return pl.concat(every).sort(TIME, maintain_order=True)


def _folds(rows: pl.DataFrame, schema: Schema, schedule: Schedule) -> list[Fold]:
    """Return the folds, without values. Raises DataError for one without rows."""
    oldest, newest = int(rows[TIME][0]), int(rows[TIME][-1])
    first = datetime.fromtimestamp(oldest // MICROSECONDS, _zone(schedule.zone)).date().isoformat()
    if (days := (newest - oldest) // DAY + 1) <= schedule.gap:
        raise DataError(f"a gap of {schedule.gap} days is longer than the log, which has {days:,} days; give less")
    found, boundaries = list[Fold](), schedule.boundaries(newest)
    for (start, begin), (stop, end) in pairwise(boundaries):
        known = begin - schedule.gap * DAY
        past, period = _before(rows, known), rows.filter(pl.col(TIME).is_between(begin, end, closed="left"))
        if not past.height:
            raise DataError(f"no rows before {start} less the gap: the log begins on {first}; give fewer folds")
        if not period.height:
            raise DataError(f"no rows from {start} to {stop}, the period of a fold; give longer periods or fewer folds")
        old = period.join(past, on=schema.item_id, how="semi").height
        found.append(Fold(start, stop, known, begin, end, period.height, period.height - old))
    return found


def _before(rows: pl.DataFrame, time: int) -> pl.DataFrame:
    return rows.filter(pl.col(TIME) < time)


def _digest(table: pl.DataFrame) -> str:
    """Return the number of rows of a table, and a sum of the hashes of their values that are no lists."""
    flat = [name for name, dtype in table.schema.items() if not dtype.is_nested()]
    return f"{table.height} rows, {table.select(flat).hash_rows().sum()}"


def _claim(out: Path, facts: Mapping[str, JsonData]) -> None:
    """Write what the backtest is made of into its folder. Raises RunError if the folder holds something else."""
    place = out / FACTS
    files.remove_leftovers(out, lambda name: name in (FACTS, PAGE))
    if place.exists():
        earlier = read_json(place)
        if differing := [name for name in facts if earlier.get(name) != facts[name]]:
            raise RunError(f"{out}: holds a backtest of another {', '.join(differing)}; choose another folder")
        return
    if out.exists() and any(out.iterdir()):
        raise RunError(f"{out}: holds something else than a backtest; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    files.write_json(place, facts)


def _measure(
    fold: Fold, rows: pl.DataFrame, tables: Tables, schema: Schema, config: Config, folder: Path, latest: bool,
    train: Train,
) -> pl.DataFrame:  # fmt: skip
    """Train, publish and ask a fold; return the values of its users."""
    past = _past(fold, rows, tables, schema)
    dataset = _judged(fold, rows, past, tables, schema)
    queries, first, begin = new_queries(dataset, config.evaluation, fold.begin - 1)
    if not len(queries.users):
        raise DataError(
            f"no user has a positive of {fold.date} to {fold.until} that is new to them and of an item from before; "
            "give longer periods or fewer folds"
        )
    if is_complete(folder):  # of a process that was killed before it had measured
        shutil.rmtree(folder)
    run = train(past, folder)
    k = max(config.evaluation.k)
    with TemporaryDirectory(prefix="twotower-backtest-", ignore_cleanup_errors=True) as scratch:
        bundle = publish(run, Path(scratch) / "store", force=True, latest=latest and past)
        best = {MODEL: answers(Retriever(bundle), dataset, queries.users, first, begin, k)}
    known = dataset.user_counts[queries.users] > 0
    popular = _popularity(dataset, fold)
    best |= {name: queries.top_k(scorer, k) for name, scorer in popular.items()}
    for name, scorer in alone(dataset, TEST, config.evaluation, ()):
        best[name] = np.where(known[:, None], queries.top_k(scorer, k), best[[*popular][-1]])
    items, columns = RankedItems.of(dataset), dict[str, object]()
    for name, found in best.items():
        rankings = queries.rankings(found, items, False)
        for k in config.evaluation.k:
            for metric in config.evaluation.metric_set.of_users:
                columns[f"{name} {metric.name}@{k}"] = metric.values(rankings.at(k))
    ids = dataset.users.ids.gather(queries.users).cast(pl.String)
    return pl.DataFrame({"user": ids, KNOWN: known, **columns})


def _popularity(dataset: Dataset, fold: Fold) -> dict[str, CatalogueScorer]:
    """Return the baselines that need no history of a user, by name; the last one answers for others to new users."""
    found: dict[str, CatalogueScorer] = {name: baseline_of(name, dataset) for name in BASELINES}
    for name, days in RECENT.items():
        recent = dataset.train.take(np.flatnonzero(dataset.times_of(TRAIN) >= fold.known - days * DAY))
        found[name] = popularity_baseline(recent, len(dataset.users), len(dataset.items))
    return found


def _past(fold: Fold, rows: pl.DataFrame, tables: Tables, schema: Schema) -> Tables:
    """Return the tables as they were at a cut."""
    before = _before(rows, fold.known)
    kept, left_out = without_repeated_pairs(before, schema, [])
    sides = _sides(before, tables, schema)
    return Tables(sides["user"], sides["item"], kept, left_out=left_out)


def _judged(fold: Fold, rows: pl.DataFrame, past: Tables, tables: Tables, schema: Schema) -> Dataset:
    """Return the dataset whose train part is the past, and whose test part has the rows of the period with items of the
    past."""
    period = rows.filter(pl.col(TIME).is_between(fold.begin, fold.end, closed="left"))
    period = period.join(past.items, on=schema.item_id, how="semi", maintain_order="left")
    period, _ = without_repeated_pairs(period, schema, [])
    parts = [(past.interactions, TRAIN), (period, TEST)]
    both = pl.concat([frame.with_columns(pl.lit(part, pl.Int8).alias(PART)) for frame, part in parts])
    sides = _sides(both, tables, schema)
    split = SplitConfig(kind="files", ordered=True, validation=0)
    return build_dataset(Tables(sides["user"], past.items, both), schema, split)


def _sides(rows: pl.DataFrame, tables: Tables, schema: Schema) -> dict[SideName, pl.DataFrame]:
    """Return the rows of the tables of both sides whose ids some interactions have."""
    given: dict[SideName, pl.DataFrame] = {"user": tables.users, "item": tables.items}
    return {
        side: given[side].join(rows, on=schema.id_column(side), how="semi", maintain_order="left") for side in SIDES
    }
