"""EASE that reads what users did not like, beside what they liked: the product with B of a matrix of both."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import torch
from worlds import settings

from twotower.config.experiment import Config
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.split import SplitConfig
from twotower.data.splits import TRAIN
from twotower.data.tables import check
from twotower.features.categorical import Categorical
from twotower.features.schema import Schema
from twotower.features.sequence import Sequence
from twotower.scorers.ease import leading
from twotower.train.factors import factors_before
from twotower.train.trainer import Trainer

USERS, ITEMS, WIDTH = 50, 12, 16


def log(liked: float = 0.5) -> pl.DataFrame:
    """Users take items of their taste, and like a random part of them."""
    rng = np.random.default_rng(3)
    taken = rng.random((USERS, ITEMS)) < np.where(np.arange(ITEMS) % 2 == np.arange(USERS)[:, None] % 2, 0.8, 0.2)
    user, item = np.nonzero(taken)
    rating = np.where(rng.random(len(user)) < liked, 5, 2)
    part = rng.choice(["train", "validation", "test"], len(user), p=[0.7, 0.15, 0.15])
    return pl.DataFrame({"user_id": user, "item_id": item, "rating": rating, "part": part})


def world(actions: pl.DataFrame) -> Dataset:
    one = {"side": "user", "share_embedding": False, "pooling": "sum"}
    features = (
        Sequence.model_validate(one | {"name": "liked", "interactions": "positive"}),
        Sequence.model_validate(one | {"name": "unliked", "interactions": "negative"}),
        Categorical(name="item_id", side="item"),
    )
    schema = Schema(label="rating", positive_above=3, features=features)
    return build_dataset(check(None, None, actions, schema), schema, SplitConfig(kind="column", column="part"))


def config(unliked: float | None, fields: tuple[str, ...] = ("liked", "unliked"), width: int = WIDTH) -> Config:
    user = {"fields": [*fields], "layers": [], "join": "sum", "activation": "Identity"}
    return settings(
        model={
            "width": width, "similarity": "dot", "bias": False, "temperature": 1.0,
            "pairs": [{"user": user, "item": {"fields": ["item_id"], "layers": []}}],
        },
        loss={"kind": "softmax"},
        negatives={"full": True, "mask_positives": False},
        split={"kind": "column", "column": "part"},
        train={
            "epochs": 0, "monitor": "validation.recall@5", "device": "cpu",
            "solved": [{"kind": "ease", "regularization": [3.0]} | ({"unliked": unliked} if unliked else {})],
        },
    )  # fmt: skip


def scores(trainer: Trainer, data: Dataset) -> np.ndarray:
    """The scores of the train part's histories, of size 1."""
    found = factors_before(trainer.run().model, data, TRAIN)
    return of_size_one((found.users @ found.items.T).double().numpy())


def of_size_one(values: np.ndarray) -> np.ndarray:
    sized: np.ndarray = values / np.linalg.norm(values)
    return sized


def matrices(data: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Positives and negatives (users, items) of the train part."""
    pairs, out = data.pairs.take(data.parts == TRAIN), np.zeros((2, len(data.users), len(data.items)))
    out[np.where(pairs.positive, 0, 1), pairs.user, pairs.item] = 1
    return out[0], out[1]


def of_both(data: Dataset, weight: float, width: int = WIDTH) -> np.ndarray:
    """The scores of the histories, up to a factor, by the matrix of positives and weighed negatives."""
    liked, unliked = matrices(data)
    x = liked + weight * unliked
    inverse = np.linalg.inv(x.T @ x + 3.0 * np.eye(x.shape[1]))
    b = -inverse / np.diag(inverse)
    np.fill_diagonal(b, 0)
    axes = np.linalg.svd(x @ b)[2][:width]
    found: np.ndarray = x @ b @ axes.T @ axes
    return found


@pytest.mark.parametrize("weight", [0.3, 1.0])
@pytest.mark.parametrize("width", [5, WIDTH])
def test_what_users_did_not_like_is_in_the_matrix_and_in_their_history(weight: float, width: int) -> None:
    data = world(log())
    found = scores(Trainer(data, config(weight, width=width)), data)
    expected = of_both(data, weight, width)
    np.testing.assert_allclose(found, of_size_one(expected), atol=1e-4)


def test_without_negatives_the_values_are_those_of_the_positives() -> None:
    data = world(log(1.0))
    assert not (data.parts[~data.pairs.positive] == TRAIN).any()
    both = scores(Trainer(data, config(0.5)), data)
    alone = scores(Trainer(data, config(None, ("liked",))), data)
    np.testing.assert_allclose(both, alone, atol=1e-5)


@pytest.mark.parametrize(("rank", "width"), [(200, 12), (200, 80), (200, 300), (20, 12), (3, 12), (0, 4)])
def test_leading_vectors_are_those_of_the_whole_matrix(rank: int, width: int) -> None:
    """Also of a matrix of fewer directions."""
    generator, place = torch.Generator().manual_seed(1), torch.arange(200)
    axes = torch.linalg.qr(torch.randn(200, 200, generator=generator)).Q
    matrix = (axes * torch.where(place < rank, 0.9**place, 0.0)) @ axes.T
    found, best = leading(lambda rows: matrix @ rows, 200, width, generator), axes[:, :width]
    torch.testing.assert_close(found.T @ found, torch.eye(min(width, 200)), rtol=0, atol=1e-5)
    torch.testing.assert_close(found @ (found.T @ matrix), best @ (best.T @ matrix), rtol=0, atol=1e-4)
