"""Options in which several experiments differ."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from pydantic import JsonValue

from twotower.config.experiment import Config
from twotower.features.schema import Schema


def differing_options(experiments: Sequence[tuple[Schema, Config]]) -> dict[str, list[str]]:
    """Return the options whose values differ, by key, in the order of the sections: the value in each experiment as JSON, empty
    for one that lacks the option.

    The key of a list of sections has their names if each has one of its own, as features do, else their numbers."""
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
