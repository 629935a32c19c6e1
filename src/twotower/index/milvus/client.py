"""Connection to Milvus: calls with a time limit, whose errors are RunError and Unavailable.

Calls that read, or are idempotent, are retried after random pauses while time remains. A restarted server may have
unloaded a collection, which is then loaded again.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypedDict, TypeVar

import grpc
import numpy as np
from pymilvus import DataType, MilvusClient
from pymilvus.exceptions import MilvusException

from twotower.arrays.types import Rows, Shaped, Vectors
from twotower.errors import ConfigError, RunError, Unavailable
from twotower.index.protocol import CONNECT_TIMEOUT, remaining_seconds

TOKEN_VARIABLE = "TWOTOWER_MILVUS_TOKEN"
READ_SECONDS = 10.0
"""Limit of a reading call, unless the deadline is nearer. Seconds."""
MESSAGE_MAX_BYTES = 1 << 24
"""Largest size of the vectors of a call. Bytes."""
RETRY_PAUSES = (0.1, 0.4, 1.6)
"""Longest pauses before the retries of a reading call. Seconds."""
POLL_SECONDS = (0.01, 0.5)
"""First and longest pause between two polls of a server that builds or loads. Seconds."""
T = TypeVar("T")
CHANNEL_OPTIONS = {
    "grpc.initial_reconnect_backoff_ms": 100,
    "grpc.min_reconnect_backoff_ms": 500,
    "grpc.max_reconnect_backoff_ms": 1000,
    "grpc.keepalive_permit_without_calls": False,
}
"""gRPC options to reconnect within a second (default: up to two minutes), and to send no pings between calls.

A server with the default limits of gRPC, such as milvus-lite, closes a connection that sends pings while idle.
"""

# pymilvus logs a traceback for every error that it raises.
logging.getLogger("pymilvus").setLevel(logging.CRITICAL)
logging.getLogger("milvus_lite").setLevel(logging.CRITICAL)


class StoredRow(TypedDict):
    """A row of a collection."""

    row: int
    vector: Sequence[float]


class Hit(TypedDict):
    """A row of an answer, and its vector if the search returns vectors."""

    row: int
    entity: StoredRow


class CollectionError(RunError):
    """A collection is missing, or differs from the one of the bundle. `reason` labels counters: collection,
    mismatch."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type[CollectionError], tuple[str, str]]:
        return type(self), (str(self), self.reason)


class MilvusConnection:
    """Connection to a Milvus server, or to a folder of milvus-lite in this process. Thread-safe."""

    def __init__(self, uri: str, timeout: float = 300.0, connect_timeout: float = CONNECT_TIMEOUT) -> None:
        """Connect. `timeout` limits a writing call, `connect_timeout` the connection. Seconds.

        Raises ConfigError for a missing folder, Unavailable if no server answers.
        """
        self.uri, self.timeout = uri, timeout
        local = "://" not in uri
        if local and not Path(uri).parent.is_dir():
            raise ConfigError(f"{uri}: folder {Path(uri).parent} does not exist; create it, or name another")
        try:
            token = os.environ.get(TOKEN_VARIABLE, "")
            self._milvus = MilvusClient(
                uri, token=token, timeout=remaining_seconds(connect_timeout), grpc_options=CHANNEL_OPTIONS
            )
        except (MilvusException, grpc.RpcError, OSError) as e:
            if local:
                raise Unavailable(
                    f"{uri}: cannot be opened; has another process opened it? Only one process can at a time; start "
                    "`milvus-lite server --data-dir DIR --port PORT` for several"
                ) from e
            raise Unavailable(f"{uri}: no Milvus server answers") from e

    def create_collection(self, name: str, width: int, description: str) -> None:
        """Create an empty collection of vectors (width,) with a description. Raises RunError."""
        schema = MilvusClient.create_schema(auto_id=False, description=description)
        schema.add_field("row", DataType.INT64, is_primary=True)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=width)
        self._write(
            lambda t: self._milvus.create_collection(
                name, schema=schema, properties={"twotower": description}, timeout=t
            )
        )

    def insert(self, name: str, rows: Shaped[Rows, "n"], vectors: Shaped[Vectors, "n W"]) -> None:
        """Insert rows with vectors. Raises RunError."""
        batch = [{"row": row, "vector": vector} for row, vector in zip(rows.tolist(), vectors, strict=True)]
        self._write(lambda t: self._milvus.insert(name, batch, timeout=t))

    def build_index(self, name: str, kind: str, metric: str, params: dict[str, int]) -> None:
        """Flush the inserted rows, build the index and load the collection. Raises RunError."""
        self._write(lambda t: self._milvus.flush(name, timeout=t))
        wanted = self._milvus.prepare_index_params()
        # As JSON under one key: milvus-lite reads no other form, and all versions of Milvus read this one.
        options = {"params": {"params": params}} if params else {}
        wanted.add_index("vector", index_type=kind, metric_type=metric, index_name="vector", **options)
        self._write(lambda t: self._milvus.create_index(name, wanted, timeout=t, sync=False))

        def built() -> bool:
            state = self._read(lambda t: self._milvus.describe_index(name, "vector", timeout=t))
            if str(state.get("state")) == "Failed":
                raise RunError(
                    f"{self.uri}: {name}: the index cannot be built ({state.get('index_state_fail_reason')})"
                )
            return str(state.get("state")) == "Finished" and not state.get("pending_index_rows")

        self._wait(built, f"{name}: the index is not built")
        self.load(name)

    def load(self, name: str) -> None:
        """Load a collection and wait until it is loaded. Raises CollectionError, Unavailable."""
        self._read(lambda t: self._milvus.load_collection(name, timeout=t, _async=True))

        def loaded() -> bool:
            state = self._read(lambda t: self._milvus.get_load_state(name, timeout=t))["state"]
            if state.name == "NotExist":
                raise CollectionError(f"{self.uri}: collection {name} does not exist", "collection")
            return bool(state.name == "Loaded")

        self._wait(loaded, f"{name}: the collection is not loaded")

    def describe(self, name: str) -> tuple[int, list[str]]:
        """Return the vector dimension and descriptions of a collection. Raises CollectionError, Unavailable."""
        facts = self._read(lambda t: self._milvus.describe_collection(name, timeout=t))
        widths = [f["params"].get("dim", 0) for f in facts["fields"] if f["name"] == "vector"]
        return int(widths[0]) if widths else 0, [facts["properties"].get("twotower", ""), facts["description"]]

    def count(self, name: str) -> int:
        """Return the number of rows of a loaded collection after all writes. Raises CollectionError, Unavailable."""
        found = self._read_loaded(
            name,
            lambda t: self._milvus.query(
                name, filter="", output_fields=["count(*)"], timeout=t, consistency_level="Strong"
            ),
        )
        return int(found[0]["count(*)"])

    def search(
        self, name: str, queries: Shaped[Vectors, "B W"], k: int, params: dict[str, int], metric: str,
        allowed: Shaped[Rows, "_"] | None, banned: Shaped[Rows, "_"] | None, with_vectors: bool,
    ) -> list[list[Hit]]:  # fmt: skip
        """Return up to `k` hits of each query, in descending order of score.

        Hits are among the ascending rows `allowed` and not among `banned`. Raises CollectionError, Unavailable.
        """
        conditions = [] if allowed is None else [_row_condition(allowed)]
        if banned is not None and len(banned):
            conditions.append(f"not ({_row_condition(banned)})")
        where = " and ".join(conditions)
        fields = ["vector"] if with_vectors else ["row"]
        found = self._read_loaded(
            name,
            lambda t: self._milvus.search(
                name, data=list(queries), limit=k, anns_field="vector", output_fields=fields, filter=where, timeout=t,
                search_params={"metric_type": metric, "params": params}, consistency_level="Eventually",
            ),
        )  # fmt: skip
        return list(found)

    def fetch(self, name: str, rows: Shaped[Rows, "n"], width: int) -> Shaped[Vectors, "n W"]:
        """Return the vectors of distinct rows. Raises CollectionError if rows are missing, Unavailable."""
        out = np.empty((len(rows), width), np.float32)
        step = page_rows(width)
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            order = np.argsort(part)
            where, n = _row_condition(part[order]), len(part)
            found = self._read_loaded(name, partial(self._rows, name, where, n))
            got = np.array([hit["row"] for hit in found], np.int64)
            positions = order[np.searchsorted(part[order], got).clip(max=n - 1)]
            if len(got) != n or (part[positions] != got).any():
                raise CollectionError(
                    f"{self.uri}: {name} holds {len(got):,} of {n:,} rows; another program changed it", "collection"
                )
            out[start + positions] = np.array([hit["vector"] for hit in found], np.float32)
        return out

    def _rows(self, name: str, where: str, n: int, seconds: float) -> list[StoredRow]:
        found: list[StoredRow] = self._milvus.query(
            name, filter=where, output_fields=["row", "vector"], limit=n, timeout=seconds,
            consistency_level="Eventually",
        )  # fmt: skip
        return found

    def drop(self, name: str) -> None:
        """Drop a collection and its aliases, if it exists. Raises Unavailable."""
        try:
            for alias in self._read(lambda t: self._milvus.list_aliases(name, timeout=t))["aliases"]:
                self._read(partial(self._milvus.drop_alias, alias))
            self._read(lambda t: self._milvus.drop_collection(name, timeout=t))
        except CollectionError:
            return

    def set_alias(self, alias: str, name: str) -> None:
        """Create the alias for the collection, or move it there. Raises CollectionError, Unavailable."""
        before = self.alias_target(alias)
        if not before:
            self._read(lambda t: self._milvus.create_alias(name, alias, timeout=t))
        elif before != name:
            self._read(lambda t: self._milvus.alter_alias(name, alias, timeout=t))

    def alias_target(self, alias: str) -> str:
        """Return the collection of an alias, an empty string if the alias does not exist. Raises Unavailable."""
        try:
            return str(self._read(lambda t: self._milvus.describe_alias(alias, timeout=t))["collection_name"])
        except CollectionError:
            return ""

    def close(self) -> None:
        """Close the connection."""
        self._milvus.close()

    def _write(self, call: Callable[[float], T]) -> T:
        try:
            return call(self.timeout)
        except (MilvusException, grpc.RpcError, OSError) as e:
            raise RunError(f"{self.uri}: Milvus reports an error ({_error_line(e)})") from e

    def _read_loaded(self, name: str, call: Callable[[float], T]) -> T:
        """Call; if the collection is not loaded, load it and call again."""

        def loading(seconds: float) -> T:
            try:
                return call(seconds)
            except MilvusException as e:
                if e.code != _NOT_LOADED_CODE:
                    raise
                self._milvus.load_collection(name, timeout=seconds)
                return call(remaining_seconds(seconds))

        return self._read(loading)

    def _read(self, call: Callable[[float], T]) -> T:
        for pause in (*RETRY_PAUSES, None):
            try:
                return call(remaining_seconds(READ_SECONDS))
            except MilvusException as e:
                if e.code in _MISSING_CODES:
                    raise CollectionError(f"{self.uri}: {_error_line(e)}", "collection") from e
                error: Exception = e
            except (grpc.RpcError, OSError) as e:
                error = e
            except ValueError as e:  # another thread has closed the broken channel
                if "closed channel" not in str(e):
                    raise
                error = e
            if pause is None or (pause := pause * random.uniform(0.5, 1)) >= remaining_seconds(READ_SECONDS):
                break
            time.sleep(pause)
        raise Unavailable(f"{self.uri}: Milvus does not answer ({_error_line(error)})") from error

    def _wait(self, done: Callable[[], bool], problem: str) -> None:
        until, pause = time.monotonic() + self.timeout, POLL_SECONDS[0]
        while not done():
            if time.monotonic() > until:
                raise Unavailable(f"{self.uri}: {problem} after {self.timeout:g} seconds; set index.timeout higher")
            time.sleep(min(pause, remaining_seconds(pause)))
            pause = min(1.5 * pause, POLL_SECONDS[1])


_MISSING_CODES, _NOT_LOADED_CODE, _NO_CONNECTION_CODE = (100, 1600), 101, 2
"""Error codes: collection or alias missing, collection not loaded (both of Milvus), no connection (of pymilvus)."""


def page_rows(width: int) -> int:
    """Return the number of vectors of dimension `width` that fit one call."""
    return max(1, min(4096, MESSAGE_MAX_BYTES // (4 * width)))


def _row_condition(rows: Shaped[Rows, "_"]) -> str:
    """Return the filter expression for ascending rows."""
    if len(rows) and int(rows[-1]) - int(rows[0]) + 1 == len(rows):
        return f"row >= {rows[0]} and row <= {rows[-1]}"
    return f"row in [{','.join(map(str, rows.tolist()))}]"


def _error_line(error: Exception) -> str:
    text = error.message if isinstance(error, MilvusException) else ""
    if isinstance(error, MilvusException) and error.code == _NO_CONNECTION_CODE:
        text = "no connection"
    if isinstance(error, grpc.RpcError):
        text = f"{getattr(error, 'code', lambda: '')()}"
    return (str(text or error).strip().splitlines() or [type(error).__name__])[0][:200]
