"""Diagnosis of the order of the log, for settings that read one."""

from __future__ import annotations

from collections.abc import Iterator

from twotower.diagnostics.context import DiagnosisContext
from twotower.diagnostics.findings import Finding
from twotower.train.preconditions import MIN_PAIRS, OrderReaders, order_problem

MANY_TIES = 0.5
"""Share of adjacent interactions of equal time from which the table decides what a user's last one is."""


def order(context: DiagnosisContext) -> Iterator[Finding]:
    """Check that the order exists that histories and the split read."""
    config, evidence = context.config, context.order
    by_position = not config.split.has_boundaries  # the last rows of a user, whatever their times
    readers = OrderReaders.of(context.data.schema, config, config.split if by_position else None)
    if evidence is None or not readers.readers:
        return
    numbers = {"lift": evidence.lift, "z": evidence.z, "pairs": float(evidence.pairs), "ties": evidence.ties}
    problem = order_problem(evidence)
    if problem and config.train.history_scope == "causal":
        yield Finding(
            "warning", "order",
            f"{readers} an order, and {problem}. A model of order learns less than a mean here: set {readers.way_out}, or name another "
            "column in schema.time.",
            numbers,
        )  # fmt: skip
    elif evidence.ties >= MANY_TIES and evidence.pairs >= MIN_PAIRS:
        yield Finding(
            "warning", "order",
            f"{readers} an order, and {evidence.ties:.0%} of the adjacent interactions of a user have one time: the table decides which is "
            f"the later. Name a finer column in schema.time, or set {readers.way_out}.",
            numbers,
        )  # fmt: skip
    elif not problem and evidence.exists:
        yield Finding("ok", "order", f"The order exists: {evidence}.", numbers)
