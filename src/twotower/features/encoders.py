"""Encoders: each kind of feature has one, fitted on the train part, which maps table columns to numpy arrays.

encoders.json           states of the encoders, and the SHA-256 of the vocabularies
vocabularies.arrow      the vocabularies, as one Arrow IPC file

The module does not depend on torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import polars as pl
from pydantic import BaseModel, JsonValue, ValidationError

from twotower import files
from twotower.arrays.ragged import Column
from twotower.arrays.types import Codes, Ints
from twotower.errors import DataError, RunError, first_line
from twotower.features.categorical import CategoricalEncoder
from twotower.features.field import InputField
from twotower.features.multi_hot import MultiHotEncoder
from twotower.features.numeric import NumericEncoder
from twotower.features.schema import Categorical, Feature, MultiHot, Numeric, Schema, Sequence, Text, Vector
from twotower.features.side import SIDES, SideName, other_side
from twotower.features.state import read_vocabularies, write_vocabularies
from twotower.features.text import TextEncoder
from twotower.features.values import missing_count
from twotower.features.vector import VectorEncoder
from twotower.files import layout
from twotower.files.readers import read_checked, read_text
from twotower.section import first_problem

Encoder = CategoricalEncoder | NumericEncoder | MultiHotEncoder | VectorEncoder | TextEncoder
_WITHOUT_VOCABULARY: dict[str, type[NumericEncoder | VectorEncoder]] = {
    "numeric": NumericEncoder,
    "vector": VectorEncoder,
}
_WITH_VOCABULARY: dict[str, type[CategoricalEncoder | MultiHotEncoder | TextEncoder]] = {
    "categorical": CategoricalEncoder,
    "multi_hot": MultiHotEncoder,
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
            other = other_side(side)
            for text in schema.texts(side):
                if not text.share_with:
                    borrowers = [f for f in schema.texts(other) if f.share_with == text.name]
                    columns = [(frame[text.source], n), *((frames[other][f.source], counts[other]) for f in borrowers)]
                    by_side[side][text.name] = TextEncoder.fit(columns, text)
            ids[side] = CategoricalEncoder.fit(frame[schema.id_column(side)], n)
        return cls(schema, _with_shared_texts(schema, by_side), ids)

    def with_schema(self, schema: Schema) -> Encoders:
        """Return the encoders with another schema of the same data."""
        return Encoders(schema, self.by_side, self.ids)

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
        other = other_side(feature.side)
        shared = self.schema.id_feature(other) if feature.share_embedding else None
        if shared is None:
            return self.ids[other], ""
        encoder = self.by_side[other][shared.name]
        assert isinstance(encoder, CategoricalEncoder)
        return encoder, shared.name

    def fields(self, side: SideName) -> tuple[InputField, ...]:
        """Return the fields that the tower of `side` embeds, in the schema's order."""
        return tuple(self._field(f) for f in self.schema.side(side))

    def _field(self, feature: Feature) -> InputField:
        name, width = feature.name, feature.width
        if isinstance(feature, Sequence):
            encoder_of_values, shares = self._sequence_encoder(feature)
            return InputField(
                name, "bag", rows=encoder_of_values.rows, width=width, pooling=feature.pooling,
                sequence=True, share_with=shares,
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

    # Files

    def save(self, folder: Path) -> None:
        """Write encoders.json, then the vocabularies, into a folder."""
        vocabularies = write_vocabularies(self._vocabularies())
        about = {"sides": self._states(), "vocabularies": hashlib.sha256(vocabularies).hexdigest()}
        files.write(folder / layout.ENCODERS, json.dumps(about, ensure_ascii=False))
        files.write(folder / layout.VOCABULARIES, vocabularies)

    @classmethod
    def load(cls, schema: Schema, folder: Path) -> Encoders:
        """Read the files of `save`. Raises RunError if one is missing, damaged or does not fit the schema."""
        states = read_checked(folder / layout.ENCODERS, _read_states)
        data = read_checked(folder / layout.VOCABULARIES, Path.read_bytes)
        if hashlib.sha256(data).hexdigest() != states.vocabularies:
            raise RunError(f"{folder / layout.VOCABULARIES}: damaged, or of another {layout.ENCODERS} (checksum)")
        vocabularies = read_checked(folder / layout.VOCABULARIES, lambda path: read_vocabularies(data))
        by_side: dict[SideName, dict[str, Encoder]] = {"user": {}, "item": {}}
        try:
            for side, f in _own_features(schema):
                by_side[side][f.name] = _restored(f, states.sides[side][f.name], vocabularies)
            ids = {side: CategoricalEncoder(vocabularies[f"ids.{side}"]) for side in SIDES}
        except (KeyError, ValidationError) as e:
            raise RunError(f"{folder / layout.ENCODERS}: {_misfit(e)}") from e
        return cls(schema, _with_shared_texts(schema, by_side), ids)

    @property
    def digest(self) -> str:
        """SHA-256 of all states and vocabularies, the same with every version of polars."""
        digest = hashlib.sha256(json.dumps(self._states(), ensure_ascii=False).encode())
        for values in self._vocabularies().values():
            text = values.cast(pl.String)
            digest.update(f"{values.dtype} {len(values)}".encode())
            digest.update(text.str.len_bytes().to_numpy().tobytes())
            digest.update((text.str.join()[0] or "").encode())
        return digest.hexdigest()

    def _states(self) -> dict[str, dict[str, JsonValue]]:
        """Return the states of the encoders by side and feature."""
        states: dict[str, dict[str, JsonValue]] = {side: {} for side in SIDES}
        for side, f in _own_features(self.schema):
            states[side][f.name] = self.by_side[side][f.name].state().model_dump()
        return states

    def _vocabularies(self) -> dict[str, pl.Series]:
        """Return the vocabularies by the name of their column in the file."""
        own = ((f"{side}.{f.name}", self.by_side[side][f.name]) for side, f in _own_features(self.schema))
        found = {name: e.vocabulary for name, e in own if not isinstance(e, NumericEncoder | VectorEncoder)}
        return found | {f"ids.{side}": encoder.vocabulary for side, encoder in self.ids.items()}

    def text(self, side: SideName, name: str) -> TextEncoder:
        """Return the encoder of a text feature."""
        return _text_encoder(self.by_side[side], name)


class _EncoderStates(BaseModel):
    """Content of encoders.json."""

    sides: dict[SideName, dict[str, JsonValue]]
    vocabularies: str
    """SHA-256 of the file of vocabularies."""


def _read_states(path: Path) -> _EncoderStates:
    try:
        return _EncoderStates.model_validate(json.loads(read_text(path)))
    except (ValueError, RecursionError) as e:
        raise RunError(_misfit(e)) from e


def _misfit(error: Exception) -> str:
    what = (
        first_problem(error) if isinstance(error, ValidationError) else f"{type(error).__name__}: {first_line(error)}"
    )
    return f"the encoders do not fit the schema of this run ({what})"


def _restored(feature: Feature, state: JsonValue, vocabularies: dict[str, pl.Series]) -> Encoder:
    if feature.kind in _WITHOUT_VOCABULARY:
        return _WITHOUT_VOCABULARY[feature.kind].restore(state)
    return _WITH_VOCABULARY[feature.kind].restore(state, vocabularies[f"{feature.side}.{feature.name}"])


def _own_features(schema: Schema) -> Iterator[tuple[SideName, Feature]]:
    """Yield side and feature of each feature that has an encoder of its own, which is written to disk."""
    for side in SIDES:
        for f in schema.side(side):
            if not isinstance(f, Sequence) and not (isinstance(f, Text) and f.share_with):
                yield side, f


def _with_shared_texts(
    schema: Schema, by_side: dict[SideName, dict[str, Encoder]]
) -> dict[SideName, dict[str, Encoder]]:
    """Add the encoders of text features that share the grams of the other side, and return `by_side`."""
    for side in SIDES:
        for f in schema.texts(side):
            if f.share_with:
                owner = _text_encoder(by_side[other_side(side)], f.share_with)
                by_side[side][f.name] = TextEncoder(owner.values, owner.n, f.max_length)
    return by_side


def _text_encoder(encoders: Mapping[str, Encoder], name: str) -> TextEncoder:
    found = encoders[name]
    assert isinstance(found, TextEncoder)
    return found


def _fit(feature: Feature, series: pl.Series, counts: Ints) -> Encoder:
    if isinstance(feature, Categorical):
        return CategoricalEncoder.fit(series, counts, feature.min_count, feature.min_rate, feature.hash_buckets)
    if isinstance(feature, Numeric):
        return NumericEncoder.fit(series, counts > 0, feature.buckets)
    if isinstance(feature, MultiHot):
        return MultiHotEncoder.fit(series, counts, feature)
    assert isinstance(feature, Vector)
    return VectorEncoder.fit(series, counts > 0, feature.length)
