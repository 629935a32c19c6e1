"""The command line: `twotower <verb>`. A user's mistake ends with one line and exit code 2."""

from __future__ import annotations

import ast
import json
import os
import re
import sys
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer

from twotower import files
from twotower.errors import ConfigError, DataError, Interrupted, TwoTowerError
from twotower.escaping import escape_controls, shell_command
from twotower.reports.terminal import (
    Progress,
    install_failsafe_streams,
    print_answer,
    print_line,
    print_metrics,
    print_served,
    printed_messages,
    silenced_messages,
)

app = typer.Typer(help="Two-tower retrieval: train, evaluate, publish, recommend.", no_args_is_help=True,
                  pretty_exceptions_enable=False, add_completion=False)  # fmt: skip
data_app = typer.Typer(help="Download MovieLens, describe tables.", no_args_is_help=True)
app.add_typer(data_app, name="data")

# Click's base class, wherever the installed typer keeps its click.
_UsageError: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Setting of the config, such as train.epochs=3. Repeatable. Paths are relative to the config.",
    ),
]


_WORKING_VERBS = ("prepare", "train", "embed", "publish", "rollback", "gc", "fetch", "demo", "serve")
"""Verbs that write files or serve. The result of the others is their output."""


def _prints_its_result(words: list[str]) -> bool:
    return not any(word in _WORKING_VERBS for word in words[: 2 if words[:1] == ["data"] else 1])


RENAMED_FLAGS = {
    "--live": "--event-store",
    "--live-events": "--events-per-user",
    "--live-seconds": "--event-ttl",
    "--live-memory": "--event-memory",
    "--live-timeout": "--event-timeout",
    "--max-under-way": "--body-memory",
    "--anew": "--overwrite",
}
"""Former flag -> present flag."""


VERB_OF_FUNCTION = {
    "config_template": "config",
    "diagnose": "doctor",
    "fit": "train",
    "gc": "gc",
    "make_key": "key",
    "publish": "publish",
    "rollback": "rollback",
}
"""Function of the library -> verb with the same arguments, to translate calls in messages."""


def in_flags(message: str, words: list[str]) -> str:
    """Translate the arguments and calls in a message of the library into flags and commands.

    The library writes them between backticks: `folder`, `resume=True`, `rollback(store='a')`. An argument becomes its flag
    of the command that `words` name, a call the command of its verb. The rest stays.
    """
    flags = _flags(tuple(words))

    def translated(span: re.Match[str]) -> str:
        try:
            tree: Any = ast.parse(f"f({span[1]})", mode="eval").body
        except (MemoryError, RecursionError, SyntaxError, ValueError):
            return span[0]
        match tree.args, tree.keywords:
            case [ast.Name(id=name)], []:
                return flags.get(name, {}).get(True) or span[0]
            case [], [ast.keyword(arg=str(name), value=ast.Constant(value=value))]:
                return " ".join(_option(flags.get(name, {}), value)) or span[0]
            case [ast.Call(func=ast.Name(id=function), args=args, keywords=keywords)], []:
                if (verb := VERB_OF_FUNCTION.get(function)) and all(map(_is_text_or_switch, keywords)):
                    return f"`{shell_command(verb, *_call_words(_flags((verb,)), args, keywords))}`"
        return span[0]

    return re.sub(r"`([^`]+)`", translated, message)


def _is_text_or_switch(keyword: ast.keyword) -> bool:
    """Return whether the library writes such an argument; others stand in data that a message repeats."""
    return isinstance(keyword.value, ast.Constant) and isinstance(keyword.value.value, str | bool)


@cache
def _flags(words: tuple[str, ...]) -> dict[str, dict[bool, str]]:
    """Return the flags of the verb that `words` begin with: argument -> {True: flag, False: negated flag}, "" for none."""
    verb: Any = typer.main.get_command(app)
    for word in words:
        if (inner := getattr(verb, "commands", {}).get(word)) is None:
            break
        verb = inner

    def longest(options: list[str]) -> str:
        return max((o for o in options if o.startswith("-")), key=len, default="")

    return {p.name: {True: longest(p.opts), False: longest(p.secondary_opts)} for p in verb.params}


def _option(flag: dict[bool, str], value: object) -> list[str]:
    if isinstance(value, bool):
        return [flag[value]] if flag.get(value) else []
    return [flag[True], str(value)] if flag.get(True) else []


def _call_words(flags: dict[str, dict[bool, str]], args: list[ast.expr], keywords: list[ast.keyword]) -> list[object]:
    """Return the words of a command for the arguments of a call; a name becomes a placeholder in capitals."""
    words: list[object] = [a.id.upper() for a in args if isinstance(a, ast.Name)]
    for keyword in keywords:
        value, flag = ast.literal_eval(keyword.value), flags.get(keyword.arg or "", {})
        if isinstance(value, bool):
            words += _option(flag, value)
        else:
            words += [*filter(None, [flag.get(True, "")]), Path(value)]
    return words


def main() -> None:
    """Run the command line: an error of the package becomes one line and an exit code."""
    out = install_failsafe_streams()
    code = run_command(app)
    out.flush()
    if out.error:
        is_result = _prints_its_result(sys.argv[1:])
        code = code or int(is_result)
        if not is_result or not isinstance(out.error, BrokenPipeError):
            kind, lost = ("error", "the answer") if is_result else ("warning", "what was printed")
            print(f"{kind}: standard output: {out.error.strerror}; {lost} is lost", file=sys.stderr)
    sys.exit(code)


def run_command(command: typer.Typer, arguments: list[str] | None = None) -> int:
    """Run `command` and return the exit code: 0, 2 for a mistake in the input, 1 for failed training, 143 if stopped after
    saving, 130 if interrupted without saving."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        for word in words:
            files.check_name(word)
        for word in words[: words.index("--") if "--" in words else None]:
            if new := RENAMED_FLAGS.get(flag := word.partition("=")[0]):
                raise ConfigError(f"{flag} is renamed to {new}")
        with printed_messages(translate=lambda text: in_flags(text, words), on_stderr=_prints_its_result(words)):
            code = int(typer.main.get_command(command).main(arguments, standalone_mode=False) or 0)
        if code == 130:  # typer's exit code for KeyboardInterrupt
            raise KeyboardInterrupt
        return code
    except TwoTowerError as e:
        print(
            escape_controls(f"{'' if isinstance(e, Interrupted) else 'error: '}{in_flags(str(e), words)}"),
            file=sys.stderr,
        )
        return e.exit_code
    except _UsageError as e:
        print(escape_controls(f"error: {' '.join(e.format_message().split())}"), file=sys.stderr)
        return 2
    except MemoryError as e:
        print(
            escape_controls(f"error: out of memory ({e}); reduce the request, or use a larger machine"), file=sys.stderr
        )
        return 1
    except (Exception, KeyboardInterrupt) as e:
        cause: BaseException | None = e
        while cause and not isinstance(cause, typer.Abort | KeyboardInterrupt):
            cause = cause.__cause__ or cause.__context__  # a library may raise another error from an interrupt
        if cause is None:
            raise
        print("interrupted", file=sys.stderr)
        return 130


@app.command()
def prepare(
    config: Annotated[Path, typer.Argument(help="TOML file that names the tables.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the prepared dataset.")],
    overrides: Overrides = None,
) -> None:
    """Prepare sharded Parquet for training, as a stream in bounded memory; the tables may be larger than memory."""
    from twotower import api
    from twotower.config.toml import load_config

    schema, resolved = load_config(config, overrides or [])
    api.prepare_folder(resolved, schema, out)
    print_line(f"next: {shell_command('train', config, '--set', f'data.prepared={out.resolve()}', '--run', 'RUN')}")


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="TOML file. `twotower config` prints a template.")],
    # The argparse of Python 3.11, which torchrun uses, takes --run for its own --run-path.
    folder: Annotated[Path, typer.Option("--run", "-r", help="Folder for the run. Under torchrun, give it as -r.")],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume from the newest undamaged checkpoint.")] = False,
    override: Annotated[
        bool, typer.Option("--override", help="Resume although settings or data have changed.")
    ] = False,
) -> None:
    """Train on the tables that a config names, evaluate, and write a run folder. Under torchrun, all ranks take part."""
    from twotower import api
    from twotower.config.toml import load_config
    from twotower.distributed import DistributedContext

    schema, resolved = load_config(config, overrides or [])
    is_main = DistributedContext.from_environment().is_main
    with Progress() if is_main else silenced_messages() as callback:
        tables, schema = api.read(resolved, schema)
        done = api.fit(tables, schema, resolved, folder=folder, resume=resume, override=override, callback=callback)
    if not is_main:
        return
    print_metrics(done.metrics, resolved.evaluation.k[0])
    print_line(f"run: {folder}" + (f"   report: {folder / 'report.html'}" if (folder / "report.html").exists() else ""))
    print_line(f"next: {shell_command('evaluate', folder)}")


@app.command()
def evaluate(
    path: Annotated[Path, typer.Argument(metavar="RUN|STORE", help="Run folder, or store with a published bundle.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the metrics as JSON.")] = False,
) -> None:
    """Measure a run on its test part, or the current bundle of a store through the retriever that serves it."""
    from twotower import api, runs

    if api.is_store(path):
        retriever = api.retriever(path)
        found = api.evaluate_bundle(retriever)
        if as_json:
            known = {way: {m: v for m, v in metrics.items() if v == v} for way, metrics in found.items()}
            print(json.dumps({"bundle_id": retriever.bundle.id} | known, indent=1, allow_nan=False))
        else:
            print_line(f"bundle {retriever.bundle.id}")
            print(retriever.dataset.describe())
            print_served(found, runs.read_config(retriever.bundle.folder)[1].evaluation.k)
        return
    loaded = api.load(path)
    metrics = api.evaluate(loaded)
    if as_json:
        print(json.dumps(metrics, indent=1))
    else:
        print(loaded.dataset.describe())
        print_metrics(metrics, loaded.config.evaluation.k[0])


@app.command()
def doctor(run: Annotated[Path, typer.Argument(help="Run folder.")]) -> None:
    """Report whether the model learned and what prevents it. Exit code 1 if a finding is an error."""
    from twotower import api
    from twotower.diagnostics import describe_findings, diagnose

    findings = diagnose(api.load(run))
    for line in describe_findings(findings):
        print_line(line)
    if any(f.severity == "error" for f in findings):
        raise typer.Exit(1)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="Run folder.")],
    b: Annotated[Path, typer.Argument(help="Run folder with the same test interactions.")],
    resamples: Annotated[
        int,
        typer.Option(
            "--resamples", min=100, max=1_000_000, help="Bootstrap resamples of the test users. 100 to 1,000,000."
        ),
    ] = 1000,
) -> None:
    """Compare run B with run A: a paired bootstrap over the test users for each metric."""
    from twotower import api
    from twotower.reports.compare import compare_runs, describe_comparisons

    for line in describe_comparisons(compare_runs(api.load(a), api.load(b), resamples=resamples)):
        print_line(line)


@app.command()
def embed(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    table: Annotated[
        Path,
        typer.Argument(
            help="Items or users of any number, in Parquet or CSV: a file, a folder, or a pattern such as '*.parquet'."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for the vectors and their ids.")],
    side: Annotated[str, typer.Option("--side", help="Side of the table: item or user.")] = "item",
    shard_rows: Annotated[
        int,
        typer.Option(
            "--shard-rows", min=1, help="Rows of a shard. A table of one shard is vectors.npy and ids.parquet."
        ),
    ] = 1_048_576,
    precision: Annotated[str, typer.Option("--precision", help="Precision of the vectors: fp32 or fp16.")] = "fp32",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace vectors of another table or model in the folder.")
    ] = False,
    threads: Annotated[
        int,
        typer.Option("--threads", min=0, max=1024, help="Threads of a rank. 0: an equal share of the machine's cores."),
    ] = 0,
) -> None:
    """Write the vectors of all rows of a table, in bounded memory. The ranks of torchrun share the work; a second call resumes it."""
    from twotower.distributed import DistributedContext
    from twotower.machine import available_cores

    if side not in ("user", "item"):
        raise ConfigError(f"--side {side}: allowed are user and item")
    context = DistributedContext.from_environment()

    if context.world_size > 1:
        threads = threads or available_cores() // _local_ranks(context.world_size) or 1
    if threads:
        os.environ.setdefault("POLARS_MAX_THREADS", str(threads))  # read once, when polars is loaded
    import torch

    from twotower import api

    if threads:
        torch.set_num_threads(threads)
    if context.world_size > 1 and context.is_main:
        print_line(f"{context.world_size} ranks, each with {threads} thread{'s' if threads > 1 else ''}")
    api.embed(
        api.load(run), side, table, out, shard_rows=shard_rows, precision=precision,  # type: ignore[arg-type]
        overwrite=overwrite, context=context,
    )  # fmt: skip


def _local_ranks(ranks: int) -> int:
    """Return the number of ranks on this machine: LOCAL_WORLD_SIZE of torchrun, else all ranks."""
    given = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(given) if given.isdecimal() and int(given) else ranks


StoreOption = Annotated[Path, typer.Option("--store", help="Folder of published bundles.")]


@app.command()
def publish(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    store: StoreOption,
    overrides: Overrides = None,
    force: Annotated[
        bool, typer.Option("--force", help="Publish below the recall threshold. The history records it.")
    ] = False,
    reason: Annotated[str, typer.Option("--reason", help="Note for the history.")] = "",
) -> None:
    """Build a bundle of a run (towers, vectors, index), check it, and make it the current bundle of the store."""
    from twotower import api
    from twotower.config.toml import override_config

    loaded = api.load(run)
    for text in overrides or []:
        if not text.startswith("index."):
            raise ConfigError(f"--set {text}: a trained run can change index.* only")
    config = override_config(loaded.config, overrides or []).index
    api.publish(loaded, store, config, force=force, reason=reason)
    if texts := loaded.dataset.schema.texts("user"):
        which = ["--feature", texts[0].name] if len({t.source for t in texts}) > 1 else []
        example = _example_text(loaded.dataset.users.frame[texts[0].source])
        print_line(f"next: {shell_command('search', '--store', store, *which, *_positional_words(example))}")
    else:
        print_line(f"next: {shell_command('recommend', '--store', store, '--user', loaded.dataset.users.ids[0])}")


def _positional_words(word: str) -> list[str]:
    """Return the words of one argument that is no option, even if it begins with a dash."""
    return ["--", word] if word.startswith("-") else [word]


def _example_text(texts: Any) -> str:
    """Return a text of the column that is not blank."""
    return next((str(t) for t in texts.drop_nulls().head(100) if str(t).strip()), "some words")


@app.command()
def rollback(
    store: StoreOption,
    to: Annotated[str, typer.Option("--to", help="Bundle id. Empty: the bundle that was current before.")] = "",
    reason: Annotated[str, typer.Option("--reason", help="Note for the history.")] = "",
) -> None:
    """Make an earlier bundle current."""
    from twotower.publishing import maintenance

    bundle, alias = maintenance.rollback(store, to or None, reason=reason)
    print_line(f"current: {bundle.id}{f', {alias}' if alias else ''}")


@app.command()
def bundles(
    store: StoreOption,
    history: Annotated[bool, typer.Option("--history", help="List publishes, rollbacks and refusals instead.")] = False,
) -> None:
    """List the bundles of a store."""
    from twotower.store.store import Store

    opened = Store(store)
    if history:
        for line in opened.history():
            print_line(json.dumps(line, ensure_ascii=False))
        return
    for b in opened.bundles():
        recall = f"recall {b.recall_check.recall:.4f}" if b.recall_check else ""
        state = ", ".join(["current"] * b.current + [f"damaged: {b.damaged}"] * bool(b.damaged))
        print_line(f"{b.id}  {b.size / 1e6:>9,.1f} MB  {recall}  {state}".rstrip())


@app.command()
def gc(
    store: StoreOption,
    keep: Annotated[int, typer.Option("--keep", help="Number of newest bundles to keep. At least 2.")] = 2,
) -> None:
    """Remove old bundles, the files of killed publishers, and their Milvus collections."""
    from twotower.index.milvus.collections import MilvusCollections
    from twotower.publishing import maintenance
    from twotower.store.store import Store

    removed, dropped = maintenance.gc(store, keep)
    print_line(f"removed: {', '.join(removed) or 'nothing'}")
    if dropped:
        print_line(f"dropped: {', '.join(dropped)}")
    MilvusCollections(Store(store)).update_alias()  # a publish cannot move it while Milvus is down


@app.command()
def recommend(
    store: StoreOption,
    user: Annotated[str, typer.Option("--user", help="Id of the user.")] = "",
    features: Annotated[
        Path | None,
        typer.Option(
            "--features",
            help='JSON file: {"user_id", "features": {column: value}, "history": [item ids], "events": [item ids]}.',
        ),
    ] = None,
    k: Annotated[int, typer.Option("-k", help="Number of items.")] = 10,
    method: Annotated[int, typer.Option("--method", help="1: precomputed user vectors. 2: online user tower.")] = 1,
    ban: Annotated[list[str] | None, typer.Option("--ban", help="Id of an item to leave out. Repeatable.")] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(
            "--where", metavar="COLUMN=VALUE", help="Condition on the items, such as genres=Comedy. Repeatable."
        ),
    ] = None,
    keep_seen: Annotated[
        bool, typer.Option("--keep-seen", help="Keep items that the user has interacted with.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print the best items for a user, from the current bundle."""
    from twotower import files
    from twotower.retrieval.request import Request

    if not user and features is None:
        raise ConfigError("name a user with --user ID, or describe one with --features FILE.json")
    body = files.read_json(features) if features else {}
    if user:
        if not isinstance(body, dict) or str(body.get("user_id", user)) != user:
            raise ConfigError(f"--user {user} and the user_id in {features} differ; give one of them")
        body["user_id"] = user
    answer = _retriever(store).recommend(
        Request.parse(body),
        k,
        method,
        ban=ban or (),
        where=_filters(where),
        keep_seen=keep_seen,
    )
    print_answer(answer, as_json)


@app.command()
def search(
    store: StoreOption,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="Text to search for, in quotes.")],
    k: Annotated[int, typer.Option("-k", help="Number of items.")] = 10,
    feature: Annotated[
        str, typer.Option("--feature", help="Text feature of the user side. Required if the model has several.")
    ] = "",
    where: Annotated[
        list[str] | None,
        typer.Option(
            "--where", metavar="COLUMN=VALUE", help="Condition on the items, such as genres=Comedy. Repeatable."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print the best items for a text, by the online user tower. The model needs a text feature on the user side."""
    print_answer(_retriever(store).search(text, k, feature, where=_filters(where)), as_json)


@app.command()
def similar(
    store: StoreOption,
    item: Annotated[str, typer.Option("--item", help="Id of the item.")],
    k: Annotated[int, typer.Option("-k", help="Number of items.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print the items with the most similar vectors."""
    print_answer(_retriever(store).similar(item, k), as_json)


def _retriever(store: Path) -> Any:
    """Return the retriever of the current bundle, without loading torch."""
    from twotower.retrieval.retriever import Retriever
    from twotower.store.store import Store

    return Retriever(Store(store).current())


def _filters(where: list[str] | None) -> dict[str, str] | None:
    filters: dict[str, str] = {}
    for text in where or []:
        column, value = _column_and_value(text)
        if column in filters:
            raise ConfigError(f"--where {text}: a second condition on {column}; give one for each column")
        filters[column] = value
    return filters or None


def _column_and_value(text: str) -> tuple[str, str]:
    column, equals, value = text.partition("=")
    if not equals or not column:
        raise ConfigError(f"--where {text}: expected COLUMN=VALUE, such as genres=Comedy")
    return column, value


@app.command()
def serve(
    store: StoreOption,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="Port. 0: a free one.")] = 8000,
    workers: Annotated[int, typer.Option("--workers", help="Worker processes. One uses one core.")] = 1,
    threads: Annotated[int, typer.Option("--threads", help="Threads of one search.")] = 1,
    keys: Annotated[
        Path | None, typer.Option("--keys", help="File of API keys, as `twotower key` prints them.")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Listen beyond this machine without keys.")] = False,
    admin_port: Annotated[
        int | None, typer.Option("--admin-port", help="Port for rollback and reload. Needs a key of scope admin.")
    ] = None,
    event_store: Annotated[
        str,
        typer.Option(
            "--event-store",
            help="Store of recent events: memory, or redis://HOST:PORT/DB, shared by workers and hosts.",
        ),
    ] = "memory",
    events_per_user: Annotated[int, typer.Option("--events-per-user", help="Newest events kept for a user.")] = 200,
    event_ttl: Annotated[
        int, typer.Option("--event-ttl", help="Seconds that a user's events are kept after the newest.")
    ] = 86_400,
    event_memory: Annotated[
        int,
        typer.Option(
            "--event-memory",
            help="Bytes of recent events in a worker. Above it, users without new events for the longest time are dropped.",
        ),
    ] = 256 << 20,
    event_timeout: Annotated[float, typer.Option("--event-timeout", help="Timeout of the event store in ms.")] = 20.0,
    rate: Annotated[
        float, typer.Option("--rate", help="Requests per second of one client to one worker. 0: no limit.")
    ] = 0.0,
    burst: Annotated[int, typer.Option("--burst", help="Requests of one client at once. 0: those of two seconds.")] = 0,
    trusted_proxies: Annotated[
        str,
        typer.Option(
            "--trusted-proxies", help="Addresses and networks whose X-Forwarded-For is trusted, separated by commas."
        ),
    ] = "",
    max_k: Annotated[int, typer.Option("--max-k", help="Largest k of a request.")] = 1_000,
    max_list: Annotated[
        int, typer.Option("--max-list", help="Largest number of items in one list of a request.")
    ] = 10_000,
    max_batch: Annotated[int, typer.Option("--max-batch", help="Largest number of requests in one batch.")] = 100,
    max_body: Annotated[int, typer.Option("--max-body", help="Largest body of a request in bytes.")] = 1 << 20,
    max_wait: Annotated[float, typer.Option("--max-wait", help="Longest wait of a request in a burst, in ms.")] = 50.0,
    target_wait: Annotated[
        float, typer.Option("--target-wait", help="Longest wait in a burst that does not end, in ms.")
    ] = 5.0,
    unknown_user: Annotated[
        str, typer.Option("--unknown-user", help="Answer to an unknown user: popular (popular items) or 404.")
    ] = "popular",
    index_timeout: Annotated[
        float, typer.Option("--index-timeout", help="Timeout of a remote index (Milvus) in ms.")
    ] = 250.0,
    index_down: Annotated[
        str,
        typer.Option(
            "--index-down", help="Answer while a remote index is unavailable: popular (popular items) or 503."
        ),
    ] = "popular",
    console: Annotated[bool, typer.Option("--console/--no-console", help="Console page at /.")] = True,
    access_log: Annotated[bool, typer.Option("--access-log/--no-access-log", help="Log line for each request.")] = True,
    poll: Annotated[float, typer.Option("--poll", help="Seconds between two checks for a new bundle.")] = 0.5,
    memory_limit: Annotated[
        int,
        typer.Option(
            "--memory-limit", help="Memory of the process in bytes. 0: the limit of the machine or control group."
        ),
    ] = 0,
    drain: Annotated[
        float, typer.Option("--drain", help="Seconds after SIGTERM in which new connections are accepted.")
    ] = 0.0,
    grace: Annotated[float, typer.Option("--grace", help="Seconds after that for running requests to end.")] = 10.0,
    head_timeout: Annotated[
        float, typer.Option("--head-timeout", help="Timeout of the head of a request in seconds.")
    ] = 10.0,
    body_timeout: Annotated[
        float, typer.Option("--body-timeout", help="Timeout of a body, and of a client that reads a reply, in seconds.")
    ] = 10.0,
    keep_alive: Annotated[
        float, typer.Option("--keep-alive", help="Seconds that an idle connection is kept open.")
    ] = 75.0,
    max_connections: Annotated[
        int,
        typer.Option(
            "--max-connections",
            help="Largest number of connections of one worker. 0: what the limit of open files allows, at most 4,096.",
        ),
    ] = 0,
    max_per_address: Annotated[
        int,
        typer.Option(
            "--max-per-address",
            help="Largest number of connections of one address, trusted proxies excepted. 0: half of --max-connections.",
        ),
    ] = 0,
    body_memory: Annotated[
        int,
        typer.Option(
            "--body-memory", help="Memory of all bodies and replies in bytes, without the first 16 KiB of each."
        ),
    ] = 64 << 20,
) -> None:
    """Serve the current bundle of a store over HTTP, with a console at /."""
    options = dict(locals())
    try:
        from twotower.serve import supervisor
        from twotower.serve.settings import ServeSettings
    except ModuleNotFoundError as e:
        raise ConfigError(f"serving needs {e.name}: pip install -e '.[serve]'") from None
    code = supervisor.run_service(ServeSettings(**options))
    if code:
        raise typer.Exit(code)


@app.command()
def key(
    name: Annotated[str, typer.Argument(help="Name of the client. Appears in the log of requests.")],
    admin: Annotated[bool, typer.Option("--admin", help="Scope admin: the key may roll back and reload.")] = False,
) -> None:
    """Make an API key. Standard error shows the key, once; standard output has the lines for the file of `serve --keys`."""
    from twotower.serve.api_keys import make_key

    secret, lines = make_key(name, admin)
    print(f"the key of {name}, shown once: {secret}", file=sys.stderr)
    print(lines, end="")


@app.command()
def config() -> None:
    """Print a config file with every option, its default and its meaning."""
    from twotower.config.reference import config_template

    print(config_template(), end="")


@data_app.command()
def fetch(
    name: Annotated[str, typer.Argument(metavar="NAME", help="ml-1m, ml-100k, ml-1m-titles or ml-100k-titles.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for users, items and interactions as Parquet.")],
    source: Annotated[str, typer.Option("--source", help="Local archive. Empty: download it.")] = "",
) -> None:
    """Download a MovieLens dataset, verify it, and write three Parquet tables."""
    from twotower.data.datasets import movielens
    from twotower.data.tables import check
    from twotower.errors import did_you_mean

    known = movielens.SCHEMAS
    if name not in known:
        raise ConfigError(f"no dataset '{name}'{did_you_mean(name, known)} (allowed: {', '.join(known)})")
    tables = movielens.load(name, source or None)
    check(tables.users, tables.items, tables.interactions, known[name])
    movielens.save(tables, out)
    print_line(
        f"{out}: {tables.users.height:,} users, {tables.items.height:,} items, "
        f"{tables.interactions.height:,} interactions"
    )


@data_app.command()
def stats(folder: Annotated[Path, typer.Argument(help="Folder with users, items and interactions.")]) -> None:
    """Describe three tables: sizes, columns, missing and distinct values, activity per user and item."""
    from twotower.data import readers, summary

    found = {}
    for name in ("users", "items", "interactions"):
        path = next((p for e in ("parquet", "csv", "tsv") if (p := folder / f"{name}.{e}").exists()), None)
        if path is None and name == "interactions":
            raise DataError(f"{folder}: holds no interactions.parquet, .csv or .tsv")
        if path:
            found[name] = readers.read_file(path)
    for name, frame in found.items():
        print(f"{name}: {frame.height:,} rows")
        for column, kind, missing, distinct, example in summary.describe(frame):
            print_line(f"  {column:<16} {kind:<14} {missing:>9,} missing {distinct:>11} distinct   {example}")
    for line in summary.activity(found):
        print_line(line)


@app.command()
def demo(
    source: Annotated[str, typer.Option("--data", help="Local ml-1m.zip or ml-100k.zip. Empty: download it.")] = "",
    folder: Annotated[
        Path, typer.Option("--run", help="Folder for the run. An earlier demo in it is replaced.")
    ] = Path("runs/demo"),
    serve_it: Annotated[bool, typer.Option("--serve", help="Serve the bundle at the end, with the console.")] = False,
    port: Annotated[int, typer.Option("--port", help="Port of the service. 0: a free one.")] = 8000,
) -> None:
    """Run the main job on MovieLens: prepare, train DSSM + SENet, evaluate, recommend, publish, and with --serve, serve."""
    from twotower import api
    from twotower.cli.demo import recommendation_lines, run_demo

    if serve_it:  # a port in use is an error now, not after minutes of training
        from twotower.serve.listener import listen

        listen("127.0.0.1", port).close()

    with Progress() as progress:
        done = run_demo(source, folder, progress)
    k = done.config.evaluation.k[0]
    print()
    print_metrics(done.metrics, k)
    for line in recommendation_lines(done, k):
        print_line(line)
    store = folder.with_name(f"{folder.name}-store")
    print()
    api.publish(done, store)
    here = ".venv/bin/twotower"
    print()
    print_line(
        f"The run is in {folder}: config.toml, metrics.json, model.safetensors, and report.html to open in a browser."
    )
    print("Next:")
    print_line(f"  {shell_command('evaluate', folder, program=here)}")
    print_line(f"  {shell_command('recommend', '--store', store, '--user', done.dataset.users.ids[0], program=here)}")
    print_line(f"  {shell_command('doctor', folder, program=here)}")
    print(
        "  .venv/bin/twotower train examples/movielens-rank.toml --run runs/rank           # the best ranking, minutes"
        "\n  .venv/bin/twotower train examples/movielens-retrieve.toml --run runs/retrieve   # retrieval without attention, minutes"
        "\n  .venv/bin/twotower train examples/movielens-sequence.toml --run runs/sequence   # the best retrieval, twice as long"
        "\n  .venv/bin/twotower train examples/own-data.toml --run runs/own                    # your own tables, see docs/tutorial.md"
        "\nSee why a film was recommended, in a browser:"
    )
    print_line(f"  {shell_command('serve', '--store', store, program=here)}   # or make demo SERVE=1")
    if serve_it:
        serve(store, port=port)


if __name__ == "__main__":
    main()
