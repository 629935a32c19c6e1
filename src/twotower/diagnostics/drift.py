"""Diagnosis of what is popular, which changes in some logs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from twotower.data.drift_evidence import begin_apart, drift_evidence
from twotower.data.splits import TRAIN
from twotower.diagnostics.context import DiagnosisContext
from twotower.diagnostics.findings import Finding


def drift(context: DiagnosisContext) -> Iterator[Finding]:
    """Check that a model of rankings reads what is popular now, where it changes."""
    data, config = context.sampled, context.config
    if data.times is None or config.loss.pointwise:
        return
    rows = np.flatnonzero((data.parts == TRAIN) & data.pairs.target)
    user, item = (column[rows].astype(np.int64) for column in (data.pairs.user, data.pairs.item))
    if data.schema.time_unit == "order" and not begin_apart(user, data.times[rows]):
        return
    evidence = drift_evidence(user, item, data.times[rows])
    if not evidence.exists:
        return
    numbers = {"lift": evidence.lift, "z": evidence.z}
    if context.run.follows_popularity:
        yield Finding("ok", "drift", f"What is popular changes, and the model reads it: {evidence}.", numbers)
        return
    if config.model.recent_popularity:
        why = (
            "the training has not ended, and it is fitted after the last epoch"
            if context.run.unfinished
            else "validation gave it the weight 0"
        )
        yield Finding(
            "ok",
            "drift",
            f"What is popular changes: {evidence}. model.recent_popularity adds nothing, as {why}.",
            numbers,
        )
        return
    way = "set model.recent_popularity = true, which ranks by the latest rows, and train anew"
    if not len(data.validation):
        way += ", fitted to a validation part, which split.validation gives"
    if not any(f.identifies for f in data.encoders.fields("item")):
        way += "; it needs a categorical feature of the items over their id, without hash_buckets"
    yield Finding(
        "warning", "drift", f"What is popular changes: {evidence}. A model knows it by all rows alike: {way}.", numbers
    )
