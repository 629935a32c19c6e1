"""A run with every kind of feature, published, and its retriever."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
from worlds import EVERYTHING_SCHEMA, everything, settings

import twotower
from twotower import api
from twotower.features.numeric import Numeric
from twotower.features.sequence import Sequence
from twotower.model.pooling.attention import Attention
from twotower.model.pooling.decay import Decay
from twotower.model.pooling.transformer import Transformer
from twotower.retrieval.retriever import Retriever
from twotower.runs import Run

DECAY = Sequence(name="latest", side="user", pooling=Decay(rates=(0.0, 0.7, 1.0)))
SCHEMA = EVERYTHING_SCHEMA.model_copy(
    update={
        "features": (
            *(f for f in EVERYTHING_SCHEMA.features if f.name not in ("fans", "disliked")),
            DECAY,
            Sequence(name="order", side="user", pooling=Transformer(window=12)),
            Sequence(name="gist", side="user", interactions="positive", pooling=Attention(window=50)),
            Numeric(name="bought", side="user", statistic="count"),
            Numeric(name="mildness", side="user", statistic="mean"),
        )
    }
)
CONFIG = settings(
    split={"kind": "last"},
    loss={"kind": "softmax"},
    negatives={"full": True},
    train={"history_scope": "causal", "monitor": "validation.recall@5", "epochs": 3},
    evaluation={"k": [5, 10], "bootstrap": 20},
)


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Every kind of feature, a decaying history among them."""
    users, items, actions = everything()
    items = items.with_columns(year=pl.Series([1990.0 + i % 8 for i in range(len(items))]))
    return twotower.fit((users, items, actions), SCHEMA, CONFIG, folder=tmp_path_factory.mktemp("retrieval") / "run")


@pytest.fixture(scope="session")
def store(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stores") / "store"
    api.publish(run, path)
    return path


@pytest.fixture(scope="session")
def retriever(store: Path) -> Retriever:
    return api.retriever(store)
