"""Verbs that answer from the current bundle of a store: recommend, search, similar, serve, and the key of a service."""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin

import typer

from twotower.cli.flags import (
    VERB_OF_FUNCTION,
    AsJson,
    ColumnNames,
    Conditions,
    ContextValues,
    Decimal,
    EngineName,
    ItemCount,
    KindModules,
    Separator,
    StoreFolder,
    read_columns,
    read_context,
    split_names,
)
from twotower.errors import ConfigError
from twotower.reports.terminal import print_answer
from twotower.retrieval import SHARD_USERS
from twotower.serve.settings import ServeSettings

USERS = "--users"
"""Option with which `recommend` writes files instead of printing an answer."""
OF_TABLES = ("unknown", "shard_rows", "overwrite", "engine", "threads", "separator", "decimal", "columns")
"""Options that go with USERS."""
ENVIRONMENT_PREFIX = "TWOTOWER_SERVE_"
"""Start of the environment variable of an option. A Kubernetes Service named twotower sets TWOTOWER_PORT by itself."""


def recommend(
    call: typer.Context,
    store: StoreFolder,
    user: Annotated[str, typer.Option("--user", help="Id of the user.")] = "",
    features: Annotated[
        Path | None,
        typer.Option(
            "--features",
            help='JSON file: {"user_id", "features": {column: value}, "history": [item ids], "events": [item ids], '
            '"context": {column: value}}.',
        ),
    ] = None,
    context: ContextValues = None,
    k: ItemCount = 10,
    method: Annotated[
        int | None,
        typer.Option(
            "--method", help="1: precomputed user vectors. 2: online user tower. Default: 1 if an id is enough, else 2."
        ),
    ] = None,
    ban: Annotated[list[str] | None, typer.Option("--ban", help="Id of an item to leave out. Repeatable.")] = None,
    where: Conditions = None,
    keep_seen: Annotated[
        bool | None,
        typer.Option(
            "--keep-seen/--drop-seen",
            help="Keep or leave out items the user has interacted with. Default: evaluation.repeats of the bundle.",
        ),
    ] = None,
    as_json: AsJson = False,
    users: Annotated[
        str | None,
        typer.Option(
            USERS,
            help="Table of users to answer: a file, a folder, a pattern such as '*.parquet', or a URL. Needs --out.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder or URL for the answers to --users, as Parquet.")
    ] = None,
    unknown: Annotated[
        str,
        typer.Option(
            "--unknown", help="Answer to a user of --users who is not in the bundle: popular (items), drop or error."
        ),
    ] = "popular",
    shard_rows: Annotated[
        int, typer.Option("--shard-rows", min=1, help="Users of a shard of --out, or fewer with a large -k.")
    ] = SHARD_USERS,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Discard answers of another bundle, table or options in --out first.")
    ] = False,
    engine: EngineName = "local",
    separator: Separator = "",
    decimal: Decimal = ".",
    columns: ColumnNames = "",
    threads: Annotated[
        int,
        typer.Option("--threads", min=0, max=1024, help="Threads of --users. 0: OMP_NUM_THREADS, else all cores."),
    ] = 0,
    kinds: KindModules = None,
) -> None:
    """Print the best items for a user, or write those for the users of a table, in bounded memory.

    A second call with --users and --out resumes the first."""
    if users is not None or out is not None:
        if users is None or out is None:
            raise ConfigError(
                "--users TABLE and --out FOLDER go together: a table of users, and a folder for their answers"
            )
        if user or features is not None or context or as_json:
            raise ConfigError("--users answers a whole table: leave out --user, --features, --context and --json")
        if threads:
            os.environ.setdefault("POLARS_MAX_THREADS", str(threads))  # read once, when polars is loaded
        from twotower.retrieval.recommendation_job import recommend_users

        recommend_users(
            store, users, out, k, method=1 if method is None else method,  # type: ignore[arg-type]
            unknown=unknown,  # type: ignore[arg-type]
            ban=ban or (), where=_filters(where), keep_seen=keep_seen, shard_rows=shard_rows, overwrite=overwrite,
            engine=engine, threads=threads, separator=separator, columns=split_names(columns), decimal=decimal,
        )  # fmt: skip
        return
    for name in OF_TABLES:
        if (source := call.get_parameter_source(name)) is not None and source.name == "COMMANDLINE":
            flag = _flag(name)
            raise ConfigError(f"{flag} is an option of --users TABLE --out FOLDER; name both, or leave it out")
    from twotower.files.readers import read_json
    from twotower.retrieval.request import Request
    from twotower.retrieval.retriever import current_retriever

    if not user and features is None and not context:
        raise ConfigError(
            "name a user with --user ID, describe one with --features FILE.json, or name a table with --users"
        )
    body = read_json(features) if features else {}
    if user:
        if not isinstance(body, dict) or str(body.get("user_id", user)) != user:
            raise ConfigError(f"--user {user} and the user_id in {features} differ; give one of them")
        body["user_id"] = user
    if context and isinstance(body, dict):
        if body.get("context") is not None:
            raise ConfigError(f"--context and the context in {features} are both given; give one of them")
        body["context"] = read_context(context)
    retriever = current_retriever(store)
    query = retriever.query(Request.parse(body))
    chosen = retriever.usual_method(query) if method is None else method
    answer = retriever.recommend(
        query, k, chosen, ban=ban or (), where=_filters(where), keep_seen=keep_seen,  # type: ignore[arg-type]
    )  # fmt: skip
    print_answer(answer, as_json)


def search(
    store: StoreFolder,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="Text to search for, in quotes.")],
    k: ItemCount = 10,
    feature: Annotated[
        str, typer.Option("--feature", help="Text feature of the user tower, required if the model has several.")
    ] = "",
    where: Conditions = None,
    context: ContextValues = None,
    as_json: AsJson = False,
    kinds: KindModules = None,
) -> None:
    """Print the best items for a text. The model needs a text feature of the users or of the context."""
    from twotower.retrieval.retriever import current_retriever

    print_answer(
        current_retriever(store).search(text, k, feature, context=read_context(context), where=_filters(where)), as_json
    )


def similar(
    store: StoreFolder,
    item: Annotated[str, typer.Option("--item", help="Id of the item.")],
    k: ItemCount = 10,
    as_json: AsJson = False,
    kinds: KindModules = None,
) -> None:
    """Print the items whose vectors have the highest cosine with the vector of an item, with titles."""
    from twotower.retrieval.retriever import current_retriever

    print_answer(current_retriever(store).similar(item, k), as_json)


def _filters(conditions: list[str] | None) -> dict[str, str] | None:
    return read_columns("--where", conditions, "genres=Comedy") or None


def serve(**given: Any) -> None:
    """Serve the current bundle of a store over HTTP, with a console at /."""
    from twotower.serve import supervisor

    given |= {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    if code := supervisor.run_service(ServeSettings(**given)):
        raise typer.Exit(code)


def _options() -> Iterator[inspect.Parameter]:
    """Yield the option of each setting. `max_k` is --max-k; a switch with default True also has a negation."""
    for name, field in ServeSettings.model_fields.items():
        kind, flag = field.annotation, _flag(name)
        yield inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            annotation=str if kind == Path | str else {Literal: str, tuple: list[str]}.get(get_origin(kind), kind),
            default=typer.Option(
                ... if field.is_required() else field.default,
                f"{flag}/--no-{flag[2:]}" if field.default is True else flag,
                envvar=f"{ENVIRONMENT_PREFIX}{name.upper()}",
                help=re.sub(r"`(\w+)(?:\(\))?`", _in_flags, field.description or ""),
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
