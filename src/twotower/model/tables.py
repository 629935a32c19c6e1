"""Embedding tables of a model and of its fields, and their initial rows."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from twotower.arrays.types import F32, Float, Int
from twotower.errors import ConfigError
from twotower.features.field import InputField
from twotower.features.values import UNKNOWN
from twotower.model.inputs import carrier
from twotower.model.inputs.code_layout import CodeLayout
from twotower.model.layers import gather

NORMAL_BLOCK = 2**20
"""Number of random numbers that a deferred table draws at once."""
_mode: ContextVar[Literal["drawn", "deferred", "blank"]] = ContextVar("mode", default="drawn")


def deferred_tables() -> AbstractContextManager[None]:
    """Create the tables of the body on the meta device, to be replaced by tables with their `initial_rows`.

    The body draws the same random numbers as with whole tables."""
    return _tables("deferred")


def blank_tables() -> AbstractContextManager[None]:
    """Create the tables of the body without initial rows, for a model that loads its weights."""
    return _tables("blank")


@contextmanager
def _tables(mode: Literal["deferred", "blank"]) -> Iterator[None]:
    token = _mode.set(mode)
    try:
        yield
    finally:
        _mode.reset(token)


class Table(nn.Embedding):
    """Embedding table (rows, width) that this rank holds whole."""

    def __init__(self, rows: int, width: int) -> None:
        self.deferred = _mode.get() == "deferred"
        weight = torch.empty(rows, width, device="meta" if self.deferred else None)
        super().__init__(rows, width, _weight=weight)
        self._draws = _mode.get() == "drawn"
        self._initial: tuple[Tensor, float, tuple[int, ...]] | None = None  # generator state, deviation, zero rows
        if self.deferred:
            self._skip_draws(1.0)  # which `reset_parameters` draws
        elif self._draws:
            self.reset_parameters()

    def initialize(self, std: float, zero_rows: Sequence[int] = ()) -> None:
        """Initialise the rows: normal with standard deviation `std`, or zeros if `std` is 0. `zero_rows` are zeros."""
        if self.deferred:
            self._initial = torch.get_rng_state(), std, tuple(zero_rows)
            self._skip_draws(std)
            return
        if not self._draws:
            return
        if std:
            nn.init.normal_(self.weight, std=std)
        else:
            nn.init.zeros_(self.weight)
        for row in zero_rows:
            nn.init.zeros_(self.weight[row])

    def initial_rows(self, block: int = NORMAL_BLOCK) -> Iterator[tuple[slice, F32[Tensor, "n E"]]]:
        """Yield the initial rows of a deferred table and their values, about `block` numbers at a time."""
        if self._initial is None:
            raise RuntimeError("the table is not deferred")
        state, std, zero_rows = self._initial
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(state)
            for rows, drawn in _normal(self.num_embeddings, self.embedding_dim, std, block):
                for row in zero_rows:
                    if rows.start <= row < rows.stop:
                        drawn[row - rows.start] = 0
                yield rows, drawn

    def _skip_draws(self, std: float) -> None:
        for _ in _normal(self.num_embeddings, self.embedding_dim, std, NORMAL_BLOCK):
            pass

    def forward(self, codes: Int[Tensor, "*n"]) -> Float[Tensor, "*n E"]:
        return gather(self.weight, codes)

    def rows(self, first: int, rows: int) -> Float[Tensor, "n E"]:
        """Return `rows` rows from the row `first` on."""
        return self.weight if len(self.weight) == rows else self.weight[first : first + rows]

    def for_bag(self, first: int, rows: int, bag: CodeLayout) -> tuple[Float[Tensor, "n E"], CodeLayout]:
        """Return a table for `bag`, whose code 0 is the row `first`, and the bag in codes of this table."""
        return self.rows(first, rows), bag


def named_tables(module: nn.Module) -> Iterator[tuple[str, Table]]:
    """Yield every table of a module with its qualified name."""
    for name, submodule in module.named_modules():
        if isinstance(submodule, Table):
            yield name, submodule


def _normal(rows: int, width: int, std: float, block: int) -> Iterator[tuple[slice, F32[Tensor, "n E"]]]:
    """Yield rows and numbers as `Tensor.normal_` draws them, about `block` at a time; nothing for `std` 0.

    A CPU draws groups of 16, and for a remainder the last 16 numbers again. Therefore every block but the last is a
    whole number of groups, and the last has at least 16 rows.
    """
    step = max(16, block // width // 16 * 16)
    first = 0 if std else rows
    while first < rows:
        last = first + step
        if rows - last < 16:
            last = rows
        yield slice(first, last), torch.empty(last - first, width).normal_(0, std)
        first = last


class TableRows(NamedTuple):
    """Rows of a field: `rows` rows of the table `table`, from the row `first` on."""

    table: str
    first: int
    rows: int
    width: int
    starts_at_zero: bool = False


class FieldTables(nn.ModuleDict):
    """Embedding tables of a tower by name; the rows of a field are consecutive rows of one table.

    All lookup fields of one width share a table, so that a batch costs one gather a width. A bag has a table of its
    own, or reads the table of a field of the other tower. `fields` are in the order of the joined vector: lookups by
    width, then bags and dense fields. A sequence that is added to another is no field of its own.
    """

    def __init__(self, fields: tuple[InputField, ...], width: int) -> None:
        """Lay out the tables of `fields`; `width` is the default width of a field. `create` makes a table."""
        super().__init__()
        fields = tuple(replace(f, width=f.width or width) for f in fields)
        self.lookups: dict[str, list[InputField]] = {}
        """Lookup fields by table."""
        for f in fields:
            if carrier(f.kind).is_stacked:
                self.lookups.setdefault(f"lookup{f.width}", []).append(f)
        others = [f for f in fields if not carrier(f.kind).is_stacked]
        numbered = {f"{carrier(f.kind).label}{i}": f for i, f in enumerate(others)}
        self.others = {name: f for name, f in numbered.items() if not f.added_to}
        """Other fields, by number, as names of fields may hold dots."""
        self.added = {f.name: {n: g for n, g in numbered.items() if g.added_to == f.name} for f in self.others.values()}
        """Sequences that are added to each of the other fields, by number."""
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
        """Initialise the tables with the standard deviation `std`. Unknown rows without training are zeros: those of
        bags, and of the lookup fields `untrained`."""
        pooled = [f for f in self.others.values() if carrier(f.kind).has_table]
        fields = [f.name for f in pooled if not f.sequence and not f.share_with]
        fields += [f.name for group in self.lookups.values() for f in group if f.name in untrained]
        unknown = [(self.place[name].table, self.place[name].first + UNKNOWN) for name in fields]
        zeros = {rows.table for rows in self.place.values() if rows.starts_at_zero}
        for name in self:
            self.table(name).initialize(0.0 if name in zeros else std, [row for table, row in unknown if table == name])

    def table(self, name: str) -> Table:
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
        """Return the table of a field, and a bag of the field's codes in codes of this table."""
        table, first, rows, *_ = self.place[field]
        return self.table(table).for_bag(first, rows, bag)

    def codes_of_bag(self, field: str, bag: CodeLayout) -> Iterator[tuple[Table, Int[Tensor, "n"]]]:
        """Yield (table, rows) for all rows that pooling a bag of the field may read."""
        table, first, *_ = self.place[field]
        codes = bag.flat() + first
        yield self.table(table), torch.cat([codes, codes.new_tensor([first + UNKNOWN])])

    def check_shared(self, reader: InputField) -> None:
        """Raise ConfigError unless the field that `reader` shares has an embedding of the same width."""
        remedy = "set share_embedding = false" if reader.sequence else "leave out share_with"
        if reader.share_with not in self.place:
            raise ConfigError(
                f"feature '{reader.name}' shares the embedding of '{reader.share_with}', which the other tower of its "
                f"pair does not read; add '{reader.share_with}' to that tower's fields or {remedy} on '{reader.name}'"
            )
        if (width := self.place[reader.share_with].width) != reader.width:
            raise ConfigError(
                f"feature '{reader.name}' has width {reader.width} and shares '{reader.share_with}' of width {width}; "
                f"give both the same width or {remedy}"
            )
