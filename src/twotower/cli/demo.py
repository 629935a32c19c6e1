"""The verb demo: train two models on MovieLens, recommend films to three users, publish, serve."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from twotower.cli.answers import serve
from twotower.errors import DataError
from twotower.escaping import WINDOWS, shell_command, shell_word
from twotower.machine import keep_freed_memory
from twotower.reports.terminal import print_line
from twotower.train.progress import Callback

if TYPE_CHECKING:
    from twotower.data.datasets.movielens import MovieLens
    from twotower.data.tables import Tables
    from twotower.runs import Run

log = logging.getLogger(__name__)

SMALL_ROWS = 500_000
"""Interactions below which a model trains with smaller batches, for more epochs."""

MIN_ROWS = 20
"""Fewest test rows of films without a training rating for a metric of their own."""


@dataclass(frozen=True)
class Question:
    """A question, and the model that answers it."""

    title: str
    text: str
    folder: str
    """Suffix of the run folder's name."""
    recipe: str
    """Name of a recipe. Empty: demo.toml."""
    overrides: tuple[str, ...]
    """Options that replace those of the recipe."""
    small: tuple[str, ...]
    """Options for a small data set."""
    of_rankings: bool
    """True: metrics of rankings answer the question. False: metrics of pairs."""


NEXT = Question(
    title="What next?",
    text="Find the last film of each user among all films, by the films before it. Every rating counts as watched.",
    folder="",
    recipe="",
    overrides=(),
    small=("train.epochs=6", "train.batch_size=512", "train.lr=3e-3"),
    of_rankings=True,
)

LIKE = Question(
    title="Would they like it?",
    text="Separate the ratings above 3 from the others: a fifth of all ratings, held out at random.",
    folder="-like",
    recipe="ranking",
    overrides=(
        "model.width=128",
        'model.pairs.0.item={fields=["genres","year","likers","dislikers"],layers=[128],senet={enabled=true}}',
        'model.pairs.1.user={fields=["gender","age","occupation","liked","disliked"],layers=[128],senet={enabled=true}}',
        "train.epochs=3",
        "train.batch_size=16000",
        "train.lr=0.015",
        "narrow.width=128",
    ),
    small=("model.width=256", "train.epochs=10", "train.lr=0.005", "train.batch_size=4000"),
    of_rankings=False,
)


def demo(
    archive: Annotated[str, typer.Option("--data", help="Local ml-1m.zip or ml-100k.zip. Empty: download it.")] = "",
    folder: Annotated[
        Path,
        typer.Option(
            "--run",
            help="Folder for the first run, in place of an earlier demo; PATH-like and PATH-store hold the rest.",
        ),
    ] = Path("runs/demo"),
    serve_it: Annotated[bool, typer.Option("--serve", help="Serve the bundle at the end, with the console.")] = False,
    port: Annotated[int, typer.Option("--port", help="Port of the service. 0: a free one.")] = 8000,
) -> None:
    """Train on MovieLens, for the next film and for likes; evaluate, recommend, publish, and with --serve, serve."""
    keep_freed_memory()
    from twotower import api
    from twotower.reports.progress import Progress
    from twotower.runs.folder import locked

    if serve_it:  # a port in use is an error now, not after minutes of training
        from twotower.serve.supervisor import listen

        listen("127.0.0.1", port).close()

    folder = folder if folder.name not in ("", "..") else folder.resolve()
    places = [(question, folder.with_name(folder.name + question.folder)) for question in (NEXT, LIKE)]
    for _, place in places:  # so is another file at one of these paths
        with locked(place):
            pass
    dataset, raw = _read(archive)
    runs = []
    for question, place in places:
        print()
        print_line(f"{question.title} {question.text}")
        runs.append(_train(question, dataset, raw, place, Progress()))
        print()
        _print_table(question, runs[-1])
    run, like = runs
    for line in _recommendation_lines(run, run.config.evaluation.k[0]):
        print_line(line)
    store = folder.with_name(f"{folder.name}-store")
    print()
    api.publish(run, store)
    print()
    print_line(
        f"The runs are in {run.folder} and {like.folder}: config.toml, metrics.json with every metric, "
        "model.safetensors, and report.html to open in a browser."
    )
    for line in next_lines(folder, store, run.dataset.users.ids[0], dataset):
        print_line(line)
    if serve_it:
        serve(store=store, port=port)


def next_lines(folder: Path, store: Path, user: str | int, dataset: MovieLens, windows: bool = WINDOWS) -> list[str]:
    """Return lines with the commands that can follow, quoted for the shells of this system."""
    here, source = program_here(windows), ("--set", f"data.dataset={_toml(dataset, windows)}")
    commands = (
        (("evaluate", folder), "its metrics again"),
        (("recommend", "--store", store, "--user", user), "from the bundle"),
        (("doctor", folder), "whether it learned, and what prevents it"),
        (("train", _recipe("ranking"), "--run", "runs/rank", *source), "the best ranking, minutes"),
        (("train", _recipe("sequence-long"), "--run", "runs/sequence", *source), "the best retrieval, an hour"),
        (("suggest", "YOUR_CLICKS.csv", "--output", "mine.toml"), "a config for your own tables"),
        (("serve", "--store", store), "why a film was recommended, in a browser"),
    )
    quoted = ((shell_command(*words, program=here, windows=windows), what) for words, what in commands)
    return ["Next:", *(line for command, what in quoted for line in (f"  {what}:", f"    {command}"))]


def program_here(windows: bool = WINDOWS) -> str:
    """Return the command that starts this program."""
    # PowerShell would take a quoted program for a text
    python = "python" if windows else shell_word(sys.executable)
    return "twotower" if shutil.which("twotower") else f"{python} -m twotower"


def _toml(dataset: MovieLens, windows: bool) -> str:
    """Return a data set as a value of a config. For Windows shells, strings avoid double quotes where they can."""
    options = ", ".join(
        f"{key} = '{value}'" if windows and value.isprintable() and "'" not in value else f"{key} = {json.dumps(value)}"
        for key, value in dataset.model_dump(mode="json").items()
        if value
    )
    return f"{{ {options} }}"


def _recipe(name: str) -> Path:
    """Return the path of a recipe, relative to the present folder if it is inside."""
    from twotower.suggestion.recipes import recipe_path

    path = recipe_path(name)
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _read(archive: str) -> tuple[MovieLens, Tables]:
    """Return the data set and its tables: from an archive, else from the one of the environment, else downloaded."""
    from twotower.data.datasets import movielens
    from twotower.data.datasets.ml_1m import MovieLens1M
    from twotower.data.datasets.ml_100k import MovieLens100K

    archive = archive or os.environ.get(movielens.SOURCE_VARIABLE, "")
    archive = str(Path(archive).resolve()) if archive else ""
    kinds = (MovieLens1M, MovieLens100K)
    dataset: MovieLens
    dataset = movielens.kind_of_archive(archive, kinds)(archive=archive) if archive else MovieLens1M()
    try:
        return dataset, dataset.load()
    except DataError as e:
        if archive:
            raise
        log.info(str(e))
        log.info("using MovieLens 100K instead")
        dataset = MovieLens100K()
        return dataset, dataset.load()


def _train(question: Question, dataset: MovieLens, raw: Tables, folder: Path, callback: Callback) -> Run:
    """Train and evaluate the model of a question; an earlier run in `folder` is replaced."""
    from twotower import api
    from twotower.config.toml import override_settings, parse_config
    from twotower.data.tables import check
    from twotower.suggestion.recipes import read_recipe

    small = question.small if raw.interactions.height < SMALL_ROWS else ()
    own = Path(__file__).with_name("demo.toml")
    recipe = read_recipe(question.recipe) if question.recipe else tomllib.loads(own.read_text(encoding="utf-8"))
    settings = override_settings(recipe, (*question.overrides, *small))
    schema, config = parse_config({**settings, "data": {"dataset": dataset.model_dump()}})
    assert schema is not None
    tables = check(raw.users, raw.items, raw.interactions, schema)
    return api.fit(tables, schema, config, folder=folder, overwrite=True, callback=callback)


def _print_table(question: Question, run: Run) -> None:
    """Print the metrics of the model and its baselines that answer a question, and the metrics of cold films."""
    from twotower.reports.metric_tables import cell, columns, print_metrics

    config, data = run.config.evaluation, run.dataset
    print_metrics(run.metrics, config, [m for m in columns(config) if ("@" in m) == question.of_rankings])
    cold = data.item_counts == 0
    rows = int(cold[data.test.item].sum())
    found = ""
    if rows >= MIN_ROWS:
        metric = f"recall@{config.k[0]}" if question.of_rankings else "auc"
        found = f"; {metric} of these {cell(run.metrics.get(f'test.{metric}.cold_item'))}"
    print_line(
        f"{cold.sum():,} films of the catalogue have no rating in training; test rows of these: {rows:,} of "
        f"{len(data.test):,}{found}"
    )


def _recommendation_lines(run: Run, k: int) -> Iterator[str]:
    """Yield lines for three users of different activity: their latest films, and the `k` best unseen films."""
    import numpy as np

    from twotower import api

    activity = np.bincount(run.dataset.train.user, minlength=len(run.dataset.users))
    order, factors = np.argsort(activity, kind="stable"), run.factors()
    for share in (0.25, 0.5, 0.9):
        row = int(order[int(share * (len(order) - 1))])
        user = run.dataset.users.ids[row]
        yield ""
        yield f"user {user}, {activity[row]} ratings in training; watched last:"
        yield "    " + ";  ".join(api.recent_titles(run, user))
        yield f"  the {k} best films for them:"
        for place, r in enumerate(api.recommend(run, user, k, factors).items, 1):
            yield f"    {place:>2}. {r.title}  (logit {r.score:+.2f})"
