import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from benchmarks.lib.report import Report, declared, load, number


def main(chosen: Namespace, report: Report) -> None:
    lines = judged_all(Path(chosen.run))
    print("\n".join(lines))
    if not all(line.startswith("holds") for line in lines):
        sys.exit("not all limits hold")


def judged_all(folder: Path) -> list[str]:
    """Return a line for each limit, with the result of a folder; it begins with "holds" or "fails"."""
    found = {entry["name"]: entry for path in sorted(folder.glob("*.json")) for entry in load(path)["results"]}
    return [judged(limit, found.get(limit["result"], {})) for limit in declared(__file__)["limits"]]


def judged(limit: dict[str, Any], entry: dict[str, Any]) -> str:
    """Return the line of a limit and its result, which is empty if it is missing."""
    field = limit.get("field", "value")
    value, most, least = entry.get(field), limit.get("most"), limit.get("least")
    within = value is not None and (most is None or value <= most) and (least is None or value >= least)
    bound = f"at most {number(most)}" if most is not None else f"at least {number(least)}"
    doubt = f"; {entry['doubt']}" if "doubt" in entry else ""
    name = limit["result"] + (f", {field}" if field != "value" else "")
    return f"{'holds' if within and not doubt else 'fails'}  {name}: {number(value)}, {bound}{doubt}"
