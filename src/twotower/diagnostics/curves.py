"""The losses and metrics of the epochs, and what the loss could reach."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from twotower.diagnostics.context import DiagnosisContext
from twotower.diagnostics.findings import Finding, or_ok


def history(p: DiagnosisContext) -> Iterator[Finding]:
    values = [float(v) for h in p.run.history for k, v in h.items() if k == "train.loss" or k.startswith("validation.")]
    if not all(math.isfinite(v) for v in values):
        yield Finding(
            "error", "history",
            "The history holds values that are not finite: training broke down. Lower train.lr, or set "
            "train.clip_norm = 1.",
        )  # fmt: skip
        return
    if p.run.history:
        well = f"The training loss and {p.config.train.monitor} go as they should."
        yield from or_ok([*_train_loss(p), *_validation_curve(p)], "history", well)


def _train_loss(p: DiagnosisContext) -> Iterator[Finding]:
    losses = p.losses
    if len(losses) < 2:
        return
    evidence = {"first": losses[0], "last": losses[-1], "constant_answer": p.ignorance}
    if losses[-1] > 1.02 * losses[0]:
        yield Finding(
            "error", "loss_rises",
            f"The training loss rises, from {losses[0]:.4f} to {losses[-1]:.4f}. The steps are too large: lower "
            "train.lr, set train.warmup_steps, or train.clip_norm = 1.",
            evidence,
        )  # fmt: skip
    elif min(losses) > 0.999 * losses[0]:
        # A flat curve is fine where the first epoch has taught everything.
        nothing = losses[-1] > 0.98 * p.ignorance
        yield Finding(
            "error" if nothing else "warning", "loss_flat",
            f"The training loss does not fall: {losses[0]:.4f} after the first epoch, {losses[-1]:.4f} after the last"
            + (
                f", and one answer for every pair would give {p.ignorance:.4f}. The model learns nothing: raise "
                "train.lr, and look at the other findings for the cause."
                if nothing
                else ". If validation does not rise either, raise train.lr or the width of model.pairs."
            ),
            evidence,
        )  # fmt: skip


def _validation_curve(p: DiagnosisContext) -> Iterator[Finding]:
    curve, train = p.monitored, p.config.train
    if len(curve) < 2:
        return
    sign = -1 if train.monitor.endswith("log_loss") else 1
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
            "warning", "peaks_at_once",
            f"{train.monitor} is best at its first measure (epoch {curve[0][0]}) and never improves. The model fits "
            "the training pairs by heart or steps too far: lower train.lr, or raise train.embedding_weight_decay or a "
            "pair's dropout.",
            evidence,
        )  # fmt: skip


def loss_floor(p: DiagnosisContext) -> Iterator[Finding]:
    model, kind = p.config.model, p.config.loss.kind
    if model.similarity != "cosine" or model.bias or not p.losses:
        return
    temperature = p.temperature
    floor = math.log1p(math.exp(-1 / temperature)) if kind == "bce" else p.loss_at_cosine(1.0)
    loss = p.losses[-1]
    evidence = {"floor": floor, "loss": loss, "temperature": temperature, "constant_answer": p.ignorance}
    share = floor / max(loss, 1e-12)
    # A floor that is next to nothing of what there was to learn stands in nobody's way.
    if floor < 0.05 * p.ignorance or share < 0.25:
        yield Finding("ok", "loss_floor", f"Temperature {temperature:.3g} lets the loss fall to {floor:.2g}.", evidence)
        return
    yield Finding(
        "error" if share >= 0.5 else "warning", "loss_floor",
        f"A cosine at temperature {temperature:.3g} cannot bring the loss below {floor:.3f}, however good the vectors "
        f"are; it is {loss:.3f} now, and one answer for every pair would give {p.ignorance:.3f}. Set model.temperature "
        "= 0.1 and model.learn_temperature = true, or model.bias = true, or model.similarity = 'dot'.",
        evidence,
    )  # fmt: skip
