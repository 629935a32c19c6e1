"""The pairs a model is taught and asked: pairs of two parts, parts out of order, negatives that are liked."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from twotower.data.dataset import Bools, Dataset
from twotower.data.splits import PART_NAMES, TEST, TRAIN
from twotower.diagnostics.context import DiagnosisContext
from twotower.diagnostics.findings import Finding, or_ok
from twotower.encoders import Ints


def split(p: DiagnosisContext) -> Iterator[Finding]:
    well = "No pair is in two parts" + (", and the parts follow in time." if p.data.time_ordered else ".")
    return or_ok([*_shared_pairs(p), *_split_order(p)], "split", well)


def _shared_pairs(p: DiagnosisContext) -> Iterator[Finding]:
    data = p.data
    keys = [_pair_keys(data, data.parts == part) for part in range(len(PART_NAMES))]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        n = len(np.intersect1d(keys[one], keys[other], assume_unique=True))
        if not n:
            continue
        share = n / len(keys[other])
        yield Finding(
            "error" if share >= 0.01 else "warning", "shared_pairs",
            f"{n:,} of {len(keys[other]):,} {PART_NAMES[other]} pairs are in the {PART_NAMES[one]} part too: the model is asked "
            "what it was told. Remove repeated pairs before the split (schema.duplicates = 'last' does).",
            {"pairs": float(n), "share": share},
        )  # fmt: skip


def _split_order(p: DiagnosisContext) -> Iterator[Finding]:
    data, kind = p.data, p.config.split.kind
    if kind == "random" or data.times is None:
        return
    train, test = data.parts == TRAIN, data.parts == TEST
    if not train.any() or not test.any():
        return
    latest = np.full(len(data.users), np.iinfo(np.int64).min)
    if kind == "last":
        np.maximum.at(latest, data.pairs.user[train], data.times[train])
    else:
        latest[:] = data.times[train].max()
    older = data.times[test] < latest[data.pairs.user[test]]
    if older.any():
        whose = "a training pair of its user" if kind == "last" else "the latest training pair"
        yield Finding(
            "error", "split_order",
            f"split.kind = '{kind}', but {older.mean():.1%} of the test pairs are older than {whose}: the model has "
            "seen the future. Check the column schema.time and its schema.time_unit, and split again.",
            {"share": float(older.mean())},
        )  # fmt: skip


def false_negatives(p: DiagnosisContext) -> Iterator[Finding]:
    data, n = p.data, p.config.negatives
    held = _pair_keys(data, (data.parts != TRAIN) & data.pairs.positive)
    liked = _pair_keys(data, (data.parts == TRAIN) & data.pairs.positive)
    if p.config.loss.kind == "bce":
        drawn = p.epoch.source < 0
        if not drawn.any():
            return
        keys = _pair_key(p.epoch.user[drawn], p.epoch.item[drawn], len(data.items))
        unmasked, later = float(_in_sorted(keys, liked).mean()), float(_in_sorted(keys, held).mean())
        fewer = "Lower negatives.random or negatives.random_share."
    else:
        unmasked, later = _false_candidates(p, liked, held)
        named = [f"negatives.{s}" for s in (*n.drawn(), *["random"] * bool(n.random))] or [
            "negatives.in_batch or train.batch_size"
        ]
        fewer = (
            f"Draw fewer or others: {', '.join(named)}; negatives.disliked draws items the user is known not to like."
        )
    evidence = {"train_positives": unmasked, "later_positives": later}
    if unmasked >= 0.01:
        yield Finding(
            "error" if unmasked >= 0.1 else "warning", "false_negatives",
            f"{unmasked:.1%} of the sampled negatives are positives of the same user in the training part: the loss "
            "pushes apart what it should pull together. Set negatives.mask_positives = true.",
            evidence,
        )  # fmt: skip
    if later >= 0.05:
        yield Finding(
            "error" if later >= 0.3 else "warning", "false_negatives",
            f"{later:.1%} of the sampled negatives are positives of the same user in validation or test. No mask can "
            f"know them; so many make the model avoid the right answers. {fewer}",
            evidence,
        )  # fmt: skip
    if unmasked < 0.01 and later < 0.05:
        yield Finding(
            "ok", "false_negatives",
            f"Of the sampled negatives {unmasked:.2%} are training positives of the user and {later:.2%} later ones.",
            evidence,
        )  # fmt: skip


def _false_candidates(p: DiagnosisContext, liked: Ints, held: Ints) -> tuple[float, float]:
    """Shares of the candidates a batch is set against that the user likes in the training part, and later."""
    pairs, drawn = p.batch
    n_items = len(p.data.items)
    logits = torch.zeros(len(pairs), len(drawn.log_q))
    drawn.mask_excluded(logits, slice(None))
    logits.scatter_(1, drawn.positive[:, None], -torch.inf)
    weight = np.where(torch.isfinite(logits).numpy(), drawn.counts.numpy(), 0.0)
    columns = np.concatenate([drawn.items[: drawn.shared], drawn.memory_items.numpy()])
    own = drawn.per_positive.numpy()
    item = np.concatenate([np.broadcast_to(columns, weight.shape), drawn.items[np.maximum(own, 0)]], 1)
    weight = np.concatenate([weight, own >= 0], 1)
    keys = pairs.user[:, None].astype(np.int64) * n_items + item
    total = max(float(weight.sum()), 1e-12)
    found = [float((weight * _in_sorted(keys.ravel(), k).reshape(keys.shape)).sum()) / total for k in (liked, held)]
    return found[0], found[1]


def _pair_key(user: npt.NDArray[np.integer], item: npt.NDArray[np.integer], n_items: int) -> Ints:
    keys: Ints = user.astype(np.int64) * n_items + item
    return keys


def _pair_keys(data: Dataset, keep: Bools) -> Ints:
    """Sorted distinct numbers of the pairs to keep."""
    return np.unique(_pair_key(data.pairs.user[keep], data.pairs.item[keep], len(data.items)))


def _in_sorted(keys: Ints, within: Ints) -> Bools:
    """Which of `keys` are in the sorted array `within`."""
    if not len(within):
        return np.zeros(len(keys), bool)
    found: Bools = within[np.minimum(np.searchsorted(within, keys), len(within) - 1)] == keys
    return found
