"""The verb suggest: a config for tables as they come."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Annotated

import typer
from typer.models import OptionInfo

from twotower.cli.flags import Overrides
from twotower.errors import ConfigError, DataError, OpenRoles
from twotower.escaping import escape_controls, shell_command, shell_word
from twotower.reports.terminal import print_line

_SETTING = re.compile(r"\bset ((?:schema|data|split)\.[\w.]+) = (?:'([^']*)'|\"([^\"]*)\")")
"""A setting in a message, with its value."""
OUTPUT = "--output"
"""The option with which the result is a file."""


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
        print_line(line)
    print_line(f"next: {shell_command('train', output, '--run', Path('runs') / output.stem)}")
