"""Why a model does not learn, in plain words: what was found, and the setting to change.

Everything is computed from a run: its history, its vectors, its tables, and what its samplers would draw. Nothing is
trained. *ill*: the model cannot or does not learn, or its numbers cannot be trusted. *warning*: worth a look.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from twotower.diagnostics.context import DiagnosisContext
from twotower.diagnostics.curves import history, loss_floor
from twotower.diagnostics.features import gates, leaking_features, statistics, texts, unused_features
from twotower.diagnostics.findings import Finding, describe_findings
from twotower.diagnostics.pairs import false_negatives, split
from twotower.diagnostics.vectors import baselines, collapse
from twotower.evaluation import evaluation_mode
from twotower.runs import Run

__all__ = ["Finding", "describe_findings", "diagnose"]

Diagnosis = Callable[[DiagnosisContext], Iterator[Finding]]
ALWAYS: tuple[Diagnosis, ...] = (history, split, statistics, leaking_features, texts, false_negatives)
FINITE_ONLY: tuple[Diagnosis, ...] = (loss_floor, collapse, baselines, unused_features, gates)
"""Those that need vectors of finite numbers."""


def diagnose(run: Run) -> list[Finding]:
    """Every diagnosis of a run, the worst first; one that finds nothing says so as "ok".

    Test users and rows of a side are sampled, at most `patient.SAMPLE` of each. Raises nothing of its own: what cannot
    be measured on this run (no test part, one class only) is left out.
    """
    p = DiagnosisContext(run)
    with evaluation_mode(run.model):
        found = [finding for check in ALWAYS for finding in check(p)]
        if p.finite:
            found += [finding for check in FINITE_ONLY for finding in check(p)]
        else:
            found.append(
                Finding(
                    "error", "not_finite",
                    "The model gives vectors that are not finite numbers, so nothing of it can be used. Train again "
                    "with a lower train.lr, or with train.clip_norm = 1.",
                )
            )  # fmt: skip
    order = ("error", "warning", "ok")
    return sorted(found, key=lambda finding: order.index(finding.severity))
