"""Verdict on a run, the same in every report: the best simple baseline, the difference to it, and the next step."""

from __future__ import annotations

from typing import NamedTuple

from twotower.config.experiment import Config
from twotower.evaluation.config import Metrics
from twotower.reports.metric_tables import ROWS, WHERE_MEASURED, cell
from twotower.scorers import SCORERS

_BASELINES = {label: prefix.partition(".")[2] for label, prefix in (ROWS | WHERE_MEASURED).items() if prefix != "test"}
"""Label of a baseline -> its name."""


class Verdict(NamedTuple):
    """Three sentences about a run."""

    sentences: tuple[str, str, str]
    is_better: bool
    """True if the model is better than every baseline, and the interval of the difference, if known, excludes 0."""
    is_below_popularity: bool
    """True if the model is no better than popular items."""
    help: str
    """Sentence about the option that adds the best baseline to the model; empty without one, and if it is set."""

    @property
    def text(self) -> str:
        """The sentences as one paragraph."""
        return " ".join(self.sentences)


def verdict(metrics: Metrics, config: Config) -> Verdict | None:
    """Compare the model of a run with its best baseline by the monitored metric; None without it on the test part."""
    monitored, measured = config.train.monitor.rpartition(".")[2], config.evaluation.metric_set
    name = measured.judged_by(monitored)
    model, sign = metrics.get(f"test.{name}"), 1 if measured.find(name).higher_is_better else -1
    values = {of: v for of, at in _BASELINES.items() if (v := metrics.get(f"baseline.{at}.{name}")) is not None}
    if model is None or not values:
        return None
    best = max(values, key=lambda of: sign * values[of])
    difference = model - values[best]
    low, high = (metrics.get(f"difference.{_BASELINES[best]}.{name}.{end}") for end in ("low", "high"))
    if low is None or high is None:
        interval, is_clear, relation = "without an interval", difference != 0, "ahead"
    else:
        relation, interval = "better", f"95 % interval {low:+.4f} to {high:+.4f}, paired by test user"
        is_clear = low > 0 or high < 0
    is_better = is_clear and difference * sign > 0
    winner = "the model" if is_better else best
    outcome = f"{winner} is {relation}" if is_clear else "the difference may be chance"
    by = f"{name}, the monitored metric" if name == monitored else f"{name}, as no baseline has {monitored}"
    help_ = _help(best, config)
    advice = "Publish the model, or compare it with a run of other settings."
    if not is_better:
        advice = f"{help_}Run the doctor, which names likely causes, or train another recipe."
    return Verdict(
        (
            f"The best simple baseline by {by}, is {best}: {cell(values[best])} on the test part.",
            f"The model has {cell(model)}, a difference of {difference:+.4f} ({interval}): {outcome}.",
            advice,
        ),
        is_better,
        "popularity" in values and sign * (model - values["popularity"]) <= 0,
        help_,
    )


def _help(baseline: str, config: Config) -> str:
    """Return a sentence about the option that adds a baseline to the model; empty without one, and if it is set."""
    if baseline == "user+item bias" and not config.model.bias:
        return "Set model.bias = true, which adds the biases to the score. "
    found = next((scorer for scorer in SCORERS if scorer.label == baseline), None)
    if found is None or config.model.stacking or (config.model.cold_item_bias and found.weighs_new_items):
        return ""  # the latter two refuse the scorer
    is_set = found.kind in {scorer.kind for scorer in (*config.scorers, *config.train.solved)}
    return "" if is_set else f"Add {{ kind = '{found.kind}' }} to scorers, which adds it to the score. "
