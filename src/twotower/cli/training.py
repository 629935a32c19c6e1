"""Verbs of a run: train, evaluate, embed, doctor, compare, config."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from twotower.cli.flags import (
    AsJson,
    ColumnNames,
    Decimal,
    EngineName,
    KindModules,
    Overrides,
    RunFolder,
    Separator,
    Share,
    Trust,
    split_names,
)
from twotower.errors import ConfigError, RunError
from twotower.escaping import shell_command
from twotower.files import layout
from twotower.machine import available_cores, keep_freed_memory
from twotower.reports.terminal import print_line, silenced_messages

Threads = Annotated[
    int,
    typer.Option(
        "--threads",
        min=0,
        max=1024,
        help="Threads of a process. 0: the defaults of torch and polars; under torchrun an equal share of the cores.",
    ),
]


def train(
    config: Annotated[Path, typer.Argument(help="TOML file. `twotower config` prints a template.")],
    # The argparse of Python 3.11, which torchrun uses, takes --run for its own --run-path.
    folder: Annotated[Path, typer.Option("--run", "-r", help="Folder for the run; under torchrun, give it as -r.")],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume from the newest undamaged checkpoint.")] = False,
    override: Annotated[
        bool, typer.Option("--override", help="Resume although settings or data have changed.")
    ] = False,
    threads: Threads = 0,
    trust: Trust = False,
    kinds: KindModules = None,
) -> None:
    """Train on the tables of a config, evaluate, and write a run folder. Under torchrun, all ranks take part."""
    from twotower.distributed import DistributedContext

    context = DistributedContext.from_environment()
    set_threads(threads, context.world_size)
    keep_freed_memory()
    from twotower import api
    from twotower.config.toml import load_config
    from twotower.reports.metric_tables import print_metrics
    from twotower.reports.progress import Progress
    from twotower.reports.verdict import verdict

    # A run folder may come from anybody, so its config is data.
    is_of_run = folder.resolve() in config.resolve().parents or (config.parent / layout.ENCODERS).exists()
    schema, resolved = load_config(config, overrides or [], trust=trust or not is_of_run)
    is_main = context.is_main
    with nullcontext(Progress()) if is_main else silenced_messages() as callback:
        callback.on_phase("reading", resolved)
        tables, schema = api.read(resolved, schema)
        done = api.fit(tables, schema, resolved, folder=folder, resume=resume, override=override, callback=callback)
    if not is_main:
        return
    print_metrics(done.metrics, resolved.evaluation)
    found = verdict(done.metrics, done.config)
    for line in found.sentences if found else ():
        print_line(line)
    print_line(f"run: {folder}" + (f"   report: {folder / layout.REPORT}" if (folder / layout.REPORT).exists() else ""))
    words = ("publish", folder, "--store", Path("store")) if found and found.is_better else ("doctor", folder)
    print_line(f"next: {shell_command(*words)}")


def evaluate(
    path: Annotated[
        str,
        typer.Argument(metavar="RUN|STORE", help="Run folder, or folder or URL of a store with a published bundle."),
    ],
    as_json: AsJson = False,
    engine: EngineName = "local",
    share: Share = "",
    threads: Threads = 0,
    trust: Trust = False,
    kinds: KindModules = None,
) -> None:
    """Measure a run on its test part, or the current bundle of a store through the retriever that serves it."""
    set_threads(threads, 1)
    from twotower import api, runs
    from twotower.reports.metric_tables import print_metrics, print_served
    from twotower.retrieval.retriever import Retriever
    from twotower.store.store import Store

    if api.is_store(path):
        if engine != "local":
            raise ConfigError(
                f"--engine {engine}: ranks the users of a run; {path} is a store, which one process measures"
            )
        if share:
            raise ConfigError(f"--share {share}: is for a run; {path} is a store, which one process measures")
        with Store(path).current().lease() as bundle:
            retriever, settings = Retriever(bundle, threads or 1), runs.read_evaluation(bundle.folder)
        found = api.evaluate_bundle(retriever, settings)
        if as_json:
            known = {way: {m: v for m, v in metrics.items() if v == v} for way, metrics in found.items()}
            print(json.dumps({"bundle_id": retriever.bundle.id} | known, indent=1, allow_nan=False))
        else:
            print_line(f"bundle {retriever.bundle.id}")
            print(retriever.dataset.describe())
            if found:
                print_served(found, settings)
        return
    loaded = api.load(path, trust)
    metrics = api.evaluate(loaded, engine=engine, threads=threads, share=share)
    if as_json:
        print(json.dumps(metrics, indent=1))
    else:
        print(loaded.dataset.describe())
        print_metrics(metrics, loaded.config.evaluation)


def backtest(
    config: Annotated[Path, typer.Argument(help="TOML file. `twotower config` prints a template.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the backtest, which a second call continues.")],
    every: Annotated[str, typer.Option("--every", help="Length of a period, in days.")] = "7d",
    folds: Annotated[int, typer.Option("--folds", min=1, max=1000, help="Number of periods, the last of the log.")] = 8,
    gap: Annotated[
        str, typer.Option("--gap", help="Days before each period whose rows are not known yet when it begins.")
    ] = "0d",
    timezone: Annotated[
        str, typer.Option("--timezone", help="Time zone of the midnights at which periods begin, as Asia/Shanghai.")
    ] = "UTC",
    latest: Annotated[
        bool, typer.Option("--latest", help="Publish each model as `twotower publish --latest` does.")
    ] = False,
    overrides: Overrides = None,
    threads: Threads = 0,
    trust: Trust = False,
    kinds: KindModules = None,
) -> None:
    """Train on the past of each period, publish, and ask the retriever for the period; compare with simple scorers."""
    set_threads(threads, 1)
    keep_freed_memory()
    from twotower import api
    from twotower.config.toml import load_config
    from twotower.data.tables import Tables
    from twotower.publishing.backtest import PAGE, Schedule, days_of
    from twotower.reports.progress import Progress

    schedule = Schedule(days_of(every, "--every"), folds, days_of(gap, "--gap", 0), timezone)
    is_of_run = (config.parent / layout.ENCODERS).exists()
    schema, resolved = load_config(config, overrides or [], trust=trust or not is_of_run)
    tables, schema = api.read(resolved, schema)
    if not isinstance(tables, Tables):
        raise ConfigError("data.prepared keeps no dates of the log; name the tables in data.interactions")
    done = api.backtest(tables, schema, resolved, out, schedule, latest=latest, callback=Progress())
    for line in done.lines():
        print_line(line)
    print_line(f"report: {out / PAGE}")


def embed(
    run: RunFolder,
    table: Annotated[
        str,
        typer.Argument(
            help="Items or users, in Parquet or text: a file, a folder, a pattern such as '*.parquet', or a URL."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder or URL for the vectors and their ids.")],
    side: Annotated[str, typer.Option("--side", help="Side of the table: item or user.")] = "item",
    shard_rows: Annotated[
        int, typer.Option("--shard-rows", min=1, help="Largest number of rows of a shard: one file, held in memory.")
    ] = 131_072,
    precision: Annotated[str, typer.Option("--precision", help="Precision of the vectors: fp32 or fp16.")] = "fp32",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Discard vectors of another table or model in the folder first.")
    ] = False,
    engine: EngineName = "local",
    share: Share = "",
    separator: Separator = "",
    decimal: Decimal = ".",
    columns: ColumnNames = "",
    threads: Threads = 0,
    trust: Trust = False,
) -> None:
    """Write the vectors of all rows of a table, in bounded memory. A second call resumes it."""
    from twotower.distributed import DistributedContext

    if side not in ("user", "item"):
        raise ConfigError(f"--side {side}: allowed are user and item")
    if (ranks := DistributedContext.from_environment().world_size) > 1:
        raise ConfigError(
            f"WORLD_SIZE={ranks}: embed is one process, whose shards an engine shares; call it without torchrun, "
            "and with --engine ray for several processes or hosts"
        )
    set_threads(threads, 1)
    from twotower import api

    api.embed(
        api.load(run, trust), side, table, out, shard_rows=shard_rows, precision=precision,  # type: ignore[arg-type]
        overwrite=overwrite, engine=engine, threads=threads, separator=separator, columns=split_names(columns),
        decimal=decimal, share=share,
    )  # fmt: skip


def doctor(run: RunFolder, trust: Trust = False) -> None:
    """Report whether the model learned and what prevents it. Exit code 1 if a finding is an error."""
    from twotower import api
    from twotower.diagnostics import describe_findings, diagnose

    findings = diagnose(api.load(run, trust))
    for line in describe_findings(findings):
        print_line(line)
    if any(f.severity == "error" for f in findings):
        raise typer.Exit(1)


def compare(
    a: RunFolder,
    others: Annotated[list[Path], typer.Argument(metavar="B…", help="Run folders with the same test interactions.")],
    report: Annotated[
        Path | None,
        typer.Option("--report", help="HTML page of the comparison, replaced if it is there. Left out: no page."),
    ] = None,
    resamples: Annotated[
        int,
        typer.Option(
            "--resamples", min=100, max=1_000_000, help="Bootstrap resamples of the test users. 100 to 1,000,000."
        ),
    ] = 1000,
    trust: Trust = False,
) -> None:
    """Compare one or more runs with run A: a paired bootstrap over the test users for each metric."""
    from twotower import api, files
    from twotower.reports.compare import MAX_RUNS, compare_with_first, describe_runs
    from twotower.reports.pages import write_comparison

    if len(others) >= MAX_RUNS:
        raise RunError(f"{len(others) + 1} runs are given; compare at most {MAX_RUNS} at a time")
    if report is not None:
        files.check_file(report)
    compared = compare_with_first((api.load(folder, trust) for folder in (a, *others)), resamples, report is not None)
    for line in describe_runs(compared):
        print_line(line)
    if report is not None:
        write_comparison(report, compared)
        print_line(f"report: {report}")


def config(
    everything: Annotated[
        bool, typer.Option("--all", help="Print every option, not only those to start with.")
    ] = False,
) -> None:
    """Print a config file with the options to start with, their defaults and meanings."""
    from twotower.config.reference import config_template

    print(config_template(everything), end="")


def set_threads(threads: int, ranks: int) -> int:
    """Set the threads of torch and polars, and return their number; 0: none is set.

    With `threads` 0, each of several ranks gets an equal share of the cores. Polars reads its number when it is loaded.
    """
    if ranks > 1:
        threads = threads or available_cores() // _local_ranks(ranks) or 1
    if threads:
        os.environ.setdefault("POLARS_MAX_THREADS", str(threads))
        import torch

        torch.set_num_threads(threads)
    return threads


def _local_ranks(ranks: int) -> int:
    """Return the number of ranks on this machine: LOCAL_WORLD_SIZE of torchrun, else all ranks."""
    given = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(given) if given.isdecimal() and int(given) else ranks
