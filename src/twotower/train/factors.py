"""Vectors of all users and items of a model, block by block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from twotower.arrays.ragged import Column
from twotower.arrays.types import Float, Ints, Shaped
from twotower.data.context import default_context
from twotower.data.dataset import Dataset
from twotower.data.side import Side
from twotower.distributed import DistributedContext
from twotower.evaluation.factors import Factors, Scorer
from twotower.evaluation.moments import ContextFactors, VersionFactors
from twotower.features.schema import Schema
from twotower.features.side import SIDES, SideName
from twotower.model.inputs.side_tensors import SideTensors
from twotower.model.two_tower import TwoTower, evaluation_mode
from twotower.scorers.scorer import terms_of
from twotower.train.torchrec.embeddings import TorchRecEmbeddings

F = TypeVar("F", bound=Factors | ContextFactors)

MAX_BLOCK_CODES = 2**20
"""Codes of bags, such as histories, that one call of a tower reads."""
CHECKED_ROWS = 4096
"""Rows of each side, at most, whose vectors tell whether a model is broken."""


def model_factors(
    model: TwoTower, users: SideTensors, items: SideTensors, context: DistributedContext | None = None,
    torchrec: TorchRecEmbeddings | None = None, pairs: Sequence[int] | None = None,
    known: Float[Tensor, "U D"] | None = None, block: int = 65_536, codes: int = MAX_BLOCK_CODES,
) -> Factors:  # fmt: skip
    """Return the vectors of all rows of both sides on every rank in evaluation mode, of some `pairs` alone or of all.
    Each rank embeds a part of every block, at most `block` rows and `codes` codes of bags. `known` are the vectors of
    the users, where they have been computed."""
    found = partial(_vectors, model=model, context=context, torchrec=torchrec, pairs=pairs, block=block, codes=codes)
    with evaluation_mode(model):
        return Factors(found("user", users) if known is None else known, found("item", items))


def item_codes(items: Side, schema: Schema) -> Shaped[Ints, "n"]:
    """Return the code of the id of each row of the items, of a schema that has their id as a feature."""
    feature = schema.id_feature("item")
    assert feature is not None
    return np.asarray(items.columns[feature.name]).astype(np.int64)


def newest_factors(every: Factors, dataset: Dataset) -> Factors:
    """Return the vectors of the versions at the latest training time, of those `by_version`."""
    sides = zip(SIDES, (every.users, every.items), strict=True)
    rows = {side: torch.from_numpy(dataset.rows_after_training(side)) for side in SIDES if dataset.side(side).versioned}
    return Factors(*(vectors[rows[side]] if side in rows else vectors for side, vectors in sides))


def factors_before(model: TwoTower, dataset: Dataset, part: int) -> Factors:
    """Return the vectors of all users and items from the data before `part` (see `Dataset.side_before`), of the newest
    versions, with the recent popularity at the end, and of a model that reads the context in the default one. Raises
    ConfigError if a feature of the context has no default."""
    context = default_context(dataset.encoders, dataset.context_frame) if dataset.schema.side("context") else {}
    sides = [dataset.side_before(side, part) for side in SIDES]
    found = model_factors(model, *_tensors(model, dataset, sides, context))
    added = with_added(found, model, dataset, part).added
    return replace(found, items=items_at_end(found.items, model, dataset), added=tuple(a for a in added if not a.moves))


def factors_during(model: TwoTower, dataset: Dataset, part: int) -> Scorer:
    """Return the vectors by which `part` is evaluated: as `factors_before`, but of the versions that hold at the times
    of its interactions, with what is popular at these times, and of users in the context of these."""
    sides = [dataset.side_before(side, part).by_version() for side in SIDES]
    users, items = _tensors(model, dataset, sides, dataset.context)
    if users.has_context:
        return with_added(context_factors(model, users, items, dataset), model, dataset, part)
    return VersionFactors.of_part(with_added(model_factors(model, users, items), model, dataset, part), dataset, part)


def with_added(found: F, model: TwoTower, dataset: Dataset, part: int) -> F:
    """Return scores of a part with what terms add to the products."""
    return replace(found, added=tuple(a for term in terms_of(model) if (a := term.added(dataset, part))))


def items_at_end(items: Float[Tensor, "I D"], model: TwoTower, dataset: Dataset) -> Float[Tensor, "I D"]:
    """Return the vectors of all items as they are at the end of what comes before the test part."""
    for term in terms_of(model):
        items = term.at_end(items, dataset)
    return items


def _tensors(
    model: TwoTower, dataset: Dataset, sides: Iterable[Side], context: Mapping[str, Column]
) -> tuple[SideTensors, SideTensors]:
    """Return all rows of both sides as inputs, and the context of interactions."""
    device, encoders, (users, items) = next(model.parameters()).device, dataset.encoders, sides
    return (
        SideTensors(users, encoders.fields("user"), device, context=context),
        SideTensors(items, encoders.fields("item"), device),
    )


def context_factors(
    model: TwoTower, users: SideTensors, items: SideTensors, dataset: Dataset, block: int = 4096,
    codes: int = MAX_BLOCK_CODES,
) -> ContextFactors:  # fmt: skip
    """Return the vectors of all items in evaluation mode, and the function to those of users in the context of
    interactions, at most `block` rows and `codes` codes of bags at a time."""

    def embed(rows: Shaped[Ints, "n"], interactions: Shaped[Ints, "n"]) -> Float[Tensor, "n D"]:
        found = [vectors[:0]]
        with evaluation_mode(model):
            for part in users.parts(rows, block, codes):
                found.append(model.user_vectors(users.take(rows[part], interactions=interactions[part])))
        return torch.cat(found)

    with evaluation_mode(model):
        vectors = _vectors("item", items, model, codes=codes)
    return ContextFactors(embed, vectors, dataset)


def has_finite_vectors(
    model: TwoTower, users: SideTensors, items: SideTensors, context: DistributedContext,
    torchrec: TorchRecEmbeddings | None,
) -> bool:  # fmt: skip
    """Return True if the vectors of the first rows of both sides are finite, on all ranks; of users with a context in
    that of the first interaction."""
    with evaluation_mode(model):
        found = [
            _vectors(side, rows, model, context, torchrec, block=CHECKED_ROWS, is_whole=False)
            for side, rows in zip(SIDES, (users, items), strict=True)
        ]
    return all(bool(vectors.isfinite().all()) for vectors in found)


def _vectors(
    name: SideName, side: SideTensors, model: TwoTower, context: DistributedContext | None = None,
    torchrec: TorchRecEmbeddings | None = None, pairs: Sequence[int] | None = None, block: int = 65_536,
    codes: int = MAX_BLOCK_CODES, is_whole: bool = True,
) -> Float[Tensor, "n D"]:  # fmt: skip
    """Return the vectors of all rows of a side, or of its first block; with a context in that of its first row. All
    ranks call their tower equally often."""
    tower, context = model.user_vectors if name == "user" else model.item_vectors, context or DistributedContext()
    if torchrec:
        block = min(block, 4096)  # a block's rows of the tables are fetched and held
    out: Tensor | None = None
    for rows in side.blocks(block * context.world_size, codes * context.world_size):
        sizes, part = context.partition_sizes(len(rows)), context.partition(len(rows))
        own = rows[part] if part.start < part.stop else rows[:1]
        inputs = side.take(own, interactions=np.zeros_like(own))
        if torchrec:
            torchrec.fetch(*((inputs, None) if name == "user" else (None, inputs)))
        vectors = context.all_gather(tower(inputs, pairs)[: sizes[context.rank]], sizes)
        if out is None:
            out = vectors.new_empty((side.n if is_whole else len(rows), vectors.shape[1]))
        out[rows[0] : rows[-1] + 1] = vectors  # concatenating blocks at the end would take twice the memory
        if not is_whole:
            break
    if torchrec:
        torchrec.drop_fetched()
    assert out is not None
    return out
