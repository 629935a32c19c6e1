"""Baselines that other tools train on the films of films.py."""

import io
from collections.abc import Iterator
from contextlib import redirect_stderr
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from benchmarks.quality.baselines import Candidates, need
from benchmarks.quality.films import HELD, Films, Part
from benchmarks.speed.recbole import SETTINGS, trained
from benchmarks.speed.tools import quiet
from twotower.arrays.types import Ints
from twotower.data.datasets.ml_1m import MovieLens1M
from twotower.evaluation.factors import Factors
from twotower.features.side import SIDES

USER, ITEM = ("user_id", "gender", "age", "occupation"), ("movie_id", "cate_id")
"""The fields of torch-rechub's examples."""


def rechub(films: Films, kind: str, epochs: int, batch: int, lr: float, power: float) -> Candidates:
    """torch-rechub's DSSM (BCE) or YoutubeDNN (softmax), three negatives a positive; a candidate after every epoch."""
    features, matching = need("torch_rechub.basic.features"), need("torch_rechub.models.matching")
    trainers, listwise, k, window = need("torch_rechub.trainers"), kind == "YoutubeDNN", 3, 50
    rng = np.random.default_rng(1)
    torch.manual_seed(1)
    columns = side_columns(films)
    sparse = {name: features.SparseFeature(name, int(c.max()) + 1, embed_dim=16) for name, c in columns.items()}
    shared = {"vocab_size": len(films.item_ids) + 1, "embed_dim": 16, "shared_with": "movie_id"}
    user_side = [sparse[name] for name in USER] + [features.SequenceFeature("hist_movie_id", pooling="mean", **shared)]
    item_side = [sparse[name] for name in (ITEM[:1] if listwise else ITEM)]
    tower: dict[str, Any] = {"dims": [256, 128, 64], "activation": "prelu"}
    if listwise:
        negative, tower = [features.SequenceFeature("neg_items", pooling="concat", **shared)], {"dims": [128, 64, 16]}
        model = matching.YoutubeDNN(user_side, item_side, negative, tower, temperature=0.02)
    else:
        model = matching.DSSM(user_side, item_side, tower, tower, temperature=0.02)
    adam = {"lr": lr, "weight_decay": 1e-6}
    trainer = trainers.MatchTrainer(model, mode=2 if listwise else 0, optimizer_params=adam)

    owner, at = films.history("validation")
    later = at > films.offsets[owner]  # every train item that has one before it
    owner, at = owner[later], at[later]
    counts = films.popularity()
    odds = np.where(counts > 0, counts**power, 0)
    negatives = rng.choice(len(films.item_ids), (len(at), k), p=odds / odds.sum())
    per_pair = 1 if listwise else 1 + k

    def fields(user: Ints, at: Ints) -> dict[str, Tensor]:
        named = {name: columns[name][user] for name in USER} | {"hist_movie_id": films.recent(at, user, window) + 1}
        return {name: torch.from_numpy(column) for name, column in named.items()}

    def items(item: Ints) -> dict[str, Tensor]:
        return {name: torch.from_numpy(columns[name][item]) for name in ITEM}

    def batches() -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        rows = rng.permutation(len(at) * per_pair)
        for start in range(0, len(rows), batch):
            pair, draw = np.divmod(rows[start : start + batch], per_pair)
            wanted = np.where(draw == 0, films.values[at[pair]], negatives[pair, draw - 1])
            x = fields(owner[pair], at[pair]) | items(wanted)
            if listwise:
                x["neg_items"] = torch.from_numpy(negatives[pair] + 1)
            yield x, torch.from_numpy(np.zeros(len(pair)) if listwise else (draw == 0).astype(float))

    @torch.no_grad()
    def vectors(part: Part) -> Factors:
        model.eval()
        model.mode = "user"
        users = model(fields(np.arange(len(films.user_ids)), films.ends(part)))
        model.mode = "item"
        found = Factors(users, model(items(np.arange(len(films.item_ids)))))
        model.mode = None
        return found

    for epoch in range(1, epochs + 1):
        with redirect_stderr(io.StringIO()):
            trainer.train_one_epoch(batches())
        yield adam | {"batch": batch, "negatives": k, "power": power, "epoch": epoch}, vectors


def recbole(films: Films, kind: str, epochs: int, rates: list[float]) -> Candidates:
    """RecBole's BPR (a table of vectors a side) or DSSM (BCE on the cosine), one uniform negative a positive; a
    candidate after every epoch."""
    user, at = films.history("validation")
    everyone = np.arange(len(films.user_ids))
    held: dict[str, Ints] = {part: films.target(part) for part in HELD}
    parts = {"train": pl.DataFrame({"user_id": user, "item_id": films.values[at]})}
    parts |= {part: pl.DataFrame({"user_id": everyone, "item_id": rows}) for part, rows in held.items()}
    sides: dict[str, pl.DataFrame] = {}
    if kind == "DSSM":
        columns = side_columns(films)
        sides["user"] = pl.DataFrame({"user_id": everyone} | {name: columns[name] for name in USER[1:]})
        sides["item"] = pl.DataFrame({"item_id": np.arange(len(films.item_ids)), "cate_id": columns["cate_id"]})
    for lr in rates:
        given = SETTINGS["ranked"] | {"learning_rate": lr}
        with trained(kind, parts, sides, **given) as (trainer, train, _):
            data, model = train._dataset, trainer.model
            own = {"user_id": everyone, "item_id": np.arange(len(films.item_ids))}
            u, i = (torch.from_numpy(data.token2id(field, rows.astype(str))) for field, rows in own.items())

            @torch.no_grad()
            def vectors(part: Part, data: Any = data, model: Any = model, u: Tensor = u, i: Tensor = i) -> Factors:
                model.eval()
                if kind == "BPR":
                    return Factors(model.user_embedding.weight[u], model.item_embedding.weight[i])
                caught: dict[str, Tensor] = {}
                layers = {side: getattr(model, f"{side}_mlp_layers") for side in SIDES}
                keep = {side: lambda _, __, out, side=side: caught.__setitem__(side, out) for side in SIDES}
                hooks = [layers[side].register_forward_hook(keep[side]) for side in SIDES]
                n, rows = max(len(u), len(i)), {"user_id": u, "item_id": i}
                padded = {name: torch.cat([of, of[:1].expand(n - len(of))]) for name, of in rows.items()}
                model.predict(data.join(need("recbole.data.interaction").Interaction(padded)))
                for hook in hooks:
                    hook.remove()
                user, item = (torch.nn.functional.normalize(caught[side], dim=1) for side in SIDES)
                return Factors(user[: len(u)], item[: len(i)])

            for epoch in range(1, epochs + 1):
                with quiet():
                    trainer._train_epoch(train, epoch)
                yield {"lr": lr, "batch": 2048, "negatives": 1, "epoch": epoch}, vectors


def side_columns(films: Films) -> dict[str, Ints]:
    """Codes from 1 of the fields USER by user row and ITEM by item row; the category is the first genre."""
    tables = MovieLens1M().load()
    users = pl.DataFrame({"user_id": films.user_ids}).join(tables.users, "user_id", "left", maintain_order="left")
    items = pl.DataFrame({"item_id": films.item_ids}).join(tables.items, "item_id", "left", maintain_order="left")
    columns = {name: users[name] for name in USER}
    columns |= {"movie_id": items["item_id"], "cate_id": items["genres"].list.first()}
    return {name: c.rank("dense").cast(pl.Int64).to_numpy() for name, c in columns.items()}
