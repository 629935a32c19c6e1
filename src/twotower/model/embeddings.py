"""Field embeddings: the encoded columns of one side as vectors."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from twotower.features.field import InputField
from twotower.features.values import UNKNOWN
from twotower.model.attention import HistoryEncoder
from twotower.model.decayed_means import decayed_means, decayed_sums, inverse_weight_sum
from twotower.model.field_tables import FieldTables
from twotower.model.inputs.carriers import Bag, HistoryWindows, Inputs, Padded, Prefixes
from twotower.model.layers import gather
from twotower.model.pooling import resolve
from twotower.model.pooling.attention import Attention
from twotower.model.pooling.decay import Decay
from twotower.model.pooling.pooling import Pooling
from twotower.model.pooling.transformer import Transformer
from twotower.model.tables import Table


class _BagSum(torch.autograd.Function):
    """Sum of table rows per bag. The backward pass is the same sum over the transposed bag, without atomic adds: as
    fast as the forward pass and the same bits every time."""

    @staticmethod
    def forward(ctx: BackwardCFunction, table: Tensor, bag: Bag) -> Tensor:
        ctx.save_for_backward(bag.rows_by_code, bag.code_offsets)
        return _bag_sum(table, bag.values, bag.offsets)

    @staticmethod
    def backward(ctx: BackwardCFunction, *grads: Tensor) -> tuple[Tensor, None]:
        transposed: tuple[Tensor, ...] = ctx.saved_tensors
        return _bag_sum(grads[0].contiguous(), *transposed), None


def _bag_sum(table: Tensor, values: Tensor, offsets: Tensor) -> Tensor:
    return nn.functional.embedding_bag(values, table, offsets, mode="sum", include_last_offset=True)


def pool(table: Tensor, bag: Bag | Prefixes | Padded, options: Pooling) -> Tensor:
    """Pool the rows of a table (rows, E) per bag of n codes: (U, E), sum / n ("mean"), sum / sqrt(n) ("sqrt") or the
    sum ("sum").

    Pooling "decay" returns (U, R E): for each of R `rates` the weighted mean sum_a rate^a x_a / sum_a rate^a, x_a the
    row of the code a steps before the last. An empty bag gives zeros.
    """
    pooling, rates = options.kind, options.rates if isinstance(options, Decay) else ()
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
    """Concatenated field embeddings of one tower: (U, sum of the fields' widths), in the order of `fields`.

    A lookup or bag field is a row or pooled rows of its table; a dense field x is W x + b.
    """

    def __init__(
        self,
        tables: FieldTables,
        shared: FieldTables,
        side_fields: tuple[InputField, ...],
        std: float,
    ) -> None:
        """Create `tables`, those of the tower's fields. `shared` are those of the other tower, read by fields that share an
        embedding. `side_fields` are in the order of the lookup columns; `std` is the standard deviation of fresh rows.
        Raises ConfigError if `shared` lacks a field that is to be shared, or has it in another width."""
        super().__init__()
        self.fields, self.others, self.tables = tables.fields, tables.others, tables
        self.projections = nn.ModuleDict()
        self.encoders = nn.ModuleDict()
        self.poolings: dict[str, Pooling] = {f.name: resolve(f.pooling) for f in tables.fields}
        self._lookup_columns: dict[str, list[int] | None] = {}  # by table; None: all
        columns = [f.name for f in side_fields if f.kind == "lookup"]
        for table, group in tables.lookups.items():
            tables.create(table)
            wanted = [columns.index(f.name) for f in group]
            self._lookup_columns[table] = None if wanted == list(range(len(columns))) else wanted
            self.register_buffer(f"first_rows_{table}", tables.first_rows(table), persistent=False)
        self._bag_tables: dict[str, FieldTables] = {}  # by field: the tower that holds its rows
        for name, f in self.others.items():
            if f.kind == "dense":
                self.projections[name] = nn.Linear(f.length, f.width)
                continue
            if isinstance(pooling := self.poolings[f.name], Attention | Transformer):
                self.encoders[name] = HistoryEncoder(f.width, pooling, f.name)
            if f.share_with:
                shared.check_shared(f)
            else:
                tables.create(name)
            self._bag_tables[f.name] = shared if f.share_with else tables
        tables.initialize(std)

    @property
    def widths(self) -> list[int]:
        return [f.width * self.poolings[f.name].pieces for f in self.fields]

    @property
    def pieces(self) -> list[int]:
        """Widths of the pieces: a decayed mean at R rates is R pieces, any other field one."""
        return [f.width for f in self.fields for _ in range(self.poolings[f.name].pieces)]

    def lookups(self) -> Iterator[tuple[Table, list[int] | None, Tensor]]:
        """Yield the tables of lookup fields with their columns of `Inputs.lookup` (None: all), and the first row of each."""
        for name, columns in self._lookup_columns.items():
            first_rows: Tensor = getattr(self, f"first_rows_{name}")
            yield self.tables.table(name), columns, first_rows

    def rows_of(self, name: str) -> Tensor:
        """Return the rows (rows, width) that a lookup or bag field reads; those of the other tower if it shares them."""
        f = next(f for f in self.fields if f.name == name)
        return self._bag_tables.get(name, self.tables).rows_of(f.share_with or name)

    def codes(self, inputs: Inputs) -> Iterator[tuple[Table, Tensor]]:
        """Yield (table, rows) for every table row that `forward` may read; a table may occur repeatedly."""
        for table, columns, first_rows in self.lookups():
            codes = (inputs.lookup if columns is None else inputs.lookup[:, columns]) + first_rows
            yield table, torch.cat([codes.flatten(), first_rows + UNKNOWN])
        for f in self.others.values():
            if f.kind == "bag":
                yield from self._bag_tables[f.name].codes_of_bag(f.share_with or f.name, inputs.bags[f.name])

    def forward(self, inputs: Inputs, unknown_rate: float = 0.0) -> Tensor:
        """Return (U, sum of widths).

        In training a share `unknown_rate` of the lookup codes is replaced by the unknown code, so that its row is
        trained.
        """
        parts = []
        for table, columns, first_rows in self.lookups():
            codes = inputs.lookup if columns is None else inputs.lookup[:, columns]
            if self.training and unknown_rate:
                unknown = torch.rand(codes.shape, device=codes.device) < unknown_rate
                codes = codes.masked_fill(unknown, UNKNOWN)
            parts.append(table(codes + first_rows).flatten(1))
        for name, f in self.others.items():
            if f.kind == "dense":
                parts.append(self.projections[name](inputs.dense[f.name]))
                continue
            weights, bag = self._bag_tables[f.name].for_bag(f.share_with or f.name, inputs.bags[f.name])
            if name in self.encoders:
                parts.append(self.encoders[name](weights, bag))
            else:
                assert not isinstance(bag, HistoryWindows)
                parts.append(pool(weights, bag, self.poolings[f.name]))
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]
