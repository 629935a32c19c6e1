"""Batches: the inputs of both towers, and the pairs that join them.

A batch holds its distinct users and items once, so that each tower runs once per distinct row. A user tower that reads the
context runs once per distinct interaction. A batch knows which of its pairs
are training interactions, so that no history contains its target.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from twotower.arrays.sets import DistinctRows
from twotower.arrays.types import F32, I64, Floats, Ints, Shaped, WholeNumbers
from twotower.model.inputs.code_layout import Inputs
from twotower.model.inputs.side_tensors import SideTensors


@dataclass(frozen=True)
class Batch:
    """B pairs over U distinct users and I distinct items."""

    users: Inputs
    items: Inputs
    user: I64[Tensor, "B"]  # into the U users
    item: I64[Tensor, "B"]  # into the I items
    label: F32[Tensor, "B"]  # 0 or 1
    weight: F32[Tensor, "B"]

    def __len__(self) -> int:
        return len(self.label)


@dataclass(frozen=True)
class ContrastiveBatch:
    """B positives and the items of their candidates."""

    users: Inputs
    items: Inputs
    user: I64[Tensor, "B"] | None  # into the users; None: user b belongs to positive b


class Batcher:
    """Makes batches on the device from aligned arrays of pairs."""

    def __init__(self, users: SideTensors, items: SideTensors) -> None:
        self.users, self.items = users, items
        self._distinct_users, self._distinct_items = DistinctRows(users.n), DistinctRows(items.n)

    def __call__(
        self,
        user: Shaped[WholeNumbers, "B"],
        item: Shaped[WholeNumbers, "B"],
        label: Shaped[Floats, "B"],
        weight: Shaped[Floats, "B"],
        source: Shaped[Ints, "n"],
        moments: Shaped[Ints, "B"] | None = None,
    ) -> Batch:
        """Return the batch of B labelled pairs. `source` are the indices of all interactions of the batch, negative for a
        sampled pair; the B pairs may be one rank's part of the batch. `moments` are those of the B pairs, which a tower that
        reads the context needs; a drawn pair of ~i has the context of interaction i."""
        if self.users.has_context:
            assert moments is not None
            interactions, first, user_index = np.unique(
                np.maximum(moments, ~moments), return_index=True, return_inverse=True
            )
            users = user[first].astype(np.int64)
        else:
            interactions = None
            users, user_index = self._distinct_users(user)
        items, item_index = self._distinct_items(item)
        left_out = source[source >= 0] if self.users.has_sequences or self.items.has_sequences else None
        device = self.users.device
        return Batch(
            self.users.take(users, left_out, interactions),
            self.items.take(items, left_out),
            torch.from_numpy(user_index).to(device),
            torch.from_numpy(item_index).to(device),
            torch.from_numpy(label).to(device),
            torch.from_numpy(weight).to(device),
        )

    def contrastive_batch(
        self,
        user: Shaped[WholeNumbers, "B"],
        source: Shaped[Ints, "B"],
        items: Shaped[Ints, "I"],
        earlier: bool,
        batch: Shaped[Ints, "n"] | None = None,
    ) -> ContrastiveBatch:
        """Return the inputs of the positives with the interaction indices `source`, and of the item rows `items`.

        With `earlier`, user b has the history before interaction b. Otherwise each distinct user is taken once, with a context
        once for each positive, and no sequence holds an interaction of the batch, whose indices are `batch`, or `source` if that
        is None.
        """
        if earlier:
            return ContrastiveBatch(self.users.take_before(user.astype(np.int64), source), self.items.take(items), None)
        left_out = None
        if self.users.has_sequences or self.items.has_sequences:
            left_out = source if batch is None else batch
        if self.users.has_context:
            inputs = self.users.take(user.astype(np.int64), left_out, source)
            return ContrastiveBatch(inputs, self.items.take(items, left_out), None)
        users, index = self._distinct_users(user)
        return ContrastiveBatch(
            self.users.take(users, left_out),
            self.items.take(items, left_out),
            torch.from_numpy(index).to(self.users.device),
        )
