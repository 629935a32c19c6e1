"""The command line of a script, and its results, printed and written to `--out`, which keeps results of other names."""

import argparse
import json
import math
import os
import shlex
import statistics
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from benchmarks.lib.machine import Numbers, limits, machine
from benchmarks.lib.processes import Ran

LESS = ("s", "ms", "MB")
"""Units of which less is better."""


def declared(script: str) -> Numbers:
    """Return the declarations of a script: the TOML file beside it."""
    return tomllib.loads(Path(script).with_suffix(".toml").read_text(encoding="utf-8"))


def options(script: str, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of a command line, declared in `[options]` as [default, help] or [default, help, choices].

    `--quick` takes the defaults of `[quick]` in their place.
    """
    words, found = sys.argv[1:] if arguments is None else list(arguments), declared(script)
    parser = argparse.ArgumentParser(description=found["about"], formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (default, text, *choices) in found["options"].items():
        kind: Numbers = {"type": type(default), "choices": choices[0] if choices else None}
        if isinstance(default, list):
            kind = {"type": _list(default, *choices)}
        kind = {"action": "store_true"} if default is False else kind
        parser.add_argument(f"--{name.replace('_', '-')}", default=default, help=text, **kind)
    parser.add_argument("--quick", action="store_true", help="run the smallest version; its numbers mean nothing")
    parser.add_argument("--out", type=Path, help="JSON file of results; results with other names stay in it")
    if "--quick" in words:
        parser.set_defaults(**found.get("quick", {}))
    return parser.parse_args(words)


def _list(default: list[Any], choices: Sequence[str] = ()) -> Any:
    def words(text: str) -> list[Any]:
        found = [type(default[0])(word) if default else word for word in text.split(",") if word]
        if choices and (strange := sorted(set(found) - set(choices))):
            raise argparse.ArgumentTypeError(f"no {strange[0]!r}; choose from {', '.join(choices)}")
        return found

    return words


class Report:
    """The results of a script, printed as they come, and written at the end of the block."""

    def __init__(self, chosen: argparse.Namespace, name: str = "", **facts: Any) -> None:
        """`name`: the measurement, with which names of results begin. `facts`: what every result tells."""
        self.out: Path | None = chosen.out
        self.threads: int = getattr(chosen, "threads", 0) or len(os.sched_getaffinity(0))
        self.name = f"{name}: " if name else ""
        self.facts: Numbers = {"threads": self.threads} | facts
        self.results: list[Numbers] = []

    def add(self, name: str, values: float | Sequence[float], unit: str = "", **given: Any) -> None:
        """Add a result, whose arguments are those of `result`."""
        entry = result(self.name + name, values, unit, **self.facts | given)
        self.results.append(entry)
        wide = "" if entry["width"] is None else f"  width {number(entry['width'])}"
        print(f"{entry['name']:<72} {cell(entry)} {unit}{wide}", flush=True)
        for peer, found in entry["peer"].items():
            print(f"    {peer:<68} {cell(found)}   {times(found['ratio'])}")
        if entry["floor"] is not None:
            print(f"    {'the limit':<68} {number(entry['floor'])}   {times(entry['ratio_to_floor'])}")

    def add_cost(self, name: str, ran: Ran) -> None:
        """Add the seconds and the private memory of a command."""
        self.add(name, ran.seconds, "s")
        self.add(f"{name}, memory", ran.memory, "MB")

    def add_exponent(self, name: str, sizes: Sequence[int], costs: Sequence[float]) -> None:
        self.add(name, exponent(sizes, costs), more=False)

    def rows(self) -> Numbers:
        """Return what earlier runs kept, by name."""
        return dict(load(self.out)["rows"])

    def write(self, rows: Mapping[str, Any] | None = None) -> None:
        """Write the results so far; `rows`, by name, are what a script needs to continue."""
        save(self.out, self.results, self.threads, rows)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.write()


def spread(values: Sequence[float]) -> Numbers:
    """Return median, mean and range over rounds or seeds."""
    if not values:
        raise ValueError("no round was measured")
    middle = {"median": statistics.median(values), "mean": statistics.fmean(values)}
    return middle | {"low": min(values), "high": max(values), "rounds": len(values)}


def exponent(sizes: Sequence[int], costs: Sequence[float]) -> float:
    """Return e of cost ~ size^e, by least squares over the sizes within a hundredth of the largest."""
    points = [(math.log(n), math.log(c)) for n, c in zip(sizes, costs, strict=True) if 100 * n >= max(sizes)]
    return statistics.linear_regression(*zip(*points, strict=True)).slope if len(points) > 1 else math.nan


def result(
    name: str, values: float | Sequence[float], unit: str = "", *, more: bool | None = None,
    peers: Mapping[str, Sequence[float]] | None = None, floor: float | None = None, width: float | None = None,
    **extra: Any,
) -> Numbers:  # fmt: skip
    """Return one measured number as a result.

    `more`: larger is better; by default in all units but those of time and memory. `peers`: the rounds of other tools
    in the same unit and run, by name and version; `ratio_to_peer` is how many times as good as the best of them this
    is. `floor`: the limit of the machine in the same unit; `ratio_to_floor` is the ratio to it, 1 at best. `width`:
    numbers of the model's item vector. `doubt`: why the number must not be used.
    """
    own, more = (
        spread([values] if isinstance(values, int | float) else values),
        unit not in LESS if more is None else more,
    )
    beside = {peer: spread(given) for peer, given in (peers or {}).items() if given}
    for found in beside.values():
        found["ratio"] = _better(own["median"], found["median"], more)
    ratio = min((found["ratio"] for found in beside.values()), default=None)
    limited = {"floor": floor, "ratio_to_floor": None if floor is None else _better(floor, own["median"], more)}
    about = {"name": name, "value": own["median"], "unit": unit, "better": "more" if more else "less"}
    about |= {"width": width and int(width)}
    place = {"command": command(), "load": round(os.getloadavg()[0], 2)}
    return about | own | {"peer": beside, "ratio_to_peer": ratio} | limited | place | extra


def _better(one: float, other: float, more: bool) -> float | None:
    above, below = (one, other) if more else (other, one)
    return above / below if below and math.isfinite(above / below) else None


def command() -> str:
    """Return the running command without the folders of this machine and without --out."""
    words, given = [], iter(sys.argv[1:])
    for word in given:
        if word == "--out":
            next(given, None)
        elif not word.startswith("--out="):
            words.append(Path(word).name if word.startswith("/") else word)
    data = [f"TWOTOWER_DATA={Path(os.environ['TWOTOWER_DATA']).name}"] if os.environ.get("TWOTOWER_DATA") else []
    return " ".join([*data, "python -m benchmarks", shlex.join(words)])


def load(path: Path | None) -> Numbers:
    """Read a file of results; empty if it is missing."""
    there = path is not None and path.exists()
    found: Numbers = json.loads(path.read_text(encoding="utf-8")) if path and there else {"results": [], "rows": {}}
    if "results" not in found:
        raise SystemExit(f"{path}: no file of results; choose another --out")
    return found


def save(path: Path | None, results: Sequence[Numbers], threads: int, rows: Mapping[str, Any] | None = None) -> None:
    if path is None:
        return
    old, names = load(path), {entry["name"] for entry in results}
    bounds = old["limits"] if old.get("limits", {}).get("threads") == threads else limits(threads)
    kept = [entry for entry in old["results"] if entry["name"] not in names]
    found = {"machine": machine(), "limits": bounds, "results": [*kept, *results]}
    found["rows"] = old.get("rows", {}) | dict(rows or {})
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def number(value: float | None) -> str:
    """Format a number: counts in full, other numbers with three or four significant digits."""
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    size = abs(value)
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 4
    return f"{value:,.{digits}f}"


def cell(found: Mapping[str, Any]) -> str:
    """Format a median, with its range over several rounds."""
    middle = number(found["median"])
    return middle if found["rounds"] < 2 else f"{middle} ({number(found['low'])}–{number(found['high'])})"


def times(ratio: float | None) -> str:
    """Format a ratio: "1.23x"."""
    return "-" if ratio is None else f"{ratio:.2f}x" if ratio < 10 else f"{ratio:,.0f}x"
