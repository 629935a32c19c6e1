"""A dataset whose train part has all interactions, for a training whose settings are chosen."""

from __future__ import annotations

import numpy as np
import polars as pl

from twotower.data.dataset import Dataset, build_dataset
from twotower.data.labels import POSITIVE, WEIGHT
from twotower.data.reading.times import TIME
from twotower.data.tables import Tables, averaged_columns
from twotower.data.versions import ROW, SINCE
from twotower.errors import ConfigError
from twotower.features.schema import OTHER_EVENTS
from twotower.features.side import SIDES


def whole_of(dataset: Dataset) -> Dataset:
    """Return the dataset in memory whose train part has all interactions of another, with encoders fitted to them.

    Raises the errors of `check_whole`."""
    check_whole(dataset)
    return build_dataset(tables_of(dataset), dataset.schema, dataset.split, whole=True)


def check_whole(dataset: Dataset, option: str = "train.refit") -> None:
    """Raise ConfigError if a dataset lacks what `tables_of` reads of each interaction for an option."""
    columns = averaged_columns(dataset.schema)
    if dataset.schema.side("context") and len(dataset.context_frame) != len(dataset.pairs):
        columns += dataset.schema.context_columns()
    if columns:
        raise ConfigError(
            f"{option} reads {', '.join(columns)} of each interaction, which a dataset does not keep; give the tables "
            f"of the log, or leave {option} out"
        )


def tables_of(dataset: Dataset) -> Tables:
    """Return the tables of a dataset, with its interactions in its order."""
    schema, pairs = dataset.schema, dataset.pairs
    columns = {
        schema.id_column(side): dataset.side(side).ids.gather(pairs.arrays[side].astype(np.int64)) for side in SIDES
    }
    columns[POSITIVE] = pl.Series(np.asarray(pairs.positive))
    if schema.weighted:
        columns[WEIGHT] = pl.Series(np.asarray(pairs.weight))
    if schema.time:
        columns[TIME] = pl.Series(np.asarray(dataset.times))
    if schema.reads_types:
        columns[schema.event] = pl.Series([OTHER_EVENTS, *schema.event_types]).gather(pairs.event.astype(np.int64))
    columns |= {name: dataset.context_frame[name] for name in schema.context_columns()}
    versions = {
        side: found.frame.drop(ROW).rename({SINCE: TIME})
        for side in SIDES
        if (found := dataset.side(side).versions) is not None
    }
    return Tables(dataset.users.frame, dataset.items.frame, pl.DataFrame(columns), versions=versions)
