"""One table out of the files of a run folder, and the tables of the documents: `benchmarks/suite.py` calls it.

    python benchmarks/table.py runs/bench --date 2026-01-31 --page docs/benchmarks.md --readme README.md --readme README.zh-CN.md

Writes FOLDER/table.json and `--page`: every result with its range, the other tools and the machine's limit beside it, and the
command that measured it. In each `--readme` what stands between `<!-- bench:NAME -->` and `<!-- /bench -->` becomes the
table NAME of BLOCKS; all else stays as it is. A number that was expected and is not there reads "not run"; with `--keep` a table or
section of which no number is there stays as it is, with its date.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import Numbers, cell, number, times

Text = str | tuple[str, str]
"""In every language, or in English and Chinese."""
LANGUAGES = ("en", "zh")
NOT_RUN: Text = ("not run", "未运行")
DOUBTFUL: Text = (" (doubtful)", "（存疑）")


def say(text: Text, language: str) -> str:
    return text if isinstance(text, str) else text[LANGUAGES.index(language)]


# ---- cells -------------------------------------------------------------------------------------------------------


def mean(found: Numbers) -> str:
    """The mean over seeds and half their range."""
    half = (found["high"] - found["low"]) / 2
    return f"{found['mean']:.4f}" + (f" ± {half:.4f}" if found["rounds"] > 1 else "")


def whole(found: Numbers) -> str:
    return f"{found['mean']:,.0f}"


def limit(found: Numbers) -> str | None:
    return None if found["floor"] is None else number(found["floor"])


def beside(found: Numbers, name: str) -> Numbers | None:
    """What another tool gave: "torch-rechub", or "torch-rechub, dynamo=False" for one of its ways."""
    tool, comma, way = name.partition(",")
    for label, given in found["peer"].items():
        if label.startswith(tool) and label.partition(",")[1:] == (comma, way):
            return dict(given)
    return None


def peer(name: str) -> Callable[[Numbers], str | None]:
    def show(found: Numbers) -> str | None:
        given = beside(found, name)
        return cell(given) if given else None

    return show


def ratio(*names: str) -> Callable[[Numbers], str | None]:
    """How many times as good as the best of these."""

    def show(found: Numbers) -> str | None:
        ratios = [given["ratio"] for name in names if name and (given := beside(found, name))]
        return f"{min(ratios):.1f}" if ratios and min(ratios) >= 2 else f"{min(ratios):.2f}" if ratios else None

    return show


def seeds(found: Numbers) -> str:
    return str(found["rounds"])


def recalled(found: Numbers) -> str:
    return f"{found['median']:.4f}"


@dataclass(frozen=True)
class Cell:
    """A number of a table: which result, and how it is written; None of it is "not run"."""

    name: str
    style: Callable[[Numbers], str | None] = cell

    def text(self, results: Mapping[str, Numbers], language: str) -> str:
        found = results.get(self.name)
        text = self.style(found) if found else None
        if found and text and found.get("doubt"):
            text += say(DOUBTFUL, language)
        return text or say(NOT_RUN, language)


@dataclass(frozen=True)
class Block:
    """A table of the READMEs. A cell that is a text stands as it is; `best` are columns whose highest mean is bold."""

    columns: tuple[Text, ...]
    rows: tuple[tuple[Text, tuple[Cell | str, ...]], ...]
    best: tuple[int, ...] = ()

    def markdown(self, results: Mapping[str, Numbers], language: str) -> str:
        lines = [[say(c, language) for c in self.columns], ["---"] * len(self.columns)]
        for row, (label, cells) in enumerate(self.rows):
            texts = [c if isinstance(c, str) else c.text(results, language) for c in cells]
            for column in self.best:
                if row == self._best(column, results):
                    texts[column] = f"**{texts[column]}**"
            lines.append([say(label, language), *texts])
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


# ---- the tables of the READMEs -----------------------------------------------------------------------------------

Cells = tuple[Cell | str, ...]


def _ranked(row: str, last: str = "seconds") -> Cells:
    """Test AUC, test GAUC and validation AUC of a row, and its seconds or seeds."""
    name = f"rank_quality: {row}, "
    end = Cell(f"{name}seconds of training", whole) if last == "seconds" else Cell(f"{name}test AUC", seeds)
    return (*(Cell(name + metric, mean) for metric in ("test AUC", "test GAUC", "validation AUC")), end)


def _baseline(row: str) -> Cells:
    return (*(Cell(f"rank_quality: baseline: {row}, {metric}", mean) for metric in ("test AUC", "test GAUC")), "", "")


def _retrieved(script: str, row: str) -> Cells:
    return tuple(Cell(f"{script}: {row}, {metric}", mean) for metric in ("HR@10", "NDCG@10", "HR@100"))


def _ours(row: str) -> Cells:
    name = "retrieval_quality"
    return (*_retrieved(name, row), Cell(f"{name}: {row}, seconds of training", whole))


def _found(row: str) -> Cells:
    """HR@1, HR@10 and MRR@10 of a row, on new queries and on new films."""
    asked = ("new queries", "new films")
    measures = ("HR@1", "HR@10", "MRR@10")
    return tuple(Cell(f"search_quality: {row}, {question}, {m}", mean) for question in asked for m in measures)


def _learned(row: str) -> Cells:
    return (*_found(row), Cell(f"search_quality: {row}, new queries, seconds of training", whole))


def _beside(name: str, *peers: str) -> Cells:
    """Ours, the peers that are named, how many times as good as the best, and the machine's limit."""
    return (
        Cell(name),
        *(Cell(name, peer(p)) if p else "" for p in peers),
        Cell(name, ratio(*peers)),
        Cell(name, limit),
    )


def _served(path: str, *names: str) -> Cells:
    return tuple(Cell(f"serve_load: {path}, {name}") if name else "" for name in names)


def _both(english: str, chinese: str, *rest: str) -> Text:
    return (english.format(*rest), chinese.format(*rest))


def _example(name: str) -> str:
    return f"[examples/{name}](examples/{name})"


MODEL: Text = ("model", "模型")
AUCS: tuple[Text, ...] = (("test AUC", "测试 AUC"), ("test GAUC", "测试 GAUC"), ("validation AUC", "验证 AUC"))
SECONDS: Text = ("seconds of training", "训练秒数")
PLAIN, GATED = "DSSM, observed pairs only", "DSSM + SENet, observed pairs only"
NEGATIVES = "DSSM + SENet, 5 random negatives a positive"
BRANCHES = ("mlp", "cross", "fm", "cin", "bilinear")
ABLATIONS: dict[str, Text] = {
    "bce": ("BCE, 5 random negatives a positive", "BCE，每个正例 5 个随机负例"),
    "in-batch": ("in-batch softmax, no correction", "批内 softmax，不校正"),
    "in-batch-logq": ("in-batch softmax, log-q", "批内 softmax，logQ 校正"),
    "mixed": ("+ 2,048 uniform candidates", "+ 2,048 个均匀候选"),
    "hard": ("+ mined candidates, ranks 101–500", "+ 挖掘的难例，名次 101–500"),
    "full": ("full softmax", "全量 softmax"),
    "full-senet": ("full softmax, SENet", "全量 softmax，SENet"),
    "full-parallel": ("full softmax, parallel branches", "全量 softmax，并行分支"),
    "full-dat": ("full softmax, DAT", "全量 softmax，DAT"),
}
ONE, TWO = "search_speed: exact, 1,000,000 x 128, 1 thread, ", "search_speed: exact, 1,000,000 x 64, 2 threads, "
IVF = "search_speed: ivf, 1,000,000 x 128, one thread, "
BATCH, SINGLE = "a query of a batch of 256", "one query"
FAISS = ("faiss, at its best", "faiss, as shipped")

BLOCKS: dict[str, Block] = {
    "rank": Block(
        (MODEL, *AUCS, ("seconds", "秒")),
        (
            (("popularity", "流行度"), _baseline("popularity")),
            (("user + item bias", "用户偏置 + 物品偏置"), _baseline("bias")),
            (_both("DSSM 64-32, observed pairs only", "DSSM 64-32，只用有标签的曝光对"), _ranked(PLAIN)),
            (
                _both("DSSM 64-32 + SENet, observed pairs only", "DSSM 64-32 + SENet，只用有标签的曝光对"),
                _ranked(GATED),
            ),
            (
                _both(
                    "DSSM 64-32 + SENet, 5 random negatives a positive",
                    "DSSM 64-32 + SENet，每个正样本配 5 个随机负样本",
                ),
                _ranked(NEGATIVES),
            ),
            (
                _both("{}, one vector a side", "{}，每侧一个向量", _example("movielens-rank.toml")),
                _ranked("examples/movielens-rank.toml"),
            ),
        ),
        best=(0, 1),
    ),
    "speed": Block(
        ("", "twotower", "torch-rechub 0.9", "RecBole 1.2", ("times the best", "最佳者的倍数"), ("limit", "上限")),
        (
            (
                ("rows per second of training", "每秒训练行数"),
                _beside("train_speed: training", "torch-rechub", "RecBole"),
            ),
            (
                ("… as shipped", "…… 出厂设置"),
                ("", *_beside("train_speed: training", "torch-rechub, as shipped", "")[1:-1], ""),
            ),
            (
                ("seconds from the archive on disk to test AUC 0.80", "从磁盘上的压缩包到测试 AUC 0.80 的秒数"),
                (Cell("train_speed: from the archive to test AUC 0.80"), "", "", "", ""),
            ),
            (
                ("seconds to evaluate all users on all films", "对全部用户和全部电影做评估的秒数"),
                _beside("evaluation_speed: all users, whole catalogue", "torch-rechub", "RecBole"),
            ),
            (
                ("… as shipped", "…… 出厂设置"),
                (
                    "",
                    *_beside("evaluation_speed: all users, whole catalogue", "torch-rechub, as shipped", "")[1:-1],
                    "",
                ),
            ),
            (
                ("… without AUC, and with what was seen", "…… 不计 AUC，也不去掉看过的"),
                (
                    "",
                    *_beside("evaluation_speed: all users, whole catalogue", "torch-rechub, ten best alone", "")[1:-1],
                    "",
                ),
            ),
            (
                ("seconds to export both towers", "导出两个塔的秒数"),
                (*_beside("export_speed: both towers", "torch-rechub", "")[:-1], ""),
            ),
            (
                ("… by torch's older exporter", "…… 用 torch 旧的导出器"),
                ("", *_beside("export_speed: both towers", "torch-rechub, dynamo=False", "")[1:-1], ""),
            ),
            (
                ("MB of both exported towers", "两个导出的塔的 MB 数"),
                _beside("export_speed: size of both towers", "torch-rechub", ""),
            ),
            (
                ("peak memory of training, MB", "训练时的内存峰值，MB"),
                _beside("peak_memory: training", "torch-rechub", "RecBole"),
            ),
            (
                ("peak memory of evaluation, MB", "评估时的内存峰值，MB"),
                _beside("peak_memory: evaluation", "torch-rechub", "RecBole"),
            ),
        ),
    ),
    "demo": Block(
        ("", ("seconds", "秒"), ("peak memory, MB", "内存峰值，MB")),
        (
            (
                ("the whole demo on MovieLens 1M", "在 MovieLens 1M 上跑完整个 demo"),
                (Cell("suite: demo, whole run"), Cell("suite: demo, peak memory")),
            ),
        ),
    ),
    "towers": Block(
        (("tower", "塔"), *AUCS, ("seeds", "种子数")),
        (
            (("DSSM 64-32: fields → layers", "DSSM 64-32：特征域 → 多层网络"), _ranked(PLAIN, "seeds")),
            (("+ SENet gate", "+ SENet 门控"), _ranked(GATED, "seeds")),
            *(
                (_both("+ branch `{}`", "+ 分支 `{}`", b), _ranked(f"DSSM + branch {b}, observed pairs only", "seeds"))
                for b in BRANCHES
            ),
            (
                _both(
                    "{}: `mlp`, `cross`, `fm`, gated fields",
                    "{}：`mlp`、`cross`、`fm`、带门控的特征域",
                    _example("parallel.toml"),
                ),
                _ranked("examples/parallel.toml", "seeds"),
            ),
            (
                _both("{}: DSSM with augmented vectors", "{}：带增强向量的 DSSM", _example("dat.toml")),
                _ranked("examples/dat.toml", "seeds"),
            ),
        ),
    ),
    "retrieval": Block(
        (MODEL, "HR@10", "NDCG@10", "HR@100", SECONDS),
        (
            (("popularity", "流行度"), (*_retrieved("baselines", "popularity"), "")),
            (_both("RecBole 1.2, DSSM", "RecBole 1.2 的 DSSM"), (*_retrieved("baselines", "recbole-dssm"), "")),
            (
                _both("torch-rechub 0.9, YoutubeDNN", "torch-rechub 0.9 的 YoutubeDNN"),
                (*_retrieved("baselines", "youtubednn"), ""),
            ),
            (_both("torch-rechub 0.9, DSSM", "torch-rechub 0.9 的 DSSM"), (*_retrieved("baselines", "dssm"), "")),
            (_both("RecBole 1.2, BPR", "RecBole 1.2 的 BPR"), (*_retrieved("baselines", "recbole-bpr"), "")),
            (_both("implicit 0.7 ALS", "implicit 0.7 的 ALS"), (*_retrieved("baselines", "als"), "")),
            ("EASE", (*_retrieved("baselines", "ease"), "")),
            (("SASRec, BCE (published)", "SASRec, BCE (已发表)"), ("0.2500", "0.1341", "", "")),
            (("transition counts", "转移计数"), (*_retrieved("baselines", "transitions"), "")),
            (("gSASRec (published)", "gSASRec (已发表)"), ("0.3003", "0.1726", "", "")),
            (
                ("SASRec, 3,000 shared negatives (published)", "SASRec, 3,000 个共享负例 (已发表)"),
                ("0.3159", "0.1857", "", ""),
            ),
            (_example("movielens-retrieve.toml"), _ours("movielens-retrieve.toml")),
            (_example("movielens-sequence.toml"), _ours("movielens-sequence.toml")),
        ),
        best=(0, 1, 2),
    ),
    "losses": Block(
        (("loss and candidates", "损失与候选"), "HR@10", "NDCG@10", "HR@100"),
        tuple(
            (
                _both("[{}]({})", "[{2}]({1})", say(text, "en"), f"examples/ablation/{name}.toml", say(text, "zh")),
                _retrieved("retrieval_quality", f"ablation/{name}.toml"),
            )
            for name, text in ABLATIONS.items()
        ),
    ),
    "sequence": Block(
        (("threads", "线程"), ("positions/s", "位置/秒"), ("what matrix products alone would allow", "若只计矩阵乘法")),
        (
            ("1", (Cell("sequence_speed: training, 1 thread"), Cell("sequence_speed: training, 1 thread", limit))),
            ("2", (Cell("sequence_speed: training, 2 threads"), Cell("sequence_speed: training, 2 threads", limit))),
        ),
    ),
    "search": Block(
        (
            ("what", "项目"),
            ("ms a query", "毫秒/查询"),
            ("FAISS flat, at its best", "FAISS flat，最佳设置"),
            ("FAISS flat, as shipped", "FAISS flat，出厂设置"),
            ("times the best", "最佳者的倍数"),
            ("limit", "上限"),
        ),
        (
            (
                ("exact, 1,000,000 x 128, batch of 256, one thread", "精确，1,000,000 x 128，每批 256，单线程"),
                _beside(ONE + BATCH, *FAISS),
            ),
            (
                ("exact, 1,000,000 x 128, one query, one thread", "精确，1,000,000 x 128，单个查询，单线程"),
                _beside(ONE + SINGLE, *FAISS),
            ),
            (
                ("exact, 1,000,000 x 64, batch of 256, two threads", "精确，1,000,000 x 64，每批 256，双线程"),
                _beside(TWO + BATCH, *FAISS),
            ),
            (
                ("exact, 1,000,000 x 64, one query, two threads", "精确，1,000,000 x 64，单个查询，双线程"),
                _beside(TWO + SINGLE, *FAISS),
            ),
            (
                ("IVF, 1,000,000 x 128, one query, one thread", "IVF，1,000,000 x 128，单个查询，单线程"),
                (Cell(IVF + SINGLE), "", "", "", ""),
            ),
            (("its recall@100", "其 recall@100"), (Cell(IVF + "recall@100", recalled), "", "", "", "")),
        ),
    ),
    "embedding": Block(
        (("items", "物品"), ("items/s", "物品/秒"), ("MB beside the process", "进程之外的 MB")),
        tuple(
            (
                _both("{0}, {1}", "{0}，{2}", *labels),
                (Cell(f"embed_speed: {name}"), Cell(f"embed_speed: {name}, memory beside the process")),
            )
            for name, labels in {
                "1,000,000 rows, 2 threads, vocabulary ids": ("1,000,000", "two threads", "双线程"),
                "1,000,000 rows, 2 threads, hash ids": ("1,000,000", "two threads, hashed ids", "双线程，哈希 id"),
                "10,000,000 rows, 1 thread, vocabulary ids": ("10,000,000", "one thread", "单线程"),
            }.items()
        ),
    ),
    "serving": Block(
        (("path", "路径"), "p50", "p99", ("requests/s", "请求/秒"), ("not answered", "未回答")),
        (
            (
                ("method 1 by user id", "方法 1，按用户 id"),
                _served("method1", "p50", "p99", "requests a second", "requests not answered"),
            ),
            (
                ("method 2, history of 50, tower live", "方法 2，50 条历史，实时用户塔"),
                _served("method2", "p50", "p99", "requests a second", "requests not answered"),
            ),
            (
                ("50 publishes and rollbacks in 60 s at 300 requests/s", "60 秒内 50 次发布与回滚，300 请求/秒"),
                _served("swap", "p50", "p99", "", "failed requests"),
            ),
            (
                ("three times saturation, those accepted; the peak", "三倍饱和负载，已接受的请求；峰值"),
                _served("overload", "p50 of accepted", "p99 of accepted", "peak", ""),
            ),
            (
                ("a bare uvicorn on the same core; its peak", "同一个核上的空 uvicorn；其峰值"),
                _served("floor", "p50", "p99", "peak", ""),
            ),
        ),
    ),
    "words": Block(
        (
            MODEL,
            ("new queries HR@1", "新查询 HR@1"),
            "HR@10",
            "MRR@10",
            ("new films HR@1", "新电影 HR@1"),
            "HR@10",
            "MRR@10",
            SECONDS,
        ),
        (
            (("exact title", "片名完全一致"), (*_found("exact title"), "")),
            (("BM25, words (bm25s)", "BM25，词（bm25s）"), (*_found("BM25, words (bm25s)"), "")),
            (
                ("TF-IDF, letters in words (scikit-learn)", "TF-IDF，词内字母（scikit-learn）"),
                (*_found("TF-IDF, letters in words (scikit-learn)"), ""),
            ),
            (
                ("BM25, letter n-grams (bm25s)", "BM25，字母 n-gram（bm25s）"),
                (*_found("BM25, letter n-grams (bm25s)"), ""),
            ),
            (_example("title-search.toml"), _learned("examples/title-search.toml")),
            (_example("title-search-linear.toml"), _learned("examples/title-search-linear.toml")),
        ),
        best=(0, 1, 2, 3, 4, 5),
    ),
}

# Of the page alone.
MORE = (
    "peak_memory: search",
    *(
        f"search_speed: ivf, 1,000,000 x 128, {name}"
        for name in ("one thread, queries alone", "one thread, queries in a batch", "1 thread, built")
    ),
    "rank_quality: DSSM + branch bilinear, with a gated one, observed pairs only, test AUC",
    "serve_load: swap, swaps",
    "serve_load: swap, growth of memory",
    "serve_load: overload, goodput of the peak",
    "serve_load: overload, seconds until normal again",
    "serve_load: mixed, p50",
    "serve_load: mixed, p99",
    "serve_load: ready after the start, 100,000 items",
    "serve_load: ready after the start, 1,000,000 items",
)
EXPECTED = tuple(dict.fromkeys([*(name for block in BLOCKS.values() for name in block.names()), *MORE]))


def rewrite(text: str, results: Mapping[str, Numbers], language: str, keep: bool = False) -> str:
    """A document with its marked tables replaced; `keep` leaves those of which no number is there. Raises ValueError for a marker that is unknown or has no end."""
    begin, end = r"<!-- bench:([\w-]*) -->\n", r"<!-- /bench -->"
    for name in re.findall(r"<!-- bench:(.*?) -->", text):
        if name not in BLOCKS:
            raise ValueError(f"<!-- bench:{name} -->: no such table; choose of {', '.join(BLOCKS)}")
    if len(re.findall(r"<!-- bench:", text)) != len(re.findall(rf"{begin}(?:(?!<!-- bench:)[\s\S])*?{end}", text)):
        raise ValueError(f"a marker <!-- bench:NAME --> alone on its line, and {end} after its table, are needed")

    def table(found: re.Match[str]) -> str:
        if keep and not any(name in results for name in BLOCKS[found[1]].names()):
            return found[0]
        return f"<!-- bench:{found[1]} -->\n{BLOCKS[found[1]].markdown(results, language)}\n{end}"

    return re.sub(rf"{begin}[\s\S]*?{end}", table, text)


# ---- the page ----------------------------------------------------------------------------------------------------

INTRODUCTION = """# Benchmarks

Made by `make bench DATA=path/to/ml-1m.zip SEQUENCES=path/to/ml-1m-sequences.zip`; do not edit. Every script of
`benchmarks/` says at its top what it measures, how, and with which settings of the other tools. Every section has the date of its run:
`make bench … FLAGS='--only STEP,STEP'` runs some steps again and leaves the others' sections and tables as they are.

A value is the median of its rounds, or seeds, and in brackets their range; quality over users or queries has its 95 % interval
in square brackets. *Times as good* is beside each other tool in the same run: rows per second over theirs, their seconds or bytes
over ours. *Limit* is what the machine allows at best (matrix products alone, one pass over memory, the weights' own
bytes), and *of it* how many times as long, or as much, ours takes. What reads "not run" was not measured in this run.
Compare ratios between machines, not times.
"""
LEFT_OUT = """
## Other tools

- RecBole 1.2.1 is here, but as it comes it ends with "ModuleNotFoundError: No module named 'ray'" (it tunes with ray, at most 2.6.3,
  and imports it for everything) and then "AttributeError: `np.float_` was removed in the NumPy 2.0 release". `benchmarks/peers.py`
  gives it an empty ray and the names back; it also fills gaps in tables in a way that pandas 3 ignores, so pandas is older.
- RecTools cannot be installed beside numpy 2 on Python 3.11. Its 0.19.0 asks for `numpy (<2.0.0,>=1.22) ; python_version < "3.12"`, and pip
  ends with "ResolutionImpossible".
- LibRecommender 1.5.2 has a two-tower model in TensorFlow's sessions of version 1 (`from libreco.algorithms import TwoTower`:
  "ModuleNotFoundError: No module named 'tensorflow'"); a second framework in the process would be measured with it.
"""


def collect(folder: Path) -> tuple[dict[str, Numbers], Numbers, list[Numbers], list[str]]:
    """Results by name, the machine, its limits, and doubts, of the files of a run folder."""
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
    """The page; sections without a result are taken from the page `before`, if it has them."""
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
    return "\n\n".join(part.strip() for part in [*out, LEFT_OUT]) + "\n"


def _sections(page: str) -> dict[str, str]:
    """The sections of a page by their script, each with its date."""
    found = dict(re.findall(r"^## (\w+)\n([\s\S]*?)(?=^## |\Z)", page, re.MULTILINE))
    whole = re.search(r"^Made by .* on (\d{4}-\d\d-\d\d); do not edit", page, re.MULTILINE)
    before = f"\nRun on {whole[1]}.\n" if whole else ""
    dated = {name: text if text.startswith("\nRun on ") else before + text for name, text in found.items()}
    return {name: f"## {name}\n{text}" for name, text in dated.items()}


def _section(script: str, names: list[str], results: Mapping[str, Numbers], date: str) -> str:
    head = ["what", "value", "unit", "rounds", "other tools", "times as good", "limit", "of it", "command"]
    lines = [_line(head), "|" + "---|" * len(head)]
    commands: list[str] = []
    for name in names:
        label = name.partition(": ")[2]
        found = results.get(name)
        if found is None:
            lines.append(_line([label, say(NOT_RUN, "en"), *[""] * 7]))
            continue
        if found["command"] not in commands:
            commands.append(found["command"])
        value = cell(found)
        if found.get("interval"):
            value += " [" + ", ".join(number(end) for end in found["interval"]) + "]"
        if found.get("doubt"):
            value += say(DOUBTFUL, "en")
        settings = {peer: f" ({said})" for peer, said in found.get("settings", {}).items()}
        others = "; ".join(f"{peer}{settings.get(peer, '')}: {cell(given)}" for peer, given in found["peer"].items())
        ratios = "; ".join(times(given["ratio"]) for given in found["peer"].values())
        floor = [number(found["floor"]), times(found["ratio_to_floor"])] if found["floor"] is not None else ["", ""]
        which = str(commands.index(found["command"]) + 1)
        lines.append(_line([label, value, found["unit"], str(found["rounds"]), others, ratios, *floor, which]))
    told = [f"{number}. `{command}`" for number, command in enumerate(commands, 1)]
    return "\n".join([f"## {script}", "", f"Run on {date}.", "", *lines, *([""] if told else []), *told])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path, help="of results")
    options.add_argument("--date", required=True)
    options.add_argument("--page", type=Path)
    options.add_argument("--readme", type=Path, action="append", default=[], help="the Chinese one has .zh in its name")
    options.add_argument("--keep", action="store_true", help="tables and sections without a result stay as they are")
    chosen = options.parse_args()
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
    except ValueError as e:
        sys.exit(f"error: {e}")
    if chosen.page:
        before = chosen.page.read_text(encoding="utf-8") if chosen.keep and chosen.page.exists() else ""
        texts[chosen.page] = page(results, machine, bounds, doubts, chosen.date, before)
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    for doubt in doubts:
        print(f"!! {doubt}")
    print(f"{len(results)} results; {len(missing)} not run{':' if missing else ''}")
    for name in missing:
        print(f"   {name}")


if __name__ == "__main__":
    main()
