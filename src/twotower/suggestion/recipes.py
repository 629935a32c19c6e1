"""Recipes: configs that the package carries, fitted to the columns and the shape of other tables."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Container, Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from twotower.config.toml import TomlValue, parse_sections
from twotower.errors import ConfigError, listed
from twotower.scorers import SCORERS
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
        schema, self.config = parse_sections(settings)
        assert schema is not None
        self.ids, self.has_negatives = ids, has_label and reads_negatives
        self.hides_negatives = has_label and not reads_negatives
        self._own_ids = {"user": schema.user_id, "item": schema.item_id}
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
            {side: self._fit_tower(tower, side) for side, tower in pair.items()} for pair in given
        ]
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

    def _fit_tower(self, tower: Settings, side: str) -> Settings:
        """Return a tower with the names of the features here; without `fields` if the tables have none of them."""
        fitted = {**tower}
        names = dict.fromkeys(n for name in _fields(fitted) for n in self._renamed.get((side, name), ()))
        fitted.pop("fields", None)
        return {"fields": [*names], **fitted} if names else fitted

    def _add_columns(self, of_users: Container[str]) -> None:
        """Add columns of users to the trained towers that read the most fields, if none of them reads such columns.

        If the tower of items adds its fields up, so does that of users: a layer learns which values of users and items
        are equal from many more rows than a sum, whose values meet those of the items in the product."""
        added = [c for c in self.columns if c.options["side"] == "user" and c.column in of_users]
        columns = {str(c.options["name"]) for c in self.columns if c.options["side"] == "user"}
        if any(columns & {*_fields(pair["user"], columns)} for pair in self.pairs):
            return
        known = {(f["side"], _source(f)) for f in self.features}
        for column in (c for c in added if ("user", c.column) not in known):
            self.why[len(self.features)] = column.why
            self.features.append({**column.options})
        most = max((len(_fields(pair["user"])) for pair in self.pairs), default=0)
        for user, item in ((pair["user"], pair["item"]) for pair in self.pairs if "fields" in pair["user"]):
            if added and len(_fields(user)) == most:
                user["fields"] = [*_fields(user), *(str(column.options["name"]) for column in added)]
                if item.get("join") == "sum":
                    user |= {"join": "sum", "activation": "Identity", "layers": []}


def _fields(tower: Settings, every: Iterable[str] = ()) -> list[str]:
    """Return the fields of a tower, `every` where it names none."""
    fields = tower.get("fields")
    return [str(name) for name in fields] if isinstance(fields, list) else [*every]


def _source(feature: Settings) -> str:
    """Return the column of a feature."""
    return str(feature.get("column", feature["name"]))


def shaped_settings(
    recipe: Settings, fitted: FittedRecipe, shape: Shape, rule: RecipeRule, unweighted: str = "", unsolved: str = ""
) -> tuple[Settings, dict[str, str]]:
    """Return the scorers and the sections [model], [loss], [negatives] and [train] of a recipe for a shape, and
    comments by dotted key.

    Windows of `fitted.features` are set too. Scorers are left out that read what the tables lack, that are too large,
    or whose weight cannot be chosen, for the reason `unweighted`; for the reason `unsolved` all."""
    config = fitted.config
    settings: Settings = {key: recipe[key] for key in ("loss", "negatives", "train") if key in recipe}
    comments = dict[str, str]()
    if kept := _shape_scorers(recipe, fitted, shape, unweighted, unsolved, comments):
        settings["scorers"] = kept
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


def _shape_scorers(
    recipe: Settings, fitted: FittedRecipe, shape: Shape, unweighted: str, unsolved: str, comments: dict[str, str]
) -> list[Settings]:
    """Return the scorers of a recipe that fit the log, none wider than what it reads has values."""
    given = listed_sections(recipe, "scorers")
    has_columns = any(f["side"] == "item" and _is_column(f, fitted.ids) for f in fitted.features)
    reasons, kept, hides = dict[str, list[str]](), list[Settings](), fitted.hides_negatives
    for place, (scorer, options) in enumerate(zip(fitted.config.scorers, given, strict=True)):
        why = unsolved or (unweighted if place or fitted.config.train.epochs else "")
        if isinstance(scorer, Start) and not why:
            why = _why_left_out(scorer, has_columns, shape)
        if why:
            reasons.setdefault(why, []).append(f"'{scorer.kind}'")
            continue
        kept.append({**options, **({"unliked": 0} if hides and "unliked" in type(scorer).model_fields else {})})
        if "rates" in type(scorer).model_fields and shape.order is not None and not shape.has_order:
            kept[-1]["rates"] = [1.0]  # all rows count alike
        if isinstance(scorer, Start) and (width := _most_directions(scorer, shape)) < scorer.width:
            kept[-1]["width"] = width
            comments[f"scorers.{len(kept) - 1}"] = f"width: the data have no more than {width:,} directions"
    if reasons:
        texts = (f"the recipe's scorer{'s' * bool(k[1:])} {listed(k)}: {why}" for why, k in reasons.items())
        comments["scorers"] = " ".join(f"Without {text}" for text in texts)
    return kept


def _why_left_out(scorer: Start, has_columns: bool, shape: Shape) -> str:
    """Return why a closed form does not fit a log; "" if it fits."""
    if not scorer.is_solved(shape.items, shape.common):
        return f"{shape.items:,} items are too many for its closed form."
    if scorer.reads_columns and not has_columns:
        return "the tables have none of the columns that it reads."
    return ""


def _most_directions(scorer: Start, shape: Shape) -> int:
    """Return the width from which a closed form has no more directions: the smaller number of users and items, and of
    columns their values, and a tenth more for new ones."""
    most = min(shape.users, shape.items)
    return max(1, min(most, -(-11 * shape.content_values // 10))) if scorer.reads_columns else most


def _is_column(feature: Settings, ids: Mapping[str, str]) -> bool:
    """Return True for a column of values that closed forms read: no id, history, text or number without buckets."""
    coded = feature["kind"] in ("categorical", "multi_hot") or bool(feature.get("buckets"))
    return coded and _source(feature) != ids[str(feature["side"])]


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
    """Raise the width of the first scorer of a recipe without epochs, as far as that takes no longer than on the
    recipe's own log: items that are taken together in pairs and series have more directions than tastes have."""
    scorers, first = listed_sections(settings, "scorers"), fitted.config.scorers[0]
    assert isinstance(first, Start)
    own, own_rows = first.width, rule.rows + ROWS_OF_ID * rule.ids
    rows = shape.taken + ROWS_OF_ID * (shape.users + shape.items)
    width, most = own, min(shape.users, shape.items, MAX_WIDTH)
    while 2 * width <= most and 2 * width * rows <= own * own_rows:
        width *= 2
    if width > own and scorers:
        settings["scorers"] = [{**scorers[0], "width": width}, *scorers[1:]]
        comments["scorers.0"] = f"width: {own:,}, doubled while it takes no longer than on the recipe's own log"


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


def first_values(scorers: Iterable[Settings]) -> list[Settings]:
    """Return scorers with the first value of each option in place of several."""
    kept = list[Settings]()
    for options in scorers:
        scorer = SCORERS.parse(options)
        several = scorer.several if isinstance(scorer, Start) else []
        kept.append({**options, **{name: [getattr(scorer, name)[0]] for name in several}})
    return kept


def listed_sections(settings: Mapping[str, TomlValue], key: str) -> list[Settings]:
    """Return a list of sections of settings, empty without one."""
    found = settings.get(key, [])
    return [dict(one) for one in found if isinstance(one, Mapping)] if isinstance(found, list) else []


def section(settings: Mapping[str, TomlValue], key: str) -> Settings:
    """Return a section of settings, empty without one."""
    found = settings.get(key, {})
    return dict(found) if isinstance(found, Mapping) else {}
