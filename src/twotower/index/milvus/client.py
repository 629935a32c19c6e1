"""Milvus as this package asks it: the few calls it needs, each within a time, errors as ours.

What only reads, or may be done twice, is tried again after moments of random length, as far as there is time. A server that was started anew may have
forgotten that a collection was loaded: it is told again.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import grpc
import numpy as np
from pymilvus import DataType, MilvusClient
from pymilvus.exceptions import MilvusException

from twotower.errors import ConfigError, RunError, Unavailable
from twotower.index.deadline import remaining_seconds
from twotower.index.protocol import CONNECT_TIMEOUT, Rows, Vectors

TOKEN_VARIABLE = "TWOTOWER_MILVUS_TOKEN"
READ_SECONDS = 10.0
"""Seconds that one call which reads may take, unless `deadline` leaves less."""
MESSAGE_MAX_BYTES = 1 << 24
"""Bytes of vectors of one exchange."""
RETRY_PAUSES = (0.1, 0.4, 1.6)
"""Seconds, at most, before what only reads is tried again, as far as there is time."""
POLL_SECONDS = (0.01, 0.5)
"""Seconds between two looks at what the server is building, at first and later."""
T = TypeVar("T")
_RECONNECT_OPTIONS = {
    "grpc.initial_reconnect_backoff_ms": 100,
    "grpc.min_reconnect_backoff_ms": 500,
    "grpc.max_reconnect_backoff_ms": 1000,
}
"""A server that is back is found within a second; gRPC would wait up to two minutes."""

# It writes a traceback for every error that it also raises.
logging.getLogger("pymilvus").setLevel(logging.CRITICAL)
logging.getLogger("milvus_lite").setLevel(logging.CRITICAL)


class CollectionError(RunError):
    """A collection that is not there, or is another than a bundle says. `reason` is a word for counters."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class MilvusConnection:
    """A connection to a server, or to a folder of milvus-lite in this process. Any number of threads may use it."""

    def __init__(self, uri: str, timeout: float = 300.0, connect_timeout: float = CONNECT_TIMEOUT) -> None:
        """`timeout`: seconds for what writes. Raises ConfigError if the place cannot be, Unavailable if it is silent."""
        self.uri, self.timeout = uri, timeout
        local = "://" not in uri
        if local and not Path(uri).parent.is_dir():
            raise ConfigError(f"{uri}: the folder {Path(uri).parent} is not there; make it, or name another")
        try:
            token = os.environ.get(TOKEN_VARIABLE, "")
            self._milvus: Any = MilvusClient(
                uri, token=token, timeout=remaining_seconds(connect_timeout), grpc_options=_RECONNECT_OPTIONS
            )
        except (MilvusException, grpc.RpcError, OSError) as e:
            if local:
                raise Unavailable(
                    f"{uri}: cannot be opened; has another process opened it? One at a time can, or all ask a "
                    "`milvus-lite server --data-dir DIR --port PORT`"
                ) from e
            raise Unavailable(f"{uri}: no Milvus answers there") from e

    def create_collection(self, name: str, width: int, description: str) -> None:
        """An empty collection of vectors (width,) under rows; `description` is what `describe` gives back. Raises RunError."""
        schema = MilvusClient.create_schema(auto_id=False, description=description)
        schema.add_field("row", DataType.INT64, is_primary=True)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=width)
        self._write(
            lambda t: self._milvus.create_collection(
                name, schema=schema, properties={"twotower": description}, timeout=t
            )
        )

    def insert(self, name: str, rows: Rows, vectors: Vectors) -> None:
        """Put one batch in. Raises RunError."""
        batch = [{"row": row, "vector": vector} for row, vector in zip(rows.tolist(), vectors, strict=True)]
        self._write(lambda t: self._milvus.insert(name, batch, timeout=t))

    def build_index(self, name: str, kind: str, metric: str, params: dict[str, int]) -> None:
        """Seal what was put in, index it, and wait until it is loaded. Raises RunError."""
        self._write(lambda t: self._milvus.flush(name, timeout=t))
        wanted = self._milvus.prepare_index_params()
        # As JSON under one key: milvus-lite reads no others, and every Milvus reads this.
        options = {"params": {"params": params}} if params else {}
        wanted.add_index("vector", index_type=kind, metric_type=metric, index_name="vector", **options)
        self._write(lambda t: self._milvus.create_index(name, wanted, timeout=t, sync=False))

        def built() -> bool:
            said = self._read(lambda t: self._milvus.describe_index(name, "vector", timeout=t))
            if str(said.get("state")) == "Failed":
                raise RunError(f"{self.uri}: {name}: the index cannot be built ({said.get('index_state_fail_reason')})")
            return str(said.get("state")) == "Finished" and not said.get("pending_index_rows")

        self._wait(built, f"{name}: its index is not built")
        self.load(name)

    def load(self, name: str) -> None:
        """Have a collection loaded. Raises CollectionError, Unavailable."""
        self._read(lambda t: self._milvus.load_collection(name, timeout=t, _async=True))

        def loaded() -> bool:
            state = self._read(lambda t: self._milvus.get_load_state(name, timeout=t))["state"]
            if state.name == "NotExist":
                raise CollectionError(f"{self.uri}: there is no collection {name}", "collection")
            return bool(state.name == "Loaded")

        self._wait(loaded, f"{name}: it is not loaded")

    def describe(self, name: str) -> tuple[int, list[str]]:
        """Width of the vectors of a collection, and what was told of it. Raises CollectionError, Unavailable."""
        said = self._read(lambda t: self._milvus.describe_collection(name, timeout=t))
        widths = [f["params"].get("dim", 0) for f in said["fields"] if f["name"] == "vector"]
        return int(widths[0]) if widths else 0, [said["properties"].get("twotower", ""), said["description"]]

    def count(self, name: str) -> int:
        """Rows of a loaded collection, every write counted. Raises CollectionError, Unavailable."""
        found = self._read_loaded(
            name,
            lambda t: self._milvus.query(
                name, filter="", output_fields=["count(*)"], timeout=t, consistency_level="Strong"
            ),
        )
        return int(found[0]["count(*)"])

    def search(
        self,
        name: str,
        queries: Vectors,
        k: int,
        params: dict[str, int],
        metric: str,
        allowed: Rows | None,
        banned: Rows | None,
        with_vectors: bool,
    ) -> list[list[Any]]:
        """For each query up to `k` hits, best first, of the `allowed` rising rows without the `banned`; `with_vectors` they hold
        their vectors too.

        Raises CollectionError, Unavailable.
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

    def fetch(self, name: str, rows: Rows, width: int) -> Vectors:
        """The vectors (n, width) of distinct rows (n,). Raises CollectionError, also if some are not there, Unavailable."""
        out = np.empty((len(rows), width), np.float32)
        step = page_rows(width)
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            order = np.argsort(part)
            where, n = _row_condition(part[order]), len(part)
            found = self._read_loaded(name, partial(self._rows, name, where, n))
            got = np.array([hit["row"] for hit in found], np.int64)
            places = order[np.searchsorted(part[order], got).clip(max=n - 1)]
            if len(got) != n or (part[places] != got).any():
                raise CollectionError(
                    f"{self.uri}: {name} gives {len(got):,} of {n:,} rows; it was changed", "collection"
                )
            out[start + places] = np.array([hit["vector"] for hit in found], np.float32)
        return out

    def _rows(self, name: str, where: str, n: int, seconds: float) -> Any:
        return self._milvus.query(
            name, filter=where, output_fields=["row", "vector"], limit=n, timeout=seconds,
            consistency_level="Eventually",
        )  # fmt: skip

    def drop(self, name: str) -> None:
        """Take a collection away, if it is there, its aliases first. Raises Unavailable."""
        try:
            for alias in self._aliases(name):
                self._read(partial(self._unalias, alias))
            self._read(lambda t: self._milvus.drop_collection(name, timeout=t))
        except CollectionError:
            return

    def _unalias(self, alias: str, seconds: float) -> None:
        self._milvus.drop_alias(alias, timeout=seconds)

    def set_alias(self, alias: str, name: str) -> None:
        """Make the alias stand for the collection. Raises CollectionError, Unavailable."""
        before = self.alias_target(alias)
        if not before:
            self._read(lambda t: self._milvus.create_alias(name, alias, timeout=t))
        elif before != name:
            self._read(lambda t: self._milvus.alter_alias(name, alias, timeout=t))

    def alias_target(self, alias: str) -> str:
        """The collection that an alias stands for, an empty string if there is none. Raises Unavailable."""
        try:
            return str(self._read(lambda t: self._milvus.describe_alias(alias, timeout=t))["collection_name"])
        except CollectionError:
            return ""

    def _aliases(self, name: str) -> list[str]:
        found: list[str] = self._read(lambda t: self._milvus.list_aliases(name, timeout=t))["aliases"]
        return found

    def close(self) -> None:
        self._milvus.close()

    def _write(self, ask: Callable[[float], T]) -> T:
        try:
            return ask(self.timeout)
        except (MilvusException, grpc.RpcError, OSError) as e:
            raise RunError(f"{self.uri}: Milvus fails ({_error_line(e)})") from e

    def _read_loaded(self, name: str, ask: Callable[[float], T]) -> T:
        """Read from a collection, which is loaded if the server says that it is not."""

        def again(seconds: float) -> T:
            try:
                return ask(seconds)
            except MilvusException as e:
                if e.code != _NOT_LOADED_CODE:
                    raise
                self._milvus.load_collection(name, timeout=seconds)
                return ask(remaining_seconds(seconds))

        return self._read(again)

    def _read(self, ask: Callable[[float], T]) -> T:
        for pause in (*RETRY_PAUSES, None):
            try:
                return ask(remaining_seconds(READ_SECONDS))
            except MilvusException as e:
                if e.code in _MISSING_CODES:
                    raise CollectionError(f"{self.uri}: {_error_line(e)}", "collection") from e
                error: Exception = e
            except (grpc.RpcError, OSError) as e:
                error = e
            except ValueError as e:  # a channel that another thread has just found broken
                if "closed channel" not in str(e):
                    raise
                error = e
            if pause is None or (pause := pause * random.uniform(0.5, 1)) >= remaining_seconds(READ_SECONDS):
                break
            time.sleep(pause)
        raise Unavailable(f"{self.uri}: Milvus does not answer ({_error_line(error)})") from error

    def _wait(self, done: Callable[[], bool], what: str) -> None:
        until, pause = time.monotonic() + self.timeout, POLL_SECONDS[0]
        while not done():
            if time.monotonic() > until:
                raise Unavailable(f"{self.uri}: {what} after {self.timeout:g} seconds; set index.timeout higher")
            time.sleep(min(pause, remaining_seconds(pause)))
            pause = min(1.5 * pause, POLL_SECONDS[1])


_MISSING_CODES, _NOT_LOADED_CODE, _NO_CONNECTION_CODE = (100, 1600), 101, 2
"""Codes: no such collection, no such alias; a collection that is not loaded; and, of the client, no connection."""


def page_rows(width: int) -> int:
    """Rows whose vectors fit one exchange."""
    return max(1, min(4096, MESSAGE_MAX_BYTES // (4 * width)))


def _row_condition(rows: Rows) -> str:
    """The condition that a row is among rising ones."""
    if len(rows) and int(rows[-1]) - int(rows[0]) + 1 == len(rows):
        return f"row >= {rows[0]} and row <= {rows[-1]}"
    return f"row in [{','.join(map(str, rows.tolist()))}]"


def _error_line(error: Exception) -> str:
    said = error.message if isinstance(error, MilvusException) else ""
    if isinstance(error, MilvusException) and error.code == _NO_CONNECTION_CODE:
        said = "no connection"
    if isinstance(error, grpc.RpcError):
        said = f"{getattr(error, 'code', lambda: '')()}"
    return (str(said or error).strip().splitlines() or [type(error).__name__])[0][:200]
