"""Section of the form of text files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from twotower.data.reading.table_path import TablePath
from twotower.errors import ConfigError, DataError
from twotower.section import Section, first_problem

SEPARATORS = (",", ";", "\t", "|", "::")
SPACE = " "
"""Separators that the message about a file of another separator names."""
SEPARATOR_OF = {".csv": ",", ".tsv": "\t", ".txt": SPACE}
"""Separator of a text file by its ending."""
TableName = Literal["users", "items", "interactions"]


class TextFormat(Section):
    """Form of the text files of the data (.csv, .tsv, .txt), gzipped or not.

    A file that is not UTF-8 is decoded into the temporary folder of the machine before it is read. With
    layout = 'sequences' schema.time, if set, names the column of the order (schema.time_unit = 'order'), which no split
    of kind 'time' can read."""

    separator: str = Field(
        "",
        description="Character between the values in all text files (\\t: a tab). "
        "Empty: comma in .csv, tab in .tsv, space in .txt.",
    )
    separators: dict[TableName, str] = Field(
        {},
        description="Character between the values in the files of one table, by its name: users, items or "
        "interactions. Empty: none.",
    )
    encoding: str = Field(
        "utf-8",
        description="Encoding of the text files of all tables, as Python names it, such as cp1252, gb18030 or utf-16.",
    )
    decimal: Literal[".", ","] = Field(
        ".", description="Decimal mark of numbers; a comma only in files with another separator."
    )
    columns: tuple[str, ...] = Field(
        (),
        description="Names of the columns of the interactions, in order, for files without a header line. "
        "Empty: the first line names them.",
    )
    layout: Literal["rows", "sequences"] = Field(
        "rows",
        description="Content of a line of the interactions. rows: one interaction. "
        "sequences: a user and the user's items, oldest first, without a header line.",
    )

    @field_validator("separator")
    @classmethod
    def _one_character(cls, value: str) -> str:
        if value == "\\t":
            return "\t"
        if value and (len(value.encode()) != 1 or value in '"\r\n'):
            raise ValueError(
                f"{value!r} is not one ASCII character other than a quote; replace it in the files by a tab"
            )
        return value

    @field_validator("separators")
    @classmethod
    def _one_character_each(cls, value: dict[TableName, str]) -> dict[TableName, str]:
        if empty := next((name for name, separator in value.items() if not separator), ""):
            raise ValueError(f"{empty} has an empty separator; leave {empty} out")
        return {name: cls._one_character(separator) for name, separator in value.items()}

    @field_validator("encoding")
    @classmethod
    def _is_known(cls, value: str) -> str:
        try:
            b"\xff".decode(value, "replace")
        except (LookupError, UnicodeError, ValueError):
            raise ValueError(
                f"{value!r} is no encoding that is known; give one such as 'utf-8', 'cp1252' or 'gb18030'"
            ) from None
        return value

    @field_validator("columns")
    @classmethod
    def _once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "" in value or len({*value}) < len(value):
            raise ValueError(f"{[*value]} has an empty or repeated name; give each column its own")
        return value

    @model_validator(mode="after")
    def _check(self) -> TextFormat:
        if self.columns and self.layout != "rows":
            raise ValueError(f"columns goes with layout = 'rows', not '{self.layout}'; leave it out")
        return self

    @classmethod
    def of_table(cls, separator: str, columns: Sequence[str], layout: str = "rows", decimal: str = ".") -> TextFormat:
        """Return the form of the files of one table, whose options are arguments of a call. Raises ConfigError."""
        given = {"separator": separator, "columns": tuple(columns), "layout": layout, "decimal": decimal}
        try:
            return cls.model_validate(given)
        except ValidationError as e:
            where, message = e.errors()[0]["loc"], first_problem(e)
            raise ConfigError(message.replace(f"{where[0]}:", f"`{where[0]}`:", 1) if where else message) from None

    def check_used(self, first: Mapping[str, TablePath | None], option: str = "data.format.{}") -> None:
        """Raise DataError if an option has no effect on tables, of which the first file is given, None for no table in
        files; the only table of a call is the interactions. `option` is the name of an option in the message."""
        texts = {name: path for name, path in first.items() if path is not None and path.is_text}
        unread: tuple[str, ...] = () if texts else ("separator", "decimal", "encoding")
        unread += () if "interactions" in texts else ("columns", "layout")
        if unused := [name for name in unread if getattr(self, name) != type(self).model_fields[name].default]:
            raise DataError(
                f"{option.format(unused[0])} tells how text files are read, and the table is Parquet; leave it out"
            )
        if unused := [name for name in self.separators if name not in texts]:
            raise DataError(
                f"data.format.separators names {unused[0]}, and no such table is in text files; leave {unused[0]} out"
            )
        separators = {self.separator_of(name) or SEPARATOR_OF[path.ending] for name, path in texts.items()}
        if self.decimal == "," and separators == {","}:
            raise DataError(
                f"{option.format('decimal')} is ',', which reads files whose values no comma separates, and commas "
                f"separate those of all tables; set {option.format('separator')}, or leave it out"
            )

    def separator_of(self, table: str) -> str:
        """Return the separator of the files of a table. Empty: by the ending of each."""
        return next((separator for name, separator in self.separators.items() if name == table), self.separator)

    @property
    def given(self) -> list[str] | None:
        """The separator and the columns of a table, after a word for a decimal comma; None if they are those of the
        files."""
        comma = ["decimal comma"] if self.decimal == "," else []
        return [*comma, self.separator, *self.columns] if comma or self.separator or self.columns else None
