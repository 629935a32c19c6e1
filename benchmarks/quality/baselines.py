import importlib
import itertools
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from operator import methodcaller
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.lib.machine import Numbers
from benchmarks.lib.report import Report, declared
from benchmarks.quality.films import Films, Part
from twotower.arrays.pieces import ones
from twotower.arrays.types import Floats, Ints
from twotower.evaluation.bootstrap import bootstrap
from twotower.evaluation.factors import CatalogueScorer, Factors
from twotower.scorers.ease import ease_weights
from twotower.scorers.positives import PositiveSequences
from twotower.scorers.transitions import TransitionCounts, count_transitions

Candidate = tuple[dict[str, Any], Callable[[Part], tuple[Ints, int | None]]]
"""Settings, and the ranks of a part's targets, from 1, by a model that has learned from the train part alone, with the
width of its item vectors, None without any."""
MEASURES: dict[str, Callable[[Ints], npt.NDArray[np.float64]]] = {
    "HR@1": lambda rank: (rank <= 1).astype(np.float64),
    "HR@10": lambda rank: (rank <= 10).astype(np.float64),
    "HR@100": lambda rank: (rank <= 100).astype(np.float64),
    "NDCG@10": lambda rank: (rank <= 10) / np.log2(rank + 1),
    "MRR@10": lambda rank: (rank <= 10) / rank,
}
Candidates = Iterator[tuple[dict[str, Any], Callable[[Part], CatalogueScorer]]]
"""Settings, and the scores of a part's users and all items."""
DECLARED: Numbers = declared(__file__)
ROWS: dict[str, dict[str, Any]] = DECLARED["rows"]
TOO = "-validation-too"
"""End of the name of a row that counts the interactions of validation too when it scores the test."""


def best(candidates: Iterator[Candidate], measure: str) -> Numbers:
    """Return settings, test ranks and width of the candidate with the highest mean of a measure on validation."""
    row: Numbers = {"validation": -1.0, "tried": 0}
    started = time.perf_counter()
    for settings, ranks in candidates:
        row["tried"] += 1
        found = float(MEASURES[measure](ranks("validation")[0]).mean())
        if found > row["validation"]:
            # Ranked now, because a model that trains on changes; nothing reads it until all candidates are through.
            rank, width = ranks("test")
            row |= {"settings": settings, "validation": found, "ranks": rank.tolist(), "width": width}
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


@dataclass(frozen=True)
class OfLatest(CatalogueScorer):
    """Means of the rows of a table by the latest items of a user, the n-th of them by the n-th weight, and terms of the
    items."""

    table: Tensor  # (items, items), sparse
    latest: Ints  # (users, n) the latest first, -1 where there are fewer
    weights: npt.NDArray[np.floating[Any]]  # (n,)
    terms: Tensor | float  # (items,)

    def catalogue_scores(self, users: Ints, interactions: Ints | None = None) -> Tensor:
        latest = self.latest[users]
        row, n = np.nonzero(latest >= 0)
        weights = self.weights[n] / np.bincount(row, self.weights[n])[row]
        query = torch.sparse_coo_tensor(
            torch.from_numpy(np.stack([row, latest[row, n]])),
            torch.from_numpy(weights.astype(np.float32)),
            (len(users), len(self.table)),
            check_invariants=False,
        )
        scores: Tensor = torch.sparse.mm(query, self.table).to_dense() + self.terms
        return scores


def of_latest(
    films: Films,
    counts: dict[Part, TransitionCounts],
    values: Callable[[TransitionCounts], Floats],
    weights: npt.NDArray[np.floating[Any]],
    terms: Callable[[Part], Tensor | float] = lambda _: 0.0,
) -> Callable[[Part], OfLatest]:
    """Return the scores of a part by a table that has a value for each transition, and terms of the items."""
    n, users = len(films.item_ids), np.arange(len(films.user_ids))

    def scores(part: Part) -> OfLatest:
        found = counts[part]
        table = torch.sparse_coo_tensor(
            torch.from_numpy(np.stack([found.before, found.after])),
            torch.from_numpy(values(found).astype(np.float32)),
            (n, n),
            is_coalesced=True,
            check_invariants=False,
        )
        latest = films.recent(films.ends(part), users, len(weights))[:, ::-1]
        return OfLatest(table, latest, weights, terms(part))

    return scores


def counted(films: Films, span: int, lag: float, validation_too: bool = False) -> dict[Part, TransitionCounts]:
    """Return the transitions of the train part; with `validation_too` those for the test are of validation too."""

    def of(part: Part) -> TransitionCounts:
        user, at = films.history(part)
        lengths = np.bincount(user, minlength=len(films.user_ids))
        histories = PositiveSequences(films.values[at].astype(np.int32), lengths, ones(len(at)))
        return count_transitions(histories, len(films.item_ids), span, lag)

    train = of("validation")
    return {"validation": train, "test": of("test") if validation_too else train}


def rules(
    films: Films, span: int, lags: list[float], smooth: list[float], recent: list[float], validation_too: bool = False
) -> Candidates:
    """Yield sequential rules: how often b follows a, weighted gap^-p, over the sum of all that follow a and a constant;
    scored by the rules of the user's latest items, the n-th latest weighted n^-r."""
    for p in lags:
        counts = counted(films, span, p, validation_too)
        for k, r in itertools.product(smooth, recent):

            def values(of: TransitionCounts, k: float = k) -> Floats:
                found: Floats = of.count / (np.bincount(of.before, of.count) + k)[of.before]
                return found

            settings = {"span": span, "p": p, "smooth": k, "r": r}
            yield settings, of_latest(films, counts, values, np.arange(1, span + 1) ** -r)


def transitions(films: Films, span: int, lags: list[float], columns: list[float], rates: list[float]) -> Candidates:
    """Yield the package's transition counts: the logarithm of 1 + how often b follows a, weighted gap^-p, divided by
    (sum of its column / mean sum)^q; the n-th latest of the user's items is weighted rate^(n - 1)."""
    for p in lags:
        counts = counted(films, span, p)
        for q, rate in itertools.product(columns, rates):
            settings = {"span": span, "p": p, "q": q, "rate": rate}
            values = methodcaller("logarithms", q)
            yield settings, of_latest(films, counts, values, rate ** np.arange(span))


def pctm(
    films: Films, span: int, lags: list[float], pseudo: list[float], rates: list[float], popular: list[float],
    validation_too: bool = False,
) -> Candidates:  # fmt: skip
    """Yield PCTM (Petrov et al. 2026): the logarithm of 1 + how often b follows a, weighted gap^-p, over a
    pseudo-count; the n-th latest of the user's items is weighted rate^(n - 1), and a multiple of log
    popularity is added to the mean by these weights."""
    for p in lags:
        counts = counted(films, span, p, validation_too)
        for k, rate, times in itertools.product(pseudo, rates, popular):

            def values(of: TransitionCounts, k: float = k) -> Floats:
                logarithms: Floats = np.log1p(of.count / k)
                return logarithms

            def terms(part: Part, times: float = times) -> Tensor:
                popularity = films.popularity(part if validation_too else "validation") + 1.0
                return torch.from_numpy(times * np.log(popularity / popularity.sum())).float()

            settings = {"span": span, "p": p, "pseudo": k, "rate": rate, "popular": times}
            yield settings, of_latest(films, counts, values, rate ** np.arange(span), terms)


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
        "popularity": popularity, "rules": rules, "pctm": pctm, "transitions": transitions, "ease": ease, "als": als,
        "dssm": rechub, "youtubednn": rechub, "recbole-bpr": recbole, "recbole-dssm": recbole,
    }  # fmt: skip
    kind = name.removesuffix(TOO)
    given = ROWS[kind] | ({} if kind == name else {"validation_too": True})
    for way in given.pop("ways", [{}]):
        for settings, score in rows[kind](films, **given, **way):
            yield settings, partial(ranked, films, score)


def ranked(films: Films, score: Callable[[Part], CatalogueScorer], part: Part) -> tuple[Ints, int | None]:
    """Return the ranks of the targets of a part, and the width of the item vectors, None without any."""
    scorer = score(part)
    return films.ranks(scorer, part), scorer.width if isinstance(scorer, Factors) else None


def main(chosen: Namespace, report: Report) -> None:
    warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
    report.name = f"{DECLARED['tables'][chosen.table]}: "
    films = Films.read(chosen.sequences)
    print(f"{len(films.user_ids)} users, {len(films.item_ids)} items, {len(films.values)} interactions")
    for name in chosen.only:
        row = report.rows().get(f"{report.name}{name}")
        row = row or best(itertools.islice(candidates(name, films), chosen.tries), "NDCG@10")
        facts = {"settings": {}, "chosen": row["settings"], "tried": row["tried"], "width": row.get("width")}
        add(report, name, [np.array(row["ranks"])], ["HR@10", "NDCG@10", "HR@100"], **facts)
        report.add(f"{name}, seconds of all settings", row["seconds"], "s", **facts)
        report.write({f"{report.name}{name}": row})
