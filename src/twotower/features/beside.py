"""Sequences of the same interactions, whose embeddings are added up before they are pooled."""

from __future__ import annotations

from typing import TYPE_CHECKING

from twotower.errors import did_you_mean
from twotower.features.pooling_spec import MEAN

if TYPE_CHECKING:
    from twotower.features.feature import Feature
    from twotower.features.schema import Schema


def host_of(feature: Feature, schema: Schema) -> Feature | None:
    """Return the sequence that a sequence stands beside, None if it is pooled on its own."""
    return next((f for f in schema.side(feature.side) if feature.history and feature.name in f.holds_beside), None)


def check_beside(host: Feature, schema: Schema) -> None:
    """Raise ValueError unless the sequences beside a sequence hold the same interactions, in embeddings of the same width, and
    stand beside no other."""
    sequences = {f.name: f for f in schema.side(host.side) if f.history}
    for name in host.holds_beside:
        where = f"sequence {host.name!r} has {name!r} beside it"
        beside = sequences.get(name)
        if beside is None or beside is host:
            others = [n for n in sequences if n != host.name]
            raise ValueError(
                f"{where}, which is no other sequence of the {host.side}s{did_you_mean(name, others)} (found: "
                f"{', '.join(others) or 'none'}); name one of them, or add it"
            )
        if host.holds_beside.count(name) > 1:
            raise ValueError(f"{where} twice; name it once")
        if (first := host_of(beside, schema)) is not host:
            assert first is not None
            raise ValueError(
                f"{where}, which stands beside {first.name!r} already; add another sequence of the same feature"
            )
        if beside.holds_beside:
            raise ValueError(f"{where}, which has sequences beside it of its own; name them in {host.name!r}")
        if beside.pools != MEAN:
            raise ValueError(f"{where}, which is not pooled on its own; leave out the pooling of {name!r}")
        if beside.width != host.width:
            raise ValueError(f"{where}, of width {beside.width} and not {host.width}; give both the same width")
        a, b = host.history, beside.history
        assert a is not None
        assert b is not None
        for option, own, other in (
            ("interactions", a.interactions, b.interactions),
            ("max_length", a.max_length, b.max_length),
        ):
            if own != other:
                raise ValueError(
                    f"{where}, whose {option} is {other!r} and not {own!r}; give both the same interactions"
                )
