"""Start `content`: the columns of the items as their vectors, and users solved from them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from twotower.arrays.ragged import Column, Ragged
from twotower.arrays.types import F32, Floats, Ints, Shaped
from twotower.data.dataset import Dataset
from twotower.errors import ConfigError, TrainingError
from twotower.features.field import InputField
from twotower.features.pooling_spec import MEAN
from twotower.features.values import UNKNOWN
from twotower.model.field_tables import FieldTables
from twotower.model.pooling.pooling import Pooling
from twotower.model.towers import select_fields
from twotower.model.two_tower import ModelConfig
from twotower.train.starts.ease import leading, wide
from twotower.train.starts.positives import PositiveMatrix
from twotower.train.starts.start import PairValues, Positive, Start

BUCKETS_ALIKE = 1.5
"""Distance in buckets at which two numbers have e^(-1/2) of their likeness."""
MAX_BUCKETS = 1024
"""Buckets up to which those that are near are alike."""


@dataclass(frozen=True)
class ColumnVectors:
    """Vectors of the values of a column, before they are projected: a direction each, or, of numbers in buckets, vectors that are the more
    alike the nearer the buckets are. Items have the root mean square length 1."""

    rows: int
    """Number of values, the unknown one too."""
    likeness: F32[Tensor, "rows rows"] | None
    scale: float

    def of(self, directions: F32[Tensor, "rows E"]) -> F32[Tensor, "rows E"]:
        """Return the vectors, each direction projected to E numbers."""
        return self.scale * (directions if self.likeness is None else self.likeness @ directions)


@dataclass(frozen=True)
class ContentMatrix:
    """Values of the items' columns: a row for each code of the history, and a column for each value of each field, one field after the
    other."""

    matrix: PositiveMatrix
    columns: tuple[ColumnVectors, ...]

    def vectors(self, directions: F32[Tensor, "values E"]) -> F32[Tensor, "values E"]:
        """Return the vectors of all values."""
        parts = torch.split(directions, [column.rows for column in self.columns])
        return torch.cat([column.of(part) for column, part in zip(self.columns, parts, strict=True)])


@dataclass(frozen=True)
class PositivesAndContent(PositiveMatrix):
    """Positives of the users, with the content of the items."""

    content: ContentMatrix = field(kw_only=True)


class ContentFactors(Start):
    """Item vectors v = F W of their columns: F has a 1 for each value of an item, divided by the number of its values in the
    column, and W a direction for each value, or the E leading directions of the values among the positives, where these are more
    than the width E. Numbers in buckets are alike where they are near, by exp(-(i - j)^2 / 4.5) for the buckets i and j, and each
    column gives items vectors of the root mean square length 1. User vectors u minimise

        sum over the history of (1 - u . v)^2  +  a sum over all items of (u . v)^2  +  lambda (n + a N) |u|^2

    with n the length of the history and N items: a half step of `ials` with vectors that no step changes (Rendle et al. 2022,
    "Revisiting the Performance of iALS on Item Recommendation Benchmarks", section 3). The pooling `ridge` solves for u. Weights
    of rows count in the choice of the leading directions alone. The item tower reads columns in place of the id, added up, so that
    items without any training are ranked too.

    Use it beside other pairs, weighed by `blend`, where users keep to categories, cities or brands and have few interactions.
    """

    kind = "content"
    poolings = ("ridge",)
    choices = ("unobserved", "regularization")
    adds_columns = True

    unobserved: tuple[Positive, ...] = Field(
        (0.3,),
        min_length=1,
        description="Weight a of every pair of user and item, beside those of positives. Of several values the best on validation, or one beyond or between them that is better.",
    )
    regularization: tuple[Positive, ...] = Field(
        (0.2,),
        min_length=1,
        description="Regularisation lambda of each interaction. Of several values the best on validation, or one beyond or between them that is better.",
    )

    def check_items(self, dataset: Dataset, model: ModelConfig) -> None:
        tower, place = model.pairs[self.pair].item, f"model.pairs.{self.pair}.item"
        fields = select_fields(tuple(dataset.encoders.fields("item")), tower.fields)
        for one in fields:
            if refused := _refused(one):
                raise ConfigError(
                    f"train.start of kind '{self.kind}' reads columns that tell about items, and feature '{one.name}' {refused}; "
                    + (f"leave it out of {place}.fields" if tower.fields else f"name the columns in {place}.fields")
                )
        if len(fields) > 1 and tower.join != "sum":
            raise self.needs_plain("item")

    def positives(self, dataset: Dataset, model: ModelConfig) -> PositivesAndContent:
        found = super().positives(dataset, model)
        content = self._content(dataset, model)
        return PositivesAndContent(
            found.columns, found.offsets, found.values, found.n_columns, found.histories, content=content
        )

    def solve(self, positives: PositiveMatrix, pooling: Pooling, width: int, seed: int) -> PairValues:
        assert isinstance(positives, PositivesAndContent)
        a, rate, content = self.unobserved[0], self.regularization[0], positives.content
        directions = positives.once("directions", lambda: _directions(positives, width, seed))
        vectors = content.matrix.product(directions)[torch.from_numpy(np.unique(positives.columns).astype(np.int64))]
        squares, axes = torch.linalg.eigh(vectors.double().T @ vectors.double())
        if not squares.max() > 0:
            raise TrainingError(
                f"train.start of kind '{self.kind}' finds no value of a column at the items of the positives; leave the start and its pair out"
            )
        turned = (directions.double() @ axes).float()  # of the same products, and a diagonal penalty
        penalty = a * (squares.clamp(min=0) + rate * positives.n_items)
        of_values = torch.split(turned, [column.rows for column in content.columns])
        return PairValues(content.matrix.product(turned), of_values, penalty.float().diag(), rate)

    def _item_fields(self, dataset: Dataset, model: ModelConfig) -> tuple[InputField, ...]:
        """Return the fields of the pair's item tower, in its order."""
        names = model.pairs[self.pair].item.fields
        return FieldTables(select_fields(tuple(dataset.encoders.fields("item")), names), model.width).fields

    def _content(self, dataset: Dataset, model: ModelConfig) -> ContentMatrix:
        """Return the values of the columns of each code of the history."""
        codes, fields = self.history_codes(dataset, model), self._item_fields(dataset, model)
        first = np.cumsum([0, *(one.rows for one in fields)])
        cells = [_cells(dataset.items.columns[one.name]) for one in fields]
        row = np.concatenate([codes[items] for items, _, _ in cells])
        value = np.concatenate([found + start for (_, found, _), start in zip(cells, first, strict=False)])
        share = np.concatenate([share for _, _, share in cells])
        known = row != UNKNOWN
        found = Ragged.from_pairs(
            row[known], value[known], self.n_codes(dataset, model), np.arange(np.count_nonzero(known))
        )
        assert found.source is not None
        matrix = PositiveMatrix(found.values, found.offsets, share[known][found.source], int(first[-1]))
        encoders = dataset.encoders.by_side["item"]
        vectors = (
            _column_vectors(one.rows, encoders[one.name].is_ordered, *of) for one, of in zip(fields, cells, strict=True)
        )
        return ContentMatrix(matrix, tuple(vectors))


def _refused(one: InputField) -> str:
    """Return why the values of a field are no directions; "" if they are."""
    if one.identifies:
        return "is the id of the items"
    if one.sequence or one.beside:
        return "is a history"
    if not one.rows:
        return "has no embedding of each value, as numbers without buckets and vectors have none"
    return "" if one.pooling == MEAN else f"pools by '{one.pooling.kind}', not by the mean"


def _cells(column: Column) -> tuple[Shaped[Ints, "L"], Shaped[Ints, "L"], Shaped[Floats, "L"]]:
    """Return the rows and codes of the known values of an encoded column, and 1 / the number of a row's values."""
    if isinstance(column, Ragged):
        known = column.values != UNKNOWN
        owners = column.owners[known]
        return owners, column.values[known].astype(np.int64), (1 / column.lengths[owners]).astype(np.float32)
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


def _directions(positives: PositivesAndContent, width: int, seed: int) -> F32[Tensor, "values E"]:
    """Return the rows of W: the vectors of the values, or these on the leading eigenvectors of their products among the positives."""
    content, n = positives.content, positives.content.matrix.n_columns
    if n <= width:
        return content.vectors(torch.eye(n, width))
    turned, taken = content.matrix.transposed(), torch.zeros(positives.n_columns)
    taken.index_add_(0, torch.from_numpy(positives.columns.astype(np.int64)), torch.from_numpy(positives.values))
    found, _ = leading(
        lambda q: content.vectors(turned.product(taken[:, None] * content.matrix.product(content.vectors(q)))),
        n,
        width,
        torch.Generator().manual_seed(seed),
    )
    return wide(content.vectors(found), width)
