"""The verb demo: train on MovieLens, recommend films to three users, publish, serve."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from twotower.cli.serving import serve
from twotower.errors import DataError
from twotower.escaping import shell_command
from twotower.reports.terminal import print_line
from twotower.train.progress import Callback

if TYPE_CHECKING:
    from twotower.config.toml import TomlValue
    from twotower.runs import Run

log = logging.getLogger(__name__)

_TOWER: TomlValue = {"layers": [128, 64], "senet": {"enabled": True}}
SMALL_ROWS = 500_000
"""Number of interactions below which a demo trains with smaller batches."""
SETTINGS: dict[str, TomlValue] = {
    "model": {"width": 32, "pairs": [{"user": _TOWER, "item": _TOWER}]},
    "negatives": {"random": {"n": 5, "share": 0.7}},
    "train": {
        "epochs": 8,
        "batch_size": 8192,
        "lr": 4e-3,
        "schedule": "cosine",
        "monitor": "validation.recall@10",
    },
}


def demo(
    archive: Annotated[str, typer.Option("--data", help="Local ml-1m.zip or ml-100k.zip. Empty: download it.")] = "",
    folder: Annotated[
        Path, typer.Option("--run", help="Folder for the run. An earlier demo in it is replaced.")
    ] = Path("runs/demo"),
    serve_it: Annotated[bool, typer.Option("--serve", help="Serve the bundle at the end, with the console.")] = False,
    port: Annotated[int, typer.Option("--port", help="Port of the service. 0: a free one.")] = 8000,
) -> None:
    """Run the main job on MovieLens: prepare, train DSSM + SENet, evaluate, recommend, publish, and with --serve, serve."""
    from twotower import api
    from twotower.reports.metric_tables import print_metrics
    from twotower.reports.progress import Progress

    if serve_it:  # a port in use is an error now, not after minutes of training
        from twotower.serve.supervisor import listen

        listen("127.0.0.1", port).close()

    with Progress() as progress:
        run = _train(archive, folder, progress)
    print()
    print_metrics(run.metrics, run.config.evaluation)
    for line in _recommendation_lines(run, run.config.evaluation.k[0]):
        print_line(line)
    store = folder.with_name(f"{folder.name}-store")
    print()
    api.publish(run, store)
    here = ".venv/bin/twotower"
    print()
    print_line(
        f"The run is in {folder}: config.toml, metrics.json, model.safetensors, and report.html to open in a browser."
    )
    print("Next:")
    print_line(f"  {shell_command('evaluate', folder, program=here)}")
    print_line(f"  {shell_command('recommend', '--store', store, '--user', run.dataset.users.ids[0], program=here)}")
    print_line(f"  {shell_command('doctor', folder, program=here)}")
    print(
        "  .venv/bin/twotower train examples/recipes/ranking.toml --run runs/rank           # the best ranking, minutes"
        "\n  .venv/bin/twotower train examples/movielens-retrieve.toml --run runs/retrieve   # retrieval without attention, minutes"
        "\n  .venv/bin/twotower train examples/recipes/sequence-long.toml --run runs/sequence   # the best retrieval, twice as long"
        "\n  .venv/bin/twotower train examples/own-data.toml --run runs/own                    # your own tables, see docs/tutorial.md"
        "\nSee why a film was recommended, in a browser:"
    )
    print_line(f"  {shell_command('serve', '--store', store, program=here)}   # or make demo SERVE=1")
    if serve_it:
        serve(store=store, port=port)


def _train(archive: str, folder: Path, callback: Callback) -> Run:
    """Train DSSM + SENet with random negatives on MovieLens; an earlier run in `folder` is replaced."""
    from twotower import api
    from twotower.config.toml import parse_config
    from twotower.data.datasets import movielens
    from twotower.data.datasets.ml_1m import MovieLens1M
    from twotower.data.datasets.ml_100k import MovieLens100K
    from twotower.data.tables import check
    from twotower.features.sequence import Sequence

    archive = archive or os.environ.get(movielens.SOURCE_VARIABLE, "")
    archive = str(Path(archive).resolve()) if archive else ""
    kinds = (MovieLens1M, MovieLens100K)
    dataset: movielens.MovieLens
    dataset = movielens.kind_of_archive(archive, kinds)(archive=archive) if archive else MovieLens1M()
    try:
        raw = dataset.load()
    except DataError as e:
        if archive:
            raise
        log.info(str(e))
        log.info("using MovieLens 100K instead")
        dataset = MovieLens100K()
        raw = dataset.load()
    # With a history of liked films, so that recent events change the recommendations.
    liked = Sequence(name="liked", side="user", interactions="positive", max_length=50)
    schema = movielens.SCHEMA.model_copy(update={"features": (*movielens.SCHEMA.features, liked)})
    tables = check(raw.users, raw.items, raw.interactions, schema)
    _, config = parse_config(SETTINGS | {"data": {"dataset": dataset.model_dump()}})
    if raw.interactions.height < SMALL_ROWS:  # a smaller batch gives it as many steps
        config = config.model_copy(update={"train": config.train.model_copy(update={"batch_size": 1024})})
    return api.fit(tables, schema, config, folder=folder, overwrite=True, callback=callback)


def _recommendation_lines(run: Run, k: int) -> Iterator[str]:
    """Yield lines for three users of different activity: films liked last, and the `k` best unseen films."""
    import numpy as np

    from twotower import api

    activity = np.bincount(run.dataset.train.user, minlength=len(run.dataset.users))
    order = np.argsort(activity, kind="stable")
    for share in (0.25, 0.5, 0.9):
        row = int(order[int(share * (len(order) - 1))])
        user = run.dataset.users.ids[row]
        yield ""
        yield f"user {user}, {activity[row]} ratings in training; liked last:"
        yield "    " + ";  ".join(api.recent_titles(run, user))
        yield f"  the {k} best films for them:"
        for place, r in enumerate(api.recommend(run, user, k).items, 1):
            yield f"    {place:>2}. {r.title}  (logit {r.score:+.2f})"
