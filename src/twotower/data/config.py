"""Sections of the data: its source and its split."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import (
    Field,
    FieldSerializationInfo,
    JsonValue,
    ValidatorFunctionWrapHandler,
    field_serializer,
    field_validator,
    model_validator,
)

from twotower import files
from twotower.data.datasets import DATASETS
from twotower.data.datasets.named_dataset import NamedDataset
from twotower.data.reading.text_format import TextFormat
from twotower.data.split import PART_NAMES, SplitConfig
from twotower.errors import ConfigError
from twotower.features.schema import Schema
from twotower.files.urls import Url, is_url
from twotower.section import Section

log = logging.getLogger(__name__)


class DataConfig(Section):
    """Source of the data: tables, a prepared dataset, or a data set by name.

    Paths are relative to the config file. A data set brings its [schema] where none is given."""

    start_here = ("dataset", "interactions")

    dataset: Annotated[NamedDataset | Literal[""], DATASETS] = Field(
        "", description="Data set by name, or a section with its options. Empty: your own tables."
    )
    users: str = Field(
        "",
        description="Users: a CSV or Parquet file, a folder of them, a pattern, or a URL. "
        "Empty: the user ids of the interactions.",
    )
    items: str = Field(
        "",
        description="Items: a CSV or Parquet file, a folder of them, a pattern, or a URL. "
        "Empty: the item ids of the interactions.",
    )
    interactions: str = Field(
        "", description="Interactions: a CSV or Parquet file, a folder of them, a pattern, or a URL."
    )
    train: str = Field(
        "",
        description="Interactions of the train part, instead of data.interactions, with split.kind = 'files'. "
        "Empty: none.",
    )
    validation: str = Field(
        "", description="Interactions of the validation part. Empty: some rows of train (split.validation)."
    )
    test: str = Field("", description="Interactions of the test part, together with data.train. Empty: none.")
    format: TextFormat = TextFormat()
    buckets: str = Field(
        "",
        description="Folder of buckets (docs/prepared-format.md), which `twotower prepare` reads instead of tables. "
        "Empty: none.",
    )
    prepared: str = Field(
        "", description="Folder written by `twotower prepare`, to train on instead of tables. Empty: none."
    )

    @field_validator("dataset", mode="wrap")
    @classmethod
    def _none_or_a_kind(cls, value: object, parse: ValidatorFunctionWrapHandler) -> NamedDataset | Literal[""]:
        found: NamedDataset | Literal[""] = "" if value in ("", {"kind": ""}) else parse(value)
        return found

    @field_serializer("dataset")
    def _name_or_options(self, value: NamedDataset | Literal[""], info: FieldSerializationInfo) -> JsonValue:
        options: dict[str, JsonValue] = value.model_dump(mode=info.mode) if value else {"kind": ""}
        return options if len(options) > 1 else options["kind"]

    _paths: ClassVar[tuple[str, ...]] = (
        "users", "items", "interactions", *PART_NAMES, "buckets", "prepared"
    )  # fmt: skip

    @property
    def parts(self) -> dict[str, str]:
        """The given files of the parts by name, in the order train, validation, test."""
        return {name: path for name in PART_NAMES if (path := getattr(self, name))}

    def located(self, folder: Path) -> DataConfig:
        """Return the section with its paths relative to a folder made absolute."""
        own = [name for name in self._paths if getattr(self, name)]
        update: dict[str, str | NamedDataset] = {name: _located(folder, getattr(self, name)) for name in own}
        if self.dataset:
            given = {name: path for name in self.dataset.paths if (path := getattr(self.dataset, name))}
            if address := next((name for name, path in given.items() if is_url(path)), ""):
                raise ConfigError(f"data.dataset.{address} is an address, expected a path on a disk; copy the file")
            paths = {name: _located(folder, path) for name, path in given.items()}
            update["dataset"] = self.dataset.model_copy(update=paths)
        return self.model_copy(update=update)

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        tables = self.users or self.items or self.interactions or self.parts
        if self.dataset and tables:
            raise ValueError("give either data.dataset or data.interactions (with users and items), not both")
        if self.interactions and self.parts:
            raise ValueError(f"give either data.interactions or data.{next(iter(self.parts))}, not both")
        if self.parts and (absent := next((name for name in ("train", "test") if name not in self.parts), "")):
            raise ValueError(f"data.{next(iter(self.parts))} is given without data.{absent}; name its file too")
        if self.dataset and self.format != TextFormat():
            raise ValueError("data.format is of your own text files, and data.dataset reads its own; leave it out")
        for name in ("buckets", "prepared"):
            if is_url(getattr(self, name)):
                raise ValueError(
                    f"data.{name} is an address, expected a folder on a disk; copy it, it is mapped into memory"
                )
        if self.prepared and self.dataset:
            raise ValueError("give either data.dataset or data.prepared, not both")
        return self


def _located(folder: Path, path: str) -> str:
    if is_url(path):
        return str(Url.parse(path))
    files.check_name(folder / path)
    return str((folder / path).resolve())


class DatasetConfig(Section):
    """The settings that decide the dataset: the source of the data and its split."""

    data: DataConfig = DataConfig()
    split: SplitConfig = SplitConfig()

    @model_validator(mode="after")
    def _check_parts(self) -> DatasetConfig:
        if self.data.parts and self.split.kind != "files":
            raise ValueError(f"data.train goes with split.kind = 'files', not '{self.split.kind}'; set that too")
        if self.data.format.layout == "sequences" and self.split.kind == "time":
            raise ValueError(
                "split.kind = 'time' compares times of all users, and data.format.layout = 'sequences' gives the order "
                "of one user's items; set split.kind = 'last', 'user_ratio' or 'random'"
            )
        if self.split.kind == "files" and (self.data.interactions or self.data.dataset):
            raise ValueError("split.kind = 'files' reads data.train, data.validation and data.test; name these instead")
        return self


def check_lone_options(schema: Schema, split: SplitConfig | None = None) -> None:
    """Raise ConfigError for an option of the schema without which the data are as they are, though it says otherwise;
    log a warning for options that change nothing.

    It is called before a new training or preparation. What was made before is read without it."""
    if schema.positive_above != type(schema).model_fields["positive_above"].default and not schema.label:
        what = f"schema.positive_above = {schema.positive_above:g}"
        if not schema.event:
            raise ConfigError(
                f"{what} is of a label, and schema.label is empty, so every row is a positive; name the column of the "
                "label, or leave positive_above out"
            )
        log.warning(f"{what} changes nothing, as schema.events tells which rows are positives; leave it out")
    for statistic in schema.statistics():
        if statistic.column == "" and not schema.has_negatives:
            raise ConfigError(
                f"feature '{statistic.name}' averages the labels of the interactions, and all are positives, so it is "
                "the same number for all; name a column in statistic_column, or a label in schema.label, or drop it"
            )
    for f in schema.features:
        if names := f.without_effect:
            log.warning(
                f"feature '{f.name}': {' and '.join(names)} {'change' if len(names) > 1 else 'changes'} nothing, as "
                f"hash_buckets takes the place of the vocabulary that {'they cut' if len(names) > 1 else 'it cuts'}; "
                f"leave {'them' if len(names) > 1 else 'it'} out, or set hash_buckets = 0"
            )
    if split and (names := split.without_effect):
        rule = {
            "last": "tests the last row of each user and validates on the one before",
            "column": f"reads the parts of the column '{split.column}'",
            "files": "reads the parts of the files",
        }[split.kind]
        log.warning(
            f"{' and '.join(f'split.{name} = {getattr(split, name):g}' for name in names)} "
            f"{'change' if len(names) > 1 else 'changes'} nothing, as split.kind = "
            f"'{split.kind}' {rule}; leave {'them' if len(names) > 1 else 'it'} out, or set another kind"
        )
