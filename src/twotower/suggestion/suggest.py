"""Suggestion of a config for tables as they come."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Unpack

import polars as pl

from twotower.config.experiment import Config
from twotower.config.reference import toml_value, write_document
from twotower.config.toml import TomlValue, override_settings, parse_config
from twotower.data.evidence import MIN_LIFT, MIN_Z
from twotower.data.reading.readers import TableLike
from twotower.data.reading.times import TIME
from twotower.data.split import SplitConfig
from twotower.data.tables import Tables, check
from twotower.errors import ConfigError, did_you_mean
from twotower.escaping import representation
from twotower.features.schema import Schema
from twotower.features.side import SIDES, SideName
from twotower.progress import doing
from twotower.suggestion.features import (
    SideFeature,
    SideFeatures,
    counted_columns,
    guess_features,
    own_id,
    refuse_among_tables,
    with_constant_columns,
    without_answers,
)
from twotower.suggestion.recipes import FittedRecipe, Settings, listed_sections, read_recipe, section
from twotower.suggestion.roles import COLUMNS, OPTION_OF, RoleColumns, Roles, find_roles, role_options
from twotower.suggestion.shape import (
    MIN_LAST,
    MIN_NEW,
    MIN_NEW_USERS,
    RULES,
    RecipeRule,
    Shape,
    choose,
    hold,
    measure_shape,
    new_items,
    parts_follow,
    repeated_share,
    telling_users,
)
from twotower.suggestion.tables import ITEM, PART_OF, PLACE, USER, FoundTables, find_tables

MIN_REPEATS = 0.1  # share of repeated rows from which rankings hold what a user has taken before
MEASURED_USERS = 20_000  # users who test, where twice as many can: a recall of .05 has the standard error .0015
MAX_TIES = 0.5  # share of neighbouring rows of a user of equal time, up to which a user has a last row
MIN_ROWS_OF_SPLIT = 6  # median rows of a user from which a tenth of them, rounded, is a row


@dataclass(frozen=True)
class Suggestion:
    """Config for tables, the recipe that it follows and the reasons."""

    recipe: str
    reasons: tuple[str, ...]
    """Lines: what the tables are, the numbers that decided with their thresholds, what is left out."""
    shape: Shape
    text: str
    """The config as TOML with comments; of frames without a section [data]."""
    schema: Schema
    config: Config
    tables: Mapping[str, pl.DataFrame] = field(default_factory=dict)
    """Tables "users" and "items" made of columns of the interactions that have one value for each user or item. The
    config of files names them; a training of frames needs them."""

    def __repr__(self) -> str:
        return representation(type(self), f"recipe={self.recipe!r}, {self.schema!r}")


@dataclass(frozen=True)
class _Log:
    """Tables as they come and as a training reads them, with the roles of their columns."""

    found: FoundTables
    tables: Tables
    roles: Roles
    schema: Schema
    sides: Mapping[SideName, SideFeatures]
    repeats: float
    """Share of the rows that repeat a pair of user and item."""

    @property
    def options(self) -> Settings:
        """Options of the schema but the features."""
        options = {key: value for key, value in self.roles.options.items() if value != ""}
        title = self.sides["item"].title
        return options | ({"title": title} if title and "title" not in options else {})

    @property
    def ranks_repeats(self) -> bool:
        """True if repeated rows are many enough for rankings to hold what a user has taken before."""
        return self.repeats >= MIN_REPEATS

    @property
    def shares_time(self) -> bool:
        """True for times of all users, False for numbers that begin anew for each user."""
        if self.found.layout == "sequences" or self.schema.time_unit != "order" or not self.schema.time:
            return self.found.layout != "sequences"
        first = self.tables.interactions.group_by(self.schema.user_id).agg(pl.col(TIME).min())[TIME]
        return first.n_unique() > 1


def suggest(
    interactions: TableLike,
    users: TableLike | None = None,
    items: TableLike | None = None,
    *,
    recipe: str = "",
    overrides: Iterable[str] = (),
    folder: str | Path = ".",
    output: str | Path | None = None,
    **columns: Unpack[RoleColumns],
) -> Suggestion:
    """Look at tables and return a config for them, by one of six recipes.

    `interactions` is a table, or a folder with a file for each table. `recipe` is the name of one, empty for the recipe
    that the rules choose. `overrides` are settings `key=value`. `columns` name
    the columns of the log by role (user=, item=, query=, time=, label=, event=, weight=, session=, title=), an empty
    name for a role that none has. `folder` is the folder of the config, to which its paths are relative, and `output`
    its new file there, by which tables made of columns of the interactions are named; without it files get none.

    Raises ConfigError, DataError, or OpenRoles where two readings of the columns are possible."""
    if recipe and recipe not in (known := [rule.recipe for rule in RULES]):
        raise ConfigError(
            f"`recipe` {recipe}: no such recipe{did_you_mean(recipe, known)} (allowed: {', '.join(known)})"
        )
    if unknown := next((role for role in columns if role not in OPTION_OF), ""):
        raise ConfigError(f"`{unknown}`: no such role{did_you_mean(unknown, OPTION_OF)}")
    overrides, folder = [*overrides], Path(folder)
    output = None if output is None else folder / Path(output).name
    given = override_settings({}, filter(_is_of_data, overrides))
    form = section(section(given, "data"), "format")
    read_form = parse_config({"data": {"format": form}})[1].data.format if form else None
    found = find_tables(interactions, users, items, folder, read_form)
    if output is not None:
        refuse_among_tables(found, output)
    log = _read_log(found, section(given, "schema"), columns, output)
    shape = measure_shape(log.tables, log.schema, log.sides, log.shares_time)
    rule = next((rule for rule in RULES if rule.recipe == recipe), None) or choose(shape)
    if lack := rule.lacks(shape):
        raise ConfigError(f"recipe '{rule.recipe}' needs {lack}; these tables have none")
    composed, comments = _compose(rule, log, shape, given)
    settings = override_settings(composed, overrides)
    changed = tuple(override.partition("=")[0].strip() for override in overrides)
    comments = {path: said for path, said in comments.items() if not (changed and path.startswith(changed))}
    reasons = _reasons(rule, shape, log, section(settings, "schema"), bool(recipe))
    text = write_document(settings, "\n".join(reasons), comments)
    written, config = parse_config(tomllib.loads(text), "the suggested config", trust=True)
    config = config.model_copy(update={"data": config.data.located(folder.resolve())})
    made = {name: getattr(log.found, name) for name in log.found.made}
    return Suggestion(rule.recipe, tuple(reasons), shape, text, written or log.schema, config, made)


def _is_of_data(override: str) -> bool:
    """Return True for an override that the reading of the tables needs, and for a text that is no override."""
    key, equals, _ = override.partition("=")
    return not equals or key.partition(".")[0].strip(" \t\"'") in ("schema", "data", "split", "evaluation")


@doing("reading the roles of the columns and checking the tables")
def _read_log(found: FoundTables, given: Settings, columns: RoleColumns, output: Path | None) -> _Log:
    """Return tables with the roles of their columns, and as a training reads them. Raises DataError or ConfigError."""
    by_role = {role: str(name) for role, name in columns.items() if name is not None}
    options = {**role_options(by_role), **given}
    known = {key: value for key, value in options.items() if key in (*COLUMNS, "title")}
    if found.layout == "sequences":
        known = {"user_id": USER, "item_id": ITEM, "time": PLACE, "time_unit": "order"} | known
        roles = Roles(known, dict.fromkeys(known, "a line is a user and the user's items, oldest first"))
    else:
        roles = find_roles(found.interactions, known, by_role, found.users is not None)
    frames: dict[SideName, pl.DataFrame | None] = {"user": found.users, "item": found.items}
    for side, frame in frames.items():
        key, option = str(roles.options[f"{side}_id"]), f"{side}s_id"
        if frame is None or key in frame.columns or option in roles.options:
            continue
        if own := own_id(frame, found.interactions[key]):
            roles.put(option, own, f"the table of {side}s holds the same ids in it")
    other = {k: v for k, v in options.items() if k not in (*COLUMNS, "features", "title")}
    read = {key: value for key, value in roles.options.items() if value != "" and key != "title"}
    schema = parse_config({"schema": {**read, "duplicates": "keep", **other}})[0] or Schema()
    rows = found.interactions if found.parts is None else found.interactions.with_columns(found.parts)
    tables = check(found.users, found.items, rows, schema)
    pair = [schema.user_id, schema.item_id]
    pairs = tables.interactions.select(list(dict.fromkeys([*pair, *filter(None, [schema.time])])))
    repeats = repeated_share(pairs.unique() if schema.time else pairs, *pair)  # rows of one time are copies
    if 0 < repeats < MIN_REPEATS and "duplicates" not in given:
        schema = parse_config({"schema": {**read, **other}})[0] or Schema()
        tables = check(found.users, found.items, rows, schema)
    context = [str(f.get("column", f.get("name"))) for f in listed_sections(given, "features")]
    found = with_constant_columns(found, tables.interactions, roles, schema, output, context)
    tables = replace(tables, **{table: getattr(found, table) for table in found.made})
    sides: dict[SideName, SideFeatures] = {side: SideFeatures() for side in SIDES}
    for side in SIDES:
        if getattr(found, f"{side}s") is not None:
            table, key = getattr(tables, f"{side}s"), schema.id_column(side)
            seen = guess_features(table, side, key)
            seen = without_answers(seen, table, side, {"user": pair[0], "item": pair[1]}, tables.interactions)
            sides[side] = replace(seen, counted=counted_columns(seen, table, key, tables.interactions))
    return _Log(found, tables, roles, schema, sides, repeats)


def _compose(
    rule: RecipeRule, log: _Log, shape: Shape, given: Mapping[str, TomlValue]
) -> tuple[Settings, dict[str, str]]:
    """Return the settings of a recipe for a log, and comments by dotted key."""
    source = read_recipe(rule.recipe)
    own, config = parse_config(source, f"recipe {rule.recipe}")
    schema, comments = log.options, {f"schema.{key}": why for key, why in log.roles.why.items()}
    pointwise = config.loss.pointwise
    by_users = rule.needs_contents and hold(telling_users(shape)) and not hold(new_items(shape))
    takes_all = by_users or not (own or Schema()).has_negatives or (shape.label_values <= 2 and not pointwise)
    of_label = {key: log.roles.why.get(key) for key in ("label", "positive_above")}
    if shape.is_scale and takes_all and "as given" not in of_label.values():
        schema = {key: value for key, value in schema.items() if key not in of_label}
    columns = [f for side in SIDES for f in log.sides[side].features]
    if shape.query == schema["user_id"]:  # what was searched for is the user
        text: Settings = {"kind": "text", "side": "user", "name": shape.query}
        columns = [SideFeature(shape.query, text, "what was searched for"), *columns]
    reads_users = rule.reads_users and (shape.has_telling or (rule.needs_contents and not shape.contents))
    ids: dict[str, str] = {side: str(schema[f"{side}_id"]) for side in SIDES}
    fitted = FittedRecipe(
        source, ids, columns, "label" in schema or "event" in schema,
        rule.needs_contents and shape.content_kinds < shape.items, [*shape.telling] if reads_users else [],
        pointwise or shape.is_scale, (("user", shape.query), ("item", shape.words)),
    )  # fmt: skip
    sections = fitted.shaped(shape, rule)
    comments |= fitted.comments
    model, scorers = section(sections, "model"), listed_sections(sections, "scorers")
    evaluation = section(source, "evaluation")
    has_id = any(f["kind"] == "categorical" and f["name"] == ids["item"] for f in fitted.features)
    drifts = shape.drift is not None and shape.drift.exists
    follows = drifts and has_id and not (pointwise or config.model.stacking)
    if config.model.cold_item_bias and not shape.contents:
        model["cold_item_bias"] = False
        comments["model.cold_item_bias"] = "The items have no columns of contents, by which new ones would rank."
    if by_users and not follows:
        model["bias"], comments["model.bias"] = True, "Few items are new, so that popularity counts."
    has_text = any(f["side"] == "user" and f["kind"] == "text" for f in fitted.features)
    is_foreseen = bool(reads_users) or pointwise or has_text
    split, why = _split(section(source, "split"), config.split, log, shape, is_foreseen, follows)
    split = section(given, "split") if "kind" in section(given, "split") else split
    comments |= {f"split.{key}": said for key, said in why.items() if key in split}
    chosen = parse_config({"split": {**split, **section(given, "split")}}, "the suggested config")[1].split
    if log.ranks_repeats or (log.repeats and (chosen.follows_time or chosen.is_given)):
        schema["duplicates"] = "keep"
        then = "is ranked again" if log.ranks_repeats else "is left out of rankings"
        comments["schema.duplicates"] = (
            f"{log.repeats:.2%} of the rows repeat a pair of user and item (many from {MIN_REPEATS:.0%} on): earlier "
            f"ones stay in the training where later ones test, and what a user has taken before {then}."
        )
    if log.ranks_repeats:
        evaluation["repeats"] = "allow"
        if not pointwise and section(given, "evaluation").get("repeats") != "exclude":
            comments[f"scorers.{len(scorers)}"] = "Repeats are kept: what a user took counts for itself."
            scorers.append({"kind": "repeats"})
    if follows:
        comments[f"scorers.{len(scorers)}"] = f"What is popular changes: {shape.drift}."
        scorers.append({"kind": "trending"})
    settings: Settings = {
        "data": dict(log.found.section or {}), "schema": {**schema, "features": fitted.features}, "split": split,
        **sections, "model": model, "scorers": scorers, "evaluation": evaluation,
    }  # fmt: skip
    return {key: value for key, value in settings.items() if value}, comments


def _split(
    source: Settings, config: SplitConfig, log: _Log, shape: Shape, is_foreseen: bool, follows: bool
) -> tuple[Settings, dict[str, str]]:
    """Return the rule of the split for a log, and reasons by option, given the recipe's rule.

    `is_foreseen` is True if new users are ranked by more than their history, `follows` if the model ranks by what is
    popular now."""
    if log.found.parts is not None:
        ordered = parts_follow(log.tables.interactions, log.schema.user_id, PART_OF)
        none = "" if "validation" in (log.found.section or {}) else " None validates: a part of train does."
        return {"kind": "files", **({"ordered": True} if ordered else {})}, {"kind": f"Files give the parts.{none}"}
    # A last row says something of a user where rows follow one another, and one before it is left to learn from.
    has_last = shape.order is not None and shape.order.ties < MAX_TIES and shape.length >= MIN_LAST
    by_time = shape.by_time and (is_foreseen or shape.new_users < MIN_NEW_USERS) and not follows
    has_new = shape.by_time and shape.new_items >= MIN_NEW
    split, reasons = source, dict[str, str]()
    if config.needs_time and shape.order is None:
        split, reasons["kind"] = {"kind": "random"}, "The recipe splits by time, and there is none."
    elif not config.follows_time and (follows or log.ranks_repeats or has_new) and (by_time or has_last):
        split = {"kind": "time" if by_time else "last"}
        why = (
            "What is popular changes"
            if follows
            else "Repeats are kept"
            if log.ranks_repeats
            else "New items come later"
        )
        rows = "the latest rows test" if by_time else "each user's last row tests"
        new = f"; {shape.new_users:.1%} of the latest rows are of users without an earlier row"
        reasons["kind"] = f"{why}: {rows}{new if shape.by_time and not (by_time or follows) else ''}."
    elif config.kind == "user_random" and shape.length < MIN_ROWS_OF_SPLIT:
        split = {**split, "kind": "random"}
        rows = f"{shape.length:g} rows of a user, the median (threshold {MIN_ROWS_OF_SPLIT})"
        reasons["kind"] = f"{rows}: a tenth rounds to none."
    if split.get("kind", config.kind) in SplitConfig.kinds_of_users and shape.measurable >= 2 * MEASURED_USERS:
        split = {**split, "users": float(f"{MEASURED_USERS / shape.measurable:.2g}")}
        reasons["users"] = f"{MEASURED_USERS:,} of {shape.measurable:,} users are enough to test."
    return split, reasons


def _reasons(rule: RecipeRule, shape: Shape, log: _Log, schema: Mapping[str, TomlValue], is_asked: bool) -> list[str]:
    """Return lines: what the tables are, what decided, and what is left out."""
    options = log.roles.options
    known = ", ".join(f"{key} = {toml_value(options[key])}" for key in COLUMNS if options.get(key, "") != "")
    lines = [
        f"Recipe {rule.recipe}: {rule.question}",
        f"Tables: {shape.interactions:,} interactions of {shape.users:,} users and {shape.items:,} items.",
        f"Columns, by standard names and types: {known}; an override such as schema.time=NAME corrects one.",
        f"Order: {shape.order or 'no time column gives the interactions one'}.",
        f"Drift: {shape.drift or 'no times that all users share show what is popular when'} (what is popular changes "
        f"from {MIN_LIFT:g} times and z {MIN_Z:g} on).",
        *(f"{note[:1].upper()}{note[1:]}." for note in log.found.notes),
    ]
    if is_asked:
        lines.append(f"The recipe is given; the rules choose {choose(shape).recipe}.")
    for other in RULES:
        lines.append(f"{other.recipe}? {'yes' if other.fits(shape) else 'no'}: {other.reason(shape)}.")
        if other.fits(shape):
            break
    if (label := options.get("label")) and not schema.get("label"):
        lines.append(f"The label '{label}' is not read: a row says what a user took. The recipe ranking reads it.")
    read = {(f.get("side", ""), f.get("column", f.get("name"))) for f in listed_sections(schema, "features")}
    every = [(side, f.column) for side in SIDES for f in log.sides[side].features]
    if unread := [f"'{column}'" for side, column in every if (side, column) not in read]:
        lines.append(f"Columns of users and items that this recipe does not read: {', '.join(unread)}.")
    for side in SIDES:
        told = {*log.sides[side].counted, *(shape.telling if side == "user" else ())}
        if both := [f"'{column}'" for of, column in every if of == side and (side, column) in read and column in told]:
            lines.append(
                f"Look at {', '.join(both)} of the {side}s: they predict or follow the rows, and columns computed from "
                "these rows give the answers away; use values known before them."
            )
    notes = [*log.roles.notes, *(note for side in SIDES for note in log.sides[side].notes)]
    return [*lines, *(f"Left out: {note}." for note in notes)]
