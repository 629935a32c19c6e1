"""Recipes: configs that the package carries, fitted to the columns and the shape of other tables."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Container, Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from twotower.config.toml import TomlValue, parse_config
from twotower.errors import ConfigError, listed
from twotower.features.side import SIDES, SideName
from twotower.model.pooling.pooling import Pooling
from twotower.suggestion.features import SideFeature
from twotower.suggestion.shape import RecipeRule, Shape
from twotower.train.defaults import MIN_BATCH, STEPS_OF_EPOCH, batch_of
from twotower.train.recipe import TrainConfig
from twotower.train.starts.start import Start
from twotower.train.starts.user_content import fewer_columns

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
    """Features and towers of a recipe for other tables.

    Ids take the names of the tables', histories stay, and where a tower reads columns of the recipe's tables it reads
    those of the other tables. A feature of a kind that the recipe has on its side takes over the recipe's options. A
    recipe of text alone reads text alone, and of the texts those whose words both sides share."""

    def __init__(
        self, settings: Settings, ids: Mapping[str, str], columns: Sequence[SideFeature], has_label: bool,
        reads_text: bool = False, of_users: Container[str] = (), reads_negatives: bool = True,
        searched: Container[tuple[TomlValue, str]] = (),
    ) -> None:  # fmt: skip
        """Fit a recipe to tables with the columns of `ids` by side and `columns`.

        Without a label histories hold all interactions, and unless it `reads_negatives` none holds negatives. With
        `reads_text` a recipe without text reads the text of items too. Trained towers read the columns `of_users`.
        `searched` are the texts whose words both sides share, by side and name."""
        schema, self.config = parse_config(settings)
        assert schema is not None
        self.ids, self.has_negatives = ids, has_label and reads_negatives
        self._own_ids = {"user": schema.user_id, "item": schema.item_id}
        self._closed = {start.pair for start in self.config.train.start if not start.learn}
        listed_features = section(settings, "schema")["features"]
        assert isinstance(listed_features, list)
        raw: list[Settings] = [dict(f) for f in listed_features]
        own = [f for f in raw if f["kind"] != "sequence" and f["name"] != self._own_ids[str(f["side"])]]
        texts = [f["kind"] == "text" for f in own]
        self.columns = [
            c
            for c in columns
            if (c.is_text and (c.options["side"], c.column) in searched if all(texts) else
                any(texts) or not c.is_text or (reads_text and c.options["side"] == "item"))
        ]  # fmt: skip
        self.why: dict[int, str] = {}
        """Reason of a feature, by its place."""
        self.features, self._renamed = list[Settings](), dict[tuple[str, str], list[str]]()
        for f in raw:
            side, name = str(f["side"]), str(f["name"])
            made = list[Settings]()
            if f not in own:
                made = self._fit_own(f, has_label)
            elif f is next(other for other in own if other["side"] == side):
                for column in (c for c in self.columns if c.options["side"] == side):
                    made += (options := self._of_pattern(column, own))
                    self.why |= {len(self.features) + len(made) - len(options): column.why}
            self.features += made
            self._renamed[side, name] = [str(options["name"]) for options in made]
        self.model = section(settings, "model")
        given = self.model.get("pairs", [])
        assert isinstance(given, list)
        self.pairs: list[dict[str, Settings]] = [
            {side: self._fit_tower(tower, side, place in self._closed) for side, tower in pair.items()}
            for place, pair in enumerate(given)
        ]
        self.without_columns = {
            place
            for place, pair in enumerate(given)
            if any("fields" in tower and "fields" not in self.pairs[place][side] for side, tower in pair.items())
        }
        """Pairs that read nothing but columns that the tables lack."""
        self.model |= {"pairs": self.pairs} if given else {}
        self._add_columns(of_users)

    def _fit_own(self, f: Settings, has_label: bool) -> list[Settings]:
        """Return the options of an id or a history; none if the tables lack what it reads."""
        side = str(f["side"])
        fitted = {**f, "name": self.ids[side]} if f["kind"] != "sequence" else {**f}
        if f.get("interactions") == "negative" and not self.has_negatives:
            return []
        if not has_label:
            fitted.pop("interactions", None)
        taken = {*self.ids.values()} if f["kind"] == "sequence" else set()
        if fitted["name"] in taken | {c.column for c in self.columns if c.options["side"] == side}:
            fitted["name"] = f"{fitted['name']}_history"
        return [fitted]

    def _of_pattern(self, column: SideFeature, own: Sequence[Settings]) -> list[Settings]:
        """Return the features of a column: one for each that the recipe has of its kind on the first such column."""
        of_kind = [f for f in own if f["kind"] == column.options["kind"]]
        patterns = [f for f in of_kind if f["side"] == column.options["side"]]
        if not patterns:
            return [{**column.options, **{k: v for f in of_kind[:1] for k, v in f.items() if k == "pooling"}}]
        made, source = list[Settings](), _source(patterns[0])
        for f in (f for f in patterns if _source(f) == source):
            options = {**column.options, **{k: v for k, v in f.items() if k not in _OF_COLUMN}}
            if f["name"] != source:
                options |= {"name": str(f["name"]).replace(source, column.column), "column": column.column}
            shared = next((_source(other) for other in own if other["name"] == f.get("share_with")), "")
            other = next((c.column for c in self.columns if c.is_text and c.options["side"] != f["side"]), "")
            made.append(
                {**options, "share_with": str(f["share_with"]).replace(shared, other)} if shared and other else options
            )
        return made

    def _fit_tower(self, tower: Settings, side: str, is_closed: bool) -> Settings:
        """Return a tower with the names of the features here; without `fields` if the tables have none of them.

        No closed form reads text."""
        fitted = {**tower}
        new = dict.fromkeys(n for name in _fields(fitted) for n in self._renamed.get((side, name), ()))
        fitted.pop("fields", None)
        texts = {str(c.options["name"]) for c in self.columns if c.is_text and c.options["side"] == side}
        names = [name for name in new if not (is_closed and name in texts)]
        return {"fields": names, **fitted} if names else fitted

    def _add_columns(self, of_users: Container[str]) -> None:
        """Add columns of users to the trained towers that read the most fields, if none of them reads such columns.

        If the tower of items adds its fields up, so does that of users: a layer learns which values of users and items
        are equal from many more rows than a sum, whose values meet those of the items in the product."""
        added = [c for c in self.columns if c.options["side"] == "user" and c.column in of_users]
        trained = [pair for place, pair in enumerate(self.pairs) if place not in self._closed]
        columns = {str(c.options["name"]) for c in self.columns if c.options["side"] == "user"}
        if any(columns & {*_fields(pair["user"], columns)} for pair in trained):
            return
        known = {(f["side"], _source(f)) for f in self.features}
        for column in (c for c in added if ("user", c.column) not in known):
            self.why[len(self.features)] = column.why
            self.features.append({**column.options})
        most = max((len(_fields(pair["user"])) for pair in trained), default=0)
        for user, item in ((pair["user"], pair["item"]) for pair in trained if "fields" in pair["user"]):
            if added and len(_fields(user)) == most:
                user["fields"] = [*_fields(user), *(str(column.options["name"]) for column in added)]
                if item.get("join") == "sum":
                    user |= {"join": "sum", "activation": "Identity", "layers": []}

    def drop_pair(self, number: int) -> None:
        """Leave out a pair of towers, and the features that it alone reads."""
        all_of = {side: [str(f["name"]) for f in self.features if f["side"] == side] for side in SIDES}
        read = [{(str(s), n) for s in SIDES for n in _fields(pair[s], all_of[s])} for pair in self.pairs]
        own = read.pop(number).difference(*read)
        del self.pairs[number]
        kept = [place for place, f in enumerate(self.features) if (f["side"], f["name"]) not in own]
        self.features = [self.features[place] for place in kept]
        self.why = {kept.index(place): why for place, why in self.why.items() if place in kept}

    def columns_of(self, number: int, side: SideName) -> list[str]:
        """Return the columns that a tower of a pair reads."""
        found = {str(f["name"]): _source(f) for f in self.features if f["side"] == side}
        return [found[name] for name in _fields(self.pairs[number][side], found)]

    def order_pair(self, number: int, pooling: Pooling) -> None:
        """Let a history of a pair that is pooled in no order be pooled so. Its items get the width of all pieces."""
        user, item = self.pairs[number]["user"], self.pairs[number]["item"]
        for feature in (f for f in self.features if f["side"] == "user" and f["name"] in _fields(user)):
            if feature["kind"] == "sequence" and not isinstance(feature.get("pooling"), Mapping):  # others are in order
                feature["pooling"] = {"kind": pooling.kind, **pooling.model_dump(mode="json", exclude_defaults=True)}
                item["width"] = int(str(user["width"])) * pooling.pieces

    def narrow_pair(self, number: int, most: int) -> bool:
        """Bound the width of a pair that names it, and return True if it was greater."""
        towers = {side: int(str(tower.get("width", 0))) for side, tower in self.pairs[number].items()}
        least = min((width for width in towers.values() if width), default=0)
        for side, width in towers.items() if least > most else ():
            self.pairs[number][side] |= {"width": width * most // least} if width else {}
        return least > most


def _fields(tower: Settings, every: Iterable[str] = ()) -> list[str]:
    """Return the fields of a tower, `every` where it names none."""
    fields = tower.get("fields")
    return [str(name) for name in fields] if isinstance(fields, list) else [*every]


def _source(feature: Settings) -> str:
    """Return the column of a feature."""
    return str(feature.get("column", feature["name"]))


def shaped_settings(
    recipe: Settings, fitted: FittedRecipe, shape: Shape, rule: RecipeRule, unweighed: str = "", unsolved: str = ""
) -> tuple[Settings, dict[str, str]]:
    """Return the sections [model], [loss], [negatives] and [train] of a recipe for a shape, and comments by dotted key.

    Windows of `fitted.features` are set too. Pairs are left out whose closed form is too large or whose weight cannot
    be chosen, for the reason `unweighed`; for the reason `unsolved` every pair with a closed form."""
    config = fitted.config
    settings: Settings = {key: recipe[key] for key in ("loss", "negatives", "train") if key in recipe}
    comments = dict[str, str]()
    for start in config.train.start:
        if start.in_order and shape.has_order and start.pair not in fitted.without_columns:
            fitted.order_pair(start.pair, start.in_order)
    if any(start.blend or unsolved for start in config.train.start):
        settings["train"] = _shape_blends(section(settings, "train"), fitted, shape, unweighed, unsolved, comments)
    settings = {"model": fitted.model} | settings
    for place, feature in enumerate(fitted.features):
        window = section(feature, "pooling").get("window")
        needed = max(MIN_WINDOW, 2 ** math.ceil(math.log2(max(1.0, shape.long_length))))
        if isinstance(window, float | int) and needed < window:
            feature["pooling"] = {**section(feature, "pooling"), "window": needed}
            fitted.why[place] = (
                f"window: the power of two from {shape.long_length:g} on, which a tenth of the users exceeds; at least "
                f"{MIN_WINDOW}, at most {window:g}"
            )
    _shape_catalogue(settings, shape, comments)
    if config.train.epochs:
        _shape_steps(settings, fitted, shape, rule, comments)
    else:
        _shape_width(settings, fitted, shape, rule, comments)
    return settings, comments


def _shape_blends(
    train: Settings, fitted: FittedRecipe, shape: Shape, unweighed: str, unsolved: str, comments: dict[str, str]
) -> Settings:
    """Return the section [train] without starts whose weight cannot be chosen or whose closed form does not fit the
    log, and leave out their pairs; bound the widths of the others."""
    given = train["start"]
    assert isinstance(given, list)
    reasons, left = dict[str, list[str]](), list[Start]()
    for start in fitted.config.train.start:
        why = unsolved or unweighed
        if not (why or start.is_exact(shape.users, shape.items, shape.common)):
            why = f"{shape.users:,} users and {shape.items:,} items are too many for its closed form."
        if start.adds_users and shape.users_change:
            why = "users have several values of a column, by schema.valid_from."
        elif start.adds_users and start.pair not in fitted.without_columns and not why:
            of_ids = {fitted.ids["user"]: shape.users, fitted.ids["item"]: shape.items}
            counts = [
                {c: 1 + shape.values.get((side, c), of_ids.get(c, 0)) for c in fitted.columns_of(start.pair, side)}
                for side in SIDES
            ]
            fewer = [len(names) < len(of) for names, of in zip(fewer_columns(*counts), counts, strict=True)]
            why = "the columns have too many values to be counted." if any(fewer) else ""
        if start.pair in fitted.without_columns:
            why = "the tables have none of the columns that it reads."
        if unsolved or (start.blend and why):
            left.append(start)
            reasons.setdefault(why, []).append(f"'{start.kind}'")
    gone = sorted((start.pair for start in left), reverse=True)
    for pair in gone:
        fitted.drop_pair(pair)
    kept = list[TomlValue]()
    for start, options in zip(fitted.config.train.start, given, strict=True):
        if start in left or not isinstance(options, Mapping):
            continue
        pair = start.pair - sum(other < start.pair for other in gone)
        kept.append({**options, "pair": pair} if pair else options)
        bounds = {
            min(shape.users, shape.items): f"The smaller number of {shape.users:,} users and {shape.items:,} items."
        }
        more = "and a tenth more for new ones."
        if fitted.ids["item"] not in _fields(fitted.pairs[pair]["item"], [fitted.ids["item"]]):
            why = f"The number of values of the items' columns, {shape.content_values:,}, {more}"
            bounds.setdefault(-(-11 * shape.content_values // 10), why)
        if start.adds_users:
            why = (
                f"The smaller numbers of values of columns of users and items, added up, {shape.joint_values:,}, {more}"
            )
            bounds.setdefault(-(-11 * shape.joint_values // 10), why)
        if start.blend and fitted.narrow_pair(pair, min(bounds)):
            comments[f"model.pairs.{pair}.user.width"] = bounds[min(bounds)]
    if left:
        texts = (f"the recipe's start{'s' * bool(k[1:])} {listed(k)} and its pair: {why}" for why, k in reasons.items())
        comments["train.start"] = " ".join(f"Without {text}" for text in texts)
    return {**train, "start": kept}


def _shape_catalogue(settings: Settings, shape: Shape, comments: dict[str, str]) -> None:
    negatives = section(settings, "negatives")
    drawn = negatives.get("uniform")
    if isinstance(drawn, float | int) and not negatives.get("full") and shape.items <= drawn:
        negatives = {"full": True, **{k: v for k, v in negatives.items() if k != "uniform"}}
        comments["negatives.full"] = f"{shape.items:,} items, no more than the {drawn:,} that the recipe draws."
    if negatives.get("full") and shape.items > MAX_FULL_ITEMS:
        negatives = {"uniform": UNIFORM, **{k: v for k, v in negatives.items() if k != "full"}}
        comments["negatives.uniform"] = f"{shape.items:,} items, more than {MAX_FULL_ITEMS:,}: {UNIFORM:,} are drawn."
    if negatives:
        settings["negatives"] = negatives


def _shape_width(
    settings: Settings, fitted: FittedRecipe, shape: Shape, rule: RecipeRule, comments: dict[str, str]
) -> None:
    """Raise the width of a model that is its start, as far as that takes no longer than on the recipe's own log: items
    that are taken together in pairs and series have more directions than tastes have."""
    own, own_rows = fitted.config.model.width, rule.rows + ROWS_OF_ID * rule.ids
    rows = shape.taken + ROWS_OF_ID * (shape.users + shape.items)
    width, most = own, min(shape.users, shape.items, MAX_WIDTH)
    while 2 * width <= most and 2 * width * rows <= own * own_rows:
        width *= 2
    if width > own:
        settings["model"] = {**section(settings, "model"), "width": width}
        comments["model.width"] = (
            f"The recipe's {own:,}, doubled while it takes no longer than on the recipe's own log."
        )


def _shape_steps(
    settings: Settings, fitted: FittedRecipe, shape: Shape, rule: RecipeRule, comments: dict[str, str]
) -> None:
    """Set the batch size by the number of training rows, and the epochs by the number of steps."""
    train, split, pointwise = fitted.config.train, fitted.config.split, fitted.config.loss.pointwise
    if pointwise:
        rows = round((1 - split.test) * (1 - split.validation) * shape.interactions)
        batch = max(MIN_BATCH, math.ceil(rows / STEPS_OF_EPOCH))
        comments["train.batch_size"] = f"A twentieth of the {rows:,} training rows, at least {MIN_BATCH}."
    else:
        rows = shape.taken
        batch = batch_of(rows, train.batch_size)
        comments["train.batch_size"] = (
            f"{rows:,} rows make at least {STEPS_OF_EPOCH} steps, of {MIN_BATCH} rows or more."
        )
    changed: Settings = {"batch_size": batch}
    steps, own_steps = math.ceil(rows / batch), train.epochs * math.ceil(rule.rows / train.batch_size)
    least = rule.min_steps or math.ceil(MIN_STEPS * own_steps)
    needed = min(MAX_EPOCHS, math.ceil(least / steps))
    if not pointwise and needed > train.epochs:
        changed["epochs"] = needed
        comments["train.epochs"] = f"{steps:,} steps an epoch, and {least:,} are needed; at most {MAX_EPOCHS} epochs."
    settings["train"] = {**section(settings, "train"), **changed}


def first_starts(train: Settings) -> list[TomlValue]:
    """Return the starts of a section [train] with their first value in place of several."""
    kept = list[TomlValue]()
    for start in TrainConfig.model_validate(train).start:
        firsts = {name: [getattr(start, name)[0]] for name in start.several if getattr(start, name)}
        kept.append({"kind": start.kind, **start.model_dump(exclude_defaults=True), **firsts})
    return kept


def section(settings: Mapping[str, TomlValue], key: str) -> Settings:
    """Return a section of settings, empty without one."""
    found = settings.get(key, {})
    return dict(found) if isinstance(found, Mapping) else {}
