"""Diagnoses of single features: label leakage, statistics, encodings, unused features."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt
from torch import Tensor

from twotower.arrays.pieces import gathered
from twotower.arrays.ragged import Column, Ragged
from twotower.arrays.types import Bools
from twotower.data.dataset import Dataset
from twotower.data.pairs import counts
from twotower.data.splits import TEST, TRAIN
from twotower.diagnostics.diagnosis import DiagnosisContext, Finding, or_ok
from twotower.evaluation.metrics.auc import auc, ordered_codes
from twotower.features.field import InputField
from twotower.features.side import SIDES, SideName
from twotower.features.values import UNKNOWN
from twotower.model.embeddings import FieldEmbeddings
from twotower.model.inputs import carrier, stacked
from twotower.model.inputs.code_layout import CodeLayout, Inputs


def statistics(context: DiagnosisContext) -> Iterator[Finding]:
    """Warn of a schema with a statistic and a sequence: together they reveal the training pair."""
    schema = context.data.schema
    statistics = [s.name for s in schema.statistics()]
    sequences = [h.name for h in schema.histories()]
    if statistics and sequences:
        yield Finding(
            "warning", "statistic_beside_sequence",
            f"The schema has the statistic '{statistics[0]}' and the sequence '{sequences[0]}'. The statistic counts "
            "the training pair itself, the sequence leaves it out, so the two together reveal the label in training "
            "only; on MovieLens 1M this cost 0.005 of AUC. Remove the features with a statistic from schema.features.",
            {"statistics": float(len(statistics)), "sequences": float(len(sequences))},
        )  # fmt: skip


def leaking_features(context: DiagnosisContext) -> Iterator[Finding]:
    """Find features that alone predict the label of test pairs, probably because they are derived from it."""
    data = context.data
    test = data.test
    if test.positive.all() or not test.positive.any():
        return
    found: list[tuple[SideName, str, float]] = []
    for side in SIDES:
        rows, train_rows = (_rows_read(data, side, part) for part in (TEST, TRAIN))
        of_side = data.side(side).by_version()
        for feature in data.schema.columns(side):
            if feature.source == data.schema.id_column(side):
                continue
            column = of_side.columns[feature.name]
            score = _single_feature_score(column, train_rows, data.train.positive, len(of_side))
            if score is not None:
                value = auc(gathered(ordered_codes(score), rows), test.positive)
                found.append((side, feature.name, max(value, 1 - value)))
    for side, name, value in found:
        if value >= 0.95:
            yield Finding(
                "error", "leaking_feature",
                f"The {side} feature '{name}' alone predicts the label of test pairs (AUC {value:.3f}): most likely it "
                "is derived from the label. If it is unknown before the user decides, remove it from schema.features.",
                {"auc": value},
            )  # fmt: skip
    if found and max(v for _, _, v in found) < 0.95:
        side, name, value = max(found, key=lambda f: f[2])
        yield Finding(
            "ok", "leaking_feature",
            f"No feature alone predicts the label; the best is the {side} feature '{name}' (AUC {value:.3f}).",
            {"auc": value},
        )  # fmt: skip


def _rows_read(data: Dataset, side: SideName, part: int) -> npt.NDArray[np.integer]:
    """Return the rows of a side `by_version` that the pairs of a part read."""
    rows: npt.NDArray[np.integer] = data.pairs_of(part).arrays[side]
    return data.input_rows(side, rows, data.part_indices(part))


def encodings(context: DiagnosisContext) -> Iterator[Finding]:
    """Measure the losses of encoders by kind of feature, such as words with equal codes and unknown grams."""
    data, found, fine = context.data, dict[str, list[Finding]](), dict[str, str]()
    for side in SIDES:
        trained = data.reports(side)
        rows = np.flatnonzero(counts(data.test.user if side == "user" else data.test.item, len(data.side(side))))
        tested = data.encoders.reports(side, data.side(side).frame, rows)
        for f in data.schema.side(side):
            if report := trained.get(f.name):
                doubts = report.doubts(f"{side} {f.kind} '{f.name}'", tested[f.name])
                found.setdefault(f.kind, []).extend(Finding("warning", f.kind, d.text, d.evidence) for d in doubts)
                fine[f.kind] = report.fine
    for kind, findings in found.items():
        yield from or_ok(findings, kind, fine[kind])


def _single_feature_score(
    column: Column, rows: npt.NDArray[np.integer], positive: Bools, n: int
) -> npt.NDArray[np.float64] | None:
    """Score every row (n,) by one feature: its number, or the mean positive rate of its values; None for vectors."""
    if not isinstance(column, Ragged):
        if column.ndim == 2:
            return column[:, 0].astype(np.float64) if column.shape[1] == 1 else None
        column = Ragged(column.astype(np.int32, copy=False), np.arange(n + 1))
    values, lengths, owner = column.values, column.lengths, column.owners
    positives, totals = counts(rows, n, positive), counts(rows, n)
    size = int(values.max(initial=0)) + 1
    rate = (np.bincount(values, positives[owner], size) + positive.mean()) / (
        np.bincount(values, totals[owner], size) + 1
    )
    mean: npt.NDArray[np.float64] = np.bincount(owner, rate[values], n) / np.maximum(lengths, 1)
    return np.where(lengths > 0, mean, positive.mean())


def unused_features(context: DiagnosisContext) -> Iterator[Finding]:
    """Find features that do not change the scores of the model."""
    n_features = n_unused = 0
    for side in SIDES:
        effects = _shuffle_effects(context, side)
        if effects is None:
            continue
        for feature in context.data.schema.side(side):
            n_features += 1
            effect = effects[feature.name]
            reason = _why_unused(context, side, feature.name, effect)
            if reason:
                n_unused += 1
                text = f"The {side} feature '{feature.name}' {reason}"
                yield Finding("warning", "unused_feature", text, {"effect": effect})
    if n_features and not n_unused:
        yield Finding("ok", "unused_feature", f"Each of {n_features} features changes the scores.")


def _shuffle_effects(context: DiagnosisContext, side: SideName) -> dict[str, float] | None:
    """Return the permutation importance of each feature (Breiman 2001, section 10); None if all scores are equal.

    It is the root mean square change of the scores of sampled rows, in standard deviations of the scores."""
    data, model = context.data, context.run.model
    rows = context.trained_rows[side]
    others = (
        context.factors.items[context.trained_rows["item"]]
        if side == "user"
        else context.factors.users[context.trained_rows["user"]]
    )
    others = others.double()
    gram = others.T @ others / len(others)
    shuffled = rows[np.random.default_rng(0).permutation(len(rows))]
    tower = model.user_vectors if side == "user" else model.item_vectors
    fields = data.encoders.fields(side)
    inputs, permuted = context.inputs(side, rows, shuffled)
    vectors = tower(inputs).double().cpu()

    def squares(change: Tensor) -> float:
        return float(((change @ gram) * change).sum(1).mean())

    variance = squares(vectors) - float(vectors.mean(0) @ others.mean(0)) ** 2
    # Scores in float32 differ by rounding.
    if len(rows) < 2 or variance <= 1e-9 * max(squares(vectors), 1e-12):
        return None
    changes = {
        f.name: tower(_replace_feature(inputs, permuted, f.name, fields)).double().cpu() - vectors
        for f in data.schema.side(side)
    }
    return {name: math.sqrt(max(0.0, squares(change)) / variance) for name, change in changes.items()}


def _replace_feature(inputs: Inputs, permuted: Inputs, name: str, fields: tuple[InputField, ...]) -> Inputs:
    """Return the inputs with the values of one feature taken from `permuted`."""
    lookups = [f.name for f in stacked(fields)]
    if name in lookups:
        lookup = inputs.lookup.clone()
        lookup[:, lookups.index(name)] = permuted.lookup[:, lookups.index(name)]
        return replace(inputs, lookup=lookup)
    if name in inputs.bags:
        return replace(inputs, bags=inputs.bags | _other_bags(inputs, permuted, name, fields))
    return replace(inputs, dense=inputs.dense | {name: permuted.dense[name]})


def _other_bags(inputs: Inputs, permuted: Inputs, name: str, fields: tuple[InputField, ...]) -> dict[str, CodeLayout]:
    """Return the permuted bags of one feature, and of the features aligned with it, whose bags are as long.

    A feature aligned with a sequence keeps its lengths: each code becomes the next code."""
    field = next(f for f in fields if f.name == name)
    if field.added_to:
        return {name: inputs.bags[name].recoded(lambda codes: (codes + 1) % field.rows, field.rows)}
    return {f.name: permuted.bags[f.name] for f in fields if name in (f.name, f.added_to)}


def _why_unused(context: DiagnosisContext, side: SideName, name: str, effect: float) -> str:
    """Return the reason why a feature has no effect, and the remedy; empty if it has an effect."""
    data, model = context.data, context.run.model
    column = context.sides_at_test[side].columns[name]
    feature = next(f for f in data.schema.side(side) if f.name == name)
    rows = context.trained_rows[side]
    if isinstance(column, Ragged):
        if not column.lengths[rows].any():
            return "is empty in every row. Check its column, or lower its min_count."
    elif (column[rows] == column[rows[0]]).all():
        if column.ndim == 1 and column[rows[0]] == UNKNOWN:
            remedy = f" Lower its {' or '.join(feature.cuts)}, or check" if feature.cuts else " Check"
            return f"is unknown in every row, so it has no effect.{remedy} the column '{feature.source}'."
        return (
            f"has the same value in every row, so it has no effect. Remove it, or check the column '{feature.source}'."
        )
    if effect >= 1e-3 or name in {term.reads for term in context.config.terms}:
        return ""
    readers = _readers(context, side, name)
    towers = [model.towers(side)[n] for n in readers]
    if readers and {*context.config.last_starts} >= {*readers}:
        return ""  # the mix weights its pair, maybe with 0
    if not towers:
        return f"is read by no tower. Add it to model.pairs.0.{side}.fields, or remove it from schema.features."
    norms = [_mean_row_norm(tower.embeddings, name) for tower in towers]
    if max(norms) < 0.01 * context.config.model.embedding_std:
        return (
            f"has embeddings of about zero (mean length {max(norms):.2g}): weight decay removed them. "
            + context.remedy(
                "Lower train.embedding_weight_decay or that tower's weight_decay_scale, or remove the feature."
            )
        )
    return (
        f"has no effect: with its values shuffled the scores change by {effect:.1g} of their deviation. "
        + context.remedy(
            "Remove it, or check the SENet gates of its tower, and lower train.lr if its activations are constant."
        )
    )


def _readers(context: DiagnosisContext, side: SideName, name: str) -> list[int]:
    """Return the numbers of the pairs with a tower that reads a feature."""
    field = next(f for f in context.data.encoders.fields(side) if f.name == name)
    towers = context.run.model.towers(side)
    return [n for n, tower in enumerate(towers) if (field.added_to or name) in tower.field_names]


def _mean_row_norm(embeddings: FieldEmbeddings, name: str) -> float:
    """Return the mean norm of the rows of a field's table; infinity without a table (dense fields)."""
    if any(f.name == name and not carrier(f.kind).has_table for f in embeddings.fields):
        return math.inf
    return float(embeddings.rows_of(name).detach().norm(dim=1).mean())
