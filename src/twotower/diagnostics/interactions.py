"""Diagnoses of interactions: pairs in two parts, order in time, drift of popularity, false negatives."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import combinations

import numpy as np
import torch

from twotower.arrays.pieces import pieces
from twotower.arrays.sets import distinct_keys, is_in_sorted, pair_keys
from twotower.arrays.types import Bools, Ints
from twotower.data.dataset import Dataset
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
    """Measure the shares of sampled negatives that are positives of the same user: in training, and only later.

    With history_scope "causal" and no mask, negatives of a moment may be positives of another moment."""
    data, n = context.sampled, context.config.negatives
    later_positives = _distinct_keys(data, (data.parts != TRAIN) & data.pairs.target)
    train_positives = _distinct_keys(data, (data.parts == TRAIN) & data.pairs.target)
    later_positives = np.setdiff1d(later_positives, train_positives, assume_unique=True)  # repeats are in training
    if context.config.loss.pointwise:
        drawn = context.epoch.all.source < 0
        if not drawn.any():
            return
        keys = pair_keys(context.epoch.all.user[drawn], context.epoch.all.item[drawn], len(data.items))
        unmasked, later = (
            float(is_in_sorted(train_positives, keys).mean()),
            float(is_in_sorted(later_positives, keys).mean()),
        )
        options = [f"negatives.{s.kind}.{key}" for s in n.pairs for key in ("n", "share")]
        remedy = context.remedy(f"Lower {' or '.join(options)}.")
    else:
        unmasked, later = _false_candidates(context, train_positives, later_positives)
        options = [f"negatives.{s.kind}" for s in n.sources if s.draws] or ["train.batch_size"]
        remedy = context.remedy(
            f"Draw fewer or others: {', '.join(options)}; negatives.disliked draws items that the user is known to "
            "dislike."
        )
    evidence = {"train_positives": unmasked, "later_positives": later}
    if context.config.train.history_scope == "causal" and not n.mask_positives:
        yield Finding(
            "ok", "false_negatives",
            f"{unmasked:.1%} of the sampled negatives are positives of the same user at other moments of training, "
            f"{later:.1%} only later: with train.history_scope = 'causal' the target is the item that comes next, and "
            "with negatives.mask_positives = false the user's other positives are negatives.",
            evidence,
        )  # fmt: skip
        return
    if unmasked >= 0.01:
        yield Finding(
            "error" if unmasked >= 0.1 else "warning", "false_negatives",
            f"{unmasked:.1%} of the sampled negatives are positives of the same user in the training part: the loss "
            "lowers the scores of positives. Set negatives.mask_positives = true.",
            evidence,
        )  # fmt: skip
    if later >= 0.05:
        yield Finding(
            "error" if later >= 0.3 else "warning", "false_negatives",
            f"{later:.1%} of the sampled negatives are positives of the same user in validation or test. No mask can "
            f"exclude them, and they lower the scores of the targets. {remedy}",
            evidence,
        )  # fmt: skip
    if unmasked < 0.01 and later < 0.05:
        yield Finding(
            "ok", "false_negatives",
            f"{unmasked:.2%} of the sampled negatives are training positives of the user, {later:.2%} later positives.",
            evidence,
        )  # fmt: skip


def _false_candidates(context: DiagnosisContext, train_positives: Ints, later_positives: Ints) -> tuple[float, float]:
    """Return the shares of a batch's candidates that are positives of the user in training, and later."""
    pairs, drawn = context.batch
    logits = torch.zeros(len(pairs), len(drawn.log_q))
    drawn.mask_excluded(logits, slice(None))
    logits.scatter_(1, drawn.positive[:, None], -torch.inf)
    weight = np.where(torch.isfinite(logits).numpy(), drawn.counts.numpy(), 0.0)
    columns = np.concatenate([drawn.items[: drawn.shared], drawn.memory_items.numpy()])
    own = drawn.per_positive.numpy()
    item = np.concatenate([np.broadcast_to(columns, weight.shape), drawn.items[np.maximum(own, 0)]], 1)
    weight = np.concatenate([weight, own >= 0], 1)
    keys = pair_keys(pairs.user[:, None], item, len(context.data.items))
    total = max(float(weight.sum()), 1e-12)
    in_train, later = (
        float((weight * is_in_sorted(positives, keys)).sum()) / total
        for positives in (train_positives, later_positives)
    )
    return in_train, later


def _distinct_keys(data: Dataset, keep: Bools) -> Ints:
    """Return the distinct keys of some pairs, rising."""
    return distinct_keys(pair_keys(data.pairs.user[keep], data.pairs.item[keep], len(data.items)))
