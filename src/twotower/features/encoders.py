"""Encoders of all features, fitted on the training part: maps from table columns to numpy arrays.

encoders.json           states of the encoders, and the SHA-256 of the vocabularies
vocabularies.arrow      the vocabularies: one Arrow IPC file, a row with a list of values for each
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
from pydantic import BaseModel, JsonValue, ValidationError

from twotower import files
from twotower.arrays.ragged import Column, Ragged
from twotower.arrays.types import Codes, Ints
from twotower.errors import DataError, RunError, first_line
from twotower.features.categorical import CategoricalEncoder
from twotower.features.encoder import Encoder, Report
from twotower.features.feature import Feature, HistorySpec
from twotower.features.field import MEAN, InputField
from twotower.features.schema import Schema
from twotower.features.side import FEATURE_SIDES, SIDES, FeatureSide, SideName, other_side
from twotower.features.values import canonical_ids, missing_count
from twotower.files import layout
from twotower.files.readers import read_checked, read_text
from twotower.section import first_problem

EncodersBySide = dict[FeatureSide, dict[str, Encoder]]
VOCABULARY_TYPES = (pl.String, pl.Int64, pl.UInt64)


class Encoders:
    """Encoders of the features of both sides and the context, and of each side's ids for sequences."""

    def __init__(self, schema: Schema, by_side: EncodersBySide, ids: dict[SideName, CategoricalEncoder]) -> None:
        self.schema, self.by_side, self.ids = schema, by_side, ids

    @classmethod
    def fit(
        cls,
        schema: Schema,
        frames: Mapping[SideName, pl.DataFrame],
        counts: Mapping[SideName, Ints],
        context: Mapping[str, tuple[pl.Series, Ints]] = {},
    ) -> Encoders:
        """Fit all encoders to the rows with training interactions, whose numbers are `counts[side]` (rows,).

        `context` has by name the values of each context feature, with the training interactions of each value."""

        def column(feature: Feature) -> tuple[pl.Series, Ints]:
            if feature.side == "context":
                return context[feature.name]
            return frames[feature.side][feature.source], counts[feature.side]

        by_side = _empty()
        for f in _encoded(schema):
            series, n = column(f)
            borrowers = [column(b) for b in schema.tower(other_side(f.side)) if b.shares == f.name]
            if borrowers:
                columns = [series, *(borrowed for borrowed, _ in borrowers)]
                series = pl.concat([canonical_ids(c).cast(pl.String).rename(series.name) for c in columns])
                n = np.concatenate([n, *(of_borrower for _, of_borrower in borrowers)])
            by_side[f.side][f.name] = f.fit(series, n)
        ids = {side: CategoricalEncoder.fit(frames[side][schema.id_column(side)], counts[side]) for side in SIDES}
        return cls(schema, _with_borrowed(schema, by_side), ids)

    def with_schema(self, schema: Schema) -> Encoders:
        """Return the encoders with another schema of the same data."""
        return Encoders(schema, self.by_side, self.ids)

    def transform(self, side: FeatureSide, frame: pl.DataFrame, refuse: bool = True) -> dict[str, Column]:
        """Return the encoded columns of one side or of the context by feature name, without histories."""
        return {f.name: self.encode(f, frame[f.source], refuse) for f in self.schema.columns(side)}

    def encode(self, feature: Feature, series: pl.Series, refuse: bool = True) -> Column:
        """Encode the column of a feature that is no history. Raises DataError for unreadable values, and, if `refuse`,
        for missing values that the feature refuses."""
        if refuse and feature.refuses_missing and missing_count(series):
            raise DataError(
                f"column '{feature.source}': {missing_count(series)} of {len(series)} values are missing, "
                f"and feature '{feature.name}' has missing = 'error'; fill them or set missing = 'impute'"
            )
        return self.by_side[feature.side][feature.name].transform(series)

    def history_codes(self, history: HistorySpec, other: pl.DataFrame) -> Codes:
        """Return the code of every row of the other side's table in the embedding table of the history."""
        read = self._history_feature(history)
        column = read.source if read else self.schema.id_column(other_side(history.side))
        codes = self._history_encoder(history).transform(other[column])
        assert not isinstance(codes, Ragged)
        return codes.astype(np.int32, copy=False)

    def _history_feature(self, history: HistorySpec) -> Feature | None:
        """Return the feature of the other side that gives the codes of a history; None for a code for each id."""
        if not (history.feature or history.share_embedding):
            return None
        return self.schema.code_feature(other_side(history.side), history.feature)

    def _history_encoder(self, history: HistorySpec) -> Encoder:
        other, read = other_side(history.side), self._history_feature(history)
        return self.by_side[other][read.name] if read else self.ids[other]

    def fields(self, side: SideName) -> tuple[InputField, ...]:
        """Return the fields of the tower of `side`, in the schema's order."""
        return tuple(self._field(f) for f in self.schema.tower(side))

    def _field(self, feature: Feature) -> InputField:
        host = self.schema.host_of(feature)
        if own := feature.own_field(self.schema):
            return replace(own, added_to=host.name, pooling=host.pools or MEAN) if host else own
        if feature.history:
            encoder, read = self._history_encoder(feature.history), self._history_feature(feature.history)
            shares = read.name if read and feature.history.share_embedding else ""
        else:
            encoder, shares = self.by_side[feature.side][feature.name], feature.shares
        identifies = feature.side != "context" and feature == self.schema.id_feature(feature.side)
        field = replace(feature.field(encoder), share_with=shares, identifies=identifies)
        return replace(field, added_to=host.name, pooling=host.pools or MEAN) if host else field

    def reports(self, side: SideName, frame: pl.DataFrame, rows: Ints) -> dict[str, Report]:
        """Return the reports of the encoders of one side over some rows of its table, by feature name."""
        reporting = [(f, e) for f in self.schema.columns(side) if (e := self.by_side[side][f.name]).reports]
        return {f.name: report for f, e in reporting if (report := e.report(frame[f.source][rows]))}

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
        by_side = _empty()
        try:
            for f in _encoded(schema):
                state, vocabulary = states.sides[f.side][f.name], vocabularies.get(f"{f.side}.{f.name}")
                by_side[f.side][f.name] = f.encoder.restore(state, vocabulary)
            ids = {side: CategoricalEncoder(vocabularies[f"ids.{side}"]) for side in SIDES}
        except (KeyError, ValidationError) as e:
            raise RunError(f"{folder / layout.ENCODERS}: {_misfit(e)}") from e
        return cls(schema, _with_borrowed(schema, by_side), ids)

    @property
    def digest(self) -> str:
        """SHA-256 of all states and vocabularies, the same with every version of polars."""
        return _digest(self._states(), self._vocabularies())

    @property
    def digest_of_codes(self) -> str:
        """SHA-256 of the meaning of all codes, which are rows of embedding tables."""
        read = dict[str, Encoder]()
        for side in SIDES:
            for f, field in zip(self.schema.tower(side), self.fields(side), strict=True):
                found = self._history_encoder(f.history) if f.history else self.by_side[f.side].get(f.name)
                if field.rows and found:
                    read[f"{side}.{f.name}"] = found
        vocabularies = {name: encoder.stored_vocabulary() for name, encoder in read.items()}
        states = {name: encoder.state().model_dump() for name, encoder in read.items()}
        return _digest(states, {name: values for name, values in vocabularies.items() if values is not None})

    def _states(self) -> dict[str, dict[str, JsonValue]]:
        """Return the encoder states by side and feature."""
        states: dict[str, dict[str, JsonValue]] = {side: {} for side in SIDES}
        for f in _encoded(self.schema):
            states.setdefault(f.side, {})[f.name] = self.by_side[f.side][f.name].state().model_dump()
        return states

    def _vocabularies(self) -> dict[str, pl.Series]:
        """Return the vocabularies by their column in the file."""
        own = {f"{f.side}.{f.name}": self.by_side[f.side][f.name] for f in _encoded(self.schema)}
        every = own | {f"ids.{side}": encoder for side, encoder in self.ids.items()}
        stored = {name: encoder.stored_vocabulary() for name, encoder in every.items()}
        return {name: vocabulary for name, vocabulary in stored.items() if vocabulary is not None}


def _digest(states: Mapping[str, files.JsonData], vocabularies: Mapping[str, pl.Series]) -> str:
    digest = hashlib.sha256(json.dumps(states, ensure_ascii=False).encode())
    for values in vocabularies.values():
        text = values.cast(pl.String)
        digest.update(f"{values.dtype} {len(values)}".encode())
        digest.update(text.str.len_bytes().to_numpy().tobytes())
        digest.update((text.str.join()[0] or "").encode())
    return digest.hexdigest()


class _EncoderStates(BaseModel):
    """Content of encoders.json."""

    sides: dict[FeatureSide, dict[str, JsonValue]]
    vocabularies: str
    """SHA-256 of the file of vocabularies."""


def _read_states(path: Path) -> _EncoderStates:
    try:
        return _EncoderStates.model_validate(json.loads(read_text(path)))
    except (ValueError, RecursionError) as e:
        raise RunError(_misfit(e)) from e


def _misfit(error: Exception) -> str:
    what = f"{type(error).__name__}: {first_line(error)}"
    if isinstance(error, ValidationError):
        what = first_problem(error)
    return f"the encoders do not fit the schema of this run ({what})"


def _encoded(schema: Schema) -> tuple[Feature, ...]:
    """Return the features with an encoder of their own, which is stored."""
    return tuple(f for side in FEATURE_SIDES for f in schema.columns(side) if not f.shares)


def _empty() -> EncodersBySide:
    return {side: {} for side in FEATURE_SIDES}


def _with_borrowed(schema: Schema, by_side: EncodersBySide) -> EncodersBySide:
    """Add the encoders of features that share one of the other tower; return `by_side`."""
    for f in schema.features:
        if f.shares:
            lender = next(g for g in schema.tower(other_side(f.side)) if g.name == f.shares)
            by_side[f.side][f.name] = f.borrow(by_side[lender.side][lender.name])
    return by_side


def write_vocabularies(vocabularies: Mapping[str, pl.Series]) -> bytes:
    """Return the file content of vocabularies by name."""
    buffer = io.BytesIO()
    pl.DataFrame({name: [values] for name, values in vocabularies.items()}).write_ipc(buffer)
    return buffer.getvalue()


def read_vocabularies(data: bytes) -> dict[str, pl.Series]:
    """Return the vocabularies by name. Raises ValueError for values of another type, and polars' errors."""
    frame = pl.read_ipc(io.BytesIO(data))
    found: dict[str, pl.Series] = {}
    for column in frame:
        values = column[0] if frame.height == 1 and isinstance(column.dtype, pl.List) else None
        if not isinstance(values, pl.Series) or values.dtype not in VOCABULARY_TYPES or values.null_count():
            raise ValueError(
                f"column '{column.name}' of {frame.height} rows is {column.dtype}, expected one list of values"
            )
        found[column.name] = values.alias("value")
    return found
