"""Checks of the shapes in signatures: imported before twotower, it checks every call in the rooms of `CHECKED`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, get_args

from beartype import beartype
from jaxtyping import AbstractArray, install_import_hook

CHECKED = ("twotower.model", "twotower.train", "twotower.evaluation", "twotower.index")


def has_shape(hint: object) -> bool:
    """Whether a resolved annotation is a shape, or holds one."""
    return (isinstance(hint, type) and issubclass(hint, AbstractArray)) or any(map(has_shape, get_args(hint)))


def only_shapes(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check the annotations with a shape, and no other."""
    hints = function.__annotations__
    function.__annotations__ = {name: hint for name, hint in hints.items() if has_shape(hint)}
    checked: Callable[..., Any] = beartype(function)
    return checked


if loaded := [name for name in sys.modules if name.startswith(CHECKED) or name == "twotower.arrays.types"]:
    raise RuntimeError(f"{loaded[0]} is loaded; import shapes before it")
install_import_hook(list(CHECKED), "shapes.only_shapes")
