import importlib
import itertools
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.lib.machine import Numbers
from benchmarks.lib.report import Report, declared
from benchmarks.quality.films import Films, Part
from twotower.arrays.types import Ints
from twotower.evaluation.bootstrap import bootstrap
from twotower.evaluation.factors import Factors
from twotower.train.starts.ease import ease_weights

Candidate = tuple[dict[str, Any], Callable[[Part], Ints]]
"""Settings, and the ranks of a part's targets, from 1, by a model that has learned from the train part alone."""
MEASURES: dict[str, Callable[[Ints], npt.NDArray[np.float64]]] = {
    "HR@1": lambda rank: (rank <= 1).astype(np.float64),
    "HR@10": lambda rank: (rank <= 10).astype(np.float64),
    "HR@100": lambda rank: (rank <= 100).astype(np.float64),
    "NDCG@10": lambda rank: (rank <= 10) / np.log2(rank + 1),
    "MRR@10": lambda rank: (rank <= 10) / rank,
}
Candidates = Iterator[tuple[dict[str, Any], Callable[[Part], Factors]]]
"""Settings, and the vectors whose products are the scores of a part's users and all items."""
ROWS: dict[str, dict[str, Any]] = declared(__file__)["rows"]


def best(candidates: Iterator[Candidate], measure: str) -> Numbers:
    """Return settings and test ranks of the candidate with the highest mean of a measure on validation."""
    row: Numbers = {"validation": -1.0, "tried": 0}
    started = time.perf_counter()
    for settings, ranks in candidates:
        row["tried"] += 1
        found = float(MEASURES[measure](ranks("validation")).mean())
        if found > row["validation"]:
            # Ranked now, because a model that trains on changes; nothing reads it until all candidates are through.
            row |= {"settings": settings, "validation": found, "ranks": ranks("test").tolist()}
    return row | {"seconds": round(time.perf_counter() - started, 1)}


def add(report: Report, name: str, seeds: list[Ints], measures: list[str], **facts: Any) -> None:
    """Add the measures of a row; rounds are seeds, the 95 % bootstrap interval is over targets."""
    for measure in measures:
        each = [MEASURES[measure](rank) for rank in seeds]
        interval = [float(end) for end in bootstrap(np.mean(each, 0), np.ones(len(each[0])), 1000)]
        report.add(f"{name}, {measure}", [float(one.mean()) for one in each], interval=interval, **facts)


def popularity(films: Films) -> Candidates:
    """Yield popularity: the number of interactions in the train part."""
    counts = torch.from_numpy(films.popularity()).float()[:, None]
    yield {}, lambda _: Factors(torch.ones(len(films.user_ids), 1), counts)


def transitions(films: Films, span: int, lags: list[float], columns: list[float], recent: list[float]) -> Candidates:
    """Yield transition counts: how often b follows a, weighted gap^-p, each row scaled to sum 1 and each column divided
    by its sum^q; scored by the rows of the user's recent items, the n-th latest weighted n^-r."""
    user, at = films.history("validation")
    item, n, users = films.values[at], len(films.item_ids), np.arange(len(films.user_ids))
    lag = np.arange(1, span + 1)
    for p in lags:
        flat = np.zeros(n * n, np.float32)
        for gap in lag:
            same = user[gap:] == user[:-gap]
            counts = np.bincount(item[:-gap][same] * n + item[gap:][same], minlength=n * n)
            flat += np.float32(gap**-p) * counts.astype(np.float32)
        counted = torch.from_numpy(flat).view(n, n)
        shares = counted / counted.sum(1, keepdim=True).clamp(min=1e-9)
        for q, r in itertools.product(columns, recent):
            weights = torch.from_numpy(lag[::-1] ** -r).float()
            table = shares / counted.sum(0).clamp(min=1e-9) ** q

            def scores(part: Part, weights: Tensor = weights, table: Tensor = table) -> Factors:
                latest = torch.from_numpy(films.recent(films.ends(part), users, span)) + 1
                query = torch.zeros(len(users), n + 1).scatter_add_(1, latest, weights.expand(latest.shape))
                return Factors(query[:, 1:], table.T)

            yield {"span": span, "p": p, "q": q, "r": r}, scores


def ease(films: Films, ridges: list[float]) -> Candidates:
    """Ridge regression of each item on all others, the diagonal zero (Steck 2019, "Embarrassingly Shallow
    Autoencoders for Sparse Data")."""
    seen = films.matrix("validation")
    gram = (seen.T @ seen).double()
    for ridge in ridges:
        weights = ease_weights(gram.clone(), ridge).float()
        yield {"lambda": ridge}, lambda part, weights=weights: Factors(films.matrix(part), weights.T)  # type: ignore[misc]


def als(
    films: Films, factors: list[int], regularization: list[float], alpha: list[float], iterations: int
) -> Candidates:
    """implicit's AlternatingLeastSquares on the train part; users are folded in from their history."""
    library, sparse = need("implicit.als"), need("scipy.sparse")
    one_thread = need("threadpoolctl").threadpool_limits
    everyone, threads = np.arange(len(films.user_ids)), torch.get_num_threads()
    train = sparse.csr_matrix(films.matrix("validation").numpy())
    for size, penalty, weight in itertools.product(factors, regularization, alpha):
        given = {"factors": size, "regularization": penalty, "alpha": weight, "iterations": iterations}
        with one_thread(limits=1, user_api="blas"):  # as it asks for: its own threads go before those of BLAS
            model = library.AlternatingLeastSquares(**given, num_threads=threads, random_state=1)
            model.fit(train, show_progress=False)

        def vectors(part: Part, model: Any = model) -> Factors:
            users = model.recalculate_user(everyone, sparse.csr_matrix(films.matrix(part).numpy()))
            return Factors(torch.from_numpy(users), torch.from_numpy(model.item_factors))

        yield given, vectors


def need(module: str) -> Any:
    """Import a tool. Exits if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise SystemExit(f"this row needs {module} ({e}): make bench-env") from None


def candidates(name: str, films: Films) -> Iterator[Candidate]:
    from benchmarks.quality.trained import recbole, rechub

    rows: dict[str, Callable[..., Candidates]] = {
        "popularity": popularity, "transitions": transitions, "ease": ease, "als": als,
        "dssm": rechub, "youtubednn": rechub, "recbole-bpr": recbole, "recbole-dssm": recbole,
    }  # fmt: skip
    given = dict(ROWS[name])
    for way in given.pop("ways", [{}]):
        for settings, score in rows[name](films, **given, **way):
            yield settings, lambda part, score=score: films.ranks(score(part), part)  # type: ignore[misc]


def main(chosen: Namespace, report: Report) -> None:
    films = Films.read(chosen.sequences)
    print(f"{len(films.user_ids)} users, {len(films.item_ids)} items, {len(films.values)} interactions")
    for name in chosen.only:
        row = report.rows().get(f"baselines: {name}")
        row = row or best(itertools.islice(candidates(name, films), chosen.tries), "NDCG@10")
        facts = {"settings": {}, "chosen": row["settings"], "tried": row["tried"]}
        add(report, name, [np.array(row["ranks"])], ["HR@10", "NDCG@10", "HR@100"], **facts)
        report.add(f"{name}, seconds of all settings", row["seconds"], "s", **facts)
        report.write({f"baselines: {name}": row})
