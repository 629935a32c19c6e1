"""Section of the form of text files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from twotower.errors import ConfigError
from twotower.section import Section, first_problem

SEPARATORS = (",", ";", "\t", "|", "::")
SPACE = " "
"""Separators that the message about a file of another separator names."""


class TextFormat(Section):
    """Form of the text files of the data (.csv, .tsv, .txt), gzipped or not."""

    separator: str = Field(
        "",
        description="Character between the values, in the files of all tables. Empty: a comma in .csv files, a tab in "
        ".tsv, a space in .txt.",
    )
    columns: tuple[str, ...] = Field(
        (),
        description="Names of the columns of the interactions, in order, for files without a header line. Empty: the first "
        "line names them.",
    )

    layout: Literal["rows", "sequences"] = Field(
        "rows",
        description="Content of a line of the interactions. rows: one interaction. sequences: a user and the user's items, oldest "
        "first, without a header line; schema.time, if set, names the column of their order (schema.time_unit = 'order').",
    )

    @field_validator("separator")
    @classmethod
    def _one_character(cls, value: str) -> str:
        if value and (len(value.encode()) != 1 or value in '"\r\n'):
            raise ValueError(f"separator {value!r} is not one ASCII character; replace it in the files by a tab")
        return value

    @field_validator("columns")
    @classmethod
    def _once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "" in value or len({*value}) < len(value):
            raise ValueError(f"columns: {[*value]} has an empty or repeated name; give each column its own")
        return value

    @model_validator(mode="after")
    def _check(self) -> TextFormat:
        if self.columns and self.layout != "rows":
            raise ValueError(f"columns goes with layout = 'rows', not '{self.layout}'; leave it out")
        return self

    @classmethod
    def of_table(cls, separator: str, columns: Sequence[str]) -> TextFormat:
        """Return the form of the files of one table. Raises ConfigError."""
        try:
            return cls(separator=separator, columns=tuple(columns))
        except ValidationError as e:
            raise ConfigError(first_problem(e)) from None

    @property
    def given(self) -> list[str] | None:
        """The separator and the columns of a table; None if they are those of the files."""
        return [self.separator, *self.columns] if self.separator or self.columns else None
