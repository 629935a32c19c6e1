"""Sides of a pair, user and item, and the context of an interaction, which the user tower reads."""

from __future__ import annotations

from typing import Literal

SideName = Literal["user", "item"]
SIDES: tuple[SideName, SideName] = ("user", "item")
FeatureSide = Literal["user", "item", "context"]
"""Table of a feature's values: users, items, or interactions."""
FEATURE_SIDES: tuple[FeatureSide, ...] = (*SIDES, "context")
ROW_IDS: dict[SideName, str] = {"user": "__user", "item": "__item"}
"""Id columns of tables without ids."""


def other_side(side: FeatureSide) -> SideName:
    """Return the side whose tower does not read the features of `side`."""
    return "user" if side == "item" else "item"


def tower_side(side: FeatureSide) -> SideName:
    """Return the side whose tower reads the features of `side`."""
    return "item" if side == "item" else "user"
