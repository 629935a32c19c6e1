"""Flags of several verbs, and the translation of the library's messages into flags and commands."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated

import typer
from pydantic import JsonValue

from twotower.errors import ConfigError
from twotower.escaping import shell_command
from twotower.files.urls import is_url
from twotower.kinds import import_modules

VERB_OF_FUNCTION = {
    "check_buckets": "check-buckets",
    "config_template": "config",
    "diagnose": "doctor",
    "fit": "train",
    "gc": "gc",
    "make_key": "key",
    "publish": "publish",
    "rollback": "rollback",
}
"""Function of the library -> verb with the same arguments."""

Flag = Mapping[bool, str]
"""True: the flag, False: the negated flag, "" for none."""

RunFolder = Annotated[Path, typer.Argument(help="Run folder.")]
StoreFolder = Annotated[
    str,
    typer.Option(
        "--store", metavar="FOLDER|URL", help="Published bundles: a folder, or a prefix such as s3://BUCKET/STORE."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Setting of the config, such as train.epochs=3, with paths relative to the config. Repeatable.",
    ),
]
ItemCount = Annotated[int, typer.Option("-k", help="Number of items.")]
Conditions = Annotated[
    list[str] | None,
    typer.Option("--where", metavar="COLUMN=VALUE", help="Condition on the items, such as genres=Comedy. Repeatable."),
]
ContextValues = Annotated[
    list[str] | None,
    typer.Option(
        "--context",
        metavar="COLUMN=VALUE",
        help="Value of the context, such as device=phone, or a JSON list in brackets. Repeatable.",
    ),
]
Trust = Annotated[
    bool, typer.Option("--trust", help="Import the code outside twotower that the config of the run names.")
]
KindModules = Annotated[
    list[str] | None,
    typer.Option(
        "--kinds",
        metavar="MODULE",
        callback=lambda modules: import_modules(modules or ()),
        is_eager=True,
        help="Module to import, with kinds that the bundle or the prepared data use. Repeatable.",
    ),
]
Separator = Annotated[
    str,
    typer.Option(
        "--separator",
        help="Character between the values of text files. Default: comma in .csv, tab in .tsv, space in .txt.",
    ),
]
ColumnNames = Annotated[
    str,
    typer.Option(
        "--columns",
        metavar="NAME,NAME,…",
        help="Names of the columns of text files without a header line, in order, separated by commas.",
    ),
]
Decimal = Annotated[
    str, typer.Option("--decimal", metavar=".|,", help="Decimal mark of numbers in text files. Default: a point.")
]
EngineName = Annotated[
    str,
    typer.Option(
        "--engine",
        metavar="local|ray|ray://HOST:PORT",
        help="Engine of the work: this process, --threads processes of this machine, or a Ray cluster.",
    ),
]
Share = Annotated[
    str,
    typer.Option(
        "--share",
        metavar="URL",
        help="Bucket prefix that passes the run to other hosts. Its files stay. Empty: all hosts have the run's path.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def split_names(text: str) -> list[str]:
    """Return the names of a value of --columns."""
    return [name.strip() for name in text.split(",")] if text else []


def read_columns(flag: str, given: list[str] | None, example: str) -> dict[str, str]:
    """Return the values of COLUMN=VALUE by column. Raises ConfigError, which names the flag and an example."""
    found = dict[str, str]()
    for text in given or ():
        column, equals, value = text.partition("=")
        if not equals or not column:
            raise ConfigError(f"{flag} {text}: expected COLUMN=VALUE, such as {example}")
        if column in found:
            raise ConfigError(f"{flag} {text}: a second value of {column}; give one for each column")
        found[column] = value
    return found


def read_context(given: list[str] | None) -> dict[str, JsonValue]:
    """Return the values of --context by column: a text, or a JSON list. Raises ConfigError."""
    context = dict[str, JsonValue]()
    for column, value in read_columns("--context", given, "device=phone").items():
        try:
            context[column] = json.loads(value) if value.startswith("[") else value
        except ValueError:
            raise ConfigError(f'--context {column}={value}: no list of JSON, such as ["a", "b"]') from None
    return context


def in_flags(message: str, words: Sequence[str], app: typer.Typer) -> str:
    """Translate the arguments and calls in a message of the library into flags and commands of `app`.

    The library writes them between backticks: `folder`, `resume=True`, `rollback(store='a')`. An argument becomes
    a flag of the command in `words`, a call the command of its verb. All other text stays.
    """
    flags = _flags(app, tuple(words))

    def translated(span: re.Match[str]) -> str:
        try:
            tree = ast.parse(f"f({span[1]})", mode="eval").body
        except (MemoryError, RecursionError, SyntaxError, ValueError):
            return span[0]
        match tree:
            case ast.Call(args=[ast.Name(id=name)], keywords=[]):
                return flags.get(name, {}).get(True) or span[0]
            case ast.Call(args=[], keywords=[ast.keyword(arg=str(name), value=ast.Constant(value=value))]):
                return (
                    " ".join(_option_words(flags.get(name, {}), value if isinstance(value, bool) else str(value)))
                    or span[0]
                )
            case ast.Call(args=[ast.Call(func=ast.Name(id=function), args=args, keywords=keywords)], keywords=[]):
                if (verb := VERB_OF_FUNCTION.get(function)) and all(map(_is_text_or_switch, keywords)):
                    return f"`{shell_command(verb, *_call_words(_flags(app, (verb,)), args, keywords))}`"
        return span[0]

    return re.sub(r"`([^`]+)`", translated, message)


def _is_text_or_switch(keyword: ast.keyword) -> bool:
    """Return True for an argument as the library writes it; any other is part of data that a message repeats."""
    return isinstance(keyword.value, ast.Constant) and isinstance(keyword.value.value, str | bool)


command_of = cache(typer.main.get_command)
"""app -> its command line, cached because it takes a tenth of a second."""


@cache
def _flags(app: typer.Typer, words: tuple[str, ...]) -> dict[str, Flag]:
    """Return the flags of the verb at the start of `words`, by argument."""
    verb = command_of(app)
    for word in words:
        if (inner := getattr(verb, "commands", {}).get(word)) is None:
            break
        verb = inner
    return {p.name or "": {True: _longest(p.opts), False: _longest(p.secondary_opts)} for p in verb.params}


def _longest(options: Iterable[str]) -> str:
    return max((o for o in options if o.startswith("-")), key=len, default="")


def _option_words(flag: Flag, value: str | bool) -> list[str]:
    if isinstance(value, bool):
        return [flag[value]] if flag.get(value) else []
    return [flag[True], value] if flag.get(True) else []


def _call_words(
    flags: Mapping[str, Flag], args: Iterable[ast.expr], keywords: Iterable[ast.keyword]
) -> list[str | Path]:
    """Return the words of a command for the arguments of a call; a name becomes a placeholder in capitals."""
    words: list[str | Path] = [a.id.upper() for a in args if isinstance(a, ast.Name)]
    for keyword in keywords:
        value, flag = ast.literal_eval(keyword.value), flags.get(keyword.arg or "", {})
        if isinstance(value, bool):
            words += _option_words(flag, value)
        else:
            words += [*filter(None, [flag.get(True, "")]), value if is_url(value) else Path(value)]
    return words
