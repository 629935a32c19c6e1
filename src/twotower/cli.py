"""The command line: `twotower <verb>`. A user's mistake ends with one line and exit code 2."""

from __future__ import annotations

import ast
import json
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from twotower import files
from twotower.errors import ConfigError, DataError, Interrupted, TwoTowerError
from twotower.escaping import escape_controls, shell_command
from twotower.terminal import (
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
data_app = typer.Typer(help="Fetch MovieLens, look at tables.", no_args_is_help=True)
app.add_typer(data_app, name="data")

# Click's base class, wherever the installed typer keeps its click.
_UsageError: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="change a setting, such as train.epochs=3; paths are relative to the config"
    ),
]


_WORKING_VERBS = ("prepare", "train", "embed", "publish", "rollback", "gc", "fetch", "demo", "serve")
"""Verbs whose result is files or a service. The result of the others is what they print."""


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
"""Former name -> present name."""


VERB_OF_FUNCTION = {
    "config_template": "config",
    "diagnose": "doctor",
    "fit": "train",
    "gc": "gc",
    "make_key": "key",
    "publish": "publish",
    "rollback": "rollback",
}
"""Function of the library -> verb with the same arguments, for messages that advise a call."""


def in_flags(message: str, words: list[str]) -> str:
    """Return a message of the library in the words of the command line.

    The library writes arguments and calls between backticks: `folder`, `resume=True`, `rollback(store='a')`. With the
    command `words` an argument becomes its flag, and a call becomes the command of its verb. The rest stays.
    """
    flags = _flags(words)

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
                if verb := VERB_OF_FUNCTION.get(function):
                    return f"`{shell_command(verb, *_call_words(_flags([verb]), args, keywords))}`"
        return span[0]

    return re.sub(r"`([^`]+)`", translated, message)


def _flags(words: list[str]) -> dict[str, dict[bool, str]]:
    """Argument -> its flag, by whether it is on, of the verb that `words` begin with; "" for one without a flag."""
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
    """Words of a command for the arguments of a call; a name stands for a value that the reader has."""
    words: list[object] = [a.id.upper() for a in args if isinstance(a, ast.Name)]
    for keyword in keywords:
        value, flag = ast.literal_eval(keyword.value), flags.get(keyword.arg or "", {})
        if isinstance(value, bool):
            words += _option(flag, value)
        else:
            words += [*filter(None, [flag.get(True, "")]), Path(value)]
    return words


def main() -> None:
    """Entry point: turns errors of the package into one line and an exit code."""
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
    """Run `command` and return the exit code: 0, 2 for a user's mistake, 1 for failed training, 143 if stopped, 130 if
    interrupted before there was anything to save."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        for word in words:
            files.check_name(word)
        for word in words[: words.index("--") if "--" in words else None]:
            if new := RENAMED_FLAGS.get(flag := word.partition("=")[0]):
                raise ConfigError(f"{flag} is renamed to {new}")
        with printed_messages(translate=lambda text: in_flags(text, words), on_stderr=_prints_its_result(words)):
            code = int(typer.main.get_command(command).main(arguments, standalone_mode=False) or 0)
        if code == 130:  # what typer makes of one
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
            escape_controls(f"error: out of memory ({e}); ask for less, or give it a larger machine"), file=sys.stderr
        )
        return 1
    except (Exception, KeyboardInterrupt) as e:
        cause: BaseException | None = e
        while cause and not isinstance(cause, typer.Abort | KeyboardInterrupt):
            cause = cause.__cause__ or cause.__context__  # a library that is loaded makes another error of an interrupt
        if cause is None:
            raise
        print("interrupted", file=sys.stderr)
        return 130


@app.command()
def prepare(
    config: Annotated[Path, typer.Argument(help="a TOML file that names tables")],
    out: Annotated[Path, typer.Option("--out", help="folder for the prepared dataset")],
    overrides: Overrides = None,
) -> None:
    """Make sharded Parquet that may be larger than memory ready to train on, as a stream in bounded memory."""
    from twotower import api
    from twotower.config import load_config

    schema, resolved = load_config(config, overrides or [])
    api.prepare_folder(resolved, schema, out)
    print_line(f"next: {shell_command('train', config, '--set', f'data.prepared={out.resolve()}', '--run', 'RUN')}")


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="a TOML file; `twotower config` prints a template")],
    # Python 3.11's argparse, which torchrun uses, stumbles over --run: it has a --run-path.
    folder: Annotated[Path, typer.Option("--run", "-r", help="folder for the run; under torchrun spell it -r")],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the newest good checkpoint")] = False,
    override: Annotated[bool, typer.Option("--override", help="resume although settings or data changed")] = False,
) -> None:
    """Train on the tables a config names, evaluate, and write a run folder; under torchrun, with all ranks."""
    from twotower import api
    from twotower.config import load_config
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
    path: Annotated[Path, typer.Argument(metavar="RUN|STORE", help="a run folder, or a store with a published bundle")],
    as_json: Annotated[bool, typer.Option("--json", help="print the flat metrics as JSON")] = False,
) -> None:
    """Measure a run again on its own test part; or a published bundle, through the retriever that serves it."""
    from twotower import api

    if api.is_store(path):
        retriever = api.retriever(path)
        found = api.evaluate_bundle(retriever)
        if as_json:
            known = {way: {m: v for m, v in metrics.items() if v == v} for way, metrics in found.items()}
            print(json.dumps({"bundle_id": retriever.bundle.id} | known, indent=1, allow_nan=False))
        else:
            print_line(f"bundle {retriever.bundle.id}")
            print(retriever.dataset.describe())
            print_served(found, retriever.config.evaluation.k)
        return
    loaded = api.load(path)
    metrics = api.evaluate(loaded)
    if as_json:
        print(json.dumps(metrics, indent=1))
    else:
        print(loaded.dataset.describe())
        print_metrics(metrics, loaded.config.evaluation.k[0])


@app.command()
def doctor(run: Annotated[Path, typer.Argument(help="a run folder")]) -> None:
    """Say in plain words whether the model learned, and what keeps it from learning; exit code 1 if it finds an error."""
    from twotower import api
    from twotower.diagnostics import describe_findings, diagnose

    findings = diagnose(api.load(run))
    for line in describe_findings(findings):
        print_line(line)
    if any(f.severity == "error" for f in findings):
        raise typer.Exit(1)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="a run folder")],
    b: Annotated[Path, typer.Argument(help="another, with the same test interactions")],
    resamples: Annotated[int, typer.Option("--resamples", min=100, max=1_000_000, help="of the users")] = 1000,
) -> None:
    """Whether B is better than A: a paired bootstrap over the test users for each metric."""
    from twotower import api
    from twotower.compare import compare_runs, describe_comparisons

    for line in describe_comparisons(compare_runs(api.load(a), api.load(b), resamples=resamples)):
        print_line(line)


@app.command()
def embed(
    run: Annotated[Path, typer.Argument(help="a run folder")],
    table: Annotated[
        Path,
        typer.Argument(help="Parquet or CSV of items or users, as large as you like: a file, a folder, '*.parquet'"),
    ],
    out: Annotated[Path, typer.Option("--out", help="folder for the vectors and their ids")],
    side: Annotated[str, typer.Option("--side", help="item or user")] = "item",
    shard_rows: Annotated[
        int, typer.Option("--shard-rows", min=1, help="rows of a shard; one shard is vectors.npy and ids.parquet")
    ] = 1_048_576,
    precision: Annotated[str, typer.Option("--precision", help="fp32, or fp16 for half the disk")] = "fp32",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace vectors of another table or model that the folder holds")
    ] = False,
    threads: Annotated[
        int, typer.Option("--threads", min=0, max=1024, help="of a rank; 0: its share of the machine's cores")
    ] = 0,
) -> None:
    """Vectors of every row of a table, in bounded memory; shared by the ranks of torchrun, and gone on with when called again."""
    from twotower.distributed import DistributedContext

    if side not in ("user", "item"):
        raise ConfigError(f"--side {side}: allowed are user and item")
    context = DistributedContext.from_environment()

    if context.world_size > 1:
        threads = threads or _available_cores() // _local_ranks(context.world_size) or 1
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
    """How many of the ranks are on this machine: as torchrun says, else all of them."""
    said = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(said) if said.isdecimal() and int(said) else ranks


def _available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


StoreOption = Annotated[Path, typer.Option("--store", help="folder of published bundles")]


@app.command()
def publish(
    run: Annotated[Path, typer.Argument(help="a run folder")],
    store: StoreOption,
    overrides: Overrides = None,
    force: Annotated[
        bool, typer.Option("--force", help="publish below the recall threshold; the history will say so")
    ] = False,
    reason: Annotated[str, typer.Option("--reason", help="a note for the history")] = "",
) -> None:
    """Make a bundle of a run: towers, vectors, index, tested and sealed; it becomes the store's current one."""
    from twotower import api
    from twotower.config import override_config

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
    """A word that is no option, whatever it begins with."""
    return ["--", word] if word.startswith("-") else [word]


def _example_text(texts: Any) -> str:
    """A text that is there."""
    return next((str(t) for t in texts.drop_nulls().head(100) if str(t).strip()), "some words")


@app.command()
def rollback(
    store: StoreOption,
    to: Annotated[str, typer.Option("--to", help="a bundle id; the one that was current before, if empty")] = "",
    reason: Annotated[str, typer.Option("--reason", help="a note for the history")] = "",
) -> None:
    """Make an earlier bundle current again."""
    from twotower import maintenance

    bundle, alias = maintenance.rollback(store, to or None, reason=reason)
    print_line(f"current: {bundle.id}{f', {alias}' if alias else ''}")


@app.command()
def bundles(
    store: StoreOption,
    history: Annotated[bool, typer.Option("--history", help="every publish, rollback and refusal instead")] = False,
) -> None:
    """List the bundles of a store."""
    from twotower.store import Store

    opened = Store(store)
    if history:
        for line in opened.history():
            print_line(json.dumps(line, ensure_ascii=False))
        return
    for b in opened.bundles():
        recall = f"recall {b.recall_check['recall']:.4f}" if b.recall_check else ""
        state = ", ".join(["current"] * b.current + [f"damaged: {b.damaged}"] * bool(b.damaged))
        print_line(f"{b.id}  {b.size / 1e6:>9,.1f} MB  {recall}  {state}".rstrip())


@app.command()
def gc(
    store: StoreOption,
    keep: Annotated[int, typer.Option("--keep", help="newest bundles that stay, at least 2")] = 2,
) -> None:
    """Remove old bundles and what killed publishers left, their Milvus collections too."""
    from twotower import maintenance
    from twotower.index.milvus.collections import MilvusCollections
    from twotower.store import Store

    gone, dropped = maintenance.gc(store, keep)
    print_line(f"removed: {', '.join(gone) or 'nothing'}")
    if dropped:
        print_line(f"dropped: {', '.join(dropped)}")
    MilvusCollections(Store(store)).update_alias()  # it may have been left behind while Milvus was down


@app.command()
def recommend(
    store: StoreOption,
    user: Annotated[str, typer.Option("--user", help="a user's id")] = "",
    features: Annotated[
        Path | None,
        typer.Option(
            "--features",
            help='JSON file: {"user_id", "features": {column: value}, "history": [item ids], "events": [item ids]}',
        ),
    ] = None,
    k: Annotated[int, typer.Option("-k", help="how many")] = 10,
    method: Annotated[int, typer.Option("--method", help="1: stored user vectors; 2: the user tower live")] = 1,
    ban: Annotated[list[str] | None, typer.Option("--ban", help="an item id to leave out")] = None,
    where: Annotated[list[str] | None, typer.Option("--where", metavar="COLUMN=VALUE", help="only such items")] = None,
    keep_seen: Annotated[bool, typer.Option("--keep-seen", help="do not leave out what the user has met")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """The best items for a user, from the current bundle."""
    from twotower import files
    from twotower.request import Request

    if not user and features is None:
        raise ConfigError("name a user with --user ID, or describe one with --features FILE.json")
    body = files.read_json(features) if features else {}
    if user:
        if not isinstance(body, dict) or str(body.get("user_id", user)) != user:
            raise ConfigError(f"--user {user} and the user_id in {features} are not the same")
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
    text: Annotated[str, typer.Argument(metavar="TEXT", help="what is looked for, in quotes")],
    k: Annotated[int, typer.Option("-k", help="how many")] = 10,
    feature: Annotated[str, typer.Option("--feature", help="the users' text feature that reads it, if several")] = "",
    where: Annotated[list[str] | None, typer.Option("--where", metavar="COLUMN=VALUE", help="only such items")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """The best items for a text, by the user tower live; needs a text feature on the user side."""
    print_answer(_retriever(store).search(text, k, feature, where=_filters(where)), as_json)


@app.command()
def similar(
    store: StoreOption,
    item: Annotated[str, typer.Option("--item", help="an item's id")],
    k: Annotated[int, typer.Option("-k", help="how many")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """The items whose vectors are nearest to an item's."""
    print_answer(_retriever(store).similar(item, k), as_json)


def _retriever(store: Path) -> Any:
    """As `api.retriever`, without loading torch."""
    from twotower.retrieve import Retriever
    from twotower.store import Store

    return Retriever(Store(store).current())


def _filters(where: list[str] | None) -> dict[str, str] | None:
    filters: dict[str, str] = {}
    for text in where or []:
        column, value = _column_and_value(text)
        if column in filters:
            raise ConfigError(f"--where {text}: a condition on {column} is there already; give one for each column")
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
    host: Annotated[str, typer.Option("--host", help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="0 takes a free one")] = 8000,
    workers: Annotated[int, typer.Option("--workers", help="processes; one for each core that is to answer")] = 1,
    threads: Annotated[int, typer.Option("--threads", help="threads of one search")] = 1,
    keys: Annotated[Path | None, typer.Option("--keys", help="file of API keys (`twotower key`)")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="listen beyond this machine without keys")] = False,
    admin_port: Annotated[
        int | None, typer.Option("--admin-port", help="port for rollback and reload; needs a key of scope admin")
    ] = None,
    event_store: Annotated[
        str,
        typer.Option(
            "--event-store", help="recent events: memory, or redis://HOST:PORT/DB, shared by workers and hosts"
        ),
    ] = "memory",
    events_per_user: Annotated[int, typer.Option("--events-per-user", help="latest events kept of a user")] = 200,
    event_ttl: Annotated[int, typer.Option("--event-ttl", help="… and for how long after the last")] = 86_400,
    event_memory: Annotated[
        int,
        typer.Option("--event-memory", help="bytes of recent events in a worker; over it the longest unseen users go"),
    ] = 256 << 20,
    event_timeout: Annotated[
        float, typer.Option("--event-timeout", help="ms to wait for the store of histories")
    ] = 20.0,
    rate: Annotated[
        float, typer.Option("--rate", help="requests a second of one client to one worker; 0: no limit")
    ] = 0.0,
    burst: Annotated[int, typer.Option("--burst", help="… and at once; 0: two seconds' worth")] = 0,
    trusted_proxies: Annotated[
        str, typer.Option("--trusted-proxies", help="addresses whose X-Forwarded-For is believed, with commas")
    ] = "",
    max_k: Annotated[int, typer.Option("--max-k", help="largest k")] = 1_000,
    max_list: Annotated[int, typer.Option("--max-list", help="most items of one list of a request")] = 10_000,
    max_batch: Annotated[int, typer.Option("--max-batch", help="most requests of one batch")] = 100,
    max_body: Annotated[int, typer.Option("--max-body", help="bytes of a body")] = 1 << 20,
    max_wait: Annotated[float, typer.Option("--max-wait", help="ms a request may wait in a burst")] = 50.0,
    target_wait: Annotated[float, typer.Option("--target-wait", help="… and while the burst does not end")] = 5.0,
    unknown_user: Annotated[
        str, typer.Option("--unknown-user", help="popular: answer with popular items; 404: refuse")
    ] = "popular",
    index_timeout: Annotated[
        float, typer.Option("--index-timeout", help="ms to wait for an index that is elsewhere (Milvus)")
    ] = 250.0,
    index_down: Annotated[
        str, typer.Option("--index-down", help="popular: answer with popular items while it is silent; 503: refuse")
    ] = "popular",
    console: Annotated[bool, typer.Option("--console/--no-console", help="the page at /")] = True,
    access_log: Annotated[bool, typer.Option("--access-log/--no-access-log", help="a line for each request")] = True,
    poll: Annotated[float, typer.Option("--poll", help="seconds between two looks for a new bundle")] = 0.5,
    memory_limit: Annotated[
        int, typer.Option("--memory-limit", help="bytes the process may take; 0 asks the machine and the control group")
    ] = 0,
    drain: Annotated[float, typer.Option("--drain", help="seconds from SIGTERM to the last new connection")] = 0.0,
    grace: Annotated[float, typer.Option("--grace", help="seconds for requests under way after that")] = 10.0,
    head_timeout: Annotated[float, typer.Option("--head-timeout", help="seconds for the head of a request")] = 10.0,
    body_timeout: Annotated[
        float, typer.Option("--body-timeout", help="seconds for a body to come, and for a client to take a reply")
    ] = 10.0,
    keep_alive: Annotated[float, typer.Option("--keep-alive", help="seconds an idle connection is kept")] = 75.0,
    max_connections: Annotated[
        int,
        typer.Option("--max-connections", help="connections of one worker; 0: as many as open files allow, to 4,096"),
    ] = 0,
    max_per_address: Annotated[
        int, typer.Option("--max-per-address", help="… of one address, trusted proxies excepted; 0: half of them")
    ] = 0,
    body_memory: Annotated[
        int, typer.Option("--body-memory", help="bytes of bodies and replies together, beyond 16 KiB of each")
    ] = 64 << 20,
) -> None:
    """Answer over HTTP from the store's current bundle, and show a console at /."""
    options = dict(locals())
    try:
        from twotower.serve import process
        from twotower.serve.settings import ServeSettings
    except ModuleNotFoundError as e:
        raise ConfigError(f"serving needs {e.name}: pip install -e '.[serve]'") from None
    code = process.run_service(ServeSettings(**options))
    if code:
        raise typer.Exit(code)


@app.command()
def key(
    name: Annotated[str, typer.Argument(help="whose key it is; the name is in the log of requests")],
    admin: Annotated[bool, typer.Option("--admin", help="the key may also roll back and reload")] = False,
) -> None:
    """Make an API key: the key itself on stderr, once; the lines for the file of `serve --keys` on stdout."""
    from twotower.serve.api_keys import make_key

    secret, lines = make_key(name, admin)
    print(f"the key of {name}, shown only now: {secret}", file=sys.stderr)
    print(lines, end="")


@app.command()
def config() -> None:
    """Print a config file with every option, its default and its meaning."""
    from twotower.config import config_template

    print(config_template(), end="")


@data_app.command()
def fetch(
    name: Annotated[str, typer.Argument(metavar="NAME", help="ml-1m, ml-100k, or one of them with -titles after it")],
    out: Annotated[Path, typer.Option("--out", help="folder for users, items and interactions as Parquet")],
    source: Annotated[str, typer.Option("--source", help="local archive instead of the network")] = "",
) -> None:
    """Fetch a MovieLens, verify it, and write three Parquet tables."""
    from twotower.data import movielens
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
def stats(folder: Annotated[Path, typer.Argument(help="folder with users, items and interactions")]) -> None:
    """What three tables hold: sizes, columns, missing and distinct values, activity per user and item."""
    from twotower.data import tables

    found = {}
    for name in ("users", "items", "interactions"):
        path = next((p for e in ("parquet", "csv", "tsv") if (p := folder / f"{name}.{e}").exists()), None)
        if path is None and name == "interactions":
            raise DataError(f"{folder}: no interactions.parquet, .csv or .tsv there")
        if path:
            found[name] = tables.read_file(path)
    for name, frame in found.items():
        print(f"{name}: {frame.height:,} rows")
        for column, kind, missing, distinct, example in tables.describe(frame):
            print_line(f"  {column:<16} {kind:<14} {missing:>9,} missing {distinct:>11} distinct   {example}")
    for line in tables.activity(found):
        print_line(line)


@app.command()
def demo(
    data: Annotated[str, typer.Option("--data", help="local ml-1m.zip or ml-100k.zip")] = "",
    folder: Annotated[Path, typer.Option("--run", help="folder for the run; an earlier demo there is replaced")] = Path(
        "runs/demo"
    ),
    serve_it: Annotated[bool, typer.Option("--serve", help="then serve the bundle, with the console")] = False,
    port: Annotated[int, typer.Option("--port", help="… on this port; 0 takes a free one")] = 8000,
) -> None:
    """The main job on MovieLens: prepare, train DSSM + SENet, evaluate, recommend, publish; and serve it, if asked."""
    from twotower import api
    from twotower.demo import recommendation_lines, run_demo

    if serve_it:  # not after minutes of training
        from twotower.serve.process import listen

        listen("127.0.0.1", port).close()

    with Progress() as progress:
        done = run_demo(data, folder, progress)
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
