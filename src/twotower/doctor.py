"""Why a model does not learn, in plain words: what was found, and the setting to change.

Everything is computed from a run: its history, its vectors, its tables, and what its samplers would draw. Nothing is
trained. *ill*: the model cannot or does not learn, or its numbers cannot be trusted. *warning*: worth a look.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from twotower.compare import Comparison, Questions, differences, questions_of
from twotower.config import Config
from twotower.data.batches import Inputs, SideTensors
from twotower.data.dataset import Bools, Dataset, Pairs, Side
from twotower.data.splits import NAMES, TEST, TRAIN
from twotower.encoders import UNKNOWN, Column, Ints, Ragged
from twotower.evaluation import Factors, auc, biases, popularity
from twotower.model.embeddings import FieldEmbeddings
from twotower.run import Run
from twotower.schema import SIDES, Categorical, Numeric, Sequence, SideName
from twotower.train.candidates import Candidates, CandidateSampler
from twotower.train.losses import contest
from twotower.train.negatives import Epoch, Positives, Sampler

Severity = Literal["ill", "warning", "fine"]
SAMPLE = 2_000
"""Rows of a side, and test users, that are looked at."""
_ROWS = 256  # positives of a batch whose candidates are looked at one by one
_CELLS = 2**22  # (positive, candidate) cells that are looked at


@dataclass(frozen=True)
class Finding:
    """One diagnosis. `text` says what was found and what to do; `evidence` holds the numbers behind it."""

    severity: Severity
    name: str
    text: str
    evidence: dict[str, float] = field(default_factory=dict)


def examine(run: Run) -> list[Finding]:
    """Every diagnosis of a run, the worst first; one that finds nothing says so as "fine".

    Test users and rows of a side are sampled, at most SAMPLE of each. Raises nothing of its own: what cannot be
    measured on this run (no test part, one class only) is left out.
    """
    was_training = run.model.training
    run.model.eval()
    try:
        return _examine(_Patient(run))
    finally:
        run.model.train(was_training)


def _examine(p: _Patient) -> list[Finding]:
    checks: list[Callable[[_Patient], Iterator[Finding]]] = [
        _history, _split, _statistics, _telling_features, _false_negatives
    ]  # fmt: skip
    if p.finite:
        checks += [_loss_floor, _collapse, _baselines, _dead_features, _gates]
    found = [finding for check in checks for finding in check(p)]
    if not p.finite:
        found.append(
            Finding(
                "ill", "not_finite",
                "The model gives vectors that are not finite numbers, so nothing of it can be used. Train again with a "
                "lower train.lr, or with train.clip_norm = 1.",
            )
        )  # fmt: skip
    order = ("ill", "warning", "fine")
    return sorted(found, key=lambda finding: order.index(finding.severity))


def describe(findings: list[Finding]) -> Iterator[str]:
    """Printable lines: a finding and the numbers behind it, then the count of each severity."""
    for f in findings:
        yield f"{f.severity:<8} {f.name}: {f.text}"
        if f.evidence and f.severity != "fine":
            yield f"{'':<9}({', '.join(f'{k} {v:.4g}' for k, v in f.evidence.items())})"
    n = {s: sum(f.severity == s for f in findings) for s in ("ill", "warning", "fine")}
    yield f"{n['ill']} ill, {n['warning']} warning{'s' * (n['warning'] != 1)}, {n['fine']} fine"


@dataclass(frozen=True)
class _Patient:
    """A run, and what several diagnoses need of it."""

    run: Run

    @property
    def data(self) -> Dataset:
        return self.run.dataset

    @property
    def config(self) -> Config:
        return self.run.config

    @cached_property
    def factors(self) -> Factors:
        """Vectors of all rows, as known when the test part is asked."""
        known = self.run.factors(TEST)
        return Factors(known.users.cpu(), known.items.cpu())

    @cached_property
    def finite(self) -> bool:
        return bool(torch.isfinite(self.factors.users).all()) and bool(torch.isfinite(self.factors.items).all())

    @cached_property
    def met(self) -> dict[SideName, Ints]:
        """At most SAMPLE rows of each side that have training interactions, rising."""
        train = self.data.train
        return {"user": _sample(np.unique(train.user)), "item": _sample(np.unique(train.item))}

    @cached_property
    def known(self) -> dict[SideName, Side]:
        """Each side as known when the test part is asked."""
        return {side: self.data.side_before(side, TEST) for side in SIDES}

    def inputs(self, side: SideName, *rows: Ints) -> list[Inputs]:
        """What the towers read of some rows, once for each of `rows`."""
        device = next(self.run.model.parameters()).device
        tensors = SideTensors(self.known[side], self.data.encoders.fields(side), device)
        return [tensors.take(r) for r in rows]

    @cached_property
    def epoch(self) -> Epoch:
        """The pairs of the first epoch of the loss 'bce'."""
        train = self.config.train
        return Sampler(self.data, self.config.negatives, train.seed, train.shuffle).epoch(0)

    @cached_property
    def batch(self) -> tuple[Pairs, Candidates]:
        """A few positives of a batch and the candidates the whole batch is set against."""
        config = self.config
        by_user = config.train.histories == "earlier"
        epoch = Positives(self.data, config.train.seed, config.train.shuffle, by_user).epoch(0)
        size = config.train.batch_size
        user, item = epoch.user[:size], epoch.item[:size]
        sampler = CandidateSampler(self.data, config.negatives, config.train.seed)
        if config.negatives.hard and self.finite:
            sampler.mine(self.factors.users, self.factors.items, 1)
        memory = torch.from_numpy(epoch.item[size : size + config.negatives.memory].astype(np.int64))
        drawn = sampler(user, item, 0, memory, torch.device("cpu"))
        columns = max(1, len(drawn.log_q) + drawn.own.shape[1])
        rows = _sample(np.arange(len(user)), max(1, min(_ROWS, _CELLS // columns)))
        few = torch.from_numpy(rows)
        drawn = replace(
            drawn, positive=drawn.positive[few], own=drawn.own[few],
            group=None if drawn.group is None else drawn.group[few],
        )  # fmt: skip
        return Pairs(user[rows], item[rows], np.ones(len(rows), bool)), drawn

    @property
    def temperature(self) -> float:
        return float(self.run.model.temperature.detach())

    def contest(self, cosine: float) -> float:
        """The loss of the batch if each positive had the logit `cosine` / T and every other candidate the opposite."""
        pairs, drawn = self.batch
        distinct, which = np.unique(pairs.item, return_inverse=True)
        # A positive's column is told from all others by its own direction; the last direction is common to all.
        items = torch.zeros(len(drawn.items) + len(drawn.memory), len(distinct) + 1)
        items[:, -1] = 1
        rows = np.concatenate([drawn.items, drawn.memory.numpy()])
        at = np.minimum(np.searchsorted(distinct, rows), len(distinct) - 1)
        same = distinct[at] == rows
        items[torch.from_numpy(np.flatnonzero(same)), torch.from_numpy(at[same])] = 1
        users = torch.zeros(len(pairs), len(distinct) + 1)
        users[torch.arange(len(pairs)), torch.from_numpy(which)] = 2
        users[:, -1] = -1
        users *= cosine / self.temperature if cosine else 0.0
        return float(contest(users, items, drawn, self.config.loss, len(self.data.items)))

    @cached_property
    def ignorance(self) -> float:
        """The loss of a model that gives every pair the same answer."""
        if self.config.loss.kind != "bce":
            return self.contest(0.0)
        p = float(np.average(self.epoch.label, weights=self.epoch.weight))
        return -p * math.log(p) - (1 - p) * math.log(1 - p) if 0 < p < 1 else 0.0

    @cached_property
    def losses(self) -> list[float]:
        """Mean training loss of every epoch whose opponents are those of the last: a memory fills up and mining starts
        in the first."""
        found = [float(h["train.loss"]) for h in self.run.history if "train.loss" in h]
        changes = self.config.loss.kind != "bce" and bool(self.config.negatives.memory or self.config.negatives.hard)
        return found[1:] if changes else found

    @cached_property
    def monitored(self) -> list[tuple[int, float]]:
        """(epoch, value) of the metric that chooses the best epoch."""
        monitor = self.config.train.monitor
        return [(int(h["epoch"]), float(h[monitor])) for h in self.run.history if monitor in h and "epoch" in h]


def _sample(rows: Ints, n: int = 0) -> Ints:
    """At most `n` of the rows (0: SAMPLE), in their order; the same every time."""
    n = n or SAMPLE
    if len(rows) <= n:
        return rows
    return np.sort(np.random.default_rng(0).choice(rows, n, replace=False))


# ---- the history -------------------------------------------------------------------------------------------------


def _history(p: _Patient) -> Iterator[Finding]:
    train = p.config.train
    values = [float(v) for h in p.run.history for k, v in h.items() if k == "train.loss" or k.startswith("validation.")]
    if not all(math.isfinite(v) for v in values):
        yield Finding(
            "ill", "history",
            "The history holds values that are not finite: training broke down. Lower train.lr, or set "
            "train.clip_norm = 1.",
        )  # fmt: skip
        return
    sick = [*_train_loss(p), *_validation_curve(p)]
    yield from sick
    if not sick and p.run.history:
        yield Finding("fine", "history", f"The training loss and {train.monitor} go as they should.")


def _train_loss(p: _Patient) -> Iterator[Finding]:
    losses = p.losses
    if len(losses) < 2:
        return
    evidence = {"first": losses[0], "last": losses[-1], "constant_answer": p.ignorance}
    if losses[-1] > 1.02 * losses[0]:
        yield Finding(
            "ill", "loss_rises",
            f"The training loss rises, from {losses[0]:.4f} to {losses[-1]:.4f}. The steps are too large: lower "
            "train.lr, set train.warmup_steps, or train.clip_norm = 1.",
            evidence,
        )  # fmt: skip
    elif min(losses) > 0.999 * losses[0]:
        # A flat curve is fine where the first epoch has taught everything.
        nothing = losses[-1] > 0.98 * p.ignorance
        yield Finding(
            "ill" if nothing else "warning", "loss_flat",
            f"The training loss does not fall: {losses[0]:.4f} after the first epoch, {losses[-1]:.4f} after the last"
            + (
                f", and one answer for every pair would give {p.ignorance:.4f}. The model learns nothing: raise "
                "train.lr, and look at the other findings for the cause."
                if nothing
                else ". If validation does not rise either, raise train.lr or the width of model.branches."
            ),
            evidence,
        )  # fmt: skip


def _validation_curve(p: _Patient) -> Iterator[Finding]:
    curve, train = p.monitored, p.config.train
    if len(curve) < 2:
        return
    sign = -1 if train.monitor.endswith("log_loss") else 1
    value = [sign * v for _, v in curve]
    best = int(np.argmax(value))
    spread = max(value) - min(value)
    evidence = {"best_epoch": float(curve[best][0]), "best": curve[best][1], "last": curve[-1][1]}
    if best == len(curve) - 1 and value[-1] - value[-2] > max(0.05 * spread, 1e-3 * abs(value[-1])):
        yield Finding(
            "warning", "still_rising",
            f"{train.monitor} is best after the last epoch and still improves ({curve[-2][1]:.4f}, then "
            f"{curve[-1][1]:.4f}). Train longer: raise train.epochs (now {train.epochs}).",
            evidence,
        )  # fmt: skip
    elif best == 0 and len(curve) >= 3 and value[0] - value[-1] > 1e-3 * abs(value[0]):
        yield Finding(
            "warning", "peaks_at_once",
            f"{train.monitor} is best at its first measure (epoch {curve[0][0]}) and never improves. The model fits "
            "the training pairs by heart or steps too far: lower train.lr, or raise train.embedding_weight_decay or a "
            "branch's dropout.",
            evidence,
        )  # fmt: skip


# ---- what the loss can reach -------------------------------------------------------------------------------------


def _loss_floor(p: _Patient) -> Iterator[Finding]:
    model, kind = p.config.model, p.config.loss.kind
    if model.similarity != "cosine" or model.bias or not p.losses:
        return
    temperature = p.temperature
    floor = math.log1p(math.exp(-1 / temperature)) if kind == "bce" else p.contest(1.0)
    loss = p.losses[-1]
    evidence = {"floor": floor, "loss": loss, "temperature": temperature, "constant_answer": p.ignorance}
    share = floor / max(loss, 1e-12)
    # A floor that is next to nothing of what there was to learn stands in nobody's way.
    if floor < 0.05 * p.ignorance or share < 0.25:
        yield Finding(
            "fine", "loss_floor", f"Temperature {temperature:.3g} lets the loss fall to {floor:.2g}.", evidence
        )
        return
    yield Finding(
        "ill" if share >= 0.5 else "warning", "loss_floor",
        f"A cosine at temperature {temperature:.3g} cannot bring the loss below {floor:.3f}, however good the vectors "
        f"are; it is {loss:.3f} now, and one answer for every pair would give {p.ignorance:.3f}. Set model.temperature "
        "= 0.1 and model.learn_temperature = true, or model.bias = true, or model.similarity = 'dot'.",
        evidence,
    )  # fmt: skip


# ---- vectors -----------------------------------------------------------------------------------------------------


def _collapse(p: _Patient) -> Iterator[Finding]:
    """What a score is made of: its spread over items is the items' own plus what is between this user and this item."""
    users, items = (p.factors.users[p.met["user"]].double(), p.factors.items[p.met["item"]].double())
    if len(users) < 2 or len(items) < 2:
        return
    own = -2 if p.config.model.bias else None  # without the columns of the biases
    evidence: dict[str, float] = {}
    for side, rows in (("user", users[:, :own]), ("item", items[:, :own])):
        evidence[f"{side}_cosine"], evidence[f"{side}_rank"] = _mean_cosine(rows), _effective_rank(rows)
    middle, spread = users.mean(0), items - items.mean(0)
    covariance = spread.T @ spread / len(items)
    centred = users - middle
    between = max(0.0, float(((centred @ covariance) * centred).sum(1).mean()))
    alike = max(0.0, float(middle @ covariance @ middle))
    share = between / (between + alike) if between + alike > 0 else 0.0
    evidence |= {
        "logit_spread": math.sqrt(between + alike), "personal": math.sqrt(between), "personal_share": share
    }  # fmt: skip
    width = users[:, :own].shape[1]
    side = max(SIDES, key=lambda s: evidence[f"{s}_cosine"])
    most = evidence[f"{side}_cosine"]
    narrow = min(SIDES, key=lambda s: evidence[f"{s}_rank"])
    severity: Severity = "ill"
    if evidence["logit_spread"] < 0.05:
        text = f"All items have nearly the same score (a user's logits spread by {evidence['logit_spread']:.2g})."
    elif share < 0.01:
        text = f"Every user gets nearly the same ranking: {share:.2%} of what tells items apart depends on the user."
    elif most >= 0.98 and evidence["personal"] < 0.5:
        text = f"The {side} vectors have collapsed: two of them have a cosine of {most:.3f} on average."
    elif most >= 0.9 and evidence["personal"] < 0.5:
        severity = "warning"
        text = f"The {side} vectors point in nearly one direction: two of them have a cosine of {most:.3f} on average."
    elif evidence[f"{narrow}_rank"] < 1.5 and width > 2:
        yield Finding(
            "warning",
            "collapse",
            f"The {narrow} vectors use {evidence[f'{narrow}_rank']:.1f} of {width} directions: taste has one axis "
            "here. If yours has more, lower train.lr and the weight decays, or train longer.",
            evidence,
        )
        return
    else:
        yield Finding(
            "fine",
            "collapse",
            f"User vectors use about {evidence['user_rank']:.0f} of {width} directions and item vectors "
            f"{evidence['item_rank']:.0f}; {share:.0%} of what tells items apart depends on the user.",
            evidence,
        )
        return
    cooler = ", and model.temperature" if p.config.model.similarity == "cosine" else ""
    yield Finding(
        severity,
        "collapse",
        f"{text} If a finding dead_feature says that its tower sees nothing, start there; else lower train.lr and "
        f"train.embedding_weight_decay{cooler}.",
        evidence,
    )


def _mean_cosine(rows: Tensor) -> float:
    """Mean cosine of two different rows of (n, D); 1 if all are zeros."""
    n = len(rows)
    length = rows.norm(dim=1, keepdim=True)
    if float(length.max()) < 1e-12:
        return 1.0
    unit = rows / length.clamp(min=1e-12)
    return float((unit.sum(0).square().sum() - unit.square().sum()) / (n * (n - 1)))


def _effective_rank(rows: Tensor) -> float:
    """exp of the entropy of the covariance's normalised eigenvalues: how many directions (n, D) spreads over
    (as Roy and Vetterli 2007, "The Effective Rank", with variances for singular values)."""
    centred = rows - rows.mean(0)
    values = torch.linalg.eigvalsh(centred.T @ centred).clamp(min=0)
    total = float(values.sum())
    if total <= 1e-12 * float(rows.square().sum()):
        return 0.0
    share = values / total
    return float(torch.exp(-torch.xlogy(share, share).sum()))


# ---- baselines ---------------------------------------------------------------------------------------------------


def _baselines(p: _Patient) -> Iterator[Finding]:
    data, config = p.data, p.config
    users = _sample(np.unique(data.test.user).astype(np.int64))
    if len(users) < 2:
        return
    questions = questions_of(data, users)
    retrieves = config.loss.kind != "bce" or config.negatives.random > 0
    ranked = config.train.monitor.partition(".")[2] not in ("auc", "gauc", "log_loss")
    n_users, n_items = len(data.users), len(data.items)
    k = config.evaluation.k[0]
    if retrieves or ranked:
        counts = popularity(data.train, n_users, n_items)
        for c in _against(p, counts, users, questions, [k]):
            if c.metric == f"ndcg@{k}":
                pairs = config.loss.kind == "bce"
                other = ", or set loss.kind = 'softmax' with negatives.uniform" if pairs else ""
                how = f"See the other findings, and raise train.epochs or train.lr{other}."
                yield _verdict(c, "popularity", "baseline_ranking", "ill", how)
    if config.loss.kind == "bce":
        fitted = biases(data.train, n_users, n_items)
        for c in _against(p, fitted, users, questions, []):
            if c.metric == "auc":
                severity: Severity = "warning" if config.negatives.random else "ill"
                how = (
                    "One score cannot answer both whether a shown item is liked and which items to show: for the "
                    "former lower negatives.random_share."
                    if config.negatives.random
                    else "Raise train.epochs, set model.bias = true, and see the other findings."
                )
                yield _verdict(c, "user and item biases", "baseline_pairs", severity, how)


def _against(p: _Patient, baseline: Factors, users: Ints, questions: Questions, k: list[int]) -> list[Comparison]:
    """The baseline (A) and the model (B) over the same test users."""
    one, two = (Factors(f.users[torch.from_numpy(users)], f.items) for f in (baseline, p.factors))
    return differences(one, two, questions, k, 200)


def _verdict(c: Comparison, baseline: str, name: str, severity: Severity, how: str) -> Finding:
    evidence = {"model": c.b, "baseline": c.a, "low": c.low, "high": c.high, "users": float(c.users)}
    interval = (
        f"difference {c.difference:+.4f}, 95 % interval [{c.low:+.4f}, {c.high:+.4f}] over {c.users:,} test users"
    )
    if c.low > 0:
        return Finding(
            "fine", name, f"Better than {baseline}: {c.metric} {c.b:.4f} against {c.a:.4f} ({interval}).", evidence
        )
    if c.difference > 0:
        text = (
            f"{c.metric} {c.b:.4f} is above that of {baseline} ({c.a:.4f}), but chance over users could have made the "
            f"difference ({interval}). More test users would tell. {how}"
        )
        return Finding("warning", name, text, evidence)
    told = "worse than" if c.high < 0 else "no better than"
    return Finding(
        severity,
        name,
        f"The model is {told} {baseline}: {c.metric} {c.b:.4f} against {c.a:.4f} ({interval}). {how}",
        evidence,
    )


# ---- negatives ---------------------------------------------------------------------------------------------------


def _false_negatives(p: _Patient) -> Iterator[Finding]:
    data, n = p.data, p.config.negatives
    held = _keys(data, (data.parts != TRAIN) & data.pairs.positive)
    liked = _keys(data, (data.parts == TRAIN) & data.pairs.positive)
    if p.config.loss.kind == "bce":
        drawn = p.epoch.source < 0
        if not drawn.any():
            return
        keys = _key(p.epoch.user[drawn], p.epoch.item[drawn], len(data.items))
        unmasked, later = float(_in(keys, liked).mean()), float(_in(keys, held).mean())
        fewer = "Lower negatives.random or negatives.random_share."
    else:
        unmasked, later = _false_candidates(p, liked, held)
        named = [f"negatives.{s}" for s in n.drawn()] or ["negatives.in_batch or train.batch_size"]
        fewer = (
            f"Draw fewer or others: {', '.join(named)}; negatives.observed draws items the user is known not to like."
        )
    evidence = {"train_positives": unmasked, "later_positives": later}
    if unmasked >= 0.01:
        yield Finding(
            "ill" if unmasked >= 0.1 else "warning", "false_negatives",
            f"{unmasked:.1%} of the sampled negatives are positives of the same user in the training part: the loss "
            "pushes apart what it should pull together. Set negatives.mask_positives = true.",
            evidence,
        )  # fmt: skip
    if later >= 0.05:
        yield Finding(
            "ill" if later >= 0.3 else "warning", "false_negatives",
            f"{later:.1%} of the sampled negatives are positives of the same user in validation or test. No mask can "
            f"know them; so many make the model avoid the right answers. {fewer}",
            evidence,
        )  # fmt: skip
    if unmasked < 0.01 and later < 0.05:
        yield Finding(
            "fine", "false_negatives",
            f"Of the sampled negatives {unmasked:.2%} are training positives of the user and {later:.2%} later ones.",
            evidence,
        )  # fmt: skip


def _false_candidates(p: _Patient, liked: Ints, held: Ints) -> tuple[float, float]:
    """Shares of the candidates a batch is set against that the user likes in the training part, and later."""
    pairs, drawn = p.batch
    n_items = len(p.data.items)
    logits = torch.zeros(len(pairs), len(drawn.log_q))
    drawn.ban(logits, slice(None))
    logits.scatter_(1, drawn.positive[:, None], -torch.inf)
    weight = np.where(torch.isfinite(logits).numpy(), drawn.drawn.numpy(), 0.0)
    columns = np.concatenate([drawn.items[: drawn.shared], drawn.memory.numpy()])
    own = drawn.own.numpy()
    item = np.concatenate([np.broadcast_to(columns, weight.shape), drawn.items[np.maximum(own, 0)]], 1)
    weight = np.concatenate([weight, own >= 0], 1)
    keys = pairs.user[:, None].astype(np.int64) * n_items + item
    total = max(float(weight.sum()), 1e-12)
    found = [float((weight * _in(keys.ravel(), k).reshape(keys.shape)).sum()) / total for k in (liked, held)]
    return found[0], found[1]


def _key(user: npt.NDArray[np.integer], item: npt.NDArray[np.integer], n_items: int) -> Ints:
    keys: Ints = user.astype(np.int64) * n_items + item
    return keys


def _keys(data: Dataset, keep: Bools) -> Ints:
    """Sorted distinct numbers of the pairs to keep."""
    return np.unique(_key(data.pairs.user[keep], data.pairs.item[keep], len(data.items)))


def _in(keys: Ints, within: Ints) -> Bools:
    """Which of `keys` are in the sorted array `within`."""
    if not len(within):
        return np.zeros(len(keys), bool)
    found: Bools = within[np.minimum(np.searchsorted(within, keys), len(within) - 1)] == keys
    return found


# ---- leakage -----------------------------------------------------------------------------------------------------


def _split(p: _Patient) -> Iterator[Finding]:
    sick = [*_shared_pairs(p), *_disorder(p)]
    yield from sick
    if not sick:
        yield Finding(
            "fine", "split", "No pair is in two parts" + (", and the parts follow in time." if p.data.ordered else ".")
        )


def _shared_pairs(p: _Patient) -> Iterator[Finding]:
    data = p.data
    keys = [_keys(data, data.parts == part) for part in range(len(NAMES))]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        n = len(np.intersect1d(keys[one], keys[other], assume_unique=True))
        if not n:
            continue
        share = n / len(keys[other])
        yield Finding(
            "ill" if share >= 0.01 else "warning", "shared_pairs",
            f"{n:,} of {len(keys[other]):,} {NAMES[other]} pairs are in the {NAMES[one]} part too: the model is asked "
            "what it was told. Remove repeated pairs before the split (schema.duplicates = 'last' does).",
            {"pairs": float(n), "share": share},
        )  # fmt: skip


def _disorder(p: _Patient) -> Iterator[Finding]:
    data, kind = p.data, p.config.split.kind
    if kind == "random" or data.seconds is None:
        return
    train, test = data.parts == TRAIN, data.parts == TEST
    if not train.any() or not test.any():
        return
    latest = np.full(len(data.users), np.iinfo(np.int64).min)
    if kind == "last":
        np.maximum.at(latest, data.pairs.user[train], data.seconds[train])
    else:
        latest[:] = data.seconds[train].max()
    older = data.seconds[test] < latest[data.pairs.user[test]]
    if older.any():
        whose = "a training pair of its user" if kind == "last" else "the latest training pair"
        yield Finding(
            "ill", "split_order",
            f"split.kind = '{kind}', but {older.mean():.1%} of the test pairs are older than {whose}: the model has "
            "seen the future. Check the column schema.time and its schema.time_unit, and split again.",
            {"share": float(older.mean())},
        )  # fmt: skip


def _statistics(p: _Patient) -> Iterator[Finding]:
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


def _telling_features(p: _Patient) -> Iterator[Finding]:
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
            score = _single(
                data.side(side).columns[feature.name], train_rows, data.train.positive, len(data.side(side))
            )
            if score is not None:
                value = auc(score[rows], test.positive)
                found.append((side, feature.name, max(value, 1 - value)))
    for side, name, value in found:
        if value >= 0.95:
            yield Finding(
                "ill", "telling_feature",
                f"The {side} feature '{name}' alone tells liked from not liked in the test part (AUC {value:.3f}): "
                "most likely it was made from the outcome. If it is not known before the user decides, remove it from "
                "schema.features.",
                {"auc": value},
            )  # fmt: skip
    if found and max(v for _, _, v in found) < 0.95:
        side, name, value = max(found, key=lambda f: f[2])
        yield Finding(
            "fine", "telling_feature",
            f"No feature tells the label by itself; the {side} feature '{name}' tells most (AUC {value:.3f}).",
            {"auc": value},
        )  # fmt: skip


def _single(column: Column, rows: npt.NDArray[np.integer], positive: Bools, n: int) -> npt.NDArray[np.float64] | None:
    """(n,) score of every row by one feature alone: its number, or how often its values are liked; None for vectors."""
    if isinstance(column, Ragged):
        lengths = column.lengths
        liked, shown = (np.bincount(r, minlength=n) for r in (rows[positive], rows))
        owner = np.repeat(np.arange(n), lengths)
        size = int(column.values.max(initial=0)) + 1
        rate = (np.bincount(column.values, liked[owner], size) + positive.mean()) / (
            np.bincount(column.values, shown[owner], size) + 1
        )
        mean: npt.NDArray[np.float64] = np.bincount(owner, rate[column.values], n) / np.maximum(lengths, 1)
        return np.where(lengths > 0, mean, positive.mean())
    if column.ndim == 2:
        return column[:, 0].astype(np.float64) if column.shape[1] == 1 else None
    size = int(column.max(initial=0)) + 1
    codes = column[rows]
    rate = (np.bincount(codes[positive], minlength=size) + positive.mean()) / (np.bincount(codes, minlength=size) + 1)
    out: npt.NDArray[np.float64] = rate[column]
    return out


# ---- features and gates ------------------------------------------------------------------------------------------


def _dead_features(p: _Patient) -> Iterator[Finding]:
    n = dead = 0
    for side in SIDES:
        effects = _effects(p, side)
        if effects is None:
            continue
        for feature in p.data.schema.side(side):
            n += 1
            effect = effects[feature.name]
            why = _why_dead(p, side, feature.name, effect)
            if why:
                dead += 1
                yield Finding(
                    "warning", "dead_feature", f"The {side} feature '{feature.name}' {why}", {"effect": effect}
                )
    if n and not dead:
        yield Finding("fine", "dead_feature", f"Each of {n} features changes the scores.")


def _effects(p: _Patient, side: SideName) -> dict[str, float] | None:
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
    with torch.no_grad():
        inputs, moved = p.inputs(side, rows, shuffled)
        vectors = tower(inputs).double().cpu()

        def squares(change: Tensor) -> float:
            return float(((change @ gram) * change).sum(1).mean())

        variance = squares(vectors) - float(vectors.mean(0) @ others.mean(0)) ** 2
        # Rounding alone makes scores in float32 differ.
        if len(rows) < 2 or variance <= 1e-9 * max(squares(vectors), 1e-12):
            return None
        changes = {
            f.name: tower(_swapped(inputs, moved, f.name, lookups)).double().cpu() - vectors
            for f in data.schema.side(side)
        }
        return {name: math.sqrt(max(0.0, squares(change)) / variance) for name, change in changes.items()}


def _swapped(inputs: Inputs, moved: Inputs, name: str, lookups: list[str]) -> Inputs:
    """The inputs with one feature's values taken from `moved`."""
    if name in lookups:
        lookup = inputs.lookup.clone()
        lookup[:, lookups.index(name)] = moved.lookup[:, lookups.index(name)]
        return replace(inputs, lookup=lookup)
    if name in inputs.bags:
        return replace(inputs, bags=inputs.bags | {name: moved.bags[name]})
    return replace(inputs, dense=inputs.dense | {name: moved.dense[name]})


def _why_dead(p: _Patient, side: SideName, name: str, effect: float) -> str:
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
        return f"is read by no tower. Add it to model.branches.0.{side}.fields, or remove it from schema.features."
    norms = [_norm(t.embeddings, other.embeddings, name) for t, other in towers]
    if max(norms) < 0.01 * p.config.model.embedding_std:
        return (
            f"has embeddings of about zero (mean length {max(norms):.2g}): they were decayed away. Lower "
            "train.embedding_weight_decay or that tower's decay_scale, or remove the feature."
        )
    return (
        f"has no effect: with its values shuffled the scores change by {effect:.1g} of their deviation. Remove it, or "
        "see whether a SENet gate is shut or its activations are dead (a smaller train.lr)."
    )


def _norm(embeddings: FieldEmbeddings, other: FieldEmbeddings, name: str) -> float:
    """Mean length of the rows of the field's table; infinite for numbers, which have none."""
    f = next(f for f in embeddings.fields if f.name == name)
    if f.kind == "dense":
        return math.inf
    table = other.rows_of(f.shares) if f.shares else embeddings.rows_of(name)
    return float(table.detach().norm(dim=1).mean())


def _gates(p: _Patient) -> Iterator[Finding]:
    sick = False
    seen = False
    for side in SIDES:
        towers = p.run.model.towers(side)
        if all(tower.senet is None for tower, _ in towers):
            continue
        (inputs,) = p.inputs(side, p.met[side])
        for number, (tower, other) in enumerate(towers):
            if tower.senet is None:
                continue
            seen = True
            with torch.no_grad():
                gates = tower.gates(inputs, other.embeddings).cpu()
            for finding in _gate_findings(gates, tower.field_names, f"model.branches.{number}.{side}"):
                sick = True
                yield finding
    if seen and not sick:
        yield Finding("fine", "gates", "The SENet gates are neither all open nor all shut, and differ from row to row.")


def _gate_findings(gates: Tensor, names: list[str], where: str) -> Iterator[Finding]:
    """`gates` (U, F)"""
    mean, deviation = gates.mean(0), gates.std(0, correction=0)
    evidence = {"lowest": float(mean.min()), "highest": float(mean.max()), "deviation": float(deviation.max())}
    if evidence["highest"] < 0.01:
        yield Finding(
            "ill", "gates",
            f"All SENet gates of {where} are shut (the widest passes {evidence['highest']:.2g}): the tower sees next "
            f"to nothing. Lower train.lr, or set {where}.senet.enabled = false.",
            evidence,
        )  # fmt: skip
    elif evidence["lowest"] > 0.99:
        yield Finding(
            "warning", "gates",
            f"All SENet gates of {where} are open (the narrowest passes {evidence['lowest']:.3f}): they do nothing. "
            f"Set {where}.senet.enabled = false, or lower train.lr.",
            evidence,
        )  # fmt: skip
    elif evidence["deviation"] < 1e-3:
        yield Finding(
            "warning", "gates",
            f"The SENet gates of {where} are the same in every row: they weigh fields, but no row by what it holds. "
            f"Widen their middle layer by {where}.senet.reduction = 1 (its units may all be off), or set "
            f"{where}.senet.enabled = false.",
            evidence,
        )  # fmt: skip
    elif shut := [n for n, m in zip(names, mean.tolist(), strict=True) if m < 0.01]:
        yield Finding(
            "warning", "gates",
            f"The SENet gates of {where} shut out {', '.join(shut)}. If these should matter, lower train.lr.",
            evidence,
        )  # fmt: skip
