"""One side's encoded columns -> field embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from twotower.config import HistoryConfig
from twotower.data.batches import Bag, HistoryWindows, Inputs, Padded, Prefixes
from twotower.encoders import UNKNOWN, Field
from twotower.errors import ConfigError
from twotower.model.attention import HistoryEncoder
from twotower.model.history import decayed_means, decayed_sums, inverse_weight_sum
from twotower.model.layers import gather
from twotower.model.tables import AnyBag, AnyTable, Table, TableFactory, bag_codes


class _BagSum(torch.autograd.Function):
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


def pool(table: Tensor, bag: Bag | Prefixes | Padded, pooling: str, rates: tuple[float, ...] = ()) -> Tensor:
    """Table (rows, E) and U rows of codes -> (U, E): the sum divided by n (mean), sqrt(n) or 1; empty gives 0.

    Pooling "decay" gives (U, R E): for each of the R `rates` a mean in which the code n places before the last
    weighs rate^n.
    """
    if isinstance(bag, Prefixes):
        if pooling == "decay":
            return decayed_means(table, bag, rates)
        total, n = decayed_sums(table, bag, (1.0,)), bag.length
    elif isinstance(bag, Padded):
        n = (bag.codes >= 0).sum(1)
        weights = _age_weights(bag.codes, n, rates or (1.0,), pooling == "decay")
        found = (weights.to(table.dtype) @ gather(table, bag.codes.clamp(min=0))).flatten(1)
        if pooling == "decay":
            return found
        total = found
    else:
        n = bag.offsets[1:] - bag.offsets[:-1]
        if pooling == "decay":
            return _decayed_bag(table, bag, n, rates)
        total = _BagSum.apply(table, bag)  # type: ignore[no-untyped-call]
    if pooling == "sum":
        return total
    n = n.clamp(min=1).to(total.dtype)
    return total / (n if pooling == "mean" else n.sqrt())[:, None]


def _age_weights(codes: Tensor, n: Tensor, rates: tuple[float, ...], decay: bool) -> Tensor:
    """(U, R, T) weights of padded codes (U, T): rate^age over their sum, or 1 without decay; 0 from the end on."""
    place = torch.arange(codes.shape[1], device=codes.device)
    age = (n[:, None] - 1 - place).clamp(min=0)
    weights = torch.stack([torch.pow(torch.tensor(r), age) for r in rates], 1) * (codes >= 0)[:, None]
    return weights / weights.sum(2, keepdim=True).clamp(min=1e-12) if decay else weights


def _decayed_bag(table: Tensor, bag: Bag, n: Tensor, rates: tuple[float, ...]) -> Tensor:
    """`pool` with decay over whole sequences."""
    row = torch.repeat_interleave(torch.arange(len(n), device=n.device), n)
    age = bag.offsets[1:][row] - 1 - torch.arange(len(row), device=n.device)
    out = []
    for rate in rates:
        weights = torch.pow(torch.tensor(rate, dtype=table.dtype, device=n.device), age)
        total = nn.functional.embedding_bag(
            bag.values, table, bag.offsets, mode="sum", include_last_offset=True, per_sample_weights=weights
        )
        out.append(total * inverse_weight_sum(n, rate).to(total.dtype)[:, None])
    return torch.cat(out, 1)


class FieldEmbeddings(nn.Module):
    """The fields of one tower side by side, (U, sum of their widths).

    All lookups of one width live in one table, a field after the other, so that a batch costs one gather; that is
    why `fields` are reordered: lookups by width, then bags and dense fields.
    """

    def __init__(
        self,
        fields: tuple[Field, ...],
        all_fields: tuple[Field, ...],
        width: int,
        std: float,
        history: HistoryConfig | None = None,
        make: TableFactory = Table,
    ) -> None:
        """`fields` are the tower's, out of `all_fields` of its side, which number the lookup columns; `make` makes the
        tables."""
        super().__init__()
        fields = tuple(replace(f, width=f.width or width) for f in fields)
        by_width: dict[int, list[Field]] = {}
        for f in fields:
            if f.kind == "lookup":
                by_width.setdefault(f.width, []).append(f)
        self._others = [f for f in fields if f.kind != "lookup"]
        self.fields = (*(f for group in by_width.values() for f in group), *self._others)
        self.tables = nn.ModuleDict()
        self.projections = nn.ModuleDict()
        self.encoders = nn.ModuleDict()
        self._place: dict[str, tuple[str, int, int]] = {}  # field -> (table, first row, rows)
        self._groups: list[tuple[str, list[int] | None]] = []  # table, its lookup columns (None: all)
        columns = [f.name for f in all_fields if f.kind == "lookup"]
        for w, group in by_width.items():
            table, first = f"lookup{w}", 0
            for f in group:
                self._place[f.name] = (table, first, f.rows)
                first += f.rows
            self.tables[table] = make(first, w)
            wanted = [columns.index(f.name) for f in group]
            self._groups.append((table, None if wanted == list(range(len(columns))) else wanted))
            first_rows = torch.tensor([self._place[f.name][1] for f in group])
            self.register_buffer(f"first_rows_{table}", first_rows, persistent=False)
        for number, f in enumerate(self._others):  # named by number: a field may be called anything, dots included
            if f.kind == "dense":
                self.projections[f"dense{number}"] = nn.Linear(f.length, f.width)
                continue
            if f.limit:
                self.encoders[f"bag{number}"] = HistoryEncoder(
                    f.width, f.pooling, f.limit, history or HistoryConfig(), f.name
                )
            if not f.share_with:
                table = f"bag{number}"
                self.tables[table] = make(f.rows, f.width)
                self._place[f.name] = (table, 0, f.rows)
        for name in self.tables:
            self._table(name).initialize(std)
        for f in self._others:
            if f.kind == "bag" and not f.sequence and not f.share_with:
                # Training may never meet a value without a row, and what is unknown then adds nothing.
                table, first, _ = self._place[f.name]
                self._table(table).zero_row(first + UNKNOWN)

    @property
    def widths(self) -> list[int]:
        return [f.width * max(1, len(f.rates)) for f in self.fields]

    @property
    def pieces(self) -> list[int]:
        """As `widths`, with a decaying mean at R rates as R pieces."""
        return [f.width for f in self.fields for _ in range(max(1, len(f.rates)))]

    def rows_of(self, name: str) -> Tensor:
        """The (rows, width) slice of the table that holds the field `name`."""
        table, first, rows = self._place[name]
        return cast(Table, self.tables[table]).rows(first, rows)

    def codes(
        self, own: Inputs | None, theirs: Inputs | None, other: FieldEmbeddings
    ) -> Iterator[tuple[AnyTable, Tensor]]:
        """All rows of tables that may be read for inputs of this side and, by what `other` shares, of the other side."""
        if own is not None:
            for table, columns in self._groups:
                lookup, first_rows = own.lookup, getattr(self, f"first_rows_{table}")
                codes = (lookup if columns is None else lookup[:, columns]) + first_rows
                yield self._table(table), torch.cat([codes.flatten(), first_rows + UNKNOWN])
        for inputs, reader in ((own, self), (theirs, other)):
            for f in reader._others if inputs is not None else ():
                if f.kind == "bag" and bool(f.share_with) is (reader is other):
                    table, first, _ = self._place[f.share_with or f.name]
                    codes = bag_codes(cast(Inputs, inputs).bags[f.name]) + first
                    yield self._table(table), torch.cat([codes, codes.new_tensor([first + UNKNOWN])])

    def _table(self, name: str) -> AnyTable:
        return cast(AnyTable, self.tables[name])

    def _table_for_bag(self, name: str, bag: AnyBag) -> tuple[Tensor, AnyBag]:
        """The table that holds the field `name`, and the bag in its codes."""
        table, first, rows = self._place[name]
        return self._table(table).for_bag(first, rows, bag)

    def forward(self, inputs: Inputs, other: FieldEmbeddings, unknown_rate: float = 0.0) -> Tensor:
        """(U, sum of widths), fields in the order of `fields`. `other` lends its id embedding to shared sequences.

        In training a share `unknown_rate` of the lookups reads the unknown row, which is how that row learns.
        """
        parts = []
        for table, columns in self._groups:
            codes = inputs.lookup if columns is None else inputs.lookup[:, columns]
            if self.training and unknown_rate:
                unknown = torch.rand(codes.shape, device=codes.device) < unknown_rate
                codes = codes.masked_fill(unknown, UNKNOWN)
            parts.append(self._table(table)(codes + getattr(self, f"first_rows_{table}")).flatten(1))
        for number, f in enumerate(self._others):
            if f.kind == "dense":
                parts.append(self.projections[f"dense{number}"](inputs.dense[f.name]))
            else:
                weights, bag = (other if f.share_with else self)._table_for_bag(
                    f.share_with or f.name, inputs.bags[f.name]
                )
                if isinstance(bag, HistoryWindows) or f.limit:
                    parts.append(self.encoders[f"bag{number}"](weights, bag))
                else:
                    parts.append(pool(weights, bag, f.pooling, f.rates))
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]

    def check_shares(self, other: FieldEmbeddings) -> None:
        """Raises ConfigError if a shared feature finds no embedding of its width on the other side."""
        for f in self.fields:
            if not f.share_with:
                continue
            alone = "set share_embedding = false" if f.sequence else "leave out share_with"
            if f.share_with not in other._place:
                raise ConfigError(
                    f"feature '{f.name}' shares the embedding of '{f.share_with}', which the other tower of its pair "
                    f"does not read; add '{f.share_with}' to that tower's fields or {alone} on '{f.name}'"
                )
            theirs = other._table(other._place[f.share_with][0]).embedding_dim
            if theirs != f.width:
                raise ConfigError(
                    f"feature '{f.name}' has width {f.width} and shares '{f.share_with}' of width {theirs}; "
                    f"give both the same width or {alone}"
                )
