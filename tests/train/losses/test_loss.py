"""Every loss keeps its protocol: those that are registered, and the example from outside the package."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from mykinds.losses import Focal
from torch import Tensor

from twotower.errors import ConfigError
from twotower.train.contrastive import contrastive_loss
from twotower.train.losses import LOSSES
from twotower.train.losses.loss import Columns, ContrastiveLoss, Loss, PointwiseLoss
from twotower.train.losses.softmax import Softmax
from twotower.train.negatives.candidates import Candidates

ALL: list[Loss] = [*(kind() for kind in LOSSES), Focal()]
POINTWISE = [loss for loss in ALL if isinstance(loss, PointwiseLoss)]
CONTRASTIVE = [loss for loss in ALL if isinstance(loss, ContrastiveLoss)]
pointwise = pytest.mark.parametrize("loss", POINTWISE, ids=repr)
contrastive = pytest.mark.parametrize("loss", CONTRASTIVE, ids=repr)


@pytest.mark.parametrize("loss", ALL, ids=repr)
def test_a_loss_belongs_to_one_family_is_documented_and_is_read_from_what_it_is_written_as(loss: Loss) -> None:
    assert loss.pointwise == (loss in POINTWISE) != (loss in CONTRASTIVE)
    assert "Use it" in (type(loss).__doc__ or "")
    assert LOSSES.parse(loss.model_dump(mode="json")) == loss
    assert all(info.description for info in type(loss).model_fields.values())


def test_a_loss_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'softmax'"):
        LOSSES.find("softmacks")
    with pytest.raises(ConfigError, match=r"make it a subclass of .*\.PointwiseLoss or .*\.ContrastiveLoss"):
        LOSSES.find("twotower.train.losses.loss:Columns")


# ---- pointwise


def pairs(n: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels and weights of n pairs."""
    rng = np.random.default_rng(n)
    arrays = rng.normal(0, 2, n), rng.integers(0, 2, n), rng.choice([0.5, 1, 3], n)
    logits, labels, weights = (torch.from_numpy(a.astype(np.float32)) for a in arrays)
    return logits, labels, weights


@pointwise
def test_the_gradient_raises_positives_and_lowers_negatives(loss: PointwiseLoss) -> None:
    logits, labels, weights = pairs()
    (gradient,) = torch.autograd.grad(loss(logits.requires_grad_(), labels, weights), logits)
    assert bool((gradient * (2 * labels - 1) < 0).all())


@pointwise
def test_weights_are_relative_and_a_weight_of_two_is_a_pair_twice(loss: PointwiseLoss) -> None:
    logits, labels, weights = pairs()
    whole = loss(logits, labels, weights)
    torch.testing.assert_close(loss(logits, labels, 7 * weights), whole)
    once = loss(torch.cat([logits, logits[:1]]), torch.cat([labels, labels[:1]]), torch.ones(13))
    torch.testing.assert_close(loss(logits, labels, torch.tensor([2.0] + 11 * [1.0])), once)


@pointwise
def test_the_parts_of_a_batch_add_up_to_its_mean(loss: PointwiseLoss) -> None:
    logits, labels, weights = pairs()
    total = float(weights.sum())
    parts = [loss(logits[p], labels[p], weights[p], total) for p in (slice(0, 5), slice(5, 12))]
    torch.testing.assert_close(parts[0] + parts[1], loss(logits, labels, weights))


@pointwise
def test_huge_logits_give_a_finite_loss_and_gradient(loss: PointwiseLoss) -> None:
    logits = torch.tensor([500.0, -500.0], requires_grad=True)
    value = loss(logits, torch.tensor([0.0, 1.0]), torch.ones(2))
    (gradient,) = torch.autograd.grad(value, logits)
    assert bool(value.isfinite())
    assert bool(gradient.isfinite().all())


# ---- contrastive


def block(seed: int, rows: int = 20, n: int = 15) -> tuple[Tensor, Tensor, Columns]:
    """Logits with candidates that are left out, the positives' columns, and columns drawn 0 to 3 times."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (rows, n)).astype(np.float32)
    positive = rng.integers(0, n, (rows, 1))
    left_out = rng.random((rows, n)) < 0.2
    left_out[np.arange(rows), positive[:, 0]] = False
    logits[left_out] = -np.inf
    draws = torch.from_numpy(rng.integers(0, 4, n).astype(np.float32))
    return torch.from_numpy(logits), torch.from_numpy(positive), Columns(draws, 40)


@contrastive
@pytest.mark.parametrize("seed", range(4))
def test_a_block_overwrites_logits_with_the_gradient_of_its_rows(loss: ContrastiveLoss, seed: int) -> None:
    """Of their weighted sum; seed 0 has weights of 1."""
    logits, positive, columns = block(seed)
    weights = 1 + torch.rand(20, 1, generator=torch.Generator().manual_seed(seed)) * min(seed, 1)
    leaf = logits.clone().requires_grad_()
    value = (loss.rows(leaf, positive, columns) * weights[:, 0]).sum()
    (gradient,) = torch.autograd.grad(value, leaf)
    torch.testing.assert_close(loss.block(logits, positive, columns, weights), value.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits, gradient, rtol=1e-4, atol=1e-6)


@contrastive
def test_the_gradient_raises_the_positive_and_lowers_candidates_that_are_not_left_out(loss: ContrastiveLoss) -> None:
    logits, positive, columns = block(5)
    left_out = logits == -torch.inf
    loss.block(logits, positive, columns, torch.ones_like(positive).float())
    assert bool((logits.gather(1, positive) < 0).all())
    assert bool((logits.scatter(1, positive, 0.0) >= 0).all())
    assert not logits[left_out].any()


@contrastive
def test_rows_and_columns_do_not_depend_on_their_order(loss: ContrastiveLoss) -> None:
    logits, positive, columns = block(6)
    rng = torch.Generator().manual_seed(0)
    rows, order = torch.randperm(20, generator=rng), torch.randperm(15, generator=rng)
    moved = loss.rows(
        logits[rows][:, order], order.argsort()[positive[rows]], replace(columns, draws=columns.draws[order])
    )
    torch.testing.assert_close(moved, loss.rows(logits, positive, columns)[rows])


def candidates(positive: list[int], counts: list[float], own: Tensor | None = None) -> Candidates:
    """Shared candidates without correction, and each row's own negatives."""
    n = len(counts)
    return Candidates(
        items=np.arange(n), shared=n, memory_items=torch.zeros(0, dtype=torch.int64), positive=torch.tensor(positive),
        counts=torch.tensor(counts, dtype=torch.float32), log_q=torch.zeros(n),
        per_positive=torch.zeros(len(positive), 0, dtype=torch.int64) if own is None else own, exclusions=None,
        weights=torch.ones(len(positive)),
    )  # fmt: skip


def mean(loss: ContrastiveLoss, users: Tensor, items: Tensor, drawn: Candidates) -> tuple[Tensor, Tensor]:
    """The mean loss of a small catalogue, and its gradient by the users' vectors."""
    value = contrastive_loss(users.requires_grad_(), items, drawn, loss, 2)
    return value, torch.autograd.grad(value, users)[0]


def vectors() -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    return torch.randn(3, 4, generator=rng), torch.randn(5, 4, generator=rng)


@contrastive
def test_a_candidate_counts_as_often_as_it_is_drawn(loss: ContrastiveLoss) -> None:
    users, items = vectors()
    drawn = mean(loss, users, items, candidates([0, 1, 2], [1, 1, 1, 3, 0]))
    repeated = mean(loss, users, items[[0, 1, 2, 3, 3, 3]], candidates([0, 1, 2], [1, 1, 1, 1, 1, 1]))
    torch.testing.assert_close(drawn, repeated)


@contrastive
def test_a_negative_of_ones_own_is_a_candidate_of_its_row_alone(loss: ContrastiveLoss) -> None:
    users, items = vectors()
    own = mean(loss, users[:1], items, candidates([0], [0, 1, 0, 0, 0], torch.tensor([[3, -1]])))
    shared = mean(loss, users[:1], items, candidates([0], [0, 1, 0, 1, 0]))
    torch.testing.assert_close(own, shared)


@contrastive
def test_the_correction_does_not_depend_on_how_many_batches_are_drawn(loss: ContrastiveLoss) -> None:
    """Twice the expected number of draws of all items lowers no loss: it is the same for the positive and the
    others."""
    users, items = vectors()
    drawn = candidates([0, 1, 2], [1, 2, 1, 3, 0], torch.tensor([[3], [4], [-1]]))
    doubled = mean(loss, users, items, replace(drawn, log_q=torch.full((5,), 0.7)))
    torch.testing.assert_close(doubled, mean(loss, users, items, drawn))


@contrastive
def test_no_candidate_or_huge_logits_give_a_finite_loss_and_gradient(loss: ContrastiveLoss) -> None:
    users, items = vectors()
    for scale, counts in ((1.0, 5 * [0.0]), (500.0, 5 * [1.0]), (-500.0, 5 * [1.0])):
        value, gradient = mean(loss, scale * users, items, candidates([0, 1, 2], counts))
        assert bool(value.isfinite())
        assert bool(gradient.isfinite().all())


def test_a_block_that_is_not_the_gradient_of_its_rows_is_found() -> None:
    class Broken(Softmax):
        """Use it nowhere: `rows` are another loss than `block`."""

        def rows(self, logits: Tensor, positive: Tensor, columns: Columns) -> Tensor:
            return 2 * super().rows(logits, positive, columns)

    with pytest.raises(AssertionError, match="not close"):
        test_a_block_overwrites_logits_with_the_gradient_of_its_rows(Broken(), 0)
