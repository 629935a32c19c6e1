"""The tables of the documents, declared in tables.toml and written between the markers `<!-- bench:NAME -->` and `<!-- /bench -->`.

A column has a head, the name of its result (`of`) and its format (`as`), and a row a label and what stands for {names} in both. `only` are the
heads of the columns that a row has, others stay empty; `cells` of a row replace those of the columns, by head: a text, or another column. A text
is one for both languages, or [English, Chinese]. `best` are the heads of columns whose highest mean is bold.
"""

import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from benchmarks.lib.machine import Numbers
from benchmarks.lib.report import cell, number

Text = str | list[str]
LANGUAGES = ("en", "zh")
NOT_RUN: Text = ["not run", "未运行"]
DOUBTFUL: Text = [" (doubtful)", "（存疑）"]


def translate(text: Text, language: str) -> str:
    return text if isinstance(text, str) else text[LANGUAGES.index(language)]


def find_peer(found: Numbers, name: str) -> Numbers | None:
    """Return the result of another tool: "torch-rechub", or "torch-rechub, dynamo=False" for one of its variants."""
    tool, comma, variant = name.partition(",")
    for label, given in found["peer"].items():
        if label.startswith(tool) and label.partition(",")[1:] == (comma, variant):
            return dict(given)
    return None


def ratio(found: Numbers, names: Sequence[str]) -> str | None:
    """Format how many times as good as the best of these tools the package is."""
    ratios = [given["ratio"] for name in names if (given := find_peer(found, name))]
    return f"{min(ratios):.1f}" if ratios and min(ratios) >= 2 else f"{min(ratios):.2f}" if ratios else None


def best_peer(found: Numbers) -> str | None:
    """Format the median of the best other tool, of those that ran at their best settings."""
    peers = [given for label, given in found["peer"].items() if "," not in label]
    return number(min(peers, key=lambda given: given["ratio"])["median"]) if peers else None


FORMATS: dict[str, Callable[[Numbers, Sequence[str]], str | None]] = {
    "range": lambda found, _: cell(found),
    "plain": lambda found, _: number(found["median"]),
    "median": lambda found, _: f"{found['median']:.4f}",
    # Over seeds, with half their range: "0.8267 ± 0.0003".
    "mean": lambda r, _: f"{r['mean']:.4f}" + f" ± {(r['high'] - r['low']) / 2:.4f}" * (r["rounds"] > 1),
    "whole": lambda found, _: f"{found['mean']:,.0f}",
    "rounds": lambda found, _: str(found["rounds"]),
    "limit": lambda found, _: None if found["floor"] is None else number(found["floor"]),
    "peer": lambda found, names: cell(given) if (given := find_peer(found, names[0])) else None,
    "ratio": ratio,
    "best peer": lambda found, _: best_peer(found),
}


@dataclass(frozen=True)
class Cell:
    """A number of a table: the name of its result, its format, and the other tools that the format shows."""

    name: str
    style: str = "range"
    peers: tuple[str, ...] = ()

    def text(self, results: Mapping[str, Numbers], language: str) -> str:
        """Format the number; a result that is missing, or that lacks what is shown, reads "not run"."""
        found = results.get(self.name)
        text = FORMATS[self.style](found, self.peers) if found else None
        if found and text and found.get("doubt"):
            text += translate(DOUBTFUL, language)
        return text or translate(NOT_RUN, language)


@dataclass(frozen=True)
class Block:
    """A table of the documents. A cell that is a text is copied."""

    columns: list[Text]
    rows: list[tuple[Text, list[Cell | str]]]
    best: list[int]

    @classmethod
    def of(cls, declared: Numbers) -> Self:
        heads, rows = [column["head"] for column in declared["columns"]], []
        for row in declared["rows"]:
            cells: list[Cell | str] = []
            for head, column in zip((translate(head, "en") for head in heads), declared["columns"], strict=True):
                given = row.get("cells", {}).get(head, column if head in row.get("only", [head]) else "")
                cells.append(given if isinstance(given, str) else _cell(column | given, row))
            rows.append((row["label"], cells))
        return cls([declared["label"], *heads], rows, [n for n, head in enumerate(heads) if head in declared["best"]])

    def markdown(self, results: Mapping[str, Numbers], language: str) -> str:
        lines = [[translate(c, language) for c in self.columns]]
        for row, (label, cells) in enumerate(self.rows):
            texts = [c if isinstance(c, str) else c.text(results, language) for c in cells]
            for column in self.best:
                of = {n: c[column] for n, (_, c) in enumerate(self.rows)}
                there = {n: c.name for n, c in of.items() if isinstance(c, Cell) and c.name in results}
                means = {n: results[name]["mean"] for n, name in there.items()}
                if row == max(means, key=lambda n: means[n], default=None):
                    texts[column] = f"**{texts[column]}**"
            lines.append([translate(label, language), *texts])
        return table(lines)

    def names(self) -> list[str]:
        return [c.name for _, cells in self.rows for c in cells if isinstance(c, Cell)]


def _cell(column: Numbers, row: Numbers) -> Cell:
    fill = {"way": ""} | {name: value for name, value in row.items() if isinstance(value, str)}
    peers = tuple(name.format(**fill) for name in column.get("peers", []))
    return Cell(column["of"].format(**fill), column.get("as", "range"), peers)


def table(lines: Sequence[Iterable[str]]) -> str:
    """Write lines of cells, the first the heads, as a table."""
    head, *body = (f"| {' | '.join(cells)} |" for cells in map(list, lines))
    return "\n".join([head, "|" + "---|" * len(list(lines[0])), *body])


DECLARED: dict[str, Any] = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
BLOCKS = {name: Block.of({"label": "", "best": []} | block) for name, block in DECLARED["tables"].items()}
EXPECTED = tuple(dict.fromkeys([*(n for block in BLOCKS.values() for n in block.names()), *DECLARED["page_only"]]))


def rewrite(text: str, results: Mapping[str, Numbers], language: str, keep: bool = False) -> str:
    """Return a document with its marked tables replaced; with `keep`, tables and cells without a result stay.

    Raises ValueError for a marker that is unknown or has no end.
    """
    begin, end = r"<!-- bench:([\w-]*) -->\n", r"<!-- /bench -->"
    for name in re.findall(r"<!-- bench:(.*?) -->", text):
        if name not in BLOCKS:
            raise ValueError(f"<!-- bench:{name} -->: no such table; choose from {', '.join(BLOCKS)}")
    if len(re.findall(r"<!-- bench:", text)) != len(re.findall(rf"{begin}(?:(?!<!-- bench:)[\s\S])*?{end}", text)):
        raise ValueError(f"a marker <!-- bench:NAME --> alone on its line, and {end} after its table, are needed")

    def replace(found: re.Match[str]) -> str:
        if keep and not any(name in results for name in BLOCKS[found[1]].names()):
            return found[0]
        lines = BLOCKS[found[1]].markdown(results, language)
        if keep:
            lines = _keep_cells(found[0].splitlines()[1:-1], lines.splitlines(), translate(NOT_RUN, language))
        return f"<!-- bench:{found[1]} -->\n{lines}\n{end}"

    return re.sub(rf"{begin}[\s\S]*?{end}", replace, text)


def _keep_cells(old: list[str], new: list[str], missing: str) -> str:
    """Return the table `new` with the cells of `old`, of the same shape, where a result is missing."""
    before, after = ([line.split(" | ") for line in lines] for lines in (old, new))
    if [len(line) for line in before] != [len(line) for line in after]:
        return "\n".join(new)
    pairs = [[*zip(*lines, strict=True)] for lines in zip(before, after, strict=True)]
    return "\n".join(" | ".join(b if a.removesuffix(" |") == missing else a for b, a in line) for line in pairs)
