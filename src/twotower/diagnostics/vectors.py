"""What the vectors are worth: how they lie, and whether they rank better than counting does."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from twotower.compare import Comparison, ComparisonData, compare_factors, comparison_data
from twotower.diagnostics.context import DiagnosisContext, sample
from twotower.diagnostics.findings import Finding, Severity
from twotower.encoders import Ints
from twotower.evaluation import Factors, bias_baseline, popularity_baseline
from twotower.schema import SIDES


def collapse(p: DiagnosisContext) -> Iterator[Finding]:
    """What a score is made of: its spread over items is the items' own plus what is between this user and this item."""
    users, items = (p.factors.users[p.met["user"]].double(), p.factors.items[p.met["item"]].double())
    if len(users) < 2 or len(items) < 2:
        return
    own = -2 if p.config.model.bias else None  # without the columns of the biases
    evidence: dict[str, float] = {}
    for side, rows in (("user", users[:, :own]), ("item", items[:, :own])):
        evidence[f"{side}_cosine"], evidence[f"{side}_rank"] = _mean_cosine(rows), _effective_rank(rows)
    middle, spread = users.mean(0), items - items.mean(0)
    covariance = spread.T @ spread / len(items)
    centred = users - middle
    between = max(0.0, float(((centred @ covariance) * centred).sum(1).mean()))
    alike = max(0.0, float(middle @ covariance @ middle))
    share = between / (between + alike) if between + alike > 0 else 0.0
    evidence |= {
        "logit_spread": math.sqrt(between + alike), "personal": math.sqrt(between), "personal_share": share
    }  # fmt: skip
    width = users[:, :own].shape[1]
    side = max(SIDES, key=lambda s: evidence[f"{s}_cosine"])
    most = evidence[f"{side}_cosine"]
    narrow = min(SIDES, key=lambda s: evidence[f"{s}_rank"])
    cooler = ", and model.temperature" if p.config.model.similarity == "cosine" else ""
    severity: Severity = "error"
    advice = (
        " If a finding unused_feature says that its tower sees nothing, start there; else lower train.lr and "
        f"train.embedding_weight_decay{cooler}."
    )
    if evidence["logit_spread"] < 0.05:
        text = f"All items have nearly the same score (a user's logits spread by {evidence['logit_spread']:.2g})."
    elif share < 0.01:
        text = f"Every user gets nearly the same ranking: {share:.2%} of what tells items apart depends on the user."
    elif most >= 0.98 and evidence["personal"] < 0.5:
        text = f"The {side} vectors have collapsed: two of them have a cosine of {most:.3f} on average."
    elif most >= 0.9 and evidence["personal"] < 0.5:
        severity = "warning"
        text = f"The {side} vectors point in nearly one direction: two of them have a cosine of {most:.3f} on average."
    elif evidence[f"{narrow}_rank"] < 1.5 and width > 2:
        severity, advice = "warning", " If yours has more, lower train.lr and the weight decays, or train longer."
        text = (
            f"The {narrow} vectors use {evidence[f'{narrow}_rank']:.1f} of {width} directions: taste has one axis here."
        )
    else:
        severity, advice = "ok", ""
        text = (
            f"User vectors use about {evidence['user_rank']:.0f} of {width} directions and item vectors "
            f"{evidence['item_rank']:.0f}; {share:.0%} of what tells items apart depends on the user."
        )
    yield Finding(severity, "collapse", text + advice, evidence)


def _mean_cosine(rows: Tensor) -> float:
    """Mean cosine of two different rows of (n, D); 1 if all are zeros."""
    n = len(rows)
    length = rows.norm(dim=1, keepdim=True)
    if float(length.max()) < 1e-12:
        return 1.0
    unit = rows / length.clamp(min=1e-12)
    return float((unit.sum(0).square().sum() - unit.square().sum()) / (n * (n - 1)))


def _effective_rank(rows: Tensor) -> float:
    """exp of the entropy of the covariance's normalised eigenvalues: how many directions (n, D) spreads over
    (as Roy and Vetterli 2007, "The Effective Rank", with variances for singular values)."""
    centred = rows - rows.mean(0)
    values = torch.linalg.eigvalsh(centred.T @ centred).clamp(min=0)
    total = float(values.sum())
    if total <= 1e-12 * float(rows.square().sum()):
        return 0.0
    share = values / total
    return float(torch.exp(-torch.xlogy(share, share).sum()))


def baselines(p: DiagnosisContext) -> Iterator[Finding]:
    data, config = p.data, p.config
    users = sample(np.unique(data.test.user).astype(np.int64))
    if len(users) < 2:
        return
    questions = comparison_data(data, users)
    retrieves = config.loss.kind != "bce" or config.negatives.random > 0
    ranked = config.train.monitor.partition(".")[2] not in ("auc", "gauc", "log_loss")
    n_users, n_items = len(data.users), len(data.items)
    k = config.evaluation.k[0]
    if retrieves or ranked:
        pairs = config.loss.kind == "bce"
        other = ", or set loss.kind = 'softmax' with negatives.uniform" if pairs else ""
        how = f"See the other findings, and raise train.epochs or train.lr{other}."
        counts = popularity_baseline(data.train, n_users, n_items)
        for c in _compare_with_baseline(p, counts, users, questions, [k], f"ndcg@{k}"):
            yield _baseline_finding(c, "popularity", "baseline_ranking", "error", how)
    if config.loss.kind == "bce":
        severity: Severity = "warning" if config.negatives.random else "error"
        how = (
            "One score cannot answer both whether a shown item is liked and which items to show: for the former lower "
            "negatives.random_share."
            if config.negatives.random
            else "Raise train.epochs, set model.bias = true, and see the other findings."
        )
        fitted = bias_baseline(data.train, n_users, n_items)
        for c in _compare_with_baseline(p, fitted, users, questions, [], "auc"):
            yield _baseline_finding(c, "user and item biases", "baseline_pairs", severity, how)


def _compare_with_baseline(
    p: DiagnosisContext, baseline: Factors, users: Ints, questions: ComparisonData, k: list[int], metric: str
) -> list[Comparison]:
    """The baseline (A) and the model (B) over the same test users by one metric; empty if it cannot be measured."""
    one, two = (Factors(f.users[torch.from_numpy(users)], f.items) for f in (baseline, p.factors))
    return [c for c in compare_factors(one, two, questions, k, 200) if c.metric == metric]


def _baseline_finding(c: Comparison, baseline: str, name: str, severity: Severity, how: str) -> Finding:
    evidence = {"model": c.b, "baseline": c.a, "low": c.low, "high": c.high, "users": float(c.users)}
    interval = (
        f"difference {c.difference:+.4f}, 95 % interval [{c.low:+.4f}, {c.high:+.4f}] over {c.users:,} test users"
    )
    if c.low > 0:
        return Finding(
            "ok", name, f"Better than {baseline}: {c.metric} {c.b:.4f} against {c.a:.4f} ({interval}).", evidence
        )
    if c.difference > 0:
        text = (
            f"{c.metric} {c.b:.4f} is above that of {baseline} ({c.a:.4f}), but chance over users could have made the "
            f"difference ({interval}). More test users would tell. {how}"
        )
        return Finding("warning", name, text, evidence)
    told = "worse than" if c.high < 0 else "no better than"
    return Finding(
        severity,
        name,
        f"The model is {told} {baseline}: {c.metric} {c.b:.4f} against {c.a:.4f} ({interval}). {how}",
        evidence,
    )
