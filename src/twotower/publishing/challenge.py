"""Comparison of a run with a published bundle, both as served, on the newest rows that neither has learned."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import polars as pl

from twotower.arrays.types import Doubles, Ints, ItemId, ItemRow, Shaped
from twotower.data.dataset import Dataset
from twotower.data.ids import IdColumn
from twotower.data.pairs import GroupedPairs, counts
from twotower.data.splits import EVER, TEST
from twotower.errors import ConfigError, RunError, did_you_mean
from twotower.evaluation.bootstrap import paired_bootstrap
from twotower.evaluation.config import EvaluationConfig
from twotower.evaluation.metrics.measured import RankedItems
from twotower.evaluation.metrics.metric import RankingMetric
from twotower.evaluation.ranking import EvaluationQueries
from twotower.retrieval.batches import rank_items
from twotower.retrieval.request import Request
from twotower.retrieval.retriever import Retriever
from twotower.store.manifest import ChallengeFacts, Verdict

CURRENT = "current"
"""Name of the bundle that a store serves."""
MARGIN = 0.02
"""Difference, as a share of the champion's value, below which a challenger is not worse."""
MIN_USERS = 20
"""Users from which a bootstrap says something."""
RESAMPLES = 10_000
"""Resamples of the users."""
Z_INTERVAL, Z_POWER = 1.96, 0.84
"""Quantiles of the normal distribution: of a 95 % interval, and of a power of 80 %."""


@dataclass(frozen=True)
class Beat:
    """Bundle that a new model is compared with, the metric, such as ndcg@10, and whether "cannot tell" is refused."""

    bundle: str = CURRENT
    metric: str = ""
    """Empty: the first of ndcg or another metric of rankings, at the first cut-off."""
    strict: bool = False


def challenge(champion: Retriever, challenger: Retriever, config: EvaluationConfig, metric: str) -> ChallengeFacts:
    """Compare two bundles on the test rows of the challenger that are newer than all rows the champion has learned.

    The difference of `metric`, such as ndcg@10, has a 95 % interval by a bootstrap over users. Raises ConfigError for a
    metric that is no mean over rankings, and as `user_values` does."""
    measure, k, name = measure_of(config, metric)
    old, new = user_values(champion, challenger, config, measure, k)
    return judge(old, new, name, champion.bundle.id, measure.higher_is_better)


def user_values(
    champion: Retriever, challenger: Retriever, config: EvaluationConfig, measure: RankingMetric, k: int
) -> tuple[Shaped[Doubles, "n"], Shaped[Doubles, "n"]]:
    """Return the metric at cut-off `k` of each of n users with a row that neither bundle has learned, by both bundles.

    Both answer with the vectors, histories and index that they serve; with a context, in that of the first such row.
    Raises RunError without rows that neither has learned."""
    dataset = challenger.dataset
    queries, rows, begin = new_queries(dataset, config, _known_until(champion, dataset))
    if not len(queries.users):
        raise RunError(
            f"no positive of the test part is newer than the rows that {champion.bundle.id} knows, so nothing can be "
            "compared; train with a test part of newer rows, or publish without `beat`"
        )
    items = RankedItems.of(dataset)
    old, new = (
        measure.values(queries.rankings(answers(retriever, dataset, queries.users, rows, begin, k), items, False))
        for retriever in (champion, challenger)
    )
    return old, new


def judge(
    champion: Shaped[Doubles, "n"], challenger: Shaped[Doubles, "n"], metric: str, name: str, rising: bool = True
) -> ChallengeFacts:
    """Return the verdict on the values of a metric of n users, of which higher ones are better if `rising`.

    better: the 95 % interval of the mean difference is above 0. worse: it is below 0. not worse: it holds 0, and its
    lower end is above -2 % of the champion's value. Else, and for fewer than MIN_USERS: cannot tell. `could_tell` is
    the number of users with which a difference of 2 % is found four times of five, 0 if nothing says."""
    sign, n = (1.0 if rising else -1.0), len(champion)
    columns = (champion[:, None] * sign, challenger[:, None] * sign, np.ones((n, 1)))
    low, high, _ = (float(x[0]) for x in paired_bootstrap(*columns, resamples=RESAMPLES))
    margin = MARGIN * abs(float(champion.mean()))
    spread = float((challenger - champion).std(ddof=1)) if n > 1 else 0.0
    verdict: Verdict = "cannot tell"
    if n >= MIN_USERS and low > 0:
        verdict = "better"
    elif n >= MIN_USERS and high < 0:
        verdict = "worse"
    elif n >= MIN_USERS and low > -margin:
        verdict = "not worse"
    return ChallengeFacts(
        metric=metric,
        champion=name,
        values=(float(champion.mean()), float(challenger.mean())),
        interval=(low, high) if rising else (-high, -low),
        users=n,
        could_tell=math.ceil(((Z_INTERVAL + Z_POWER) * spread / margin) ** 2) if margin else 0,
        verdict=verdict,
    )


def measure_of(config: EvaluationConfig, metric: str) -> tuple[RankingMetric, int, str]:
    """Return a metric of rankings, its cut-off and its name. Raises ConfigError."""
    names = {f"{m.name}@{k}": (m, k) for k in config.k for m in config.metric_set.of_users}
    usual = f"ndcg@{config.k[0]}"
    metric = metric or (usual if usual in names else next(iter(names), ""))
    if metric not in names:
        raise ConfigError(f"no metric '{metric}'{did_you_mean(metric, names)} (allowed: {', '.join(names)})")
    return *names[metric], metric


def _known_until(champion: Retriever, dataset: Dataset) -> int:
    """Return the time of the newest row that a bundle knows. Raises RunError if times cannot be compared."""
    facts = champion.bundle.manifest
    units = champion.schema.time_unit, dataset.schema.time_unit
    if facts.learned.until is None or facts.remembered.until is None or not dataset.schema.time:
        raise RunError("a log without times does not tell which rows both models lack; publish without `beat`")
    if units[0] != units[1]:
        raise RunError(f"{champion.bundle.id} counts time in '{units[0]}', the run in '{units[1]}'; use one unit")
    return max(facts.learned.until, facts.remembered.until)


def new_queries(dataset: Dataset, config: EvaluationConfig, until: int) -> tuple[EvaluationQueries, Ints, int]:
    """Return the queries of the test rows later than `until`, the first such row of each user (users,), -1 of a user
    without, and the time of the first of all."""
    if config.repeats == "only":
        raise ConfigError("evaluation.repeats = 'only' ranks the items of each user, which a service does not do")
    newer = np.flatnonzero(dataset.times_of(TEST) > until)
    pairs = dataset.pairs_of(TEST).take(newer)
    targets = counts(pairs.user, len(dataset.users), pairs.target)
    first = np.full(len(dataset.users), -1, np.int64)
    first[pairs.user[::-1]] = dataset.part_indices(TEST)[newer][::-1]
    begin = int(dataset.times_of(TEST)[newer].min(initial=EVER))
    grouped, seen = GroupedPairs.of(pairs, len(dataset.users)), [_taken(dataset, begin)]
    queries = EvaluationQueries.build(
        grouped, seen, targets, len(dataset.items), config.max_users, repeats=config.repeats
    )
    return queries, first, begin


def _taken(dataset: Dataset, begin: int) -> GroupedPairs:
    """Return the pairs by user that are of no test part or earlier than `begin`, of which answers hold no item."""
    known = (dataset.parts != TEST) | (dataset.times < begin)
    return GroupedPairs.of(dataset.pairs.take(np.flatnonzero(known)), len(dataset.users))


def answers(retriever: Retriever, dataset: Dataset, users: Ints, rows: Ints, begin: int, k: int) -> Ints:
    """Return the items (users, k) that a bundle answers with, as item rows of a dataset; -1 of others.

    Answers leave out what the bundle has of a user before the time `begin`. `rows` are interactions with contexts."""
    ids = dataset.users.ids.gather(users).cast(pl.String)
    items: IdColumn[ItemId, ItemRow] = IdColumn(dataset.items.ids, ItemRow)
    theirs, nothing = retriever.user_ids.find(ids), np.zeros(0, np.int64)
    seen = [] if retriever.keeps_seen(None) else [_taken(retriever.dataset, begin)]
    best = np.full((len(users), k), -1, np.int64)
    if retriever.reads_context:
        contexts = _contexts(dataset, rows[users]).select(retriever.context_columns).iter_rows(named=True)
        for place, (name, user, context) in enumerate(zip(ids, theirs.tolist(), contexts, strict=True)):
            taken = np.concatenate([nothing, *(pairs.take(np.array([user])).item for pairs in seen if user >= 0)])
            ban = [retriever.item_ids[item] for item in taken.tolist()]
            given = {column: value for column, value in context.items() if value is not None}
            found = retriever.recommend(Request(name, context=given), k, 2, ban=ban, keep_seen=True).items
            best[place, : len(found)] = items.rows([ItemId(item.id) for item in found])
        return best
    popular = retriever.popularity.top(k, nothing, None)[0]
    best[theirs < 0, : len(popular)] = popular
    known = theirs >= 0
    best[known] = rank_items(retriever, theirs[known], k, 1, seen)
    if retriever.dataset is dataset:
        return best
    places = items.find(retriever.dataset.items.ids.cast(pl.String))
    return np.where(best >= 0, places[best], -1)


def _contexts(dataset: Dataset, rows: Ints) -> pl.DataFrame:
    """Return the contexts of interactions. Raises ConfigError if the dataset does not keep them."""
    if len(dataset.context_frame) != len(dataset.pairs):
        raise ConfigError(
            "prepared data keep no context as it was given, which `beat` asks with; publish without `beat`"
        )
    return dataset.context_frame[rows]
