"""Comparison of runs with the first of them, on the same test users, by a paired bootstrap.

Each resample draws users with replacement and measures both runs on them, so variance between users that both runs
share cancels (Efron and Tibshirani 1993, "An Introduction to the Bootstrap", section 13.3).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from string import ascii_uppercase
from typing import TYPE_CHECKING

import numpy as np

from twotower.arrays.sets import places_of_rows
from twotower.arrays.types import Ints, Shaped
from twotower.config.experiment import Config
from twotower.data.pairs import GroupedPairs
from twotower.data.splits import TEST
from twotower.errors import RunError
from twotower.evaluation.alignment import check_same_tests, match_ids
from twotower.evaluation.comparison import Comparison, ComparisonData, compare_factors
from twotower.evaluation.config import Metrics, MetricSet
from twotower.evaluation.factors import Factors
from twotower.evaluation.metrics.measured import RankedItems
from twotower.evaluation.slices import TableSlice, slices_of
from twotower.features.schema import Schema
from twotower.reports.verdict import verdict

if TYPE_CHECKING:
    from twotower.runs import Run

log = logging.getLogger(__name__)

DECISION_RULE = (
    "Rule: a difference is significant when its 95 % paired bootstrap interval over test users excludes zero. The "
    "interval covers variance over users only: to compare settings, repeat with several train.seed."
)
MAX_RUNS = 10
"""Runs of one comparison, the first included; the figures have a colour for each."""


def compare_runs(
    a: Run, b: Run, *, resamples: int = 1000, names: tuple[str, str] = ("A", "B"), sliced: bool = False
) -> list[Comparison]:
    """Compare two runs by AUC, GAUC and ranking metrics that both measure, at the cut-offs of both evaluation.k.

    Users and items are matched by id. Both runs rank the items that both know, by the same `evaluation.repeats`, for
    items seen in the train or validation part of either. With `sliced` the slices of A follow. Raises RunError unless
    the test pairs, their labels and their weights are equal.
    """
    if resamples < 1:
        raise RunError(f"resamples = {resamples}: expected at least 1")
    data, factors_a, factors_b, slices = _align_runs(a, b, names)
    log.info(f"test {data.queries.summary}")
    k = [n for n in a.config.evaluation.k if n in b.config.evaluation.k]
    metrics = MetricSet(m for m in a.config.evaluation.metrics if m in b.config.evaluation.metrics)
    comparisons = compare_factors(
        factors_a, factors_b, data, k, resamples, metrics=metrics, slices=slices if sliced else (),
        slice_min_users=a.config.evaluation.slice_min_users,
    )  # fmt: skip
    if not comparisons:
        raise RunError(
            f"nothing to compare: no user has test pairs of both classes, and evaluation.k has no cut-off in common "
            f"({list(a.config.evaluation.k)} and {list(b.config.evaluation.k)})"
        )
    return [replace(c, names=names) for c in comparisons]


def describe_table(comparisons: Sequence[Comparison]) -> Iterator[str]:
    """Yield printable lines: a table and a summary."""
    a, b = comparisons[0].names
    yield f"{'metric':<14}{a:>8}{b:>9}{f'{b} - {a}':>10}   {'95 % interval':<21}{'p':>6}  verdict"
    for c in comparisons:
        interval = f"[{_number(c.low, '+')}, {_number(c.high, '+')}]"
        yield (
            f"{c.metric:<14}{_number(c.a):>8}{_number(c.b):>9}{_number(c.difference, '+'):>10}   {interval:<21}"
            f"{c.p:>6.3f}  {c.verdict} ({c.users:,} users)"
        )
    yield summarize(comparisons)


def _number(value: float, sign: str = "") -> str:
    """Return a number with four decimals, or one from a hundred on."""
    return f"{value:{sign}.{4 if abs(value) < 100 else 1}f}"


def summarize(comparisons: Sequence[Comparison]) -> str:
    """Summarise all metrics in one sentence."""
    n, (a, b) = len(comparisons), comparisons[0].names
    better = {name: [c.metric for c in comparisons if c.better == name] for name in (a, b)}
    if not better[a] and not better[b]:
        return f"Overall: no significant difference in any of {n} metrics."
    if better[a] and better[b]:
        return f"Overall: mixed; {a} is better in {', '.join(better[a])}; {b} is better in {', '.join(better[b])}."
    winner = a if better[a] else b
    if len(better[winner]) == n:
        return f"Overall: {winner} is better in all {n} metrics."
    return f"Overall: {winner} is better in {', '.join(better[winner])}; no significant difference in the others."


# ---- several runs -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ComparedRun:
    """A run of a comparison without its data and its model, and its differences to the first run."""

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
    """Compare each run with the first by `compare_runs`. Holds at most two runs in memory.

    A run with other test pairs has a `refusal`. Raises RunError if no run can be compared, and for fewer than two or
    more than MAX_RUNS runs."""
    found, first = list[ComparedRun](), None
    for letter, run in zip(ascii_uppercase, runs, strict=False):
        if len(found) == MAX_RUNS:
            raise RunError(f"more than {MAX_RUNS} runs are given; compare at most {MAX_RUNS} at a time")
        comparisons, refusal = list[Comparison](), ""
        if first is not None:
            try:
                names = (ascii_uppercase[0], letter)
                comparisons = compare_runs(first, run, resamples=resamples, names=names, sliced=sliced)
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
    """Yield printable lines: a table and a summary, or a refusal, of each run but the first; then the decision rule and
    the verdict on each run. With more than two runs a line names the run of each table."""
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


# ---- alignment of two runs ---------------------------------------------------------------------------------------


def _align_runs(
    a: Run, b: Run, letters: tuple[str, str]
) -> tuple[ComparisonData, Factors, Factors, Iterator[TableSlice]]:
    """Return the test data, the vectors of A and B, and the slices of A, all in common row numbers."""
    names = [str(run.folder) if run.folder else name for run, name in zip((a, b), letters, strict=True)]
    for run, name in zip((a, b), names, strict=True):
        if run.dataset.schema.side("context"):
            raise RunError(
                f"{name}: reads the context, in which a user has several rankings; compare their metrics instead"
            )
    weighted, other = (run.config.evaluation.weighted for run in (a, b))
    if weighted != other:
        raise RunError(
            f"evaluation.weighted is {str(weighted).lower()} in {names[0]} and {str(other).lower()} in {names[1]}; "
            "compare runs with the same setting"
        )
    check_same_tests(a.dataset, b.dataset, names, weighted=weighted)
    repeats, others = (run.config.evaluation.repeats for run in (a, b))
    if repeats != others:
        raise RunError(
            f"evaluation.repeats is '{repeats}' in {names[0]} and '{others}' in {names[1]}; compare runs with the same "
            "setting"
        )
    # In the order of A, so that ties are ordered as in the metrics of A.
    tested = np.flatnonzero(a.dataset.grouped(TEST).lengths)
    users = match_ids(a.dataset, b.dataset, "user", tested)
    items = match_ids(a.dataset, b.dataset, "item", np.arange(len(a.dataset.items)))
    more = [len(run.dataset.items) - len(items[0]) for run in (a, b)]
    if any(more):
        log.warning(
            f"compared over the {len(items[0]):,} items that both have: {names[0]} has {more[0]:,} more and {names[1]} "
            f"{more[1]:,}, among which their own metrics rank too, so these are lower"
        )
    seen: list[GroupedPairs] = []
    factors: list[Factors] = []
    for run, name, user, item in zip((a, b), names, users, items, strict=True):
        places = places_of_rows(item, len(run.dataset.items))
        seen += [pairs.renumbered(user, places) for pairs in run.dataset.grouped_before(TEST)]
        known = run.factors_at_once(TEST)
        aligned = replace(known, users=known.users.cpu(), items=known.items.cpu()).take(user, item)
        if not aligned.are_finite():
            raise RunError(f"{name}: its vectors are not finite; `diagnose(run)` says why")
        factors.append(aligned)
    data, place = a.dataset, places_of_rows(items[0], len(a.dataset.items))
    tests = data.test.renumbered(places_of_rows(users[0], len(data.users)), place)
    grouped = data.grouped(TEST).renumbered(users[0], place)
    ranked = RankedItems.of(data, items[0], weighted)
    found = ComparisonData(tests, grouped, seen, ranked, weighted, repeats)
    return found, factors[0], factors[1], _slices(a, users[0], items[0], found)


def _slices(
    run: Run, users: Shaped[Ints, "U"], items: Shaped[Ints, "I"], aligned: ComparisonData
) -> Iterator[TableSlice]:
    """Yield the slices of a run over rows of its tables."""
    data, config = run.dataset, run.config.evaluation
    ranked = users[aligned.queries.users]
    for of in slices_of(data, config, TEST, data.test.item, ranked):
        yield of._replace(rows=of.rows[users if of.side == "user" else items])
