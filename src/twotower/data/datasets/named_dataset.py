"""The protocol of the data sets that a config names."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from twotower.data.tables import Tables
from twotower.features.schema import Schema
from twotower.kinds import Kind


class NamedDataset(Kind):
    """Data set that is read by its name."""

    table_schema: ClassVar[Schema]
    """Schema of the tables, for a config that gives none."""

    @abstractmethod
    def load(self, archive: str = "") -> Tables:
        """Return the tables of users, items and interactions. `archive` is the path of a local copy; empty: wherever the
        data set is found. Raises DataError."""
