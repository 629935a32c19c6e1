"""Checks of the shapes in signatures: imported before twotower, it checks calls in the rooms of `CHECKED`.

Of each function the first calls of a process are checked, and then every `EVERY`-th: to check all would take as long as
the tests themselves.
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable
from types import FunctionType
from typing import Any, get_args

import jaxtyping
from beartype import beartype

CHECKED = ("twotower.model", "twotower.train", "twotower.evaluation", "twotower.index")
FIRST, EVERY = 20, 100
SHAPES = ("F32[", "F64[", "Float[", "I32[", "I64[", "Int[", "Bool[", "Shaped[")
check_all = jaxtyping.jaxtyped
made_before: Counter[str] = Counter()


def has_shape(hint: object) -> bool:
    """Whether a resolved annotation is a shape, or holds one."""
    is_shape = isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray)
    return is_shape or any(map(has_shape, get_args(hint)))


def only_shapes(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check the annotations with a shape, and no other."""
    hints = function.__annotations__
    function.__annotations__ = {name: hint for name, hint in hints.items() if has_shape(hint)}
    checked: Callable[..., Any] = beartype(function)
    return checked


def check_some(typechecker: Callable[..., Any]) -> Callable[[Any], Any]:
    """Check a function with shapes in some of its calls; leave any other as it is. Takes the place of `jaxtyped`."""

    def decorate(made: Any) -> Any:
        if isinstance(made, staticmethod | classmethod):
            return type(made)(decorate(made.__func__))
        if isinstance(made, property):
            fget, fset, fdel = (f and decorate(f) for f in (made.fget, made.fset, made.fdel))
            return property(fget, fset, fdel, made.__doc__)
        if not any(shape in str(hint) for hint in getattr(made, "__annotations__", {}).values() for shape in SHAPES):
            return made
        made_before[made.__qualname__] += 1
        if made_before[made.__qualname__] > FIRST:  # a function in a function, which is made in each call
            return made
        checked: Any = check_all(made, typechecker=typechecker)
        if not isinstance(made, FunctionType):
            return checked
        calls = 0

        @functools.wraps(made)
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return (checked if calls <= FIRST or calls % EVERY == 0 else made)(*args, **kwargs)

        return call

    return decorate


if loaded := [name for name in sys.modules if name.startswith(CHECKED) or name == "twotower.arrays.types"]:
    raise RuntimeError(f"{loaded[0]} is loaded; import shapes before it")
vars(jaxtyping)["jaxtyped"] = check_some
jaxtyping.install_import_hook(list(CHECKED), "shapes.only_shapes")
