"""Pooling `decay`: exponentially decayed means at several rates, for many prefixes in one pass.

The state at rate r is one vector, s <- r s + x: a service updates it in constant time per event. Training needs the
states of all prefixes. Within a chunk they are one product with a triangular matrix; the states at the ends of earlier
chunks are added by a parallel scan of ceil(log2(chunks of the longest sequence)) rounds (chunked linear recurrence, Dao
and Gu 2024, "Transformers are SSMs", section 6; scan of Hillis and Steele 1986, "Data Parallel Algorithms").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from twotower.arrays.types import F32, Bool, Float, Shaped
from twotower.model.inputs.bag import Bag
from twotower.model.inputs.code_layout import SCAN_CHUNK, Prefixes
from twotower.model.layers import gather
from twotower.model.pooling.pooling import Pooling, PoolingLayer, lower_known

if TYPE_CHECKING:
    from twotower.onnx.builder import GraphBuilder


Rate = Annotated[float, Field(ge=0, le=1)]


class Decay(Pooling):
    """Exponentially decayed means sum_n r^n x_n / sum_n r^n for each rate r, x_n the n-th latest embedding.

    Use it when recent interactions matter most. It needs `train.history_scope = "causal"`.
    """

    kind = "decay"
    needs_time_order = True
    rates: tuple[Rate, ...] = Field(
        (0.0, 0.5, 0.8, 0.93, 0.98, 1.0),
        min_length=1,
        description="Rates r: the n-th latest interaction has the weight r^n. 0: the latest only. 1: the plain mean.",
    )

    @property
    def pieces(self) -> int:
        return len(self.rates)

    @property
    def decay_rates(self) -> tuple[float, ...]:
        return self.rates

    def build(self, width: int, name: str) -> DecayLayer:
        return DecayLayer(width, self.rates)


class DecayLayer(PoolingLayer):
    """Decayed means: R rates, (U, R E)."""

    def __init__(self, width: int, rates: tuple[float, ...]) -> None:
        super().__init__()
        self.width, self.rates = width, rates

    def pool(self, rows: Float[Tensor, "U T E"], known: Bool[Tensor, "U T"]) -> Float[Tensor, "U RE"]:
        position = torch.arange(known.shape[1], device=known.device)
        age = (known.sum(1)[:, None] - 1 - position).clamp(min=0)
        weights = torch.stack([torch.pow(torch.tensor(r), age) for r in self.rates], 1) * known[:, None]  # (U, R, T)
        weights = weights / weights.sum(2, keepdim=True).clamp(min=1e-12)
        return (weights.to(rows.dtype) @ rows).flatten(1)

    def pool_prefixes(self, table: Float[Tensor, "rows E"], prefixes: Prefixes) -> Float[Tensor, "U RE"]:
        return decayed_means(table, prefixes, self.rates)

    def pool_bag(self, table: Float[Tensor, "rows E"], bag: Bag) -> Float[Tensor, "U RE"]:
        n = bag.lengths
        row = torch.repeat_interleave(torch.arange(len(n), device=n.device), n)
        age = bag.offsets[1:][row] - 1 - torch.arange(len(row), device=n.device)
        out = []
        for rate in self.rates:
            codes, ages, offsets = bag.values, age, bag.offsets
            if limit := reach([rate]):
                codes, ages = codes[age < limit], age[age < limit]
                offsets = nn.functional.pad(n.clamp(max=limit).cumsum(0), (1, 0)).to(offsets.dtype)
            weights = torch.pow(torch.tensor(rate, dtype=table.dtype, device=n.device), ages)
            total = nn.functional.embedding_bag(
                codes, table, offsets, mode="sum", include_last_offset=True, per_sample_weights=weights
            )
            out.append(total * inverse_weight_sum(n, rate).to(total.dtype)[:, None])
        return torch.cat(out, 1)

    def lower(self, g: GraphBuilder, table: str, codes: str) -> str:
        if limit := reach(self.rates):
            codes = lower_latest(g, codes, limit)
        known = lower_known(g, codes)
        age = g("Unsqueeze", g("Sub", g.reduce("Sum", known, 1), g("CumSum", known, g.constant(1))), g.constant([1]))
        # rate^age = exp(age log rate): the Pow of onnxruntime takes twenty times as long. e^-1000 is 0.
        rates = g.constant(np.array([math.log(r) if r else -1000.0 for r in self.rates], np.float32)[:, None])
        weights = g("Mul", g("Exp", g("Mul", rates, age)), g("Unsqueeze", known, g.constant([1])))  # (U, R, T)
        weights = g("Div", weights, g("Max", g.reduce("Sum", weights, 2), g.constant(1e-12)))
        rows = g("Gather", table, codes, axis=0)  # (U, T, width); -1 reads a row of weight 0
        return g.reshape(g("MatMul", weights, rows), self.width * len(self.rates))


def lower_latest(g: GraphBuilder, codes: str, n: int) -> str:
    """Build the `n` latest codes of each row: (U, min(n, T)), -1 before the first code of a shorter row."""
    columns = g("Min", g("Shape", codes, start=1, end=2), g.constant([n]))
    first = g("Sub", g.constant(1), g("Squeeze", columns))
    places = g("Range", first, g.constant(1), g.constant(1))  # 1 - min(n, T), …, 0
    length = g.reduce("Sum", g("Cast", lower_known(g, codes), to=g.onnx.TensorProto.INT64), 1)  # (U, 1)
    none = g("Sub", g("Mul", length, g.constant(0)), g.constant(1))
    place = g("Max", g("Add", length, places), g.constant(0))  # 0 before the first code
    return g("GatherElements", g("Concat", none, codes, axis=1), place, axis=1)


def decayed_means(table: Float[Tensor, "rows E"], prefixes: Prefixes, rates: Sequence[float]) -> Float[Tensor, "U RE"]:
    """Return sum_n rate^n x_n / sum_n rate^n for U prefixes and R rates, x_n the row of the n-th latest interaction."""
    sums = decayed_sums(table, prefixes, rates)
    scale = torch.stack([inverse_weight_sum(prefixes.length, r) for r in rates], 1).to(sums.dtype)
    return (sums.view(len(sums), len(rates), -1) * scale[:, :, None]).flatten(1)


def inverse_weight_sum(n: Shaped[Tensor, "U"], rate: float) -> F32[Tensor, "U"]:
    """Return 1 / (1 + rate + … + rate^(n-1)) for each n, and 0 where n = 0."""
    n = n.float()
    total = n if rate == 1 else (1 - rate**n) / (1 - rate)
    return torch.where(n > 0, 1 / total.clamp(min=1e-12), 0.0)


def reach(rates: Sequence[float]) -> int | None:
    """Return the number of latest interactions with all but 2^-24 of the weight at each rate; None if a rate is 1."""
    largest = max(rates)
    if largest == 1:
        return None
    return 1 if largest == 0 else math.ceil(24 * math.log(2) / -math.log(largest))


def decayed_sums(table: Float[Tensor, "rows E"], prefixes: Prefixes, rates: Sequence[float]) -> Float[Tensor, "U RE"]:
    """Return the sums sum_n rate^n x_n of `decayed_means`, before the division."""
    device = table.device
    x = gather(table, prefixes.codes)  # (K, SCAN_CHUNK, E)
    rate = torch.tensor(rates, device=device)
    position = torch.arange(SCAN_CHUNK, device=device)
    age = position[:, None] - position  # steps from the interaction of the column to that of the row
    within = torch.where(age >= 0, rate[:, None, None] ** age.clamp(min=0), 0.0)  # (R, SCAN_CHUNK, SCAN_CHUNK)
    states = within.transpose(0, 1).reshape(SCAN_CHUNK * len(rates), SCAN_CHUNK) @ x  # (K, SCAN_CHUNK R, E)
    ends = states[:, -len(rates) :]  # (K, R, E)
    # States at the ends of chunks over whole sequences: each round covers twice as many chunks.
    totals, distance, longest = ends, 1, int(prefixes.number.max()) + 1
    while distance < longest:
        decay = torch.where(prefixes.number[:, None] >= distance, rate ** (distance * SCAN_CHUNK), 0.0)  # (K, R)
        totals = totals + _shift_chunks(totals, distance) * decay.to(ends.dtype)[:, :, None]
        distance *= 2
    carried = _shift_chunks(totals, 1) * (prefixes.number > 0).to(ends.dtype)[:, None, None]  # (K, R, E)
    own = states.reshape(-1, len(rates), x.shape[2]).index_select(0, prefixes.last)
    steps = rate ** (prefixes.last % SCAN_CHUNK + 1)[:, None]  # (U, R)
    sums = own + carried.index_select(0, prefixes.last // SCAN_CHUNK) * steps.to(own.dtype)[:, :, None]
    return (sums * (prefixes.length > 0).to(sums.dtype)[:, None, None]).flatten(1)


def _shift_chunks(x: Float[Tensor, "K R E"], chunks: int) -> Float[Tensor, "K R E"]:
    """Shift by `chunks` along the first axis and fill the start with zeros."""
    return nn.functional.pad(x[:-chunks], (0, 0, 0, 0, chunks, 0))
