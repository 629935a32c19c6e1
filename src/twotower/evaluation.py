"""How good a model is: metrics as pure functions on arrays, then a model on a dataset.

Pair metrics (AUC, GAUC, log loss) ask whether a user would like an item that was shown. Ranking metrics ask the
whole catalogue, by exact search, with the items the user has already seen removed; nothing is sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from twotower.config import EvaluationConfig
from twotower.data.batches import SideTensors
from twotower.data.dataset import Bools, Dataset, Pairs
from twotower.data.splits import TEST, TRAIN, VALIDATION
from twotower.encoders import Ints
from twotower.model.two_tower import TwoTower
from twotower.schema import SIDES

Doubles = npt.NDArray[np.float64]
Metrics = dict[str, float]
_CELLS = 2**25  # scores that are held at a time while ranking


# ---- pairs -------------------------------------------------------------------------------------------------------


def auc(scores: npt.NDArray[Any], positive: Bools) -> float:
    """Probability that a positive outranks a negative, ties counting half; NaN if one class is missing."""
    n_pos = int(positive.sum())
    n_neg = len(positive) - n_pos
    if not n_pos or not n_neg:
        return float("nan")
    return float((_mid_ranks(scores)[positive].sum() - n_pos * (n_pos + 1) / 2) / (n_pos * n_neg))


def _mid_ranks(scores: npt.NDArray[Any]) -> Doubles:
    """Ranks 1..n from the lowest score; equal scores share the mean of theirs."""
    order = np.argsort(scores, kind="stable")
    ordered = scores[order]
    first = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    last = np.r_[first[1:], len(scores)]
    ranks = np.empty(len(scores))
    ranks[order] = np.repeat((first + last + 1) / 2, last - first)
    return ranks


def auc_by_group(scores: npt.NDArray[Any], positive: Bools, group: npt.NDArray[Any]) -> tuple[Ints, Doubles, Ints]:
    """Groups with both classes, their AUC, and their number of rows."""
    order = np.lexsort((scores, group))
    g, s, p = group[order], scores[order], positive[order]
    starts = np.flatnonzero(np.r_[True, g[1:] != g[:-1]]) if len(g) else np.zeros(0, np.int64)
    # Mid-ranks over (group, score) runs, then made relative to the group.
    run = np.flatnonzero(np.r_[True, (g[1:] != g[:-1]) | (s[1:] != s[:-1])]) if len(g) else starts
    run_end = np.r_[run[1:], len(g)].astype(np.int64)
    rank = np.repeat((run + run_end + 1) / 2, run_end - run)
    sizes = np.diff(np.r_[starts, len(g)]).astype(np.int64)
    rank -= np.repeat(starts, sizes)
    which = np.repeat(np.arange(len(starts)), sizes)
    n_pos = np.bincount(which, p, minlength=len(starts))
    n_neg = sizes - n_pos
    both = (n_pos > 0) & (n_neg > 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        value = (np.bincount(which, rank * p, minlength=len(starts)) - n_pos * (n_pos + 1) / 2) / (n_pos * n_neg)
    return g[starts][both].astype(np.int64), value[both], sizes[both]


def gauc(scores: npt.NDArray[Any], positive: Bools, group: npt.NDArray[Any]) -> float:
    """AUC within each group (user), averaged by the group's rows; groups of one class are left out
    (Zhu et al. 2017, "Optimized Cost per Click in Taobao Display Advertising", section 4)."""
    _, values, sizes = auc_by_group(scores, positive, group)
    return float(np.average(values, weights=sizes)) if len(values) else float("nan")


def log_loss(logits: npt.NDArray[Any], positive: Bools) -> float:
    """Mean -log p of the label, p = sigmoid(logit)."""
    x = np.where(positive, -logits, logits).astype(np.float64)
    return float(np.logaddexp(0.0, x).mean()) if len(x) else float("nan")


# ---- rankings ----------------------------------------------------------------------------------------------------


def rank_catalogue(
    user_vectors: Tensor, item_vectors: Tensor, wanted: Pairs, seen: Iterable[Pairs], k: int, block: int = 512
) -> tuple[Ints, Ints, Bools]:
    """(users (Q,), best item rows (Q, k), hits (Q, k)) by exact dot product over all N items.

    Items of `seen` are left out, also as targets; equal scores are ordered as torch.topk does.
    Users without a positive in `wanted` are left out. At most `block` users are ranked at a time.
    """
    device = item_vectors.device
    n_items = len(item_vectors)
    block = max(1, min(block, _CELLS // n_items))
    k = min(k, n_items)
    users, want, gone = _asked(wanted, seen, len(user_vectors), n_items)
    best = np.full((len(users), k), -1, np.int64)
    for start in range(0, len(users), block):
        rows = users[start : start + block]
        scores = user_vectors[torch.from_numpy(rows).to(device)] @ item_vectors.T
        lo, hi = np.searchsorted(gone, [rows[0] * n_items, (rows[-1] + 1) * n_items])
        mine = gone[lo:hi]
        at = np.searchsorted(rows, mine // n_items)
        ours = rows[np.minimum(at, len(rows) - 1)] == mine // n_items
        flat = at[ours] * n_items + mine[ours] % n_items
        scores.view(-1)[torch.from_numpy(flat).to(device)] = -torch.inf
        top = scores.topk(k, dim=1)
        found = top.indices.cpu().numpy()
        found[~np.isfinite(top.values.cpu().numpy())] = -1
        best[start : start + block] = found
    return users, best, _hits(users, best, want, n_items)


def _asked(wanted: Pairs, seen: Iterable[Pairs], n_users: int, n_items: int) -> tuple[Ints, Ints, Ints]:
    """Users with something to find, and the keys (user, item) to find and to leave out, rising."""
    want = _keys(wanted, n_items, positives_only=True)
    gone = np.sort(np.concatenate([_keys(p, n_items) for p in seen] or [np.zeros(0, np.int64)]))
    want = want[~_member(want, gone)]
    return np.flatnonzero(np.bincount(want // n_items, minlength=n_users)), want, gone


def _hits(users: Ints, best: Ints, want: Ints, n_items: int) -> Bools:
    """Which of the items (Q, k) that were found for users (Q,) were wanted."""
    keys = np.where(best >= 0, users[:, None] * n_items + best, -1)
    return _member(keys.ravel(), want).reshape(keys.shape)


def _keys(pairs: Pairs, n_items: int, positives_only: bool = False) -> Ints:
    user, item = pairs.user.astype(np.int64), pairs.item.astype(np.int64)
    keys = user * n_items + item
    return np.sort(keys[pairs.positive] if positives_only else keys)


def _member(keys: Ints, within: Ints) -> Bools:
    """Which of `keys` are in the sorted array `within`."""
    if not len(within):
        return np.zeros(len(keys), bool)
    at = np.minimum(np.searchsorted(within, keys), len(within) - 1)
    found: Bools = within[at] == keys
    return found


def ranking_metrics(hit: Bools, wanted: Ints, k: int) -> dict[str, Doubles]:
    """Per user (Q,), from hits (Q, >= k) in rank order and the number of items to find:

    recall = found / wanted; ndcg with gain 1 and discount log2(rank + 1), over the best possible;
    mrr = 1 / rank of the first hit; hit_rate = whether there is one. Only the first `k` ranks count.
    """
    top = hit[:, :k].astype(np.float64)
    discount = 1 / np.log2(np.arange(2, top.shape[1] + 2))
    ideal = np.cumsum(discount)[np.minimum(wanted, top.shape[1]) - 1]
    any_hit = top.any(1)
    first = np.where(any_hit, top.argmax(1) + 1, 1)
    return {
        "recall": top.sum(1) / wanted,
        "ndcg": (top * discount).sum(1) / ideal,
        "mrr": any_hit / first,
        "hit_rate": any_hit.astype(np.float64),
    }


def bootstrap(values: Doubles, weights: Doubles, resamples: int, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the weighted mean of per-user values, resampling users."""
    if not resamples or not len(values):
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    for r in range(resamples):
        pick = rng.integers(0, len(values), len(values))
        means[r] = np.average(values[pick], weights=weights[pick])
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


# ---- baselines ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Factors:
    """A scorer of any pair as vectors: score = users[u] . items[i]."""

    users: Tensor  # (n_users, D)
    items: Tensor  # (n_items, D)

    def scores(self, pairs: Pairs, block: int = 262_144) -> npt.NDArray[np.float32]:
        """(n,) scores of the pairs."""
        out = np.empty(len(pairs), np.float32)
        for start in range(0, len(pairs), block):
            part = slice(start, start + block)
            user, item = (torch.from_numpy(x[part]).to(self.users.device) for x in (pairs.user, pairs.item))
            score = (self.users.index_select(0, user) * self.items.index_select(0, item)).sum(1)
            out[part] = score.cpu().numpy()
        return out


def popularity(train: Pairs, n_users: int, n_items: int) -> Factors:
    """Score = number of training positives of the item."""
    counts = np.bincount(train.item[train.positive], minlength=n_items).astype(np.float32)
    return Factors(torch.ones(n_users, 1), torch.from_numpy(counts)[:, None])


def biases(train: Pairs, n_users: int, n_items: int, strength: float = 10.0, rounds: int = 10) -> Factors:
    """Score = mean + user bias + item bias, ridge-regularised least squares on the labels by alternation
    (Koren 2010, "Factor in the Neighbors", section 2.1)."""
    y = train.positive.astype(np.float64)
    mean = y.mean()
    bu, bi = np.zeros(n_users), np.zeros(n_items)
    nu = np.bincount(train.user, minlength=n_users)
    ni = np.bincount(train.item, minlength=n_items)
    for _ in range(rounds):
        bi = np.bincount(train.item, y - mean - bu[train.user], minlength=n_items) / (ni + strength)
        bu = np.bincount(train.user, y - mean - bi[train.item], minlength=n_users) / (nu + strength)
    one_u, one_i = np.ones(n_users), np.ones(n_items)
    return Factors(
        torch.from_numpy(np.stack([bu + mean, one_u], 1)).float(),
        torch.from_numpy(np.stack([one_i, bi], 1)).float(),
    )


# ---- a model on a dataset ----------------------------------------------------------------------------------------


@contextmanager
def evaluating(model: TwoTower) -> Iterator[None]:
    """In evaluation mode and without gradients; afterwards the model's mode is as it was."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def vectors(model: TwoTower, users: SideTensors, items: SideTensors, block: int = 65_536) -> Factors:
    """Both towers over all rows, in evaluation mode; the model's mode is left as it was."""
    with evaluating(model):
        return Factors(_all(model.user_vectors, users, block), _all(model.item_vectors, items, block))


def factors_before(model: TwoTower, dataset: Dataset, part: int) -> Factors:
    """Vectors of all users and items as they are known when `part` is asked (see `Dataset.side_before`)."""
    device = next(model.parameters()).device
    users, items = (
        SideTensors(dataset.side_before(side, part), dataset.encoders.fields(side), device) for side in SIDES
    )
    return vectors(model, users, items)


def _all(tower: Callable[..., Tensor], side: SideTensors, block: int) -> Tensor:
    parts = [tower(side.take(np.arange(s, min(s + block, side.n)))) for s in range(0, side.n, block)]
    return torch.cat(parts)


def _seen_before(dataset: Dataset, part: int) -> list[Pairs]:
    """The pairs that are known when `part` is asked."""
    if part == TRAIN:
        return []
    return [dataset.train, dataset.validation] if part == TEST else [dataset.train]


def evaluate_part(factors: Factors, dataset: Dataset, part: int, config: EvaluationConfig) -> Metrics:
    """Every metric of one part by its plain name: `auc`, `gauc`, `log_loss`, `recall@10`, `coverage@10`, …"""
    report = Report.of(factors, dataset, part, config)
    return report.metrics()


@dataclass(frozen=True)
class Report:
    """Scores and rankings of one part, from which every metric, slice and interval is read."""

    dataset: Dataset
    config: EvaluationConfig
    pairs: Pairs
    scores: npt.NDArray[np.float32]
    users: Ints
    best: Ints
    hit: Bools
    wanted: Ints

    @classmethod
    def of(cls, factors: Factors, dataset: Dataset, part: int, config: EvaluationConfig) -> Report:
        """Test rankings leave out what was seen in training and validation, validation's what was in training."""
        pairs = dataset.part(part)
        users, best, hit = rank_catalogue(
            factors.users, factors.items, pairs, _seen_before(dataset, part), max(config.k)
        )
        n = np.bincount(pairs.user[pairs.positive], minlength=len(dataset.users))
        return cls(dataset, config, pairs, factors.scores(pairs), users, best, hit, n[users])

    @classmethod
    def by(
        cls, ask: Callable[[Ints, int], Ints], scores: npt.NDArray[np.float32], dataset: Dataset, part: int,
        config: EvaluationConfig,
    ) -> Report:  # fmt: skip
        """The report of whatever answers: `ask(users (Q,), k)` gives item rows (Q, k), `scores` are the part's pairs'."""
        pairs = dataset.part(part)
        n_items = len(dataset.items)
        users, want, _ = _asked(pairs, _seen_before(dataset, part), len(dataset.users), n_items)
        best = ask(users, min(max(config.k), n_items))
        n = np.bincount(pairs.user[pairs.positive], minlength=len(dataset.users))
        return cls(dataset, config, pairs, scores, users, best, _hits(users, best, want, n_items), n[users])

    def metrics(self) -> Metrics:
        """Pair metrics over all rows, ranking metrics as means over users, coverage over the catalogue."""
        out = {
            "auc": auc(self.scores, self.pairs.positive),
            "gauc": gauc(self.scores, self.pairs.positive, self.pairs.user),
            "log_loss": log_loss(self.scores, self.pairs.positive),
        }
        for k in self.config.k:
            for name, values in ranking_metrics(self.hit, self.wanted, k).items():
                out[f"{name}@{k}"] = float(values.mean()) if len(values) else float("nan")
            shown = np.unique(self.best[:, :k])
            out[f"coverage@{k}"] = float((shown >= 0).sum() / len(self.dataset.items))
        return out

    def intervals(self) -> dict[str, tuple[float, float]]:
        """95 % intervals over users of GAUC and of the ranking metrics."""
        _, values, sizes = auc_by_group(self.scores, self.pairs.positive, self.pairs.user)
        out = {"gauc": bootstrap(values, sizes.astype(float), self.config.bootstrap)}
        for k in self.config.k:
            for name, per_user in ranking_metrics(self.hit, self.wanted, k).items():
                out[f"{name}@{k}"] = bootstrap(per_user, np.ones(len(per_user)), self.config.bootstrap)
        return {name: interval for name, interval in out.items() if np.isfinite(interval).all()}

    def slices(self) -> Metrics:
        """`auc.new_user`, `recall@10.tail`, … for the slices that hold something to measure."""
        data, config = self.dataset, self.config
        user_n = np.bincount(data.train.user, minlength=len(data.users))
        item_n = np.bincount(data.train.item, minlength=len(data.items))
        head = np.zeros(len(data.items), bool)
        head[np.argsort(-item_n, kind="stable")[: max(1, int(config.head_share * len(data.items)))]] = True
        k = config.k[0]
        out: Metrics = {}
        by_user = {"new_user": user_n < config.new_user_below}
        by_item = {"new_item": item_n < config.new_item_below, "head": head, "tail": ~head}
        per_user = ranking_metrics(self.hit, self.wanted, k)
        for name, rows in by_user.items():
            keep = rows[self.pairs.user]
            out[f"rows.{name}"] = int(keep.sum())
            out[f"auc.{name}"] = auc(self.scores[keep], self.pairs.positive[keep])
            mine = rows[self.users]
            if mine.any():
                out |= {f"{m}@{k}.{name}": float(per_user[m][mine].mean()) for m in ("recall", "ndcg")}
        for name, rows in by_item.items():
            keep = rows[self.pairs.item]
            out[f"rows.{name}"] = int(keep.sum())
            out[f"auc.{name}"] = auc(self.scores[keep], self.pairs.positive[keep])
            targets = np.bincount(self.pairs.user[keep & self.pairs.positive], minlength=len(data.users))[self.users]
            found = (self.hit[:, :k] & rows[self.best[:, :k]]).sum(1)
            some = targets > 0
            if some.any():
                out[f"recall@{k}.{name}"] = float((found[some] / targets[some]).mean())
        return {name: value for name, value in out.items() if value == value}


def evaluate(before: Callable[[int], Factors], dataset: Dataset, config: EvaluationConfig) -> Metrics:
    """The flat metrics of a run: validation and test, intervals and slices of test, and the baselines beside them.

    `before(part)` gives the vectors as they are known when that part is asked.
    """
    out: Metrics = {}
    for name, part in (("validation", VALIDATION), ("test", TEST)):
        report = Report.of(before(part), dataset, part, config)
        out |= {f"{name}.{m}": v for m, v in report.metrics().items()}
        if part == TEST:
            for m, (low, high) in report.intervals().items():
                out[f"test.{m}.low"], out[f"test.{m}.high"] = low, high
            out |= {f"test.{m}": v for m, v in report.slices().items()}
    n_users, n_items = len(dataset.users), len(dataset.items)
    for name, baseline in (
        ("popularity", popularity(dataset.train, n_users, n_items)),
        ("bias", biases(dataset.train, n_users, n_items)),
    ):
        found = evaluate_part(baseline, dataset, TEST, config)
        del found["log_loss"]  # neither baseline gives a logit
        out |= {f"baseline.{name}.{m}": v for m, v in found.items()}
    return {m: v for m, v in out.items() if v == v}
