"""The embedding tables of one tower's fields, which the other tower of its pair may read too."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from twotower.arrays.types import Float, Int
from twotower.errors import ConfigError
from twotower.features.field import InputField
from twotower.features.values import UNKNOWN
from twotower.model.inputs import carrier
from twotower.model.inputs.code_layout import CodeLayout
from twotower.model.tables import Table


class TableRows(NamedTuple):
    """The rows of a field: `rows` rows of the table `table` of this width, from the row `first` on."""

    table: str
    first: int
    rows: int
    width: int
    starts_at_zero: bool = False


class FieldTables(nn.ModuleDict):
    """Embedding tables by name; the rows of a field are consecutive rows of one table.

    All lookup fields of one width share one table, one field after the other, so that a batch costs one gather per
    width. A bag has a table of its own, or reads that of a field of the other tower. `fields` are in the order in which
    they are joined: lookups by width, then bags and dense fields. A sequence beside another one is no field of its own.
    """

    def __init__(self, fields: tuple[InputField, ...], width: int) -> None:
        """Lay out the tables of a tower's `fields`; `width` is the default width of a field. `create` makes a table."""
        super().__init__()
        fields = tuple(replace(f, width=f.width or width) for f in fields)
        self.lookups: dict[str, list[InputField]] = {}
        """Lookup fields by table."""
        for f in fields:
            if carrier(f.kind).is_stacked:
                self.lookups.setdefault(f"lookup{f.width}", []).append(f)
        others = [f for f in fields if not carrier(f.kind).is_stacked]
        numbered = {f"{carrier(f.kind).label}{i}": f for i, f in enumerate(others)}
        self.others = {name: f for name, f in numbered.items() if not f.beside}
        """Other fields, by number: the name of a field may hold dots."""
        self.beside = {
            f.name: {name: g for name, g in numbered.items() if g.beside == f.name} for f in self.others.values()
        }
        """Sequences beside each of the other fields, by number."""
        self.fields = (*(f for group in self.lookups.values() for f in group), *self.others.values())
        self.place: dict[str, TableRows] = {}
        """Rows by field."""
        for table, group in self.lookups.items():
            first = 0
            for f in group:
                self.place[f.name] = TableRows(table, first, f.rows, f.width)
                first += f.rows
        for table, f in numbered.items():
            if carrier(f.kind).has_table and not f.share_with:
                self.place[f.name] = TableRows(table, 0, f.rows, f.width, f.starts_at_zero)

    def create(self, name: str) -> None:
        """Make the table `name`, not yet initialised."""
        of = [rows for rows in self.place.values() if rows.table == name]
        self[name] = Table(sum(rows.rows for rows in of), of[0].width)

    def initialize(self, std: float, untrained: Collection[str] = ()) -> None:
        """Initialise the tables, with the standard deviation `std`. `untrained` are lookup fields of which no known value reads as
        unknown in training."""
        # Training may hold no unknown value; then an unknown value adds zeros.
        pooled = [f for f in self.others.values() if carrier(f.kind).has_table]
        fields = [f.name for f in pooled if not f.sequence and not f.share_with]
        fields += [f.name for group in self.lookups.values() for f in group if f.name in untrained]
        unknown = [(self.place[name].table, self.place[name].first + UNKNOWN) for name in fields]
        zeros = {rows.table for rows in self.place.values() if rows.starts_at_zero}
        for name in self:
            self.table(name).initialize(0.0 if name in zeros else std, [row for table, row in unknown if table == name])

    def table(self, name: str) -> Table:
        """Return a table."""
        table = self[name]
        assert isinstance(table, Table)
        return table

    def first_rows(self, table: str) -> Int[Tensor, "F"]:
        """Return the first row of each lookup field of a table."""
        return torch.tensor([self.place[f.name].first for f in self.lookups[table]])

    def rows_of(self, field: str) -> Float[Tensor, "rows E"]:
        """Return the rows of a field in its table."""
        table, first, rows, *_ = self.place[field]
        return self.table(table).rows(first, rows)

    def for_bag(self, field: str, bag: CodeLayout) -> tuple[Float[Tensor, "rows E"], CodeLayout]:
        """Return the table that holds a field, and a bag of the field's codes in codes of that table."""
        table, first, rows, *_ = self.place[field]
        return self.table(table).for_bag(first, rows, bag)

    def codes_of_bag(self, field: str, bag: CodeLayout) -> Iterator[tuple[Table, Int[Tensor, "n"]]]:
        """Yield (table, rows) for the rows that pooling a bag of a field's codes may read."""
        table, first, *_ = self.place[field]
        codes = bag.flat() + first
        yield self.table(table), torch.cat([codes, codes.new_tensor([first + UNKNOWN])])

    def check_shared(self, reader: InputField) -> None:
        """Raise ConfigError if there is no embedding of the width of `reader` for the field that it shares."""
        remedy = "set share_embedding = false" if reader.sequence else "leave out share_with"
        if reader.share_with not in self.place:
            raise ConfigError(
                f"feature '{reader.name}' shares the embedding of '{reader.share_with}', which the other tower of its pair "
                f"does not read; add '{reader.share_with}' to that tower's fields or {remedy} on '{reader.name}'"
            )
        if (width := self.place[reader.share_with].width) != reader.width:
            raise ConfigError(
                f"feature '{reader.name}' has width {reader.width} and shares '{reader.share_with}' of width {width}; "
                f"give both the same width or {remedy}"
            )
