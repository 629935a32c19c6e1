"""Contrastive losses equal double loops, in value and gradients, and estimate the softmax over the catalogue."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from candidate_worlds import batch_of, world
from torch import Tensor
from torch.nn.functional import cross_entropy

from twotower.data.dataset import Dataset
from twotower.train import contrastive
from twotower.train.losses.bpr import Bpr
from twotower.train.losses.gbce import Gbce
from twotower.train.losses.loss import ContrastiveLoss
from twotower.train.losses.softmax import Softmax
from twotower.train.negatives.candidates import Candidates, Exclusions
from twotower.train.negatives.config import NegativesConfig
from twotower.train.negatives.mixture import CandidateSampler


@dataclass(frozen=True)
class ContrastiveCase:
    """A contrastive batch, with the candidates of each positive as plain lists."""

    users: Tensor  # (B, D)
    items: Tensor  # (I + M, D)
    candidates: Candidates
    excluded: list[set[int]]  # columns of each row
    hard: int  # the last of the per-positive negatives, which keep a margin

    def guarded(self, margin: float) -> Candidates:
        """The candidates with a margin of the hard negatives; 0: none."""
        n = self.candidates.per_positive.shape[1]
        margins = torch.tensor([-torch.inf] * (n - self.hard) + [margin] * self.hard)
        return replace(self.candidates, margins=margins) if margin else self.candidates

    def columns(self, row: int) -> list[tuple[int, float, float, int]]:
        """(place in items, count of draws, log q, column) of each shared negative of a row."""
        c = self.candidates
        n, found = len(c.log_q), []
        for column in range(n):
            if column == int(c.positive[row]) or column in self.excluded[row] or not c.counts[column]:
                continue
            place = column if column < c.shared else len(c.items) + column - c.shared
            found.append((place, float(c.counts[column]), float(c.log_q[column]), column))
        return found

    def per_positive(self, row: int) -> list[tuple[int, bool]]:
        """(place in items, is hard) of each per-positive negative of a row."""
        c = self.candidates
        places = c.per_positive[row].tolist()
        return [(p, h >= len(places) - self.hard) for h, p in enumerate(places) if p >= 0]


def contrastive_case(
    seed: int, rows: int = 40, memory: int = 6, per_positive: int = 3, hard: int = 2, excluded: bool = True
) -> ContrastiveCase:
    """Random vectors, columns drawn 0 to 3 times, per-positive negatives with holes, exclusions that may hit the
    positive."""
    rng = np.random.default_rng(seed)
    shared, extra, groups = 9, 4, 5
    n = shared + memory
    offsets, exclusions = np.zeros(groups + 1, np.int64), []
    for g in range(groups):
        exclusions.append(sorted(rng.choice(n, rng.integers(0, 5), replace=False).tolist()) if excluded else [])
        offsets[g + 1] = offsets[g] + len(exclusions[-1])
    group = rng.integers(0, groups, rows)
    counts = np.concatenate([rng.integers(0, 4, shared), np.ones(memory)]).astype(np.float32)
    candidates = Candidates(
        items=np.arange(shared + extra),
        shared=shared,
        memory_items=torch.arange(memory),
        positive=torch.from_numpy(rng.integers(0, shared, rows)),
        counts=torch.from_numpy(counts),
        log_q=torch.from_numpy(rng.normal(0, 1, n).astype(np.float32)),
        per_positive=torch.from_numpy(rng.integers(-1, shared + extra, (rows, per_positive))),
        exclusions=Exclusions(
            torch.from_numpy(group),
            torch.tensor([c for row in exclusions for c in row], dtype=torch.int64),
            torch.from_numpy(offsets),
        )
        if excluded
        else None,
        weights=torch.ones(rows),
    )
    vectors = torch.Generator().manual_seed(seed)
    return ContrastiveCase(
        torch.randn(rows, 5, generator=vectors),
        torch.randn(shared + extra + memory, 5, generator=vectors),
        candidates,
        [set(exclusions[g]) for g in group],
        min(hard, per_positive),
    )


def naive(
    of: ContrastiveCase, users: Tensor, items: Tensor, loss: ContrastiveLoss, n_items: int, margin: float
) -> Tensor:
    """The mean loss in float64, a candidate at a time.

    softmax: -log of the positive's share of exp(logit - log q) over everything drawn (Bengio and Senecal 2008).
    bpr: the mean of -log sigmoid(positive - candidate) over what was drawn (Rendle et al. 2009).
    gbce: -(log sigmoid^beta(positive) + sum of log(1 - sigmoid(candidate))) / (k + 1), beta = alpha (t (1 - 1/alpha) +
    1/alpha), alpha the sampling rate (Petrov and Macdonald 2023, equations 6 and 12).
    """
    c, total = of.candidates, torch.zeros((), dtype=torch.float64)
    for row in range(len(users)):
        positive = users[row] @ items[int(c.positive[row])]
        negatives: list[tuple[Tensor, float, float]] = []  # logit, times, log q
        for place, times, log_q, _ in of.columns(row):
            negatives.append((users[row] @ items[place], times, log_q))
        for place, hard in of.per_positive(row):
            logit = users[row] @ items[place]
            if hard and margin and logit.item() > positive.item() - margin:
                continue
            negatives.append((logit, 1.0, float(c.log_q[c.positive[row]])))  # as sure to be there as the positive
        k = sum(times for _, times, _ in negatives)
        if isinstance(loss, Softmax):
            q = float(c.log_q[c.positive[row]]) if loss.log_q else 0.0
            share = torch.exp(positive - q)
            z = share + sum(times * torch.exp(s - (q if loss.log_q else 0.0)) for s, times, q in negatives)
            total = total - torch.log(share / z)
        elif isinstance(loss, Bpr):
            for s, times, _ in negatives:
                total = total - times / k * torch.log(torch.sigmoid(positive - s))
        else:
            assert isinstance(loss, Gbce)
            t = loss.calibration
            # The rate is the sampler's: the items it drew for the batch, over the other items.
            alpha = min(1.0, (float((c.counts > 0).sum()) + c.per_positive.shape[1]) / (n_items - 1))
            beta = alpha * (t * (1 - 1 / alpha) + 1 / alpha)
            row_loss = torch.log(torch.sigmoid(positive) ** beta)
            for s, times, _ in negatives:
                row_loss = row_loss + times * torch.log(1 - torch.sigmoid(s))
            total = total - row_loss / (k + 1)
    return total / len(users)


def value_and_gradients(loss: Tensor, *inputs: Tensor) -> tuple[float, list[Tensor]]:
    return loss.item(), [g.float() for g in torch.autograd.grad(loss, inputs)]


CONTRASTIVE: list[ContrastiveLoss] = [
    Softmax(),
    Softmax(log_q=False),
    Bpr(),
    *(Gbce(calibration=t) for t in (0.0, 0.4, 0.75, 1.0)),
]


@pytest.mark.parametrize("loss", CONTRASTIVE, ids=repr)
@pytest.mark.parametrize(
    ("block", "margin", "shape"),
    [
        (1, 0.0, {}),  # blocks of 16 rows, the least there is
        (1, 0.7, {}),
        (18 * 15, 0.0, {"per_positive": 0}),  # of 18, without per-positive negatives
        (2**21, 0.7, {"memory": 0}),  # one block
        (1, 0.7, {"excluded": False, "hard": 0, "rows": 17}),
        (1, 0.0, {"rows": 1}),
    ],
    ids=["blocks", "margin", "no per-positive", "no memory", "no exclusions, none hard", "one row"],
)
def test_a_contrastive_loss_equals_a_double_loop_in_value_and_gradients(
    loss: ContrastiveLoss, block: int, margin: float, shape: dict[str, Any]
) -> None:
    of = contrastive_case(len(shape) + block % 97, **shape)
    users, items = of.users.requires_grad_(), of.items.requires_grad_()
    mean = contrastive.contrastive_loss(users, items, of.guarded(margin), loss, 60, max_block_logits=block)
    found = value_and_gradients(mean, users, items)
    u, v = users.detach().double().requires_grad_(), items.detach().double().requires_grad_()
    expected = value_and_gradients(naive(of, u, v, loss, 60, margin), u, v)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    for a, b in zip(found[1], expected[1], strict=True):
        assert torch.allclose(a, b, atol=1e-6, rtol=1e-4), (a - b).abs().max()


def test_the_cases_have_all_that_makes_a_loop_differ() -> None:
    of = contrastive_case(1)
    c = of.candidates
    assert {0.0, 1.0, 2.0, 3.0} <= set(c.counts.tolist())
    assert (c.per_positive < 0).any()
    assert (c.per_positive >= c.shared).any()
    assert any(int(p) in row for p, row in zip(c.positive, of.excluded, strict=True))
    assert any(column >= c.shared for row in of.excluded for column in row)
    # The margin leaves out some hard negatives and keeps some, and changes nothing else.
    plain, guarded = (naive(of, of.users, of.items, Softmax(), 60, m).item() for m in (0.0, 0.7))
    none = replace(c, per_positive=torch.cat([c.per_positive[:, :1], torch.full_like(c.per_positive[:, 1:], -1)], 1))
    without = naive(replace(of, candidates=none), of.users, of.items, Softmax(), 60, 0.0).item()
    assert without < guarded < plain


@pytest.mark.parametrize("loss", CONTRASTIVE, ids=repr)
def test_the_gradient_is_scaled_by_what_stands_after_the_loss(loss: ContrastiveLoss) -> None:
    of = contrastive_case(3)
    users, items = of.users.requires_grad_(), of.items.requires_grad_()
    once, thrice = (
        torch.autograd.grad(scale * contrastive.contrastive_loss(users, items, of.candidates, loss, 60), (users, items))
        for scale in (1.0, 3.0)
    )
    for a, b in zip(once, thrice, strict=True):
        torch.testing.assert_close(3 * a, b)


@pytest.mark.parametrize("loss", CONTRASTIVE, ids=repr)
def test_a_contrastive_loss_in_bf16_is_near_the_one_in_fp32(loss: ContrastiveLoss) -> None:
    of = contrastive_case(4)
    users, items = of.users.requires_grad_(), of.items.requires_grad_()
    exact, rough = (
        value_and_gradients(contrastive.contrastive_loss(users, items, of.candidates, loss, 60, dtype=d), users, items)
        for d in (torch.float32, torch.bfloat16)
    )
    assert rough[0] == pytest.approx(exact[0], rel=0.02)
    assert all(torch.allclose(a, b, atol=0.02) for a, b in zip(exact[1], rough[1], strict=True))


@pytest.mark.parametrize("loss", CONTRASTIVE, ids=repr)
def test_a_row_without_candidates_is_no_nan(loss: ContrastiveLoss) -> None:
    of = contrastive_case(5, rows=3, per_positive=0, memory=0, excluded=False)
    users, items = of.users.requires_grad_(), of.items.requires_grad_()
    alone = replace(of.candidates, counts=torch.zeros(9))
    mean, gradients = value_and_gradients(contrastive.contrastive_loss(users, items, alone, loss, 60), users, items)
    if not isinstance(loss, Gbce):
        expected = naive(replace(of, candidates=alone), users.double(), items.double(), loss, 60, 0.0).item()
        assert mean == pytest.approx(expected, abs=1e-6) == 0
        assert not any(bool(g.any()) for g in gradients)
    assert math.isfinite(mean)
    assert all(bool(g.isfinite().all()) for g in gradients)


# ---- the full softmax


@pytest.mark.parametrize("mask", [False, True])
def test_the_full_sampler_gives_the_cross_entropy_over_the_catalogue(everything_data: Dataset, mask: bool) -> None:
    data = everything_data
    sampler = CandidateSampler(data, NegativesConfig(full=True, mask_positives=mask), seed=1)
    liked = np.flatnonzero(data.train.positive)[:50]
    user, item = data.train.user[liked], data.train.item[liked]
    rng = torch.Generator().manual_seed(0)
    users, items = torch.randn(50, 6, generator=rng), torch.randn(len(data.items), 6, generator=rng)
    drawn = sampler(batch_of(user, item), 3)
    assert drawn.items.tolist() == list(range(40))
    logits = users @ items.T
    if mask:
        mine: dict[int, set[int]] = {}
        for u, i, p in zip(data.train.user.tolist(), data.train.item.tolist(), data.train.positive, strict=True):
            mine.setdefault(u, set()).update([i] if p else [])
        for b in range(50):
            for i in mine[int(user[b])] - {int(item[b])}:
                logits[b, i] = -torch.inf
    expected = cross_entropy(logits, torch.from_numpy(item.astype(np.int64))).item()
    for config in (Softmax(), Softmax(log_q=False)):
        assert contrastive.contrastive_loss(users, items, drawn, config, 40).item() == pytest.approx(expected, rel=1e-5)


# ---- the correction


def skewed(board: Dataset) -> Dataset:
    """A world of 30 items in which item i is liked by about 40 / (1 + i) of 40 users."""
    return world(board, [(u, i, True) for i in range(30) for u in range(max(1, 40 // (1 + i)))])


@pytest.mark.parametrize(
    "negatives",
    [
        NegativesConfig(in_batch=False, popularity={"n": 300, "alpha": 1.0}, mask_positives=False),
        NegativesConfig(in_batch=False, popularity=200, uniform=200, mask_positives=False),
        NegativesConfig(in_batch=True, uniform=100, popularity=100, mask_positives=False),
    ],
    ids=["popularity", "mixture", "in batch"],
)
def test_with_the_correction_the_mean_gradient_is_that_of_the_full_softmax_and_without_it_is_not(
    board: Dataset, negatives: NegativesConfig
) -> None:
    data = skewed(board)
    sampler = CandidateSampler(data, negatives, seed=2)
    rng = torch.Generator().manual_seed(0)
    vectors = torch.randn(40, 4, generator=rng), torch.randn(30, 4, generator=rng)
    shuffled = np.random.default_rng(0)
    wanted = torch.zeros(40, 4)
    means = {log_q: torch.zeros(40, 4) for log_q in (True, False)}
    for step in range(200):
        # A batch of the training positives, so that in-batch candidates come by popularity.
        batch = shuffled.choice(len(data.train), 60, replace=False)
        user, item = data.train.user[batch], data.train.item[batch]
        drawn = sampler(batch_of(user, item), step)
        users = vectors[0].clone().requires_grad_()
        rows, items = users[torch.from_numpy(user).long()], vectors[1]
        full = cross_entropy(rows @ items.T, torch.from_numpy(item).long())
        wanted += torch.autograd.grad(full, users, retain_graph=True)[0]
        for log_q, mean in means.items():
            config = Softmax(log_q=log_q)
            loss = contrastive.contrastive_loss(rows, items[torch.from_numpy(drawn.items)], drawn, config, 30)
            mean += torch.autograd.grad(loss, users, retain_graph=True)[0]
    off = {log_q: ((mean - wanted).norm() / wanted.norm()).item() for log_q, mean in means.items()}
    # What is left on is the bias of few draws, which falls with their number.
    assert off[True] < 0.06, off
    assert off[False] > 5 * off[True], off
