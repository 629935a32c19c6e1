"""The settings of an experiment, composed of the sections of the rooms, with scorers as features, pairs of towers and
options of the model; and the differences of several experiments."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Annotated

from pydantic import JsonValue, ValidationError

from twotower.data.config import DatasetConfig
from twotower.errors import ConfigError
from twotower.features.feature import Feature
from twotower.features.schema import Schema
from twotower.features.side import SIDES
from twotower.index import INDEXES
from twotower.index.auto import Auto
from twotower.index.protocol import IndexConfig
from twotower.model.towers import TowerConfig
from twotower.model.two_tower import PairConfig
from twotower.scorers.scorer import TermScorer
from twotower.scorers.start import Start
from twotower.section import first_problem
from twotower.train.recipe import Recipe


class Config(Recipe, DatasetConfig):
    """All settings without the schema: the dataset, the recipe of the model, and its index."""

    index: Annotated[IndexConfig, INDEXES] = Auto()


def with_scorers(schema: Schema, config: Config) -> tuple[Schema, Config]:
    """Return a schema and a config in which pairs of towers and their starts stand for the scorers, but those without a
    pair, which have their features. The trained towers read what they read before. Raises ConfigError."""
    if not config.scorers:
        return schema, config
    known = {f.name: f for f in schema.features}
    kept = bool(config.train.epochs or config.train.start)  # pairs without epochs have a start each
    n_pairs, counts = len(config.model.pairs) if kept else 0, Counter[str]()
    features, pairs_added = list[Feature](), list[PairConfig]()
    starts, terms = list[Start](config.train.start), list[TermScorer]()
    for scorer in config.scorers:
        counts[scorer.kind] += 1
        number = f"_{n}" if (n := counts[scorer.kind]) > 1 else ""
        name = "__" + re.sub(r"\W", "_", scorer.kind) + number
        added = scorer.addition(schema, name, n_pairs + len(pairs_added))
        features += added.features
        if added.pair and added.start:
            pairs_added.append(added.pair)
            starts.append(added.start)
        if added.term and number:
            raise ConfigError(f"scorers names '{scorer.kind}' twice; leave one of them out")
        terms += [added.term] if added.term else []
    if not (kept or pairs_added):
        kinds = ", ".join(f"'{scorer.kind}'" for scorer in config.scorers)
        raise ConfigError(
            f"train.epochs = 0 trains no tower, and scorers holds {kinds}, which add to other scores; name another "
            "scorer first, such as 'ials', or set train.epochs to 1 or more"
        )
    names = {f.name for f in features if known.get(f.name) == f}  # of prepared data, which have them
    own = schema.model_copy(update={"features": tuple(f for f in schema.features if f.name not in names)})
    pairs = [*(_explicit(pair, own) for pair in config.model.pairs if kept), *pairs_added]
    features = [*own.features, *features]
    if not config.train.epochs:
        read = {name for pair in pairs for tower in (pair.user, pair.item) for name in tower.fields}
        read |= {term.reads for term in terms}
        features = [f for f in features if not f.history or f.name in read]
    own_pairs = {"pairs": tuple(pairs)} if pairs_added or features != [*own.features] else {}
    # What is set stays apart from defaults, which the data may complete; so the whole is checked, and not read.
    train = {"train": config.train.model_copy(update={"start": tuple(starts)})} if pairs_added else {}
    changed = config.model_copy(
        update={"scorers": tuple(terms), "model": config.model.model_copy(update=own_pairs), **train}
    )
    whole = schema.model_copy(update={"features": tuple(features)})
    try:
        Config.model_validate(changed.model_dump())
        return Schema.model_validate(whole.model_dump()), changed
    except ValidationError as e:
        raise ConfigError(f"with the pairs of scorers: {first_problem(e)}") from None


def _explicit(pair: PairConfig, schema: Schema) -> PairConfig:
    """Return a pair whose towers name the features that they read."""
    towers = dict[str, TowerConfig]()
    for side in SIDES:
        tower = pair.user if side == "user" else pair.item
        names = tower.fields or tuple(f.name for f in schema.tower(side) if schema.host_of(f) is None)
        towers[side] = tower.model_copy(update={"fields": names})
    return pair.model_copy(update=towers)


def differing_options(experiments: Sequence[tuple[Schema, Config]]) -> dict[str, list[str]]:
    """Return the options with different values: the value in each experiment as JSON, by key; empty: no such option.

    The key of a section in a list is `side.name` if these differ, as for features, else its number."""
    flat = [
        dict(_flat("", config.model_dump(mode="json") | {"schema": schema.model_dump(mode="json")}))
        for schema, config in experiments
    ]
    keys = dict.fromkeys(key for values in flat for key in values)
    found = {key: [values.get(key, "") for values in flat] for key in keys}
    return {key: values for key, values in found.items() if len(set(values)) > 1}


def _flat(key: str, value: JsonValue) -> Iterator[tuple[str, str]]:
    """Yield the options below a key, with their values as JSON."""
    if isinstance(value, dict) and value:
        for name, below in value.items():
            yield from _flat(f"{key}.{name}" if key else name, below)
    elif isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
        sections = [one for one in value if isinstance(one, dict)]
        names = [f"{one['side']}.{one['name']}" if {"side", "name"} <= one.keys() else "" for one in sections]
        if not all(names) or len(set(names)) < len(names):
            names = [str(n) for n in range(len(sections))]
        for name, one in zip(names, sections, strict=True):
            yield from _flat(f"{key}.{name}", one)
    else:
        yield key, json.dumps(value, ensure_ascii=False)
