"""The two sides of a pair: user and item."""

from __future__ import annotations

from typing import Literal

SideName = Literal["user", "item"]
SIDES: tuple[SideName, SideName] = ("user", "item")
ROW_IDS: dict[SideName, str] = {"user": "__user", "item": "__item"}
"""Id columns of tables without ids."""


def other_side(side: SideName) -> SideName:
    """Return the other of the two sides."""
    return "item" if side == "user" else "user"
