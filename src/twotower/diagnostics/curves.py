"""Diagnoses of the learning curves, and of the lower bound of the loss."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from twotower.diagnostics.diagnosis import DiagnosisContext, Finding, or_ok


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
