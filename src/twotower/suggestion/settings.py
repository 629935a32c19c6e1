"""Settings that follow the shape of the tables, each with its rule as a comment."""

from __future__ import annotations

import math
from collections.abc import Mapping
from operator import itemgetter

from twotower.config.experiment import Config
from twotower.config.toml import TomlValue
from twotower.errors import listed
from twotower.features.side import SIDES, SideName
from twotower.suggestion.recipes import FittedRecipe, Settings
from twotower.suggestion.shape import Shape
from twotower.train.defaults import MIN_BATCH, STEPS_OF_EPOCH, batch_of
from twotower.train.starts.start import Start
from twotower.train.starts.user_content import fewer_columns

MAX_FULL_ITEMS = 50_000
"""Items up to which a loss over the whole catalogue is trained."""
UNIFORM = 4096
"""Items drawn for each batch in place of a larger catalogue."""
MIN_STEPS = 0.1
"""Share of the recipe's own steps that a training has at least (docs/log.md)."""
MAX_EPOCHS = 100
MIN_WINDOW = 8
MAX_WIDTH = 512
"""Width up to which that of a model that is its start is raised on a small log."""
ROWS_OF_ID = 16
"""Rows that take as long in a start as a user or an item does, whatever the width (docs/log.md)."""


def shaped_settings(
    recipe: Settings,
    fitted: FittedRecipe,
    shape: Shape,
    config: Config,
    rows: int,
    ids: int = 0,
    min_steps: int = 0,
    unweighed: str = "",
    unsolved: str = "",
) -> tuple[Settings, dict[str, str]]:
    """Return the sections [model], [loss], [negatives] and [train] of a recipe, whose `config` was chosen on a log of `rows` of `ids`
    users and items, for a shape, and comments by dotted key. A training has at least `min_steps`, by default a tenth of the recipe's own. The windows of
    `fitted.features` are set too, and pairs left out of `fitted` whose weight cannot be chosen, for the reason `unweighed`, or whose closed form is too
    large; for the reason `unsolved` every pair that starts so."""
    settings: Settings = {key: recipe[key] for key in ("loss", "negatives", "train") if key in recipe}
    comments = dict[str, str]()
    for start in config.train.start:
        if start.in_order and shape.order and shape.order.exists and start.pair not in fitted.without_columns:
            fitted.order_pair(start.pair, start.in_order)
    _shape_blends(settings, fitted, shape, config, unweighed, unsolved, comments)
    settings = {"model": fitted.model} | settings
    _shape_windows(fitted, shape)
    _shape_catalogue(settings, shape, comments)
    _shape_steps(settings, shape, config, rows, min_steps, comments)
    _shape_width(settings, shape, config, rows + ROWS_OF_ID * ids, comments)
    return settings, comments


def _shape_blends(
    settings: Settings,
    fitted: FittedRecipe,
    shape: Shape,
    config: Config,
    unweighed: str,
    unsolved: str,
    comments: dict[str, str],
) -> None:
    """Leave out the pairs that are weighed beside others if their weight cannot be chosen, or their closed form does not fit the log, and all
    that start so if none does; others are no wider than it can fill."""
    train, starts = settings.get("train"), config.train.start
    if not (
        isinstance(train, Mapping)
        and any(start.blend or unsolved for start in starts)
        and isinstance(given := train["start"], list)
    ):
        return
    too_large = f"{shape.users:,} users and {shape.items:,} items are too many for its closed form."
    reasons = dict[str, list[str]]()
    left, fewer = list[Start](), dict[int, dict[SideName, list[str]]]()
    for start in starts:
        why = unsolved or unweighed or ("" if start.is_exact(shape.users, shape.items, shape.common) else too_large)
        if start.adds_users and shape.users_change:
            why = "users have several values of a column, by schema.valid_from."
        elif start.adds_users and start.pair not in fitted.without_columns:
            fewer[start.pair] = _fewer_columns(fitted, shape, start.pair)
            why = why or ("" if fewer[start.pair]["user"] else "the columns have too many values to be counted.")
        if start.pair in fitted.without_columns:
            why = "the tables have none of the columns that it reads."
        if unsolved or (start.blend and why):
            left.append(start)
            reasons.setdefault(why, []).append(f"'{start.kind}'")
    gone = sorted((start.pair for start in left), reverse=True)
    for pair in gone:
        fitted.drop_pair(pair)
    kept = list[TomlValue]()
    most = min(shape.users, shape.items)
    for start, options in zip(starts, given, strict=True):
        if start in left or not isinstance(options, Mapping):
            continue
        pair = start.pair - sum(other < start.pair for other in gone)
        kept.append({**options, "pair": pair} if pair else options)
        joint = shape.joint_values
        for side, names in fewer.get(start.pair, {}).items():
            if too_many := [f"'{name}'" for name in fitted.columns_of(pair, side) if name not in names]:
                fitted.keep_fields(pair, side, names)
                counts = [_counts(fitted, shape, pair, of).values() for of in SIDES]
                joint = sum(min(one, other) for one in counts[0] for other in counts[1])
                comments[f"model.pairs.{pair}.{side}.fields"] = (
                    f"Without {listed(too_many)}, of too many values for the counts of the start '{start.kind}'."
                )
        bounds = [(most, f"The smaller number of {shape.users:,} users and {shape.items:,} items.")]
        if fitted.reads_columns(pair):
            why = (
                f"The number of values of the items' columns, {shape.content_values:,}, and a tenth more for new ones."
            )
            bounds.append((_with_room(shape.content_values), why))
        if start.adds_users:
            why = f"The smaller number of values of each column of the users and of the items, added up, {joint:,}, and a tenth more for new ones."
            bounds.append((_with_room(joint), why))
        least, why = min(bounds, key=itemgetter(0))
        if start.blend and fitted.narrow_pair(pair, least):
            comments[f"model.pairs.{pair}.user.width"] = why
    settings["train"] = {**train, "start": kept}
    if left:
        comments["train.start"] = " ".join(
            f"Without {'each of ' * (len(kinds) > 1)}the recipe's start{'s' * (len(kinds) > 1)} {listed(kinds)} and its pair: {why}"
            for why, kinds in reasons.items()
        )


def _fewer_columns(fitted: FittedRecipe, shape: Shape, pair: int) -> dict[SideName, list[str]]:
    """Return the names of the columns of each side that a pair which counts their values can read."""
    with_unknown = [{name: values + 1 for name, values in _counts(fitted, shape, pair, side).items()} for side in SIDES]
    return dict(zip(SIDES, fewer_columns(*with_unknown), strict=True))


def _counts(fitted: FittedRecipe, shape: Shape, pair: int, side: SideName) -> dict[str, int]:
    """Return the numbers of values of the columns that a tower of a pair reads."""
    of_ids = {fitted.ids["user"]: shape.users, fitted.ids["item"]: shape.items}
    columns = fitted.columns_of(pair, side)
    return {name: shape.values.get((side, c), of_ids.get(c, 0)) for name, c in columns.items()}


def _with_room(values: int) -> int:
    """Return a width for so many values and a tenth more: a later log has new values, and a narrow pair tells less of each column."""
    return -(-11 * values // 10)


def _shape_windows(fitted: FittedRecipe, shape: Shape) -> None:
    for place, feature in enumerate(fitted.features):
        pooling = feature.get("pooling")
        window = pooling.get("window") if isinstance(pooling, Mapping) else None
        if not (isinstance(pooling, Mapping) and isinstance(window, float | int)):
            continue
        needed = max(MIN_WINDOW, 2 ** math.ceil(math.log2(max(1.0, shape.long_length))))
        if needed < window:
            feature["pooling"] = {**pooling, "window": needed}
            fitted.why[place] = (
                f"window: the power of two from {shape.long_length:g} on, the length that a tenth of the users exceeds; at least {MIN_WINDOW}, at most {window:g}"
            )


def _shape_catalogue(settings: Settings, shape: Shape, comments: dict[str, str]) -> None:
    negatives = settings.get("negatives")
    if not isinstance(negatives, Mapping):
        return
    drawn = negatives.get("uniform")
    if isinstance(drawn, float | int) and not negatives.get("full") and shape.items <= drawn:
        settings["negatives"] = {"full": True, **{k: v for k, v in negatives.items() if k != "uniform"}}
        comments["negatives.full"] = (
            f"{shape.items:,} items, no more than the {drawn:,} that the recipe draws: all of them."
        )
    if negatives.get("full") and shape.items > MAX_FULL_ITEMS:
        settings["negatives"] = {"uniform": UNIFORM, **{k: v for k, v in negatives.items() if k != "full"}}
        comments["negatives.uniform"] = (
            f"{shape.items:,} items, more than {MAX_FULL_ITEMS:,}: {UNIFORM:,} drawn for each batch stand for the catalogue."
        )


def _shape_width(settings: Settings, shape: Shape, config: Config, own_rows: int, comments: dict[str, str]) -> None:
    """Raise the width of a model without epochs, as far as its start takes no longer than on the recipe's own log: items that are
    taken together in pairs and series have more directions than tastes have. `own_rows` and those of the shape count each user and
    item as ROWS_OF_ID rows."""
    model, own = settings.get("model"), config.model.width
    if config.train.epochs or not isinstance(model, Mapping):
        return
    rows = shape.taken + ROWS_OF_ID * (shape.users + shape.items)
    width, most = own, min(shape.users, shape.items, MAX_WIDTH)
    while 2 * width <= most and 2 * width * rows <= own * own_rows:
        width *= 2
    if width > own:
        settings["model"] = {**model, "width": width}
        comments["model.width"] = (
            f"The recipe's {own:,}, doubled while it stays within {MAX_WIDTH:,} and the numbers of users and items, and the width times "
            f"{rows:,}, the rows and {ROWS_OF_ID} for each user and item, within the recipe's own {own:,} times {own_rows:,}."
        )


def _shape_steps(
    settings: Settings, shape: Shape, config: Config, own_rows: int, min_steps: int, comments: dict[str, str]
) -> None:
    """Set the batch size by the number of training rows, and the epochs by that of steps. A recipe without epochs keeps both."""
    train, split = config.train, config.split
    if not train.epochs:
        return  # the start of the training is all of it
    if config.loss.pointwise:
        rows = round((1 - split.test) * (1 - split.validation) * shape.interactions)
        batch = max(MIN_BATCH, math.ceil(rows / STEPS_OF_EPOCH))
        rule = f"A twentieth of the {rows:,} training rows, at least {MIN_BATCH}."
    else:
        rows = shape.taken
        batch = batch_of(rows, train.batch_size)
        rule = f"The recipe's {train.batch_size:,}, or the power of two of which {rows:,} rows make {STEPS_OF_EPOCH} steps, at least {MIN_BATCH}."
    given = settings.get("train", {})
    changed = {"batch_size": batch}
    comments["train.batch_size"] = rule
    steps, own_steps = math.ceil(rows / batch), train.epochs * math.ceil(own_rows / train.batch_size)
    least = min_steps or math.ceil(MIN_STEPS * own_steps)
    needed = min(MAX_EPOCHS, math.ceil(least / steps))
    if not config.loss.pointwise and needed > train.epochs:
        changed["epochs"] = needed
        comments["train.epochs"] = (
            f"More than the recipe's {train.epochs}: {steps:,} steps an epoch, and {least:,} are needed"
            + (
                f", a tenth of the recipe's own {own_steps:,}."
                if not min_steps
                else f"; the recipe's own are {own_steps:,}."
            )
            + (f" At most {MAX_EPOCHS} epochs." if needed == MAX_EPOCHS else "")
        )
    settings["train"] = {**(given if isinstance(given, Mapping) else {}), **changed}
