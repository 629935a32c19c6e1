"""The requests of the load tests, of users and items of a store."""

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import polars as pl

from twotower.store.store import Store

POOL, HISTORY = 20_000, 50  # different requests of a scenario, and items of a history


def request(method: str, path: str, body: Any = None) -> bytes:
    data = b"" if body is None else json.dumps(body, separators=(",", ":")).encode()
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1"]
    lines += [] if body is None else ["Content-Type: application/json", f"Content-Length: {len(data)}"]
    return "\r\n".join([*lines, "", ""]).encode() + data


def ids(store: Path, table: str) -> list[str]:
    """Return the ids of the table `user` or `item` of the current bundle."""
    folder = Store(store).current().folder
    column = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))["schema"][f"{table}_id"]
    return list(pl.read_parquet(folder / f"{table}s.parquet", columns=[column])[column].cast(pl.String))


def items(store: Path) -> list[str]:
    """Return the ids of the items with interactions."""
    met = pl.read_parquet(Store(store).current().folder / "interactions.parquet", columns=["item"])["item"]
    return list(np.array(ids(store, "item"), object)[met.unique().sort().to_numpy()])


def pool(shares: Mapping[str, float], store: Path) -> list[bytes]:
    """Return POOL requests of the kinds of `shares`: method1, method2, similar, events."""
    rng, met = np.random.default_rng(0), items(store)
    asked = rng.permutation(np.resize(np.array(ids(store, "user"), object), POOL)).tolist()
    kinds = rng.choice(list(shares), len(asked), p=list(shares.values())).tolist()

    def one(kind: str, user: str) -> bytes:
        if kind == "method1":
            return request("POST", "/v1/recommend", {"user_id": user, "k": 10})
        some = [met[i] for i in rng.integers(0, len(met), HISTORY)]
        if kind == "method2":
            body = {"user_id": user, "history": some, "k": 10, "method": 2}
            return request("POST", "/v1/recommend", body)
        if kind == "similar":
            return request("GET", f"/v1/items/{quote(some[0], safe='')}/similar?k=10")
        return request("POST", "/v1/events", {"user_id": user, "events": some[:1]})

    return [one(kind, user) for kind, user in zip(kinds, asked, strict=True)]
