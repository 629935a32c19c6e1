"""Exponentially decayed means of histories at several rates, for many prefixes in one pass.

The state at rate r is one vector, s <- r s + x, so a service updates it in constant time per event. Training needs the
states of all prefixes: within a chunk they are one product with a triangular matrix, and the states at the ends of the
earlier chunks are added by a parallel scan of ceil(log2(chunks of the longest sequence)) rounds (the chunked form of a
linear recurrence, as in Dao and Gu 2024, "Transformers are SSMs", section 6; scan of Hillis and Steele 1986, "Data
Parallel Algorithms").
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from twotower.arrays.types import F32, Float, Shaped
from twotower.model.inputs.prefixes import SCAN_CHUNK, Prefixes
from twotower.model.layers import gather


def decayed_means(
    table: Float[Tensor, "rows E"], prefixes: Prefixes, rates: tuple[float, ...]
) -> Float[Tensor, "U RE"]:
    """Return for U prefixes for each of R rates sum_n rate^n x_n / sum_n rate^n, x_n the
    row of the interaction n steps before the latest; zeros for an empty prefix."""
    sums = decayed_sums(table, prefixes, rates)
    scale = torch.stack([inverse_weight_sum(prefixes.length, r) for r in rates], 1).to(sums.dtype)
    return (sums.view(len(sums), len(rates), -1) * scale[:, :, None]).flatten(1)


def inverse_weight_sum(n: Shaped[Tensor, "U"], rate: float) -> F32[Tensor, "U"]:
    """Return 1 / (1 + rate + … + rate^(n-1)) for each n, and 0 where n = 0."""
    n = n.float()
    total = n if rate == 1 else (1 - rate**n) / (1 - rate)
    return torch.where(n > 0, 1 / total.clamp(min=1e-12), 0.0)


def reach(rates: Sequence[float]) -> int | None:
    """Return the number of latest interactions that have all but 2^-24 of the weight at each of the rates, less than float32
    rounds away; None if a rate is 1."""
    largest = max(rates)
    if largest == 1:
        return None
    return 1 if largest == 0 else math.ceil(24 * math.log(2) / -math.log(largest))


def decayed_sums(table: Float[Tensor, "rows E"], prefixes: Prefixes, rates: tuple[float, ...]) -> Float[Tensor, "U RE"]:
    """Return the sums sum_n rate^n x_n of `decayed_means`, before the division."""
    device = table.device
    x = gather(table, prefixes.codes)  # (K, SCAN_CHUNK, E)
    rate = torch.tensor(rates, device=device)
    position = torch.arange(SCAN_CHUNK, device=device)
    age = position[:, None] - position  # steps from the interaction of the column to that of the row
    within = torch.where(age >= 0, rate[:, None, None] ** age.clamp(min=0), 0.0)  # (R, SCAN_CHUNK, SCAN_CHUNK)
    states = within.transpose(0, 1).reshape(SCAN_CHUNK * len(rates), SCAN_CHUNK) @ x  # (K, SCAN_CHUNK R, E)
    ends = states[:, -len(rates) :]  # (K, R, E)
    # The states at the ends of chunks over whole sequences, by doubling: each round covers twice as many chunks.
    totals, distance, longest = ends, 1, int(prefixes.number.max()) + 1
    while distance < longest:
        decay = torch.where(prefixes.number[:, None] >= distance, rate ** (distance * SCAN_CHUNK), 0.0).to(
            ends.dtype
        )  # (K, R)
        totals = totals + _shift_chunks(totals, distance) * decay[:, :, None]
        distance *= 2
    carried = _shift_chunks(totals, 1) * (prefixes.number > 0).to(ends.dtype)[:, None, None]  # (K, R, E)
    own = states.reshape(-1, len(rates), x.shape[2]).index_select(0, prefixes.last)
    steps = rate ** (prefixes.last % SCAN_CHUNK + 1)[:, None]  # (U, R)
    sums = own + carried.index_select(0, prefixes.last // SCAN_CHUNK) * steps.to(own.dtype)[:, :, None]
    return (sums * (prefixes.length > 0).to(sums.dtype)[:, None, None]).flatten(1)


def _shift_chunks(x: Float[Tensor, "K R E"], chunks: int) -> Float[Tensor, "K R E"]:
    """Shift by `chunks` along the first axis and fill the start with zeros."""
    return nn.functional.pad(x[:-chunks], (0, 0, 0, 0, chunks, 0))
