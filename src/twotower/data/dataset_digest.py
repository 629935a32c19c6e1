"""Digest of a dataset, by which a resumed training knows its data again."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from twotower.arrays.ragged import Ragged

if TYPE_CHECKING:
    from twotower.data.dataset import Dataset


def digest_of(dataset: Dataset) -> str:
    """Return the digest of the interactions, columns, encoders and schema: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    arrays: list[npt.NDArray[Any]] = [*dataset.pairs.arrays.values(), dataset.parts]
    if dataset.times is not None:
        arrays.append(dataset.times)
    for side in (dataset.users, dataset.items):
        columns = [*side.columns.values(), *([] if side.versions is None else side.versions.columns.values())]
        for column in columns:
            arrays += [column.values, column.offsets] if isinstance(column, Ragged) else [column]
        arrays += [] if side.versions is None else [side.versions.owners, side.versions.since]
    for column in dataset.context.values():
        arrays += [column.values, column.offsets] if isinstance(column, Ragged) else [column]
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    digest.update(dataset.encoders.digest.encode())
    digest.update(dataset.schema.model_dump_json().encode())
    return digest.hexdigest()[:16]
