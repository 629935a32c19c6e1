"""Comparison of several runs with the first of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from string import ascii_uppercase
from typing import TYPE_CHECKING

from twotower.config.experiment import Config
from twotower.errors import RunError
from twotower.evaluation.comparison import Comparison
from twotower.evaluation.config import Metrics
from twotower.features.schema import Schema
from twotower.reports.compare import DECISION_RULE, compare_sliced, describe_table
from twotower.reports.verdict import verdict

if TYPE_CHECKING:
    from twotower.runs import Run

MAX_RUNS = 10
"""Runs of one comparison, the first included; the figures have a colour for each."""


@dataclass(frozen=True)
class ComparedRun:
    """A run of a comparison: what reports need of it, without its data and its model, and its differences to the first."""

    letter: str
    folder: str
    data: str
    """Sizes of the tables and of the parts."""
    schema: Schema
    config: Config
    metrics: Metrics
    history: list[Metrics]
    comparisons: list[Comparison]
    """Differences to the first run by metric; empty for the first, and for a run that cannot be compared with it."""
    slices: list[Comparison] = field(default_factory=list)
    """Differences to the first run by metric and slice of the first."""
    refusal: str = ""
    """Reason why the run cannot be compared with the first; empty if it can."""

    @property
    def label(self) -> str:
        """Letter and name of the folder."""
        name = self.folder.replace("\\", "/").rstrip("/").rpartition("/")[2]
        return f"{self.letter} {name}" if name else self.letter


def compare_with_first(runs: Iterable[Run], resamples: int = 1000, sliced: bool = False) -> list[ComparedRun]:
    """Compare each run after the first with the first, as `compare_runs` does, and with `sliced` their slices; at most two of `runs` are held at a time.

    A run with other test pairs has a `refusal`. Raises RunError if none can be compared, and for fewer than two runs or more
    than MAX_RUNS."""
    found, first = list[ComparedRun](), None
    for letter, run in zip(ascii_uppercase, runs, strict=False):
        if len(found) == MAX_RUNS:
            raise RunError(f"more than {MAX_RUNS} runs are given; compare at most {MAX_RUNS} at a time")
        comparisons, refusal = list[Comparison](), ""
        if first is not None:
            try:
                names = (ascii_uppercase[0], letter)
                comparisons = compare_sliced(first, run, resamples=resamples, names=names, sliced=sliced)
            except RunError as e:
                refusal = str(e)
        first = first or run
        found.append(
            ComparedRun(
                letter, str(run.folder or ""), run.dataset.describe(), run.dataset.schema, run.config, run.metrics,
                run.history, [c for c in comparisons if not c.of], [c for c in comparisons if c.of], refusal,
            )
        )  # fmt: skip
    if len(found) < 2:
        raise RunError(f"{len(found)} runs are given; a comparison needs at least 2")
    if all(run.refusal for run in found[1:]):
        raise RunError(found[1].refusal)
    return found


def describe_runs(runs: Sequence[ComparedRun]) -> Iterator[str]:
    """Yield printable lines: for each run after the first a table and a summary, or the reason why there is none; then the
    decision rule, and the verdict on each run. With more than two runs a line names the run of each table."""
    for run in runs[1:]:
        if len(runs) > 2:
            yield f"{run.letter} ({run.folder}) compared with {runs[0].letter} ({runs[0].folder})"
        if run.refusal:
            yield f"{run.letter} cannot be compared: {run.refusal}"
        else:
            yield from describe_table(run.comparisons)
        if len(runs) > 2:
            yield ""
    yield DECISION_RULE
    yield from (f"{run.letter}: {found.text}" for run in runs if (found := verdict(run.metrics, run.config)))
