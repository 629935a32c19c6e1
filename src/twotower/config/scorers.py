"""Scorers of a config as features of the schema, pairs of towers and terms."""

from __future__ import annotations

import re
from collections import Counter

from pydantic import ValidationError

from twotower.config.experiment import Config
from twotower.errors import ConfigError
from twotower.features.feature import Feature
from twotower.features.schema import Schema
from twotower.features.side import SIDES
from twotower.model.towers import TowerConfig
from twotower.model.two_tower import PairConfig
from twotower.scorers.scorer import TermScorer
from twotower.scorers.start import Start
from twotower.section import first_problem


def with_scorers(schema: Schema, config: Config) -> tuple[Schema, Config]:
    """Return a schema and a config in which pairs of towers and their starts stand for the scorers, but those without a
    pair, which have their features. The trained towers read what they read before. Raises ConfigError."""
    _check_written(schema, config)
    if not config.scorers:
        return schema, config
    known = {f.name: f for f in schema.features}
    kept = bool(config.train.epochs or config.train.solved)  # without epochs each pair has a closed form
    if not kept and "pairs" in config.model.model_fields_set:
        raise ConfigError(
            "train.epochs = 0 trains no tower, and model.pairs has some; leave model.pairs out, or set train.epochs "
            "to 1 or more"
        )
    features, added_pairs, counts = list[Feature](), list[PairConfig](), Counter[str]()
    solved, terms = list[Start](config.train.solved), list[TermScorer]()
    for scorer in config.scorers:
        counts[scorer.kind] += 1
        number = f"_{n}" if (n := counts[scorer.kind]) > 1 else ""
        name = "__" + re.sub(r"\W", "_", scorer.kind) + number
        added = scorer.addition(schema, name)
        features += added.features
        if added.pair and isinstance(scorer, Start):
            added_pairs.append(added.pair)
            solved.append(scorer)
        if added.term and number:
            raise ConfigError(f"scorers names '{scorer.kind}' twice; leave one of them out")
        terms += [added.term] if added.term else []
    if not (kept or added_pairs):
        kinds = ", ".join(f"'{scorer.kind}'" for scorer in config.scorers)
        raise ConfigError(
            f"train.epochs = 0 trains no tower, and scorers holds {kinds}, which add to other scores; name another "
            "scorer first, such as 'ials', or set train.epochs to 1 or more"
        )
    names = {f.name for f in features if known.get(f.name) == f}  # of prepared data, which have them
    own = schema.model_copy(update={"features": tuple(f for f in schema.features if f.name not in names)})
    pairs = [*(_explicit(pair, own) for pair in config.model.pairs if kept), *added_pairs]
    features = [*own.features, *features]
    if not config.train.epochs:
        read = {name for pair in pairs for tower in (pair.user, pair.item) for name in tower.fields}
        read |= {term.reads for term in terms}
        features = [f for f in features if not f.history or f.name in read]
    own_pairs = {"pairs": tuple(pairs)} if added_pairs or features != [*own.features] else {}
    # What is set stays apart from defaults, which the data may complete; so the whole is checked, and not read.
    train = {"train": config.train.model_copy(update={"solved": tuple(solved)})} if added_pairs else {}
    changed = config.model_copy(
        update={"scorers": tuple(terms), "model": config.model.model_copy(update=own_pairs), **train}
    )
    whole = schema.model_copy(update={"features": tuple(features)})
    try:
        Config.model_validate(changed.model_dump())
        return Schema.model_validate(whole.model_dump()), changed
    except ValidationError as e:
        raise ConfigError(f"with the pairs of scorers: {first_problem(e)}") from None


def _check_written(schema: Schema, config: Config) -> None:
    """Raise ConfigError if a pair of the closed forms of a config is not as `with_scorers` writes it."""
    for scorer, pair in zip(reversed(config.train.solved), reversed(config.model.pairs), strict=False):
        written = scorer.addition(schema, pair.user.fields[0] if pair.user.fields else "").pair
        if pair != written:
            raise ConfigError(
                f"train.solved is what a config has in place of its scorers, and '{scorer.kind}' has another pair of "
                f"towers; write scorers = [{{ kind = '{scorer.kind}' }}]"
            )


def _explicit(pair: PairConfig, schema: Schema) -> PairConfig:
    """Return a pair whose towers name the features that they read."""
    towers = dict[str, TowerConfig]()
    for side in SIDES:
        tower = pair.user if side == "user" else pair.item
        names = tower.fields or tuple(f.name for f in schema.tower(side) if schema.host_of(f) is None)
        towers[side] = tower.model_copy(update={"fields": names})
    return pair.model_copy(update=towers)
