"""Field embeddings: the encoded columns of one side as vectors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from twotower.errors import ConfigError
from twotower.features.field import InputField
from twotower.features.values import UNKNOWN
from twotower.model.attention import HistoryConfig, HistoryEncoder
from twotower.model.history import decayed_means, decayed_sums, inverse_weight_sum
from twotower.model.inputs.carriers import Bag, HistoryWindows, Inputs, Padded, Prefixes
from twotower.model.layers import gather
from twotower.model.tables import AnyBag, Table, bag_codes


class _BagSum(torch.autograd.Function):
    """Sum of table rows per bag. The backward pass is the same sum over the transposed bag, without atomic adds: as
    fast as the forward pass and the same bits every time."""

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
    """Pool the rows of a table (rows, E) per bag of n codes: (U, E), sum / n ("mean"), sum / sqrt(n) ("sqrt") or the
    sum ("sum").

    Pooling "decay" returns (U, R E): for each of R `rates` the weighted mean sum_a rate^a x_a / sum_a rate^a, x_a the
    row of the code a steps before the last. An empty bag gives zeros.
    """
    if isinstance(bag, Prefixes):
        if pooling == "decay":
            return decayed_means(table, bag, rates)
        total, n = decayed_sums(table, bag, (1.0,)), bag.length
    elif isinstance(bag, Padded):
        n = (bag.codes >= 0).sum(1)
        weights = _age_weights(bag.codes, n, rates or (1.0,), pooling == "decay")
        total = (weights.to(table.dtype) @ gather(table, bag.codes.clamp(min=0))).flatten(1)
        if pooling == "decay":
            return total
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
    """Return the weights (U, R, T) of padded codes (U, T): rate^age over its sum, or 1 without decay; 0 for padding."""
    position = torch.arange(codes.shape[1], device=codes.device)
    age = (n[:, None] - 1 - position).clamp(min=0)
    weights = torch.stack([torch.pow(torch.tensor(r), age) for r in rates], 1) * (codes >= 0)[:, None]
    return weights / weights.sum(2, keepdim=True).clamp(min=1e-12) if decay else weights


def _decayed_bag(table: Tensor, bag: Bag, n: Tensor, rates: tuple[float, ...]) -> Tensor:
    """Return the decayed means of whole sequences: (U, R E)."""
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
    """Concatenated field embeddings of one tower: (U, sum of the fields' widths).

    All lookup fields of one width share one table, one field after the other, so that a batch costs one gather per
    width. Therefore `fields` is reordered: lookups by width, then bags and dense fields. A lookup or bag field is a row
    or pooled rows of its table; a dense field x is W x + b.
    """

    def __init__(
        self,
        fields: tuple[InputField, ...],
        all_fields: tuple[InputField, ...],
        width: int,
        std: float,
        history: HistoryConfig | None = None,
    ) -> None:
        """Build the tables. `fields` are those of the tower, `all_fields` those of its side in the order of the lookup columns.
        `width` and `std` are the default width of a field and the standard deviation of its fresh rows."""
        super().__init__()
        fields = tuple(replace(f, width=f.width or width) for f in fields)
        by_width: dict[int, list[InputField]] = {}
        for f in fields:
            if f.kind == "lookup":
                by_width.setdefault(f.width, []).append(f)
        self._other_fields = [f for f in fields if f.kind != "lookup"]
        self.fields = (*(f for group in by_width.values() for f in group), *self._other_fields)
        self.tables = nn.ModuleDict()
        self.projections = nn.ModuleDict()
        self.encoders = nn.ModuleDict()
        self._location: dict[str, tuple[str, int, int]] = {}  # field -> (table, first row, rows)
        self._lookup_groups: list[tuple[str, list[int] | None]] = []  # table, its lookup columns (None: all)
        columns = [f.name for f in all_fields if f.kind == "lookup"]
        for w, group in by_width.items():
            table, first = f"lookup{w}", 0
            for f in group:
                self._location[f.name] = (table, first, f.rows)
                first += f.rows
            self.tables[table] = Table(first, w)
            wanted = [columns.index(f.name) for f in group]
            self._lookup_groups.append((table, None if wanted == list(range(len(columns))) else wanted))
            first_rows = torch.tensor([self._location[f.name][1] for f in group])
            self.register_buffer(f"first_rows_{table}", first_rows, persistent=False)
        for number, f in enumerate(self._other_fields):  # by number: the name of a field may hold dots
            if f.kind == "dense":
                self.projections[f"dense{number}"] = nn.Linear(f.length, f.width)
                continue
            if f.limit:
                self.encoders[f"bag{number}"] = HistoryEncoder(
                    f.width, f.pooling, f.limit, history or HistoryConfig(), f.name
                )
            if not f.share_with:
                table = f"bag{number}"
                self.tables[table] = Table(f.rows, f.width)
                self._location[f.name] = (table, 0, f.rows)
        # Training may hold no unknown value; then an unknown value in a bag adds zeros.
        unknown = [f for f in self._other_fields if f.kind == "bag" and not f.sequence and not f.share_with]
        zero_rows = {table: first + UNKNOWN for table, first, _ in (self._location[f.name] for f in unknown)}
        for name in self.tables:
            self._table(name).initialize(std, zero_rows.get(name))

    @property
    def widths(self) -> list[int]:
        return [f.width * max(1, len(f.rates)) for f in self.fields]

    @property
    def pieces(self) -> list[int]:
        """Widths of the pieces: a decayed mean at R rates is R pieces, any other field one."""
        return [f.width for f in self.fields for _ in range(max(1, len(f.rates)))]

    def rows_of(self, name: str) -> Tensor:
        """Return the rows (rows, width) of the field `name` in its table."""
        table, first, rows = self._location[name]
        return cast(Table, self.tables[table]).rows(first, rows)

    def codes(
        self, own: Inputs | None, theirs: Inputs | None, other: FieldEmbeddings
    ) -> Iterator[tuple[Table, Tensor]]:
        """Yield (table, rows) for every table row that the inputs `own` of this side may read, and the inputs `theirs`
        of the other side through the fields of `other` that share a table of this one."""
        if own is not None:
            for table, columns in self._lookup_groups:
                lookup, first_rows = own.lookup, getattr(self, f"first_rows_{table}")
                codes = (lookup if columns is None else lookup[:, columns]) + first_rows
                yield self._table(table), torch.cat([codes.flatten(), first_rows + UNKNOWN])
        for inputs, reader in ((own, self), (theirs, other)):
            for f in reader._other_fields if inputs is not None else ():
                if f.kind == "bag" and bool(f.share_with) is (reader is other):
                    table, first, _ = self._location[f.share_with or f.name]
                    codes = bag_codes(cast(Inputs, inputs).bags[f.name]) + first
                    yield self._table(table), torch.cat([codes, codes.new_tensor([first + UNKNOWN])])

    def _table(self, name: str) -> Table:
        return cast(Table, self.tables[name])

    def _table_for_bag(self, name: str, bag: AnyBag) -> tuple[Tensor, AnyBag]:
        """Return the table that holds the field `name`, and the bag in codes of that table."""
        table, first, rows = self._location[name]
        return self._table(table).for_bag(first, rows, bag)

    def forward(self, inputs: Inputs, other: FieldEmbeddings, unknown_rate: float = 0.0) -> Tensor:
        """Return (U, sum of widths), in the order of `fields`. Shared sequences read the id embedding of `other`.

        In training a share `unknown_rate` of the lookup codes is replaced by the unknown code, so that its row is
        trained.
        """
        parts = []
        for table, columns in self._lookup_groups:
            codes = inputs.lookup if columns is None else inputs.lookup[:, columns]
            if self.training and unknown_rate:
                unknown = torch.rand(codes.shape, device=codes.device) < unknown_rate
                codes = codes.masked_fill(unknown, UNKNOWN)
            parts.append(self._table(table)(codes + getattr(self, f"first_rows_{table}")).flatten(1))
        for number, f in enumerate(self._other_fields):
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
        """Raise ConfigError if `other` has no embedding of the same width for a field that shares one."""
        for f in self.fields:
            if not f.share_with:
                continue
            remedy = "set share_embedding = false" if f.sequence else "leave out share_with"
            if f.share_with not in other._location:
                raise ConfigError(
                    f"feature '{f.name}' shares the embedding of '{f.share_with}', which the other tower of its pair "
                    f"does not read; add '{f.share_with}' to that tower's fields or {remedy} on '{f.name}'"
                )
            shared_width = other._table(other._location[f.share_with][0]).embedding_dim
            if shared_width != f.width:
                raise ConfigError(
                    f"feature '{f.name}' has width {f.width} and shares '{f.share_with}' of width {shared_width}; "
                    f"give both the same width or {remedy}"
                )
