"""Narrow vectors: linear maps of the wide vectors of a model, whose products come near the wide ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from twotower.arrays.types import F32, Shaped
from twotower.features.field import InputField
from twotower.features.side import SideName
from twotower.model.inputs import stacked
from twotower.model.inputs.code_layout import Inputs

if TYPE_CHECKING:
    from twotower.onnx.builder import GraphBuilder

PREFIX = "narrow."
"""Beginning of the names of the weights in a model."""


class Narrow(nn.Module):
    """The last layer of both towers: a map of the wide vector, of an item less a centre, and of an item with a known id
    a row added to it.

    An item that training lacks has the map alone. Columns of biases are not a part of these vectors.
    """

    def __init__(
        self, user_map: F32[Tensor, "W k"], item_map: F32[Tensor, "W k"], rows: F32[Tensor, "n k"],
        centre: F32[Tensor, "W"], item_fields: tuple[InputField, ...],
    ) -> None:  # fmt: skip
        """Take the maps, the rows of the ids of items by their codes, and what all wide vectors of items have in
        common; no rows: nothing is added."""
        super().__init__()
        self.user_map, self.item_map, self.rows, self.centre = (
            nn.Parameter(numbers.contiguous(), requires_grad=False) for numbers in (user_map, item_map, rows, centre)
        )
        lookups = stacked(item_fields)
        self._column = next((n for n, f in enumerate(lookups) if f.identifies and len(rows)), -1)

    @classmethod
    def of(cls, weights: Mapping[str, Shaped[Tensor, "*_"]], item_fields: tuple[InputField, ...]) -> Narrow | None:
        """Return the layer in the weights of a model by name; None if they hold none."""
        names = [f"{PREFIX}{name}" for name in ("user_map", "item_map", "rows", "centre")]
        if names[0] not in weights:
            return None
        user_map, item_map, rows, centre = (weights[name] for name in names)
        return cls(user_map, item_map, rows, centre, item_fields)

    @property
    def width(self) -> int:
        return self.user_map.shape[1]

    def users(self, wide: F32[Tensor, "U W"]) -> F32[Tensor, "U k"]:
        """Return narrow vectors of users."""
        return wide @ self.user_map

    def items(self, wide: F32[Tensor, "I W"], inputs: Inputs) -> F32[Tensor, "I k"]:
        """Return narrow vectors of items."""
        found = (wide - self.centre) @ self.item_map
        return found if self._column < 0 else found + self.rows[inputs.lookup[:, self._column].long()]

    def lower(self, g: GraphBuilder, side: SideName, wide: str) -> str:
        """Build `users` or `items`."""
        if side == "user":
            return g("MatMul", wide, g.constant(self.user_map, "narrow_user"))
        centred = g("Sub", wide, g.constant(self.centre, "narrow_centre"))
        found = g("MatMul", centred, g.constant(self.item_map, "narrow_item"))
        if self._column < 0:
            return found
        codes = g("Gather", "lookup", g.constant(torch.tensor(self._column)), axis=1)
        return g("Add", found, g("Gather", g.constant(self.rows, "narrow_rows"), codes, axis=0))
