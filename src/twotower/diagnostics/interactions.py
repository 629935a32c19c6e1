"""Diagnoses of interactions: pairs in two parts, order in time, drift of popularity, false negatives."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import combinations

import numpy as np

from twotower.arrays.pieces import pieces
from twotower.arrays.sets import distinct_keys, pair_keys
from twotower.data.evidence import begin_apart, drift_evidence
from twotower.data.split import PART_NAMES
from twotower.data.splits import TRAIN
from twotower.diagnostics.diagnosis import DiagnosisContext, Finding, Severity, or_ok
from twotower.progress import JobProgress
from twotower.scorers.scorer import terms_of
from twotower.train.preconditions import MIN_PAIRS, OrderReaders, order_problem

log = logging.getLogger(__name__)

BLOCK_USERS = 1024
"""Users whose pairs are compared between the parts at a time."""
MANY_TIES = 0.5
"""Least share of adjacent interactions with equal times for a warning."""


def split(context: DiagnosisContext) -> Iterator[Finding]:
    """Check that no pair is in two parts."""
    return or_ok(_shared_pairs(context), "split", "No pair is in two parts.")


def _shared_pairs(context: DiagnosisContext, block: int = BLOCK_USERS) -> Iterator[Finding]:
    data, parts = context.data, range(len(PART_NAMES))
    progress = JobProgress(log, "users whose pairs are compared between the parts", len(data.users))
    n_shared, n_pairs = dict.fromkeys(combinations(parts, 2), 0), [0] * len(parts)
    for part_of_users in pieces(len(data.users), block):
        users = np.arange(part_of_users.start, part_of_users.stop)
        taken = (data.grouped(part).take(users) for part in parts)
        keys = [distinct_keys(pair_keys(pairs.user, pairs.item, len(data.items))) for pairs in taken]
        for part in parts:
            n_pairs[part] += len(keys[part])
        for one, other in n_shared:
            n_shared[one, other] += len(np.intersect1d(keys[one], keys[other], assume_unique=True))
        progress.advance(len(users))
    for (one, other), n in n_shared.items():
        if not n:
            continue
        share = n / n_pairs[other]
        found = f"{n:,} of {n_pairs[other]:,} {PART_NAMES[other]} pairs are in the {PART_NAMES[one]} part too"
        severity, text = _meaning(context, share)
        yield Finding(severity, "shared_pairs", found + text, {"pairs": float(n), "share": share})


def _meaning(context: DiagnosisContext, share: float) -> tuple[Severity, str]:
    """Return the severity of a share of pairs in two parts, and its effect on the metrics."""
    repeats, split = context.config.evaluation.repeats, context.config.split
    if context.data.schema.duplicates != "keep":
        return "error" if share >= 0.01 else "warning", (
            ": their metrics measure memorisation. Remove repeated pairs before the split "
            "(schema.duplicates = 'last' does)."
        )
    if repeats == "exclude":
        return "warning", (
            ", as schema.duplicates = 'keep' allows: rankings leave them out, but metrics of pairs (auc, gauc, "
            "log_loss) measure memorisation on them."
        )
    if split.follows_time:
        return "ok", f": repeats, which rankings count (evaluation.repeats = '{repeats}')."
    return "warning", (
        f", which rankings count (evaluation.repeats = '{repeats}'), and split.kind = '{split.kind}' puts later "
        "repeats into training: the metrics measure how well repeats are recalled, not predicted. Split by time "
        "(split.kind = 'time', 'last' or 'user_ratio')."
    )


def order(context: DiagnosisContext) -> Iterator[Finding]:
    """Check that the log has an order if histories or the split read one."""
    config, evidence = context.config, context.order
    by_position = not config.split.has_boundaries  # the split takes the last rows of a user, whatever their times
    readers = OrderReaders.of(context.data.schema, config, config.split if by_position else None)
    if evidence is None or not readers.readers:
        return
    numbers = {"lift": evidence.lift, "z": evidence.z, "pairs": float(evidence.pairs), "ties": evidence.ties}
    problem = order_problem(evidence)
    if problem and config.train.history_scope == "causal":
        yield Finding(
            "warning", "order",
            f"{readers} an order, and {problem}. A model of order learns less than a mean here: set {readers.way_out}, "
            "or name another column in schema.time.",
            numbers,
        )  # fmt: skip
    elif evidence.ties >= MANY_TIES and evidence.pairs >= MIN_PAIRS:
        yield Finding(
            "warning", "order",
            f"{readers} an order, and {evidence.ties:.0%} of the adjacent interactions of a user have equal times: the "
            f"row order of the table decides. Name a finer column in schema.time, or set {readers.way_out}.",
            numbers,
        )  # fmt: skip
    elif not problem and evidence.exists:
        yield Finding("ok", "order", f"The order exists: {evidence}.", numbers)


def drift(context: DiagnosisContext) -> Iterator[Finding]:
    """Check that a ranking model reads recent popularity if popularity changes over time."""
    data, config = context.sampled, context.config
    if not data.schema.time or config.loss.pointwise:
        return
    rows = np.flatnonzero((data.parts == TRAIN) & data.pairs.target)
    user, item = (column[rows].astype(np.int64) for column in (data.pairs.user, data.pairs.item))
    if data.schema.time_unit == "order" and not begin_apart(user, data.times[rows]):
        return
    evidence = drift_evidence(user, item, data.times[rows])
    if not evidence.exists:
        return
    numbers = {"lift": evidence.lift, "z": evidence.z}
    if context.run.moves:
        yield Finding("ok", "drift", f"Popularity changes over time, and the model reads it: {evidence}.", numbers)
        return
    if any(term.moves for term in terms_of(context.run.model)):
        why = (
            "the training has not ended, and it is fitted after the last epoch"
            if context.run.unfinished
            else "validation gave it the weight 0"
        )
        text = f"Popularity changes over time: {evidence}. The scorer 'trending' adds nothing, as {why}."
        yield Finding("ok", "drift", text, numbers)
        return
    way = "add { kind = 'trending' } to scorers, which ranks by the latest rows, and train again"
    if not len(data.validation):
        way += ", fitted to a validation part, which split.validation gives"
    if not any(f.identifies for f in data.encoders.fields("item")):
        way += "; it needs a categorical feature of the items over their id, without hash_buckets"
    text = f"Popularity changes over time: {evidence}. The model reads all rows alike: {way}."
    yield Finding("warning", "drift", text, numbers)


def false_negatives(context: DiagnosisContext) -> Iterator[Finding]:
    """Check that the positives of a user are no candidates of its other positives, unless the next item is the target.

    With history_scope "causal" they are positives of another moment."""
    config = context.config
    if config.negatives.mask_positives or config.loss.pointwise or config.train.history_scope == "causal":
        return
    yield Finding(
        "warning", "false_negatives",
        "Negatives may be positives of the same user in the training part: the loss lowers their scores. Set "
        "negatives.mask_positives = true.",
    )  # fmt: skip
