"""Diagnoses of the trained model: its learning curves, the lower bound of its loss, its vectors, and its verdict."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from twotower.diagnostics.diagnosis import DiagnosisContext, Finding, Severity, or_ok
from twotower.evaluation.metrics.ndcg import Ndcg
from twotower.features.side import SIDES
from twotower.reports.verdict import verdict
from twotower.runs.evaluation import evaluate
from twotower.train.preconditions import OrderReaders, order_problem

NO_SPREAD = 1e-6
"""Standard deviation of a user's scores below which scores of a closed form (no logits) count as equal."""
_OF_START = (
    "No epoch is trained, so scorers alone make the vectors: give other or several values of their options for "
    "validation to choose among, or set train.epochs above 0."
)


def history(context: DiagnosisContext) -> Iterator[Finding]:
    """Check the curves of the training loss and of the monitored metric."""
    if context.run.history:
        also = f", and {context.config.train.monitor} shows no problem" if context.monitored else ""
        text = f"The training loss falls{also}."
        yield from or_ok([*_train_loss(context), *_validation_curve(context)], "history", text)


def _train_loss(context: DiagnosisContext) -> Iterator[Finding]:
    losses = context.losses
    if len(losses) < 2:
        return
    evidence = {"first": losses[0], "last": losses[-1], "constant_loss": context.constant_loss}
    if losses[-1] > 1.02 * losses[0]:
        yield Finding(
            "error", "loss_rises",
            f"The training loss rises, from {losses[0]:.4f} to {losses[-1]:.4f}. The steps are too large: lower "
            "train.lr, set train.warmup_steps, or train.clip_norm = 1.",
            evidence,
        )  # fmt: skip
    elif min(losses) > 0.999 * losses[0]:
        # A flat curve is no error if the first epoch has already lowered the loss.
        untrained = context.is_untrained
        yield Finding(
            "error" if untrained else "warning", "loss_flat",
            f"The training loss does not fall: {losses[0]:.4f} after the first epoch, {losses[-1]:.4f} after the last"
            + (
                f", and the same logit for every pair gives {context.constant_loss:.4f}. The model does not learn: "
                f"{context.to_learn}, and see the other findings for the cause."
                if untrained
                else ". If the validation metric does not improve either, raise train.lr or the width of model.pairs."
            ),
            evidence,
        )  # fmt: skip


def _validation_curve(context: DiagnosisContext) -> Iterator[Finding]:
    curve, train = context.monitored, context.config.train
    if len(curve) < 2:
        return
    sign = 1 if context.config.evaluation.metric_set.find(train.monitor).higher_is_better else -1
    value = [sign * v for _, v in curve]
    best = int(np.argmax(value))
    spread = max(value) - min(value)
    evidence = {"best_epoch": float(curve[best][0]), "best": curve[best][1], "last": curve[-1][1]}
    if best == len(curve) - 1 and value[-1] - value[-2] > max(0.05 * spread, 1e-3 * abs(value[-1])):
        yield Finding(
            "warning", "still_rising",
            f"{train.monitor} is best after the last epoch and still improves ({curve[-2][1]:.4f}, then "
            f"{curve[-1][1]:.4f}). Train longer: raise train.epochs (now {train.epochs}).",
            evidence,
        )  # fmt: skip
    elif best == 0 and len(curve) >= 3 and value[0] - value[-1] > 1e-3 * abs(value[0]):
        yield Finding(
            "warning", "peaks_early",
            f"{train.monitor} is best at its first value (epoch {curve[0][0]}) and never improves. "
            + (
                f"The same logit for every pair gives this training loss: nothing is learned; {context.to_learn}."
                if context.is_untrained
                else context.remedy(
                    "The model overfits the training pairs, or the steps are too large: lower train.lr, or raise "
                    "train.embedding_weight_decay or a pair's dropout."
                )
            ),
            evidence,
        )  # fmt: skip


def loss_floor(context: DiagnosisContext) -> Iterator[Finding]:
    """Check that the temperature allows a loss below the present one: a cosine bounds the logits by 1 / T."""
    model = context.config.model
    if model.similarity != "cosine" or model.bias or not context.losses:
        return
    temperature = context.temperature
    floor = context.loss_at_cosine(1.0)
    loss = context.losses[-1]
    evidence = {"floor": floor, "loss": loss, "temperature": temperature, "constant_loss": context.constant_loss}
    share = floor / max(loss, 1e-12)
    # A floor far below the present loss, or the loss of a constant model, does not limit training.
    if floor < 0.05 * context.constant_loss or share < 0.25:
        yield Finding("ok", "loss_floor", f"Temperature {temperature:.3g} allows a loss of {floor:.2g}.", evidence)
        return
    yield Finding(
        "error" if share >= 0.5 else "warning", "loss_floor",
        f"A cosine at temperature {temperature:.3g} cannot bring the loss below {floor:.3f}, however good the vectors "
        f"are; it is {loss:.3f} now, and the same logit for every pair gives {context.constant_loss:.3f}. Set "
        "model.temperature = 0.1 and model.learn_temperature = true, model.bias = true, or model.similarity = 'dot'.",
        evidence,
    )  # fmt: skip


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


def baseline(context: DiagnosisContext) -> Iterator[Finding]:
    """Compare the model with the best simple baseline by the verdict of its evaluation; a run without one is evaluated.

    A warning or an error names likely causes."""
    run = context.run
    if not len(run.dataset.test):
        return
    found = verdict(run.metrics, run.config) or verdict(evaluate(run), run.config)
    if found is None:
        return
    severity: Severity = "ok" if found.is_better else "error" if found.is_below_popularity else "warning"
    causes = "" if found.is_better else f" {found.help}{_likely_causes(context)}"
    yield Finding(severity, "baseline", " ".join(found.sentences[:2]) + causes)


def _likely_causes(context: DiagnosisContext) -> str:
    """Return likely causes of a poor model, with settings to change: data first, then loss, then training."""
    config, causes = context.config, []
    if not config.train.epochs:
        n = context.data.positives_by_user.lengths
        median = f"The median user has {np.median(n[n > 0]):g} training positives; "
        return f"{context.remedy(_OF_START)} {median}if these are few, popularity predicts better."
    if context.order and order_problem(context.order) and config.train.history_scope == "causal":
        readers = OrderReaders.of(context.data.schema, config)
        causes.append(f"an order that the log does not have (set {readers.way_out})")
    ranked = config.evaluation.metric_set.find(config.train.monitor).at_cut_offs
    if config.loss.pointwise and ranked:
        causes.append("a loss of pairs (set loss.kind = 'softmax' with negatives.uniform or negatives.full)")
    elif config.negatives.pairs:
        share = f"negatives.{config.negatives.pairs[0].kind}.share"
        causes.append(f"drawn pairs, which train the ranking at the cost of the AUC of shown items (lower {share})")
    if context.monitored and context.monitored[-1] == context.best_epoch:
        causes.append(f"too few epochs, as the last is the best (raise train.epochs, now {config.train.epochs})")
    causes.append(
        f"steps too few or too small ({context.to_learn})"
        if context.is_untrained
        else "a step too small or too large (train.lr)"
    )
    return context.remedy(f"Likely causes, most likely first: {'; '.join(causes)}. See the other findings.")
