"""Verbs of a preparation: prepare, bucket, check-buckets."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from twotower.cli.flags import Overrides
from twotower.errors import ConfigError, DataError
from twotower.escaping import shell_command
from twotower.reports.terminal import print_line

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}

SHOWN_PROBLEMS = 20
"""Largest number of problems that check-buckets prints."""

TableConfig = Annotated[Path, typer.Argument(help="TOML file that names the tables.")]
EngineName = Annotated[
    str,
    typer.Option(
        "--engine",
        metavar="auto|local|duckdb|ray|ray://HOST:PORT",
        help="Engine that sorts the interactions: local (in memory), duckdb (on disk), auto (one of these, by the size of the log), or duckdb in "
        "--threads processes of this machine or in those of a cluster of Ray with --threads each.",
    ),
]
Memory = Annotated[
    str,
    typer.Option(
        "--memory", help="Memory for interactions, such as 500MB or 4GB, beside the tables of users and items."
    ),
]
Threads = Annotated[int, typer.Option("--threads", min=0, max=1024, help="Threads. 0: the cores of this machine.")]


def prepare(
    config: TableConfig,
    out: Annotated[Path, typer.Option("--out", help="Folder for the prepared dataset.")],
    engine: EngineName = "auto",
    memory: Memory = "1GB",
    threads: Threads = 0,
    overrides: Overrides = None,
) -> None:
    """Prepare a log of any size for training, in bounded memory. A second call goes on where a killed one stopped."""
    from twotower import api
    from twotower.config.toml import load_config
    from twotower.data.prepare.options import PrepareOptions

    schema, resolved = load_config(config, overrides or [], trust=True)
    api.prepare_folder(resolved, schema, out, PrepareOptions(engine, parse_size("--memory", memory), threads))
    print_line(f"next: {shell_command('train', config, '--set', f'data.prepared={out.resolve()}', '--run', 'RUN')}")


def bucket(
    config: TableConfig,
    out: Annotated[Path, typer.Option("--out", help="Folder for the buckets.")],
    engine: EngineName = "auto",
    memory: Memory = "1GB",
    threads: Threads = 0,
    overrides: Overrides = None,
) -> None:
    """Write the first half of a preparation: a log as buckets, Parquet files that follow docs/prepared-format.md."""
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
        f"{folder}: {facts.rows:,} interactions of {facts.read:,} read, of {facts.users:,} users and {facts.items:,} items in "
        f"{len(facts.buckets):,} buckets, meet docs/prepared-format.md"
    )


def parse_size(flag: str, text: str) -> int:
    """Return the bytes of a size such as "500MB". Raises ConfigError, which names the flag."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?B?)", text.strip().upper())
    unit = "" if found is None or found[2] in ("", "B") else found[2].removesuffix("B") + "B"
    if found is None:
        raise ConfigError(f"{flag} {text}: expected a size such as 500MB or 4GB")
    return int(float(found[1]) * _UNITS[unit])
