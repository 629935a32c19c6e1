import re
import statistics
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

from benchmarks.lib.processes import COMPILED, TWOTOWER, Words, run
from benchmarks.lib.report import Report, declared
from benchmarks.lib.rounds import in_turns
from benchmarks.serving.requests import ids

COMMANDS: dict[str, list[str]] = declared(__file__)["commands"]


def main(chosen: Namespace, report: Report) -> None:
    fill = {"store": chosen.store, "user": ids(Path(chosen.store), "user")[0]}
    for name, words in COMMANDS.items():
        command = [*TWOTOWER, *(word.format(**fill) for word in words)]
        works = {"ours": partial(seconds, command), "imports": partial(seconds, imports(command))}
        found = in_turns(works, chosen.rounds, reverse=True)
        report.add(name, found["ours"], "s", floor=statistics.median(found["imports"]))


def seconds(words: Words) -> float:
    return run(words, environment=COMPILED).seconds


def imports(command: list[str]) -> list[str]:
    """Return a command that imports the modules of a command, without those of this package."""
    said = run([sys.executable, "-X", "importtime", *command[1:]], environment=COMPILED).said
    names = re.findall(r"^import time:.*\| +(\S+)$", said, re.MULTILINE)
    others = [name for name in names if name.partition(".")[0] != "twotower"]
    lines = ["from contextlib import suppress", "from importlib import import_module", f"for name in {others!r}:"]
    return [sys.executable, "-c", "\n".join([*lines, "    with suppress(Exception): import_module(name)"])]
