"""Diagnostics of a run: findings about training, data and vectors, each with the setting to change.

Input: the history, vectors, tables and samplers of a run; nothing is trained. Severities: *error*, the model cannot or
does not learn, or its metrics are invalid; *warning*, a likely problem; *ok*.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from twotower.diagnostics.diagnosis import (
    MAX_SAMPLE_PAIRS,
    MAX_SAMPLE_ROWS,
    DiagnosisContext,
    Finding,
    describe_findings,
)
from twotower.diagnostics.features import encodings, leaking_features, statistics, unused_features
from twotower.diagnostics.interactions import drift, false_negatives, order, split
from twotower.diagnostics.model import baseline, collapse, history, loss_floor
from twotower.model.two_tower import evaluation_mode
from twotower.runs import Run

__all__ = ["Finding", "describe_findings", "diagnose"]

Diagnosis = Callable[[DiagnosisContext], Iterator[Finding]]
UNCONDITIONAL: tuple[Diagnosis, ...] = (
    history, split, order, drift, statistics, leaking_features, encodings, false_negatives,
)  # fmt: skip
OF_TABLES: tuple[Diagnosis, ...] = (split, order, drift, statistics, leaking_features, encodings)
"""Diagnoses without vectors and samplers."""
FINITE_ONLY: tuple[Diagnosis, ...] = (loss_floor, collapse, baseline, unused_features)
"""Diagnoses that need finite vectors."""


def diagnose(run: Run, max_rows: int = MAX_SAMPLE_ROWS, max_pairs: int = MAX_SAMPLE_PAIRS) -> list[Finding]:
    """Return the findings of all diagnoses of a run, the worst first. A diagnosis without a problem returns an "ok".

    Reads samples: `max_rows` rows of each side, and users with at most `max_pairs` interactions for the samplers. A
    diagnosis that the run does not allow (no test part, a single class) returns nothing. For a model that reads the
    context, only the tables are diagnosed, and a finding says so.
    """
    context = DiagnosisContext(run, max_rows, max_pairs)
    reads_context = bool(run.dataset.schema.side("context"))
    with evaluation_mode(run.model):
        checks = OF_TABLES if reads_context else UNCONDITIONAL
        found = [finding for check in checks for finding in check(context)]
        if reads_context:
            found.append(
                Finding(
                    "warning", "context",
                    "The model reads the context, in which a user has several vectors: only the tables are diagnosed, "
                    "without the features of the context. Train once without these features to diagnose the rest.",
                )
            )  # fmt: skip
        elif context.finite:
            found += [finding for check in FINITE_ONLY for finding in check(context)]
        else:
            found.append(
                Finding(
                    "error", "not_finite",
                    "The vectors of the model are not finite, so the model is unusable. Train again with a lower "
                    "train.lr, or with train.clip_norm = 1.",
                )
            )  # fmt: skip
    severities = ("error", "warning", "ok")
    return sorted(found, key=lambda finding: severities.index(finding.severity))
