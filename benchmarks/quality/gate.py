"""Verdicts of the champion gate on models with a known fault, and on models with none."""

import copy
import math
import shutil
import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import polars as pl

from benchmarks.lib.report import Report, declared
from twotower import api
from twotower.arrays.types import Doubles, Shaped
from twotower.config.toml import override_config, parse_config
from twotower.data.reading.times import MICROSECONDS
from twotower.evaluation.config import EvaluationConfig
from twotower.files import layout
from twotower.index import tune_index
from twotower.index.faiss.ivf import Ivf
from twotower.publishing.challenge import judge, measure_of, user_values
from twotower.retrieval.batches import embed_users
from twotower.retrieval.retriever import Retriever
from twotower.runs import Run

DECLARED = declared(__file__)
METRIC, K = "ndcg@10", 10
POWER, LEVEL = 0.99, 0.05
"""Power and two-sided level from which the number of users is calculated."""
NORMAL = NormalDist()
BOUND = NORMAL.inv_cdf(1 - LEVEL / 2)
NAMED, FALSELY = 57 / 60, 2 / 40
"""Share of the faults that is named at least, and of the cases with nothing wrong at most."""
FAULTS = ("index of recall .8", "histories a week old", "shuffled labels", "half of the items dropped")
SOUND = "another seed, exchanged"
INFORMING = ("another seed", "served by inverted lists")
WEEKS, WEEK, TASTES = 8, 7 * 86_400, 3
START = 1_700_000_000 // WEEK * WEEK
SHOWN = 4
"""Items shown to a user in a week, on average."""
TEST_FROM = START + (WEEKS - 1) * WEEK
"""Begin of the last week."""


class Effect(NamedTuple):
    """Paired differences of a challenger among users."""

    mean: float
    spread: float
    """Standard deviation."""

    @classmethod
    def of(cls, differences: Shaped[Doubles, "n"]) -> "Effect":
        return cls(float(differences.mean()), float(differences.std(ddof=1)))

    def users(self) -> int:
        """Return the smallest n with z(1 - LEVEL / 2) + z(POWER) standard errors between the mean and 0.

        The mean of n users has the standard error spread / sqrt(n), so n = ((z + z') spread / mean)^2. Raises
        ValueError for a mean that is not below 0, which no number of users names."""
        if self.mean >= 0:
            raise ValueError(f"the fault does no harm: the mean difference is {self.mean:+.4f}")
        return math.ceil(((BOUND + NORMAL.inv_cdf(POWER)) * self.spread / self.mean) ** 2)

    def chance(self, n: int) -> float:
        """Return the probability that the interval of n users is below 0, by the normal approximation."""
        return NORMAL.cdf(-BOUND - self.mean / self.spread * math.sqrt(n))


def made_log(n_users: int, n_items: int, seed: int) -> pl.DataFrame:
    """Return rows of user_id, item_id, liked, at (seconds) and part: the last week is the test, the two days before it
    validation.

    A user has TASTES of n_items / 30 groups of items, and one of them changes with each second week. Of the items shown
    half are of a taste, the others of any group; of a taste four of five are liked, of others one of ten."""
    rng, groups = np.random.default_rng(seed), max(TASTES, n_items // 30)
    weight = 1.0 / (1 + np.arange(n_items // groups))
    tastes = rng.integers(0, groups, (n_users, TASTES))
    columns: dict[str, list[np.ndarray[tuple[int], np.dtype[np.int64]]]] = {}
    for week in range(WEEKS):
        changed = np.flatnonzero(rng.random(n_users) < 0.5)
        tastes[changed, rng.integers(0, TASTES, len(changed))] = rng.integers(0, groups, len(changed))
        user = np.repeat(np.arange(n_users), rng.poisson(SHOWN, n_users))
        own = rng.random(len(user)) < 0.5
        group = np.where(own, tastes[user, rng.integers(0, TASTES, len(user))], rng.integers(0, groups, len(user)))
        item = group + groups * rng.choice(len(weight), len(user), p=weight / weight.sum())
        liked = rng.random(len(user)) < np.where((group[:, None] == tastes[user]).any(1), 0.8, 0.1)
        at = START + week * WEEK + rng.integers(0, WEEK, len(user))
        for name, values in (("user_id", user), ("item_id", item), ("liked", liked), ("at", at)):
            columns.setdefault(name, []).append(values.astype(np.int64))
    log = pl.DataFrame({name: np.concatenate(parts) for name, parts in columns.items()}).unique(
        ["user_id", "item_id"], keep="first", maintain_order=True
    )
    held = pl.when(pl.col("at") < TEST_FROM - 2 * 86_400).then(pl.lit("train")).otherwise(pl.lit("validation"))
    return log.with_columns(part=pl.when(pl.col("at") < TEST_FROM).then(held).otherwise(pl.lit("test"))).sort("at")


def trained(log: pl.DataFrame, folder: Path, epochs: int, seed: int = 0) -> Run:
    """Train item vectors and decayed means of histories on a log."""
    schema, config = parse_config(DECLARED["config"])
    config = override_config(config, [f"train.epochs={epochs}", f"train.seed={seed}"])
    users, items = (pl.DataFrame({name: log[name].unique().sort()}) for name in ("user_id", "item_id"))
    return api.fit((users, items, log), schema, config, folder=folder)


def shuffled(log: pl.DataFrame, seed: int) -> pl.DataFrame:
    """Return a log with the labels before the test in another order."""
    before = pl.col("part") != "test"
    return log.with_columns(liked=pl.when(before).then(pl.col("liked").shuffle(seed).over(before)).otherwise("liked"))


def week_old(run: Run, folder: Path) -> Run:
    """Return a copy of a run in another folder, whose log lacks the last week before the test."""
    assert run.folder is not None
    shutil.copytree(run.folder, folder)
    path, end = folder / layout.INTERACTIONS, TEST_FROM * MICROSECONDS
    late = pl.col("time").is_between(end - WEEK * MICROSECONDS, end, closed="left")
    pl.read_parquet(path).filter(~late).write_parquet(path)
    return api.load(folder)


def in_lists(retriever: Retriever, n: int, k: int, recall: float) -> Retriever:
    """Return a retriever that searches n inverted lists, tuned to a recall of the exact top k."""
    found, old = copy.copy(retriever), retriever.index
    found.index = Ivf(nlist=n).build(old.vectors(old.rows), old.rows, old.metric)
    users = np.random.default_rng(0).permutation(len(retriever.user_ids))[:1000]
    tune_index(found.index, embed_users(retriever, users, 1), k, recall)
    return found


def halved(retriever: Retriever) -> Retriever:
    """Return a retriever with an exact index of a random half of the items."""
    found, old = copy.copy(retriever), retriever.index
    rows = np.sort(np.random.default_rng(0).permutation(old.rows)[: len(old.rows) // 2])
    found.index = old.options.build(old.vectors(rows), rows, old.metric)
    return found


def challengers(chosen: Namespace, folder: Path) -> dict[str, tuple[Retriever, Retriever]]:
    """Return the champion and the challenger of each kind of case: the faults, what has none, and another seed."""
    log = made_log(chosen.users, chosen.items, chosen.seed)
    run = trained(log, folder / "run", chosen.epochs)
    runs = {
        "good": run,
        "old": week_old(run, folder / "old"),
        "bad": trained(shuffled(log, chosen.seed), folder / "bad", chosen.epochs),
        "seed": trained(log, folder / "seed", chosen.epochs, seed=1),
    }
    good, old, bad, seed = (Retriever(api.publish(run, folder / "stores" / name)) for name, run in runs.items())
    usual = Ivf()
    aim, n = usual.min_recall + (1 - usual.min_recall) / 5, round(chosen.items**0.5)  # as `publish` tunes
    return {
        "index of recall .8": (good, in_lists(good, n, K, 0.8)),
        "histories a week old": (good, old),
        "shuffled labels": (good, bad),
        "half of the items dropped": (good, halved(good)),
        "another seed": (good, seed),
        "served by inverted lists": (good, in_lists(good, n, usual.k, aim)),
    }


def named(cases: int, pair: tuple[Shaped[Doubles, "u"], ...], n: int, seed: int, exchange: bool = False) -> int:
    """Return how often the gate calls the challenger worse, each time on n of the users, drawn with replacement.

    With `exchange` the two values of a user change places by a coin, so that the models are equal."""
    rng, found = np.random.default_rng(seed), 0
    for _ in range(cases):
        rows = rng.integers(0, len(pair[0]), n)
        coins = rng.random(n) < 0.5 if exchange else np.zeros(n, bool)
        old, new = (np.where(coins, pair[1 - i][rows], pair[i][rows]) for i in range(2))
        found += judge(old, new, METRIC, "champion").verdict == "worse"
    return found


def main(chosen: Namespace, report: Report) -> None:
    config = EvaluationConfig(k=[K], bootstrap=0)
    measure, k, _ = measure_of(config, METRIC)
    with tempfile.TemporaryDirectory() as folder:
        pairs = challengers(chosen, Path(folder))
        values = {name: user_values(*pair, config, measure, k) for name, pair in pairs.items()}
    effects = {name: Effect.of((new - old)[::2]) for name, (old, new) in values.items()}
    n = max(effects[name].users() for name in FAULTS)
    report.add("users of a case", n, more=False)
    found = 0
    for name in (*FAULTS, *INFORMING):
        old, new = values[name]
        report.add(f"{name}, relative difference", effects[name].mean / float(old[::2].mean()), users=len(old[::2]))
        report.add(f"{name}, calculated share", effects[name].chance(n), more=name in FAULTS)
        cases = chosen.faulty if name in FAULTS else chosen.sound
        times = named(cases, (old[1::2], new[1::2]), n, chosen.seed)
        report.add(f"{name}, named of {cases}", times, more=name in FAULTS)
        found += times if name in FAULTS else 0
    old, new = values[INFORMING[0]]
    falsely = named(chosen.sound, (old[1::2], new[1::2]), n, chosen.seed, exchange=True)
    report.add("faults, named", found)
    report.add(f"{SOUND}, falsely named of {chosen.sound}", falsely, more=False)
    report.write()
    if not chosen.quick and (found < NAMED * chosen.faulty * len(FAULTS) or falsely > FALSELY * chosen.sound):
        sys.exit("the gate names too few faults, or too many challengers with nothing wrong")
