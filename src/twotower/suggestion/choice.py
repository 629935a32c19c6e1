"""Choice of a recipe by rules on the shape of the tables, each with the number that decides and its threshold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from twotower.data import drift_evidence
from twotower.data.order_evidence import MIN_LIFT, MIN_Z
from twotower.suggestion.shape import DENSE, MAX_FEW, MIN_NEW, MIN_TOP, Shape

MAX_QUERY_LENGTH = 5
"""Median interactions of a user up to which a text of users is a query, and not a description of people who come back."""
MIN_NEGATIVES = 0.05
"""Share of negatives from which a label of two values is worth a ranking of its own."""
MIN_LONG = 50
"""Median rows of a user from which a history is long: half of the users have more than the window of sequence-short."""


@dataclass(frozen=True)
class RecipeRule:
    """Recipe, whether a shape is right for it, what a shape must have for it at least, and the numbers as text."""

    recipe: str
    question: str
    """Question that the recipe answers."""
    rows: int
    """Rows of the log on which the recipe's settings were chosen."""
    fits: Callable[[Shape], bool]
    """True for a shape that the recipe is right for, if no earlier rule fits."""
    lacks: Callable[[Shape], str]
    """Column that the recipe needs and the tables lack. Empty: none."""
    reason: Callable[[Shape], str]
    """Numbers that decided, with their thresholds, for a shape that fits or does not."""
    min_steps: int = 0
    """Steps that a training has at least, measured on small logs (docs/log.md). 0: a tenth of the recipe's own."""
    ids: int = 0
    """Users and items of the log on which the settings of a recipe without epochs were chosen."""
    needs_contents: bool = False
    """True if items are ranked by their contents alone, which read text where other columns are the same for several items."""
    reads_users: bool = False
    """True if columns of users that tell what they take stand beside the history."""


def describe_order(shape: Shape) -> str:
    """Return what is known of the order of the log, with the thresholds."""
    if shape.order is None:
        return "no time column tells the order of the interactions"
    verdict = "there is one" if shape.order.exists else "none is found"
    return f"{verdict}: {shape.order}; thresholds {MIN_LIFT:g} times and z {MIN_Z:g}"


def describe_drift(shape: Shape) -> str:
    """Return what is known of how popularity changes, with the thresholds."""
    if shape.drift is None:
        return "no times that all users share tell what is popular when"
    verdict = "what is popular changes" if shape.drift.exists else "what is popular hardly changes"
    return f"{verdict}: {shape.drift}; thresholds {drift_evidence.MIN_LIFT:g} times and z {drift_evidence.MIN_Z:g}"


def _has_order(shape: Shape) -> bool:
    return shape.order is not None and shape.order.exists


def _needs_time(shape: Shape) -> str:
    return "" if shape.order is not None else "a time: set schema.time"


def _refused(shape: Shape) -> str:
    """Return the share of the negatives, and why they are refusals or not where the label alone does not say so."""
    share = f"{shape.negatives:.1%} of the rows are negatives (threshold {MIN_NEGATIVES:.0%})"
    if shape.is_scale:
        two = f" from {MIN_TOP} on" if shape.label_values <= 2 else ""
        return f"{share}, on a scale of {shape.label_values} labels{two}: what users chose and rated, not what they were shown"
    if shape.is_dense:
        return f"{share}, and users have {shape.density:.0%} of the items (threshold {DENSE:.0%}): what they were shown"
    if shape.undone:
        return f"{share}, {shape.undone:.1%} of the rows by taking an earlier choice back, which tells of no showing"
    return share


def _new(shape: Shape) -> str:
    of = (
        "of the latest tenth of the rows are of items without an earlier row"
        if shape.by_time
        else "of the rows are of items without another row"
    )
    return (
        f"{shape.new_items:.1%} {of} (threshold {MIN_NEW:.0%}{'' if shape.by_time else ', where texts or an order tell'}), and the items have "
        f"{shape.contents} columns of contents, {shape.texts} of them text; "
        f"{shape.telling}, and a user has {shape.rows_of_user}, the median (threshold at most {MAX_FEW}, in a log without an order)"
    )


def _length(shape: Shape) -> str:
    return f"a user has {shape.rows_of_user}, the median (threshold {MIN_LONG})"


RULES = (
    RecipeRule(
        "words",
        "which item do these words mean?",
        36_451,
        lambda s: s.queries is not None and s.queries.exists and s.length <= MAX_QUERY_LENGTH,
        lambda s: "" if s.query and s.words else f"a text column of the {'items' if s.query else 'users'}",
        lambda s: (
            f"'{s.query}' and '{s.words}' are text, and a user has {s.rows_of_user}, the median (threshold at most "
            f"{MAX_QUERY_LENGTH}); {s.queries}"
            if s.query and s.words
            else "users or items have no column of text"
        ),
    ),
    RecipeRule(
        "ranking",
        "would the user like an item that is shown?",
        1_000_209,
        lambda s: not s.is_scale and s.negatives - s.undone >= MIN_NEGATIVES and s.negatives <= 1 - MIN_NEGATIVES,
        lambda s: "" if s.negatives else "negatives: set schema.label and schema.positive_above",
        lambda s: _refused(s) if s.negatives else "every row is a positive",
    ),
    RecipeRule(
        "cold-start",
        "what does a user take next, if items or users are new and columns tell about them?",
        575_281,
        lambda s: s.has_new_items or s.has_telling_users,
        lambda s: "" if s.contents or s.telling.names else "columns of contents in a table of items, or columns of users that tell what they take",
        _new,
        needs_contents=True,
        reads_users=True,
    ),
    RecipeRule(
        "sequence-long",
        "what does a user take next?",
        1_000_209,
        lambda s: _has_order(s) and s.length >= MIN_LONG,
        _needs_time,
        lambda s: _length(s) if _has_order(s) else "no order",
    ),
    RecipeRule(
        "sequence-short",
        "what does a user take next?",
        198_502,
        _has_order,
        _needs_time,
        lambda s: _length(s) if _has_order(s) else "no order",
        min_steps=1000,
        reads_users=True,
    ),
    RecipeRule(
        "collaborative",
        "what else does a user take, in any order?",
        575_281,
        lambda s: True,
        lambda s: "",
        lambda s: "no other recipe fits",
        ids=6038 + 3533,
    ),
)  # fmt: skip
"""Rules of the recipes; the first that fits is chosen."""


def choose(shape: Shape) -> RecipeRule:
    """Return the first rule that fits a shape."""
    return next(rule for rule in RULES if rule.fits(shape))
