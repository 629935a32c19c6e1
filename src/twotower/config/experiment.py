"""The settings of an experiment, composed of the sections of the rooms, and the differences of several experiments."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Annotated

from pydantic import JsonValue

from twotower.data.config import DatasetConfig
from twotower.features.schema import Schema
from twotower.index import INDEXES
from twotower.index.auto import Auto
from twotower.index.protocol import IndexConfig
from twotower.train.recipe import Recipe


class Config(Recipe, DatasetConfig):
    """All settings without the schema: the dataset, the recipe of the model, and its index."""

    index: Annotated[IndexConfig, INDEXES] = Auto()


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
