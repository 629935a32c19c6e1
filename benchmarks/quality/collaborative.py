import itertools
import time
import tomllib
from argparse import Namespace
from collections.abc import Callable, Container, Iterator
from functools import partial
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from benchmarks.lib.machine import Numbers
from benchmarks.lib.processes import ROOT
from benchmarks.lib.report import Report, declared
from benchmarks.quality.baselines import need
from twotower import api
from twotower.arrays.types import Doubles
from twotower.config.experiment import Config
from twotower.config.toml import override_config, parse_config
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.datasets.ml_1m import MovieLens1M
from twotower.data.splits import TEST, TRAIN, VALIDATION
from twotower.data.tables import Tables, check
from twotower.evaluation.bootstrap import bootstrap, paired_bootstrap
from twotower.evaluation.factors import Factors
from twotower.features.schema import Schema
from twotower.scorers.ease import ease_weights
from twotower.scorers.positives import PositiveMatrix

DECLARED: Numbers = declared(__file__)
K = 20
Scores = Callable[[Tensor], Tensor]  # histories (b, items) of zeros and ones -> scores (b, items)
Candidates = Iterator[tuple[Numbers, Scores, int | None]]  # settings, scores, width of the item vectors


def liked() -> pl.DataFrame:
    """Return the pairs of ratings of at least 4, of users and films with five or more of them, without their time."""
    pairs = MovieLens1M().load().interactions.filter(pl.col("rating") >= 4).select("user_id", "item_id")
    while True:
        kept = pairs.filter((pl.len().over("user_id") >= 5) & (pl.len().over("item_id") >= 5))
        if len(kept) == len(pairs):
            return kept
        pairs = kept


def films(pairs: pl.DataFrame) -> pl.DataFrame:
    """Return the films of some pairs, with their columns."""
    return MovieLens1M().load().items.join(pairs, "item_id", "semi")


def people(pairs: pl.DataFrame) -> pl.DataFrame:
    """Return the users of some pairs, with their columns."""
    return MovieLens1M().load().users.join(pairs, "user_id", "semi")


def recipe(kinds: Container[str]) -> tuple[Schema, Config]:
    """Return the recipe's schema, without the label, which pairs lack, and the title, and its config, with the scorers
    of some kinds."""
    given = tomllib.loads((ROOT / DECLARED["recipe"]).read_text())
    given["scorers"] = [scorer for scorer in given["scorers"] if scorer["kind"] in kinds]
    for name in ("label", "positive_above", "title"):
        del given["schema"][name]
    schema, config = parse_config(given)
    assert schema is not None
    return schema, config


def matrix(data: Dataset, *parts: int) -> Tensor:
    """Return (users, items) ones where a part has the pair."""
    pairs, out = data.pairs.take(np.isin(data.parts, parts)), torch.zeros(len(data.users), len(data.items))
    out[torch.from_numpy(pairs.user).long(), torch.from_numpy(pairs.item).long()] = 1
    return out


def blocks(n: int, size: int = 1024) -> list[slice]:
    return [slice(start, start + size) for start in range(0, n, size)]


def measures(data: Dataset, scores: Scores, part: int) -> Doubles:
    """Return (users with targets, 2) Recall@20 and NDCG@20; the ideal list has min(20, n) targets at the top."""
    seen, target, found = matrix(data, *range(part)), matrix(data, part), []
    gains = 1 / torch.log2(torch.arange(2, K + 2))
    for rows in blocks(len(seen)):
        hits = target[rows].gather(1, scores(seen[rows]).masked_fill(seen[rows] > 0, -torch.inf).topk(K).indices)
        n = target[rows].sum(1)
        ideal = gains.cumsum(0)[n.clamp(1, K).long() - 1]
        found.append(torch.stack([hits.sum(1) / n, (hits * gains).sum(1) / ideal], 1)[n > 0])
    return torch.cat(found).double().numpy()


def popularity(data: Dataset) -> Candidates:
    counts = matrix(data, TRAIN).sum(0)
    yield {}, lambda seen: counts.expand(len(seen), -1), None


def ease(data: Dataset, ridges: list[float]) -> Candidates:
    """EASE, all of it, by the maths of the start `ease`."""
    codes = np.arange(1, len(data.items) + 1, dtype=np.int32)
    gram = PositiveMatrix.of(data, codes, len(codes) + 1).gram()[1:, 1:]
    for ridge in ridges:
        weights = ease_weights(gram.to(torch.float64, copy=True), ridge).float()
        yield {"lambda": ridge}, lambda seen, weights=weights: seen @ weights, len(weights)  # type: ignore[misc]


def als(data: Dataset, factors: list[int], regularization: list[float], alpha: list[float]) -> Candidates:
    """implicit's AlternatingLeastSquares; users are folded in from their history."""
    library, sparse = need("implicit.als"), need("scipy.sparse")
    train = sparse.csr_matrix(matrix(data, TRAIN).numpy())
    for size, penalty, weight in itertools.product(factors, regularization, alpha):
        given = {"factors": size, "regularization": penalty, "alpha": weight}
        model = library.AlternatingLeastSquares(**given, num_threads=torch.get_num_threads(), random_state=1)
        model.fit(train, show_progress=False)

        def scores(seen: Tensor, model: Any = model) -> Tensor:
            users = model.recalculate_user(np.arange(len(seen)), sparse.csr_matrix(seen.numpy()))
            return torch.from_numpy(users @ model.item_factors.T)

        yield given, scores, model.item_factors.shape[1]


BASELINES: dict[str, Callable[..., Candidates]] = {"popularity": popularity, "ease": ease, "als": als}


def baseline(name: str, data: Dataset) -> Numbers:
    """Return the candidate of a baseline with the best mean of both measures on validation, its width, and its measures
    of each test user."""
    row: Numbers = {"validation": -1.0}
    for settings, scores, width in BASELINES[name](data, **DECLARED["rows"][name]):
        found = float(measures(data, scores, VALIDATION).mean())
        if found > row["validation"]:
            row = {"settings": settings, "validation": found, "width": width}
            row["users"] = [measures(data, scores, TEST).tolist()]
    return row


def trained(name: str, pairs: pl.DataFrame, seeds: int) -> Numbers:
    """Return the measures of each test user, by seed, of some pairs of the recipe, and its width."""
    users, kept = [], DECLARED["rows"][name]["scorers"]
    for seed in range(1, seeds + 1):
        schema, config = recipe(kept)
        config = override_config(config, [f"train.seed={seed}", "evaluation.bootstrap=0"])
        run = api.fit((people(pairs), films(pairs), pairs), schema, config)
        found, places = run.factors(TEST), iter(blocks(len(run.dataset.users)))

        def scores(seen: Tensor, found: Factors = found, places: Iterator[slice] = places) -> Tensor:
            return found.users[next(places)] @ found.items.T

        users.append(measures(run.dataset, scores, TEST).tolist())
    return {"settings": {"scorers": kept}, "users": users, "width": found.width}


def main(chosen: Namespace, report: Report) -> None:
    pairs = liked()
    schema, config = recipe(DECLARED["rows"]["columns"]["scorers"])
    tables: Tables = check(people(pairs), films(pairs), pairs, schema)
    data, done = build_dataset(tables, schema, config.split), {}
    print(data.describe())
    for name in chosen.only:
        started, key = time.perf_counter(), f"collaborative: {name}"
        make = partial(baseline, name, data) if name in BASELINES else partial(trained, name, pairs, chosen.seeds)
        row = report.rows().get(key) or make() | {"seconds": time.perf_counter() - started}
        each = np.array(row["users"])  # (seeds, users, measures)
        done[name] = each.mean(0)
        low, high = bootstrap(done[name], np.ones(each.shape[1]), 1000)
        for i, measure in enumerate((f"Recall@{K}", f"NDCG@{K}")):
            interval = [float(low[i]), float(high[i])]
            facts = {"interval": interval, "settings": row["settings"], "width": row.get("width")}
            report.add(f"{name}, {measure}", each.mean(1)[:, i].tolist(), **facts)
        report.add(f"{name}, seconds", row["seconds"], "s")
        for other in [n for n in done if n != name and name not in BASELINES]:
            ends = [end.tolist() for end in paired_bootstrap(done[other], done[name], np.ones_like(done[name]))]
            print(
                f"    {name} minus {other}, 95 %: "
                + "  ".join(f"{a:+.4f} to {b:+.4f} (p {p:.3f})" for a, b, p in zip(*ends, strict=True))
            )
        report.write({key: row})
