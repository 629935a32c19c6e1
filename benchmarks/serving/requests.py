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


def pool(shares: Mapping[str, float], store: Path) -> list[bytes]:
    """Return POOL requests of the kinds of `shares`: method1, method2, similar, events."""
    rng, bundle = np.random.default_rng(0), Store(store).current()
    schema = tomllib.loads((bundle.folder / "config.toml").read_text(encoding="utf-8"))["schema"]

    def ids(table: str) -> list[str]:
        column = schema[f"{table}_id"]
        frame = pl.read_parquet(bundle.folder / f"{table}s.parquet", columns=[column])
        return list(frame[column].cast(pl.String))

    met = pl.read_parquet(bundle.folder / "interactions.parquet", columns=["item"])["item"].unique().sort()
    items = np.array(ids("item"), object)[met.to_numpy()].tolist()
    asked = rng.permutation(np.resize(np.array(ids("user"), object), POOL)).tolist()
    kinds = rng.choice(list(shares), len(asked), p=list(shares.values())).tolist()

    def one(kind: str, user: str) -> bytes:
        if kind == "method1":
            return request("POST", "/v1/recommend", {"user_id": user, "k": 10})
        some = [items[i] for i in rng.integers(0, len(items), HISTORY)]
        if kind == "method2":
            body = {"user_id": user, "history": some, "k": 10, "method": 2}
            return request("POST", "/v1/recommend", body)
        if kind == "similar":
            return request("GET", f"/v1/items/{quote(some[0], safe='')}/similar?k=10")
        return request("POST", "/v1/events", {"user_id": user, "events": some[:1]})

    return [one(kind, user) for kind, user in zip(kinds, asked, strict=True)]
