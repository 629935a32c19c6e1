from argparse import Namespace
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
import polars as pl

from benchmarks.lib.machine import Numbers
from benchmarks.lib.report import Report, declared
from benchmarks.quality.films import Films
from twotower import api
from twotower.data.datasets.ml_1m import MovieLens1M
from twotower.data.datasets.ml_100k import MovieLens100K
from twotower.data.tables import Tables, check
from twotower.evaluation.config import WIDTH
from twotower.suggestion.suggest import suggest

SEED, LAST = 2022, 12
"""Seed of made data and of drawn users; rows of a user in a short log."""


class Log(NamedTuple):
    """Tables as a user brings them, of which interactions alone are needed."""

    interactions: pl.DataFrame
    users: pl.DataFrame | None = None
    items: pl.DataFrame | None = None

    def of(self, rows: pl.DataFrame) -> "Log":
        """Return the log with other interactions."""
        return self._replace(interactions=rows)

    def last(self) -> "Log":
        """Return the log of the last rows of each user, ties in the order of the table."""
        rows = self.interactions.sort("timestamp", maintain_order=True)
        return self.of(rows.group_by("user_id", maintain_order=True).tail(LAST))

    def likes(self) -> "Log":
        """Return the pairs of ratings of at least 4, without their time."""
        return self.of(self.interactions.filter(pl.col("rating") >= 4).select("user_id", "item_id"))

    def unordered(self) -> "Log":
        """Return the pairs without their time, in no order."""
        pairs = self.interactions.select("user_id", "item_id")
        return self.of(pairs.sample(fraction=1.0, shuffle=True, seed=SEED))

    def some_users(self) -> "Log":
        """Return the log of a fifth of the users."""
        ids = self.interactions["user_id"].unique().sort()
        return self.of(
            self.interactions.filter(pl.col("user_id").is_in(ids.sample(len(ids) // 5, seed=SEED).implode()))
        )


def main(chosen: Namespace, report: Report) -> None:
    for recipe, row in declared(__file__)["recipes"].items():
        for name in row["logs"]:
            if chosen.only not in (key := f"{recipe}, {name}"):
                continue
            if name.startswith("short") and not chosen.sequences:
                print(f"{key}: left out, for its archive is not named: --sequences path/to/sequences.zip", flush=True)
                continue
            seeds: dict[str, Numbers] = report.rows().get(key, {})
            for seed in range(chosen.first_seed, chosen.first_seed + chosen.seeds):
                seeds[str(seed)] = seeds.get(str(seed)) or train(recipe, LOGS[name](chosen.sequences), seed, chosen.set)
                report.write({key: seeds})
            for metric in row["metrics"]:
                add(report, key, metric, [*seeds.values()])


def train(recipe: str, log: Log, seed: int, settings: list[str]) -> Numbers:
    """Return the metrics of the recipe as it is suggested for a log, and the recipe that the rules choose."""
    given = [f"train.seed={seed}", *filter(None, settings)]
    suggestion = suggest(log.interactions, log.users, log.items, recipe=recipe, overrides=given)
    rules = suggest(log.interactions, log.users, log.items).recipe
    tables = check(log.users, log.items, log.interactions, suggestion.schema)
    return {"rules": rules, **api.fit(tables, suggestion.schema, suggestion.config).metrics}


def add(report: Report, key: str, metric: str, runs: list[Numbers]) -> None:
    """Add a metric of the runs, and that of the baseline with the highest."""
    first = runs[0]
    baselines = {k.split(".")[1]: v for k, v in first.items() if k.startswith("baseline.") and k.endswith(f".{metric}")}
    best = max(baselines, key=lambda name: baselines[name])
    ends = [first.get(f"test.{metric}.{end}") for end in ("low", "high")]
    given: Numbers = {"interval": ends} if None not in ends else {}
    given |= {"rules": first["rules"], "width": first.get(f"test.{WIDTH}")}
    report.add(f"{key}, {metric}", [run[f"test.{metric}"] for run in runs], **given)
    report.add(f"{key}, {metric}, {best}", baselines[best])


def made(length: int, n_users: int, n_items: int, share: float = 0.3) -> Log:
    """Return made data: this share of the items is one of three fixed followers of the one before; no item twice."""
    rng, rows = np.random.default_rng(SEED), list[tuple[int, int, int]]()
    follow = rng.integers(0, n_items, (n_items, 3))
    for user in range(n_users):
        seen = dict.fromkeys([int(rng.integers(n_items))])
        last = next(iter(seen))
        while len(seen) < length:
            item = int(follow[last, rng.integers(3)]) if rng.random() < share else int(rng.integers(n_items))
            if item not in seen:
                seen[last := item] = None
        rows += [(user, item, at) for at, item in enumerate(seen)]
    return Log(pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row"))


def made_order_and_tastes(length: int, n_users: int, n_items: int, width: int = 8) -> Log:
    """Return made data: of ten draws three are a follower of the item before, as in `made`, and seven popular items to
    the taste of a user, in eight directions; no item twice."""
    rng = np.random.default_rng(SEED)
    follow = rng.integers(0, n_items, (n_items, 3))
    users, items = rng.normal(size=(n_users, width)), rng.normal(size=(n_items, width))
    odds = 1.5 * users @ items.T / np.sqrt(width) + rng.normal(size=n_items) + rng.gumbel(size=(n_users, n_items))
    rows = list[tuple[int, int, int]]()
    for user, wanted in enumerate(np.argsort(-odds, 1)[:, : 2 * length]):
        left = rng.permutation(wanted[:length]).tolist() + wanted[length:].tolist()
        seen = dict.fromkeys([last := left.pop(0)])
        while len(seen) < length:
            item = int(follow[last, rng.integers(3)]) if rng.random() < 0.3 else left.pop(0)
            if item not in seen:
                seen[last := item] = None
        rows += [(user, item, at) for at, item in enumerate(seen)]
    return Log(pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row"))


def made_tastes(has_label: bool, n_users: int = 2000, n_items: int = 800, each: int = 30, width: int = 8) -> Log:
    """Return made data: tastes of eight directions, popular items and generous users. Shown items are popular ones, and
    liked by chance; without a label, items are taken by chance and a user's are in no order."""
    rng = np.random.default_rng(SEED)
    users, items = rng.normal(size=(n_users, width)), rng.normal(size=(n_items, width))
    popularity = rng.normal(size=n_items)
    fit = users @ items.T / np.sqrt(width)
    odds = popularity + (0.0 if has_label else 1.5) * fit + rng.gumbel(size=fit.shape)
    user, item = np.divmod(np.argsort(-odds, 1)[:, :each] + n_items * np.arange(n_users)[:, None], n_items)
    log = pl.DataFrame({"user_id": user.ravel(), "item_id": item.ravel()})
    if not has_label:
        return Log(log)
    chance = 1.5 * fit + 0.5 * popularity + rng.normal(size=(n_users, 1))
    liked = np.take_along_axis(chance, item, 1) + rng.logistic(size=item.shape) > 0
    return Log(log.with_columns(liked=pl.Series(liked.ravel().astype(int))))


def made_columns(n_users: int, n_items: int) -> Log:
    """Return made data: users of one row each, whose gender, age and city tell what they take; items by chance and
    popularity beside."""
    rng = np.random.default_rng(SEED)
    sizes = {"gender": 2, "age": 7, "city": 12}
    values = {name: rng.integers(size, size=n_users) for name, size in sizes.items()}
    odds = -0.6 * np.log(np.arange(n_items) + 1.0) + rng.gumbel(size=(n_users, n_items))
    for name, size in sizes.items():
        odds += 1.2 * rng.normal(size=(size, n_items))[values[name]]
    log = pl.DataFrame({"user_id": np.arange(n_users), "item_id": odds.argmax(1)})
    users = pl.DataFrame({"user_id": np.arange(n_users), **values}).with_columns(
        pl.format("city {}", "city").alias("city")
    )
    return Log(log, users)


@cache
def made_groceries(n_users: int, n_items: int, baskets: float = 20, again: float = 0.6) -> Log:
    """Return made data: baskets of some six goods. `again` of the rows are goods that the user bought before, the often
    and lately bought ones most likely; the others are popular goods of the user's tastes, and half of all goods are
    bought once."""
    rng, rows = np.random.default_rng(SEED), list[tuple[int, int, int]]()
    popularity, group = 1 / np.arange(1, n_items + 1) ** 0.9, rng.integers(0, 30, n_items)
    lasts = rng.random(n_items) < 0.5
    for user in range(n_users):
        likely = popularity * rng.dirichlet(np.full(30, 0.15))[group]
        drawn = iter(rng.choice(n_items, 2000, p=likely / likely.sum()).tolist())
        counts, latest = np.zeros(n_items), np.zeros(n_items)
        at = int(rng.integers(10**6))
        for basket in range(max(2, int(baskets * rng.lognormal(-0.3, 0.7)))):
            at += 1 + int(rng.exponential(10**6))
            goods = dict[int, None]()
            for _ in range(1 + int(rng.poisson(5))):
                own = np.flatnonzero((counts > 0) & ~lasts)
                if len(own) and rng.random() < again:
                    weights = counts[own] * 0.97 ** (basket - latest[own])
                    goods[int(rng.choice(own, p=weights / weights.sum()))] = None
                elif not (lasts[item := next(drawn, 0)] and counts[item]):
                    goods[item] = None
            for item in goods:
                counts[item], latest[item] = counts[item] + 1, basket
                rows.append((user, item, at))
    return Log(pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row"))


def made_visits(n_users: int, n_pages: int, again: float = 0.4) -> Log:
    """Return made data: pages by popularity, and `again` of the visits to one of the last pages of the user."""
    rng, rows = np.random.default_rng(SEED), list[tuple[int, int, int]]()
    popularity = 1 / np.arange(1, n_pages + 1)
    drawn = iter(rng.choice(n_pages, 40 * n_users, p=popularity / popularity.sum()).tolist())
    for user in range(n_users):
        at, past = int(rng.integers(10**6)), list[int]()
        for _ in range(3 + int(min(rng.exponential(15), 100))):
            at += 1 + int(rng.exponential(3600))
            back = min(len(past), 1 + int(rng.exponential(3)))
            past.append(past[-back] if past and rng.random() < again else next(drawn))
            rows.append((user, past[-1], at))
    return Log(pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row"))


@cache
def made_news(n_users: int, n_items: int, topics: int = 12) -> Log:
    """Return made data: articles of forty days, which rise at once and are forgotten within days, and users of tastes
    for topics who are there some days."""
    rng, rows = np.random.default_rng(SEED), list[tuple[int, int, int]]()
    birth, appeal = np.sort(rng.random(n_items) * 40 - 2), 1.2 * rng.normal(size=n_items)
    topic, life = rng.integers(0, topics, n_items), 0.6 + rng.exponential(1.0, n_items)
    for user in range(n_users):
        taste, begin = 1.2 * rng.normal(size=topics), rng.random() * 30
        length, days = 4 + int(min(rng.exponential(8), 60)), min(rng.exponential(12) + 1, 38 - begin)
        seen = np.zeros(n_items, bool)
        for day in np.sort(begin + rng.random(length) * days):
            age = day - birth
            odds = np.where((age > 0) & ~seen, appeal + taste[topic] - age / life, -np.inf)
            seen[item := int((odds + rng.gumbel(size=n_items)).argmax())] = True
            rows.append((user, item, 1_600_000_000 + int(day * 86_400)))
    return Log(pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row"))


def movielens(source: Callable[[], Tables]) -> Log:
    """Return the log of ratings with users and films."""
    tables = source()
    return Log(tables.interactions, tables.users, tables.items)


def short(archive: str) -> Log:
    """Return the log of an archive of sequences."""
    return Log(Films.read(archive).tables(bare=True)[2])


LOGS: dict[str, Callable[[str], Log]] = {
    "made, 80 of a user": lambda _: made(80, 1500, 600),
    "made, order and tastes": lambda _: made_order_and_tastes(60, 1500, 600),
    "made, 10 of a user": lambda _: made(10, 2000, 800),
    "made, no time": lambda _: made_tastes(False),
    "made, series without time": lambda _: made(15, 4000, 500, 0.6).unordered(),
    "made, few users without time": lambda _: made_tastes(False, 300, 3000, 40),
    "made, shown and liked": lambda _: made_tastes(True),
    "shown and liked, 100 of a user, made": lambda _: made_tastes(True, each=100),
    "made, groceries": lambda _: made_groceries(1500, 3000),
    "made, groceries without time": lambda _: made_groceries(1500, 3000).unordered(),
    "made, visits": lambda _: made_visits(3000, 800),
    "made, news": lambda _: made_news(1500, 700),
    "made, users of one row": lambda _: made_columns(8000, 150),
    "MovieLens 100K": lambda _: movielens(MovieLens100K().load),
    "MovieLens 100K, last 12": lambda _: movielens(MovieLens100K().load).last(),
    "MovieLens 100K, likes without time": lambda _: movielens(MovieLens100K().load).likes(),
    "MovieLens 1M": lambda _: movielens(MovieLens1M().load),
    "MovieLens 1M, last 12": lambda _: movielens(MovieLens1M().load).last(),
    "MovieLens 1M, likes without time": lambda _: movielens(MovieLens1M().load).likes(),
    "MovieLens 1M, a fifth of the users": lambda _: movielens(MovieLens1M().load).some_users(),
    "short sequences": short,
    "short sequences without time": lambda archive: (log := short(archive)).of(log.interactions.drop("timestamp")),
}
