"""Suggestion of a config for tables as they come."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Unpack

import polars as pl
from pydantic import ValidationError

from twotower.config.experiment import Config
from twotower.config.reference import toml_value, write_document
from twotower.config.toml import TomlValue, override_settings, parse_config
from twotower.data.events import without_ignored
from twotower.data.parts import PartFiles
from twotower.data.readers import TableLike
from twotower.data.source import read
from twotower.data.split import SplitConfig
from twotower.data.tables import Tables, check, with_present_ids, without_missing
from twotower.data.text_files import NotUtf8Error
from twotower.data.text_format import TextFormat
from twotower.errors import ConfigError, DataError, did_you_mean
from twotower.escaping import representation
from twotower.features.schema import Schema
from twotower.features.side import SIDES, SideName
from twotower.progress import doing
from twotower.suggestion.features import (
    SideFeature,
    SideFeatures,
    counted_columns,
    features_of_schema,
    guess_features,
    own_id,
    refuse_among_tables,
    taken_rows,
    with_constant_columns,
    without_answers,
)
from twotower.suggestion.recipes import (
    FittedRecipe,
    Settings,
    first_values,
    listed_sections,
    read_recipe,
    section,
    shaped_settings,
)
from twotower.suggestion.roles import COLUMNS, OPTION_OF, RoleColumns, Roles, find_roles, role_options
from twotower.suggestion.shape import (
    DENSE,
    MIN_LAST,
    MIN_NEW,
    MIN_NEW_USERS,
    RULES,
    RecipeRule,
    Shape,
    choose,
    describe_drift,
    describe_order,
    measure_shape,
    parts_follow,
    repeated_share,
)
from twotower.suggestion.tables import PLACE, USER, FoundTables, find_tables

MIN_REPEATS = 0.1  # share of repeated rows from which rankings hold what a user has taken before
MAX_SHARED = 0.1  # share of a user's rows of other items at one time up to which times are of rows, and not of days
MEASURED_USERS = 20_000  # users who test, where twice as many can: a recall of .05 has the standard error .0015
MAX_TIES = 0.5  # share of neighbouring rows of a user of equal time, up to which a user has a last row
MIN_ROWS_OF_SPLIT = 6  # median rows of a user from which a tenth of them, rounded, is a row

_BY_VALIDATION = {"stacking": "weighs the terms of a score", "cold_item_bias": "shows how high new items rank"}
"""Options of the model that a validation part fits, and what it does."""


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
    """Tables "users" and "items" with columns of the interactions that have one value for each user or item, and the
    columns of the given table. The config of files names them; a training of frames needs them."""

    def __repr__(self) -> str:
        return representation(type(self), f"recipe={self.recipe!r}, {self.schema!r}")


@dataclass(frozen=True)
class _Log:
    """Tables with the roles of their columns."""

    tables: FoundTables
    roles: Roles
    sides: Mapping[SideName, SideFeatures]
    repeats: float
    """Share of the rows that repeat a pair of user and item."""

    @property
    def schema(self) -> Settings:
        """Options of the schema but the features."""
        options = {key: value for key, value in self.roles.options.items() if value != ""}
        options |= {"title": self.sides["item"].title} if self.sides["item"].title and "title" not in options else {}
        return options | ({"duplicates": "keep"} if self.ranks_repeats else {})

    @property
    def ranks_repeats(self) -> bool:
        """True if repeated rows are many enough for rankings to hold what a user has taken before."""
        return self.repeats >= MIN_REPEATS

    def keeps_repeats(self, split: Mapping[str, TomlValue]) -> bool:
        """Return True if repeated rows are kept: many always, and few where parts follow in time or are given, as
        without them histories lack what comes again in a later part."""
        try:
            chosen = SplitConfig.model_validate(split)
        except ValidationError:  # reported where the config is read
            return self.ranks_repeats
        return self.ranks_repeats or (self.repeats > 0 and (chosen.follows_time or chosen.is_given))

    @property
    def features(self) -> tuple[SideFeature, ...]:
        """Features of the columns of both sides."""
        return tuple(f for side in SIDES for f in self.sides[side].features)


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

    `interactions` is a table, a folder with a file for each table, a data set by name, or an archive of one. `recipe`
    is the name of one, empty for the recipe that the rules choose. `overrides` are settings `key=value`. `columns` name
    the columns of the log by role (user=, item=, query=, time=, label=, event=, weight=, session=, title=), an empty
    name for a role that none has. `folder` is the folder of the config, to which its paths are relative, and `output`
    its new file there, by which tables made of columns of the interactions are named; without it files get none.

    Raises ConfigError, or DataError; one that lists the columns where two readings are possible."""
    if recipe and recipe not in (known := [rule.recipe for rule in RULES]):
        raise ConfigError(
            f"`recipe` {recipe}: no such recipe{did_you_mean(recipe, known)} (allowed: {', '.join(known)})"
        )
    overrides, folder = [*overrides], Path(folder)
    output = None if output is None else folder / Path(output).name
    given = override_settings({}, filter(_is_of_data, overrides))
    form = section(section(given, "data"), "format")
    read_form = parse_config({"data": {"format": form}})[1].data.format if form else None
    if unknown := next((role for role in columns if role not in OPTION_OF), ""):
        raise ConfigError(f"`{unknown}`: no such role{did_you_mean(unknown, OPTION_OF)}")
    by_role = {role: str(name) for role, name in columns.items() if name is not None}
    own = section(given, "schema")
    options = {**role_options(by_role), **own}
    try:
        found = find_tables(interactions, users, items, folder, read_form)
    except NotUtf8Error as e:
        likely = TextFormat.model_validate({**form, "encoding": e.encoding or "utf-8"})
        raise DataError(f"{e}{_question((interactions, users, items), folder, likely, options, by_role)}") from None
    if output is not None:
        refuse_among_tables(found, output)
    log = _read_log(found, options, by_role, output)
    found = log.tables
    other = {k: v for k, v in options.items() if k not in (*COLUMNS, "features", "title")}
    schema = parse_config({"schema": {**log.schema, **other}})[0] or Schema()
    tables = _checked(found, schema, folder)
    shared_time = found.layout == "rows" and not _numbers_rows(found.interactions, schema)
    shape = measure_shape(tables, schema, log.sides, shared_time, "positive_above" not in options)
    rule = next((rule for rule in RULES if rule.recipe == recipe), None) or choose(shape)
    if lack := rule.lacks(shape):
        raise ConfigError(f"recipe '{rule.recipe}' needs {lack}; these tables have none")
    unsolved = ""
    if "item" in tables.versions:
        _refuse_closed_form(rule, shape, bool(recipe))
        unsolved = f"no closed form goes with the versions of items of schema.valid_from = '{schema.valid_from}'."
    ordered = parts_follow(tables.interactions, schema) if found.has_parts else None
    composed, comments = _compose(rule, log, shape, ordered, options, given, unsolved)
    settings = _with_overrides(composed, log, own, overrides)
    changed = [override.partition("=")[0].strip() for override in overrides]
    comments = {path: said for path, said in comments.items() if not path.startswith((*changed, "\0"))}
    reasons = _reasons(rule, shape, log, section(settings, "schema"), bool(recipe))
    text = write_document(settings, "\n".join(reasons), comments)
    written, config = parse_config(tomllib.loads(text), "the suggested config", trust=True)
    config = config.model_copy(update={"data": config.data.located(folder.resolve())})
    made = {name: getattr(found, name) for name in found.made}
    return Suggestion(rule.recipe, tuple(reasons), shape, text, written or schema, config, made)


def _question(
    tables: tuple[TableLike, TableLike | None, TableLike | None], folder: Path, form: TextFormat,
    options: Mapping[str, TomlValue], columns: Mapping[str, str],
) -> str:  # fmt: skip
    """Return the refusal of tables read in another encoding, added to the refusal of the encoding; "" for none."""
    try:
        _read_log(find_tables(*tables, folder, form), options, columns, None)
    except DataError as e:
        return "" if isinstance(e, NotUtf8Error) else f". Then: {e}"
    return ""


def _is_of_data(override: str) -> bool:
    """Return True for an override that the reading of the tables needs, and for a text that is no override."""
    key, equals, _ = override.partition("=")
    return not equals or key.partition(".")[0].strip(" \t\"'") in ("schema", "data", "split")


@doing("reading the roles of the columns")
def _read_log(
    found: FoundTables, given: Mapping[str, TomlValue], columns: Mapping[str, str], output: Path | None
) -> _Log:
    """Return tables with the roles of their columns. Raises DataError or ConfigError."""
    known = {key: value for key, value in given.items() if key in (*COLUMNS, "title")}
    if found.schema:
        preset = found.schema.model_dump(mode="json", exclude_defaults=True, include={*COLUMNS})
        known = {"user_id": found.schema.user_id, "item_id": found.schema.item_id, **preset, **known}
        roles = Roles(known, {key: "as given" if key in given else "as the data set has it" for key in known})
    elif found.layout == "sequences":
        known = {"user_id": USER, "item_id": "item_id", "time": PLACE, "time_unit": "order", **known}
        roles = Roles(known, dict.fromkeys(known, "a line is a user and the user's items, oldest first"))
    else:
        roles = find_roles(found.interactions, known, columns, {"users": found.users, "items": found.items})
    names = ("user_id", "item_id", "event", "events", "missing")
    schema = parse_config({"schema": {name: roles.options[name] for name in names if roles.options.get(name)}})[0]
    schema = schema or Schema()
    ids: dict[SideName, str] = {"user": schema.user_id, "item": schema.item_id}
    with_present_ids(without_ignored(found.interactions, schema), [*ids.values()], "interactions", schema, [])
    rows = without_missing(found.interactions, [*ids.values()], schema)
    context = [str(f.get("column", f.get("name"))) for f in _features(given) if f.get("side") == "context"]
    found = with_constant_columns(replace(found, interactions=rows), roles, schema, output, context)
    sides: dict[SideName, SideFeatures] = {side: SideFeatures() for side in SIDES}
    taken = taken_rows(rows, roles, schema)
    tables: dict[SideName, pl.DataFrame | None] = {"user": found.users, "item": found.items}
    for side, frame in tables.items():
        if found.schema:
            sides[side] = features_of_schema(found.schema, side)
        elif frame is not None:
            key, own = ids[side], str(roles.options.get(f"{side}s_id", ""))
            if not own and key not in frame.columns and (own := own_id(frame, rows[key], side)):
                roles.put(f"{side}s_id", own, f"the table of {side}s holds the same ids in it")
            frame = frame.drop(key, strict=False).rename({own: key}) if own in frame.columns else frame
            sides[side] = guess_features(frame, side, key)
            if key in frame.columns and not frame[key].dtype.is_nested():
                sides[side] = without_answers(sides[side], frame, side, ids, taken)
                sides[side] = replace(sides[side], counted=counted_columns(sides[side], frame, key, taken, rows))
    time = str(roles.options.get("time", ""))
    pairs = rows.select(dict.fromkeys([*ids.values(), *([time] if time else [])]).keys())
    # Where a user's rows have times of their own, one more of a pair at one time is a copy of it.
    once = pairs.unique() if time else pairs
    if len(once.drop(ids["item"]).unique()) >= (1 - MAX_SHARED) * len(once):
        pairs = once
    repeats = repeated_share(pairs, *ids.values()) if given.get("duplicates", "keep") == "keep" else 0.0
    return _Log(found, roles, sides, repeats)


def _features(schema: Mapping[str, TomlValue]) -> list[Settings]:
    """Return the features of a section [schema]."""
    found = schema.get("features")
    return [dict(f) for f in found if isinstance(f, Mapping)] if isinstance(found, list) else []


@doing("checking the tables")
def _checked(found: FoundTables, schema: Schema, folder: Path) -> Tables:
    """Return the tables as a training reads them. Raises DataError."""
    if found.section is None:
        return check(found.users, found.items, found.interactions, schema)
    split = {"split": {"kind": "files"}} if found.has_parts else {}
    config = parse_config({"data": dict(found.section), **split})[1]
    data = config.data.located(folder.resolve())
    if not found.made:
        tables, _ = read(config.model_copy(update={"data": data}), schema)
        assert isinstance(tables, Tables)
        return tables
    users = found.users if "users" in found.made else data.users or None
    items = found.items if "items" in found.made else data.items or None
    return check(users, items, PartFiles(data.parts) if data.parts else data.interactions, schema, data.format)


def _numbers_rows(frame: pl.DataFrame, schema: Schema) -> bool:
    """Return True for a time that counts the rows of each user from one first number for all."""
    if not schema.time or not frame[schema.time].dtype.is_integer():
        return False
    value, first = pl.col(schema.time), frame[schema.time].min()
    counts = (value.min() == first) & (value.n_unique() == pl.len()) & (value.max() - first + 1 == pl.len())
    return bool(frame.group_by(schema.user_id).agg(counts=counts)["counts"].all())


def _refuse_closed_form(rule: RecipeRule, shape: Shape, is_asked: bool) -> None:
    """Raise ConfigError for a recipe without epochs, which has closed forms alone, of items with versions."""
    trained = [r.recipe for r in RULES if not r.lacks(shape) and parse_config(read_recipe(r.recipe))[1].train.epochs]
    if rule.recipe not in trained:
        raise ConfigError(
            (f"`recipe` {rule.recipe}: " if is_asked else f"the rules choose the recipe {rule.recipe}, which ")
            + "has closed forms alone, which do not go with versions of items; leave schema.valid_from out, or ask for "
            f"a recipe that is trained: {', '.join(trained)}"
        )


def _compose(
    rule: RecipeRule, log: _Log, shape: Shape, ordered: bool | None, options: Mapping[str, TomlValue],
    given: Mapping[str, TomlValue], unsolved: str,
) -> tuple[Settings, dict[str, str]]:  # fmt: skip
    """Return the settings of a recipe for a log, and comments by dotted key.

    `ordered` says whether given parts follow one another in time; None: a rule splits. `options` are given options of
    the schema, and `unsolved` is the reason that no closed form goes with the tables."""
    source, data = read_recipe(rule.recipe), log.tables.section or {}
    own, config = parse_config(source, f"recipe {rule.recipe}")
    schema, comments = log.schema, {f"schema.{key}": why for key, why in log.roles.why.items()}
    pointwise = config.loss.pointwise
    by_users = rule.needs_contents and shape.has_telling_users and not shape.has_new_items
    all_taken = by_users or not (own or Schema()).has_negatives
    all_taken |= (shape.label_values <= 2 or shape.no_rating is not None) and not pointwise
    if shape.is_scale and all_taken and not ("positive_above" in options or options.get("label")):
        schema = {key: value for key, value in schema.items() if key not in ("label", "positive_above")}
    columns = log.features
    if shape.query == schema["user_id"]:  # what was searched for is the user
        text: Settings = {"kind": "text", "side": "user", "name": shape.query}
        columns = (SideFeature(shape.query, text, "what was searched for", True), *columns)
    alike = rule.needs_contents and shape.content_kinds < shape.items
    if alike and shape.content_kinds > 1:
        why = f"the other columns have at most {shape.content_kinds:,} combinations of values for {shape.items:,} items"
        columns = tuple(replace(c, why=f"{c.why}; {why}") if c.is_text else c for c in columns)
    has_label = "label" in schema or "event" in schema
    reads_users = rule.reads_users and (shape.has_telling or (rule.needs_contents and not shape.contents))
    of_users = [*shape.telling] if reads_users else []
    ids: dict[str, str] = {side: str(schema[f"{side}_id"]) for side in SIDES}
    fitted = FittedRecipe(
        source, ids, columns, has_label, alike, of_users, pointwise or shape.is_scale,
        (("user", shape.query), ("item", shape.words)),
    )  # fmt: skip
    has_validation = section(given, "split").get("validation") != 0 or (ordered is not None and "validation" in data)
    unweighted = "" if has_validation else "no validation part chooses its weight."
    if config.train.epochs and any(f.get("side") == "context" for f in _features(options)):
        unweighted = "the vectors of trained towers depend on the context, and its weight would too."
    sections, of_shape = shaped_settings(source, fitted, shape, rule, unweighted, unsolved)
    comments |= of_shape | {f"schema.features.{place}": why for place, why in fitted.why.items()}

    def set_model(option: str, value: TomlValue, why: str) -> None:
        sections["model"], comments[f"model.{option}"] = {**section(sections, "model"), option: value}, why

    def add_scorer(kind: str, why: str) -> None:
        before = listed_sections(sections, "scorers")
        sections["scorers"], comments[f"scorers.{len(before)}"] = [*before, {"kind": kind}], why

    if config.model.cold_item_bias and not shape.contents:
        set_model("cold_item_bias", False, "The items have no columns of contents, by which new ones would rank.")
    of_items = [f for f in fitted.features if f["side"] == "item" and f["kind"] == "categorical"]
    has_id = any(f.get("column", f["name"]) == ids["item"] and not f.get("hash_buckets") for f in of_items)
    changes = shape.drift is not None and shape.drift.exists
    follows = changes and has_id and has_validation and not (pointwise or config.model.stacking)
    if by_users and has_validation and not follows:
        set_model("bias", True, "Few items are new, so that popularity counts.")
    evaluation = section(source, "evaluation")
    if ordered is not None:
        split: Settings = {"kind": "files", **({"ordered": True} if ordered else {})}
        none = "" if "validation" in data or not has_validation else " None validates: a part of train does."
        comments["split.kind"] = f"Files give the parts.{none}"
    else:
        has_text = any(f.get("side") == "user" and f["kind"] == "text" for f in fitted.features)
        are_known = shape.new_users < MIN_NEW_USERS or bool(of_users) or has_text or pointwise
        split, of_split = _split(section(source, "split"), config.split, log.ranks_repeats, shape, are_known, follows)
        comments |= of_split
    if not has_validation:
        train = {k: v for k, v in section(sections, "train").items() if k != "patience"}
        if scorers := listed_sections(sections, "scorers"):
            sections["scorers"] = first_values(scorers)
            first = "The first of the recipe's values: no validation part chooses."
            comments["scorers"] = f"{first} {comments.get('scorers', '')}".strip()
        sections["train"] = train
        for option, does in _BY_VALIDATION.items():
            if getattr(config.model, option):
                set_model(option, False, f"No validation part {does}.")
    if log.keeps_repeats(split):
        schema = {**schema, "duplicates": "keep"}
        then = "is ranked again" if log.ranks_repeats else "is left out of rankings"
        comments["schema.duplicates"] = (
            f"{log.repeats:.2%} of the rows repeat a pair of user and item (many from {MIN_REPEATS:.0%} on): earlier "
            f"ones stay in the training where later ones test, and what a user has taken before {then}."
        )
    if log.ranks_repeats:
        evaluation["repeats"] = "allow"
        if has_validation and not pointwise:
            add_scorer("repeats", "Repeats are kept: what a user took counts for itself.")
    if follows:
        add_scorer("trending", f"What is popular changes: {shape.drift}.")
    settings: Settings = {
        "data": dict(data), "schema": {**schema, "features": fitted.features}, "split": split, **sections,
        "evaluation": evaluation,
    }  # fmt: skip
    return {key: value for key, value in settings.items() if value}, comments


def _split(
    source: Settings, config: SplitConfig, ranks_repeats: bool, shape: Shape, are_known: bool, follows: bool
) -> tuple[Settings, dict[str, str]]:
    """Return the rule of the split for a log, and comments by dotted key, given the recipe's rule.

    `are_known` is False if most of the latest rows are of users of whom nothing is known, `follows` True if the model
    ranks by what is popular now."""
    # A last row says something of a user where rows follow one another, and one before it is left to learn from.
    may_be_last = shape.order is not None and shape.order.ties < MAX_TIES and shape.length >= MIN_LAST
    is_free, split, why = not config.follows_time, source, ""
    if config.needs_time and shape.order is None:
        split, why = {"kind": "random"}, "The recipe splits by time, and there is none."
    elif follows and is_free and may_be_last:
        split = {"kind": "last"}
        why = "What is popular changes: each user's last row tests, ranked by what is popular at its time."
    elif ranks_repeats and is_free and shape.order is not None and (are_known or may_be_last):
        split = {"kind": "time" if shape.by_time and are_known else "last"}
        why = "Repeats are kept: training has the earlier ones, so that the later ones are foreseen."
    elif is_free and shape.by_time and shape.new_items >= MIN_NEW and (are_known or may_be_last):
        split = {"kind": "time" if are_known else "last"}
        why = "New items come later: the latest rows test, and the report has items that training lacks."
    elif config.kind == "user_random" and shape.length < MIN_ROWS_OF_SPLIT:
        split = {**split, "kind": "random"}
        why = f"A user has {shape.rows_of_user}, the median (threshold {MIN_ROWS_OF_SPLIT}): a tenth rounds to none."
    if why and split.get("kind") == "last" and shape.by_time and not are_known and is_free and not follows:
        why += f" {shape.new_users:.1%} of the latest rows are of users without an earlier row, so last rows test."
    comments = {"split.kind": why} if why else {}
    if split.get("kind", config.kind) in SplitConfig.kinds_of_users and shape.measurable >= 2 * MEASURED_USERS:
        split = {**split, "users": float(f"{MEASURED_USERS / shape.measurable:.2g}")}
        comments["split.users"] = f"{MEASURED_USERS:,} of {shape.measurable:,} users are enough to test."
    return split, comments


def _with_overrides(
    composed: Settings, log: _Log, options: Mapping[str, TomlValue], overrides: Iterable[str]
) -> Settings:
    """Return settings with overrides, and without what was composed for what they replace."""
    settings: Settings = dict(override_settings(composed, overrides))
    split, schema, model = (section(settings, key) for key in ("split", "schema", "model"))
    own = section(composed, "split")
    if split.get("kind") != own.get("kind"):
        shares = ("users", "test", "validation") if split.get("kind") in ("last", "column", "files") else ("users",)
        split = {key: value for key, value in split.items() if key not in shares or value != own.get(key)}
    if not (log.ranks_repeats or "duplicates" in options):  # a split that is given as an override decides
        schema = {k: v for k, v in schema.items() if k != "duplicates"}
        schema |= {"duplicates": "keep"} if log.keeps_repeats(split) else {}
    ranks_repeats = section(settings, "evaluation").get("repeats", "exclude") != "exclude"
    is_composed = settings.get("scorers") == composed.get("scorers")
    if is_composed and not (ranks_repeats and schema.get("duplicates") == "keep"):
        settings["scorers"] = [s for s in listed_sections(settings, "scorers") if s != {"kind": "repeats"}]
    settings |= {"split": split, "schema": schema, "model": model}
    return {key: value for key, value in settings.items() if value}


def _reasons(rule: RecipeRule, shape: Shape, log: _Log, schema: Mapping[str, TomlValue], is_asked: bool) -> list[str]:
    """Return lines: what the tables are, what decided, and what is left out."""
    options = log.roles.options
    known = ", ".join(f"{key} = {toml_value(options[key])}" for key in COLUMNS if options.get(key, "") != "")
    lines = [
        f"Recipe {rule.recipe}: {rule.question}",
        f"Tables: {shape.interactions:,} interactions of {shape.users:,} users and {shape.items:,} items.",
        f"Columns, by standard names and types: {known}; an override such as schema.time=NAME corrects one.",
        f"Order: {describe_order(shape)}.",
        f"Drift: {describe_drift(shape)}.",
        *(f"{note[:1].upper()}{note[1:]}." for note in log.tables.notes),
    ]
    if is_asked:
        lines.append(f"The recipe is given; the rules choose {choose(shape).recipe}.")
    for other in RULES:
        lines.append(f"{other.recipe}? {'yes' if other.fits(shape) else 'no'}: {other.reason(shape)}.")
        if other.fits(shape):
            break
    label = options.get("label")
    if label and not schema.get("label"):
        lines.append(f"The label '{label}' is not read: a row says what a user took. The recipe ranking reads it.")
    if shape.no_rating is not None:
        lines.append(
            f"Look at the label '{label}': {shape.no_rating:g} seems to stand for no rating; leave its rows out."
        )
    read = {(f.get("side", ""), f.get("column", f.get("name"))) for f in _features(schema)}
    if shape.unused and shape.contents and not any(s == "item" and name != options["item_id"] for s, name in read):
        lines.append(
            f"Look at the items: {shape.unused:,} of {shape.items:,} have no row, and this recipe reads no column of "
            "them; the recipe cold-start recommends them."
        )
    if unread := [f"'{f.column}'" for f in log.features if (f.options["side"], f.column) not in read]:
        lines.append(f"Columns of users and items that this recipe does not read: {', '.join(unread)}.")
    if shape.is_dense and not shape.negatives:
        dense = f"users have {shape.density:.0%} of the items (threshold {DENSE:.0%})"
        lines.append(
            f"Look at the rows: {dense}; the presence of a row says nothing, and schema.label=NAME names what does."
        )
    for side in SIDES:
        telling = {name: 0.0 for name in shape.telling if side == "user" and ("user", name) in read}
        follow = {name: r for name, r in log.sides[side].counted.items() if (side, name) in read}
        if both := [f"'{name}'" for name in {**telling, **follow}]:
            why = (
                f" their numbers follow the rows of each {side} (rank correlation {min(follow.values()):.2f});"
                if follow
                else ""
            )
            lines.append(
                f"Look at {', '.join(both)} of the {side}s:{why} columns computed from these rows give the answers "
                "away; use values known before them."
            )
    return [
        *lines,
        *(f"Left out: {note}." for note in [*log.roles.notes, *(n for s in SIDES for n in log.sides[s].notes)]),
    ]
