"""What single features tell: too much, nothing, or what their gates let through."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import cast

import numpy as np
import numpy.typing as npt
from torch import Tensor

from twotower.data.batches import Inputs
from twotower.data.dataset import Bools
from twotower.diagnostics.context import DiagnosisContext
from twotower.diagnostics.findings import Finding, Severity, or_ok
from twotower.encoders import UNKNOWN, Codes, Column, Ragged
from twotower.evaluation import auc
from twotower.model.embeddings import FieldEmbeddings
from twotower.schema import SIDES, Categorical, Numeric, Sequence, SideName


def statistics(p: DiagnosisContext) -> Iterator[Finding]:
    schema = p.data.schema
    statistics = [f.name for f in schema.features if isinstance(f, Numeric) and f.statistic]
    sequences = [f.name for f in schema.features if isinstance(f, Sequence)]
    if statistics and sequences:
        yield Finding(
            "warning", "statistic_beside_sequence",
            f"The statistic '{statistics[0]}' stands beside the sequence '{sequences[0]}'. It counts the training pair "
            "itself, which the sequence leaves out, so in training the two together tell what they cannot tell later; "
            "on MovieLens 1M this cost 0.005 of AUC. Remove the features with a `statistic` from schema.features.",
            {"statistics": float(len(statistics)), "sequences": float(len(sequences))},
        )  # fmt: skip


def leaking_features(p: DiagnosisContext) -> Iterator[Finding]:
    """Features that by themselves tell the label of test pairs: likely made from it."""
    data = p.data
    test = data.test
    if test.positive.all() or not test.positive.any():
        return
    found: list[tuple[SideName, str, float]] = []
    for side in SIDES:
        rows, train_rows = (pairs.user if side == "user" else pairs.item for pairs in (test, data.train))
        for feature in data.schema.side(side):
            if isinstance(feature, Sequence) or feature.source == data.schema.id_column(side):
                continue
            column = data.side(side).columns[feature.name]
            score = _single_feature_score(column, train_rows, data.train.positive, len(data.side(side)))
            if score is not None:
                value = auc(score[rows], test.positive)
                found.append((side, feature.name, max(value, 1 - value)))
    for side, name, value in found:
        if value >= 0.95:
            yield Finding(
                "error", "leaking_feature",
                f"The {side} feature '{name}' alone tells liked from not liked in the test part (AUC {value:.3f}): "
                "most likely it was made from the outcome. If it is not known before the user decides, remove it from "
                "schema.features.",
                {"auc": value},
            )  # fmt: skip
    if found and max(v for _, _, v in found) < 0.95:
        side, name, value = max(found, key=lambda f: f[2])
        yield Finding(
            "ok", "leaking_feature",
            f"No feature tells the label by itself; the {side} feature '{name}' tells most (AUC {value:.3f}).",
            {"auc": value},
        )  # fmt: skip


def texts(p: DiagnosisContext) -> Iterator[Finding]:
    """What letter n-grams lose: words that become one, and grams the model has never met."""
    found = []
    names = [(side, name, grams) for side in SIDES for name, grams in p.data.texts(side).items()]
    for side, name, trained in names:
        test = p.data.test.user if side == "user" else p.data.test.item
        known = p.data.encoders.text(side, name)
        column = next(f.source for f in p.data.schema.texts(side) if f.name == name)
        asked = known.report(p.data.side(side).frame[column][np.unique(test)])
        merged = trained.code_collisions / max(1, trained.words)
        unknown = asked.unknown / max(1, asked.occurrences)
        evidence = {"words": float(trained.words), "merged": merged, "unknown": unknown}
        if merged >= 0.01:
            found.append(
                Finding(
                    "warning", "text",
                    f"{merged:.1%} of the {trained.words:,} words of the {side} text '{name}' have the codes of another "
                    f"word ({trained.collisions:,} have its very grams): the tower cannot tell them apart. Raise its "
                    "max_grams, hash_buckets or n, or lower its min_count.",
                    evidence,
                )
            )  # fmt: skip
        if unknown >= 0.1:
            found.append(
                Finding(
                    "warning", "text",
                    f"{unknown:.1%} of the grams of the {side} text '{name}' are unknown in the rows that test, "
                    "and all of them read one row. Raise its max_grams, lower its min_count or n, or set hash_buckets.",
                    evidence,
                )
            )  # fmt: skip
    well = "The texts' words keep codes of their own, and few of the grams that test asks for are unknown."
    return or_ok(found, "text", well) if names else iter(())


def _single_feature_score(
    column: Column, rows: npt.NDArray[np.integer], positive: Bools, n: int
) -> npt.NDArray[np.float64] | None:
    """(n,) score of every row by one feature alone: its number, or how often its values are liked; None for vectors."""
    if not isinstance(column, Ragged):
        if column.ndim == 2:
            return column[:, 0].astype(np.float64) if column.shape[1] == 1 else None
        column = Ragged(cast(Codes, column), np.arange(n + 1))
    values, lengths = column.values, column.lengths
    liked, shown = (np.bincount(r, minlength=n) for r in (rows[positive], rows))
    owner = np.repeat(np.arange(n), lengths)
    size = int(values.max(initial=0)) + 1
    rate = (np.bincount(values, liked[owner], size) + positive.mean()) / (np.bincount(values, shown[owner], size) + 1)
    mean: npt.NDArray[np.float64] = np.bincount(owner, rate[values], n) / np.maximum(lengths, 1)
    return np.where(lengths > 0, mean, positive.mean())


def unused_features(p: DiagnosisContext) -> Iterator[Finding]:
    n = dead = 0
    for side in SIDES:
        effects = _shuffle_effects(p, side)
        if effects is None:
            continue
        for feature in p.data.schema.side(side):
            n += 1
            effect = effects[feature.name]
            why = _why_unused(p, side, feature.name, effect)
            if why:
                dead += 1
                yield Finding(
                    "warning", "unused_feature", f"The {side} feature '{feature.name}' {why}", {"effect": effect}
                )
    if n and not dead:
        yield Finding("ok", "unused_feature", f"Each of {n} features changes the scores.")


def _shuffle_effects(p: DiagnosisContext, side: SideName) -> dict[str, float] | None:
    """How much the scores of sampled rows change when one feature's values change places among them: the root mean
    square of the change, over the deviation of the scores. None if all scores are the same."""
    data, model = p.data, p.run.model
    rows = p.met[side]
    others = p.factors.items[p.met["item"]] if side == "user" else p.factors.users[p.met["user"]]
    others = others.double()
    gram = others.T @ others / len(others)
    shuffled = rows[np.random.default_rng(0).permutation(len(rows))]
    tower = model.user_vectors if side == "user" else model.item_vectors
    lookups = [f.name for f in data.encoders.fields(side) if f.kind == "lookup"]
    inputs, moved = p.inputs(side, rows, shuffled)
    vectors = tower(inputs).double().cpu()

    def squares(change: Tensor) -> float:
        return float(((change @ gram) * change).sum(1).mean())

    variance = squares(vectors) - float(vectors.mean(0) @ others.mean(0)) ** 2
    # Rounding alone makes scores in float32 differ.
    if len(rows) < 2 or variance <= 1e-9 * max(squares(vectors), 1e-12):
        return None
    changes = {
        f.name: tower(_replace_feature(inputs, moved, f.name, lookups)).double().cpu() - vectors
        for f in data.schema.side(side)
    }
    return {name: math.sqrt(max(0.0, squares(change)) / variance) for name, change in changes.items()}


def _replace_feature(inputs: Inputs, moved: Inputs, name: str, lookups: list[str]) -> Inputs:
    """The inputs with one feature's values taken from `moved`."""
    if name in lookups:
        lookup = inputs.lookup.clone()
        lookup[:, lookups.index(name)] = moved.lookup[:, lookups.index(name)]
        return replace(inputs, lookup=lookup)
    if name in inputs.bags:
        return replace(inputs, bags=inputs.bags | {name: moved.bags[name]})
    return replace(inputs, dense=inputs.dense | {name: moved.dense[name]})


def _why_unused(p: DiagnosisContext, side: SideName, name: str, effect: float) -> str:
    """Why a feature cannot matter and what to do; empty if it does matter."""
    data, model = p.data, p.run.model
    column = p.known[side].columns[name]
    feature = next(f for f in data.schema.side(side) if f.name == name)
    rows = p.met[side]
    if isinstance(column, Ragged):
        if not column.lengths[rows].any():
            return "is empty in every row. Check its column, or lower its min_count."
    elif (column[rows] == column[rows[0]]).all():
        if column.ndim == 1 and column[rows[0]] == UNKNOWN:
            least = " Lower its min_count or min_rate, or check" if isinstance(feature, Categorical) else " Check"
            return f"is unknown in every row: it tells nothing.{least} the column '{feature.source}'."
        return f"has the same value in every row: it tells nothing. Remove it, or check the column '{feature.source}'."
    if effect >= 1e-3:
        return ""
    towers = [pair for pair in model.towers(side) if name in pair[0].field_names]
    if not towers:
        return f"is read by no tower. Add it to model.pairs.0.{side}.fields, or remove it from schema.features."
    norms = [_mean_row_norm(t.embeddings, other.embeddings, name) for t, other in towers]
    if max(norms) < 0.01 * p.config.model.embedding_std:
        return (
            f"has embeddings of about zero (mean length {max(norms):.2g}): they were decayed away. Lower "
            "train.embedding_weight_decay or that tower's weight_decay_scale, or remove the feature."
        )
    return (
        f"has no effect: with its values shuffled the scores change by {effect:.1g} of their deviation. Remove it, or "
        "see whether a SENet gate is shut or its activations are dead (a smaller train.lr)."
    )


def _mean_row_norm(embeddings: FieldEmbeddings, other: FieldEmbeddings, name: str) -> float:
    """Mean length of the rows of the field's table; infinite for numbers, which have none."""
    f = next(f for f in embeddings.fields if f.name == name)
    if f.kind == "dense":
        return math.inf
    table = other.rows_of(f.share_with) if f.share_with else embeddings.rows_of(name)
    return float(table.detach().norm(dim=1).mean())


def gates(p: DiagnosisContext) -> Iterator[Finding]:
    found: list[Finding] = []
    any_gate = False
    for side in SIDES:
        (inputs,) = p.inputs(side, p.met[side])
        for number, (tower, other) in enumerate(p.run.model.towers(side)):
            for section, passed in tower.gates(inputs, other.embeddings).items():
                any_gate = True
                where = f"model.pairs.{number}.{side}.{section}".removesuffix(".senet")
                found += _gate_findings(passed.cpu(), tower.field_names, where)
    well = "The SENet gates are neither all open nor all shut, and differ from row to row."
    return or_ok(found, "gates", well) if any_gate else iter(())


def _gate_findings(gates: Tensor, names: list[str], where: str) -> Iterator[Finding]:
    """`gates` (U, F)"""
    mean, deviation = gates.mean(0), gates.std(0, correction=0)
    evidence = {"lowest": float(mean.min()), "highest": float(mean.max()), "deviation": float(deviation.max())}
    severity: Severity = "warning"
    if evidence["highest"] < 0.01:
        severity = "error"
        text = (
            f"All SENet gates of {where} are shut (the widest passes {evidence['highest']:.2g}): the tower sees next "
            f"to nothing. Lower train.lr, or set {where}.senet.enabled = false."
        )
    elif evidence["lowest"] > 0.99:
        text = (
            f"All SENet gates of {where} are open (the narrowest passes {evidence['lowest']:.3f}): they do nothing. "
            f"Set {where}.senet.enabled = false, or lower train.lr."
        )
    elif evidence["deviation"] < 1e-3:
        text = (
            f"The SENet gates of {where} are the same in every row: they weigh fields, but no row by what it holds. "
            f"Widen their middle layer by {where}.senet.reduction = 1 (its units may all be off), or set "
            f"{where}.senet.enabled = false."
        )
    elif shut := [n for n, m in zip(names, mean.tolist(), strict=True) if m < 0.01]:
        text = f"The SENet gates of {where} shut out {', '.join(shut)}. If these should matter, lower train.lr."
    else:
        return
    yield Finding(severity, "gates", text, evidence)
