"""Contrastive losses of a batch, one block of rows at a time, with gradients from the same pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from twotower.train.losses import LossConfig, bpr, gbce, gbce_beta, softmax
from twotower.train.negatives.candidates import Candidates

MAX_BLOCK_LOGITS = 2**21
"""Logits that `contrastive_loss` holds at a time, by default: 8 MiB of float32."""


def contrastive_loss(
    users: Tensor,
    items: Tensor,
    candidates: Candidates,
    config: LossConfig,
    n_items: int,
    margin: float = 0.0,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 0,
    max_block_logits: int = MAX_BLOCK_LOGITS,
) -> Tensor:
    """Return the mean loss of B positives against their candidates, a scalar.

    `users` (B, D) are the vectors of the positives' users; `items` (I + M, D) those of `candidates.items` and, after them,
    of the cross-batch memory. `n_items` is the size of the catalogue. A hard negative that scores within `margin` of the
    positive is left out, if `margin` > 0. `dtype` is that of the matrix products. With `batch_size` the B positives are a
    part of a batch of that size, and the result is their part of its mean. At most `max_block_logits` logits, but at least
    those of 16 rows, are held at a time.

    The softmax subtracts `log_q` from each candidate's logit (Yi et al. 2019, section 3) unless the config disables it. A
    candidate that was drawn n times counts n times.
    """
    c = candidates
    shared = items[: len(c.log_q)] if not len(c.memory_items) else torch.cat([items[: c.shared], items[len(c.items) :]])
    own = None
    if c.per_positive.shape[1]:
        vectors = items.index_select(0, c.per_positive.clamp(min=0).flatten()).view(*c.per_positive.shape, -1)
        own = torch.einsum("bd,bhd->bh", users, vectors).masked_fill(c.per_positive < 0, -torch.inf)
    correction = c.log_q if config.log_q else torch.zeros_like(c.log_q)
    offset = c.counts.log() - correction
    counts = torch.cat([c.counts, torch.ones(c.per_positive.shape[1], device=c.counts.device)])

    def block_loss(logits: Tensor, own: Tensor | None, rows: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        """Turn a block of logits (b, C), and those of the rows' own negatives (b, H), into its loss and their gradients."""
        positive = c.positive[rows, None]
        chosen = logits.gather(1, positive)
        if config.kind == "softmax":
            logits += offset
        c.mask_excluded(logits, rows)
        if own is not None and margin and c.hard:
            own[:, -c.hard :].masked_fill_(own[:, -c.hard :] > chosen - margin, -torch.inf)
        logits.scatter_(1, positive, chosen - (correction[positive] if config.kind == "softmax" else 0.0))
        if own is not None and config.kind == "softmax":
            # A per-positive negative is as certain to be present as the positive, and competes with it alone.
            own -= correction[positive]
        row_logits = logits if own is None else torch.cat([logits, own], 1)
        if config.kind == "softmax":
            value = softmax(row_logits, positive)
        elif config.kind == "bpr":
            value = bpr(row_logits, positive, counts)
        else:
            beta = gbce_beta(config.calibration, float((counts > 0).sum()), n_items)
            value = gbce(row_logits, positive, counts, beta)
        n = logits.shape[1]
        return value, row_logits[:, :n], None if own is None else row_logits[:, n:]

    loss: Tensor = _ContrastiveLoss.apply(  # type: ignore[no-untyped-call]
        users, shared, own, block_loss, dtype, batch_size or len(users), max_block_logits
    )
    return loss


BlockLoss = Callable[[Tensor, Tensor | None, slice], tuple[Tensor, Tensor, Tensor | None]]
"""(logits (b, C), own logits (b, H) or None, rows of the batch) -> the sum of their losses, and both gradients."""


class LossContext(Protocol):
    """Part of the backward pass's context that the loss uses."""

    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *tensors: Tensor) -> None:
        """Keep tensors as `saved_tensors`."""


class _ContrastiveLoss(torch.autograd.Function):
    """The mean over n rows of a loss of the logits users @ shared.T, block by block, with gradients from the same pass."""

    @staticmethod
    def forward(
        ctx: LossContext,
        users: Tensor,
        shared: Tensor,
        own: Tensor | None,
        block_loss: BlockLoss,
        dtype: torch.dtype,
        n: int,
        max_block_logits: int,
    ) -> Tensor:
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
    def backward(ctx: LossContext, *grads: Tensor) -> tuple[Tensor | None, ...]:
        user_gradient, shared_gradient, *own_gradient = ctx.saved_tensors
        g = grads[0]
        own = own_gradient[0] * g if own_gradient else None
        return user_gradient * g, shared_gradient * g, own, None, None, None, None
