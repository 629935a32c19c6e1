"""Diagnoses of the vectors: their spread, and their metrics compared with simple baselines."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from twotower.arrays.types import Floats, Ints
from twotower.data.dataset import Dataset
from twotower.data.splits import TEST, TRAIN
from twotower.diagnostics.diagnosis import DiagnosisContext, Finding, Severity
from twotower.evaluation.baselines import bias_baseline, popularity_baseline
from twotower.evaluation.comparison import (
    Comparison,
    ComparisonData,
    compare_factors,
    compare_rankings,
    comparison_data,
)
from twotower.evaluation.factors import Factors, SomeUsers
from twotower.evaluation.metrics.auc import Auc
from twotower.evaluation.metrics.ndcg import Ndcg
from twotower.features.side import SIDES
from twotower.scorers import SCORERS, alone
from twotower.train.preconditions import OrderReaders, order_problem

FEW_DIRECTIONS = 0.1
"""Share of the width below which the effective rank of the user vectors is compared with the directions of the log."""
NO_SPREAD = 1e-6
"""Standard deviation of a user's scores below which scores of a closed form (no logits) count as equal."""
MAX_ITEMS = 2000
"""Number of most frequent items that are read for the directions of a log."""
MIN_COUNT = 3
"""Least number of interactions of an item that is read for the directions of a log."""
_OF_START = (
    "No epoch is trained, so scorers alone make the vectors: give other or several values of their options for "
    "validation to choose among, or set train.epochs above 0."
)


def collapse(context: DiagnosisContext) -> Iterator[Finding]:
    """Split the variance of scores over items into a part common to all users and a part that depends on the user."""
    users = context.factors.users[context.trained_rows["user"]].double()
    items = context.factors.items[context.trained_rows["item"]].double()
    if len(users) < 2 or len(items) < 2:
        return
    end = -2 if context.run.model.bias_columns else None  # leaves out the bias columns
    evidence: dict[str, float] = {}
    for side, rows in (("user", users[:, :end]), ("item", items[:, :end])):
        evidence[f"{side}_cosine"], evidence[f"{side}_rank"] = _mean_cosine(rows), _effective_rank(rows)
    mean_user, centred_items = users.mean(0), items - items.mean(0)
    covariance = centred_items.T @ centred_items / len(items)
    centred = users - mean_user
    personal = max(0.0, float(((centred @ covariance) * centred).sum(1).mean()))
    common = max(0.0, float(mean_user @ covariance @ mean_user))
    share = personal / (personal + common) if personal + common > 0 else 0.0
    evidence |= {
        "logit_spread": math.sqrt(personal + common), "personal": math.sqrt(personal), "personal_share": share
    }  # fmt: skip
    width = users[:, :end].shape[1]
    side = max(SIDES, key=lambda s: evidence[f"{s}_cosine"])
    cosine = evidence[f"{side}_cosine"]
    narrow = min(SIDES, key=lambda s: evidence[f"{s}_rank"])
    temperature_hint = ", and model.temperature" if context.config.model.similarity == "cosine" else ""
    severity: Severity = "error"
    closed = not context.config.train.epochs
    advice = (
        f" {_OF_START}"
        if closed
        else " If there is an unused_feature, start with that finding; otherwise lower train.lr and "
        f"train.embedding_weight_decay{temperature_hint}."
    )
    if context.is_untrained and context.few_steps:
        advice = f" The training loss has not fallen yet: {context.to_learn}."
    if evidence["logit_spread"] < (NO_SPREAD if closed else 0.05):
        text = f"All items have nearly the same score (deviation of a user's logits: {evidence['logit_spread']:.2g})."
        if share >= 0.01 and not closed and _beats_popularity(context):
            severity = "warning"
            text += " Their ranking is still better than popularity."
            advice = " Train longer, or raise train.lr."
    elif share < 0.01:
        text = f"All users have nearly the same ranking: {share:.2%} of the variance of scores depends on the user."
    elif cosine >= 0.98 and evidence["personal"] < 0.5 and not closed:
        text = f"The {side} vectors have collapsed: two of them have a cosine of {cosine:.3f} on average."
    elif cosine >= 0.9 and evidence["personal"] < 0.5 and not closed:
        severity = "warning"
        text = (
            f"The {side} vectors point in nearly one direction: two of them have a cosine of {cosine:.3f} on average."
        )
    elif evidence[f"{narrow}_rank"] < 1.5 and width > 2:
        severity = "warning"
        if not closed:
            advice = " If the data should have more, lower train.lr and the weight decays, or train longer."
        text = f"The {narrow} vectors use {evidence[f'{narrow}_rank']:.1f} of {width} dimensions."
    elif (
        not closed
        and evidence["user_rank"] < FEW_DIRECTIONS * width
        and evidence["user_rank"] < (known := significant_directions(context.data, context.trained_rows["user"]))
    ):
        severity = "warning"
        evidence["directions"] = float(known)
        text = (
            f"The user vectors use {evidence['user_rank']:.0f} of {width} dimensions, and the users of the log differ "
            f"in at least {known:.0f}."
        )
        advice = (
            " The user tower reads or learns too little: give it a history (kind = 'sequence', pooling = 'mean'), "
            "train longer, lower the weight decays, or leave out layers (layers = [])."
        )
    else:
        severity, advice = "ok", ""
        text = (
            f"User vectors use about {evidence['user_rank']:.0f} of {width} dimensions and item vectors "
            f"{evidence['item_rank']:.0f}; {share:.0%} of the variance of scores depends on the user."
        )
    yield Finding(severity, "collapse", f"{text} {context.remedy(advice[1:])}" if advice else text, evidence)


def _beats_popularity(context: DiagnosisContext) -> bool:
    """Return True if the lower bound of the run's test NDCG is above the popularity baseline."""
    name, metrics = f"{Ndcg.name}@{context.config.evaluation.k[0]}", context.run.metrics
    lowest = metrics.get(f"test.{name}.low", metrics.get(f"test.{name}", 0.0))
    return lowest > metrics.get(f"baseline.popularity.{name}", math.inf)


def _mean_cosine(rows: Tensor) -> float:
    """Return the mean cosine of two different rows of (n, D); 1 if all are zeros."""
    n = len(rows)
    length = rows.norm(dim=1, keepdim=True)
    if float(length.max()) < 1e-12:
        return 1.0
    unit = rows / length.clamp(min=1e-12)
    return float((unit.sum(0).square().sum() - unit.square().sum()) / (n * (n - 1)))


def _effective_rank(rows: Tensor) -> float:
    """Return the effective rank of (n, D): exp of the entropy of the normalised eigenvalues of its covariance
    (Roy and Vetterli 2007, "The Effective Rank", with variances instead of singular values)."""
    centred = rows - rows.mean(0)
    values = torch.linalg.eigvalsh(centred.T @ centred).clamp(min=0)
    total = float(values.sum())
    if total <= 1e-12 * float(rows.square().sum()):
        return 0.0
    share = values / total
    return float(torch.exp(-torch.xlogy(share, share).sum()))


def baselines(context: DiagnosisContext) -> Iterator[Finding]:
    """Compare the model on test users with baselines.

    Rankings: popularity, and scorers alone. Pairs: user and item biases."""
    data, config = context.data, context.config
    users = context.sample(np.flatnonzero(data.grouped(TEST).lengths))
    if len(users) < 2:
        return
    test_data = comparison_data(data, users, config.evaluation.weighted, config.evaluation.repeats)
    drawn_pairs = config.negatives.pairs
    retrieves = not config.loss.pointwise or bool(drawn_pairs)
    ranked = config.evaluation.metric_set.find(config.train.monitor).at_cut_offs
    n_users, n_items = len(data.users), len(data.items)
    k = config.evaluation.k[0]
    if retrieves or ranked:
        remedy = _likely_causes(context)
        counts = popularity_baseline(data.train, n_users, n_items)
        for c in _compare_with_baseline(context, counts, users, test_data, [k], f"{Ndcg.name}@{k}"):
            yield _baseline_finding(c, "popularity", "baseline_ranking", "error", remedy)
        yield from _alone(context, users, test_data, k, remedy)
    if config.loss.pointwise:
        severity: Severity = "warning" if drawn_pairs else "error"
        remedy = (
            "Drawn pairs train the ranking of the catalogue at the cost of the AUC of shown items: for the latter "
            f"lower negatives.{drawn_pairs[0].kind}.share."
            if drawn_pairs
            else context.remedy("Raise train.epochs, set model.bias = true, and see the other findings.")
        )
        fitted = bias_baseline(data.train, n_users, n_items)
        for c in _compare_with_baseline(context, fitted, users, test_data, [], Auc.name):
            yield _baseline_finding(c, "user and item biases", "baseline_pairs", severity, remedy)


def _likely_causes(context: DiagnosisContext) -> str:
    """Return likely causes of a poor ranking, with settings to change: data first, then loss, then training."""
    config, causes = context.config, []
    if not config.train.epochs:
        n = context.data.positives_by_user.lengths
        median = f"The median user has {np.median(n[n > 0]):g} training positives; "
        return f"{context.remedy(_OF_START)} {median}if these are few, popularity predicts better."
    if context.order and order_problem(context.order) and config.train.history_scope == "causal":
        readers = OrderReaders.of(context.data.schema, config)
        causes.append(f"an order that the log does not have (set {readers.way_out})")
    if config.loss.pointwise:
        causes.append("a loss of pairs (set loss.kind = 'softmax' with negatives.uniform or negatives.full)")
    if context.monitored and context.monitored[-1] == context.best_epoch:
        causes.append(f"too few epochs, as the last is the best (raise train.epochs, now {config.train.epochs})")
    causes.append(
        f"steps too few or too small ({context.to_learn})"
        if context.is_untrained
        else "a step too small or too large (train.lr)"
    )
    return context.remedy(f"Likely causes, most likely first: {'; '.join(causes)}. See the other findings.")


def _alone(context: DiagnosisContext, users: Ints, test_data: ComparisonData, k: int, remedy: str) -> Iterator[Finding]:
    """Compare the model with scorers alone."""
    queries, config = test_data.queries, context.config
    best = queries.top_k(context.factors.take(users), k)
    for name, scores in alone(context.data, TEST, config.evaluation, context.factors.added):
        compared = {
            c.metric: c for c in compare_rankings(queries.top_k(SomeUsers(scores, users), k), best, test_data, [k], 200)
        }
        if found := compared.get(f"{Ndcg.name}@{k}"):
            is_added = name in {scorer.kind for scorer in (*config.scorers, *config.train.solved)}
            more = "" if is_added else f" Add the scorer {{ kind = '{name}' }} to scorers."
            yield _baseline_finding(found, SCORERS.find(name).label, f"baseline_{name}", "warning", remedy + more)


def _compare_with_baseline(
    context: DiagnosisContext, baseline: Factors, users: Ints, test_data: ComparisonData, k: list[int], metric: str
) -> list[Comparison]:
    """Compare the baseline (A) and the model (B) on the same test users by one metric; empty if it is undefined."""
    own, other = context.factors.take(users), baseline.take(users)
    return [c for c in compare_factors(other, own, test_data, k, 200) if c.metric == metric]


def _baseline_finding(c: Comparison, baseline: str, name: str, severity: Severity, remedy: str) -> Finding:
    evidence = {"model": c.b, "baseline": c.a, "low": c.low, "high": c.high, "users": float(c.users)}
    interval = (
        f"difference {c.difference:+.4f}, 95 % interval [{c.low:+.4f}, {c.high:+.4f}] over {c.users:,} test users"
    )
    if c.low > 0:
        text = f"Better than {baseline}: {c.metric} {c.b:.4f} against {c.a:.4f} ({interval})."
        return Finding("ok", name, text, evidence)
    if c.difference > 0:
        text = (
            f"{c.metric} {c.b:.4f} is above {baseline} ({c.a:.4f}), but the difference is not significant "
            f"({interval}); measure it on more test users. {remedy}"
        )
        return Finding("warning", name, text, evidence)
    relation = "worse than" if c.high < 0 else "no better than"
    text = f"The model is {relation} {baseline}: {c.metric} {c.b:.4f} against {c.a:.4f} ({interval}). {remedy}"
    return Finding(severity, name, text, evidence)


def significant_directions(data: Dataset, users: Ints) -> int:
    """Return the number of significant directions of the matrix of users and items, by parallel analysis (Horn 1965,
    "A rationale and test for the number of factors in factor analysis").

    The matrix has a 1 for each training target of `users` (rising rows), minus the expectation by activity and
    popularity, divided by the square roots of both. A direction counts if its singular value exceeds the largest one
    of the same matrix with permuted items. A lower bound: more users show more directions.
    """
    rng = np.random.default_rng(0)
    pairs = data.grouped(TRAIN).take(users)
    item = pairs.item[pairs.target].astype(np.int64)
    user = np.searchsorted(users, pairs.user[pairs.target])
    known, column, count = np.unique(item, return_inverse=True, return_counts=True)
    kept = np.zeros(len(known), bool)
    kept[np.argsort(-count, kind="stable")[:MAX_ITEMS]] = True
    kept &= count >= MIN_COUNT
    places = np.cumsum(kept) - 1
    rows = kept[column]
    user, column = user[rows], places[column[rows]]
    n = int(kept.sum())
    if n < 2 or len(users) < 2:
        return 0
    found = _singular_values(user, column, len(users), n)
    return int(np.count_nonzero(found > 1.02 * _singular_values(user, rng.permutation(column), len(users), n).max()))


def _singular_values(user: Ints, item: Ints, n_users: int, n_items: int) -> Floats:
    matrix = np.zeros((n_users, n_items), np.float32)
    matrix[user, item] = 1
    row, column = matrix.sum(1, keepdims=True), matrix.sum(0, keepdims=True)
    matrix -= row * column / max(1.0, float(row.sum()))
    matrix /= np.sqrt(np.maximum(row, 1)) * np.sqrt(np.maximum(column, MIN_COUNT))
    gram = matrix @ matrix.T if n_users <= n_items else matrix.T @ matrix
    values: Floats = np.sqrt(np.maximum(np.linalg.eigvalsh(gram), 0))
    return values
