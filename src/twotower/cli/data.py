"""Verbs of tables: suggest, fetch, stats, prepare, bucket, check-buckets."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Annotated

import typer
from pydantic import ValidationError
from typer.models import OptionInfo

from twotower.cli.flags import ColumnNames, EngineName, Overrides, Separator, split_names
from twotower.errors import ConfigError, DataError, OpenRoles
from twotower.escaping import escape_controls, shell_command, shell_word
from twotower.reports.terminal import print_line
from twotower.section import first_problem

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}

SHOWN_PROBLEMS = 20
"""Most problems that check-buckets prints."""

_SETTING = re.compile(r"\bset ((?:schema|data|split)\.[\w.]+) = (?:'([^']*)'|\"([^\"]*)\")")
"""A setting in a message, with its value."""
_ROLE_OVERRIDE = re.compile(r"\ban override such as schema\.(\w+)=NAME")
"""An override that names a column, for which there is a flag."""
OUTPUT = "--output"
"""The option with which the result is a file."""

TableConfig = Annotated[Path, typer.Argument(help="TOML file that names the tables.")]
Memory = Annotated[
    str, typer.Option("--memory", help="Memory for interactions, such as 500MB or 4GB, in addition to users and items.")
]
Threads = Annotated[int, typer.Option("--threads", min=0, max=1024, help="Threads. 0: the cores of this machine.")]


def _as_flag(setting: re.Match[str]) -> str:
    return f"give --set {shell_word(setting[1] + '=' + (setting[2] or setting[3] or ''))}"


def _column(role: str, what: str) -> OptionInfo:
    found: OptionInfo = typer.Option(f"--{role}", metavar="COLUMN", help=f"{what} '': none. Left out: by its name.")
    return found


def suggest(
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="Interactions: a CSV or Parquet file, or a folder of the tables.",
        ),
    ],
    users: Annotated[str, typer.Option("--users", help="Users: a file or a folder. Empty: those of the folder.")] = "",
    items: Annotated[str, typer.Option("--items", help="Items: a file or a folder. Empty: those of the folder.")] = "",
    recipe: Annotated[
        str,
        typer.Option(
            "--recipe",
            help="Recipe: words, ranking, cold-start, sequence-long, sequence-short or collaborative. Empty: the first "
            "whose rule fits.",
        ),
    ] = "",
    output: Annotated[
        Path | None, typer.Option(OUTPUT, "-o", help="New file for the config. Left out: it is printed.")
    ] = None,
    user: Annotated[str | None, _column("user", "Users.")] = None,
    item: Annotated[str | None, _column("item", "Items.")] = None,
    query: Annotated[str | None, _column("query", "Search queries, which are read in place of users.")] = None,
    time: Annotated[str | None, _column("time", "Times of the rows.")] = None,
    label: Annotated[str | None, _column("label", "Ratings or outcomes.")] = None,
    event: Annotated[str | None, _column("event", "Types of events.")] = None,
    weight: Annotated[str | None, _column("weight", "Weights of the rows.")] = None,
    session: Annotated[str | None, _column("session", "Sessions, which are read as users where no column is.")] = None,
    title: Annotated[str | None, _column("title", "Titles of the items.")] = None,
    overrides: Overrides = None,
) -> None:
    """Look at tables and write a config for them: roles of the columns, the recipe for their shape, and the reasons.

    Where two readings of the columns are possible it stops and lists the flags that settle it."""
    from twotower import files
    from twotower.suggestion.features import table_path
    from twotower.suggestion.suggest import suggest

    if output is not None and output.exists():
        raise ConfigError(f"{output}: exists already; choose another file for `output`, or remove this one")
    if output is not None and not output.parent.is_dir():
        raise ConfigError(f"{output}: its folder does not exist; make it, or choose another file for `output`")
    try:
        found = suggest(
            data, users or None, items or None, recipe=recipe, overrides=overrides or (),
            folder=output.parent if output else ".", output=output, user=user, item=item,
            query=query, time=time, label=label, event=event, weight=weight, session=session, title=title,
        )  # fmt: skip
    except OpenRoles:
        raise
    except DataError as e:  # there is no config yet in which a setting could be written
        raise DataError(_SETTING.sub(_as_flag, str(e))) from None
    if output is None:
        print("\n".join(map(escape_controls, found.text.splitlines())))
        return
    for name, table in found.tables.items():
        content = io.BytesIO()
        table.write_parquet(content)
        files.write(table_path(output, name), content.getvalue())
    files.write(output, found.text)
    for line in found.reasons:
        print_line(_ROLE_OVERRIDE.sub(r"a flag such as --\1 NAME", line))
    print_line(f"next: {shell_command('train', output, '--run', Path('runs') / output.stem)}")


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
    columns: ColumnNames = "",
    layout: Annotated[
        str,
        typer.Option(
            "--layout",
            metavar="rows|sequences",
            help="Line of the interactions. rows: one interaction. sequences: a user and the user's items, no header.",
        ),
    ] = "rows",
) -> None:
    """Describe three tables: sizes, columns, missing and distinct values, activity per user and item."""
    from twotower.cli import summary
    from twotower.data.reading.readers import read_file
    from twotower.data.reading.table_path import TABLE_SUFFIXES, TEXT_SUFFIXES, TablePath, ending
    from twotower.data.reading.table_paths import exists, table_files, table_source
    from twotower.data.reading.text_files import Reading
    from twotower.data.reading.text_format import TextFormat
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
    form.check_used(paths, "`{}`")
    found = {}
    for name, path in paths.items():
        reading = Reading(None).of_table(form if name == "interactions" else TextFormat(separator=separator))
        if name == "interactions" and layout == "sequences":  # whose values have no types
            reading = replace(reading, numbers=frozenset(), lines=(schema.user_id, schema.item_id))
        found[name] = read_file(str(path), reading)
    for name, frame in found.items():
        print(f"{name}: {frame.height:,} rows")
        for column, kind, missing, distinct, example in summary.describe(frame):
            print_line(f"  {column:<16} {kind:<14} {missing:>9,} missing {distinct:>11} distinct   {example}")
    for line in summary.activity(found):
        print_line(line)


def prepare(
    config: TableConfig,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the prepared dataset.")] = None,
    append: Annotated[
        str,
        typer.Option(
            "--append",
            metavar="NEW",
            help="Interactions to add to the folder data.buckets as a segment, in place of --out: a file, folder or "
            "pattern.",
        ),
    ] = "",
    engine: EngineName = "local",
    memory: Memory = "1GB",
    threads: Threads = 0,
    overrides: Overrides = None,
) -> None:
    """Prepare a log of any size for training, in bounded memory, or add new rows to its buckets. A second call resumes
    it."""
    from twotower.config.toml import load_config
    from twotower.data.prepare import append_segment
    from twotower.data.prepare.options import PrepareOptions
    from twotower.features.schema import Schema

    schema, resolved = load_config(config, overrides or [], trust=True)
    options = PrepareOptions(engine, parse_size("--memory", memory), threads)
    if out is None:
        if not append:
            raise ConfigError(
                "--out is missing; name a folder for the dataset, or new rows for the buckets in --append"
            )
        append_segment(resolved.data, schema or Schema(), resolved.split, append, options)
        buckets = f"data.buckets={resolved.data.buckets}"
        print_line(f"next: {shell_command('prepare', config, '--set', buckets, '--out', 'PREPARED')}")
        return
    if append:
        raise ConfigError("--append adds rows to the buckets and writes no --out; give one of them")
    from twotower import api

    api.prepare_folder(resolved, schema, out, options)
    print_line(f"next: {shell_command('train', config, '--set', f'data.prepared={out.resolve()}', '--run', 'RUN')}")


def bucket(
    config: TableConfig,
    out: Annotated[Path, typer.Option("--out", help="Folder for the buckets.")],
    engine: EngineName = "local",
    memory: Memory = "1GB",
    threads: Threads = 0,
    overrides: Overrides = None,
) -> None:
    """Write a log as buckets, the first half of a preparation. docs/prepared-format.md has the format."""
    from twotower import api
    from twotower.config.toml import load_config
    from twotower.data.prepare.options import PrepareOptions

    schema, resolved = load_config(config, overrides or [], trust=True)
    api.write_buckets(resolved, schema, out, PrepareOptions(engine, parse_size("--memory", memory), threads))
    print_line(
        f"next: {shell_command('prepare', config, '--set', f'data.buckets={out.resolve()}', '--out', 'PREPARED')}"
    )


def check_buckets(
    folder: Annotated[Path, typer.Argument(help="Folder of buckets that any engine wrote.")],
    config: Annotated[
        Path | None,
        typer.Option("--config", help="TOML file whose schema the folder must serve. Left out: no schema is compared."),
    ] = None,
) -> None:
    """Check a folder of buckets against docs/prepared-format.md. Exit code 2 if it breaks a rule."""
    from twotower import api
    from twotower.config.toml import load_config
    from twotower.data.buckets import Buckets

    schema = load_config(config, trust=True)[0] if config else None
    if config and schema is None:
        raise ConfigError(f"{config}: [schema] is missing; `config_template()` gives a template")
    problems = api.check_buckets(folder, schema)
    for line in problems[:SHOWN_PROBLEMS]:
        print_line(line)
    if problems:
        n, more = len(problems), len(problems) - SHOWN_PROBLEMS
        raise DataError(
            f"{folder}: {n} problem{'s' if n > 1 else ''}{f', {more} not shown' if more > 0 else ''}; "
            "docs/prepared-format.md has the rules, write the buckets again"
        )
    facts = Buckets.open(folder).facts
    print_line(
        f"{folder}: {facts.rows:,} interactions of {facts.read:,} read, of {facts.users:,} users and "
        f"{facts.items:,} items in {len(facts.buckets):,} buckets, meet docs/prepared-format.md"
    )


def parse_size(flag: str, text: str) -> int:
    """Return the bytes of a size such as "500MB". Raises ConfigError, which names the flag."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?B?)", text.strip().upper())
    unit = "" if found is None or found[2] in ("", "B") else found[2].removesuffix("B") + "B"
    if found is None:
        raise ConfigError(f"{flag} {text}: expected a size such as 500MB or 4GB")
    return int(float(found[1]) * _UNITS[unit])
