"""The protocol of the data sets that a config names."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from twotower.data.tables import Tables
from twotower.features.schema import Schema
from twotower.kinds import Kind


class NamedDataset(Kind):
    """Data set that is read by its name."""

    paths: ClassVar[tuple[str, ...]] = ()
    """Options that are paths; in a config they are relative to its file."""
    table_schema: ClassVar[Schema]
    """Schema of the tables, for a config that gives none."""

    @abstractmethod
    def load(self) -> Tables:
        """Return the tables of users, items and interactions. Raises DataError."""
