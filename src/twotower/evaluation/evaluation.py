"""Evaluation: metrics as pure functions of arrays, and the metrics of a model on a dataset.

Pair metrics (AUC, GAUC, log loss) measure whether a user likes an item that was shown. Ranking metrics rank the whole
catalogue by exact search, without the items that the user has seen; no negatives are sampled.
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

from twotower.config.experiment import EvaluationConfig
from twotower.data.batches import SideTensors
from twotower.data.dataset import COUNT_BLOCK_ROWS, Bools, Dataset, Doubles, Pairs, counts
from twotower.data.splits import PART_NAMES, TEST, TRAIN, VALIDATION
from twotower.features.encoders import Ints
from twotower.features.schema import SIDES
from twotower.model.two_tower import TwoTower

Metrics = dict[str, float]
MAX_SCORES = 2**25
"""Scores (users x items) that one block of a ranking holds."""


# ---- pairs -------------------------------------------------------------------------------------------------------


def auc(scores: npt.NDArray[Any], positive: Bools) -> float:
    """Return the probability that a positive outranks a negative, ties counting half; NaN if a class is missing."""
    _, value, _ = auc_by_group(scores, positive, np.zeros(len(scores), np.int32))
    return float(value[0]) if len(value) else float("nan")


def auc_by_group(scores: npt.NDArray[Any], positive: Bools, group: npt.NDArray[Any]) -> tuple[Ints, Doubles, Ints]:
    """Return the groups with both classes (G,), rising, their AUC (G,) and their number of rows (G,)."""
    if not len(scores):
        return np.zeros(0, np.int64), np.zeros(0), np.zeros(0, np.int64)
    # Group, score and label in one uint64: sorting such keys is ten times as fast as an argsort.
    keys = (group.astype(np.uint64) << 33) | (_ordered_codes(scores).astype(np.uint64) << 1) | positive
    keys.sort()
    edges, ties = _run_edges(keys >> 33), _run_edges(keys >> 1)
    first, sizes = edges[:-1], np.diff(edges)
    positives = np.r_[0, np.cumsum(keys & 1, dtype=np.int64)]  # before each position
    n_pos = np.diff(positives[edges])
    # Twice the sum of the positives' mid-ranks, first over all rows, then within their group.
    ranks = (ties[:-1] + ties[1:] + 1) * np.diff(positives[ties])
    twice = np.add.reduceat(ranks, np.searchsorted(ties, first)) - n_pos * (2 * first + n_pos + 1)
    pairs = n_pos * (sizes - n_pos)
    both = pairs > 0
    return (keys[first[both]] >> 33).astype(np.int64), twice[both] / (2 * pairs[both]), sizes[both]


def _ordered_codes(scores: npt.NDArray[Any]) -> npt.NDArray[np.uint32]:
    """Map scores to uint32 codes with the same order and the same ties."""
    if scores.dtype != np.float32:
        return np.unique(scores, return_inverse=True)[1].astype(np.uint32)
    bits = (scores + np.float32(0)).view(np.int32)  # -0 becomes 0
    return (bits ^ ((bits >> 31) | np.int32(-(2**31)))).view(np.uint32)


def _run_edges(values: npt.NDArray[Any]) -> Ints:
    """Return the starts of the runs of equal values, and the end of the last run."""
    return np.flatnonzero(np.r_[True, values[1:] != values[:-1], True])


def gauc(scores: npt.NDArray[Any], positive: Bools, group: npt.NDArray[Any]) -> float:
    """Return the mean AUC of the groups (users), weighted by their rows; groups of one class are left out
    (Zhu et al. 2017, "Optimized Cost per Click in Taobao Display Advertising", section 4). NaN without a group."""
    _, values, sizes = auc_by_group(scores, positive, group)
    return float(np.average(values, weights=sizes)) if len(values) else float("nan")


def log_loss(logits: npt.NDArray[Any], positive: Bools) -> float:
    """Return the mean of -log p(label), p = sigmoid(logit); NaN without rows."""
    x = np.where(positive, -logits, logits).astype(np.float64)
    return float(np.logaddexp(0.0, x).mean()) if len(x) else float("nan")


# ---- rankings ----------------------------------------------------------------------------------------------------


def rank_catalogue(
    user_vectors: Tensor,
    item_vectors: Tensor,
    pairs: Pairs,
    seen: Iterable[Pairs],
    k: int,
    block: int = 512,
    max_scores: int = MAX_SCORES,
) -> tuple[Ints, Ints, Bools]:
    """Return (users (Q,), best item rows (Q, k), hits (Q, k)) by exact dot product over all N items.

    The targets are the positives of `pairs`. The items of `seen` are excluded, also as targets; ties are ordered as
    torch.topk orders them. Users without a positive in `pairs` are left out. A block holds at most `block` users and
    `max_scores` scores, but at least 8 users.
    """
    queries = EvaluationQueries.build(pairs, seen, len(user_vectors), len(item_vectors), block, max_scores)
    best = queries.top_k(user_vectors, item_vectors, k)
    return queries.users, best, queries.hits(best)


@dataclass(frozen=True)
class EvaluationQueries:
    """Evaluation queries: the Q users with at least one held-out positive, ranked over N items.

    A key is q N + item, q the position of the user among the Q.
    """

    users: Ints  # (Q,) user rows, rising
    targets: Ints  # keys of the held-out positives, rising
    excluded: Ints  # keys of the items that are not ranked, rising
    n_items: int
    block: int  # users per block

    @classmethod
    def build(
        cls,
        pairs: Pairs,
        seen: Iterable[Pairs],
        n_users: int,
        n_items: int,
        block: int = 512,
        max_scores: int = MAX_SCORES,
    ) -> EvaluationQueries:
        """Make the positives of `pairs` the targets, except those in `seen`, and exclude the items of `seen`.

        A block holds at most `block` users and `max_scores` scores, but at least 8 users.
        """
        targets = np.sort(_pair_keys(pairs, n_items)[pairs.positive])
        excluded = np.sort(np.concatenate([_pair_keys(p, n_items) for p in seen] or [targets[:0]]))
        targets = targets[~_in_sorted(targets, excluded)]
        has_target = np.zeros(n_users, bool)
        has_target[targets // n_items] = True
        # Subtracting the shift of a user turns a key of user rows into a key of query positions.
        shift = (np.arange(n_users) - np.cumsum(has_target) + 1) * n_items
        owner = excluded // n_items
        kept = has_target[owner]
        return cls(
            np.flatnonzero(has_target),
            targets - shift[targets // n_items],
            excluded[kept] - shift[owner[kept]],
            n_items,
            max(8, min(block, max_scores // n_items)),  # smaller blocks read all item vectors too often
        )

    def top_k(self, user_vectors: Tensor, item_vectors: Tensor, k: int) -> Ints:
        """Return the best item rows (Q, k), -1 after the last item that may be ranked."""
        device = item_vectors.device
        best = np.empty((len(self.users), min(k, self.n_items)), np.int64)
        for part, excluded in self._blocks(self.excluded):
            scores = user_vectors[torch.from_numpy(self.users[part]).to(device)] @ item_vectors.T
            scores.view(-1)[torch.from_numpy(excluded).to(device)] = -torch.inf
            top = scores.topk(best.shape[1], dim=1)
            rows = top.indices.cpu().numpy()
            rows[~np.isfinite(top.values.cpu().numpy())] = -1
            best[part] = rows
        return best

    def hits(self, best: Ints) -> Bools:
        """Return a mask (Q, k): true where an item of `best` is a target of its user."""
        hit = np.zeros(best.shape, bool)
        is_target = np.zeros((self.block, self.n_items), bool)
        for part, targets in self._blocks(self.targets):
            rows = best[part]
            is_target.flat[targets] = True
            hit[part] = is_target[np.arange(len(rows))[:, None], rows] & (rows >= 0)
            is_target.flat[targets] = False
        return hit

    def _blocks(self, keys: Ints) -> Iterator[tuple[slice, Ints]]:
        """Yield each block of users as a slice, and the `keys` of the block relative to its first user."""
        for start in range(0, len(self.users), self.block):
            first = start * self.n_items
            lo, hi = np.searchsorted(keys, [first, first + self.block * self.n_items])
            yield slice(start, start + self.block), keys[lo:hi] - first


def _pair_keys(pairs: Pairs, n_items: int) -> Ints:
    return pairs.user.astype(np.int64) * n_items + pairs.item


def _in_sorted(keys: Ints, within: Ints) -> Bools:
    """Return a mask of the `keys` that are in the sorted array `within`."""
    if not len(within):
        return np.zeros(len(keys), bool)
    position = np.minimum(np.searchsorted(within, keys), len(within) - 1)
    contained: Bools = within[position] == keys
    return contained


def ranking_metrics(hit: Bools, n_targets: Ints, k: int) -> dict[str, Doubles]:
    """Return ranking metrics per user (Q,), from hits (Q, >= k) in rank order and the number of targets (Q,).

    recall = hits / targets; ndcg with gain 1 and discount log2(rank + 1), divided by that of the ideal ranking
    (Järvelin and Kekäläinen 2002); mrr = 1 / rank of the first hit, 0 without one; hit_rate = 1 with a hit. Only the
    first `k` ranks count.
    """
    top = hit[:, :k].astype(np.float64)
    discount = 1 / np.log2(np.arange(2, top.shape[1] + 2))
    ideal = np.cumsum(discount)[np.minimum(n_targets, top.shape[1]) - 1]
    any_hit = top.any(1)
    first = np.where(any_hit, top.argmax(1) + 1, 1)
    return {
        "recall": top.sum(1) / n_targets,
        "ndcg": (top * discount).sum(1) / ideal,
        "mrr": any_hit / first,
        "hit_rate": any_hit.astype(np.float64),
    }


def bootstrap(values: Doubles, weights: Doubles, resamples: int, seed: int = 0) -> tuple[Any, Any]:
    """Return the bounds of the 95 % percentile bootstrap interval (Efron and Tibshirani 1993, section 13.3) of the
    weighted mean of per-user values (n,) or (n, M), resampling users: two scalars, or two (M,). NaN without resamples.
    """
    if not resamples or not len(values):
        nothing = np.full(values.shape[1:], np.nan)
        return nothing, nothing
    rng = np.random.default_rng(seed)
    n, weighted = len(values), (values.T * weights).T
    means = []
    for _ in range(resamples):
        counts = np.bincount(rng.integers(0, n, n), minlength=n).astype(np.float64)
        means.append(counts @ weighted / (counts @ weights))
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    return low, high


# ---- baselines ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Factors:
    """Vectors of a model or baseline: the score of a pair (u, i) is users[u] . items[i]."""

    users: Tensor  # (n_users, D)
    items: Tensor  # (n_items, D)

    def scores(self, pairs: Pairs, block: int = 16_384) -> npt.NDArray[np.float32]:
        """Return the scores (n,) of the pairs, `block` pairs at a time."""
        out = np.empty(len(pairs), np.float32)
        # Two small buffers are reused: allocating memory for all rows costs ten times the products.
        user_rows, item_rows = self.users.new_empty(2, min(block, len(pairs)), self.users.shape[1])
        for start in range(0, len(pairs), block):
            part = slice(start, start + block)
            user, item = (torch.from_numpy(x[part]).to(self.users.device) for x in (pairs.user, pairs.item))
            u = torch.index_select(self.users, 0, user, out=user_rows[: len(user)])
            v = torch.index_select(self.items, 0, item, out=item_rows[: len(item)])
            out[part] = u.mul_(v).sum(1).cpu().numpy()
        return out


def popularity_baseline(train: Pairs, n_users: int, n_items: int) -> Factors:
    """Return the popularity baseline: score = number of training positives of the item."""
    positives = np.zeros(n_items, np.int64)
    for start in range(0, len(train), COUNT_BLOCK_ROWS):
        part = slice(start, start + COUNT_BLOCK_ROWS)
        positives += np.bincount(train.item[part][train.positive[part]], minlength=n_items)
    return Factors(torch.ones(n_users, 1), torch.from_numpy(positives.astype(np.float32))[:, None])


def bias_baseline(train: Pairs, n_users: int, n_items: int, strength: float = 10.0, rounds: int = 10) -> Factors:
    """Return the bias baseline: score = mean + user bias + item bias, ridge-regularised least squares on the labels,
    by `rounds` of alternation (Koren 2010, "Factor in the Neighbors", section 2.1)."""
    mean = float(train.positive.mean())

    def pieces() -> Iterator[tuple[Ints, Ints, Doubles]]:
        for start in range(0, len(train), COUNT_BLOCK_ROWS):
            part = slice(start, start + COUNT_BLOCK_ROWS)
            user, item, label = train.user[part], train.item[part], train.positive[part]
            yield user.astype(np.int64), item.astype(np.int64), label.astype(np.float64) - mean

    kept = list(pieces()) if len(train) <= COUNT_BLOCK_ROWS else None
    bu, bi = np.zeros(n_users), np.zeros(n_items)
    nu, ni = counts(train.user, n_users), counts(train.item, n_items)
    for _ in range(rounds):
        total = np.zeros(n_items)
        for user, item, y in kept or pieces():
            total += np.bincount(item, y - bu[user], minlength=n_items)
        bi = total / (ni + strength)
        total = np.zeros(n_users)
        for user, item, y in kept or pieces():
            total += np.bincount(user, y - bi[item], minlength=n_users)
        bu = total / (nu + strength)
    one_u, one_i = np.ones(n_users), np.ones(n_items)
    return Factors(
        torch.from_numpy(np.stack([bu + mean, one_u], 1)).float(),
        torch.from_numpy(np.stack([one_i, bi], 1)).float(),
    )


# ---- a model on a dataset ----------------------------------------------------------------------------------------


@contextmanager
def evaluation_mode(model: TwoTower) -> Iterator[None]:
    """Run the body in evaluation mode and without gradients, then restore the model's mode."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def model_factors(model: TwoTower, users: SideTensors, items: SideTensors, block: int = 65_536) -> Factors:
    """Return the vectors of all rows of both sides, `block` rows at a time, in evaluation mode."""
    with evaluation_mode(model):
        return Factors(_all_vectors(model.user_vectors, users, block), _all_vectors(model.item_vectors, items, block))


def factors_before(model: TwoTower, dataset: Dataset, part: int) -> Factors:
    """Return the vectors of all users and items from the data before `part` (see `Dataset.side_before`)."""
    device = next(model.parameters()).device
    users, items = (
        SideTensors(dataset.side_before(side, part), dataset.encoders.fields(side), device) for side in SIDES
    )
    return model_factors(model, users, items)


def _all_vectors(tower: Callable[..., Tensor], side: SideTensors, block: int) -> Tensor:
    out: Tensor | None = None
    for start in range(0, side.n, block):
        rows = np.arange(start, min(start + block, side.n))
        vectors = tower(side.take(rows))
        if out is None:
            out = vectors.new_empty((side.n, vectors.shape[1]))
        out[start : start + len(rows)] = vectors  # concatenating blocks at the end would take twice the memory
    assert out is not None
    return out


def evaluation_queries(dataset: Dataset, part: int, config: EvaluationConfig) -> EvaluationQueries:
    """Return the queries of a part. Rankings exclude the items of earlier parts: train for validation, train and
    validation for test. With more than `config.max_users` users a fixed random sample of that size is ranked."""
    pairs, shape = _pairs(dataset, part), (len(dataset.users), len(dataset.items))
    users = np.unique(pairs.user[pairs.positive])
    if not config.max_users or len(users) <= config.max_users:
        seen = {TRAIN: [], VALIDATION: [dataset.train], TEST: [dataset.train, dataset.validation]}[part]
        return EvaluationQueries.build(pairs, seen, *shape)
    some = np.sort(np.random.default_rng(0).choice(users, config.max_users, replace=False))
    keep = np.isin(pairs.user, some)
    return EvaluationQueries.build(pairs.take(keep), [dataset.pairs_before(part, some)], *shape)


def _pairs(dataset: Dataset, part: int) -> Pairs:
    pairs: Pairs = getattr(dataset, PART_NAMES[part])  # cached, unlike `dataset.part`
    return pairs


def evaluate_part(factors: Factors, dataset: Dataset, part: int, config: EvaluationConfig) -> Metrics:
    """Return every metric of one part by name: `auc`, `gauc`, `log_loss`, `recall@10`, `coverage@10`, …"""
    return PartEvaluation.from_factors(factors, dataset, part, config).metrics()


@dataclass(frozen=True)
class PartEvaluation:
    """Scores and rankings of one part, from which metrics, slices and intervals are computed."""

    dataset: Dataset
    config: EvaluationConfig
    pairs: Pairs
    scores: npt.NDArray[np.float32]
    users: Ints  # (Q,) user rows
    best: Ints  # (Q, max k) item rows, -1: none
    hit: Bools
    n_targets: Ints

    @classmethod
    def from_factors(
        cls,
        factors: Factors,
        dataset: Dataset,
        part: int,
        config: EvaluationConfig,
        queries: EvaluationQueries | None = None,
    ) -> PartEvaluation:
        """Evaluate vectors by exact search. `queries` are those of the part, if they are computed already."""
        queries = queries or evaluation_queries(dataset, part, config)
        best = queries.top_k(factors.users, factors.items, max(config.k))
        return cls._of(queries, best, factors.scores(_pairs(dataset, part)), dataset, part, config)

    @classmethod
    def from_search(
        cls, search: Callable[[Ints, int], Ints], scores: npt.NDArray[np.float32], dataset: Dataset, part: int,
        config: EvaluationConfig,
    ) -> PartEvaluation:  # fmt: skip
        """Evaluate any search: `search(users (Q,), k)` returns item rows (Q, k); `scores` are those of the part's
        pairs."""
        queries = evaluation_queries(dataset, part, config)
        best = search(queries.users, min(max(config.k), queries.n_items))
        return cls._of(queries, best, scores, dataset, part, config)

    @classmethod
    def _of(
        cls, queries: EvaluationQueries, best: Ints, scores: npt.NDArray[np.float32], dataset: Dataset, part: int,
        config: EvaluationConfig,
    ) -> PartEvaluation:  # fmt: skip
        pairs = _pairs(dataset, part)
        n = np.bincount(pairs.user[pairs.positive], minlength=len(dataset.users))
        return cls(dataset, config, pairs, scores, queries.users, best, queries.hits(best), n[queries.users])

    def metrics(self) -> Metrics:
        """Return pair metrics over all rows, ranking metrics as means over users, and coverage of the catalogue."""
        out = {
            "auc": auc(self.scores, self.pairs.positive),
            "gauc": gauc(self.scores, self.pairs.positive, self.pairs.user),
            "log_loss": log_loss(self.scores, self.pairs.positive),
        }
        for k in self.config.k:
            for name, values in ranking_metrics(self.hit, self.n_targets, k).items():
                out[f"{name}@{k}"] = float(values.mean()) if len(values) else float("nan")
            covered = np.zeros(len(self.dataset.items) + 1, bool)
            covered[self.best[:, :k]] = True  # -1, no item, is the last entry
            out[f"coverage@{k}"] = float(covered[:-1].sum() / len(self.dataset.items))
        return out

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Return 95 % bootstrap intervals over users of GAUC and of the ranking metrics."""
        _, values, sizes = auc_by_group(self.scores, self.pairs.positive, self.pairs.user)
        low, high = bootstrap(values, sizes.astype(float), self.config.bootstrap)
        out = {"gauc": (float(low), float(high))}
        per_user = {
            f"{name}@{k}": values
            for k in self.config.k
            for name, values in ranking_metrics(self.hit, self.n_targets, k).items()
        }
        bounds = bootstrap(np.stack([*per_user.values()], 1), np.ones(len(self.users)), self.config.bootstrap)
        out |= {name: (float(low), float(high)) for name, low, high in zip(per_user, *bounds, strict=True)}
        return {name: interval for name, interval in out.items() if np.isfinite(interval).all()}

    def slices(self) -> Metrics:
        """Return `auc.new_user`, `recall@10.tail`, … for the slices on which the metric is defined."""
        data, config = self.dataset, self.config
        user_n, item_n = counts(data.train.user, len(data.users)), counts(data.train.item, len(data.items))
        head = np.zeros(len(data.items), bool)
        head[np.argsort(-item_n, kind="stable")[: max(1, int(config.head_share * len(data.items)))]] = True
        k = config.k[0]
        out: Metrics = {}
        by_user = {"new_user": user_n < config.new_user_below}
        by_item = {"new_item": item_n < config.new_item_below, "head": head, "tail": ~head}
        per_user = ranking_metrics(self.hit, self.n_targets, k)
        for name, rows in by_user.items():
            keep = rows[self.pairs.user]
            out[f"rows.{name}"] = int(keep.sum())
            out[f"auc.{name}"] = auc(self.scores[keep], self.pairs.positive[keep])
            selected = rows[self.users]
            if selected.any():
                out |= {f"{m}@{k}.{name}": float(per_user[m][selected].mean()) for m in ("recall", "ndcg")}
        for name, rows in by_item.items():
            keep = rows[self.pairs.item]
            out[f"rows.{name}"] = int(keep.sum())
            out[f"auc.{name}"] = auc(self.scores[keep], self.pairs.positive[keep])
            targets = np.bincount(self.pairs.user[keep & self.pairs.positive], minlength=len(data.users))[self.users]
            hits = (self.hit[:, :k] & rows[self.best[:, :k]]).sum(1)
            defined = targets > 0
            if defined.any():
                out[f"recall@{k}.{name}"] = float((hits[defined] / targets[defined]).mean())
        return {name: value for name, value in out.items() if value == value}


def evaluate_model(factors_of: Callable[[int], Factors], dataset: Dataset, config: EvaluationConfig) -> Metrics:
    """Return the metrics of a run by name: validation and test, intervals and slices of test, baselines on test.

    `factors_of(part)` returns the vectors from the data before that part.
    """
    out: Metrics = {}
    queries = evaluation_queries(dataset, TEST, config)
    factors = factors_of(VALIDATION)
    for name, part in (("validation", VALIDATION), ("test", TEST)):
        if part == TEST and dataset.time_ordered:  # otherwise both parts have the same vectors
            factors = factors_of(TEST)
        evaluation = PartEvaluation.from_factors(factors, dataset, part, config, queries if part == TEST else None)
        out |= {f"{name}.{m}": v for m, v in evaluation.metrics().items()}
        if part == TEST:
            for m, (low, high) in evaluation.intervals().items():
                out[f"test.{m}.low"], out[f"test.{m}.high"] = low, high
            out |= {f"test.{m}": v for m, v in evaluation.slices().items()}
    n_users, n_items = len(dataset.users), len(dataset.items)
    for name, baseline in (
        ("popularity", popularity_baseline(dataset.train, n_users, n_items)),
        ("bias", bias_baseline(dataset.train, n_users, n_items)),
    ):
        metrics = PartEvaluation.from_factors(baseline, dataset, TEST, config, queries).metrics()
        del metrics["log_loss"]  # the scores of the baselines are no logits
        out |= {f"baseline.{name}.{m}": v for m, v in metrics.items()}
    return {m: v for m, v in out.items() if v == v}
