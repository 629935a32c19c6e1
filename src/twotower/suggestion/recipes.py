"""Recipes: configs that the package carries, fitted to the columns and the shape of other tables."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Container, Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from twotower.config.toml import TomlValue, parse_sections
from twotower.errors import ConfigError, listed
from twotower.scorers.start import Start
from twotower.suggestion.features import SideFeature
from twotower.suggestion.shape import RecipeRule, Shape
from twotower.train.defaults import MIN_BATCH, STEPS_OF_EPOCH, batch_of

_PACKAGED = files("twotower") / "recipes"
FOLDER = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[3] / "examples" / "recipes"
"""The recipes: a folder of the package in a wheel, examples/recipes in a checkout."""
MAX_FULL_ITEMS, UNIFORM = 50_000, 4096  # items up to which a loss is over all, and items drawn from a larger catalogue
MIN_STEPS, MAX_EPOCHS = 0.1, 100  # share of the recipe's own steps that a training has at least (docs/log.md)
MIN_WINDOW = 8
MAX_WIDTH, ROWS_OF_ID = 512, 16  # width of a model that is its start; rows that take as long as a user or an item

Settings = dict[str, TomlValue]

_OF_COLUMN = {"kind", "side", "name", "column", "separator", "share_with"}
"""Options of a feature that its column decides, and not a recipe."""


def recipe_names() -> list[str]:
    """Return the names of the recipes, ascending."""
    return sorted(path.name.removesuffix(".toml") for path in FOLDER.iterdir() if path.name.endswith(".toml"))


def recipe_path(name: str) -> Path:
    """Return the path of a recipe."""
    return Path(str(FOLDER / f"{name}.toml"))


def read_recipe(name: str) -> Settings:
    """Return a recipe as TOML gives it. Raises ConfigError if the installation lacks it."""
    try:
        return tomllib.loads(recipe_path(name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{FOLDER}: holds no {name}.toml; install the wheel, or the repository with its examples/recipes"
        ) from None


class FittedRecipe:
    """Features and towers of a recipe for other tables, and its scorers, loss and steps for their shape.

    Ids take the names of the tables', histories stay, and where a tower reads columns of the recipe's tables it reads
    those of the other tables. A feature of a kind that the recipe has on its side takes over the recipe's options. A
    recipe of text alone reads text alone, and of the texts those whose words both sides share."""

    def __init__(
        self, recipe: Settings, ids: Mapping[str, str], columns: Sequence[SideFeature], has_label: bool,
        reads_text: bool = False, of_users: Container[str] = (), reads_negatives: bool = True,
        searched: Container[tuple[TomlValue, str]] = (),
    ) -> None:  # fmt: skip
        """Fit a recipe to tables with the columns of `ids` by side and `columns`.

        Without a label histories hold all interactions, and unless it `reads_negatives` none holds negatives. With
        `reads_text` a recipe without text reads the text of items too. Trained towers read the columns `of_users`.
        `searched` are the texts whose words both sides share, by side and name."""
        schema, self.config = parse_sections(recipe)
        assert schema is not None
        self.recipe, self.ids, self.has_label, self.reads_negatives = recipe, ids, has_label, reads_negatives
        raw = listed_sections(section(recipe, "schema"), "features")
        of_recipe = {"user": schema.user_id, "item": schema.item_id}
        own = [f for f in raw if f["kind"] != "sequence" and f["name"] != of_recipe[str(f["side"])]]
        texts = [f["kind"] == "text" for f in own]

        def is_read(column: SideFeature) -> bool:
            if all(texts):
                return column.is_text and (column.options["side"], column.column) in searched
            return any(texts) or not column.is_text or (reads_text and column.options["side"] == "item")

        self.columns = [column for column in columns if is_read(column)]
        self.comments = dict[str, str]()
        """Reasons by dotted key."""
        self.features, names = list[Settings](), dict[tuple[str, str], list[str]]()
        for f in raw:
            side, made = str(f["side"]), list[Settings]()
            if f not in own:
                made = self._own(f)
            elif f is next(other for other in own if other["side"] == side):
                for column in (c for c in self.columns if c.options["side"] == side):
                    self.comments[f"schema.features.{len(self.features) + len(made)}"] = column.why
                    made += self._of_pattern(column, own)
            self.features += made
            names[side, str(f["name"])] = [str(options["name"]) for options in made]
        self.model = section(recipe, "model")
        self.pairs = [
            {side: _with_fields(tower, side, names) for side, tower in pair.items() if isinstance(tower, Mapping)}
            for pair in listed_sections(self.model, "pairs")
        ]
        self.model |= {"pairs": self.pairs} if self.pairs else {}
        self._add_columns(of_users)

    def _own(self, f: Settings) -> list[Settings]:
        """Return the options of an id or a history; none if the tables lack what it reads."""
        side, is_history = str(f["side"]), f["kind"] == "sequence"
        if f.get("interactions") == "negative" and not (self.has_label and self.reads_negatives):
            return []
        fitted = {**f} if is_history else {**f, "name": self.ids[side]}
        if not self.has_label:
            fitted.pop("interactions", None)
        known = {c.column for c in self.columns if c.options["side"] == side}
        known |= {*self.ids.values()} if is_history else set()
        return [fitted | ({"name": f"{fitted['name']}_history"} if fitted["name"] in known else {})]

    def _of_pattern(self, column: SideFeature, own: Sequence[Settings]) -> list[Settings]:
        """Return the features of a column: one for each that the recipe has of its kind on the first such column."""
        of_kind = [f for f in own if f["kind"] == column.options["kind"]]
        patterns = [f for f in of_kind if f["side"] == column.options["side"]]
        if not patterns:
            return [{**column.options, **{k: v for f in of_kind[:1] for k, v in f.items() if k == "pooling"}}]
        made, source = list[Settings](), _source(patterns[0])
        other = next((c.column for c in self.columns if c.is_text and c.options["side"] != column.options["side"]), "")
        for f in (f for f in patterns if _source(f) == source):
            options = {**column.options, **{k: v for k, v in f.items() if k not in _OF_COLUMN}}
            if f["name"] != source:
                options |= {"name": str(f["name"]).replace(source, column.column), "column": column.column}
            shared = next((_source(one) for one in own if one["name"] == f.get("share_with")), "")
            if shared and other:
                options["share_with"] = str(f["share_with"]).replace(shared, other)
            made.append(options)
        return made

    def _add_columns(self, of_users: Container[str]) -> None:
        """Add columns of users to the trained towers that read the most fields, if none of them reads such columns.

        If the tower of items adds its fields up, so does that of users: a layer learns which values of users and items
        are equal from many more rows than a sum, whose values meet those of the items in the product."""
        columns = {str(c.options["name"]): c for c in self.columns if c.options["side"] == "user"}
        if any({*columns} & {*_fields(pair["user"], columns)} for pair in self.pairs):
            return
        added = {name: column for name, column in columns.items() if column.column in of_users}
        known = {_source(f) for f in self.features if f["side"] == "user"}
        for column in (c for c in added.values() if c.column not in known):
            self.comments[f"schema.features.{len(self.features)}"] = column.why
            self.features.append({**column.options})
        most = max((len(_fields(pair["user"])) for pair in self.pairs), default=0)
        for user, item in ((pair["user"], pair["item"]) for pair in self.pairs if "fields" in pair["user"]):
            if added and len(_fields(user)) == most:
                user["fields"] = [*_fields(user), *added]
                if item.get("join") == "sum":
                    user |= {"join": "sum", "activation": "Identity", "layers": []}

    def shaped(self, shape: Shape, rule: RecipeRule) -> Settings:
        """Return the scorers and the sections [model], [loss], [negatives], [train] and [narrow] for a shape, and set
        windows."""
        settings: Settings = {"model": self.model}
        settings |= {key: self.recipe[key] for key in ("loss", "negatives", "train", "narrow") if key in self.recipe}
        if scorers := self._scorers(shape, rule):
            settings["scorers"] = scorers
        for place, feature in enumerate(self.features):
            window = section(feature, "pooling").get("window")
            needed = max(MIN_WINDOW, 2 ** math.ceil(math.log2(max(1.0, shape.long_length))))
            if isinstance(window, float | int) and needed < window:
                feature["pooling"] = {**section(feature, "pooling"), "window": needed}
                why = f"window: the power of two from {shape.long_length:g} on, which a tenth of the users exceeds"
                self.comments[f"schema.features.{place}"] = f"{why}; at least {MIN_WINDOW}, at most {window:g}"
        negatives = section(settings, "negatives")
        drawn = negatives.pop("uniform", None)
        if negatives.get("full") and shape.items > MAX_FULL_ITEMS:
            negatives.pop("full")
            drawn = UNIFORM
            self.comments["negatives.uniform"] = f"{shape.items:,} items, more than {MAX_FULL_ITEMS:,}: some are drawn."
        if isinstance(drawn, float | int) and shape.items <= drawn:
            drawn, negatives = None, {"full": True, **negatives}
            self.comments["negatives.full"] = f"{shape.items:,} items, no more than the recipe draws."
        if negatives := ({} if drawn is None else {"uniform": drawn}) | negatives:
            settings["negatives"] = negatives
        if self.config.train.epochs:
            settings["train"] = {**section(settings, "train"), **self._steps(shape, rule)}
        return settings

    def _scorers(self, shape: Shape, rule: RecipeRule) -> list[Settings]:
        """Return the scorers that fit the log, none wider than what it reads has values.

        The first one of a recipe without epochs is wider, as far as that takes no longer than on the recipe's own log:
        items that are taken together in pairs and series have more directions than tastes have."""
        columns = [_source(f) for f in self.features if f["side"] == "item" and self._is_coded(f)]
        directions = sum(shape.values.get(name, 0) for name in columns)
        least, left, kept = min(shape.users, shape.items), dict[str, list[str]](), list[Settings]()
        for scorer, given in zip(self.config.scorers, listed_sections(self.recipe, "scorers"), strict=True):
            options = {**given}
            if isinstance(scorer, Start):
                why = "" if scorer.is_solved(shape.items, shape.common) else f"{shape.items:,} items are too many."
                if scorer.reads_columns and not columns:
                    why = "the tables have none of the columns that it reads."
                if why:
                    left.setdefault(why, []).append(f"'{scorer.kind}'")
                    continue
                most, width = least, scorer.width
                if scorer.reads_columns:
                    most = max(1, min(most, -(-11 * directions // 10)))  # a tenth more, for new values
                rows = shape.taken + ROWS_OF_ID * (shape.users + shape.items)
                if not kept and not self.config.train.epochs:
                    own = scorer.width * (rule.rows + ROWS_OF_ID * rule.ids)
                    while 2 * width <= min(most, MAX_WIDTH) and 2 * width * rows <= own:
                        width *= 2
                if (width := min(width, most)) != scorer.width:
                    options["width"] = width
                    why = "as the data have no more directions" if width < scorer.width else "as the log is small"
                    self.comments[f"scorers.{len(kept)}"] = f"width: {width:,} in place of {scorer.width:,}, {why}"
            if self.has_label and not self.reads_negatives and "unliked" in type(scorer).model_fields:
                options["unliked"] = 0
            if "rates" in type(scorer).model_fields and shape.order is not None and not shape.has_order:
                options["rates"] = [1.0]  # all rows count alike
            kept.append(options)
        if left:
            self.comments["scorers"] = " ".join(f"Without {listed(kinds)}: {why}" for why, kinds in left.items())
        return kept

    def _is_coded(self, feature: Settings) -> bool:
        """Return True for a column of values that closed forms read: no id, history, text or number without buckets."""
        coded = feature["kind"] in ("categorical", "multi_hot") or bool(feature.get("buckets"))
        return coded and _source(feature) != self.ids[str(feature["side"])]

    def _steps(self, shape: Shape, rule: RecipeRule) -> Settings:
        """Return the batch size by the number of training rows, and the epochs by the number of steps."""
        train, split = self.config.train, self.config.split
        if self.config.loss.pointwise:
            rows = round((1 - split.test) * (1 - split.validation) * shape.interactions)
            self.comments["train.batch_size"] = f"A twentieth of the {rows:,} training rows, at least {MIN_BATCH}."
            return {"batch_size": max(MIN_BATCH, math.ceil(rows / STEPS_OF_EPOCH))}
        batch = batch_of(shape.taken, train.batch_size)
        why = f"{shape.taken:,} rows make at least {STEPS_OF_EPOCH} steps, of {MIN_BATCH} rows or more."
        self.comments["train.batch_size"] = why
        steps, own = math.ceil(shape.taken / batch), train.epochs * math.ceil(rule.rows / train.batch_size)
        least = rule.min_steps or math.ceil(MIN_STEPS * own)
        if (needed := min(MAX_EPOCHS, math.ceil(least / steps))) <= train.epochs:
            return {"batch_size": batch}
        why = f"{steps:,} steps an epoch, and {least:,} are needed; at most {MAX_EPOCHS} epochs."
        self.comments["train.epochs"] = why
        return {"batch_size": batch, "epochs": needed}


def _with_fields(tower: Mapping[str, TomlValue], side: str, names: Mapping[tuple[str, str], list[str]]) -> Settings:
    """Return a tower with the names of the features here; without `fields` if the tables have none of them."""
    found = dict.fromkeys(n for name in _fields(tower) for n in names.get((side, name), ()))
    rest = {key: value for key, value in tower.items() if key != "fields"}
    return {"fields": [*found], **rest} if found else rest


def _fields(tower: Mapping[str, TomlValue], every: Iterable[str] = ()) -> list[str]:
    """Return the fields of a tower, `every` where it names none."""
    fields = tower.get("fields")
    return [str(name) for name in fields] if isinstance(fields, list) else [*every]


def _source(feature: Settings) -> str:
    """Return the column of a feature."""
    return str(feature.get("column", feature["name"]))


def listed_sections(settings: Mapping[str, TomlValue], key: str) -> list[Settings]:
    """Return a list of sections of settings, empty without one."""
    found = settings.get(key, [])
    return [dict(one) for one in found if isinstance(one, Mapping)] if isinstance(found, list) else []


def section(settings: Mapping[str, TomlValue], key: str) -> Settings:
    """Return a section of settings, empty without one."""
    found = settings.get(key, {})
    return dict(found) if isinstance(found, Mapping) else {}
