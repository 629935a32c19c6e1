"""Verbs of a service: serve, with an option for each setting, and key."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from twotower.cli.flags import VERB_OF_FUNCTION
from twotower.serve.settings import HINTS, ServeSettings

ENVIRONMENT_PREFIX = "TWOTOWER_SERVE_"
"""Start of the environment variable of an option. A Kubernetes Service named twotower sets TWOTOWER_PORT by itself."""


def serve(**given: Any) -> None:
    """Serve the current bundle of a store over HTTP, with a console at /."""
    from twotower.serve import supervisor

    given |= {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    if code := supervisor.run_service(ServeSettings(**given)):
        raise typer.Exit(code)


def _options() -> Iterator[inspect.Parameter]:
    """Yield the option of each setting. `max_k` is --max-k; a switch with default True also has a negation."""
    for field in fields(ServeSettings):
        kind, setting = get_args(HINTS[field.name])
        flag = _flag(field.name)
        yield inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            annotation=str if kind == Path | str else {Literal: str, tuple: list[str]}.get(get_origin(kind), kind),
            default=typer.Option(
                ... if field.default is MISSING else field.default,
                f"{flag}/--no-{flag[2:]}" if field.default is True else flag,
                envvar=f"{ENVIRONMENT_PREFIX}{field.name.upper()}",
                help=re.sub(r"`(\w+)(?:\(\))?`", _in_flags, setting.description),
            ),
        )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _in_flags(span: re.Match[str]) -> str:
    verb = VERB_OF_FUNCTION.get(span[1])
    return f"`twotower {verb}`" if verb else _flag(span[1])


serve.__signature__ = inspect.Signature([*_options()])  # type: ignore[attr-defined]


def key(
    name: Annotated[str, typer.Argument(help="Name of the client in the log of requests.")],
    admin: Annotated[bool, typer.Option("--admin", help="Scope admin: the key may roll back and reload.")] = False,
) -> None:
    """Make an API key. Prints the key on standard error, once, and the lines for `serve --keys` on standard output."""
    from twotower.serve.api_keys import make_key

    secret, lines = make_key(name, admin)
    print(f"the key of {name}, shown once: {secret}", file=sys.stderr)
    print(lines, end="")
