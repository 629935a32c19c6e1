"""Protocol of the starts whose item vectors come from columns of the items, and the values of columns of either
side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from twotower.arrays.ragged import Column, Ragged
from twotower.arrays.types import F32, Codes, Floats, Ints, Shaped
from twotower.data.dataset import Dataset
from twotower.errors import ConfigError
from twotower.features.field import InputField, PoolingSpec
from twotower.features.schema import Schema
from twotower.features.side import SideName
from twotower.features.values import UNKNOWN
from twotower.model.pooling import resolve
from twotower.model.tables import FieldTables
from twotower.model.towers import select_fields
from twotower.model.two_tower import ModelConfig
from twotower.scorers.positives import PositiveMatrix
from twotower.scorers.start import Start

BUCKETS_ALIKE = 1.5
"""Distance in buckets at which two numbers have e^(-1/2) of their likeness."""
MAX_BUCKETS = 1024
"""Buckets up to which those that are near are alike."""


@dataclass(frozen=True)
class ColumnVectors:
    """Vectors of the values of a column, before they are projected: a direction each, or, of numbers in buckets,
    vectors that are the more alike the nearer the buckets are. Items have the root mean square length 1."""

    rows: int
    """Number of values, the unknown one too."""
    likeness: F32[Tensor, "rows rows"] | None
    scale: float

    def of(self, directions: F32[Tensor, "rows E"]) -> F32[Tensor, "rows E"]:
        """Return the vectors, each direction projected to E numbers."""
        return self.scale * (directions if self.likeness is None else self.likeness @ directions)


@dataclass(frozen=True)
class ContentMatrix:
    """Values of columns: a row for each code of items, or each user, and a column for each value of each field, one
    field after the other."""

    matrix: PositiveMatrix
    columns: tuple[ColumnVectors, ...]

    @classmethod
    def of(
        cls, side: SideName, fields: Sequence[InputField], dataset: Dataset, codes: Shaped[Codes, "rows"], n_codes: int
    ) -> ContentMatrix:
        """Return the values of `fields` of a side, a row for each of `n_codes` codes, given that of each row of the
        table."""
        first = np.cumsum([0, *(one.rows for one in fields)])
        cells = [_cells(dataset.side(side).columns[one.name], one.pooling) for one in fields]
        row = np.concatenate([codes[rows] for rows, _, _ in cells])
        value = np.concatenate([found + start for (_, found, _), start in zip(cells, first, strict=False)])
        share = np.concatenate([share for _, _, share in cells])
        known = row != UNKNOWN
        found = Ragged.from_pairs(row[known], value[known], n_codes, np.arange(np.count_nonzero(known)))
        assert found.source is not None
        matrix = PositiveMatrix(found.values, found.offsets, share[known][found.source], int(first[-1]))
        encoders = dataset.encoders.by_side[side]
        vectors = (
            _column_vectors(one.rows, encoders[one.name].is_ordered, *of) for one, of in zip(fields, cells, strict=True)
        )
        return cls(matrix, tuple(vectors))

    def vectors(self, directions: F32[Tensor, "values E"]) -> F32[Tensor, "values E"]:
        """Return the vectors of all values."""
        parts = torch.split(directions, [column.rows for column in self.columns])
        return torch.cat([column.of(part) for column, part in zip(self.columns, parts, strict=True)])


@dataclass(frozen=True)
class PositivesAndContent(PositiveMatrix):
    """Positives of the users, with the content of the items."""

    content: ContentMatrix = field(kw_only=True)


class ColumnStart(Start):
    """Start of a pair whose item tower adds columns up, in place of the id or in addition to it, so that items without
    any training are ranked too."""

    adds_columns = True

    def columns_of(self, side: SideName, schema: Schema) -> tuple[str, ...]:
        own = super().columns_of(side, schema) if self.reads_ids else ()
        columns = () if side == "user" and not self.adds_users else value_columns(side, schema)
        return (*own, *columns)

    def check_items(self, dataset: Dataset, model: ModelConfig) -> None:
        self._check_columns("item", dataset, model)

    def _check_columns(self, side: SideName, dataset: Dataset, model: ModelConfig) -> None:
        """Raise ConfigError if the pair's tower of a side reads what is no column of values, or does not add them
        up."""
        pair = model.pairs[self.pair]
        tower, place = pair.user if side == "user" else pair.item, f"model.pairs.{self.pair}.{side}"
        fields = select_fields(tuple(dataset.encoders.fields(side)), tower.fields)
        for one in fields:
            if refused := _refused(one, side, self.reads_ids and side == "item"):
                raise ConfigError(
                    f"train.start of kind '{self.kind}' reads columns that tell about {side}s, and feature "
                    f"'{one.name}' {refused}; "
                    + (f"leave it out of {place}.fields" if tower.fields else f"name the columns in {place}.fields")
                )
        if len(fields) > 1 and tower.join != "sum":
            raise self.needs_plain(side)

    def positives(self, dataset: Dataset, model: ModelConfig) -> PositiveMatrix:
        return self._with_content(dataset, model)

    def _with_content(self, dataset: Dataset, model: ModelConfig) -> PositivesAndContent:
        """Return the positives that the pair's values are solved from, with the content of the items."""
        found = super().positives(dataset, model)
        codes, n_codes = self.item_codes(dataset, model), self.n_codes(dataset, model)
        fields = self._column_fields("item", dataset, model)
        content = ContentMatrix.of("item", fields, dataset, codes, n_codes)
        return PositivesAndContent(
            found.columns, found.offsets, found.values, found.n_columns, found.histories, content=content
        )

    def _column_fields(self, side: SideName, dataset: Dataset, model: ModelConfig) -> tuple[InputField, ...]:
        """Return the fields of the pair's tower of a side, in its order."""
        pair = model.pairs[self.pair]
        names = (pair.user if side == "user" else pair.item).fields
        return FieldTables(select_fields(tuple(dataset.encoders.fields(side)), names), model.width).fields


def value_columns(side: SideName, schema: Schema) -> tuple[str, ...]:
    """Return the names of the features of a side whose values have a code each: no id, text, history or statistic."""
    return tuple(
        f.name
        for f in schema.columns(side)
        if f.source != schema.id_column(side)
        and not (f.computes or f.searchable)
        and (f.has_code or (f.pools is not None and resolve(f.pools).length_exponent is not None))
    )


def _refused(one: InputField, side: SideName, reads_ids: bool) -> str:
    """Return why the values of a field are no directions; "" if they are."""
    if one.identifies and not reads_ids:
        return f"is the id of the {side}s"
    if one.sequence or one.added_to:
        return "is a history"
    if not one.rows:
        return "has no embedding of each value, as numbers without buckets and vectors have none"
    is_sum = resolve(one.pooling).length_exponent is not None
    return "" if is_sum else f"pools by '{one.pooling.kind}', by which its vector is no weighted sum of its values"


def _cells(column: Column, pooling: PoolingSpec) -> tuple[Shaped[Ints, "L"], Shaped[Ints, "L"], Shaped[Floats, "L"]]:
    """Return the rows and codes of the known values of an encoded column, and the weight that each has in its row's
    pooling."""
    if isinstance(column, Ragged):
        known = column.values != UNKNOWN
        owners = column.owners[known]
        exponent = resolve(pooling).length_exponent
        assert exponent is not None
        share = column.lengths[owners] ** -exponent
        return owners, column.values[known].astype(np.int64), share.astype(np.float32)
    rows = np.flatnonzero(column != UNKNOWN)
    return rows, column[rows].astype(np.int64), np.ones(len(rows), np.float32)


def _column_vectors(
    rows: int, is_ordered: bool, items: Shaped[Ints, "L"], codes: Shaped[Ints, "L"], shares: Shaped[Floats, "L"]
) -> ColumnVectors:
    """Return the vectors of a column of so many values, from its cells."""
    likeness = None
    if is_ordered and rows <= MAX_BUCKETS:
        place = torch.arange(rows, dtype=torch.float32)
        likeness = torch.exp(-(((place[:, None] - place) / BUCKETS_ALIKE) ** 2) / 2)
        likeness[UNKNOWN, :] = likeness[:, UNKNOWN] = 0.0
    if likeness is None:
        _, cell = np.unique(items * rows + codes, return_inverse=True)  # a list may repeat a value
        squares = np.bincount(cell, shares) ** 2
    else:
        squares = likeness.square().sum(1).numpy()[codes]
    mean = float(squares.sum()) / max(1, len(np.unique(items)))
    return ColumnVectors(rows, likeness, mean**-0.5 if mean else 1.0)
