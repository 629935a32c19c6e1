"""A search text as a request: the text of one column of the users or of the context."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import polars as pl

from twotower.errors import DataError, did_you_mean
from twotower.features.schema import Schema
from twotower.features.text import words
from twotower.retrieval.request import Json, Request


@dataclass(frozen=True)
class TextQuery:
    """A text for the text features that read one column of the users or of the context."""

    request: Request
    features: int
    """Number of features that read the column."""

    @classmethod
    def of(cls, text: str, schema: Schema, feature: str = "", context: Mapping[str, Json] | None = None) -> TextQuery:
        """Return the query of a text. `feature` names a text feature, required if they read several columns. `context` gives the
        other columns of the context.

        Raises DataError for an unknown feature, a text without a word, or users whose other features require a value.
        """
        if not isinstance(text, str):
            raise DataError(f"search: the text is {text!r}, expected text")
        column = _column_of(feature, schema)
        of_context = column in schema.context_columns()
        for f in schema.side("user"):
            if f.refuses_missing and (of_context or f.source != column):
                raise DataError(
                    f"search: feature '{f.name}' of the users has missing = 'error', so a text alone does not suffice; use "
                    "recommend, with features"
                )
        text = text.encode(errors="replace").decode()  # a lone surrogate is no letter
        if not len(words(pl.Series(column, [text]))[1]):
            raise DataError("search: the text holds no word, expected at least one letter or digit")
        reading = sum(f.source == column for f in schema.side("context" if of_context else "user"))
        given = dict(context or {})
        return cls(
            Request(context={**given, column: text}) if of_context else Request(features={column: text}, context=given),
            reading,
        )


def _column_of(name: str, schema: Schema) -> str:
    """Return the column of the text feature `name` of the user tower, or the column that all text features read."""
    columns = {f.name: f.source for f in schema.searchable()}
    if not columns:
        raise DataError(
            "search: the users and the context of this bundle have no text feature; train with a feature of kind = 'text', "
            "side = 'user' or 'context'"
        )
    if name and name not in columns:
        raise DataError(
            f"search: no text feature '{name}'{did_you_mean(name, columns)} (allowed: {', '.join(columns)})"
        )
    if not name and len(set(columns.values())) > 1:
        raise DataError(f"search: the users have {len(columns)} text features; name one of {', '.join(columns)}")
    return columns[name] if name else next(iter(columns.values()))
