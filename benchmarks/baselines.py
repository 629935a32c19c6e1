"""Baselines of next-film retrieval on MovieLens 1M (protocol P-DSSM), each tuned on validation.

    TWOTOWER_DATA=path/to/ml-1m.zip python benchmarks/baselines.py --sequences path/to/ml-1m-sequences.zip --out rows.json

Per user the last film is the test, the one before it validation, the rest train; every rating counts; all 3,416 films
with five or more ratings are ranked, the user's history removed; equal scores count against the model (the target
comes after them). Rows that --out has are kept; --only NAME runs one. Without --sequences the order is that of the
timestamps, equal ones in the archive's order, which is not the tie order of the published tables.
Rows `als`, `dssm`, `youtubednn` and `recbole-` need the tools that `make bench-env` installs. Of RecBole only its models
that have one vector a side are here; its sequence models take hours on a CPU.
"""

from __future__ import annotations

import importlib
import io
import itertools
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import torch
from measure import Numbers, load, options, result, save
from torch import Tensor

from twotower.arrays.types import Ints
from twotower.data.datasets import movielens
from twotower.evaluation.bootstrap import bootstrap
from twotower.evaluation.factors import Factors

Part = Literal["validation", "test"]
HELD: dict[Part, int] = {"validation": 2, "test": 1}
USER, ITEM = ("user_id", "gender", "age", "occupation"), ("movie_id", "cate_id")  # torch-rechub's fields
MEASURES = ("hr@10", "ndcg@10", "hr@100")

# ---- the split and its measure -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """Sequences of item rows, users one after another: the last of each is the test, the one before validation."""

    values: Ints  # (n,) item rows in time order
    offsets: Ints  # (n_users + 1,) where each user begins
    user_ids: Ints  # ids behind the user rows
    item_ids: Ints  # ids behind the item rows

    @classmethod
    def of(cls, users: Ints, items: Ints) -> Split:
        """Build a split from the ids of all interactions, ordered by user, then by time."""
        begin = np.flatnonzero(np.r_[True, users[1:] != users[:-1]])
        item_ids, values = np.unique(items, return_inverse=True)
        return cls(values.astype(np.int64), np.r_[begin, len(users)].astype(np.int64), users[begin], item_ids)

    def ends(self, part: Part) -> Ints:
        """Return (n_users,) the end of each user's history: train before validation, train and validation before test."""
        return self.offsets[1:] - HELD[part]

    def target(self, part: Part) -> Ints:
        """Return (n_users,) the target, the first item after the history."""
        return self.values[self.ends(part)]

    def positions(self, part: Part) -> tuple[Ints, Ints]:
        """Return (user rows, positions in `values`) of all histories before `part`."""
        user = np.repeat(np.arange(len(self.user_ids)), np.diff(self.offsets))
        at = np.flatnonzero(np.arange(len(user)) < self.ends(part)[user])
        return user[at], at

    def history(self, part: Part) -> tuple[Ints, Ints]:
        """Return (user rows, item rows) of all histories before `part`; before validation that is the train part."""
        user, at = self.positions(part)
        return user, self.values[at]

    def recent(self, at: Ints, user: Ints, n: int) -> Ints:
        """Return (len(at), n) the user's items before position `at`, the oldest first, -1 where there are fewer."""
        back = at[:, None] - np.arange(n, 0, -1)
        return np.where(back >= self.offsets[user][:, None], self.values[np.maximum(back, 0)], -1)

    def popularity(self) -> Ints:
        """Return (n_items,) the number of interactions of each item in the train part."""
        return np.bincount(self.history("validation")[1], minlength=len(self.item_ids))

    def matrix(self, part: Part) -> Tensor:
        """Return (n_users, n_items) ones where the history before `part` has the item."""
        out = torch.zeros(len(self.user_ids), len(self.item_ids))
        out[tuple(map(torch.from_numpy, self.history(part)))] = 1
        return out


def load_sequences(path: str | Path) -> Split:
    """Read sequences.txt from a zip: one line per user, the id, then item ids in time order."""
    with zipfile.ZipFile(path) as archive:
        lines = [np.array(line.split(), np.int64) for line in archive.read("sequences.txt").splitlines()]
    users = np.repeat([line[0] for line in lines], [len(line) - 1 for line in lines])
    return Split.of(users, np.concatenate([line[1:] for line in lines]))


def order_by_time(ratings: pl.DataFrame) -> Split:
    """Build a split from a table of interactions: items with five or more; equal timestamps keep the order of the table."""
    kept = ratings.filter(pl.len().over("item_id") >= 5).sort("user_id", "timestamp", maintain_order=True)
    return Split.of(kept["user_id"].to_numpy(), kept["item_id"].to_numpy())


Scored = Factors | Tensor
"""Scores of all users and items: as vectors, or as a block (n_users, n_items)."""


def ranks(scored: Scored, split: Split, part: Part, block: int = 1024) -> Ints:
    """Return (n_users,) the rank of each target, from 1, in the whole catalogue without the user's history.

    Ties: the target comes after every item of an equal score.
    """
    user, item = split.history(part)
    target = torch.from_numpy(split.target(part))
    out = np.empty(len(split.user_ids), np.int64)
    for start in range(0, len(split.user_ids), block):
        rows = slice(start, start + block)
        scores = scored.users[rows] @ scored.items.T if isinstance(scored, Factors) else scored[rows].clone()
        line, aim = torch.arange(len(scores)), target[rows]
        wanted = scores[line, aim].clone()
        if not wanted.isfinite().all():
            raise ValueError("scores that are not finite")
        low, high = np.searchsorted(user, [start, start + len(scores)])
        scores[torch.from_numpy(user[low:high] - start), torch.from_numpy(item[low:high])] = -torch.inf
        scores[line, aim] = wanted
        out[rows] = (scores >= wanted[:, None]).sum(1).cpu().numpy()
    return out


def quality(rank: Ints, resamples: int = 1000) -> dict[str, float]:
    """Return hr@10, ndcg@10 and hr@100 as means over users, each with .low and .high, its 95 % bootstrap interval."""
    ten, hundred = (rank <= 10).astype(np.float64), (rank <= 100).astype(np.float64)
    out: dict[str, float] = {}
    for name, values in zip(MEASURES, (ten, ten / np.log2(rank + 1), hundred), strict=True):
        out[name] = float(values.mean())
        if resamples:
            bounds = bootstrap(values, np.ones(len(values)), resamples)
            out[f"{name}.low"], out[f"{name}.high"] = (float(x) for x in bounds)
    return out


def evaluate(scored: Scored, split: Split, part: Part, resamples: int = 1000) -> dict[str, float]:
    """Return the metrics of `quality` for the scores of a model."""
    return quality(ranks(scored, split, part), resamples)


# ---- rows --------------------------------------------------------------------------------------------------------

Candidate = tuple[dict[str, Any], Callable[[Part], Scored]]
"""Settings, and the scores for a part by a model that has learned from the train part alone."""


def popularity(split: Split) -> Iterator[Candidate]:
    """Yield popularity: the number of interactions in the train part."""
    counts = torch.from_numpy(split.popularity()).float()[:, None]
    yield {}, lambda _: Factors(torch.ones(len(split.user_ids), 1), counts)


def transitions(split: Split, span: int = 20) -> Iterator[Candidate]:
    """Yield transition counts: how often b follows a, weighted gap^-p, each row scaled to sum 1 and each column divided by its sum^q;
    scored by the rows of the user's recent items, the n-th latest weighted n^-r."""
    user, item = split.history("validation")
    n = len(split.item_ids)
    lag = np.arange(1, span + 1)
    for p in (0.75, 1.0):
        flat = np.zeros(n * n, np.float32)
        for gap in lag:
            same = user[gap:] == user[:-gap]
            counts = np.bincount(item[:-gap][same] * n + item[gap:][same], minlength=n * n)
            flat += np.float32(gap**-p) * counts.astype(np.float32)
        counted = torch.from_numpy(flat).view(n, n)
        shares = counted / counted.sum(1, keepdim=True).clamp(min=1e-9)
        for q, r in itertools.product((0.0, 0.1, 0.2, 0.3), (0.75, 1.0, 1.25)):
            weights = torch.from_numpy(lag[::-1] ** -r).float()
            table = shares / counted.sum(0).clamp(min=1e-9) ** q

            def scores(part: Part, weights: Tensor = weights, table: Tensor = table) -> Tensor:
                recent = torch.from_numpy(split.recent(split.ends(part), np.arange(len(split.user_ids)), span)) + 1
                query = torch.zeros(len(split.user_ids), n + 1).scatter_add_(1, recent, weights.expand(recent.shape))
                return query[:, 1:] @ table

            yield {"span": span, "p": p, "q": q, "r": r}, scores


def ease(split: Split) -> Iterator[Candidate]:
    """Ridge regression of each item on all others, the diagonal zero (Steck 2019, "Embarrassingly Shallow
    Autoencoders for Sparse Data")."""
    seen = split.matrix("validation")
    gram = (seen.T @ seen).double()
    for ridge in (50.0, 100.0, 200.0, 400.0, 800.0):
        inverse = torch.linalg.inv(gram + ridge * torch.eye(len(split.item_ids), dtype=torch.float64))
        weights = (-inverse / inverse.diagonal()).fill_diagonal_(0).float()

        def scores(part: Part, weights: Tensor = weights) -> Tensor:
            return split.matrix(part) @ weights

        yield {"lambda": ridge}, scores


def als(split: Split) -> Iterator[Candidate]:
    """implicit's AlternatingLeastSquares on the train part; users are folded in from their history."""
    library, sparse = need("implicit.als"), need("scipy.sparse")
    one_thread = need("threadpoolctl").threadpool_limits
    everyone, threads = np.arange(len(split.user_ids)), torch.get_num_threads()
    train = sparse.csr_matrix(split.matrix("validation").numpy())
    for factors, reg, alpha in itertools.product((64, 128), (3.0, 10.0, 30.0), (0.5, 1.0, 2.0)):
        with one_thread(limits=1, user_api="blas"):  # as it asks for: its own threads go before those of BLAS
            model = library.AlternatingLeastSquares(
                factors=factors, regularization=reg, alpha=alpha, iterations=15, num_threads=threads, random_state=1
            )
            model.fit(train, show_progress=False)

        def vectors(part: Part, model: Any = model) -> Factors:
            users = model.recalculate_user(everyone, sparse.csr_matrix(split.matrix(part).numpy()))
            return Factors(torch.from_numpy(users), torch.from_numpy(model.item_factors))

        yield {"factors": factors, "regularization": reg, "alpha": alpha, "iterations": 15}, vectors


def rechub(split: Split, kind: str, epochs: int, batch: int, lr: float, power: float) -> Iterator[Candidate]:
    """torch-rechub's DSSM (BCE) or YoutubeDNN (softmax), three negatives a positive; a candidate after every epoch.

    Model, loss, optimiser, trainer, widths and fields are those of its examples/matching/run_ml_*.py, but for the zip
    code; negatives are drawn once, by count^power, as there. The library's loader goes row by row: batches are cut here.
    """
    features, matching = need("torch_rechub.basic.features"), need("torch_rechub.models.matching")
    trainers, listwise, k, window = need("torch_rechub.trainers"), kind == "YoutubeDNN", 3, 50
    rng = np.random.default_rng(1)
    torch.manual_seed(1)
    columns = side_columns(split)
    sparse = {name: features.SparseFeature(name, int(c.max()) + 1, embed_dim=16) for name, c in columns.items()}
    shared = {"vocab_size": len(split.item_ids) + 1, "embed_dim": 16, "shared_with": "movie_id"}
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

    owner, at = split.positions("validation")
    later = at > split.offsets[owner]  # every train item that has one before it
    owner, at = owner[later], at[later]
    counts = split.popularity()
    odds = np.where(counts > 0, counts**power, 0)
    negatives = rng.choice(len(split.item_ids), (len(at), k), p=odds / odds.sum())
    per_pair = 1 if listwise else 1 + k

    def fields(user: Ints, at: Ints) -> dict[str, Tensor]:
        named = {name: columns[name][user] for name in USER} | {"hist_movie_id": split.recent(at, user, window) + 1}
        return {name: torch.from_numpy(column) for name, column in named.items()}

    def items(item: Ints) -> dict[str, Tensor]:
        return {name: torch.from_numpy(columns[name][item]) for name in ITEM}

    def batches() -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        rows = rng.permutation(len(at) * per_pair)
        for start in range(0, len(rows), batch):
            pair, draw = np.divmod(rows[start : start + batch], per_pair)
            wanted = np.where(draw == 0, split.values[at[pair]], negatives[pair, draw - 1])
            x = fields(owner[pair], at[pair]) | items(wanted)
            if listwise:
                x["neg_items"] = torch.from_numpy(negatives[pair] + 1)
            yield x, torch.from_numpy(np.zeros(len(pair)) if listwise else (draw == 0).astype(float))

    @torch.no_grad()
    def vectors(part: Part) -> Factors:
        model.eval()
        model.mode = "user"
        users = model(fields(np.arange(len(split.user_ids)), split.ends(part)))
        model.mode = "item"
        found = Factors(users, model(items(np.arange(len(split.item_ids)))))
        model.mode = None
        return found

    for epoch in range(1, epochs + 1):
        with redirect_stderr(io.StringIO()):
            trainer.train_one_epoch(batches())
        yield adam | {"batch": batch, "negatives": k, "power": power, "epoch": epoch}, vectors


def recbole(split: Split, kind: str, epochs: int, rates: tuple[float, ...]) -> Iterator[Candidate]:
    """RecBole's BPR (a table of vectors a side) or DSSM (BCE on the cosine), one uniform negative a positive; a candidate
    after every epoch.

    Model, trainer, loaders and sampler are RecBole's, settings its defaults, for BPR the next learning rate of its
    documentation's range too. DSSM has torch-rechub's fields but the history, which its DSSM cannot read.
    """
    import peers

    user, item = split.history("validation")
    everyone = np.arange(len(split.user_ids))
    held: dict[str, Ints] = {part: split.target(part) for part in HELD}
    parts = {"train": pl.DataFrame({"user_id": user, "item_id": item})}
    parts |= {part: pl.DataFrame({"user_id": everyone, "item_id": rows}) for part, rows in held.items()}
    sides: dict[str, pl.DataFrame] = {}
    if kind == "DSSM":
        columns = side_columns(split)
        sides["user"] = pl.DataFrame({"user_id": everyone} | {name: columns[name] for name in USER[1:]})
        sides["item"] = pl.DataFrame({"item_id": np.arange(len(split.item_ids)), "cate_id": columns["cate_id"]})
    for lr in rates:
        given = peers.RANKED | {"learning_rate": lr}
        with peers.recbole(kind, parts, sides, **given) as (trainer, train, _, _):
            data, model = train._dataset, trainer.model

            def inside(rows: Ints, field: str, data: Any = data) -> Tensor:
                return torch.from_numpy(data.token2id(field, rows.astype(str)))

            users, items = inside(everyone, "user_id"), inside(np.arange(len(split.item_ids)), "item_id")

            @torch.no_grad()
            def vectors(
                part: Part, data: Any = data, model: Any = model, u: Tensor = users, i: Tensor = items
            ) -> Factors:
                model.eval()
                if kind == "BPR":
                    return Factors(model.user_embedding.weight[u], model.item_embedding.weight[i])
                caught: dict[str, Tensor] = {}
                hooks = [
                    getattr(model, f"{side}_mlp_layers").register_forward_hook(
                        lambda _, __, out, side=side: caught.__setitem__(side, out)
                    )
                    for side in ("user", "item")
                ]
                n = max(len(u), len(i))
                padded = (torch.cat([rows, rows[:1].expand(n - len(rows))]) for rows in (u, i))
                asked = importlib.import_module("recbole.data.interaction").Interaction(
                    dict(zip(("user_id", "item_id"), padded, strict=True))
                )
                model.predict(data.join(asked))
                for hook in hooks:
                    hook.remove()
                user, item = (torch.nn.functional.normalize(caught[side], dim=1) for side in ("user", "item"))
                return Factors(user[: len(u)], item[: len(i)])

            for epoch in range(1, epochs + 1):
                with peers.quiet():
                    trainer._train_epoch(train, epoch)
                yield {"lr": lr, "batch": 2048, "negatives": 1, "epoch": epoch}, vectors


def side_columns(split: Split) -> dict[str, Ints]:
    """Codes from 1 of the fields USER by user row and ITEM by item row; the category is the first genre."""
    tables = movielens.load("ml-1m")
    users = pl.DataFrame({"user_id": split.user_ids}).join(tables.users, "user_id", "left", maintain_order="left")
    films = pl.DataFrame({"item_id": split.item_ids}).join(tables.items, "item_id", "left", maintain_order="left")
    columns = {name: users[name] for name in USER}
    columns |= {"movie_id": films["item_id"], "cate_id": films["genres"].list.first()}
    return {name: c.rank("dense").cast(pl.Int64).to_numpy() for name, c in columns.items()}


def need(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise SystemExit(f"this row needs {module} ({e}): make bench-env") from None


def documented(split: Split, kind: str, epochs: int, batch: int) -> Iterator[Candidate]:
    """Return the settings of the example's code (word2vec negatives), of its README (uniform negatives), and both with the
    default learning rate of the trainer."""
    for lr, power in ((1e-4, 0.75), (1e-4, 0.0), (1e-3, 0.0)):
        yield from rechub(split, kind, epochs, batch, lr, power)


ROWS: dict[str, Callable[[Split], Iterator[Candidate]]] = {
    "popularity": popularity,
    "ease": ease,
    "transitions": transitions,
    "als": als,
    "dssm": lambda split: documented(split, "DSSM", epochs=3, batch=4096),
    "youtubednn": lambda split: documented(split, "YoutubeDNN", epochs=10, batch=2048),
    "recbole-bpr": lambda split: recbole(split, "BPR", epochs=20, rates=(1e-3, 5e-4)),
    "recbole-dssm": lambda split: recbole(split, "DSSM", epochs=12, rates=(1e-3,)),
}

# ---- the table ---------------------------------------------------------------------------------------------------


def best(candidates: Iterator[Candidate], split: Split, verbose: bool) -> dict[str, Any]:
    """Return the row of the candidate with the highest NDCG@10 on validation."""
    row: dict[str, Any] = {}
    started, tried = time.perf_counter(), 0
    for settings, score in candidates:
        tried += 1
        found = evaluate(score("validation"), split, "validation", resamples=0)
        if verbose:
            print(f"  {time.perf_counter() - started:5.0f} s  {short(found)}  {settings}", flush=True)
        if not row or found["ndcg@10"] > row["validation"]["ndcg@10"]:
            # Scored now, because a model that trains on changes; nothing reads it until all candidates are through.
            row = {"settings": settings, "validation": found, "ranks": ranks(score("test"), split, "test").tolist()}
    row["test"] = quality(np.array(row["ranks"]))
    return row | {"tried": tried, "seconds": round(time.perf_counter() - started, 1)}


def short(found: dict[str, float]) -> str:
    return " / ".join(f"{found[m]:.4f}" for m in MEASURES)


def line(name: str, row: dict[str, Any]) -> str:
    test = row["test"]
    cells = [name, *(f"{test[m]:.4f} [{test[f'{m}.low']:.4f}, {test[f'{m}.high']:.4f}]" for m in MEASURES)]
    settings = ", ".join(f"{key} {value:g}" for key, value in row["settings"].items())
    return f"| {' | '.join(cells)} | {short(row['validation'])} | {settings} | {row['tried']} | {row['seconds']:.0f} |"


def results(name: str, row: dict[str, Any], threads: int) -> list[Numbers]:
    """Return a result for each metric; the interval is over users."""
    test = row["test"]
    about = {"settings": row["settings"], "tried": row["tried"], "threads": threads}
    found = [
        result(f"baselines: {name}, {m.upper()}", test[m], "", interval=[test[f"{m}.low"], test[f"{m}.high"]], **about)
        for m in MEASURES
    ]
    return [*found, result(f"baselines: {name}, seconds of all settings", row["seconds"], "s", more=False, **about)]


def main() -> None:
    parser = options(__doc__, threads=1)
    parser.add_argument("--sequences", help="zip that holds sequences.txt")
    parser.add_argument("--only", choices=ROWS, help="run this row, even if --out has it")
    parser.add_argument("--tries", type=int, help="number of settings to try of each row, in their order")
    parser.add_argument("--verbose", action="store_true", help="print a line for every candidate")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    ratings = None if chosen.sequences else movielens.load("ml-1m").interactions
    split = load_sequences(chosen.sequences) if ratings is None else order_by_time(ratings)
    print(f"{len(split.user_ids)} users, {len(split.item_ids)} items, {len(split.values)} interactions")
    print("| model | HR@10 | NDCG@10 | HR@100 | validation | settings | tried | seconds |\n" + "|---" * 8 + "|")
    for name in [chosen.only] if chosen.only else ROWS:
        key = f"baselines: {name}"
        row = None if chosen.only else load(chosen.out)["rows"].get(key)
        if row is None:
            row = best(itertools.islice(ROWS[name](split), chosen.tries), split, chosen.verbose)
            save(chosen.out, results(name, row, chosen.threads), chosen.threads, {key: row})
        print(line(name, row), flush=True)


if __name__ == "__main__":
    main()
