import itertools
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import polars as pl

from benchmarks.lib.processes import ROOT
from benchmarks.lib.report import Report, declared
from benchmarks.quality.baselines import add, best, need
from benchmarks.quality.films import Part
from twotower import api
from twotower.arrays.types import Floats, Ints
from twotower.config.toml import load_config, override_config
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.datasets.title_queries import title_words
from twotower.data.splits import TEST, VALIDATION
from twotower.data.tables import Tables
from twotower.features.text import grams, words

EXAMPLES = ("title-search.toml", "title-search-linear.toml", "recipes/words.toml")
PARTS: dict[Part, int] = {"validation": VALIDATION, "test": TEST}
MEASURES = ["HR@1", "HR@10", "MRR@10"]
Scorer = Callable[[list[str]], Floats]  # queries -> scores (Q, N) of all films
Cut = Callable[[list[str]], list[list[str]]]
DECLARED: dict[str, Any] = declared(__file__)


def main(chosen: Namespace, report: Report) -> None:
    for task, name in itertools.product(chosen.tasks, [*BASELINES, *EXAMPLES]):
        if chosen.only not in name:
            continue
        if name in BASELINES:
            row = baseline(name, chosen.data, DECLARED["splits"][task])
            seeds, seconds, width = [np.array(row["ranks"])], row["seconds"], None
        else:
            split, seeds_of = DECLARED["splits"][task], range(1, chosen.seeds + 1)
            found = [trained(name, chosen.data, split, seed, chosen.epochs) for seed in seeds_of]
            seeds, seconds, name = [f[0] for f in found], sum(f[1] for f in found) / len(found), f"examples/{name}"
            width = found[0][2]
        row_name = f"{name}, {task}" if chosen.data == "ml-1m-titles" else f"{chosen.data}: {name}, {task}"
        add(report, row_name, seeds, MEASURES, queries=len(seeds[0]), width=width)
        report.add(f"{row_name}, seconds of training", seconds, "s")
        report.write()


def ranks(scores: Floats, target: Ints) -> Ints:
    """Return (Q,) the rank of each target, from 1, by scores (Q, N); it comes after every item of an equal score."""
    return np.asarray((scores >= scores[np.arange(len(target)), target][:, None]).sum(1))


def part_pairs(dataset: Dataset, part: Part, split: str) -> tuple[Ints, Ints]:
    """Return query rows and film rows of a part; of the test part by time only films without a training query."""
    pairs = dataset.part(PARTS[part])
    new = np.bincount(dataset.train.item, minlength=len(dataset.items))[pairs.item] == 0
    keep = new if part == "test" and split == "time" else slice(None)
    return pairs.user[keep].astype(np.int64), pairs.item[keep].astype(np.int64)


def trained(example: str, data: str, split: str, seed: int, epochs: int) -> tuple[Ints, float, int]:
    """Return the ranks of the test queries' films by a model, its seconds of training, and its width."""
    schema, config = load_config(ROOT / "examples" / example)
    changed = [f"train.epochs={epochs}"] if epochs else []
    changed += [f"data.dataset={data}", f"split.kind={split}", f"train.seed={seed}", "evaluation.bootstrap=0"]
    config = override_config(config, changed)
    tables, schema = api.read(config, schema)
    run = api.fit(tables, schema, config)
    user, item = part_pairs(run.dataset, "test", split)
    factors = run.factors(TEST)
    scores = factors.users.cpu().numpy()[user] @ factors.items.cpu().numpy().T
    return ranks(scores, item), run.metrics["train.seconds"], factors.width


def baseline(name: str, data: str, split: str) -> dict[str, Any]:
    """Return the candidate of a baseline with the best MRR@10 on validation."""
    schema, config = load_config(ROOT / "examples" / EXAMPLES[0], [f"data.dataset={data}", f"split.kind={split}"])
    tables, schema = api.read(config, schema)
    assert isinstance(tables, Tables)  # it names a data set, not a prepared one
    dataset = build_dataset(tables, schema, config.split)
    titles, texts = dataset.items.frame["title"].to_list(), dataset.users.frame["query"]

    def ranked(part: Part, score: Scorer) -> Ints:
        user, item = part_pairs(dataset, part, split)
        return ranks(score(texts[user].to_list()), item)

    scorers = BASELINES[name](titles)
    return best((({}, lambda part, score=score: (ranked(part, score), None)) for score in scorers), "MRR@10")  # type: ignore[misc]


def exact(titles: list[str]) -> Iterator[Scorer]:
    """Yield the baseline of exact titles: 1 where the query's words are those of a name of the film, in any order, with
    or without its year."""
    known: dict[tuple[str, ...], list[int]] = {}
    for row, (called, year) in enumerate(map(title_words, titles)):
        for name, extra in itertools.product(called, ([], [year])):
            known.setdefault(tuple(sorted(tokens([" ".join(name + extra)])[0])), []).append(row)

    def score(queries: list[str]) -> Floats:
        out = np.zeros((len(queries), len(titles)), np.float32)
        for q, words_ in enumerate(tokens(queries)):
            out[q, known.get(tuple(sorted(words_)), [])] = 1
        return out

    yield score


def bm25(titles: list[str], cuts: list[Cut]) -> Iterator[Scorer]:
    """Yield BM25 (bm25s) over the tokens of each of `cuts`."""
    library = need("bm25s")
    for cut, k1, b in itertools.product(cuts, *DECLARED["bm25"].values()):
        model = library.BM25(k1=k1, b=b)
        model.index(cut(titles), show_progress=False)

        def score(queries: list[str], cut: Cut = cut, model: Any = model) -> Floats:
            none = np.zeros(len(titles), np.float32)
            known = [[t for t in q if t in model.vocab_dict] for q in cut(queries)]
            return np.stack([model.get_scores(q) if q else none for q in known])

        yield score


def tfidf(titles: list[str]) -> Iterator[Scorer]:
    """Yield TF-IDF (scikit-learn) over letter n-grams within words, cosine."""
    library = need("sklearn.feature_extraction.text")
    for sizes in DECLARED["tfidf"]["sizes"]:
        model = library.TfidfVectorizer(analyzer="char_wb", ngram_range=tuple(sizes), sublinear_tf=True)
        films = model.fit_transform(titles)
        yield lambda queries, model=model, films=films: (model.transform(queries) @ films.T).toarray()  # type: ignore[misc]


def tokens(texts: list[str]) -> list[list[str]]:
    """Return the words of texts as a text feature reads them."""
    row, flat = words(pl.Series("text", texts, dtype=pl.String))
    return _grouped(row, flat, len(texts))


def letters(sizes: list[int]) -> Cut:
    """Return the letter n-grams of texts for each n of `sizes`, as text features read them."""

    def cut(texts: list[str]) -> list[list[str]]:
        row, flat = words(pl.Series("text", texts, dtype=pl.String))
        found = [grams(flat, n) for n in sizes]
        rows = np.concatenate([row[which] for which, _ in found])
        return _grouped(rows, pl.concat([gram for _, gram in found]), len(texts))

    return cut


def _grouped(rows: Ints, values: pl.Series, n: int) -> list[list[str]]:
    out: list[list[str]] = [[] for _ in range(n)]
    for row, value in zip(rows.tolist(), values.to_list(), strict=True):
        out[row].append(value)
    return out


BASELINES: dict[str, Callable[[list[str]], Iterator[Scorer]]] = {
    "exact title": exact,
    "BM25, words (bm25s)": lambda titles: bm25(titles, [tokens]),
    "BM25, letter n-grams (bm25s)": lambda titles: bm25(titles, [letters(s) for s in DECLARED["letters"]["sizes"]]),
    "TF-IDF, letters in words (scikit-learn)": tfidf,
}
