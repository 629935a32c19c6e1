"""`make demo`: train on MovieLens, and recommend films to three users."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from twotower import api
from twotower.config.toml import parse_config
from twotower.data.datasets import movielens
from twotower.data.tables import check
from twotower.errors import DataError
from twotower.features.schema import Sequence
from twotower.runs import Run
from twotower.train.callbacks import Callback

log = logging.getLogger(__name__)

DEMO_SCHEMA = movielens.SCHEMA.model_copy(
    update={
        "features": (
            *movielens.SCHEMA.features,
            Sequence(name="liked", side="user", interactions="positive", max_length=50),
        ),
    }
)
"""MovieLens with a history of liked films, so that recent events change the recommendations."""
_TOWER = {"layers": [128, 64], "senet": {"enabled": True}}
SETTINGS = {
    "model": {"width": 32, "pairs": [{"user": _TOWER, "item": _TOWER}]},
    "negatives": {"random": 5, "random_share": 0.7},
    "train": {
        "epochs": 8,
        "batch_size": 8192,
        "lr": 4e-3,
        "schedule": "cosine",
        "monitor": "validation.recall@10",
    },
}


def run_demo(data: str, folder: Path, callback: Callback) -> Run:
    """Train DSSM + SENet with random negatives on MovieLens; an earlier run in `folder` is replaced."""
    name, source = _choose_archive(data)
    try:
        raw = movielens.load(name, source)
    except DataError as e:
        if source:
            raise
        log.info(str(e))
        log.info("using MovieLens 100K instead")
        name, raw = "ml-100k", movielens.load("ml-100k", None)
    tables = check(raw.users, raw.items, raw.interactions, DEMO_SCHEMA)
    _, config = parse_config(SETTINGS)
    if name == "ml-100k":  # a tenth of the rows: a smaller batch gives it as many steps
        config = config.model_copy(update={"train": config.train.model_copy(update={"batch_size": 1024})})
    config = config.model_copy(
        update={"data": config.data.model_copy(update={"dataset": name, "archive": source or ""})}
    )
    return api.fit(tables, DEMO_SCHEMA, config, folder=folder, overwrite=True, callback=callback)


def _choose_archive(data: str) -> tuple[movielens.Name, str | None]:
    source = data or os.environ.get(movielens.SOURCE_VARIABLE, "")
    return (movielens.archive_name(source), str(Path(source).resolve())) if source else ("ml-1m", None)


def recommendation_lines(done: Run, k: int) -> Iterator[str]:
    """Yield lines for three users of different activity: films liked last, and the `k` best unseen films."""
    activity = np.bincount(done.dataset.train.user, minlength=len(done.dataset.users))
    order = np.argsort(activity, kind="stable")
    for share in (0.25, 0.5, 0.9):
        row = int(order[int(share * (len(order) - 1))])
        user = done.dataset.users.ids[row]
        yield ""
        yield f"user {user}, {activity[row]} ratings in training; liked last:"
        yield "    " + ";  ".join(api.recent_titles(done, user))
        yield f"  the {k} best films for them:"
        for place, r in enumerate(api.recommend(done, user, k), 1):
            yield f"    {place:>2}. {r.title}  (logit {r.score:+.2f})"
