"""The tables of the documents, declared in tables.toml, between `<!-- bench:NAME -->` and `<!-- /bench -->`.

A column has a head, the name of its result (`of`) and its format (`as`), and a row a label and what stands for {names}
in both. `only` are the heads of the columns that a row has, others stay empty, or have the `else` of the column;
`cells` of a row replace those of the columns, by head: a text, or another column. A text is one for both languages, or
[English, Chinese]. `best` are the heads of columns whose highest mean is bold.
"""

import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.lib.machine import Numbers
from benchmarks.lib.report import cell, number, times

Text = str | list[str]
Results = Mapping[str, Numbers]
LANGUAGES = ("en", "zh")
NOT_RUN: Text = ["not run", "未运行"]
DOUBTFUL: Text = [" (doubtful)", "（存疑）"]
DECLARED: dict[str, Any] = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
BLOCKS: dict[str, Numbers] = {name: {"label": "", "best": []} | block for name, block in DECLARED["tables"].items()}


def translate(text: Text, language: str) -> str:
    return text if isinstance(text, str) else text[LANGUAGES.index(language)]


def find_peers(found: Numbers, names: Sequence[str]) -> list[Numbers]:
    """Return the results of other tools: "torch-rechub", or "torch-rechub, dynamo=False" for one of its variants."""
    wanted = [(tool, variant) for tool, _, variant in (name.partition(",") for name in names)]
    peers = [(label, label.partition(",")[2], given) for label, given in found["peer"].items()]
    return [
        given for tool, way in wanted for label, variant, given in peers if label.startswith(tool) and variant == way
    ]


def ratio(found: Numbers, names: Sequence[str]) -> str:
    """Format how many times as good as the best of these tools the package is."""
    least = min((peer["ratio"] for peer in find_peers(found, names)), default=None)
    return "" if least is None else f"{least:.1f}" if least >= 2 else f"{least:.2f}"


def best_peer(found: Numbers) -> str:
    """Format the median of the best other tool, of those that ran at their best settings."""
    peers = [given for label, given in found["peer"].items() if "," not in label]
    return number(min(peers, key=lambda given: given["ratio"])["median"]) if peers else ""


FORMATS: dict[str, Callable[[Numbers, Sequence[str]], str]] = {
    "range": lambda found, _: cell(found),
    "plain": lambda found, _: number(found["median"]),
    "median": lambda found, _: f"{found['median']:.4f}",
    # Over seeds, with half their range: "0.8267 ± 0.0003".
    "mean": lambda r, _: f"{r['mean']:.4f}" + f" ± {(r['high'] - r['low']) / 2:.4f}" * (r["rounds"] > 1),
    "whole": lambda found, _: f"{found['mean']:,.0f}",
    "rounds": lambda found, _: str(found["rounds"]),
    "times limit": lambda found, _: f"{number(found['median'])} ({times(found['ratio_to_floor'])})",
    "width": lambda found, _: number(found.get("width")).replace("-", "–"),
    "limit": lambda found, _: "" if found["floor"] is None else number(found["floor"]),
    "peer": lambda found, names: "".join(cell(peer) for peer in find_peers(found, names)[:1]),
    "ratio": ratio,
    "best peer": lambda found, _: best_peer(found),
}


def rows_of(block: Numbers) -> Iterator[tuple[Text, list[str | Numbers]]]:
    """Yield the label and the cells of each row of a table: texts, and columns whose {names} are filled in."""
    for row in block["rows"]:
        fill = {"way": ""} | {name: value for name, value in row.items() if isinstance(value, str)}
        cells: list[str | Numbers] = []
        for column in block["columns"]:
            head = translate(column["head"], "en")
            shown = column if head in row.get("only", [head]) else column.get("else", "")
            given = row.get("cells", {}).get(head, shown)
            if not isinstance(given, str):
                given = {"as": "range"} | column | given
                given |= {"of": given["of"].format(**fill), "peers": [p.format(**fill) for p in given.get("peers", [])]}
            cells.append(given)
        yield row["label"], cells


def names_of(block: Numbers) -> list[str]:
    """Return the names of the results that a table shows."""
    return [c["of"] for _, cells in rows_of(block) for c in cells if not isinstance(c, str)]


EXPECTED = tuple(dict.fromkeys([*(n for block in BLOCKS.values() for n in names_of(block)), *DECLARED["page_only"]]))


def markdown(block: Numbers, results: Results, language: str) -> str:
    """Write a table; a result that is missing, or that lacks what is shown, reads "not run"."""
    heads, rows = [column["head"] for column in block["columns"]], list(rows_of(block))
    lines = [[translate(text, language) for text in (block["label"], *heads)]]
    for label, cells in rows:
        texts = [translate(label, language)]
        for n, shown in enumerate(cells):
            if isinstance(shown, str):
                texts.append(shown)
                continue
            found = results.get(shown["of"])
            text = FORMATS[shown["as"]](found, shown["peers"]) if found else ""
            text += translate(DOUBTFUL, language) if found and text and found.get("doubt") else ""
            column = (c[n] for _, c in rows)
            means = [results[c["of"]]["mean"] for c in column if not isinstance(c, str) and c["of"] in results]
            if found and heads[n] in block["best"] and found["mean"] == max(means):
                text = f"**{text}**"
            texts.append(text or translate(NOT_RUN, language))
        lines.append(texts)
    return table(lines)


def table(lines: Sequence[Iterable[str]]) -> str:
    """Write lines of cells, the first the heads, as a table."""
    head, *body = (f"| {' | '.join(cells)} |" for cells in map(list, lines))
    return "\n".join([head, "|" + "---|" * len(list(lines[0])), *body])


def rewrite(text: str, results: Results, language: str, keep: bool = False) -> str:
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
        if keep and not any(name in results for name in names_of(BLOCKS[found[1]])):
            return found[0]
        lines = markdown(BLOCKS[found[1]], results, language)
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
