"""Recipes: configs that the package carries, with the columns of other tables in place of those of their own."""

from __future__ import annotations

import tomllib
from collections.abc import Container, Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from twotower.config.toml import TomlValue, parse_config
from twotower.errors import ConfigError
from twotower.features.feature import Feature
from twotower.features.schema import Schema
from twotower.features.side import SIDES, SideName
from twotower.model.pooling import resolve
from twotower.model.pooling.pooling import Pooling
from twotower.suggestion.side_features import SideFeature

_PACKAGED = files("twotower") / "recipes"
FOLDER = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[3] / "examples" / "recipes"
"""The recipes: a folder of the package in a wheel, examples/recipes in a checkout."""

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
    """Features and towers of a recipe for other tables.

    Ids take the names of the tables', histories stay, and where a tower reads columns of the recipe's tables it reads those of
    the other tables. Text is read by recipes that read text, and they read nothing else if the recipe does not. A feature of a kind that the
    recipe has on its side takes over the recipe's options."""

    def __init__(
        self,
        settings: Settings,
        user_id: str,
        item_id: str,
        columns: Sequence[SideFeature],
        has_label: bool,
        reads_text: bool = False,
        of_users: Sequence[str] = (),
        reads_negatives: bool = True,
        searched: Container[tuple[TomlValue, str]] | None = None,
    ) -> None:
        """Fit a recipe to tables with these id columns and `columns`. Without a label histories hold all interactions, and unless it `reads_negatives` there is none of
        these. With
        `reads_text` a recipe without text reads that of the items too. Trained towers that read no columns of users read those in `of_users`. A recipe that reads
        nothing but text reads the columns in `searched`, of a side and a name, whose words both sides share; None for all."""
        schema, config = parse_config(settings)
        self.recipe = schema or Schema()
        self._closed = {start.pair for start in config.train.start if not start.learn}
        """Pairs that no step trains, whose towers read what their closed form reads."""
        self.ids = {"user": user_id, "item": item_id}
        self.has_label, self.reads_negatives = has_label, reads_negatives
        own = [f for f in self.recipe.features if self._is_column(f)]
        texts = [f.searchable for f in own]
        known = [c for c in columns if searched is None or (c.options["side"], c.column) in searched]
        self.columns = (
            [c for c in known if c.is_text]
            if own and all(texts)
            else [c for c in columns if any(texts) or not c.is_text or (reads_text and c.options["side"] == "item")]
        )
        self._renamed: dict[tuple[str, str], tuple[str, ...]] = {}
        self.why: dict[int, str] = {}
        """Reason of a feature, by its place."""
        self.features = self._fit_features(settings, own)
        model = settings.get("model", {})
        assert isinstance(model, Mapping)
        self.model: Settings = {**model}
        self.without_columns = {
            place
            for place, pair in enumerate(config.model.pairs)
            for side, tower in (("user", pair.user), ("item", pair.item))
            if tower.fields and not self._names(tower.fields, side, place in self._closed)
        }
        """Pairs that read nothing but columns that the tables lack."""
        if isinstance(pairs := model.get("pairs"), list):
            self.model["pairs"] = [
                {
                    side: self._fit_tower(tower, side, place in self._closed)
                    for side, tower in pair.items()
                    if isinstance(tower, Mapping)
                }
                for place, pair in enumerate(pairs)
                if isinstance(pair, Mapping)
            ]
        self._add_columns(of_users)

    def drop_pair(self, number: int) -> None:
        """Leave out a pair of towers, and the features that it alone reads. A tower without `fields` reads all of its side."""
        pairs = self.model["pairs"]
        assert isinstance(pairs, list)
        all_of = {side: [f["name"] for f in self.features if f["side"] == side] for side in SIDES}
        read = [{side: set(tower.get("fields", all_of[side])) for side, tower in pair.items()} for pair in pairs]
        own = {(side, name) for side, names in read.pop(number).items() for name in names}
        own -= {(side, name) for fields in read for side, names in fields.items() for name in names}
        self.model["pairs"] = [pair for place, pair in enumerate(pairs) if place != number]
        self._drop_features(own)

    def columns_of(self, number: int, side: SideName) -> dict[str, str]:
        """Return the columns that a tower of a pair reads, by the names of their features."""
        pairs = self.model["pairs"]
        assert isinstance(pairs, list)
        found = {str(f["name"]): str(f.get("column", f["name"])) for f in self.features if f["side"] == side}
        return {name: found[name] for name in pairs[number][side].get("fields", found)}

    def keep_fields(self, number: int, side: SideName, names: Container[str]) -> None:
        """Let a tower of a pair read no other fields than these, and leave out the features that it alone reads."""
        pairs = self.model["pairs"]
        assert isinstance(pairs, list)
        read = [*self.columns_of(number, side)]
        gone = {name for name in read if name not in names}
        pairs[number][side]["fields"] = [name for name in read if name not in gone]
        gone -= {name for pair in pairs for name in pair[side].get("fields", read)}
        self._drop_features({(side, name) for name in gone})

    def _drop_features(self, own: Container[tuple[TomlValue, TomlValue]]) -> None:
        kept = [place for place, f in enumerate(self.features) if (f["side"], f["name"]) not in own]
        self.features = [self.features[place] for place in kept]
        self.why = {kept.index(place): why for place, why in self.why.items() if place in kept}

    def reads_columns(self, number: int) -> bool:
        """Return True if the item tower of a pair reads columns, and no id."""
        pairs = self.model["pairs"]
        assert isinstance(pairs, list)
        return self.ids["item"] not in pairs[number]["item"].get("fields", [self.ids["item"]])

    def order_pair(self, number: int, pooling: Pooling) -> None:
        """Let a history of a pair whose own pooling sees no order be pooled so. The pair's items have the user's width for each piece."""
        pairs = self.model["pairs"]
        assert isinstance(pairs, list)
        user, item = pairs[number]["user"], pairs[number]["item"]
        ordered = {
            n
            for f in self.recipe.features
            if f.pools and resolve(f.pools).in_order
            for n in self._renamed.get((f.side, f.name), ())
        }
        for feature in self.features:
            if feature["side"] == "user" and feature["name"] in user["fields"] and feature["name"] not in ordered:
                feature["pooling"] = {"kind": pooling.kind, **pooling.model_dump(mode="json", exclude_defaults=True)}
                item["width"] = user["width"] * pooling.pieces

    def narrow_pair(self, number: int, most: int) -> bool:
        """Bound the width of a pair that names it, and return True if it was greater."""
        pairs = self.model["pairs"]
        assert isinstance(pairs, list)
        towers = [tower for tower in pairs[number].values() if tower.get("width", 0)]
        least = min((tower["width"] for tower in towers), default=0)
        if least <= most:
            return False
        for tower in towers:
            tower["width"] = tower["width"] * most // least
        return True

    def _add_columns(self, of_users: Sequence[str]) -> None:
        """Add columns of users, by name, to the trained towers that read the most fields, if none of them reads such columns, and to features. A
        tower without `fields` reads all. Beside a tower of items that adds its fields up they are added up too: a layer learns which values of users and items are equal from
        many more rows than a sum, whose values meet those of the items in the product."""
        added = [c for c in self.columns if c.options["side"] == "user" and c.column in of_users]
        pairs = self.model.get("pairs")
        trained = [p for place, p in enumerate(pairs) if place not in self._closed] if isinstance(pairs, list) else []
        columns = {str(c.options["name"]) for c in self.columns if c.options["side"] == "user"}
        if any(columns & {*pair["user"].get("fields", columns)} for pair in trained):
            return
        known = {(f["side"], f.get("column", f["name"])) for f in self.features}
        for column in added:
            if ("user", column.column) not in known:
                self.why[len(self.features)] = column.why
                self.features.append({**column.options})
        towers = [(pair["user"], pair.get("item", {})) for pair in trained if "fields" in pair["user"]]
        most = max((len(user["fields"]) for user, _ in towers), default=0)
        for user, item in towers:
            if added and len(user["fields"]) == most:
                user["fields"] += [str(column.options["name"]) for column in added]
                if item.get("join") == "sum":
                    user |= {"join": "sum", "activation": "Identity", "layers": []}

    def _is_column(self, f: Feature) -> bool:
        """Return True for a feature of a column of the recipe's users or items that is no id."""
        ids = {side: self.recipe.id_column(side) for side in SIDES}
        return f.side in ids and not f.history and not f.computes and f.source != ids[f.side]

    def _fit_features(self, settings: Settings, own: Sequence[Feature]) -> list[Settings]:
        schema = settings.get("schema", {})
        given = schema.get("features", []) if isinstance(schema, Mapping) else []
        raw = [dict(f) for f in given if isinstance(f, Mapping)] if isinstance(given, list) else []
        raw = raw or [{"kind": f.kind, "side": f.side, "name": f.name} for f in self.recipe.features]
        first = {side: next((f.name for f in own if f.side == side), "") for side in SIDES}
        out: list[Settings] = []
        for f, options in zip(self.recipe.features, raw, strict=True):
            if f.side == "context":
                continue  # of the recipe's own log
            if f in own:
                placed = [c for c in self.columns if c.options["side"] == f.side] if f.name == first[f.side] else []
                new = [made for column in placed for made in self._of_pattern(column, own, raw)]
                for column, made in new:
                    self.why[len(out)] = column.why
                    out.append(made)
                self._renamed[f.side, f.name] = tuple(str(made["name"]) for _, made in new)
            elif (fitted := self._fit_own(f, options)) is not None:
                out.append(fitted)
                self._renamed[f.side, f.name] = (str(fitted["name"]),)
        return out

    def _fit_own(self, f: Feature, options: Settings) -> Settings | None:
        """Return the options of an id, a statistic or a history; None if the tables lack what it reads."""
        fitted = dict(options)
        if history := f.history:
            if history.feature:
                return None  # a column of the recipe's own tables
            if history.interactions == "negative" and not self.reads_negatives:
                return None
            if not self.has_label and history.interactions != "all":
                if history.interactions == "negative":
                    return None
                del fitted["interactions"]
        elif not f.computes:
            own, new = self.recipe.id_column(f.side), self.ids[f.side]  # type: ignore[arg-type]
            fitted |= {"column": new} if "column" in fitted else {"name": new if f.name == own else f.name}
        taken = {*self.ids.values()} if f.history else set()
        if fitted["name"] in taken | {c.column for c in self.columns if c.options["side"] == f.side}:
            fitted["name"] = f"{fitted['name']}_history"
        return fitted

    def _of_pattern(
        self, column: SideFeature, own: Sequence[Feature], raw: Sequence[Settings]
    ) -> list[tuple[SideFeature, Settings]]:
        """Return the features of a column: one for each that the recipe has of its kind on the first column that has any."""
        side = column.options["side"]
        of_kind = [
            (f, r)
            for f, r in zip(self.recipe.features, raw, strict=True)
            if f in own and (f.side, f.kind) == (side, column.options["kind"])
        ]
        patterns = [(f, r) for f, r in of_kind if f.source == of_kind[0][0].source]
        if not patterns:
            like = next(
                (r for f, r in zip(self.recipe.features, raw, strict=True) if f.kind == column.options["kind"]), {}
            )
            return [(column, {**column.options, **{key: like[key] for key in ("pooling",) if key in like}})]
        made = list[tuple[SideFeature, Settings]]()
        for f, pattern in patterns:
            options: Settings = {**column.options}
            options |= {k: v for k, v in pattern.items() if k not in _OF_COLUMN}
            if f.name != f.source:
                options |= {"name": f.name.replace(f.source, column.column), "column": column.column}
            shared = next((r.source for r in self.recipe.features if r.name == f.shares), "")
            other = next((c.column for c in self.columns if c.is_text and c.options["side"] != side), "")
            if shared and other:
                options["share_with"] = f.shares.replace(shared, other)
            made.append((column, options))
        return made

    def _fit_tower(self, tower: Mapping[str, TomlValue], side: str, is_closed: bool) -> Settings:
        """Return the options of a tower with the names of the features; without `fields` if the tables have none of them, so that
        it reads all."""
        fitted: Settings = {**tower}
        fields = fitted.pop("fields", None)
        if isinstance(fields, list):
            names = self._names(map(str, fields), side, is_closed)
            fitted = {"fields": [*names], **fitted} if names else fitted
        return fitted

    def _names(self, fields: Iterable[str], side: str, is_closed: bool) -> list[str]:
        """Return the names that features of the recipe have here. No closed form reads text."""
        names = dict.fromkeys(new for name in fields for new in self._renamed.get((side, name), ()))
        texts = {str(c.options["name"]) for c in self.columns if c.is_text and c.options["side"] == side}
        return [name for name in names if not (is_closed and name in texts)]
