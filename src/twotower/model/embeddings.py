"""One side's encoded columns -> field embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from twotower.data.batches import Bag, Inputs
from twotower.encoders import UNKNOWN, Field
from twotower.errors import ConfigError


class _Pool(torch.autograd.Function):
    """Sum of table rows per bag. The backward pass is the same sum over the transposed bag: no atomic adds, so
    it is as fast as the forward pass and gives the same bits every time."""

    @staticmethod
    def forward(ctx: FunctionCtx, table: Tensor, bag: Bag) -> Tensor:
        ctx.bag = bag  # type: ignore[attr-defined]
        return _bag_sum(table, bag.values, bag.offsets)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        bag: Bag = ctx.bag
        return _bag_sum(grads[0].contiguous(), bag.rows_by_code, bag.code_offsets), None


def _bag_sum(table: Tensor, values: Tensor, offsets: Tensor) -> Tensor:
    return nn.functional.embedding_bag(values, table, offsets, mode="sum", include_last_offset=True)


def pool(table: Tensor, bag: Bag, pooling: str) -> Tensor:
    """Table (rows, E) and a bag of U rows -> (U, E): the sum divided by n (mean), sqrt(n) or 1; empty gives 0."""
    total: Tensor = _Pool.apply(table, bag)  # type: ignore[no-untyped-call]
    if pooling == "sum":
        return total
    n = (bag.offsets[1:] - bag.offsets[:-1]).clamp(min=1).to(total.dtype)
    return total / (n if pooling == "mean" else n.sqrt())[:, None]


class FieldEmbeddings(nn.Module):
    """The fields of one tower, each (U, its width).

    All lookups of one width live in one table, a field after the other, so that a batch costs one gather.
    """

    def __init__(self, fields: tuple[Field, ...], all_fields: tuple[Field, ...], width: int, std: float) -> None:
        """`fields` are the tower's, out of `all_fields` of its side, which number the lookup columns."""
        super().__init__()
        self.fields = fields
        self.widths = [f.width or width for f in fields]
        columns = [f.name for f in all_fields if f.kind == "lookup"]
        self.tables = nn.ModuleDict()
        self.projections = nn.ModuleDict()
        self._place: dict[str, tuple[str, int, int]] = {}  # field -> (table, first row, rows)
        self._groups: list[tuple[str, list[int], list[str]]] = []  # table, lookup columns, field names
        sizes: dict[int, int] = {}
        for f, w in zip(fields, self.widths, strict=True):
            if f.kind == "lookup":
                first = sizes.get(w, 0)
                sizes[w] = first + f.rows
                self._place[f.name] = (f"lookup{w}", first, f.rows)
            elif f.kind == "bag" and not f.shares:
                self.tables[f"bag_{f.name}"] = nn.Embedding(f.rows, w)
                self._place[f.name] = (f"bag_{f.name}", 0, f.rows)
            elif f.kind == "dense":
                self.projections[f"dense_{f.name}"] = nn.Linear(f.length, w)
        for w, rows in sizes.items():
            names = [f.name for f in fields if f.kind == "lookup" and (f.width or width) == w]
            self.tables[f"lookup{w}"] = nn.Embedding(rows, w)
            self._groups.append((f"lookup{w}", [columns.index(n) for n in names], names))
            first_rows = torch.tensor([self._place[n][1] for n in names])
            self.register_buffer(f"first_rows{w}", first_rows, persistent=False)
        for table in self.tables.values():
            nn.init.normal_(table.weight, std=std)  # type: ignore[arg-type]

    def rows_of(self, name: str) -> Tensor:
        """The (rows, width) slice of the table that holds the field `name`."""
        table, first, rows = self._place[name]
        weight: Tensor = self.tables[table].weight  # type: ignore[assignment]
        return weight if len(weight) == rows else weight[first : first + rows]

    def forward(self, inputs: Inputs, other: FieldEmbeddings, unknown_rate: float = 0.0) -> list[Tensor]:
        """(U, width) per field, in the fields' order. `other` lends its id embedding to shared sequences.

        In training a share `unknown_rate` of the lookups reads the unknown row, which is how that row learns.
        """
        out: dict[str, Tensor] = {}
        for table, columns, names in self._groups:
            codes = inputs.lookup if len(columns) == inputs.lookup.shape[1] else inputs.lookup[:, columns]
            if self.training and unknown_rate:
                unknown = torch.rand(codes.shape, device=codes.device) < unknown_rate
                codes = codes.masked_fill(unknown, UNKNOWN)
            embedded = self.tables[table](codes + getattr(self, f"first_rows{table.removeprefix('lookup')}"))
            if len(self.fields) == len(names):
                return [embedded[:, i] for i in range(len(names))] if len(names) > 1 else [embedded[:, 0]]
            out.update(zip(names, embedded.unbind(1), strict=True))
        for f in self.fields:
            if f.kind == "bag":
                weights = other.rows_of(f.shares) if f.shares else self.rows_of(f.name)
                out[f.name] = pool(weights, inputs.bags[f.name], f.pooling)
            elif f.kind == "dense":
                out[f.name] = self.projections[f"dense_{f.name}"](inputs.dense[f.name])
        return [out[f.name] for f in self.fields]

    def shared_names(self) -> Iterator[tuple[str, str]]:
        """(sequence field, the other side's field whose embedding it uses)."""
        return ((f.name, f.shares) for f in self.fields if f.shares)

    def check_shares(self, other: FieldEmbeddings) -> None:
        """Raises ConfigError if a shared sequence finds no id embedding of its width on the other side."""
        for f, width in zip(self.fields, self.widths, strict=True):
            if not f.shares:
                continue
            if f.shares not in other._place:
                raise ConfigError(
                    f"sequence '{f.name}' shares the embedding of '{f.shares}', which the other tower of its branch does "
                    f"not read; add '{f.shares}' to that tower's fields or set share = false on '{f.name}'"
                )
            theirs = other.rows_of(f.shares).shape[1]
            if theirs != width:
                raise ConfigError(
                    f"sequence '{f.name}' has width {width} and shares '{f.shares}' of width {theirs}; "
                    "give both the same width or set share = false"
                )
