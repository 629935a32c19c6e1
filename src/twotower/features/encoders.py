"""Encoders: each kind of feature has one, fitted on the train part, which maps table columns to numpy arrays.

`Encoders` holds the encoders of all features and is written as JSON. The module does not depend on torch.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any, cast

import polars as pl

from twotower.arrays.ragged import Column
from twotower.arrays.types import Codes, Ints
from twotower.errors import DataError, RunError, first_line
from twotower.features.categorical import CategoricalEncoder
from twotower.features.field import InputField
from twotower.features.multi_hot import MultiHotEncoder
from twotower.features.numeric import NumericEncoder
from twotower.features.schema import (
    SIDES,
    Categorical,
    Feature,
    MultiHot,
    Numeric,
    Schema,
    Sequence,
    SideName,
    Text,
    Vector,
)
from twotower.features.text import TextEncoder
from twotower.features.values import missing_count
from twotower.features.vector import VectorEncoder

Encoder = CategoricalEncoder | NumericEncoder | MultiHotEncoder | VectorEncoder | TextEncoder
_KINDS: dict[str, type[Encoder]] = {
    "categorical": CategoricalEncoder,
    "numeric": NumericEncoder,
    "multi_hot": MultiHotEncoder,
    "vector": VectorEncoder,
    "text": TextEncoder,
}


class Encoders:
    """The encoders of all features of both sides, and of each side's ids for sequences."""

    def __init__(
        self,
        schema: Schema,
        by_side: dict[SideName, dict[str, Encoder]],
        ids: dict[SideName, CategoricalEncoder],
    ) -> None:
        self.schema, self.by_side, self.ids = schema, by_side, ids

    @classmethod
    def fit(cls, schema: Schema, frames: Mapping[SideName, pl.DataFrame], counts: Mapping[SideName, Ints]) -> Encoders:
        """Fit all encoders. `counts[side]` (rows,) are the training interactions of each row; rows without any are not
        used."""
        by_side: dict[SideName, dict[str, Encoder]] = {}
        ids: dict[SideName, CategoricalEncoder] = {}
        for side in SIDES:
            frame, n = frames[side], counts[side]
            by_side[side] = {
                f.name: _fit(f, frame[f.source], n) for f in schema.side(side) if not isinstance(f, Sequence | Text)
            }
            other = _other(side)
            for text in schema.texts(side):
                if not text.share_with:
                    borrowers = [f for f in schema.texts(other) if f.share_with == text.name]
                    columns = [(frame[text.source], n), *((frames[other][f.source], counts[other]) for f in borrowers)]
                    by_side[side][text.name] = TextEncoder.fit(columns, text)
            ids[side] = CategoricalEncoder.fit(frame[schema.id_column(side)], n)
        return cls(schema, _with_shared_texts(schema, by_side), ids)

    def transform(self, side: SideName, frame: pl.DataFrame) -> dict[str, Column]:
        """Return the encoded columns of one side by feature name, without the sequences."""
        features = [f for f in self.schema.side(side) if not isinstance(f, Sequence)]
        return {f.name: self.encode(f, frame[f.source]) for f in features}

    def encode(self, feature: Feature, series: pl.Series) -> Column:
        """Encode the column of a feature that is no sequence. Raises DataError for values that it cannot read."""
        if feature.missing == "error" and missing_count(series):
            raise DataError(
                f"column '{feature.source}': {missing_count(series)} of {len(series)} values are missing, "
                f"and feature '{feature.name}' has missing = 'error'; fill them or set missing = 'impute'"
            )
        return self.by_side[feature.side][feature.name].transform(series)

    def sequence_codes(self, feature: Sequence, other_ids: pl.Series) -> Codes:
        """Return the code of every row of the other side in the sequence's embedding table."""
        return self._sequence_encoder(feature)[0].transform(other_ids)

    def _sequence_encoder(self, feature: Sequence) -> tuple[CategoricalEncoder, str]:
        """Return the encoder of a sequence's values, and the feature of the other side that has this encoder, '' for none."""
        other = _other(feature.side)
        shared = self.schema.id_feature(other) if feature.share_embedding else None
        if shared is None:
            return self.ids[other], ""
        return cast(CategoricalEncoder, self.by_side[other][shared.name]), shared.name

    def fields(self, side: SideName) -> tuple[InputField, ...]:
        """Return the fields that the tower of `side` embeds, in the schema's order."""
        return tuple(self._field(f) for f in self.schema.side(side))

    def _field(self, feature: Feature) -> InputField:
        name, width = feature.name, feature.width
        if isinstance(feature, Sequence):
            encoder_of_values, shares = self._sequence_encoder(feature)
            decays = feature.pooling == "decay"
            limit = feature.max_length if feature.attends else 0
            return InputField(
                name, "bag", rows=encoder_of_values.rows, width=width, pooling=feature.pooling,
                rates=feature.rates if decays else (), limit=limit, sequence=True, share_with=shares,
            )  # fmt: skip
        encoder = self.by_side[feature.side][name]
        if isinstance(encoder, CategoricalEncoder):
            identifies = feature == self.schema.id_feature(feature.side)
            return InputField(name, "lookup", rows=encoder.rows, width=width, identifies=identifies)
        if isinstance(encoder, MultiHotEncoder):
            return InputField(name, "bag", rows=encoder.rows, width=width)
        if isinstance(encoder, TextEncoder):
            assert isinstance(feature, Text)
            return InputField(
                name, "bag", rows=encoder.rows, width=width, pooling=feature.pooling, share_with=feature.share_with
            )
        if isinstance(encoder, NumericEncoder):
            if encoder.buckets:
                return InputField(name, "lookup", rows=len(encoder.edges) + 2, width=width)
            return InputField(name, "dense", length=1, width=width)
        return InputField(name, "dense", length=encoder.length, width=width)

    def to_json(self) -> str:
        return json.dumps(
            {
                "sides": {
                    s: {f.name: self.by_side[s][f.name].state() for f in self.schema.side(s) if _keeps_state(f)}
                    for s in SIDES
                },
                "ids": {s: e.state() for s, e in self.ids.items()},
            },
            ensure_ascii=False,
        )

    @classmethod
    def from_json(cls, schema: Schema, text: str) -> Encoders:
        try:
            data = _parsed(schema, text)
            by_side: dict[SideName, dict[str, Encoder]] = {
                s: {f.name: _KINDS[f.kind].restore(data["sides"][s][f.name]) for f in schema.side(s) if _keeps_state(f)}
                for s in SIDES
            }
            ids = {s: CategoricalEncoder.restore(data["ids"][s]) for s in SIDES}
        except (
            KeyError, TypeError, ValueError, OverflowError, RecursionError, AttributeError, pl.exceptions.PolarsError
        ) as e:  # fmt: skip
            raise RunError(
                f"the encoders do not fit the schema of this run ({type(e).__name__}: {first_line(e)})"
            ) from e
        return cls(schema, _with_shared_texts(schema, by_side), ids)

    def text(self, side: SideName, name: str) -> TextEncoder:
        """Return the encoder of a text feature."""
        return cast(TextEncoder, self.by_side[side][name])


_VOCABULARY = pl.Struct({"type": pl.String, "values": pl.List(pl.String), "hash_buckets": pl.Int64})
_STATES: dict[str, pl.DataType] = {
    "categorical": _VOCABULARY,
    "numeric": pl.Struct(
        {"mean": pl.Float64, "deviation": pl.Float64, "edges": pl.List(pl.Float64), "buckets": pl.Int64}
    ),
    "multi_hot": pl.Struct({"separator": pl.String, "values": _VOCABULARY}),
    "vector": pl.Struct({"length": pl.Int64, "scale": pl.Float64}),
    "text": pl.Struct({"n": pl.Int64, "max_length": pl.Int64, "values": _VOCABULARY}),
}


def _parsed(schema: Schema, text: str) -> Any:
    """Return the JSON with vocabularies as columns, parsed by polars without holding the interpreter's lock."""
    sides = {s: {f.name: _STATES[f.kind] for f in schema.side(s) if _keeps_state(f)} for s in SIDES}
    dtype = {
        "sides": pl.Struct({s: pl.Struct(states) for s, states in sides.items() if states}),
        "ids": pl.Struct(dict.fromkeys(SIDES, _VOCABULARY)),
    }
    try:
        return _first(pl.read_json(io.BytesIO(text.encode()), schema=dtype).to_struct())
    except (pl.exceptions.PolarsError, ValueError, IndexError):
        return json.loads(text)  # its errors are more precise, and it accepts a NaN


def _first(column: pl.Series) -> Any:
    """Return the first value, a struct as a dict and a list as a column. Raises ValueError for a missing value in it."""
    if isinstance(column.dtype, pl.Struct):
        return {name: _first(column.struct.field(name)) for name in column.struct.fields}
    value = column[0]
    if value is None or (isinstance(value, pl.Series) and value.null_count()):
        raise ValueError(f"no {column.name}")
    return value


def _other(side: SideName) -> SideName:
    return "item" if side == "user" else "user"


def _keeps_state(feature: Feature) -> bool:
    """Return True if the feature has an encoder of its own, which is written to disk."""
    return not isinstance(feature, Sequence) and not (isinstance(feature, Text) and feature.share_with)


def _with_shared_texts(
    schema: Schema, by_side: dict[SideName, dict[str, Encoder]]
) -> dict[SideName, dict[str, Encoder]]:
    """Add the encoders of text features that share the grams of the other side, and return `by_side`."""
    for side in SIDES:
        for f in schema.texts(side):
            if f.share_with:
                owner = cast(TextEncoder, by_side[_other(side)][f.share_with])
                by_side[side][f.name] = TextEncoder(owner.values, owner.n, f.max_length)
    return by_side


def _fit(feature: Feature, series: pl.Series, counts: Ints) -> Encoder:
    if isinstance(feature, Categorical):
        return CategoricalEncoder.fit(series, counts, feature.min_count, feature.min_rate, feature.hash_buckets)
    if isinstance(feature, Numeric):
        return NumericEncoder.fit(series, counts > 0, feature.buckets)
    if isinstance(feature, MultiHot):
        return MultiHotEncoder.fit(series, counts, feature)
    assert isinstance(feature, Vector)
    return VectorEncoder.fit(series, counts > 0, feature.length)
