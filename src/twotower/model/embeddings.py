"""Field embeddings: the encoded columns of one side as vectors."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from twotower.arrays.types import Float, Int
from twotower.features.field import InputField
from twotower.features.values import UNKNOWN
from twotower.model.inputs import carrier, stacked
from twotower.model.inputs.code_layout import CodeLayout, Inputs
from twotower.model.layers import gather, with_unknown
from twotower.model.lowering import lower
from twotower.model.pooling import resolve
from twotower.model.pooling.pooling import PoolingLayer, lower_known
from twotower.model.tables import FieldTables, Table

if TYPE_CHECKING:
    from twotower.onnx.builder import GraphBuilder


class FieldEmbeddings(nn.Module):
    """Concatenated field embeddings of one tower: (U, sum of the fields' widths), in the order of `fields`.

    A field is a row of its table, pooled rows of its table, or the output of its carrier's module. Sequences that are
    added to a sequence add their rows at each interaction before pooling (as embeddings of behaviours in Yuan et al.
    2022, "Multi-Behavior Sequential Transformer Recommender", section 3.1).
    """

    def __init__(
        self, tables: FieldTables, shared: FieldTables, side_fields: tuple[InputField, ...], std: float,
        untrained: Collection[str] = (),
    ) -> None:  # fmt: skip
        """Create the tower's `tables`. `shared` are the tables of the other tower, for fields that share an embedding.

        `side_fields` are in the order of the lookup columns, `std` is the standard deviation of fresh rows, and
        `untrained` are lookup fields whose unknown row starts at zero. Raises ConfigError if `shared` lacks a shared
        field, or has it in another width."""
        super().__init__()
        self.fields, self.others, self.tables = tables.fields, tables.others, tables
        self.projections = nn.ModuleDict()
        self.encoders = nn.ModuleDict()
        poolings = {f.name: resolve(f.pooling) for f in tables.fields}
        self._pieces = [poolings[f.name].pieces for f in tables.fields]
        self._lookup_columns: dict[str, list[int] | None] = {}  # by table; None: all
        columns = [f.name for f in stacked(side_fields)]
        for table, group in tables.lookups.items():
            tables.create(table)
            wanted = [columns.index(f.name) for f in group]
            self._lookup_columns[table] = None if wanted == list(range(len(columns))) else wanted
            self.register_buffer(f"first_rows_{table}", tables.first_rows(table), persistent=False)
        self._bag_tables: dict[str, FieldTables] = {}  # by field: the tower that holds its rows
        self._bags = {
            f.name: [f, *tables.added[f.name].values()] for f in self.others.values()
        }  # by field, with the sequences added to it
        for name, f in self.others.items():
            if not carrier(f.kind).has_table:
                self.projections[name] = carrier(f.kind).build(f)
                continue
            self.encoders[name] = poolings[f.name].build(f.width, f.name)
            for number, bag in {name: f, **tables.added[f.name]}.items():
                if bag.share_with:
                    shared.check_shared(bag)
                else:
                    tables.create(number)
                self._bag_tables[bag.name] = shared if bag.share_with else tables
        tables.initialize(std, untrained)

    @property
    def widths(self) -> list[int]:
        return [f.width * n for f, n in zip(self.fields, self._pieces, strict=True)]

    @property
    def pieces(self) -> list[int]:
        """Widths of the pieces: a decayed mean at R rates has R pieces, any other field one."""
        return [f.width for f, n in zip(self.fields, self._pieces, strict=True) for _ in range(n)]

    def lookups(self) -> Iterator[tuple[Table, list[int] | None, Int[Tensor, "F"]]]:
        """Yield the tables of lookup fields, their columns of `Inputs.lookup` (None: all), and first rows."""
        for name, columns in self._lookup_columns.items():
            first_rows: Tensor = getattr(self, f"first_rows_{name}")
            yield self.tables.table(name), columns, first_rows

    def rows_of(self, name: str) -> Float[Tensor, "rows E"]:
        """Return the rows of a lookup or bag field, in the other tower if it shares them."""
        f = next(f for f in (*self.fields, *(f for bags in self._bags.values() for f in bags)) if f.name == name)
        return self._bag_tables.get(name, self.tables).rows_of(f.share_with or name)

    @property
    def shared_numbers(self) -> int:
        """Number of weights of the other tower that this one reads."""
        bags = (f for bags in self._bags.values() for f in bags if f.share_with)
        return sum({f.share_with: self.rows_of(f.name).numel() for f in bags}.values())

    def codes(self, inputs: Inputs) -> Iterator[tuple[Table, Int[Tensor, "n"]]]:
        """Yield (table, rows) for all table rows that `forward` may read, with repeated tables."""
        for table, columns, first_rows in self.lookups():
            codes = (inputs.lookup if columns is None else inputs.lookup[:, columns]) + first_rows
            yield table, torch.cat([codes.flatten(), first_rows + UNKNOWN])
        for f in (f for bags in self._bags.values() for f in bags):
            if f.name in self._bag_tables:
                yield from self._bag_tables[f.name].codes_of_bag(f.share_with or f.name, inputs.bags[f.name])

    def forward(self, inputs: Inputs, unknown_rate: float = 0.0) -> Float[Tensor, "U N"]:
        """Return the concatenated fields, N the sum of their widths.

        In training the unknown code replaces a share `unknown_rate` of the lookup codes, so that its row is trained."""
        parts = []
        for table, columns, first_rows in self.lookups():
            codes = inputs.lookup if columns is None else inputs.lookup[:, columns]
            if self.training:
                codes = with_unknown(codes, unknown_rate)
            parts.append(table(codes + first_rows).flatten(1))
        for name, f in self.others.items():
            if name in self.projections:
                parts.append(self.projections[name](inputs.dense[f.name]))
                continue
            parts.append(self.encoders[name](*self._rows_and_codes(f, inputs)))
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]

    def _rows_and_codes(self, field: InputField, inputs: Inputs) -> tuple[Float[Tensor, "rows E"], CodeLayout]:
        """Return the table and the codes of a field of many codes; with added sequences a table of sums."""
        found = [
            self._bag_tables[f.name].for_bag(f.share_with or f.name, inputs.bags[f.name])
            for f in self._bags[field.name]
        ]
        if len(found) == 1:
            return found[0]
        rows = [gather(table, codes.flat()) for table, codes in found]
        return torch.stack(rows).sum(0), inputs.bags[field.name].numbered()

    def lower(self, g: GraphBuilder, names: Mapping[str, str], key: Hashable) -> str:
        """Build `forward`. `names` maps a field to its input; `key` is the pair, for the names of constants."""
        parts = []
        for table, columns, first_rows in self.lookups():
            codes = "lookup" if columns is None else g("Gather", "lookup", g.constant(columns), axis=1)
            weight = g.constant(table.weight, (key, "lookup", table.embedding_dim))
            rows = g("Gather", weight, g("Add", codes, g.constant(first_rows)), axis=0)
            parts.append(g.reshape(rows, len(first_rows) * table.embedding_dim))
        for name, f in self.others.items():
            if name in self.projections:
                parts.append(lower(self.projections[name], g, names[f.name]))
                continue
            layer = self.encoders[name]
            assert isinstance(layer, PoolingLayer)
            parts.append(layer.lower(g, *self._lower_rows_and_codes(g, f, names, key)))
        return g.concat(parts)

    def _lower_rows_and_codes(
        self, g: GraphBuilder, field: InputField, names: Mapping[str, str], key: Hashable
    ) -> tuple[str, str]:
        tables = {
            f.name: g.constant(self.rows_of(f.name), (key, "bag", f.share_with, "" if f.share_with else f.name))
            for f in self._bags[field.name]
        }
        codes = names[field.name]
        if len(tables) == 1:
            return tables[field.name], codes
        first, *others = (g("Gather", table, names[name], axis=0) for name, table in tables.items())  # (U, T, E)
        for rows in others:
            first = g("Add", first, rows)
        known = g("Cast", lower_known(g, codes), to=g.onnx.TensorProto.INT64)
        n = g("Squeeze", g("Shape", g("Reshape", codes, g.constant([-1]))), g.constant([0]))
        places = g("Reshape", g("Range", g.constant(1), g("Add", n, g.constant(1)), g.constant(1)), g("Shape", codes))
        return g("Flatten", first, axis=2), g("Sub", g("Mul", places, known), g.constant(1))
