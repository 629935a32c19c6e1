"""Pooling `ridge`: the user vector of alternating least squares, from the rows of a history."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from twotower.arrays.types import F32, Bool, Float, Shaped
from twotower.model.inputs.bag import Bag
from twotower.model.inputs.code_layout import Padded
from twotower.model.layers import gather
from twotower.model.pooling.pooling import Pooling, PoolingLayer, lower_known

if TYPE_CHECKING:
    from twotower.onnx.builder import GraphBuilder

MAX_NUMBERS_PER_PASS = 2**20
"""Numbers of padded rows in one pass: 4 MiB of float32, which fit a cache."""
GRADIENT_PASSES = 8
"""Factor of them with a gradient, which each pass has for the whole table, and off a CPU."""
TINY = 1e-30


class Ridge(Pooling):
    """Ridge regression: the vector u whose products with the n embeddings x_j of a row are nearest to 1.

        u = argmin sum_j (1 - x_j . u)^2 + u^T P u + n r |u|^2 = (sum_j x_j x_j^T + P + n r I)^-1 sum_j x_j

    Use it for tastes in no order. The penalties P, symmetric and positive, and r are trained with the embeddings. With
    P = a V^T V + a N r I over the N item vectors V it is a user's half step of iALS, as `start.kind = "ials"` sets it
    (Rendle et al. 2022, "Revisiting the Performance of iALS on Item Recommendation Benchmarks", equation 4 with
    exponent 1). It is solved by a fixed number of steps of conjugate gradients from 0 (Hestenes and Stiefel 1952),
    scaled by the diagonal of P + n r I. With a diagonal P, as a start has, a row of n interactions takes about n steps.
    With hundreds of interactions and small penalties the steps end before the solution, and depend on rounding.
    """

    kind = "ridge"
    research = ("penalty", "rate")
    rounding = 1e-3

    steps: int = Field(32, ge=1, description="Number of steps of conjugate gradients.")
    penalty: float = Field(1.0, gt=0, description="Initial penalty P, as a multiple of the identity.")
    rate: float = Field(0.01, gt=0, description="Initial penalty r of each interaction.")

    def build(self, width: int, name: str) -> RidgeLayer:
        return RidgeLayer(width, self)


class RidgeLayer(PoolingLayer):
    """Solution of a ridge regression; P = L L^T and r = exp(log_rate)."""

    def __init__(self, width: int, options: Ridge) -> None:
        super().__init__()
        self.width, self.steps, self.max_numbers = width, options.steps, MAX_NUMBERS_PER_PASS
        self.factor = nn.Parameter(math.sqrt(options.penalty) * torch.eye(width))
        self.log_rate = nn.Parameter(torch.tensor(math.log(options.rate)))

    @torch.no_grad()
    def set_penalties(self, penalty: F32[Tensor, "E E"], rate: float) -> None:
        """Overwrite P and r. Raises LinAlgError unless P is positive definite in float32."""
        diagonal = penalty.diagonal()
        if not diagonal.min() > torch.finfo(torch.float32).eps * diagonal.max():
            raise torch.linalg.LinAlgError("the least penalty is 0 in float32")  # type: ignore[attr-defined]
        self.factor.copy_(torch.linalg.cholesky(penalty.double()).float())
        self.log_rate.fill_(math.log(rate))

    @property
    def penalty(self) -> F32[Tensor, "E E"]:
        return self.factor @ self.factor.T

    def pool(self, rows: Float[Tensor, "U T E"], known: Bool[Tensor, "U T"]) -> Float[Tensor, "U E"]:
        with torch.autocast(rows.device.type, enabled=False):
            rows = rows.float() * known[:, :, None]
            of_rows = self.log_rate.exp() * known.sum(1)
            found: Tensor = _Solution.apply(rows, self.penalty, of_rows, self.steps)  # type: ignore[no-untyped-call]
            return found

    def pool_padded(self, table: Float[Tensor, "rows E"], padded: Padded) -> Float[Tensor, "U E"]:
        return self._pool_parts(table, (padded.codes >= 0).sum(1), lambda rows, longest: padded.codes[rows, :longest])

    def pool_bag(self, table: Float[Tensor, "rows E"], bag: Bag) -> Float[Tensor, "U E"]:
        if not len(bag.values):
            return self.pool_padded(table, bag.padded())

        def codes(rows: Shaped[Tensor, "u"], longest: int) -> Shaped[Tensor, "u T"]:
            place = torch.arange(longest, device=rows.device)
            known = place < bag.lengths[rows, None]
            return bag.values[(bag.offsets[rows, None] + place).where(known, 0)].long().where(known, -1)

        return self._pool_parts(table, bag.lengths, codes)

    def _pool_parts(
        self, table: Float[Tensor, "rows E"], lengths: Shaped[Tensor, "U"],
        codes_of: Callable[[Shaped[Tensor, "u"], int], Shaped[Tensor, "u T"]],
    ) -> Float[Tensor, "U E"]:  # fmt: skip
        """Pool rows of these lengths, rows of similar length together. `codes_of` pads rows to the longest of them."""
        is_costly = torch.is_grad_enabled() or table.device.type != "cpu"
        numbers = self.max_numbers * (GRADIENT_PASSES if is_costly else 1)
        order = torch.argsort(lengths, stable=True)
        parts, start, sizes = [table.new_zeros(0, self.width)], 0, lengths[order].clamp(min=1).tolist()
        while start < len(sizes):
            stop = start + 1
            while stop < len(sizes) and (stop + 1 - start) * sizes[stop] * self.width <= numbers:
                stop += 1
            codes = codes_of(order[start:stop], sizes[stop - 1])
            parts.append(self.pool(gather(table, codes.clamp(min=0)), codes >= 0))
            start = stop
        return torch.cat(parts).index_select(0, torch.argsort(order))

    def lower(self, g: GraphBuilder, table: str, codes: str) -> str:
        known = lower_known(g, codes)
        rows = g("Mul", g("Gather", table, codes, axis=0), g("Unsqueeze", known, g.constant([2])))
        transposed, last = g("Transpose", rows, perm=[0, 2, 1]), g.constant([2])
        of_rows = g("Mul", g.reduce("Sum", known, 1), g.constant(self.log_rate.exp()))
        penalty, tiny = g.constant(self.penalty), g.constant(TINY)

        def product(p: str) -> str:
            of_gram = g("MatMul", transposed, g("MatMul", rows, g("Unsqueeze", p, last)))
            of_penalty = g("Add", g("MatMul", p, penalty), g("Mul", of_rows, p))
            return g("Add", g("Squeeze", of_gram, last), of_penalty)

        diagonal = g("Add", of_rows, g.constant(self.penalty.diagonal()[None]))
        inverse = g("Div", g.constant(1.0), g("Max", diagonal, tiny))
        residual = g.reduce("Sum", rows, 1, keep=False)
        direction = g("Mul", residual, inverse)
        solution, square = "", g.reduce("Sum", g("Mul", residual, direction), 1)
        for step in range(self.steps):
            mapped = product(direction)
            curvature = g("Max", g.reduce("Sum", g("Mul", direction, mapped), 1), tiny)
            length = g("Div", square, curvature)
            move = g("Mul", length, direction)
            solution = g("Add", solution, move) if solution else move
            if step + 1 < self.steps:
                residual = g("Sub", residual, g("Mul", length, mapped))
                scaled = g("Mul", residual, inverse)
                before, square = square, g.reduce("Sum", g("Mul", residual, scaled), 1)
                turn = g("Div", square, g("Max", before, tiny))
                direction = g("Add", scaled, g("Mul", turn, direction))
        return solution


def conjugate_gradients(
    rows: F32[Tensor, "U T E"],
    penalty: F32[Tensor, "E E"],
    of_rows: F32[Tensor, "U"],
    right: F32[Tensor, "U E"],
    steps: int,
    start: F32[Tensor, "U E"] | None = None,
    weights: F32[Tensor, "U T"] | None = None,
    scaled: bool = False,
) -> F32[Tensor, "U E"]:
    """Return for each u the solution x of (rows_u^T W_u rows_u + penalty + of_rows_u I) x = right_u.

    Runs `steps` steps from `start`, None: 0. W is diagonal with `weights`, None: 1. `scaled` divides by the diagonal of
    penalty + of_rows_u I before each step."""

    def product(p: F32[Tensor, "U E"]) -> F32[Tensor, "U E"]:
        # Vectors on the left of their matrices, which a CPU multiplies faster.
        of_rows_p = torch.bmm(p[:, None], rows.transpose(1, 2))
        of_gram = torch.bmm(of_rows_p if weights is None else of_rows_p * weights[:, None], rows)[:, 0]
        return of_gram + p @ penalty + of_rows[:, None] * p

    inverse = 1 / (penalty.diagonal() + of_rows[:, None]).clamp(min=TINY) if scaled else torch.ones(())
    solution = torch.zeros_like(right) if start is None else start
    residual = right if start is None else right - product(start)
    direction = residual * inverse if scaled else residual
    square = (residual * direction).sum(1, keepdim=True)
    for _ in range(steps):
        mapped = product(direction)
        length = square / (direction * mapped).sum(1, keepdim=True).clamp(min=TINY)
        solution = solution + length * direction
        residual = residual - length * mapped
        turned = residual * inverse if scaled else residual
        before, square = square, (residual * turned).sum(1, keepdim=True)
        direction = turned + square / before.clamp(min=TINY) * direction
    return solution


class SolutionContext(Protocol):
    """Context of the backward pass."""

    steps: int
    saved_tensors: tuple[Shaped[Tensor, "*_"], ...]

    def save_for_backward(self, *tensors: Shaped[Tensor, "*_"]) -> None:
        """Store tensors as `saved_tensors`."""


class _Solution(torch.autograd.Function):
    """u = A^-1 sum_j x_j with A = sum_j x_j x_j^T + P + c I.

    With z = A^-1 g the gradients are z (1 - x_j . u) - u (x_j . z) for x_j, -z u^T for P, and -z . u for c."""

    @staticmethod
    def forward(
        ctx: SolutionContext, rows: F32[Tensor, "U T E"], penalty: F32[Tensor, "E E"], of_rows: F32[Tensor, "U"],
        steps: int,
    ) -> F32[Tensor, "U E"]:  # fmt: skip
        found = conjugate_gradients(rows, penalty, of_rows, rows.sum(1), steps, scaled=True)
        ctx.save_for_backward(rows, penalty, of_rows, found)
        ctx.steps = steps
        return found

    @staticmethod
    def backward(ctx: SolutionContext, *grads: F32[Tensor, "U E"]) -> tuple[Shaped[Tensor, "*_"] | None, ...]:
        rows, penalty, of_rows, u = ctx.saved_tensors
        z = conjugate_gradients(rows, penalty, of_rows, grads[0].contiguous(), ctx.steps, scaled=True)
        of_u, of_z = (torch.bmm(v[:, None], rows.transpose(1, 2)).transpose(1, 2) for v in (u, z))
        gradient = z[:, None] * (1 - of_u) - u[:, None] * of_z
        outer = z.T @ u
        return gradient, -(outer + outer.T) / 2, -(z * u).sum(1), None
