"""Verbs of tables: fetch, stats."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Annotated

import typer
from pydantic import ValidationError

from twotower.cli.flags import Separator, split_names
from twotower.errors import ConfigError, DataError
from twotower.reports.terminal import print_line
from twotower.section import first_problem


def fetch(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of a data set, as of data.dataset in a config.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for users, items and interactions as Parquet.")],
    archive: Annotated[str, typer.Option("--source", help="Local archive. Empty: download it.")] = "",
) -> None:
    """Fetch a data set, verify it, and write three Parquet tables."""
    from twotower.data.datasets import DATASETS
    from twotower.data.tables import check, save

    kind = DATASETS.find(name, trust=True)  # its user typed the name
    if archive and "archive" not in kind.model_fields:
        raise ConfigError(f"data set '{name}' has no archive; leave out --source")
    try:
        dataset = kind.model_validate({"archive": archive} if archive else {})
    except ValidationError as e:
        raise ConfigError(f"data set '{name}': {first_problem(e)}") from None
    tables = dataset.load()
    check(tables.users, tables.items, tables.interactions, dataset.table_schema)
    save(tables, out)
    print_line(
        f"{out}: {tables.users.height:,} users, {tables.items.height:,} items, "
        f"{tables.interactions.height:,} interactions"
    )


def stats(
    folder: Annotated[
        str, typer.Argument(help="Folder or URL with users, items and interactions, or one file of interactions.")
    ],
    separator: Separator = "",
    columns: Annotated[
        str,
        typer.Option(
            "--columns",
            metavar="NAME,NAME,…",
            help="Names of the columns of interactions without a header line, in order, separated by commas.",
        ),
    ] = "",
    layout: Annotated[
        str,
        typer.Option(
            "--layout",
            metavar="rows|sequences",
            help="Content of a line of the interactions. rows: one interaction. sequences: a user and the user's items, without a "
            "header line.",
        ),
    ] = "rows",
) -> None:
    """Describe three tables: sizes, columns, missing and distinct values, activity per user and item."""
    from twotower.data import summary
    from twotower.data.readers import Reading, read_file
    from twotower.data.table_path import TABLE_SUFFIXES, TEXT_SUFFIXES, TablePath, ending
    from twotower.data.table_paths import exists, table_files, table_source
    from twotower.data.text_format import TextFormat
    from twotower.features.schema import Schema

    if layout not in ("rows", "sequences"):
        raise ConfigError(f"--layout {layout}: allowed are rows and sequences")
    form, schema = TextFormat.of_table(separator, split_names(columns), layout), Schema()
    endings = (".parquet", *TEXT_SUFFIXES, *(f"{ending}.gz" for ending in TEXT_SUFFIXES))
    paths, place = dict[str, TablePath](), table_source(folder)
    is_file = place.is_file() if isinstance(place, Path) else ending(PurePosixPath(place.key)) in TABLE_SUFFIXES
    if is_file:
        (paths["interactions"],) = table_files(place)
    for name in ("users", "items", "interactions") if not is_file else ():
        found_at = next((p for ending in endings if exists(p := place / f"{name}{ending}")), None)
        if found_at is None and name == "interactions":
            if isinstance(place, Path) and not place.exists():
                raise DataError(f"{folder}: no such file or folder")
            raise DataError(f"{folder}: holds no interactions.parquet, .csv, .tsv or .txt")
        if found_at:
            (paths[name],) = table_files(found_at)
    form.check_used(any(path.is_text for path in paths.values()), paths["interactions"].is_text, "`{}`")
    found = {}
    for name, path in paths.items():
        reading = Reading(None, dates=False).of_table(
            form if name == "interactions" else TextFormat(separator=separator)
        )
        if name == "interactions" and layout == "sequences":  # whose values have no types
            reading = replace(reading, numbers=frozenset(), lines=(schema.user_id, schema.item_id))
        found[name] = read_file(str(path), reading)
    for name, frame in found.items():
        print(f"{name}: {frame.height:,} rows")
        for column, kind, missing, distinct, example in summary.describe(frame):
            print_line(f"  {column:<16} {kind:<14} {missing:>9,} missing {distinct:>11} distinct   {example}")
    for line in summary.activity(found):
        print_line(line)
