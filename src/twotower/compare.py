"""Two runs over the same test users: what differs, and whether chance over users could have made the difference.

The bootstrap is paired: a resample draws users, and both runs are measured on the users that were drawn, so what makes
some users easy for both cancels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl
import torch

from twotower.data.dataset import Dataset, Pairs
from twotower.data.splits import TEST
from twotower.encoders import Ints, canonical_ids
from twotower.errors import RunError
from twotower.evaluation import Doubles, Factors, auc, auc_by_group, rank_catalogue, ranking_metrics
from twotower.runs import Run
from twotower.schema import SideName

DECISION_RULE = (
    "Rule: a difference counts when its 95 % interval, over resampled test users and paired, leaves out zero. That is "
    "chance over users alone: a claim about settings needs several train.seed."
)
COUNTS_PER_BLOCK = 2**23  # numbers of a resample that are held at a time


@dataclass(frozen=True)
class Comparison:
    """One metric of two runs A and B."""

    metric: str
    a: float
    b: float
    difference: float  # b - a
    low: float  # 95 % interval of the difference
    high: float
    p: float  # twice the share of resamples at zero or on its other side, at most 1
    users: int  # test users the metric is measured on

    @property
    def verdict(self) -> str:
        """By the interval: it leaves out zero, or no difference can be told."""
        if self.low > 0:
            return "B is better"
        return "A is better" if self.high < 0 else "no difference can be told"


@dataclass(frozen=True)
class ComparisonData:
    """What scorers are asked: test pairs, and the pairs whose items are left out of the rankings.

    User rows are 0..users-1, each with a test pair.
    """

    pairs: Pairs
    seen: Pairs
    users: int


def compare_runs(a: Run, b: Run, *, resamples: int = 1000, seed: int = 0) -> list[Comparison]:
    """GAUC, AUC and the ranking metrics at every cut-off that both runs report, over the test pairs they share.

    Users and items are matched by id. Both runs rank the items that both know, without those that either has seen a
    user meet before the test. Raises RunError unless the test pairs and their labels are the same.
    """
    if resamples < 1:
        raise RunError(f"resamples is {resamples}, expected at least 1")
    questions, of_a, of_b = _align_runs(a, b)
    k = [n for n in a.config.evaluation.k if n in b.config.evaluation.k]
    found = compare_factors(of_a, of_b, questions, k, resamples, seed)
    if not found:
        raise RunError(
            f"nothing to compare: no user has test pairs of both classes, and evaluation.k has no cut-off in common "
            f"({list(a.config.evaluation.k)} and {list(b.config.evaluation.k)})"
        )
    return found


def compare_factors(
    a: Factors, b: Factors, questions: ComparisonData, k: Sequence[int], resamples: int = 1000, seed: int = 0
) -> list[Comparison]:
    """As `compare`, for two scorers that number users and items as `questions` does."""
    scores = [f.scores(questions.pairs) for f in (a, b)]
    each = [_per_user(f, s, questions, k) for f, s in zip((a, b), scores, strict=True)]
    names = list(each[0])
    n, positive = questions.users, questions.pairs.positive
    weights = np.stack([each[0][m][1] for m in names], 1) if names else np.zeros((n, 0))
    values = [np.stack([e[m][0] for m in names], 1) if names else np.zeros((n, 0)) for e in each]
    found = [(values[i] * weights).sum(0) / weights.sum(0) for i in (0, 1)]
    low, high, p = paired_bootstrap(values[0], values[1], weights, resamples, seed)
    out = [
        Comparison(
            m, float(found[0][i]), float(found[1][i]), float(found[1][i] - found[0][i]), float(low[i]), float(high[i]),
            float(p[i]), int((weights[:, i] > 0).sum()),
        )
        for i, m in enumerate(names)
    ]  # fmt: skip
    if positive.any() and not positive.all():
        first, second = (_bootstrap_auc(s, questions, resamples, seed) for s in scores)
        bounds = [float(x[0]) for x in _percentile_interval((second - first)[:, None])]
        whole = [auc(s, positive) for s in scores]
        out.insert(0, Comparison("auc", whole[0], whole[1], whole[1] - whole[0], bounds[0], bounds[1], bounds[2], n))
    return out


def paired_bootstrap(
    a: Doubles, b: Doubles, weights: Doubles, resamples: int = 1000, seed: int = 0
) -> tuple[Doubles, Doubles, Doubles]:
    """(low, high, p), each (M,): the 95 % percentile interval of mean(b) - mean(a) over resampled users, and the
    two-sided share of resamples at or beyond zero.

    `a`, `b` and `weights` are (n, M): n users, M metrics; the means are weighted, a weight of 0 is a user without it.
    """
    gap = (b - a) * weights
    out = []
    for counts in _bootstrap_counts(len(a), resamples, seed):
        total = counts @ weights
        with np.errstate(invalid="ignore", divide="ignore"):
            out.append(np.where(total > 0, (counts @ gap) / total, 0.0))
    return _percentile_interval(np.concatenate(out))


def describe_comparisons(comparisons: Sequence[Comparison]) -> Iterator[str]:
    """Printable lines: a table, the overall sentence, and the rule."""
    yield f"{'metric':<14}{'A':>8}{'B':>9}{'B - A':>10}   {'95 % interval':<21}{'p':>6}  verdict"
    for c in comparisons:
        interval = f"[{c.low:+.4f}, {c.high:+.4f}]"
        yield (
            f"{c.metric:<14}{c.a:>8.4f}{c.b:>9.4f}{c.difference:>+10.4f}   {interval:<21}{c.p:>6.3f}  {c.verdict} "
            f"({c.users:,} users)"
        )
    yield summarize(comparisons)
    yield DECISION_RULE


def summarize(comparisons: Sequence[Comparison]) -> str:
    """One sentence over all metrics."""
    n = len(comparisons)
    better = {name: [c.metric for c in comparisons if c.verdict == f"{name} is better"] for name in ("A", "B")}
    if not better["A"] and not better["B"]:
        return f"Overall: no difference can be told in any of {n} metrics."
    if better["A"] and better["B"]:
        return f"Overall: mixed; A is better in {', '.join(better['A'])}; B is better in {', '.join(better['B'])}."
    winner = "A" if better["A"] else "B"
    if len(better[winner]) == n:
        return f"Overall: {winner} is better in all {n} metrics."
    return f"Overall: {winner} is better in {', '.join(better[winner])}; in the others no difference can be told."


# ---- the same questions ------------------------------------------------------------------------------------------


def comparison_data(dataset: Dataset, users: Ints) -> ComparisonData:
    """The test questions of some user rows, which are numbered in the order given."""
    user, item = _positions(users, len(dataset.users)), np.arange(len(dataset.items))
    test, *seen = (_reindex(p, user, item) for p in (dataset.test, dataset.train, dataset.validation))
    return ComparisonData(test, _concatenate(*seen), len(users))


def _align_runs(a: Run, b: Run) -> tuple[ComparisonData, Factors, Factors]:
    """The test questions of both runs in one numbering, and the vectors of A and B in it."""
    names = [str(run.folder) if run.folder else name for run, name in ((a, "A"), (b, "B"))]
    _check_same(a.dataset, b.dataset, names)
    # Numbered as A numbers them, so that equal scores are ordered as in A's own report.
    users = _match_ids(a.dataset, b.dataset, "user", np.unique(a.dataset.test.user).astype(np.int64))
    items = _match_ids(a.dataset, b.dataset, "item", np.arange(len(a.dataset.items)))
    seen: list[Pairs] = []
    factors: list[Factors] = []
    numbers: list[tuple[Ints, Ints]] = []
    for run, name, user, item in zip((a, b), names, users, items, strict=True):
        data = run.dataset
        numbers.append((_positions(user, len(data.users)), _positions(item, len(data.items))))
        seen += [_reindex(pairs, *numbers[-1]) for pairs in (data.train, data.validation)]
        known = run.factors(TEST)
        mine = Factors(known.users.cpu()[torch.from_numpy(user)], known.items.cpu()[torch.from_numpy(item)])
        if not (bool(torch.isfinite(mine.users).all()) and bool(torch.isfinite(mine.items).all())):
            raise RunError(f"{name}: its vectors are not finite; `twotower doctor` says more")
        factors.append(mine)
    asked = ComparisonData(_reindex(a.dataset.test, *numbers[0]), _concatenate(*seen), len(users[0]))
    return asked, factors[0], factors[1]


def _check_same(a: Dataset, b: Dataset, names: Sequence[str]) -> None:
    """Raises RunError unless both test on the same pairs, by id, with the same labels."""
    tests = []
    for data, name in zip((a, b), names, strict=True):
        pairs = data.test
        if not len(pairs):
            raise RunError(f"{name}: this run holds no test part, so there is nothing to compare on")
        user, item = _text_ids(data.users.ids).gather(pairs.user), _text_ids(data.items.ids).gather(pairs.item)
        tests.append(pl.DataFrame({"user": user, "item": item, "positive": pairs.positive}).unique())
    for one, other in ((0, 1), (1, 0)):
        missing = tests[one].join(tests[other], on=["user", "item"], how="anti").sort("user", "item")
        if missing.height:
            raise RunError(
                f"{names[other]} was not tested on the pairs of {names[one]}: {missing.height:,} of "
                f"{tests[one].height:,} are missing, such as user '{missing[0, 'user']}' with item "
                f"'{missing[0, 'item']}'; train both on the same tables with the same [split]"
            )
    differently = tests[0].join(tests[1], on=["user", "item", "positive"], how="anti").height
    if differently:
        raise RunError(
            f"{names[0]} and {names[1]} label {differently:,} of {tests[0].height:,} test pairs differently; train "
            "both with the same schema.label and schema.positive_above"
        )


def _match_ids(a: Dataset, b: Dataset, side: SideName, rows: Ints) -> tuple[Ints, Ints]:
    """The `rows` of A whose id B has too, in order, and B's rows of the same ids."""
    one = pl.DataFrame({"id": _text_ids(a.side(side).ids).gather(rows), "a": rows})
    two = pl.DataFrame({"id": _text_ids(b.side(side).ids)}).with_row_index("b")
    both = one.join(two, on="id", how="inner", maintain_order="left")
    return both["a"].to_numpy().astype(np.int64), both["b"].to_numpy().astype(np.int64)


def _text_ids(ids: pl.Series) -> pl.Series:
    """Ids as text: 7, 7.0 and '7' are one."""
    return canonical_ids(ids).cast(pl.String)


def _positions(rows: Ints, n: int) -> Ints:
    """(n,) place of every row in `rows`, -1 for those that are not in it."""
    number = np.full(n, -1, np.int64)
    number[rows] = np.arange(len(rows))
    return number


def _reindex(pairs: Pairs, user: Ints, item: Ints) -> Pairs:
    """The pairs in the numbers (n_users,) and (n_items,) give; those with a -1 are left out."""
    users, items = user[pairs.user], item[pairs.item]
    keep = (users >= 0) & (items >= 0)
    return Pairs(users[keep].astype(np.int32), items[keep].astype(np.int32), pairs.positive[keep])


def _concatenate(*pairs: Pairs) -> Pairs:
    return Pairs(*(np.concatenate([getattr(p, n) for p in pairs]) for n in ("user", "item", "positive")))


# ---- resamples ---------------------------------------------------------------------------------------------------


def _per_user(
    factors: Factors, scores: npt.NDArray[np.float32], questions: ComparisonData, k: Sequence[int]
) -> dict[str, tuple[Doubles, Doubles]]:
    """Per metric its value and its weight for every user (n,), weight 0 where a user has none."""
    n, pairs = questions.users, questions.pairs

    def spread(users: Ints, values: Doubles, weights: npt.NDArray[np.number]) -> tuple[Doubles, Doubles]:
        value, weight = np.zeros(n), np.zeros(n)
        value[users], weight[users] = values, weights
        return value, weight

    out: dict[str, tuple[Doubles, Doubles]] = {}
    users, values, sizes = auc_by_group(scores, pairs.positive, pairs.user)
    if len(users):
        out["gauc"] = spread(users, values, sizes)
    if not k:
        return out
    users, _, hit = rank_catalogue(factors.users, factors.items, pairs, [questions.seen], max(k))
    wanted = np.bincount(pairs.user[pairs.positive], minlength=n)[users]
    for cut in k if len(users) else ():
        for name, per_user in ranking_metrics(hit, wanted, cut).items():
            out[f"{name}@{cut}"] = spread(users, per_user, np.ones(len(users)))
    return out


def _bootstrap_counts(n: int, resamples: int, seed: int) -> Iterator[Doubles]:
    """Blocks (r, n) of how often each of n users is drawn, `resamples` rows in all."""
    rng = np.random.default_rng(seed)
    each = max(1, COUNTS_PER_BLOCK // n)
    for start in range(0, resamples, each):
        r = min(each, resamples - start)
        drawn = rng.integers(0, n, (r, n)) + np.arange(r)[:, None] * n
        yield np.bincount(drawn.ravel(), minlength=r * n).reshape(r, n).astype(np.float64)


def _bootstrap_auc(scores: npt.NDArray[np.float32], questions: ComparisonData, resamples: int, seed: int) -> Doubles:
    """(resamples,) AUC over the pairs of the drawn users; 0.5 where one class is missing."""
    positive = questions.pairs.positive
    # Sorted once; a resample only weighs the pairs anew, in an order that memory likes.
    order = np.argsort(scores, kind="stable")
    lower, upper = order[~positive[order]], order[positive[order]]
    loser, winner = questions.pairs.user[lower], questions.pairs.user[upper]
    below = np.searchsorted(scores[lower], scores[upper], side="left")
    not_above = np.searchsorted(scores[lower], scores[upper], side="right")
    out = []
    for counts in _bootstrap_counts(questions.users, resamples, seed):
        for row in counts:
            under = np.concatenate([[0.0], np.cumsum(row[loser])])
            weight = row[winner]
            total = float(weight.sum() * under[-1])
            out.append(float(weight @ (under[below] + under[not_above])) / 2 / total if total else 0.5)
    return np.array(out)


def _percentile_interval(gaps: Doubles) -> tuple[Doubles, Doubles, Doubles]:
    """(low, high, p) of each column of (resamples, M)."""
    low, high = np.quantile(gaps, [0.025, 0.975], axis=0)
    # The difference that was found counts as one of the resamples: no p is 0.
    p = 2 * (np.minimum((gaps <= 0).sum(0), (gaps >= 0).sum(0)) + 1) / (len(gaps) + 1)
    return low, high, np.minimum(p, 1.0)
