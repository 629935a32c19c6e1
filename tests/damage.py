"""Ways of damaging a file, for tests that no damage is silent or a traceback."""

from __future__ import annotations

import io
import json
import pickle
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import polars as pl


def damages(name: str, data: bytes) -> Iterator[tuple[str, bytes]]:
    """What a file may hold instead: nothing, a part, noise, another type, another shape; named."""
    rng = random.Random(name)
    yield "empty", b""
    yield "cut", data[: len(data) // 2]
    yield "noise", rng.randbytes(max(64, len(data) // 7))
    yield "not UTF-8", b"\xff\xfe\x00" + data
    flipped = bytearray(data)
    for _ in range(5):
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    yield "flipped", bytes(flipped)
    if name.endswith(".json"):
        yield from ((f"JSON {text[:20]}", text.encode()) for text in _JSON)
        yield from ((what, json.dumps(value).encode()) for what, value in _others(json.loads(data)))
    if name.endswith(".toml"):
        yield from (
            (f"TOML {text[:20]!r}", text.encode())
            for text in ("x", "schema = 3", "[train]\nepochs = []", "a = 1\na = 2")
        )
        lines = data.decode().splitlines()
        for line in range(0, len(lines), max(1, len(lines) // 12)):
            yield f"without line {line}", "\n".join(lines[:line] + lines[line + 1 :]).encode()
    if name.endswith(".npy"):
        yield from _arrays(np.load(io.BytesIO(data)))
    if name.endswith(".parquet"):
        yield from _tables(pl.read_parquet(io.BytesIO(data)))


_JSON = ("null", "3", '"text"', "[]", "{}", "[" * 100_000, "NaN", "1" * 5000, '{"a": 1, "a": 2}', '"\\ud800"')
_VALUES: tuple[Any, ...] = (None, True, -1, 10**400, 1.5, "text", "\ud800", [], [None], {}, {"a": 1})


def _others(value: Any, most: int = 15) -> Iterator[tuple[str, Any]]:
    """A document with one value at a time of another kind."""
    places = list(_places(value))
    rng = random.Random(len(places))
    for path in rng.sample(places, min(most, len(places))):
        for other in rng.sample(_VALUES, 3):
            copy = json.loads(json.dumps(value))
            at = copy
            for step in path[:-1]:
                at = at[step]
            at[path[-1]] = other
            yield f"{'.'.join(map(str, path))} = {str(other)[:20]!r}", copy
        copy = json.loads(json.dumps(value))
        at = copy
        for step in path[:-1]:
            at = at[step]
        del at[path[-1]]
        yield f"without {'.'.join(map(str, path))}", copy


def _places(value: Any) -> Iterator[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    for name, below in inner:
        yield (name,)
        yield from ((name, *path) for path in _places(below))


def _saved(array: Any, **more: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **more)
    return file.getvalue()


def _arrays(array: Any) -> Iterator[tuple[str, bytes]]:
    yield "flat", _saved(array.reshape(-1)) if array.ndim > 1 else _saved(array[:, None])
    yield "one row less", _saved(array[:-1])
    yield "no rows", _saved(array[:0])
    yield "a number", _saved(np.float32(3))
    yield "float64", _saved(array.astype(np.float64))
    yield "int8", _saved(np.ones(array.shape, np.int8))
    yield "text", _saved(np.full(array.shape, "x"))
    yield "objects", _saved(np.full(array.shape[:1], None), allow_pickle=True)
    yield "records", _saved(np.zeros(array.shape, [("a", "f4"), ("b", "i8")]))
    yield "Fortran", _saved(np.asfortranarray(array))
    large = 2**31 - 1 if array.dtype.kind in "iu" else np.inf
    yield "too large", _saved(np.full(array.shape, large, array.dtype) if array.dtype.itemsize > 2 else ~array)
    yield "negative", _saved(np.full(array.shape, -1).astype(array.dtype))
    yield "a pickle", pickle.dumps([1, 2])
    whole = _saved(array)
    yield "a large shape", whole.replace(b"'shape': (", b"'shape': (9", 1)
    yield "archive", b"PK\x03\x04" + whole


def _written(frame: pl.DataFrame) -> bytes:
    file = io.BytesIO()
    frame.write_parquet(file)
    return file.getvalue()


def _tables(frame: pl.DataFrame) -> Iterator[tuple[str, bytes]]:
    yield "no rows", _written(frame.head(0))
    yield "one row less", _written(frame.head(frame.height - 1))
    yield "twice", _written(pl.concat([frame, frame]))
    for column in frame.columns:
        yield f"without {column}", _written(frame.drop(column))
        yield f"{column} null", _written(frame.with_columns(pl.lit(None).alias(column)))
        yield f"{column} text", _written(frame.with_columns(pl.lit("x").alias(column)))
        yield f"{column} lists", _written(frame.with_columns(pl.lit([[1, 2]]).first().alias(column)))
        yield f"{column} large", _written(frame.with_columns(pl.lit(2**40).alias(column)))
        yield f"{column} -1", _written(frame.with_columns(pl.lit(-1).alias(column)))
