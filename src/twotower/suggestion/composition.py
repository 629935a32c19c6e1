"""Composition of a config: the sections of a recipe, and those that the tables decide, with comments."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from itertools import count

from twotower.config.toml import TomlValue, parse_config
from twotower.data.split import SplitConfig
from twotower.features.schema import Schema
from twotower.suggestion.choice import RecipeRule
from twotower.suggestion.guess import MIN_REPEATS, Guess
from twotower.suggestion.recipes import FittedRecipe, Settings, read_recipe
from twotower.suggestion.settings import shaped_settings
from twotower.suggestion.shape import MIN_LAST, MIN_NEW, MIN_NEW_USERS, TYPICAL_ROWS, Shape
from twotower.suggestion.side_features import SideFeature
from twotower.train.recipe import TrainConfig

_BY_VALIDATION = {"stacking": "weighs the terms of a score", "cold_item_bias": "tells how high new items rank"}
"""Options of the model that a validation part fits, and what it does."""
MEASURED_USERS = 20_000
"""Users who test and validate where twice as many can: the standard error of a recall of .05 among them is .0015."""
MAX_TIES = 0.5
"""Share of neighbouring rows of a user of equal time, up to which a user has a last row."""
LEAST_TOLD = 0.001
"""Least share of rows that is told as a number."""
MIN_ROWS_OF_SPLIT = 6
"""Median rows of a user from which a tenth of a user's rows, rounded to the nearest number, is a row."""


def compose(
    rule: RecipeRule,
    guess: Guess,
    shape: Shape,
    data: Mapping[str, TomlValue] | None,
    ordered: bool | None = None,
    keeps_label: bool = False,
    validates: bool = True,
    unsolved: str = "",
    has_context: bool = False,
) -> tuple[Settings, dict[str, str]]:
    """Return the settings of a recipe for tables, and comments by dotted key. `data` is the section that names the tables.
    `ordered` tells whether given parts follow one another in time; None: a rule splits.
    `keeps_label` is True if the label is read whatever the recipe, and `validates` False if a rule leaves no validation part, or takes none from train.
    `unsolved` is the reason that no closed form goes with the tables, and `has_context` is True if features are of the context."""
    source = read_recipe(rule.recipe)
    own, config = parse_config(source, f"recipe {rule.recipe}")
    schema, comments = guess.schema, {f"schema.{key}": why for key, why in guess.columns.why.items()}
    comments |= {f"schema.unknown_{side}s": why for side, why in guess.lacking.items()}
    by_users = rule.needs_contents and shape.has_telling_users and not shape.has_new_items
    tops = shape.label_values <= 2 and not config.loss.pointwise
    all_taken = by_users or tops or not (own or Schema()).has_negatives
    all_taken |= shape.no_rating is not None and not config.loss.pointwise
    if shape.is_scale and all_taken and not keeps_label:  # a scale rates what users took
        schema = {key: value for key, value in schema.items() if key not in ("label", "positive_above")}
    columns = guess.features
    if shape.query == schema["user_id"]:  # what was searched for stands for the user
        options = {"kind": "text", "side": "user", "name": shape.query}
        columns = (SideFeature(shape.query, options, "what was searched for", True), *columns)
    alike = rule.needs_contents and shape.content_kinds < shape.items
    if alike and shape.content_kinds > 1:
        why = f"the other columns have at most {shape.content_kinds:,} combinations of values for {shape.items:,} items"
        columns = tuple(replace(c, why=f"{c.why}; {why}") if c.is_text else c for c in columns)
    if not (config.train.epochs or unsolved):  # closed forms alone, which weigh what tells little by little
        parts = _parts_of_ids(str(schema["item_id"]), shape, [c.options["name"] for c in columns])
        columns = (*columns, *parts)
        shape = replace(shape, content_values=shape.content_values + (shape.id_parts.values if parts else 0))
    has_label = "label" in schema or "event" in schema
    of_users = (
        shape.telling.names
        if rule.reads_users and (shape.telling.exists or (rule.needs_contents and not shape.contents))
        else ()
    )
    reads_negatives = config.loss.pointwise or shape.is_scale  # what users took and rated low, and no refusals or shows
    fitted = FittedRecipe(
        source, str(schema["user_id"]), str(schema["item_id"]), columns, has_label, alike, of_users, reads_negatives,
        (("user", shape.query), ("item", shape.words)),
    )  # fmt: skip
    given = ordered is not None and "validation" in (data or {})
    has_validation = validates or given
    unweighed = "" if has_validation else "no validation part chooses its weight."
    if has_validation and guess.ranks_repeats and config.last_starts:
        unweighed = "repeats are kept, and what is fitted to them comes after its weight."
    if has_context and config.last_starts:
        unweighed = "the vectors of trained pairs depend on the context, and its weight would too."
    sections, of_shape = shaped_settings(
        source, fitted, shape, config, rule.rows, rule.ids, rule.min_steps, unweighed, unsolved
    )
    comments |= of_shape | {f"schema.features.{place}": why for place, why in fitted.why.items()}
    if config.model.cold_item_bias and not shape.contents:
        sections["model"] = {**_section(sections, "model"), "cold_item_bias": False}
        comments["model.cold_item_bias"] = "The items have no columns of contents, by which new ones would rank."
    follows = shape.drift is not None and shape.drift.exists and _has_id(fitted.features, str(schema["item_id"]))
    follows &= has_validation and not (config.loss.pointwise or config.model.stacking)
    if by_users and has_validation and not follows:
        sections["model"] = {**_section(sections, "model"), "bias": True}
        comments["model.bias"] = "Few items are new, so that popularity counts, in the weights of columns too."
    split, evaluation = _section(source, "split"), _section(source, "evaluation")
    if ordered is not None:
        split = {"kind": "files", **({"ordered": True} if ordered else {})}
        comments["split.kind"] = "Files give the parts." + " None validates: a part of train does." * (
            validates and not given
        )
    else:
        has_text = any(feature.get("side") == "user" and feature["kind"] == "text" for feature in fitted.features)
        are_known = shape.new_users < MIN_NEW_USERS or bool(of_users) or has_text or config.loss.pointwise
        split, of_split = _split(split, config.split, guess.ranks_repeats, shape, are_known, follows)
        comments |= of_split
    if not has_validation:
        _settle_starts(sections, comments)
        sections["train"] = {k: v for k, v in _section(sections, "train").items() if k != "patience"}
        for option, does in _BY_VALIDATION.items():
            if getattr(config.model, option):
                sections["model"] = {**_section(sections, "model"), option: False}
                comments[f"model.{option}"] = f"No validation part {does}."
    if guess.keeps_repeats(split):
        schema = {**schema, "duplicates": "keep"}
    if guess.ranks_repeats:
        kinds = {"positive"} if has_label and shape.negatives else {"positive", "all"}
        taken = _history_of_items(fitted.features, kinds) or _history_of_items(fitted.features, {"all"})
        if taken and has_validation and not config.loss.pointwise:
            comments |= _positives_alone(fitted.features, taken, kinds)
            sections["model"] = {**_section(sections, "model"), "own_counts": taken}
            comments["model.own_counts"] = "Repeats are kept: what a user took counts for itself."
        evaluation["repeats"] = "allow"
        comments["schema.duplicates"] = (
            f"{guess.repeats:.1%} of the rows repeat a pair of user and item (threshold {MIN_REPEATS:.0%}). A user counts for at most "
            f"{TYPICAL_ROWS} times the median number of rows of users with several."
        )
    elif "duplicates" in schema:
        share = f"{guess.repeats:.1%}" if guess.repeats >= LEAST_TOLD else f"Less than {LEAST_TOLD:.1%}"
        comments["schema.duplicates"] = (
            f"{share} of the rows repeat a pair of user and item: earlier ones stay in the training where later ones test, and rankings leave out what a "
            "user has taken before."
        )
    if follows and shape.drift:
        sections["model"] = {**_section(sections, "model"), "recent_popularity": True}
        comments["model.recent_popularity"] = f"What is popular changes: {shape.drift}."
    settings: Settings = {
        "data": dict(data or {}),
        "schema": {**schema, "features": fitted.features},
        "split": split,
        **sections,
        "evaluation": evaluation,
    }
    return {key: section for key, section in settings.items() if section}, comments


def _parts_of_ids(item_id: str, shape: Shape, taken: Container[TomlValue]) -> list[SideFeature]:
    """Return a feature of the parts of the items' ids for each separator whose parts tell what users take, of a name that is not taken."""
    made = list[SideFeature]()
    names = filter(lambda name: name not in taken, (f"{item_id}_parts{place}" for place in count(1)))
    for separator, name in zip(shape.id_parts.separators, names, strict=False):
        options: Settings = {
            "kind": "multi_hot",
            "side": "item",
            "name": name,
            "column": item_id,
            "separator": separator,
        }
        made.append(
            SideFeature(name, options, "parts of the ids, which items of one user share more often than others")
        )
    return made


def _history_of_items(features: Sequence[Settings], interactions: Container[str]) -> str:
    """Return the name of the first history of the users that holds ids of items, of such interactions; empty without one."""
    for feature in features:
        of_users = feature["kind"] == "sequence" and feature["side"] == "user" and not feature.get("feature")
        if of_users and feature.get("interactions", "all") in interactions and not feature.get("max_length"):
            return str(feature["name"])
    return ""


def _positives_alone(features: Sequence[Settings], history: str, kinds: Container[str]) -> dict[str, str]:
    """Let a history hold positives alone if `kinds` have not what it holds, and return the comment by its key."""
    for place, feature in enumerate(features):
        if feature["name"] == history and feature.get("interactions", "all") not in kinds:
            feature["interactions"] = "positive"
            return {f"schema.features.{place}": "interactions: what users refused is not what they take again"}
    return {}


def _has_id(features: Sequence[Settings], item_id: str) -> bool:
    """Return True if a feature of the items is their id."""
    of_items = (f for f in features if f["side"] == "item" and f["kind"] == "categorical")
    return any(f.get("column", f["name"]) == item_id and not f.get("hash_buckets") for f in of_items)


def _split(
    source: Settings, config: SplitConfig, ranks_repeats: bool, shape: Shape, are_known: bool, follows_popularity: bool
) -> tuple[Settings, dict[str, str]]:
    """Return the rule of the split for a log, and comments by dotted key, given that of the recipe. `are_known` is False if most of the
    latest rows are of users of whom nothing is known, `follows_popularity` True if the model ranks by what is popular now."""
    has_time, is_causal = shape.order is not None, config.follows_time
    # A last row tells something of a user where rows follow one another, and one before it is left to learn from.
    may_be_last = shape.order is not None and shape.order.ties < MAX_TIES and shape.length >= MIN_LAST
    of_new_users = (
        f"{shape.new_users:.1%} of the latest rows are of users without an earlier row (threshold {MIN_NEW_USERS:.0%}), of whom a "
        "model knows nothing"
    )
    split, why = source, ""
    if config.needs_time and not has_time:
        split, why = {"kind": "random"}, "The recipe splits by time, and there is none."
    elif follows_popularity and not is_causal and may_be_last:
        split = {"kind": "last"}
        why = "What is popular changes: each user's last row tests, and what is popular is that of its time."
    elif ranks_repeats and not is_causal and has_time and (are_known or may_be_last):
        split = {"kind": "time" if shape.by_time and are_known else "last"}
        why = "Repeats are kept: training has the earlier ones, so that the later ones are foreseen."
        if shape.by_time and not are_known:
            why += f" Each user's last row tests, as {of_new_users}."
    elif not is_causal and shape.by_time and shape.new_items >= MIN_NEW and (are_known or may_be_last):
        split = {"kind": "time" if are_known else "last"}
        why = "New items come later: the latest rows test, and the report has items that training lacks."
        if not are_known:
            why = f"Each user's last row tests, as {of_new_users}; a new item is in the training where another user took it earlier."
    elif config.kind == "user_random" and shape.length < MIN_ROWS_OF_SPLIT:
        split = {**split, "kind": "random"}
        why = (
            f"A user has {shape.rows_of_user}, the median (threshold {MIN_ROWS_OF_SPLIT}): a tenth of most users' rows rounds to none, "
            "so that the rows of all are drawn together."
        )
    comments = {"split.kind": why} if why else {}
    if split.get("kind", config.kind) in SplitConfig.kinds_of_users and shape.measurable >= 2 * MEASURED_USERS:
        split = {**split, "users": float(f"{MEASURED_USERS / shape.measurable:.2g}")}
        comments["split.users"] = (
            f"{shape.measurable:,} users have {MIN_LAST} rows or more: {MEASURED_USERS:,} of them tell enough, and the others are trained whole."
        )
    return split, comments


def _settle_starts(sections: Settings, comments: dict[str, str]) -> None:
    """Give starts their first value in place of several."""
    train = _section(sections, "train")
    if starts := TrainConfig.model_validate(train).start:
        firsts = (
            {name: [getattr(start, name)[0]] for name in start.several if getattr(start, name)} for start in starts
        )
        given = (start.model_dump(exclude_defaults=True) for start in starts)
        kept = [{"kind": s.kind, **own, **first} for s, own, first in zip(starts, given, firsts, strict=True)]
        sections["train"] = {**train, "start": kept}
        told = "The first of the recipe's values: no validation part chooses."
        comments["train.start"] = f"{told} {comments.get('train.start', '')}".strip()


def _section(settings: Settings, key: str) -> Settings:
    found = settings.get(key, {})
    return dict(found) if isinstance(found, Mapping) else {}
