"""Inputs of towers: carriers of fields, layouts of codes, and their makers. One file a carrier."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

from twotower.features.field import InputField
from twotower.kinds import Kinds
from twotower.model.inputs.bag import BagCarrier
from twotower.model.inputs.carrier import Carrier
from twotower.model.inputs.dense import DenseCarrier
from twotower.model.inputs.lookup import LookupCarrier

__all__ = ["CARRIERS", "BagCarrier", "Carrier", "DenseCarrier", "LookupCarrier", "carrier", "stacked"]

CARRIERS = Kinds("carrier", Carrier, LookupCarrier, BagCarrier, DenseCarrier)
"""Kinds of carriers, by the names in `InputField.kind`."""


@cache
def carrier(kind: str) -> Carrier:
    """Return the carrier of a field's `kind`. Raises ConfigError for an unknown kind."""
    return CARRIERS.find(kind)()


def stacked(fields: Iterable[InputField]) -> list[InputField]:
    """Return the fields of one code a row, in the order of the columns of `Inputs.lookup`."""
    return [f for f in fields if carrier(f.kind).is_stacked]
