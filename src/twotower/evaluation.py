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
from twotower.data.dataset import COUNT_BLOCK_ROWS, Bools, Dataset, Pairs, counts
from twotower.data.splits import PART_NAMES, TEST, TRAIN, VALIDATION
from twotower.encoders import Ints
from twotower.model.two_tower import TwoTower
from twotower.schema import SIDES

Doubles = npt.NDArray[np.float64]
Metrics = dict[str, float]
MAX_SCORES = 2**25  # scores that are held at a time while ranking


# ---- pairs -------------------------------------------------------------------------------------------------------


def auc(scores: npt.NDArray[Any], positive: Bools) -> float:
    """Probability that a positive outranks a negative, ties counting half; NaN if one class is missing."""
    _, value, _ = auc_by_group(scores, positive, np.zeros(len(scores), np.int32))
    return float(value[0]) if len(value) else float("nan")


def auc_by_group(scores: npt.NDArray[Any], positive: Bools, group: npt.NDArray[Any]) -> tuple[Ints, Doubles, Ints]:
    """Groups with both classes, their AUC, and their number of rows."""
    if not len(scores):
        return np.zeros(0, np.int64), np.zeros(0), np.zeros(0, np.int64)
    # Group, score and label in one number: to sort such numbers is ten times faster than to find an order.
    keys = (group.astype(np.uint64) << 33) | (_ordered_codes(scores).astype(np.uint64) << 1) | positive
    keys.sort()
    edges, ties = _run_edges(keys >> 33), _run_edges(keys >> 1)
    first, sizes = edges[:-1], np.diff(edges)
    positives = np.r_[0, np.cumsum(keys & 1, dtype=np.int64)]  # before each place
    n_pos = np.diff(positives[edges])
    # Twice the sum of the positives' mid-ranks, first among all rows, then within their group.
    ranks = (ties[:-1] + ties[1:] + 1) * np.diff(positives[ties])
    twice = np.add.reduceat(ranks, np.searchsorted(ties, first)) - n_pos * (2 * first + n_pos + 1)
    pairs = n_pos * (sizes - n_pos)
    both = pairs > 0
    return (keys[first[both]] >> 33).astype(np.int64), twice[both] / (2 * pairs[both]), sizes[both]


def _ordered_codes(scores: npt.NDArray[Any]) -> npt.NDArray[np.uint32]:
    """Numbers of 32 bits in the order of the scores, equal where the scores are."""
    if scores.dtype != np.float32:
        return np.unique(scores, return_inverse=True)[1].astype(np.uint32)
    bits = (scores + np.float32(0)).view(np.int32)  # -0 becomes 0
    return (bits ^ ((bits >> 31) | np.int32(-(2**31)))).view(np.uint32)


def _run_edges(values: npt.NDArray[Any]) -> Ints:
    """Where runs of equal values start, and the end of the last one."""
    return np.flatnonzero(np.r_[True, values[1:] != values[:-1], True])


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
    queries = EvaluationQueries.build(wanted, seen, len(user_vectors), len(item_vectors), block)
    best = queries.top_k(user_vectors, item_vectors, k)
    return queries.users, best, queries.hits(best)


@dataclass(frozen=True)
class EvaluationQueries:
    """What a ranking is asked: Q users with something to find among N items. A key is q N + item."""

    users: Ints  # (Q,) rows, rising
    targets: Ints  # keys of what is to be found, rising
    excluded: Ints  # keys of what is left out, rising
    n_items: int
    block: int  # users that are ranked at a time

    @classmethod
    def build(
        cls, wanted: Pairs, seen: Iterable[Pairs], n_users: int, n_items: int, block: int = 512
    ) -> EvaluationQueries:
        """The positives of `wanted` are to be found, unless they are in `seen`, which is left out."""
        targets = np.sort(_pair_keys(wanted, n_items)[wanted.positive])
        excluded = np.sort(np.concatenate([_pair_keys(p, n_items) for p in seen] or [targets[:0]]))
        targets = targets[~_in_sorted(targets, excluded)]
        asks = np.zeros(n_users, bool)
        asks[targets // n_items] = True
        # From user rows to places among the users that ask.
        behind = (np.arange(n_users) - np.cumsum(asks) + 1) * n_items
        who = excluded // n_items
        ours = asks[who]
        return cls(
            np.flatnonzero(asks),
            targets - behind[targets // n_items],
            excluded[ours] - behind[who[ours]],
            n_items,
            max(8, min(block, MAX_SCORES // n_items)),  # fewer would read all items' vectors too often
        )

    def top_k(self, user_vectors: Tensor, item_vectors: Tensor, k: int) -> Ints:
        """(Q, k) best item rows, -1 where there are no more."""
        device = item_vectors.device
        best = np.empty((len(self.users), min(k, self.n_items)), np.int64)
        for part, excluded in self._blocks(self.excluded):
            scores = user_vectors[torch.from_numpy(self.users[part]).to(device)] @ item_vectors.T
            scores.view(-1)[torch.from_numpy(excluded).to(device)] = -torch.inf
            top = scores.topk(best.shape[1], dim=1)
            found = top.indices.cpu().numpy()
            found[~np.isfinite(top.values.cpu().numpy())] = -1
            best[part] = found
        return best

    def hits(self, best: Ints) -> Bools:
        """Which of the items (Q, k) that were found were wanted."""
        hit = np.zeros(best.shape, bool)
        wanted = np.zeros((self.block, self.n_items), bool)
        for part, targets in self._blocks(self.targets):
            rows = best[part]
            wanted.flat[targets] = True
            hit[part] = wanted[np.arange(len(rows))[:, None], rows] & (rows >= 0)
            wanted.flat[targets] = False
        return hit

    def _blocks(self, keys: Ints) -> Iterator[tuple[slice, Ints]]:
        """The users block by block, and the `keys` of each block counted from its first user."""
        for start in range(0, len(self.users), self.block):
            first = start * self.n_items
            lo, hi = np.searchsorted(keys, [first, first + self.block * self.n_items])
            yield slice(start, start + self.block), keys[lo:hi] - first


def _pair_keys(pairs: Pairs, n_items: int) -> Ints:
    return pairs.user.astype(np.int64) * n_items + pairs.item


def _in_sorted(keys: Ints, within: Ints) -> Bools:
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


def bootstrap(values: Doubles, weights: Doubles, resamples: int, seed: int = 0) -> tuple[Any, Any]:
    """95 % percentile interval of the weighted mean of per-user values (n,) or (n, M), resampling users: two numbers,
    or two (M,)."""
    if not resamples or not len(values):
        nothing = np.full(values.shape[1:], np.nan)
        return nothing, nothing
    rng = np.random.default_rng(seed)
    n, weighted = len(values), (values.T * weights).T
    means = []
    for _ in range(resamples):
        times = np.bincount(rng.integers(0, n, n), minlength=n).astype(np.float64)
        means.append(times @ weighted / (times @ weights))
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    return low, high


# ---- baselines ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Factors:
    """A scorer of any pair as vectors: score = users[u] . items[i]."""

    users: Tensor  # (n_users, D)
    items: Tensor  # (n_items, D)

    def scores(self, pairs: Pairs, block: int = 16_384) -> npt.NDArray[np.float32]:
        """(n,) scores of the pairs."""
        out = np.empty(len(pairs), np.float32)
        # In one pair of small buffers: fresh memory for all rows costs ten times the work itself.
        user_rows, item_rows = self.users.new_empty(2, min(block, len(pairs)), self.users.shape[1])
        for start in range(0, len(pairs), block):
            part = slice(start, start + block)
            user, item = (torch.from_numpy(x[part]).to(self.users.device) for x in (pairs.user, pairs.item))
            u = torch.index_select(self.users, 0, user, out=user_rows[: len(user)])
            v = torch.index_select(self.items, 0, item, out=item_rows[: len(item)])
            out[part] = u.mul_(v).sum(1).cpu().numpy()
        return out


def popularity_baseline(train: Pairs, n_users: int, n_items: int) -> Factors:
    """Score = number of training positives of the item."""
    liked = np.zeros(n_items, np.int64)
    for start in range(0, len(train), COUNT_BLOCK_ROWS):
        part = slice(start, start + COUNT_BLOCK_ROWS)
        liked += np.bincount(train.item[part][train.positive[part]], minlength=n_items)
    return Factors(torch.ones(n_users, 1), torch.from_numpy(liked.astype(np.float32))[:, None])


def bias_baseline(train: Pairs, n_users: int, n_items: int, strength: float = 10.0, rounds: int = 10) -> Factors:
    """Score = mean + user bias + item bias, ridge-regularised least squares on the labels by alternation
    (Koren 2010, "Factor in the Neighbors", section 2.1)."""
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
    """In evaluation mode and without gradients; afterwards the model's mode is as it was."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def model_factors(model: TwoTower, users: SideTensors, items: SideTensors, block: int = 65_536) -> Factors:
    """Both towers over all rows, in evaluation mode; the model's mode is left as it was."""
    with evaluation_mode(model):
        return Factors(_all_vectors(model.user_vectors, users, block), _all_vectors(model.item_vectors, items, block))


def factors_before(model: TwoTower, dataset: Dataset, part: int) -> Factors:
    """Vectors of all users and items as they are known when `part` is queries (see `Dataset.side_before`)."""
    device = next(model.parameters()).device
    users, items = (
        SideTensors(dataset.side_before(side, part), dataset.encoders.fields(side), device) for side in SIDES
    )
    return model_factors(model, users, items)


def _all_vectors(tower: Callable[..., Tensor], side: SideTensors, block: int) -> Tensor:
    found: Tensor | None = None
    for start in range(0, side.n, block):
        rows = np.arange(start, min(start + block, side.n))
        vectors = tower(side.take(rows))
        if found is None:
            found = vectors.new_empty((side.n, vectors.shape[1]))
        found[start : start + len(rows)] = vectors  # parts that are joined at the end would take twice the memory
    assert found is not None
    return found


def evaluation_queries(dataset: Dataset, part: int, config: EvaluationConfig) -> EvaluationQueries:
    """Test rankings leave out what was seen in training and validation, validation's what was in training. Of more users
    than `config.max_users` so many are queries, always the same."""
    pairs, shape = _pairs(dataset, part), (len(dataset.users), len(dataset.items))
    users = np.unique(pairs.user[pairs.positive])
    if not config.max_users or len(users) <= config.max_users:
        seen = {TRAIN: [], VALIDATION: [dataset.train], TEST: [dataset.train, dataset.validation]}[part]
        return EvaluationQueries.build(pairs, seen, *shape)
    some = np.sort(np.random.default_rng(0).choice(users, config.max_users, replace=False))
    keep = np.isin(pairs.user, some)
    return EvaluationQueries.build(pairs.take(keep), [dataset.pairs_before(part, some)], *shape)


def _pairs(dataset: Dataset, part: int) -> Pairs:
    pairs: Pairs = getattr(dataset, PART_NAMES[part])  # kept there, unlike `dataset.part`
    return pairs


def evaluate_part(factors: Factors, dataset: Dataset, part: int, config: EvaluationConfig) -> Metrics:
    """Every metric of one part by its plain name: `auc`, `gauc`, `log_loss`, `recall@10`, `coverage@10`, …"""
    report = PartEvaluation.from_factors(factors, dataset, part, config)
    return report.metrics()


@dataclass(frozen=True)
class PartEvaluation:
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
    def from_factors(
        cls,
        factors: Factors,
        dataset: Dataset,
        part: int,
        config: EvaluationConfig,
        queries: EvaluationQueries | None = None,
    ) -> PartEvaluation:
        """The report of vectors. `queries` is what the part asks, where that is known already."""
        queries = queries or evaluation_queries(dataset, part, config)
        best = queries.top_k(factors.users, factors.items, max(config.k))
        return cls._of(queries, best, factors.scores(_pairs(dataset, part)), dataset, part, config)

    @classmethod
    def from_search(
        cls, ask: Callable[[Ints, int], Ints], scores: npt.NDArray[np.float32], dataset: Dataset, part: int,
        config: EvaluationConfig,
    ) -> PartEvaluation:  # fmt: skip
        """The report of whatever answers: `ask(users (Q,), k)` gives item rows (Q, k), `scores` are the part's pairs'."""
        queries = evaluation_queries(dataset, part, config)
        best = ask(queries.users, min(max(config.k), queries.n_items))
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
        """Pair metrics over all rows, ranking metrics as means over users, coverage over the catalogue."""
        out = {
            "auc": auc(self.scores, self.pairs.positive),
            "gauc": gauc(self.scores, self.pairs.positive, self.pairs.user),
            "log_loss": log_loss(self.scores, self.pairs.positive),
        }
        for k in self.config.k:
            for name, values in ranking_metrics(self.hit, self.wanted, k).items():
                out[f"{name}@{k}"] = float(values.mean()) if len(values) else float("nan")
            shown = np.zeros(len(self.dataset.items) + 1, bool)
            shown[self.best[:, :k]] = True  # -1, no item, is the last
            out[f"coverage@{k}"] = float(shown[:-1].sum() / len(self.dataset.items))
        return out

    def intervals(self) -> dict[str, tuple[float, float]]:
        """95 % intervals over users of GAUC and of the ranking metrics."""
        _, values, sizes = auc_by_group(self.scores, self.pairs.positive, self.pairs.user)
        low, high = bootstrap(values, sizes.astype(float), self.config.bootstrap)
        out = {"gauc": (float(low), float(high))}
        per_user = {
            f"{name}@{k}": found
            for k in self.config.k
            for name, found in ranking_metrics(self.hit, self.wanted, k).items()
        }
        bounds = bootstrap(np.stack([*per_user.values()], 1), np.ones(len(self.users)), self.config.bootstrap)
        out |= {name: (float(low), float(high)) for name, low, high in zip(per_user, *bounds, strict=True)}
        return {name: interval for name, interval in out.items() if np.isfinite(interval).all()}

    def slices(self) -> Metrics:
        """`auc.new_user`, `recall@10.tail`, … for the slices that hold something to measure."""
        data, config = self.dataset, self.config
        user_n, item_n = counts(data.train.user, len(data.users)), counts(data.train.item, len(data.items))
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


def evaluate_model(before: Callable[[int], Factors], dataset: Dataset, config: EvaluationConfig) -> Metrics:
    """The flat metrics of a run: validation and test, intervals and slices of test, and the baselines beside them.

    `before(part)` gives the vectors as they are known when that part is queries.
    """
    out: Metrics = {}
    queries = evaluation_queries(dataset, TEST, config)
    factors = before(VALIDATION)
    for name, part in (("validation", VALIDATION), ("test", TEST)):
        if part == TEST and dataset.time_ordered:  # else both parts are queries with the same knowledge
            factors = before(TEST)
        report = PartEvaluation.from_factors(factors, dataset, part, config, queries if part == TEST else None)
        out |= {f"{name}.{m}": v for m, v in report.metrics().items()}
        if part == TEST:
            for m, (low, high) in report.intervals().items():
                out[f"test.{m}.low"], out[f"test.{m}.high"] = low, high
            out |= {f"test.{m}": v for m, v in report.slices().items()}
    n_users, n_items = len(dataset.users), len(dataset.items)
    for name, baseline in (
        ("popularity", popularity_baseline(dataset.train, n_users, n_items)),
        ("bias", bias_baseline(dataset.train, n_users, n_items)),
    ):
        found = PartEvaluation.from_factors(baseline, dataset, TEST, config, queries).metrics()
        del found["log_loss"]  # neither baseline gives a logit
        out |= {f"baseline.{name}.{m}": v for m, v in found.items()}
    return {m: v for m, v in out.items() if v == v}
