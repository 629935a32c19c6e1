from argparse import Namespace
from collections.abc import Callable

import numpy as np
import polars as pl
import torch
from torch import Tensor

from benchmarks.lib.columns import without_columns
from benchmarks.lib.processes import ROOT
from benchmarks.lib.report import Report, declared
from benchmarks.quality.films import Part
from twotower import api
from twotower.arrays.types import Bools, Ints
from twotower.config.experiment import Config
from twotower.config.toml import load_config, override_config
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.datasets.ml_1m import MovieLens1M
from twotower.data.datasets.ml_100k import MovieLens100K
from twotower.data.splits import TEST, TRAIN, VALIDATION
from twotower.data.tables import Tables, check
from twotower.evaluation.bootstrap import bootstrap
from twotower.features.schema import Schema
from twotower.features.text import words

K, SEED, SHARE = 20, 2022, 10
"""Cut-off, seed of the split, and one part in SHARE that is withheld."""
FOLDS, EASE_LAMBDA = 5, 500.0
"""Folds of users, and the regularization of EASE, of the row that is told the likes of other users."""
PARTS: dict[Part, int] = {"validation": VALIDATION, "test": TEST}
Measured = dict[str, Tensor]
"""Values by user with a like to find: alone, Recall@20; …"""


def main(chosen: Namespace, report: Report) -> None:
    tables, withheld = split(SOURCES[chosen.data]())
    schema, config = recipe([], tables)
    data, part = build_dataset(check(*tables, schema), schema, config.split), PARTS[chosen.part]
    for name, row in declared(__file__)["rows"].items():
        if chosen.only not in name:
            continue
        if "baseline" in row:
            seeds, width = [measured(BASELINES[row["baseline"]](data, withheld), data, part, withheld)], None
        else:
            given = [*row["set"], *(text for text in chosen.set if text)]
            found = [trained([f"train.seed={n + 1}", *given], tables, part, withheld) for n in range(chosen.seeds)]
            seeds, width = [measures for measures, _ in found], found[0][1]
        for measure in seeds[0]:
            values = torch.stack([found[measure] for found in seeds]).double().numpy()
            interval = [float(end) for end in bootstrap(values.mean(0), np.ones(values.shape[1]), 1000)]
            facts = {"interval": interval, "part": chosen.part, "width": width}
            report.add(f"{chosen.data}, {name}, {measure}", values.mean(1).tolist(), **facts)
        report.write()


def recipe(changed: list[str], tables: tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]) -> tuple[Schema, Config]:
    """Return the recipe for a split by a column, with changed options, without columns that the tables lack."""
    schema, config = load_config(ROOT / "examples" / "recipes" / "cold-start.toml")
    assert schema is not None
    schema, config = without_columns(schema, config, tables[0].columns, tables[1].columns)
    return schema, override_config(
        config, ["split.kind=column", "split.column=part", "evaluation.bootstrap=0", *changed]
    )


def split(tables: Tables) -> tuple[tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame], dict[int, Ints]]:
    """Return users, items and likes with their part, and the ids of the withheld items of each part."""
    rng, items = np.random.default_rng(SEED), tables.items["item_id"].to_numpy()
    order, n = rng.permutation(len(items)), len(items) // SHARE
    withheld = {TEST: items[order[:n]], VALIDATION: items[order[n : 2 * n]]}
    likes = tables.interactions.filter(pl.col("rating") >= 4)
    item, drawn = likes["item_id"].to_numpy(), rng.random(likes.height)
    held = {name: np.isin(item, withheld[code]) for name, code in PARTS.items()}
    warm = np.where(drawn < 1 / SHARE, "test", np.where(drawn < 2 / SHARE, "validation", "train"))
    part = np.where(held["test"], "test", np.where(held["validation"], "validation", warm))
    return (tables.users, tables.items, likes.with_columns(part=pl.Series(part))), withheld


def trained(
    changed: list[str], tables: tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame], part: int, withheld: dict[int, Ints]
) -> tuple[Measured, int]:
    """Return the measures of a model, and its width."""
    schema, config = recipe(changed, tables)
    run = api.fit(check(*tables, schema), schema, config)
    factors = run.factors_at_once(part)
    return measured(factors.users.cpu() @ factors.items.cpu().T, run.dataset, part, withheld), factors.width


def measured(scores: Tensor, data: Dataset, part: int, withheld: dict[int, Ints]) -> Measured:
    """Return the measures of scores (U, N)."""
    cold, of_other = (
        torch.from_numpy(np.isin(data.items.frame["item_id"].to_numpy(), withheld[p]))
        for p in (part, VALIDATION + TEST - part)
    )
    warm = torch.from_numpy(likes(data, TRAIN).any(0))
    seen = torch.from_numpy(np.any([likes(data, p) for p in range(part)], 0))
    targets, ranked = torch.from_numpy(likes(data, part)) & ~seen, scores.masked_fill(seen | of_other, -torch.inf)
    out: Measured = {}
    for name, wanted, shown in (
        ("alone", cold, ranked.masked_fill(~cold, -torch.inf)),
        ("all", cold, ranked),
        ("warm", warm, ranked.masked_fill(~warm, -torch.inf)),
        ("every", torch.ones_like(warm), ranked),
    ):
        asked = (targets & wanted).any(1)
        recall, ndcg = recall_and_ndcg(shown[asked], (targets & wanted)[asked])
        out |= {f"{name}, Recall@{K}": recall, f"{name}, NDCG@{K}": ndcg}
    return out


def recall_and_ndcg(scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return (Q,) both measures of scores (Q, N) and a mask of what is to be found."""
    hit = targets.gather(1, scores.topk(min(K, scores.shape[1]), dim=1).indices).float()
    gains = 1 / torch.log2(torch.arange(hit.shape[1]) + 2.0)
    n = targets.sum(1)
    return hit.sum(1) / n, (hit @ gains) / gains.cumsum(0)[n.clamp(max=hit.shape[1]) - 1]


def likes(data: Dataset, part: int) -> Bools:
    """Return the likes (U, N) of a part."""
    out, pairs = np.zeros((len(data.users), len(data.items)), bool), data.part(part)
    out[pairs.user, pairs.item] = True
    return out


def genre_popularity(data: Dataset, withheld: dict[int, Ints]) -> Tensor:
    """Score an item by its genres: the mean over them of the mean number of training likes of their items."""
    genre = tags(data, title=False)
    counts = torch.from_numpy(likes(data, TRAIN).sum(0)).float()
    trained_on = (counts > 0).float()
    of_genre = (genre.T @ counts) / (genre.T @ trained_on).clamp(min=1)
    return (genre @ of_genre / genre.sum(1).clamp(min=1)).expand(len(data.users), -1)


def tf_idf(data: Dataset, withheld: dict[int, Ints]) -> Tensor:
    """Score an item by the cosine of its TF-IDF (title, genres) with the mean of the items that a user likes."""
    found = tags(data, title=True)
    weights = torch.log((1 + len(found)) / (1 + found.sum(0))) + 1
    vectors = torch.nn.functional.normalize(found * weights, dim=1)
    return torch.from_numpy(likes(data, TRAIN)).float() @ vectors @ vectors.T


def tf_idf_biased(data: Dataset, withheld: dict[int, Ints]) -> Tensor:
    """Score an item by `tf_idf`, and one without training likes higher or lower, as the recipe's model does."""
    scores, cold = tf_idf(data, withheld), torch.from_numpy(~likes(data, TRAIN).any(0))

    def every(bias: float) -> float:
        return float(measured(scores + bias * cold, data, VALIDATION, withheld)[f"every, Recall@{K}"].mean())

    biases = np.arange(-2.0, 8.0, 0.125) * float(scores.std(1).mean())
    found: Tensor = scores + max(biases.tolist(), key=every) * cold
    return found


def told_popularity(data: Dataset, withheld: dict[int, Ints]) -> Tensor:
    """Score an item by the number of its likes in all parts: no model, since the answers are in it."""
    return (
        torch.from_numpy(sum(likes(data, part).sum(0) for part in (TRAIN, VALIDATION, TEST)))
        .float()
        .expand(len(data.users), -1)
    )


def told_likes(data: Dataset, withheld: dict[int, Ints]) -> Tensor:
    """Score an item by EASE of all likes of other users, withheld items' too, in FOLDS folds of users, and of a user's
    own training likes: no model, since most answers are in it."""
    own = torch.from_numpy(likes(data, TRAIN)).float()
    every = own + torch.from_numpy(likes(data, VALIDATION) | likes(data, TEST)).float()
    fold, scores = torch.from_numpy(np.random.default_rng(SEED).integers(0, FOLDS, len(own))), torch.empty_like(own)
    for f in range(FOLDS):
        others = every[fold != f].clamp(max=1)
        inverse = torch.linalg.inv(others.T @ others + EASE_LAMBDA * torch.eye(others.shape[1]))
        weights = -inverse / inverse.diagonal()
        scores[fold == f] = own[fold == f] @ weights.fill_diagonal_(0)
    return scores


def tags(data: Dataset, title: bool) -> Tensor:
    """Return (N, T) ones where an item has a genre, or a word in its title, or a year."""
    frame = data.items.frame.with_row_index("row").cast({"row": pl.Int64})
    flat = frame.select("row", tag=pl.col("genres").cast(pl.List(pl.String))).explode("tag")
    if title:
        row, word = words(frame["title"])
        year = frame.select("row", tag=pl.format("word {}", "year"))
        flat = pl.concat([flat, pl.DataFrame({"row": row, "tag": "word " + word}), year])
    flat = flat.drop_nulls().unique()
    places, tag = flat["row"].to_list(), flat["tag"].rank("dense").to_list()
    out = torch.zeros(frame.height, max(tag))
    out[places, torch.tensor(tag) - 1] = 1
    return out


def world(n_users: int = 600, n_items: int = 500, n_tags: int = 12) -> Tables:
    """Return made data: items have two tags and a year, users like two tags and new items more than old ones."""
    rng = np.random.default_rng(SEED)
    has = np.argsort(rng.random((n_items, n_tags)), 1)[:, :2]
    year = rng.integers(1950, 2000, n_items)
    taste = np.argsort(rng.random((n_users, n_tags)), 1)[:, :2]
    fits = (taste[:, None, :, None] == has[None, :, None, :]).any(3).sum(2)
    odds = np.exp(2.0 * fits + (year - 1950) / 15 + rng.gumbel(size=(n_users, n_items)))
    user, item = np.divmod(np.argsort(-odds, 1)[:, :40] + n_items * np.arange(n_users)[:, None], n_items)
    items = pl.DataFrame({"item_id": np.arange(n_items), "title": [f"title {n}" for n in range(n_items)], "year": year})
    genres = pl.Series("genres", [[f"tag{tag}" for tag in row] for row in has.tolist()])
    pairs = pl.DataFrame({"user_id": user.ravel(), "item_id": item.ravel()}).with_columns(rating=pl.lit(5))
    return Tables(pl.DataFrame({"user_id": np.arange(n_users)}), items.with_columns(genres), pairs)


SOURCES: dict[str, Callable[[], Tables]] = {
    "ml-1m": lambda: MovieLens1M().load(),
    "ml-100k": lambda: MovieLens100K().load(),
    "world": world,
}
BASELINES: dict[str, Callable[[Dataset, dict[int, Ints]], Tensor]] = {
    "genre_popularity": genre_popularity, "tf_idf": tf_idf, "tf_idf_biased": tf_idf_biased,
    "told_popularity": told_popularity, "told_likes": told_likes,
}  # fmt: skip
