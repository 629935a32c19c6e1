"""Refusal of starts that do not go with the tables, with what to leave out of the config in their place."""

from __future__ import annotations

from collections.abc import Sequence

from twotower.data.dataset import Dataset
from twotower.errors import ConfigError, listed
from twotower.features.schema import Schema
from twotower.features.side import SIDES
from twotower.train.recipe import Recipe
from twotower.train.starts.start import Start


def check_starts_fit(dataset: Dataset, recipe: Recipe) -> None:
    """Raise ConfigError, which names the entries to leave out, if items have versions, which no closed form knows, or
    if the blend of a start is fitted to pairs whose vectors depend on the context."""
    schema, starts = dataset.schema, recipe.train.start
    if starts and dataset.items.versions is not None:
        refused = f"train.start of kind {_kinds(starts)} does not go with schema.valid_from of items"
        if not recipe.train.epochs:
            raise ConfigError(
                f"{refused}, and train.epochs = 0 trains nothing else; leave out schema.valid_from, or use a recipe "
                "that is trained: cold-start, which reads columns of items, or sequence-short"
            )
        raise ConfigError(f"{refused}; {_leave_out(starts, recipe, schema)}, or leave out schema.valid_from")
    context = [f"'{f.name}'" for f in schema.side("context")]
    if recipe.last_starts and context:
        raise ConfigError(
            f"train.start of kind {_kinds(recipe.last_starts)} has blend and learn = false, a weight relative to "
            "trained pairs, and their vectors depend on the context; give scale in its place, or "
            f"{_leave_out(recipe.last_starts, recipe, schema)}, or leave out {_features(context)} of the context"
        )


def _leave_out(starts: Sequence[Start], recipe: Recipe, schema: Schema) -> str:
    """Return advice to leave out starts, the pairs of those that no step trains, and the features that these pairs
    alone read."""
    places = [place for place, start in enumerate(recipe.train.start) if start in starts]
    gone = sorted(start.pair for start in starts if not start.learn)
    entries = [*(f"train.start.{place}" for place in places), *(f"model.pairs.{pair}" for pair in gone)]
    if own := _read_alone(gone, recipe, schema):
        entries.append(_features([f"'{name}'" for name in own]))
    advice = f"leave out {listed(entries)}"
    for start in recipe.train.start:
        shift = sum(pair < start.pair for pair in gone)
        if start not in starts and shift:
            advice += f", name pair {start.pair - shift} in the start of kind '{start.kind}'"
    if recipe.train.pairs == "apart" and len(recipe.model.pairs) - len(gone) == 1:
        advice += ", set train.pairs = 'together'"
    return advice


def _read_alone(gone: Sequence[int], recipe: Recipe, schema: Schema) -> list[str]:
    """Return the names of the features of columns and histories that the towers of some pairs read, and nothing
    else."""
    found = list[str]()
    for side in SIDES:
        features = schema.tower(side)
        read: list[set[str]] = []
        for pair in recipe.model.pairs:
            tower = pair.user if side == "user" else pair.item
            read.append({*(tower.fields or (f.name for f in features))})
        others = {name for place, names in enumerate(read) if place not in gone for name in names}
        others |= {f.shares for f in schema.features} | {recipe.model.own_counts}
        own = {name for place in gone for name in read[place]} - others
        found += [f.name for f in features if f.name in own]
    return found


def _features(names: Sequence[str]) -> str:
    return f"the feature{'s' if len(names) > 1 else ''} {listed(names)}"


def _kinds(starts: Sequence[Start]) -> str:
    return listed([f"'{kind}'" for kind in dict.fromkeys(start.kind for start in starts)])
