"""Source of the data: tables, a prepared dataset, or a named data set."""

from __future__ import annotations

import logging
from pathlib import Path

from twotower.data.config import DataConfig, DatasetConfig
from twotower.data.dataset import Dataset
from twotower.data.memmap import MemmapDataset
from twotower.data.parts import PartFiles
from twotower.data.reading.table_paths import table_files
from twotower.data.tables import Tables, check
from twotower.errors import ConfigError, TwoTowerError
from twotower.features.schema import Schema
from twotower.files import layout
from twotower.files.urls import is_url

log = logging.getLogger(__name__)


def read(config: DatasetConfig, schema: Schema | None) -> tuple[Tables | Dataset, Schema]:
    """Read the tables that `config.data` names and check them against the schema, or open the prepared dataset.

    Returns the data and its schema. Raises ConfigError or DataError for what cannot be used."""
    data = config.data
    if data.prepared:
        dataset = MemmapDataset.open(data.prepared)
        schema = schema or dataset.schema
        dataset.check(schema, config.split)
        _tell_of_later_tables(data)
        return dataset.with_schema(schema), schema
    if data.dataset:
        schema = schema or data.dataset.table_schema
        raw = data.dataset.load()
        tables = check(raw.users, raw.items, raw.interactions, schema)
    else:
        if data.buckets:
            raise ConfigError("data.buckets is not read by a training; prepare it, and set data.prepared")
        if not (data.interactions or data.parts):
            if config.split.kind == "files":
                raise ConfigError("data.train is missing; name the files of data.train and data.test")
            raise ConfigError("data.interactions is missing; name a CSV or Parquet file, or set data.dataset")
        schema = schema or Schema()
        interactions = PartFiles(data.parts) if data.parts else data.interactions
        tables = check(data.users or None, data.items or None, interactions, schema, data.format)
    for note in tables.notes:
        log.info(note)
    return tables, schema


def _tell_of_later_tables(data: DataConfig) -> None:
    """Log a warning if files on the disk of the tables that `data` names too were changed after the prepared dataset
    was written."""
    prepared = Path(data.prepared)
    written = (prepared / layout.PREPARED_FACTS).stat().st_mtime
    named = {data.users, data.items, data.interactions, *data.parts.values()} - {""}
    for source in sorted(name for name in named if not is_url(name)):
        try:
            places = [file.place for file in table_files(source)]
            later = [p for p in places if isinstance(p, Path) and p.is_file() and p.stat().st_mtime > written]
        except (TwoTowerError, OSError):  # a table that has gone is not needed
            continue
        if later:
            others = f" and {len(later) - 1:,} more" if later[1:] else ""
            log.warning(
                f"data.prepared: {prepared} is older than {later[0]}{others}, whose changes it lacks; prepare the "
                "tables again"
            )
