"""Names of array types: the element type and, in a signature, the shape.

F32[Tensor, "U D"]        a tensor (U, D) of float32
Shaped[Ints, "n"]         a numpy array (n,) of int64
Shaped[Vectors, "n D"]    the same for any other numpy array

A letter is the same number in all places of a signature. `_` is any number, `*_` are any numbers, "" is a scalar. Tests
check calls in model, train, evaluation and index; otherwise nothing is checked, and jaxtyping is not imported.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, NewType

import numpy as np
import numpy.typing as npt

__all__ = [
    "F32", "F64", "I32", "I64", "Array", "Bool", "Bools", "Codes", "Doubles", "Float", "Floats", "Int", "Ints",
    "ItemId", "ItemRow", "Numbers", "Rows", "Shaped", "UserId", "UserRow", "Vectors", "WholeNumbers",
]  # fmt: skip

UserId = NewType("UserId", str)
"""Id of a user in the tables, as text."""
ItemId = NewType("ItemId", str)
"""Id of an item in the tables, as text."""
UserRow = NewType("UserRow", int)
"""Place of a user in the tables of a dataset, from 0."""
ItemRow = NewType("ItemRow", int)
"""Place of an item in the tables of a dataset, and of its vector in an index, from 0."""

if TYPE_CHECKING:
    from typing import Annotated as Bool
    from typing import Annotated as F32
    from typing import Annotated as F64
    from typing import Annotated as Float
    from typing import Annotated as I32
    from typing import Annotated as I64
    from typing import Annotated as Int
    from typing import Annotated as Shaped
elif "jaxtyping" in sys.modules:
    from jaxtyping import Bool, Float, Int, Shaped
    from jaxtyping import Float32 as F32
    from jaxtyping import Float64 as F64
    from jaxtyping import Int32 as I32
    from jaxtyping import Int64 as I64
else:
    from typing import Annotated

    Bool = F32 = F64 = Float = I32 = I64 = Int = Shaped = Annotated

if TYPE_CHECKING or "jaxtyping" not in sys.modules:
    Ints = npt.NDArray[np.int64]
    Codes = npt.NDArray[np.int32]
    Floats = npt.NDArray[np.float32]
    Bools = npt.NDArray[np.bool_]
    Doubles = npt.NDArray[np.float64]
    Vectors = npt.NDArray[np.float32]
    Rows = npt.NDArray[np.int64]
    WholeNumbers = npt.NDArray[np.integer]
    Numbers = npt.NDArray[np.floating | np.integer]
    Array = npt.NDArray[np.generic]
else:  # jaxtyping takes classes; mypy checks the element types
    Ints = Codes = Floats = Bools = Doubles = Vectors = Rows = WholeNumbers = Numbers = Array = np.ndarray
