"""The page of all measurements, table.json, and the tables of other pages, from the results in a run folder.

An expected result that is missing reads "not run". With `keep`, tables and sections without any result stay
as they are, with their dates.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks.lib.machine import Numbers
from benchmarks.lib.report import cell, number, times
from benchmarks.lib.tables import DECLARED, DOUBTFUL, EXPECTED, NOT_RUN, Results, rewrite, table, translate


def collect(folder: Path) -> tuple[dict[str, Numbers], Numbers, list[Numbers], list[str]]:
    """Read the files of a run folder. Returns results by name, the machine, its limits, and doubts."""
    results: dict[str, Numbers] = {}
    doubts: list[str] = []
    paths = [path for path in sorted(folder.glob("*.json")) if path.name != "table.json"]
    read = {path: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    files = {path: found for path, found in read.items() if isinstance(found, dict) and "results" in found}
    machines, bounds = ([found[of] for found in files.values()] for of in ("machine", "limits"))
    for path, found in files.items():
        # Not the cores: a script may have been given one of them.
        if any(found["machine"][of] != machines[0][of] for of in ("cpu", "memory_gb")):
            doubts.append(f"{path.name} is of another machine: {found['machine']['cpu']}")
        doubts += [f"{path.name}: {r['name']} is measured twice" for r in found["results"] if r["name"] in results]
        doubts += dict.fromkeys(f"{path.name}: {r['doubt']}" for r in found["results"] if r.get("doubt"))
        results |= {r["name"]: r for r in found["results"]}
    versions = {name: given for m in machines for name, given in m["versions"].items()}
    machine = max(machines, key=lambda m: int(m["cores"])) | {"versions": versions} if machines else {}
    return results, machine, bounds, doubts


def page(
    results: Results, machine: Numbers, bounds: list[Numbers], doubts: list[str], date: str, before: str = ""
) -> str:
    """Return the list of measurements; sections without a result are copied from `before`."""
    out, names = [DECLARED["introduction"]], list(dict.fromkeys([*EXPECTED, *sorted(results)]))
    if machine:
        out.append(DECLARED["machine"].format(date=date, **machine))
        out.append("; ".join(f"{name} {given}" for name, given in machine["versions"].items()) + ".")
        if given := ", ".join(f"`{k}={v}`" for k, v in machine["environment"].items()):
            out.append(f"Set in the environment: {given}.")
    for threads in sorted({bound["threads"] for bound in bounds}):
        of = [bound for bound in bounds if bound["threads"] == threads]
        best = {name: max(bound[name] for bound in of) for name in of[0]}
        out.append(DECLARED["limits"].format(plural="s" * (threads > 1), scripts=len(of), **best))
    out += [f"**{doubt}**" for doubt in doubts]
    old, run = _sections(before), ", ".join(filter(None, [date, machine.get("cpu")]))
    for group in dict.fromkeys([*(name.partition(":")[0] for name in names), *old]):
        own = [name for name in names if name.partition(":")[0] == group]
        kept = group in old and not any(name in results for name in own)
        out.append(old[group] if kept else _section(group, own, results, run))
    return "\n\n".join(part.strip() for part in [*out, DECLARED["other_tools"]]) + "\n"


def _sections(page: str) -> dict[str, str]:
    """Return the sections of a page of measurements by name, each with the date of its run."""
    found = dict(re.findall(r"^## (\w+)\n([\s\S]*?)(?=^## |\Z)", page, re.MULTILINE))
    whole = re.search(r"^Made by .* on (\d{4}-\d\d-\d\d); do not edit", page, re.MULTILINE)
    before = f"\nRun on {whole[1]}.\n" if whole else ""
    dated = {name: text if text.startswith("\nRun on ") else before + text for name, text in found.items()}
    return {name: f"## {name}\n{text}" for name, text in dated.items()}


def _section(group: str, names: list[str], results: Results, run: str) -> str:
    lines: list[list[str]] = [DECLARED["heads"]]
    commands: list[str] = []
    for name in names:
        label = name.partition(": ")[2]
        if (found := results.get(name)) is None:
            lines.append([label, translate(NOT_RUN, "en"), *[""] * 8])
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
        wide = "" if found.get("width") is None else number(found["width"])
        lines.append([label, value, found["unit"], wide, str(found["rounds"]), others, ratios, *floor, which])
    numbered = [f"{i}. `{command}`" for i, command in enumerate(commands, 1)]
    return "\n".join([f"## {group}", "", f"Run on {run}.", "", table(lines), *([""] if numbered else []), *numbered])


def write(folder: Path, date: str, to: Path, pages: Sequence[Path] = (), keep: bool = False) -> None:
    """Write table.json, the page of measurements `to`, and the tables in other pages.

    Raises ValueError for a wrong marker, and writes none of the pages then.
    """
    results, machine, bounds, doubts = collect(folder)
    missing = [name for name in EXPECTED if name not in results]
    facts = {"date": date, "machine": machine, "limits": bounds, "results": list(results.values())}
    facts |= {"not_run": missing, "doubts": doubts}
    (folder / "table.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    former = {path: (path.read_text(encoding="utf-8"), "zh" if ".zh" in path.name else "en") for path in pages}
    texts = {path: rewrite(text, results, language, keep) for path, (text, language) in former.items()}
    before = to.read_text(encoding="utf-8") if keep and to.exists() else ""
    texts[to] = page(results, machine, bounds, doubts, date, before)
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    told = [*(f"!! {doubt}" for doubt in doubts), f"{len(results)} results; {len(missing)} not run"]
    print("\n   ".join(["\n".join(told), *missing]))
