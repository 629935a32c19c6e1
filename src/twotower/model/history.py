"""Means of a history that decay with age, at many moments of it in one pass.

The state of a mean at rate r is one vector, s <- r s + x, so a service keeps it up to date in constant time for each
event. In training the states at all moments are wanted: within a chunk they are one product with a triangular
matrix, and the states at the ends of the chunks before are carried over in as many rounds as the longest sequence's
number of chunks has bits (the chunked form of a linear recurrence, as in Dao and Gu 2024, "Transformers are SSMs",
section 6; the rounds are those of Hillis and Steele 1986, "Data Parallel Algorithms").
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from twotower.data.batches import SCAN_CHUNK, Prefixes
from twotower.model.layers import gather


def decayed_means(table: Tensor, known: Prefixes, rates: tuple[float, ...]) -> Tensor:
    """Table (rows, E) and U moments -> (U, R E): per rate the sum of rate^n x_n over the sum of rate^n, x_n the row of
    the interaction n places before the latest; zeros where nothing is known."""
    sums = decayed_sums(table, known, rates)
    scale = torch.stack([inverse_weight_sum(known.length, r) for r in rates], 1).to(sums.dtype)
    return (sums.view(len(sums), len(rates), -1) * scale[:, :, None]).flatten(1)


def inverse_weight_sum(n: Tensor, rate: float) -> Tensor:
    """1 / (1 + rate + … + rate^(n-1)), and 0 for n = 0."""
    n = n.float()
    total = n if rate == 1 else (1 - rate**n) / (1 - rate)
    return torch.where(n > 0, 1 / total.clamp(min=1e-12), 0.0)


def decayed_sums(table: Tensor, known: Prefixes, rates: tuple[float, ...]) -> Tensor:
    """As `decayed_means`, not divided: (U, R E)."""
    device = table.device
    x = gather(table, known.codes)  # (K, CHUNK, E)
    rate = torch.tensor(rates, device=device)
    place = torch.arange(SCAN_CHUNK, device=device)
    age = place[:, None] - place  # of the interaction in the column, seen from the row's
    within = torch.where(age >= 0, rate[:, None, None] ** age.clamp(min=0), 0.0)  # (R, CHUNK, CHUNK)
    states = within.transpose(0, 1).reshape(SCAN_CHUNK * len(rates), SCAN_CHUNK) @ x  # (K, CHUNK R, E)
    ends = states[:, -len(rates) :]  # (K, R, E)
    # The states at the ends of whole sequences, by doubling: a round reaches twice as far back as the one before.
    held, far, longest = ends, 1, int(known.number.max()) + 1
    while far < longest:
        reach = torch.where(known.number[:, None] >= far, rate ** (far * SCAN_CHUNK), 0.0).to(ends.dtype)  # (K, R)
        held = held + _shift_chunks(held, far) * reach[:, :, None]
        far *= 2
    carried = _shift_chunks(held, 1) * (known.number > 0).to(ends.dtype)[:, None, None]  # (K, R, E)
    at = states.reshape(-1, len(rates), x.shape[2]).index_select(0, known.last)
    steps = rate ** (known.last % SCAN_CHUNK + 1)[:, None]  # (U, R)
    sums = at + carried.index_select(0, known.last // SCAN_CHUNK) * steps.to(at.dtype)[:, :, None]
    return (sums * (known.length > 0).to(sums.dtype)[:, None, None]).flatten(1)


def _shift_chunks(x: Tensor, places: int) -> Tensor:
    """(K, R, E) moved `places` chunks on, zeros before."""
    return nn.functional.pad(x[:-places], (0, 0, 0, 0, places, 0))
