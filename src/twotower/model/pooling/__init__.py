"""Poolings: maps from the embeddings of a field of many codes to one vector or several. One file a kind or family."""

from __future__ import annotations

from pydantic import ValidationError

from twotower.errors import ConfigError
from twotower.features.field import PoolingSpec
from twotower.features.schema import Schema
from twotower.kinds import Kinds
from twotower.model.pooling.attention import Attention
from twotower.model.pooling.decay import Decay
from twotower.model.pooling.pooling import Pooling
from twotower.model.pooling.ridge import Ridge
from twotower.model.pooling.sum import Mean, Power, Sqrt, Sum
from twotower.model.pooling.transformer import Transformer

__all__ = [
    "POOLINGS", "Attention", "Decay", "Mean", "Pooling", "Power", "Ridge", "Sqrt", "Sum", "Transformer",
    "check_poolings", "resolve",
]  # fmt: skip

POOLINGS = Kinds("pooling", Pooling, Mean, Sqrt, Sum, Power, Ridge, Decay, Attention, Transformer)
"""Kinds of poolings, by their names in a config."""


def resolve(spec: PoolingSpec, trust: bool = False) -> Pooling:
    """Return the pooling of a choice. `trust` imports the module of an import path. Raises ConfigError."""
    given = spec.model_dump(exclude=None if spec.window else {"window"})
    if spec.window and not POOLINGS.find(spec.kind, trust).reads_windows:
        raise ConfigError(
            f"pooling: pooling '{spec.kind}' reads the whole history; leave out window, or set max_length"
        )
    try:
        return POOLINGS.parse(given, trust)
    except ValidationError as e:
        first = e.errors(include_url=False, include_input=False)[0]
        path = ".".join(["pooling", *map(str, first["loc"])])
        raise ConfigError(f"{path}: {first['msg'].removeprefix('Value error, ')}") from None


def check_poolings(schema: Schema, trust: bool = False, before: str = "") -> None:
    """Raise ConfigError, with `before` in front, for a pooling that is unknown, invalid, or lacks an order."""
    for i, f in enumerate(schema.features):
        if f.pools is None:
            continue
        where = f"{before}schema.features.{i}.pooling"
        try:
            pooling = resolve(f.pools, trust)
        except ConfigError as e:
            raise ConfigError(f"{before}schema.features.{i}.{e}") from None
        if pooling.in_order and not f.history:
            free = [kind.kind for kind in POOLINGS if not kind.needs_time_order and not kind.reads_windows]
            raise ConfigError(
                f"{where}: '{f.name}' is no history, and the pooling '{pooling.kind}' needs the order of time "
                f"(allowed: {', '.join(free)})"
            )
