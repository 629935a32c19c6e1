"""Contrastive losses of a batch, in blocks of rows, with gradients from the same pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from twotower.arrays.types import F32, Float, Shaped
from twotower.train.losses.loss import Columns, ContrastiveLoss
from twotower.train.negatives.candidates import Candidates, SeenVersions

MAX_BLOCK_LOGITS = 2**21
"""Default number of logits that `contrastive_loss` holds at a time: 8 MiB of float32."""


def contrastive_loss(
    users: Float[Tensor, "B D"], items: Float[Tensor, "V D"], candidates: Candidates, loss: ContrastiveLoss,
    n_items: int, dtype: torch.dtype = torch.float32, total_weight: float = 0.0,
    max_block_logits: int = MAX_BLOCK_LOGITS, versions: SeenVersions | None = None,
) -> F32[Tensor, ""]:  # fmt: skip
    """Return the weighted mean loss of B positives against their candidates.

    - `users`: vectors of the positives' users.
    - `items`: vectors of `candidates.items`, then of the cross-batch memory. With `versions` there is no memory, and
      they are the vectors of all X versions; each positive is compared with the versions at its time.
    - `n_items`: size of the catalogue.
    - `dtype`: type of the matrix products.
    - `total_weight`: weight of a whole batch. If it is set, the B positives are a part of that batch, and the result is
      their part of its mean.
    - `max_block_logits`: maximum number of logits held at a time, but at least 16 rows.
    """
    c = candidates
    shared = items[: len(c.log_q)] if not len(c.memory_items) else torch.cat([items[: c.shared], items[len(c.items) :]])
    if versions is not None:
        shared = items[: versions.shared]
    own = None
    if c.per_positive.shape[1]:
        places = c.per_positive.clamp(min=0)
        if versions is not None:
            places = versions.find(places)
        vectors = items.index_select(0, places.flatten()).view(*c.per_positive.shape, -1)
        own = torch.einsum("bd,bhd->bh", users, vectors).masked_fill(c.per_positive < 0, -torch.inf)
    shifts = loss.shifts(c.counts, c.log_q)
    draws = torch.cat([c.counts, torch.ones(c.per_positive.shape[1], device=c.counts.device)])
    columns = Columns(draws, n_items)

    def block_loss(logits: F32[Tensor, "b C"], own: Float[Tensor, "b H"] | None, rows: slice) -> BlockGradients:
        """Turn logits of a block, and of the rows' own negatives, into the loss and its gradients."""
        positive, seen, shape = c.positive[rows, None], None, logits.shape
        if versions is not None:
            seen = versions.of_shared(rows)
            logits = logits.gather(1, seen)
        chosen = logits.gather(1, positive)
        if shifts:
            logits += shifts.candidates
        c.mask_excluded(logits, rows)
        if own is not None and c.margins is not None:
            own.masked_fill_(own > chosen - c.margins, -torch.inf)
        if shifts:
            chosen = chosen + shifts.positives[positive]
            own = None if own is None else own.add_(shifts.positives[positive])
        logits.scatter_(1, positive, chosen)
        row_logits = logits if own is None else torch.cat([logits, own], 1)
        value = loss.block(row_logits, positive, columns, c.weights[rows, None])
        n = logits.shape[1]
        gradient = row_logits[:, :n]
        if seen is not None:
            gradient = gradient.new_zeros(shape).scatter_(1, seen, gradient)
        return BlockGradients(value, gradient, None if own is None else row_logits[:, n:])

    mean: Tensor = _BlockwiseMean.apply(  # type: ignore[no-untyped-call]
        users, shared, own, block_loss, dtype, total_weight or float(c.weights.sum()), max_block_logits
    )
    return mean


class BlockGradients(NamedTuple):
    """Sum of the losses of a block of rows, and its gradients by the logits."""

    value: F32[Tensor, ""]
    logits: F32[Tensor, "b C"]
    own: Float[Tensor, "b H"] | None


BlockLoss = Callable[[Tensor, Tensor | None, slice], BlockGradients]
"""(logits (b, C), own logits (b, H) or None, rows of the batch) -> the sum of the losses, and both gradients."""


class LossContext(Protocol):
    """Attributes of the backward pass's context."""

    saved_tensors: tuple[Shaped[Tensor, "*_"], ...]

    def save_for_backward(self, *tensors: Shaped[Tensor, "*_"]) -> None:
        """Keep tensors as `saved_tensors`."""


class _BlockwiseMean(torch.autograd.Function):
    """Mean loss, over rows of total weight n, of the logits users @ shared.T, in blocks, with gradients from the same
    pass."""

    @staticmethod
    def forward(
        ctx: LossContext, users: Float[Tensor, "B D"], shared: Float[Tensor, "C D"], own: Float[Tensor, "B H"] | None,
        block_loss: BlockLoss, dtype: torch.dtype, n: float, max_block_logits: int,
    ) -> F32[Tensor, ""]:  # fmt: skip
        u, v = users.to(dtype), shared.to(dtype)
        vt = v.T.contiguous()
        user_gradient = torch.empty_like(users)
        shared_gradient = torch.zeros(shared.shape, dtype=torch.float32, device=shared.device)
        own_gradient = None if own is None else torch.empty_like(own)
        total = torch.zeros((), dtype=torch.float64 if users.device.type == "cpu" else torch.float32)
        total = total.to(users.device)
        step = max(16, max_block_logits // len(shared))
        for start in range(0, len(users), step):
            rows = slice(start, start + step)
            logits = (u[rows] @ vt).float()
            own_logits = None if own is None else own[rows].clone()
            value, gradient, block_own_gradient = block_loss(logits, own_logits, rows)
            total += value
            g = gradient.to(dtype)
            user_gradient[rows] = g @ v
            shared_gradient += g.T @ u[rows]
            if own_gradient is not None and block_own_gradient is not None:
                own_gradient[rows] = block_own_gradient
        gradients = [user_gradient.div_(n), shared_gradient.div_(n)]
        ctx.save_for_backward(*gradients, *([] if own_gradient is None else [own_gradient.div_(n)]))
        return (total / n).float()

    @staticmethod
    def backward(ctx: LossContext, *grads: F32[Tensor, ""]) -> tuple[Shaped[Tensor, "*_"] | None, ...]:
        user_gradient, shared_gradient, *own_gradient = ctx.saved_tensors
        g = grads[0]
        own = own_gradient[0] * g if own_gradient else None
        return user_gradient * g, shared_gradient * g, own, None, None, None, None
