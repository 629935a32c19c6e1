"""Diagnosis of what is popular, which changes in some logs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from twotower.data.drift_evidence import drift_evidence
from twotower.data.splits import TRAIN
from twotower.diagnostics.context import DiagnosisContext
from twotower.diagnostics.findings import Finding


def drift(context: DiagnosisContext) -> Iterator[Finding]:
    """Check that a model of rankings reads what is popular now, where it changes."""
    data, config = context.sampled, context.config
    if data.times is None or data.schema.time_unit == "order" or config.loss.pointwise:
        return
    rows = np.flatnonzero((data.parts == TRAIN) & data.pairs.target)
    user, item = (column[rows].astype(np.int64) for column in (data.pairs.user, data.pairs.item))
    evidence = drift_evidence(user, item, data.times[rows])
    if not evidence.exists:
        return
    numbers = {"lift": evidence.lift, "z": evidence.z}
    if config.model.recent_popularity:
        yield Finding("ok", "drift", f"What is popular changes, and the model reads it: {evidence}.", numbers)
        return
    way = "set model.recent_popularity = true, which ranks by the latest rows"
    if not len(data.validation):
        way += ", fitted to a validation part, which split.validation gives"
    yield Finding(
        "warning", "drift", f"What is popular changes: {evidence}. A model knows it by all rows alike: {way}.", numbers
    )
