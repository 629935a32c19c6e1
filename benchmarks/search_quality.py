"""Measure the retrieval of a film by a query: the table "Search by words" of docs/benchmarks.md.

    TWOTOWER_DATA=path/to/ml-1m.zip python benchmarks/search_quality.py [--seeds 3] [--only bm25]

The data set is ml-1m-titles: some 36,000 queries made of the films' titles, all 3,883 films are ranked. Two tasks:
*new queries* (random split 80/20, then 90/10; every film has training queries), and *new films* (split by time; only the
test queries for films without training queries). Baselines and our epochs are chosen on validation queries; equal scores
count against the row. 95 % intervals are over queries; ± is half the range over seeds.
Rows of baselines need `pip install bm25s scikit-learn`.
"""

from __future__ import annotations

import importlib
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from measure import Numbers, options, result, save

from twotower import api
from twotower.arrays.types import Ints
from twotower.config.toml import load_config, override_config
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.datasets.title_queries import title_words
from twotower.data.splits import TEST, VALIDATION
from twotower.data.tables import Tables
from twotower.evaluation.bootstrap import bootstrap
from twotower.features.text import grams, words

EXAMPLES = Path(__file__).parent.parent / "examples"
Scores = npt.NDArray[np.floating[Any]]
MEASURES = ("hr@1", "hr@10", "mrr@10")
OURS = ("title-search.toml", "title-search-linear.toml")
QUESTIONS = {"new queries": "random", "new films": "time"}


def main() -> None:
    parser = options(__doc__, threads=1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=0, help="maximum number of epochs; default: that of the example")
    parser.add_argument("--only", default="", help="rows whose name contains this text")
    parser.add_argument("--question", choices=QUESTIONS, help="task to run; default: both")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    for question, split in QUESTIONS.items():
        if chosen.question not in (None, question):
            continue
        print(f"\n{question}\n\n| model | HR@1 | HR@10 | MRR@10 | seconds |\n|---|---|---|---|---|", flush=True)
        found = itertools.chain(baselines(split, chosen.only), ours(split, chosen.only, chosen.seeds, chosen.epochs))
        for row in found:
            print(line(row), flush=True)
            save(chosen.out, results(row, question, chosen.threads), chosen.threads)


# ---- the measure -------------------------------------------------------------------------------------------------


def ranks(scores: Scores, target: Ints) -> Ints:
    """Return (Q,) the rank of each target, from 1, by scores (Q, N); it comes after every item of an equal score."""
    wanted = scores[np.arange(len(target)), target]
    found: Ints = (scores >= wanted[:, None]).sum(1)
    return found


def quality(rank: Ints) -> dict[str, npt.NDArray[np.float64]]:
    """Return (Q,) values of each of MEASURES."""
    within = (rank <= 10).astype(np.float64)
    return {"hr@1": (rank == 1).astype(np.float64), "hr@10": within, "mrr@10": within / rank}


def summary(name: str, each: list[dict[str, npt.NDArray[np.float64]]], seconds: float) -> dict[str, Any]:
    """Return a row: means over seeds and queries, half the range over seeds, and an interval over queries."""
    row: dict[str, Any] = {"model": name, "seeds": len(each), "queries": len(each[0]["hr@1"]), "seconds": seconds}
    for m in MEASURES:
        means = [float(e[m].mean()) for e in each]
        mean = np.mean([e[m] for e in each], 0)
        low, high = bootstrap(mean, np.ones(len(mean)), 1000)
        half = (max(means) - min(means)) / 2
        row[m] = {"means": means, "mean": float(mean.mean()), "half_range": half, "low": low, "high": high}
    return row


def results(row: dict[str, Any], question: str, threads: int) -> list[Numbers]:
    """Return a result for each metric; rounds are seeds, the interval is over queries."""
    name, shared = f"search_quality: {row['model']}, {question}", {"queries": row["queries"], "threads": threads}
    return [
        *(
            result(f"{name}, {m.upper()}", row[m]["means"], "", interval=[row[m]["low"], row[m]["high"]], **shared)
            for m in MEASURES
        ),
        result(f"{name}, seconds of training", row["seconds"], "s", more=False, **shared),
    ]


def line(row: dict[str, Any]) -> str:
    cells = []
    for m in MEASURES:
        value = row[m]
        spread = f" ± {value['half_range']:.4f}" if row["seeds"] > 1 else ""
        cells.append(f"{value['mean']:.4f}{spread} [{value['low']:.3f}, {value['high']:.3f}]")
    return f"| {row['model']} | {' | '.join(cells)} | {row['seconds']:.0f} |"


def part_pairs(dataset: Dataset, part: int, only_new: bool) -> tuple[Ints, Ints]:
    """Return query rows and film rows of a part; `only_new` keeps films without a training query."""
    pairs = dataset.part(part)
    user, item = pairs.user.astype(np.int64), pairs.item.astype(np.int64)
    if only_new:
        keep = np.bincount(dataset.train.item, minlength=len(dataset.items))[item] == 0
        user, item = user[keep], item[keep]
    return user, item


# ---- baselines ---------------------------------------------------------------------------------------------------

Scorer = Callable[[list[str]], Scores]
"""Queries -> scores (Q, N) of all films."""


def exact(titles: list[str]) -> Iterator[Scorer]:
    """Yield the baseline of exact titles: 1 where the query's words are those of a name of the film, in any order, with or without its year."""
    known: dict[tuple[str, ...], list[int]] = {}
    for row, title in enumerate(titles):
        called, year = title_words(title)
        for name in called:
            for extra in ([], [year]):
                known.setdefault(tuple(sorted(tokens([" ".join(name + extra)])[0])), []).append(row)

    def score(queries: list[str]) -> Scores:
        out = np.zeros((len(queries), len(titles)), np.float32)
        for q, words_ in enumerate(tokens(queries)):
            out[q, known.get(tuple(sorted(words_)), [])] = 1
        return out

    yield score


def bm25(titles: list[str], *cuts: Callable[[list[str]], list[list[str]]]) -> Iterator[Scorer]:
    """Yield BM25 (bm25s) over the tokens of each of `cuts`."""
    for cut in cuts:
        yield from _bm25(titles, cut)


def _bm25(titles: list[str], cut: Callable[[list[str]], list[list[str]]]) -> Iterator[Scorer]:
    library = need("bm25s")
    corpus = cut(titles)
    for k1, b in itertools.product((0.5, 1.2, 2.0), (0.25, 0.5, 0.75, 1.0)):
        model = library.BM25(k1=k1, b=b)
        model.index(corpus, show_progress=False)

        def score(queries: list[str], model: Any = model) -> Scores:
            none = np.zeros(len(titles), np.float32)
            known = [[t for t in q if t in model.vocab_dict] for q in cut(queries)]
            return np.stack([model.get_scores(q) if q else none for q in known])

        yield score


def tfidf(titles: list[str]) -> Iterator[Scorer]:
    """Yield TF-IDF (scikit-learn) over letter n-grams within words, cosine."""
    library = need("sklearn.feature_extraction.text")
    for low, high in ((2, 3), (3, 3), (2, 4), (3, 4), (2, 5), (3, 5)):
        model = library.TfidfVectorizer(analyzer="char_wb", ngram_range=(low, high), sublinear_tf=True)
        films = model.fit_transform(titles)

        def score(queries: list[str], model: Any = model, films: Any = films) -> Scores:
            found: Scores = (model.transform(queries) @ films.T).toarray()
            return found

        yield score


def tokens(texts: list[str]) -> list[list[str]]:
    """Return the words of texts as a text feature reads them."""
    return _grouped(*words(pl.Series("text", texts, dtype=pl.String)), len(texts))


def letters(*sizes: int) -> Callable[[list[str]], list[list[str]]]:
    """Return the letter n-grams of texts for each n of `sizes`, as text features read them."""

    def cut(texts: list[str]) -> list[list[str]]:
        row, flat = words(pl.Series("text", texts, dtype=pl.String))
        parts = [_grouped(row[which], gram, len(texts)) for which, gram in (grams(flat, n) for n in sizes)]
        return [[gram for part in parts for gram in part[q]] for q in range(len(texts))]

    return cut


def _grouped(rows: Ints, values: pl.Series, n: int) -> list[list[str]]:
    out: list[list[str]] = [[] for _ in range(n)]
    for row, value in zip(rows.tolist(), values.to_list(), strict=True):
        out[row].append(value)
    return out


BASELINES: dict[str, Callable[[list[str]], Iterator[Scorer]]] = {
    "exact title": exact,
    "BM25, words (bm25s)": lambda titles: bm25(titles, tokens),
    "BM25, letter n-grams (bm25s)": lambda titles: bm25(
        titles, letters(3), letters(2, 3), letters(3, 4), letters(2, 3, 4)
    ),
    "TF-IDF, letters in words (scikit-learn)": tfidf,
}


def baselines(split: str, only: str) -> Iterator[dict[str, Any]]:
    """Yield a row for each of BASELINES: test metrics of the candidate with the best MRR@10 on validation."""
    schema, config = load_config(EXAMPLES / OURS[0], [f"split.kind={split}"])
    tables, schema = api.read(config, schema)
    assert isinstance(tables, Tables)  # it names a data set, not a prepared one
    dataset = build_dataset(tables, schema, config.split)
    titles, texts = dataset.items.frame["title"].to_list(), dataset.users.frame["query"]
    for name, candidates in BASELINES.items():
        if only not in name:
            continue
        started, best, chosen = time.perf_counter(), -1.0, None
        user, item = part_pairs(dataset, VALIDATION, False)
        for scorer in candidates(titles):
            found = quality(ranks(scorer(texts[user].to_list()), item))["mrr@10"].mean()
            if found > best:
                best, chosen = float(found), scorer
        assert chosen is not None
        user, item = part_pairs(dataset, TEST, split == "time")
        yield summary(name, [quality(ranks(chosen(texts[user].to_list()), item))], time.perf_counter() - started)


def need(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise SystemExit(f"this row needs {module} ({e}): make bench-env") from None


# ---- ours --------------------------------------------------------------------------------------------------------


def ours(split: str, only: str, seeds: int, epochs: int) -> Iterator[dict[str, Any]]:
    for example in OURS:
        if only in example:
            found, seconds = zip(*(trained(example, split, seed, epochs) for seed in range(1, seeds + 1)), strict=True)
            yield summary(f"examples/{example}", list(found), sum(seconds) / seeds)


def trained(example: str, split: str, seed: int, epochs: int) -> tuple[dict[str, npt.NDArray[np.float64]], float]:
    """Return the metrics of a model on the test queries, and its seconds of training."""
    schema, config = load_config(EXAMPLES / example)
    changed = [f"train.epochs={epochs}"] if epochs else []
    config = override_config(config, [f"split.kind={split}", f"train.seed={seed}", "evaluation.bootstrap=0", *changed])
    tables, schema = api.read(config, schema)
    run = api.fit(tables, schema, config)
    user, item = part_pairs(run.dataset, TEST, split == "time")
    factors = run.factors(TEST)
    scores = factors.users.cpu().numpy()[user] @ factors.items.cpu().numpy().T
    return quality(ranks(scores, item)), run.metrics["train.seconds"]


if __name__ == "__main__":
    main()
