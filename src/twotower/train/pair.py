"""Pairs of a model by their starts: their values written, and weighed whole or in parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from twotower.arrays.types import F32, Int
from twotower.distributed import DistributedContext
from twotower.errors import TrainingError
from twotower.features.field import InputField
from twotower.features.side import SIDES
from twotower.features.values import UNKNOWN
from twotower.model.embeddings import FieldEmbeddings
from twotower.model.pooling import resolve
from twotower.model.pooling.pooling import Pooling
from twotower.model.pooling.ridge import RidgeLayer
from twotower.model.two_tower import TwoTower
from twotower.scorers.positives import PositiveMatrix
from twotower.scorers.start import PairValues, Start
from twotower.train.stopping import at_once


def start_pair(
    model: TwoTower, start: Start, positives: PositiveMatrix | None, seed: int, context: DistributedContext
) -> PairValues:
    """Overwrite the pair of a start with its values, those of rank 0 on all ranks, and return them. `positives` are
    those of the start, on rank 0."""
    user = model.towers("user")[start.pair].embeddings
    first = user.fields[0]
    found = context.broadcast(
        None if positives is None else _values(start, positives, resolve(first.pooling), first.width, seed)
    )
    if isinstance(found, str):
        raise TrainingError(found)
    if found is None:
        raise _not_finite(start)
    tables = (found.source, *found.further, *found.targets, *found.alternative)
    if not all(bool(torch.isfinite(table).all()) for table in tables):
        raise _not_finite(start)
    if found.penalty is not None:
        layer = _layer(user.encoders, first)
        try:
            layer.set_penalties(found.penalty.to(layer.factor.device), found.rate)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            raise _not_finite(start) from None
    with torch.no_grad():
        for field, rows in zip(user.fields, (found.source, *found.further), strict=True):
            _write(user.rows_of(field.name), rows)
        write_targets(model, start, found.targets)
    return found


def write_targets(model: TwoTower, start: Start, targets: Sequence[F32[Tensor, "_ F"]]) -> None:
    """Overwrite the rows of the fields of the pair's item tower, but those of a table that the history shares."""
    user, item = (model.towers(side)[start.pair].embeddings for side in SIDES)
    with torch.no_grad():
        for field, rows in zip(item.fields, targets, strict=True):
            if user.fields[0].share_with != field.name:
                _write(item.rows_of(field.name), rows * start.scale)


def clear_pair(model: TwoTower, start: Start) -> None:
    """Overwrite the items of a pair with zeros, so that its scores are 0."""
    item = model.towers("item")[start.pair].embeddings
    write_targets(model, start, [torch.zeros_like(item.rows_of(field.name)) for field in item.fields])


@contextmanager
def targets_kept(model: TwoTower, start: Start) -> Iterator[None]:
    """Leave the rows of the fields of the pair's item tower as they were."""
    item = model.towers("item")[start.pair].embeddings
    before = [item.rows_of(field.name).clone() for field in item.fields]
    try:
        yield
    finally:
        with torch.no_grad():
            for field, rows in zip(item.fields, before, strict=True):
                item.rows_of(field.name).copy_(rows)


class PairPart(NamedTuple):
    """Part of a pair's vectors: what a column of the items has in a piece of the pooling, or with a column of the
    users."""

    field: str
    """Column of the items."""
    source: str
    """Piece of the pooling, or column of the users, in words."""
    dimensions: Int[Tensor, "k"]


def parts_of_pair(model: TwoTower, start: Start) -> list[PairPart]:
    """Return the parts of a pair's vectors that are not 0."""
    user, item = (model.towers(side)[start.pair].embeddings for side in SIDES)
    sources, found = [*(_columns(user) if start.adds_users else _pieces(user))], list[PairPart]()
    for field in item.fields:
        used = item.rows_of(field.name).any(0).cpu()
        for name, dimensions in sources:
            if (own := dimensions[used[dimensions]]).numel():
                found.append(PairPart(field.name, name, own))
    return found


def weigh_parts(
    model: TwoTower, start: Start,
    forms: Sequence[tuple[Sequence[F32[Tensor, "_ F"]], Sequence[tuple[PairPart, float]]]],
) -> None:  # fmt: skip
    """Overwrite the rows of the items with the weighted sum of the parts of some closed forms: rows of each field of
    the item tower, and the parts that `parts_of_pair` returns of them, each with its weight."""
    fields, sums = model.towers("item")[start.pair].embeddings.fields, list[F32[Tensor, "_ F"]]()
    for place, field in enumerate(fields):
        total = torch.zeros_like(forms[0][0][place])
        for targets, parts in forms:
            for part, weight in parts:
                if part.field == field.name:
                    total[:, part.dimensions] += weight * targets[place][:, part.dimensions]
        sums.append(total)
    write_targets(model, start, sums)


def _pieces(user: FieldEmbeddings) -> Iterator[tuple[str, Int[Tensor, "k"]]]:
    """Yield the dimensions of each piece of the pooling of a history."""
    (width,), (history,) = user.widths, user.fields
    pooling = resolve(history.pooling)
    for rate, dimensions in zip(pooling.decay_rates, torch.arange(width).chunk(pooling.pieces), strict=True):
        yield f"rate {rate:g}", dimensions


def _columns(user: FieldEmbeddings) -> Iterator[tuple[str, Int[Tensor, "k"]]]:
    """Yield the dimensions that each column of the users fills."""
    for field in user.fields:
        yield field.name, user.rows_of(field.name).any(0).cpu().nonzero()[:, 0]


def _values(
    start: Start, positives: PositiveMatrix, pooling: Pooling, width: int, seed: int
) -> PairValues | str | None:
    """Return the values of a start; why there are none, or None where float32 cannot solve for them."""
    try:
        with at_once():
            return start.solve(positives, pooling, width, seed)
    except TrainingError as e:
        return str(e)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return None


def _not_finite(start: Start) -> TrainingError:
    nearer = ", ".join(f"{name} nearer its default, {start.default_of(name):g}" for name in start.choices)
    return TrainingError(
        f"train.start of kind '{start.kind}' ({start.describe()}) has values that are not finite; "
        + (f"set {nearer}" if nearer else "leave the start out")
    )


def _layer(encoders: torch.nn.ModuleDict, history: InputField) -> RidgeLayer:
    (layer,) = encoders.values()
    assert isinstance(layer, RidgeLayer), history.name
    return layer


def _write(rows: F32[Tensor, "n E"], values: F32[Tensor, "n E"]) -> None:
    """Overwrite rows of a table; the unknown one with zeros."""
    rows.copy_(values)
    rows[UNKNOWN].zero_()
