"""Suggestion of a config for tables as they come."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from twotower.config.experiment import Config
from twotower.config.toml import TomlValue, override_settings, parse_config
from twotower.data.parts import PartFiles
from twotower.data.readers import TableLike
from twotower.data.source import read
from twotower.data.tables import Tables, check
from twotower.data.text_format import TextFormat
from twotower.errors import ConfigError, did_you_mean
from twotower.escaping import representation
from twotower.features.schema import Schema
from twotower.progress import doing
from twotower.suggestion.choice import RULES, RecipeRule, choose, describe_drift, describe_order
from twotower.suggestion.composition import compose
from twotower.suggestion.constant_tables import refuse_among_tables
from twotower.suggestion.document import toml_value, write_document
from twotower.suggestion.guess import COLUMNS, Guess, guess_meaning
from twotower.suggestion.numbering import numbers_rows, row_numbers
from twotower.suggestion.recipes import Settings, read_recipe
from twotower.suggestion.shape import DENSE, Shape, measure_shape, parts_follow
from twotower.suggestion.tables import FoundTables, find_tables
from twotower.suggestion.thresholds import may_be_labels

GUESSED = ("schema", "data", "split")
"""Sections whose overrides guesses read; the others change what a recipe gives."""
_OF_CONTENTS = next(rule.recipe for rule in RULES if rule.needs_contents)
"""Recipe that ranks items without a row."""


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


def suggest(
    interactions: TableLike,
    users: TableLike | None = None,
    items: TableLike | None = None,
    *,
    recipe: str = "",
    overrides: Iterable[str] = (),
    folder: str | Path = ".",
    output: str | Path | None = None,
) -> Suggestion:
    """Look at tables and return a config for them, by one of six recipes.

    `interactions` is a table, a folder with a file for each table, a data set by name, or an archive of one. `recipe`
    is the name of one, empty for that which the rules choose. `overrides` are settings `key=value`; one of a column of
    the schema replaces a guess, an empty one says that there is none. `folder` is the folder of the config, to which
    its paths are relative, and `output` its new file there, by which tables made of columns of the interactions are
    named; without it files get none. Raises DataError or ConfigError."""
    if recipe and recipe not in (known := [rule.recipe for rule in RULES]):
        raise ConfigError(
            f"`recipe` {recipe}: no such recipe{did_you_mean(recipe, known)} (allowed: {', '.join(known)})"
        )
    overrides, folder = [*overrides], Path(folder)
    output = None if output is None else folder / Path(output).name
    given = override_settings({}, filter(_is_guessed, overrides))
    found = find_tables(interactions, users, items, folder, _form(given))
    options = _section(given, "schema")
    if output is not None:
        refuse_among_tables(found, output)
    guess = guess_meaning(found, options, output)
    keeps_label = "positive_above" in options or bool(options.get("label"))
    schema, tables, shape = _measured(guess, options, folder)
    if guess.columns.is_numbered and not (
        shape.order and shape.order.exists
    ):  # numbers of what else, such as places of ads
        guess = guess_meaning(found, {**options, "time": ""}, output)
        schema, tables, shape = _measured(guess, options, folder)
    found = guess.tables
    ordered = found.has_parts and parts_follow(tables.interactions, schema)
    rule = next((rule for rule in RULES if rule.recipe == recipe), None) or choose(shape)
    if lack := rule.lacks(shape):
        raise ConfigError(f"recipe '{rule.recipe}' needs {lack}; these tables have none")
    validates, unsolved = _section(given, "split").get("validation") != 0, ""
    if "item" in tables.versions:
        _refuse_closed_form(rule, shape, bool(recipe))
        unsolved = f"no closed form goes with the versions of items that schema.valid_from = '{schema.valid_from}' tells apart."
    settings, comments = compose(
        rule, guess, shape, found.section, ordered if found.has_parts else None, keeps_label, validates, unsolved,
        _has_context(options),
    )  # fmt: skip
    composed, settings = settings, dict(override_settings(settings, overrides))
    split, of_rule = _section(settings, "split"), _section(composed, "split")
    if split.get("kind") != of_rule.get("kind"):
        settings["split"] = _of_other_rule(split, of_rule)
    schema_section, kept = dict(_section(settings, "schema")), _at(composed, "schema.duplicates")
    if (
        not (guess.ranks_repeats or "duplicates" in options) and schema_section.get("duplicates") == kept
    ):  # a split that is given as an override decides
        schema_section |= {"duplicates": "keep" if guess.keeps_repeats(_section(settings, "split")) else "last"}
        settings["schema"] = {k: v for k, v in schema_section.items() if (k, v) != ("duplicates", "last")}
    ranks_repeats = _section(settings, "evaluation").get("repeats", "exclude") != "exclude"
    if not (ranks_repeats and _section(settings, "schema").get("duplicates") == "keep"):
        settings = _without_own_counts(settings, composed)
    comments = {path: said for path, said in comments.items() if _at(settings, path) == _at(composed, path)}
    reasons = _reasons(rule, shape, guess, found, _section(settings, "schema"), bool(recipe))
    text = write_document(settings, "\n".join(reasons), comments)
    written, config = parse_config(tomllib.loads(text), "the suggested config", trust=True)
    config = config.model_copy(update={"data": config.data.located(folder.resolve())})
    made = {name: getattr(found, name) for name in found.made}
    return Suggestion(rule.recipe, tuple(reasons), shape, text, written or schema, config, made)


def _refuse_closed_form(rule: RecipeRule, shape: Shape, is_asked: bool) -> None:
    """Raise ConfigError for a recipe without epochs, which has closed forms alone, of items with versions."""
    if parse_config(read_recipe(rule.recipe))[1].train.epochs:
        return
    trained = [
        other.recipe
        for other in RULES
        if not other.lacks(shape) and parse_config(read_recipe(other.recipe))[1].train.epochs
    ]
    raise ConfigError(
        (f"`recipe` {rule.recipe}: " if is_asked else f"the rules choose the recipe {rule.recipe}, which ")
        + "has closed forms alone, which do not go with versions of items; leave schema.valid_from out, or ask for a recipe that is trained: "
        + ", ".join(trained)
    )


def _has_context(options: Mapping[str, TomlValue]) -> bool:
    """Return True if options of the schema give a feature of the context."""
    features = options.get("features")
    return isinstance(features, list) and any(isinstance(f, Mapping) and f.get("side") == "context" for f in features)


def _measured(guess: Guess, options: Mapping[str, TomlValue], folder: Path) -> tuple[Schema, Tables, Shape]:
    """Return the schema of a guess with the other `options` that are given, the checked tables and their shape."""
    found, other = guess.tables, {k: v for k, v in options.items() if k not in (*COLUMNS, "features")}
    schema = parse_config({"schema": {**guess.schema, **other}})[0] or Schema()
    tables = _checked(found, schema, folder)
    of_user = guess.columns.is_numbered or found.layout != "rows"
    of_user = of_user or numbers_rows(found.interactions, schema.user_id, schema.time)
    return (
        schema,
        tables,
        measure_shape(
            tables, schema, guess.sides, shared_time=not of_user, may_be_unrated="positive_above" not in options
        ),
    )


def _of_other_rule(split: Mapping[str, TomlValue], composed: Mapping[str, TomlValue]) -> Settings:
    """Return the options of a split without those that were composed for the rule of another kind."""
    shares = ("users", "test", "validation") if split.get("kind") in ("last", "column", "files") else ("users",)
    return {key: value for key, value in split.items() if key not in shares or value != composed.get(key)}


def _without_own_counts(settings: Settings, composed: Settings) -> Settings:
    """Return settings without the own counts that were composed for them, as overrides leave no repeats to rank."""
    model = dict(_section(settings, "model"))
    if model.get("own_counts") == _section(composed, "model").get("own_counts"):
        model.pop("own_counts", None)
    return {**settings, "model": model} if model else {key: s for key, s in settings.items() if key != "model"}


def _is_guessed(override: str) -> bool:
    """Return True for an override of a section that guesses read, and for a text that is none, which is refused with them."""
    key, equals, _ = override.partition("=")
    return not equals or key.partition(".")[0].strip(" \t\"'") in GUESSED


def _form(given: Mapping[str, TomlValue]) -> TextFormat | None:
    """Return the form of text files that overrides give; None for a form to guess."""
    if not (form := _section(_section(given, "data"), "format")):
        return None
    return parse_config({"data": {"format": form}})[1].data.format


def _section(settings: Mapping[str, TomlValue], key: str) -> Mapping[str, TomlValue]:
    found = settings.get(key, {})
    return found if isinstance(found, Mapping) else {}


def _at(settings: TomlValue, path: str) -> TomlValue | None:
    """Return the value at a dotted path, whose steps are keys and places; None where there is none."""
    node: TomlValue | None = settings
    for step in path.split("."):
        if isinstance(node, Mapping):
            node = node.get(step)
        elif isinstance(node, list) and step.isdigit():
            node = node[int(step)] if int(step) < len(node) else None
        else:
            return None
    return node


@doing("checking the tables")
def _checked(found: FoundTables, schema: Schema, folder: Path) -> Tables:
    """Return the tables as a training reads them. Raises DataError."""
    if found.section is None:
        return check(found.users, found.items, found.interactions, schema)
    sections: dict[str, TomlValue] = {"data": dict(found.section)}
    if found.has_parts:
        sections["split"] = {"kind": "files"}
    config = parse_config(sections)[1]
    data = config.data.located(folder.resolve())
    if found.made:
        users = found.users if "users" in found.made else data.users or None
        items = found.items if "items" in found.made else data.items or None
        return check(users, items, PartFiles(data.parts) if data.parts else data.interactions, schema, data.format)
    tables, _ = read(config.model_copy(update={"data": data}), schema)
    assert isinstance(tables, Tables)
    return tables


def _reasons(
    rule: RecipeRule, shape: Shape, guess: Guess, found: FoundTables, schema: Mapping[str, TomlValue], asked: bool
) -> list[str]:
    """Return lines: what the tables are, what decided, and what is left out."""
    options = guess.columns.options
    known = ", ".join(f"{key} = {toml_value(options[key])}" for key in COLUMNS if options.get(key, "") != "")
    lines = [
        f"Recipe {rule.recipe}: {rule.question}",
        f"Tables: {shape.interactions:,} interactions of {shape.users:,} users and {shape.items:,} items.",
        f"Columns, guessed from names and values: {known}; an override such as schema.time=NAME corrects one.",
        f"Order: {describe_order(shape)}.",
        f"Drift: {describe_drift(shape)}.",
    ]
    lines += [f"{note[:1].upper()}{note[1:]}." for note in found.notes]
    if asked:
        lines.append(f"The recipe is asked for; the rules choose {choose(shape).recipe}.")
    for other in RULES:
        fits = other.fits(shape)
        lines.append(f"{other.recipe}? {'yes' if fits else 'no'}: {other.reason(shape)}.")
        if fits:
            break
    if options.get("label") and not schema.get("label"):
        lines.append(
            f"The label '{options['label']}' is not read: a row says what a user took. The recipe ranking reads it."
        )
    if shape.no_rating is not None:
        rows = (
            "its rows are no positives here; leave them out"
            if schema.get("label")
            else "its rows are taken like any other; leave them out to learn from ratings alone, or set schema.positive_above if they are refusals"
        )
        lines.append(
            f"Look at the label '{options['label']}': {shape.no_rating:g} has many more rows than the lowest rating and seems to stand for no rating, so {rows}."
        )
    features = schema.get("features")
    listed = features if isinstance(features, list) else []
    read = {(f.get("side", ""), f.get("column", f["name"])) for f in listed if isinstance(f, Mapping)}
    if (
        shape.unused
        and shape.contents
        and not any(side == "item" and name != options["item_id"] for side, name in read)
    ):
        lines.append(
            f"Look at the items: {shape.unused:,} of {shape.items:,} have no row, and this recipe, which reads no column of items, knows nothing of "
            f"them. The recipe {_OF_CONTENTS} ranks them by their columns: ask for it if they are to be recommended."
        )
    if unread := [f"'{f.column}'" for f in guess.features if (f.options["side"], f.column) not in read]:
        lines.append(f"Columns of users and items that this recipe does not read: {', '.join(unread)}.")
    if shape.is_dense and not shape.negatives:
        ids = (str(options["user_id"]), str(options["item_id"]))
        named = {*guess.columns.named, *row_numbers(found.interactions, guess.columns.named)}
        numbers = may_be_labels(found.interactions, named, ids)
        such = (
            f"; if {' or '.join(map(repr, numbers))} tells what they liked, an override such as schema.label={numbers[0]} says so"
            if numbers
            else ""
        )
        lines.append(
            f"Look at the rows: users have {shape.density:.0%} of the items (threshold {DENSE:.0%}), so the presence of a row says nothing{such}."
        )
    if telling := [f"'{name}'" for name in shape.telling.names if ("user", name) in read]:
        lines.append(
            f"Look at {', '.join(telling)} of the users: a column computed from these rows, such as a favourite, gives the answers away; use "
            "values known before the rows."
        )
    for side, columns in guess.counted.items():
        if counted := {f"'{name}'": found for name, found in columns.items() if (side, name) in read}:
            lines.append(
                f"Look at {', '.join(counted)} of the {side}s: the numbers follow those of the rows of each {side} (rank correlation "
                f"{min(counted.values()):.2f}); counted from these rows, as totals and means are, they give the answers away; use values known before."
            )
    lines += [f"Look at {remark}." for remark in guess.columns.remarks]
    return [*lines, *(f"Left out: {note}." for note in guess.notes)]
