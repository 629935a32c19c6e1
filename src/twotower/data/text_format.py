"""Section of the form of text files."""

from __future__ import annotations

from pydantic import Field, field_validator

from twotower.section import Section

SEPARATORS = (",", ";", "\t", "|", "::")
"""Separators that the message about a file of another separator names."""


class TextFormat(Section):
    """Form of the CSV and TSV files of the data, gzipped or not."""

    separator: str = Field(
        "",
        description="Character between the values, in the files of all tables. Empty: a tab in .tsv files, a comma in others.",
    )
    columns: tuple[str, ...] = Field(
        (),
        description="Names of the columns of the interactions, in order, for files without a header line. Empty: the first "
        "line names them.",
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
