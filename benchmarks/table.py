"""Write the tables of the documents from the results in a run folder: `benchmarks/suite.py` calls this script.

    python benchmarks/table.py runs/bench --date 2026-01-31 --page docs/benchmarks.md --readme README.md --readme README.zh-CN.md

Writes FOLDER/table.json and `--page`. Text between `<!-- bench:NAME -->` and `<!-- /bench -->`, in the page and in each `--readme`, becomes
the table NAME of BLOCKS. The page after the line `<!-- measurements -->` becomes the list of all results: range, other tools, limit of the
machine, command. All other text stays. An expected result that is missing reads "not run"; with `--keep`, tables and sections without any
result stay as they are, with their dates.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import Numbers, cell, number, times

Text = str | tuple[str, str]
"""One text for both languages, or (English, Chinese)."""
LANGUAGES = ("en", "zh")
NOT_RUN: Text = ("not run", "未运行")
DOUBTFUL: Text = (" (doubtful)", "（存疑）")


def translate(text: Text, language: str) -> str:
    """Return the text in "en" or "zh"."""
    return text if isinstance(text, str) else text[LANGUAGES.index(language)]


# ---- cells -------------------------------------------------------------------------------------------------------


def mean(found: Numbers) -> str:
    """Format the mean over seeds and half their range: "0.8267 ± 0.0003"."""
    half = (found["high"] - found["low"]) / 2
    return f"{found['mean']:.4f}" + (f" ± {half:.4f}" if found["rounds"] > 1 else "")


def whole(found: Numbers) -> str:
    return f"{found['mean']:,.0f}"


def limit(found: Numbers) -> str | None:
    return None if found["floor"] is None else number(found["floor"])


def find_peer(found: Numbers, name: str) -> Numbers | None:
    """Return the result of another tool: "torch-rechub", or "torch-rechub, dynamo=False" for one of its variants."""
    tool, comma, variant = name.partition(",")
    for label, given in found["peer"].items():
        if label.startswith(tool) and label.partition(",")[1:] == (comma, variant):
            return dict(given)
    return None


def peer(name: str) -> Callable[[Numbers], str | None]:
    def show(found: Numbers) -> str | None:
        given = find_peer(found, name)
        return cell(given) if given else None

    return show


def ratio(*names: str) -> Callable[[Numbers], str | None]:
    """Format how many times as good as the best of these tools the package is."""

    def show(found: Numbers) -> str | None:
        ratios = [given["ratio"] for name in names if name and (given := find_peer(found, name))]
        return f"{min(ratios):.1f}" if ratios and min(ratios) >= 2 else f"{min(ratios):.2f}" if ratios else None

    return show


def best_peer(found: Numbers) -> str | None:
    """Format the median of the best other tool, of those that ran at their best settings."""
    peers = [given for label, given in found["peer"].items() if "," not in label]
    return number(min(peers, key=lambda given: given["ratio"])["median"]) if peers else None


def seeds(found: Numbers) -> str:
    return str(found["rounds"])


def median(found: Numbers) -> str:
    return f"{found['median']:.4f}"


def plain(found: Numbers) -> str:
    """Format the median alone, without its range."""
    return number(found["median"])


@dataclass(frozen=True)
class Cell:
    """A number of a table: the name of its result and its format; a result or format that is missing reads "not run"."""

    name: str
    style: Callable[[Numbers], str | None] = cell

    def text(self, results: Mapping[str, Numbers], language: str) -> str:
        found = results.get(self.name)
        text = self.style(found) if found else None
        if found and text and found.get("doubt"):
            text += translate(DOUBTFUL, language)
        return text or translate(NOT_RUN, language)


@dataclass(frozen=True)
class Block:
    """A table of the documents. A cell that is a text is copied; the highest mean of each column in `best` is bold."""

    columns: tuple[Text, ...]
    rows: tuple[tuple[Text, tuple[Cell | str, ...]], ...]
    best: tuple[int, ...] = ()

    def markdown(self, results: Mapping[str, Numbers], language: str) -> str:
        lines = [[translate(c, language) for c in self.columns], ["---"] * len(self.columns)]
        for row, (label, cells) in enumerate(self.rows):
            texts = [c if isinstance(c, str) else c.text(results, language) for c in cells]
            for column in self.best:
                if row == self._best(column, results):
                    texts[column] = f"**{texts[column]}**"
            lines.append([translate(label, language), *texts])
        head, rule, *body = lines
        return "\n".join([_line(head), "|" + "---|" * len(rule), *map(_line, body)])

    def _best(self, column: int, results: Mapping[str, Numbers]) -> int | None:
        found = {
            row: results[c.name]["mean"]
            for row, (_, cells) in enumerate(self.rows)
            if isinstance(c := cells[column], Cell) and c.name in results
        }
        return max(found, key=lambda row: found[row]) if found else None

    def names(self) -> list[str]:
        return [c.name for _, cells in self.rows for c in cells if isinstance(c, Cell)]


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


# ---- the tables of the documents ----------------------------------------------------------------------------------

Cells = tuple[Cell | str, ...]


def _ranking(row: str, last: str = "seconds") -> Cells:
    """Return test AUC, test GAUC and validation AUC of a row, and its seconds or number of seeds."""
    name = f"rank_quality: {row}, "
    end = Cell(f"{name}seconds of training", whole) if last == "seconds" else Cell(f"{name}test AUC", seeds)
    return (*(Cell(name + metric, mean) for metric in ("test AUC", "test GAUC", "validation AUC")), end)


def _baseline(row: str) -> Cells:
    return (*(Cell(f"rank_quality: baseline: {row}, {metric}", mean) for metric in ("test AUC", "test GAUC")), "", "")


def _retrieval(script: str, row: str) -> Cells:
    return tuple(Cell(f"{script}: {row}, {metric}", mean) for metric in ("HR@10", "NDCG@10", "HR@100"))


def _example_row(row: str) -> Cells:
    name = "retrieval_quality"
    return (*_retrieval(name, row), Cell(f"{name}: {row}, seconds of training", whole))


def _words(row: str) -> Cells:
    """Return HR@1, HR@10 and MRR@10 of a row, on new queries and on new films."""
    measures = ("HR@1", "HR@10", "MRR@10")
    return tuple(
        Cell(f"search_quality: {row}, {task}, {m}", mean) for task in ("new queries", "new films") for m in measures
    )


def _trained_words(row: str) -> Cells:
    return (*_words(row), Cell(f"search_quality: {row}, new queries, seconds of training", whole))


def _compared(name: str, *peers: str) -> Cells:
    """Return the package's result, those of the named peers, the ratio to the best of them, and the limit of the machine."""
    return (
        Cell(name),
        *(Cell(name, peer(p)) if p else "" for p in peers),
        Cell(name, ratio(*peers)),
        Cell(name, limit),
    )


def _load(path: str, *names: str) -> Cells:
    return tuple(Cell(f"serve_load: {path}, {name}") if name else "" for name in names)


def _example(name: str) -> str:
    return f"[examples/{name}](../examples/{name})"


MODEL: Text = "model"
AUCS: tuple[Text, ...] = ("test AUC", "test GAUC", "validation AUC")
SECONDS: Text = "seconds of training"
PLAIN, GATED = "DSSM, shown pairs only", "DSSM + SENet, shown pairs only"
NEGATIVES = "DSSM + SENet, 5 random negatives a positive"
BRANCHES = ("mlp", "cross", "fm", "cin", "bilinear")
ABLATIONS: dict[str, str] = {
    "bce": "BCE, 5 random negatives a positive",
    "in-batch": "in-batch softmax, no correction",
    "in-batch-logq": "in-batch softmax, log-q",
    "mixed": "+ 2,048 uniform candidates",
    "hard": "+ hard negatives, ranks 101–500",
    "full": "full softmax",
    "full-senet": "full softmax, SENet",
    "full-parallel": "full softmax, parallel branches",
    "full-dat": "full softmax, DAT",
}
ONE, TWO = "search_speed: exact, 1,000,000 x 128, 1 thread, ", "search_speed: exact, 1,000,000 x 64, 2 threads, "
IVF = "search_speed: ivf, 1,000,000 x 128, one thread, "
BATCH, SINGLE = "a query of a batch of 256", "one query"
BEST_PUBLISHED = "0.3159"
"""HR@10 of SASRec with 3,000 shared negatives, as published for the split of retrieval_quality.py."""
FAISS = ("faiss, at its best", "faiss, as shipped")

BLOCKS: dict[str, Block] = {
    "summary": Block(
        ("", "AUC", "HR@10", ("rows/s", "行/秒"), "p99"),
        (
            (
                ("popularity", "流行度"),
                (
                    Cell("rank_quality: baseline: popularity, test AUC", mean),
                    Cell("baselines: popularity, HR@10", mean),
                    "–",
                    "–",
                ),
            ),
            (("best peer", "最好的同类"), ("–", BEST_PUBLISHED, Cell("train_speed: training", best_peer), "–")),
            (
                "twotower",
                (
                    Cell("rank_quality: examples/movielens-rank.toml, test AUC", mean),
                    Cell("retrieval_quality: movielens-sequence.toml, HR@10", mean),
                    Cell("train_speed: training", plain),
                    Cell("serve_load: method1, p99", plain),
                ),
            ),
        ),
    ),
    "rank": Block(
        (MODEL, *AUCS, "seconds"),
        (
            ("popularity", _baseline("popularity")),
            ("user + item bias", _baseline("bias")),
            ("DSSM 64-32, shown pairs only", _ranking(PLAIN)),
            ("DSSM 64-32 + SENet, shown pairs only", _ranking(GATED)),
            ("DSSM 64-32 + SENet, 5 random negatives a positive", _ranking(NEGATIVES)),
            (f"{_example('movielens-rank.toml')}, one vector a side", _ranking("examples/movielens-rank.toml")),
        ),
        best=(0, 1),
    ),
    "speed": Block(
        ("", "twotower", "torch-rechub 0.9", "RecBole 1.2", "times the best", "limit"),
        (
            ("rows per second of training", _compared("train_speed: training", "torch-rechub", "RecBole")),
            (
                "… as shipped",
                ("", *_compared("train_speed: training", "torch-rechub, as shipped", "")[1:-1], ""),
            ),
            (
                "seconds from the archive on disk to test AUC 0.80",
                (Cell("train_speed: from the archive to test AUC 0.80"), "", "", "", ""),
            ),
            (
                "seconds to evaluate all users on all films",
                _compared("evaluation_speed: all users, whole catalogue", "torch-rechub", "RecBole"),
            ),
            (
                "… as shipped",
                (
                    "",
                    *_compared("evaluation_speed: all users, whole catalogue", "torch-rechub, as shipped", "")[1:-1],
                    "",
                ),
            ),
            (
                "… without AUC, and with what was seen",
                (
                    "",
                    *_compared("evaluation_speed: all users, whole catalogue", "torch-rechub, ten best alone", "")[
                        1:-1
                    ],
                    "",
                ),
            ),
            ("seconds to export both towers", (*_compared("export_speed: both towers", "torch-rechub", "")[:-1], "")),
            (
                "… by torch's older exporter",
                ("", *_compared("export_speed: both towers", "torch-rechub, dynamo=False", "")[1:-1], ""),
            ),
            ("MB of both exported towers", _compared("export_speed: size of both towers", "torch-rechub", "")),
            ("peak memory of training, MB", _compared("peak_memory: training", "torch-rechub", "RecBole")),
            ("peak memory of evaluation, MB", _compared("peak_memory: evaluation", "torch-rechub", "RecBole")),
        ),
    ),
    "demo": Block(
        ("", "seconds", "peak memory, MB"),
        (
            (
                "the whole demo on MovieLens 1M",
                (Cell("suite: demo, whole run"), Cell("suite: demo, peak memory")),
            ),
        ),
    ),
    "towers": Block(
        ("tower", *AUCS, "seeds"),
        (
            ("DSSM 64-32: fields → layers", _ranking(PLAIN, "seeds")),
            ("+ SENet gate", _ranking(GATED, "seeds")),
            *((f"+ branch `{b}`", _ranking(f"DSSM + branch {b}, shown pairs only", "seeds")) for b in BRANCHES),
            (
                f"{_example('parallel.toml')}: `mlp`, `cross`, `fm`, gated fields",
                _ranking("examples/parallel.toml", "seeds"),
            ),
            (f"{_example('dat.toml')}: DSSM with augmented vectors", _ranking("examples/dat.toml", "seeds")),
        ),
    ),
    "retrieval": Block(
        (MODEL, "HR@10", "NDCG@10", "HR@100", SECONDS),
        (
            ("popularity", (*_retrieval("baselines", "popularity"), "")),
            ("RecBole 1.2, DSSM", (*_retrieval("baselines", "recbole-dssm"), "")),
            ("torch-rechub 0.9, YoutubeDNN", (*_retrieval("baselines", "youtubednn"), "")),
            ("torch-rechub 0.9, DSSM", (*_retrieval("baselines", "dssm"), "")),
            ("RecBole 1.2, BPR", (*_retrieval("baselines", "recbole-bpr"), "")),
            ("implicit 0.7 ALS", (*_retrieval("baselines", "als"), "")),
            ("EASE", (*_retrieval("baselines", "ease"), "")),
            ("SASRec, BCE (published)", ("0.2500", "0.1341", "", "")),
            ("transition counts", (*_retrieval("baselines", "transitions"), "")),
            ("gSASRec (published)", ("0.3003", "0.1726", "", "")),
            (
                "SASRec, 3,000 shared negatives (published)",
                (BEST_PUBLISHED, "0.1857", "", ""),
            ),
            (_example("movielens-retrieve.toml"), _example_row("movielens-retrieve.toml")),
            (_example("movielens-sequence.toml"), _example_row("movielens-sequence.toml")),
        ),
        best=(0, 1, 2),
    ),
    "losses": Block(
        ("loss and candidates", "HR@10", "NDCG@10", "HR@100"),
        tuple(
            (f"[{text}](../examples/ablation/{name}.toml)", _retrieval("retrieval_quality", f"ablation/{name}.toml"))
            for name, text in ABLATIONS.items()
        ),
    ),
    "sequence": Block(
        ("threads", "positions/s", "what matrix products alone would allow"),
        (
            ("1", (Cell("sequence_speed: training, 1 thread"), Cell("sequence_speed: training, 1 thread", limit))),
            ("2", (Cell("sequence_speed: training, 2 threads"), Cell("sequence_speed: training, 2 threads", limit))),
        ),
    ),
    "search": Block(
        (
            "what",
            "ms a query",
            "FAISS flat, at its best",
            "FAISS flat, as shipped",
            "times the best",
            "limit",
        ),
        (
            ("exact, 1,000,000 x 128, batch of 256, one thread", _compared(ONE + BATCH, *FAISS)),
            ("exact, 1,000,000 x 128, one query, one thread", _compared(ONE + SINGLE, *FAISS)),
            ("exact, 1,000,000 x 64, batch of 256, two threads", _compared(TWO + BATCH, *FAISS)),
            ("exact, 1,000,000 x 64, one query, two threads", _compared(TWO + SINGLE, *FAISS)),
            (
                "IVF, 1,000,000 x 128, one query, one thread",
                (Cell(IVF + SINGLE), "", "", "", ""),
            ),
            ("its recall@100", (Cell(IVF + "recall@100", median), "", "", "", "")),
        ),
    ),
    "embedding": Block(
        ("items", "items/s", "MB beside the process"),
        tuple(
            (
                f"{count}, {threads}",
                (Cell(f"embed_speed: {name}"), Cell(f"embed_speed: {name}, memory beside the process")),
            )
            for name, (count, threads) in {
                "1,000,000 rows, 2 threads, vocabulary ids": ("1,000,000", "two threads"),
                "1,000,000 rows, 2 threads, hash ids": ("1,000,000", "two threads, hashed ids"),
                "10,000,000 rows, 1 thread, vocabulary ids": ("10,000,000", "one thread"),
            }.items()
        ),
    ),
    "serving": Block(
        ("path", "p50", "p99", "requests/s", "not answered"),
        (
            ("method 1 by user id", _load("method1", "p50", "p99", "requests a second", "requests not answered")),
            (
                "method 2, history of 50, tower live",
                _load("method2", "p50", "p99", "requests a second", "requests not answered"),
            ),
            (
                "50 publishes and rollbacks in 60 s at 300 requests/s",
                _load("swap", "p50", "p99", "", "failed requests"),
            ),
            (
                "three times saturation, those accepted; the peak",
                _load("overload", "p50 of accepted", "p99 of accepted", "peak", ""),
            ),
            ("a bare uvicorn on the same core; its peak", _load("floor", "p50", "p99", "peak", "")),
        ),
    ),
    "words": Block(
        (
            MODEL,
            "new queries HR@1",
            "HR@10",
            "MRR@10",
            "new films HR@1",
            "HR@10",
            "MRR@10",
            SECONDS,
        ),
        (
            ("exact title", (*_words("exact title"), "")),
            ("BM25, words (bm25s)", (*_words("BM25, words (bm25s)"), "")),
            ("TF-IDF, letters in words (scikit-learn)", (*_words("TF-IDF, letters in words (scikit-learn)"), "")),
            ("BM25, letter n-grams (bm25s)", (*_words("BM25, letter n-grams (bm25s)"), "")),
            (_example("title-search.toml"), _trained_words("examples/title-search.toml")),
            (_example("title-search-linear.toml"), _trained_words("examples/title-search-linear.toml")),
        ),
        best=(0, 1, 2, 3, 4, 5),
    ),
}

# Results that only the list of measurements has.
PAGE_ONLY = (
    "peak_memory: search",
    *(
        f"search_speed: ivf, 1,000,000 x 128, {name}"
        for name in ("one thread, queries alone", "one thread, queries in a batch", "1 thread, built")
    ),
    "rank_quality: DSSM + branch bilinear, with a gated one, shown pairs only, test AUC",
    "serve_load: swap, swaps",
    "serve_load: swap, growth of memory",
    "serve_load: overload, goodput of the peak",
    "serve_load: overload, seconds until normal again",
    "serve_load: mixed, p50",
    "serve_load: mixed, p99",
    "serve_load: ready after the start, 100,000 items",
    "serve_load: ready after the start, 1,000,000 items",
)
EXPECTED = tuple(dict.fromkeys([*(name for block in BLOCKS.values() for name in block.names()), *PAGE_ONLY]))


def rewrite(text: str, results: Mapping[str, Numbers], language: str, keep: bool = False) -> str:
    """Return a document with its marked tables replaced; with `keep`, tables without any result stay.

    Raises ValueError for a marker that is unknown or has no end.
    """
    begin, end = r"<!-- bench:([\w-]*) -->\n", r"<!-- /bench -->"
    for name in re.findall(r"<!-- bench:(.*?) -->", text):
        if name not in BLOCKS:
            raise ValueError(f"<!-- bench:{name} -->: no such table; choose from {', '.join(BLOCKS)}")
    if len(re.findall(r"<!-- bench:", text)) != len(re.findall(rf"{begin}(?:(?!<!-- bench:)[\s\S])*?{end}", text)):
        raise ValueError(f"a marker <!-- bench:NAME --> alone on its line, and {end} after its table, are needed")

    def table(found: re.Match[str]) -> str:
        if keep and not any(name in results for name in BLOCKS[found[1]].names()):
            return found[0]
        lines = BLOCKS[found[1]].markdown(results, language)
        if keep:
            lines = _keep_cells(found[0].splitlines()[1:-1], lines.splitlines(), translate(NOT_RUN, language))
        return f"<!-- bench:{found[1]} -->\n{lines}\n{end}"

    return re.sub(rf"{begin}[\s\S]*?{end}", table, text)


def _keep_cells(old: list[str], new: list[str], missing: str) -> str:
    """Return the table `new` with the cells of `old`, of the same shape, where a result is missing."""
    before, after = ([line.split(" | ") for line in lines] for lines in (old, new))
    if [len(line) for line in before] != [len(line) for line in after]:
        return "\n".join(new)
    ends = (missing, f"{missing} |")
    return "\n".join(
        " | ".join(b if a in ends else a for b, a in zip(*lines, strict=True))
        for lines in zip(before, after, strict=True)
    )


# ---- the list of measurements -------------------------------------------------------------------------------------

MEASUREMENTS = "<!-- measurements -->\n"
"""The line of the page after which the list of all results stands."""

INTRODUCTION = """## All measurements

Written by `make bench DATA=path/to/ml-1m.zip SEQUENCES=path/to/ml-1m-sequences.zip`; do not edit this part. The docstring of each script in
`benchmarks/` says what it measures, how, and with which settings of the other tools. Each section has the date of its run:
`make bench … FLAGS='--only STEP,STEP'` runs some steps again and leaves the other sections and tables as they are.

A value is the median over rounds or seeds, with their range in brackets; quality over users or queries has its 95 % interval in square
brackets. *Times as good* compares with each other tool in the same run: rows per second over theirs, their seconds or bytes over
ours. *Limit* is the best that the machine allows (matrix products alone, one pass over memory, the bytes of the weights), and *times the
limit* the ratio of the value to it. "not run" marks a result that this run did not measure. Compare ratios between machines, not times.
"""
OTHER_TOOLS = """
## Other tools

- RecBole 1.2.1 runs with two shims of `benchmarks/peers.py`. Without them it ends with "ModuleNotFoundError: No module named 'ray'" (it
  tunes with ray, at most 2.6.3, and imports it always), then with "AttributeError: `np.float_` was removed in the NumPy 2.0 release". It
  fills missing values in a way that pandas 3 ignores, so the environment of the benchmarks has pandas 2.
- RecTools cannot be installed beside numpy 2 on Python 3.11. Its 0.19.0 asks for `numpy (<2.0.0,>=1.22) ; python_version < "3.12"`, and pip
  ends with "ResolutionImpossible".
- LibRecommender 1.5.2 has a two-tower model in TensorFlow's sessions of version 1 (`from libreco.algorithms import TwoTower`:
  "ModuleNotFoundError: No module named 'tensorflow'"); its numbers would include a second framework in the process.
"""


def collect(folder: Path) -> tuple[dict[str, Numbers], Numbers, list[Numbers], list[str]]:
    """Read the files of a run folder. Returns results by name, the machine, its limits, and doubts about the results."""
    results: dict[str, Numbers] = {}
    machines: list[Numbers] = []
    bounds: list[Numbers] = []
    doubts: list[str] = []
    for path in sorted(folder.glob("*.json")):
        found: Any = json.loads(path.read_text(encoding="utf-8"))
        if path.name == "table.json" or not isinstance(found, dict) or "results" not in found:
            continue
        # Not the cores: a script may have been given one of them.
        if machines and any(found["machine"][of] != machines[0][of] for of in ("cpu", "memory_gb")):
            doubts.append(f"{path.name} is of another machine: {found['machine']['cpu']}")
        machines.append(found["machine"])
        bounds.append(found["limits"])
        doubts += [f"{path.name}: {r['name']} is measured twice" for r in found["results"] if r["name"] in results]
        doubts += dict.fromkeys(f"{path.name}: {r['doubt']}" for r in found["results"] if r.get("doubt"))
        results |= {r["name"]: r for r in found["results"]}
    versions = {name: given for m in machines for name, given in m["versions"].items()}
    machine = max(machines, key=lambda m: int(m["cores"])) | {"versions": versions} if machines else {}
    return results, machine, bounds, doubts


def page(
    results: Mapping[str, Numbers],
    machine: Numbers,
    bounds: list[Numbers],
    doubts: list[str],
    date: str,
    before: str = "",
) -> str:
    """Return the list of measurements; sections without a result are copied from the list `before`, where it has them."""
    out = [INTRODUCTION]
    if machine:
        out.append(
            f"On {date}: {machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB, {machine['system']}, Python {machine['python']}."
        )
        out.append("; ".join(f"{name} {given}" for name, given in machine["versions"].items()) + ".")
        if machine["environment"]:
            out.append(
                "Set in the environment: " + ", ".join(f"`{k}={v}`" for k, v in machine["environment"].items()) + "."
            )
    for threads in sorted({bound["threads"] for bound in bounds}):
        of = [bound for bound in bounds if bound["threads"] == threads]
        best = {name: max(bound[name] for bound in of) for name in ("fp32_gflops", "bf16_gflops", "read_gb_per_s")}
        out.append(
            f"Limits with {threads} thread{'s' * (threads > 1)}, the best of {len(of)} scripts: {best['fp32_gflops']:,.0f} GFLOP/s in fp32 and "
            f"{best['bf16_gflops']:,.0f} in bf16 (products of 2,048 x 2,048), reading {best['read_gb_per_s']:.1f} GB/s."
        )
    out += [f"**{doubt}**" for doubt in doubts]
    names = list(dict.fromkeys([*EXPECTED, *sorted(results)]))
    old = _sections(before)
    for script in dict.fromkeys([*(name.partition(":")[0] for name in names), *old]):
        own = [name for name in names if name.partition(":")[0] == script]
        if script in old and not any(name in results for name in own):
            out.append(old[script])
        else:
            out.append(_section(script, own, results, date))
    return "\n\n".join(part.strip() for part in [*out, OTHER_TOOLS]) + "\n"


def _sections(page: str) -> dict[str, str]:
    """Return the sections of a list of measurements by script, each with the date of its run."""
    found = dict(re.findall(r"^## (\w+)\n([\s\S]*?)(?=^## |\Z)", page, re.MULTILINE))
    whole = re.search(r"^Made by .* on (\d{4}-\d\d-\d\d); do not edit", page, re.MULTILINE)
    before = f"\nRun on {whole[1]}.\n" if whole else ""
    dated = {name: text if text.startswith("\nRun on ") else before + text for name, text in found.items()}
    return {name: f"## {name}\n{text}" for name, text in dated.items()}


def _section(script: str, names: list[str], results: Mapping[str, Numbers], date: str) -> str:
    head = ["what", "value", "unit", "rounds", "other tools", "times as good", "limit", "times the limit", "command"]
    lines = [_line(head), "|" + "---|" * len(head)]
    commands: list[str] = []
    for name in names:
        label = name.partition(": ")[2]
        found = results.get(name)
        if found is None:
            lines.append(_line([label, translate(NOT_RUN, "en"), *[""] * 7]))
            continue
        if found["command"] not in commands:
            commands.append(found["command"])
        value = cell(found)
        if found.get("interval"):
            value += " [" + ", ".join(number(end) for end in found["interval"]) + "]"
        if found.get("doubt"):
            value += translate(DOUBTFUL, "en")
        settings = {peer: f" ({setting})" for peer, setting in found.get("settings", {}).items()}
        others = "; ".join(f"{peer}{settings.get(peer, '')}: {cell(given)}" for peer, given in found["peer"].items())
        ratios = "; ".join(times(given["ratio"]) for given in found["peer"].values())
        floor = [number(found["floor"]), times(found["ratio_to_floor"])] if found["floor"] is not None else ["", ""]
        which = str(commands.index(found["command"]) + 1)
        lines.append(_line([label, value, found["unit"], str(found["rounds"]), others, ratios, *floor, which]))
    numbered = [f"{i}. `{command}`" for i, command in enumerate(commands, 1)]
    return "\n".join([f"## {script}", "", f"Run on {date}.", "", *lines, *([""] if numbered else []), *numbered])


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the tables of a command line, by default that of this process."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path, help="folder of results")
    options.add_argument("--date", required=True, help="date of the run, as the documents show it")
    options.add_argument("--page", type=Path, help="page with the tables and the list of all measurements")
    options.add_argument(
        "--readme", type=Path, action="append", default=[], help="README with a table; .zh in the name: Chinese"
    )
    options.add_argument("--keep", action="store_true", help="keep tables and sections that have no result")
    chosen = options.parse_args(arguments)
    results, machine, bounds, doubts = collect(chosen.folder)
    missing = [name for name in EXPECTED if name not in results]
    table = {
        "date": chosen.date,
        "machine": machine,
        "limits": bounds,
        "results": list(results.values()),
        "not_run": missing,
        "doubts": doubts,
    }
    (chosen.folder / "table.json").write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    try:
        texts = {
            path: rewrite(path.read_text(encoding="utf-8"), results, "zh" if ".zh" in path.name else "en", chosen.keep)
            for path in chosen.readme
        }
        if chosen.page:
            written = chosen.page.read_text(encoding="utf-8") if chosen.page.exists() else ""
            head, mark, before = written.rpartition(MEASUREMENTS)
            head = rewrite(head if mark else "# Benchmarks\n\n", results, "en", chosen.keep)
            texts[chosen.page] = f"{head}{MEASUREMENTS}\n" + page(
                results, machine, bounds, doubts, chosen.date, before if chosen.keep else ""
            )
    except ValueError as e:
        sys.exit(f"error: {e}")
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    for doubt in doubts:
        print(f"!! {doubt}")
    print(f"{len(results)} results; {len(missing)} not run{':' if missing else ''}")
    for name in missing:
        print(f"   {name}")


if __name__ == "__main__":
    main()
