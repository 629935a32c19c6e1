"""Retrieval from a published bundle: the items with the highest scores for a user, by two methods.

Method 1 looks up the precomputed user vector. Method 2 runs the user tower online, on the features and the history of the
request. Both search the same index, so both give a user without changes the same answer. Serving and the evaluation of a
bundle use the same class. The tower is an ONNX graph, so torch is not needed.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import abc
from collections.abc import Container, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from twotower.arrays.ragged import Column, Ragged
from twotower.arrays.sets import is_in_sorted
from twotower.arrays.types import Codes, Floats, Ints
from twotower.data import memmap
from twotower.data.dataset import Dataset, read_checked
from twotower.data.ids import IdColumn, TextColumn
from twotower.data.splits import TEST, TRAIN
from twotower.errors import DataError, RunError, TwoTowerError, did_you_mean, first_line
from twotower.features.schema import Categorical, Feature, MultiHot, Numeric, Schema, Sequence, Vector
from twotower.features.text import words
from twotower.features.values import UNKNOWN, canonical_ids
from twotower.files import read_array
from twotower.index import Index, load_index
from twotower.index.exact import MAX_NORM
from twotower.model.inputs.feed import Feed, feed, feed_row, row_of
from twotower.onnx import tower
from twotower.onnx.tower import GateInfo, InspectionLimits, OnnxTower
from twotower.retrieval.request import Answer, Item, Method, Request, Source, UnknownId, check_k, check_method
from twotower.store.bundle import Bundle

ATTENTION_MAX_CELLS = 2**21
"""Attention weights that one call of the tower may hold for each head: users times squared history length."""
NORM_BLOCK_ROWS = 2**13
"""Vectors whose norms are computed at a time."""
REMOTE_MAP_ITEMS = 20_000
"""Number of most popular items whose unit vectors are fetched from a remote index."""
FILTER_CACHE_ROWS = 2**24
FILTER_CACHE_ENTRIES = 256
"""Limits of the cache of filters: rows of all entries (128 MiB), and entries."""


class Retriever:
    """A loaded bundle that answers requests."""

    def __init__(
        self,
        bundle: Bundle,
        threads: int = 1,
        verified_indexes: Container[str] = (),
        tower_memory: int | None = None,
        inspect_seconds: float = tower.INSPECT_SECONDS,
    ) -> None:
        """Load a bundle that `Bundle.open` has verified.

        A FAISS file is first loaded in a child process unless its SHA-256 is in `verified_indexes`, and so is a tower that
        is new to this process, within `tower_memory` bytes and `inspect_seconds` of processor time beside those for its
        bytes. Raises RunError or BundleError if files are damaged or inconsistent, Unavailable if the server of the index
        does not answer.
        """
        self.bundle = bundle
        self.digests: dict[str, str] = bundle.manifest.sha256
        with ExitStack() as held:
            held.enter_context(bundle.lease())  # until all files are open or read, so that gc cannot remove them
            try:
                self._load(bundle, threads, self.index_digest not in verified_indexes, tower_memory, inspect_seconds)
            except (TwoTowerError, MemoryError):
                raise
            except (
                Exception,
                pl.exceptions.PanicException,
            ) as e:  # only a damaged file of the bundle can cause it
                what = f"{type(e).__name__}: {first_line(e)}"
                raise RunError(f"{bundle.folder}: damaged, or of another version ({what})") from e
            if self.index.remote:  # gc drops a collection with its bundle
                weakref.finalize(self, held.pop_all().close)

    @property
    def index_digest(self) -> str:
        """SHA-256 of the FAISS file, an empty string if the index has none."""
        return self.digests.get("index/index.faiss", "")

    def _load(
        self, bundle: Bundle, threads: int, verify: bool, tower_memory: int | None, inspect_seconds: float
    ) -> None:
        folder = bundle.folder
        with ThreadPoolExecutor(2) as pool:  # both calls wait for child processes that verify files
            index = pool.submit(load_index, folder / "index", verify=verify)
            towers = {folder / path: digest for path, digest in self.digests.items() if path.endswith(".onnx")}
            limits = InspectionLimits(cpu_seconds=inspect_seconds, max_memory=tower_memory)
            inspected = pool.submit(tower.inspect_towers, towers, limits=limits)
            # The item tower is not run, so its columns are not encoded.
            self.dataset: Dataset = memmap.load(
                folder, bundle.manifest.table_schema, bundle.manifest.split, encode=("user",)
            )
            self.user_ids, self.item_ids = IdColumn(self.dataset.users.ids), IdColumn(self.dataset.items.ids)
            self.titles = TextColumn(self.dataset.title_column())
            self.columns: dict[str, Column] = self.dataset.side_before("user", TEST).columns
            self.user_vectors: Floats = read_checked(folder / "user_vectors.npy", _matrix)
            inspected.result()
            self.tower = OnnxTower(folder / "user_tower.onnx", threads)
            self.fields = self.dataset.encoders.fields("user")
            self.index: Index = index.result()
        self.index.threads = threads
        bundle.check_consistency(
            {
                "encoders.json": {"vocab_hash": self.digests.get("encoders.json")},
                "model.safetensors": {"model": self.digests.get("model.safetensors")},
                "user_vectors.npy": {"users": len(self.user_vectors), "dims": self.user_vectors.shape[1]},
                "index": {
                    "items": len(self.index) + len(self.index.rejected),
                    "dims": self.index.width,
                    "metric": self.index.metric,
                }
                | ({"model": self.index.describe()["model"]} if self.index.remote else {}),
                "users.parquet": {"users": len(self.dataset.users)},
                "items.parquet": {"items": len(self.dataset.items)},
                "user_tower.onnx": {"model": self.tower.model, "dims": self.tower.width},
            }
        )
        counts = {name: len(c.offsets) - 1 if isinstance(c, Ragged) else len(c) for name, c in self.columns.items()}
        for name, found, expected in (
            *((f"user column '{f.name}'", counts.get(f.name, 0), len(self.user_ids)) for f in self.schema.side("user")),
            ("seen items of users", len(self.seen.offsets) - 1, len(self.user_ids)),
            ("positives of items", len(self.dataset.item_positive_counts), len(self.item_ids)),
        ):
            if found != expected:
                raise RunError(f"{folder}: damaged ({name}: {found:,} rows, expected {expected:,})")
        self._filter_cache: dict[tuple[tuple[str, str], ...], Ints] = {}
        self._filter_lock = threading.Lock()
        # Computed now, so that the first request does not wait for them.
        _ = self.seen, self._item_codes, self.popular, self._popularity_rank
        _ = self._features, self._request_dtypes, self._default_inputs
        if not self.index.remote:
            rows, lengths = self._norms
            if not np.isfinite(lengths).all():
                row = rows[np.argmin(np.isfinite(lengths))]
                raise RunError(f"{bundle.folder / 'index'}: damaged (the vector of item row {row} is not finite)")

    @property
    def schema(self) -> Schema:
        return self.dataset.schema

    @property
    def seen(self) -> Ragged:
        """Item rows of all interactions of each user row, in all parts; `source` holds the interactions' numbers."""
        return self.dataset.interacted_items

    @cached_property
    def popular(self) -> Ints:
        """Item rows in descending order of training positives."""
        return np.argsort(-self.dataset.item_positive_counts, kind="stable")

    @cached_property
    def _popularity_rank(self) -> Ints:
        """Position in `popular` of each item row."""
        rank = np.empty_like(self.popular)
        rank[self.popular] = np.arange(len(rank))
        return rank

    @property
    def user_columns(self) -> list[str]:
        """Columns allowed in the `features` of a request."""
        return [name for name in self._request_dtypes if name != self.schema.user_id]

    @property
    def item_columns(self) -> list[str]:
        """Columns allowed in `where`."""
        dtypes = self.dataset.items.frame.schema
        return [c for c in _visible_columns(dtypes) if isinstance(dtypes[c], pl.List) or not dtypes[c].is_nested()]

    def history(self, user_id: str, n: int) -> list[tuple[str, str, bool]]:
        """Return id, title and liked of the last `n` interactions of a user, oldest first, without the test part.

        Raises UnknownId.
        """
        row, data = self._user_row(user_id), self.dataset
        assert self.seen.source is not None
        indices = self.seen.source[self.seen.offsets[row] : self.seen.offsets[row + 1]]
        parts = data.parts[indices]
        indices = indices[parts != TEST] if data.time_ordered else indices[parts == TRAIN]
        if data.times is not None:
            indices = indices[np.argsort(data.times[indices], kind="stable")]
        indices = indices[max(0, len(indices) - n) :]
        liked = data.pairs.positive[indices].tolist()
        return [
            (self.item_ids[i], self.titles[i], like)
            for i, like in zip(data.pairs.item[indices].tolist(), liked, strict=True)
        ]

    def has_user(self, user_id: str) -> bool:
        """Return True if the user is in the bundle."""
        return self.user_ids.row(user_id) is not None

    def stored_features(self, user_id: str) -> dict[str, Any]:
        """Return the stored features of a user, which the `features` of a request replace. Raises UnknownId."""
        row: dict[str, Any] = self.dataset.users.frame.row(self._user_row(user_id), named=True)
        return {name: row[name] for name in self.user_columns}

    def seen_items(self, user_id: str) -> list[str]:
        """Return the ids of the items that a user has seen, which answers exclude. Raises UnknownId."""
        items: list[str] = self.item_ids.column.gather(row_of(self.seen, self._user_row(user_id))).to_list()
        return items

    def _user_row(self, user_id: str) -> int:
        row = self.user_ids.row(str(user_id))
        if row is None:
            raise UnknownId(f"user '{user_id}' is not among the {len(self.user_ids):,} users of this bundle")
        return row

    # ---- one user

    def recommend(
        self,
        request: Request,
        k: int = 10,
        method: Method = 1,
        *,
        allow: abc.Sequence[str] | None = None,
        ban: abc.Sequence[str] = (),
        where: Mapping[str, str] | None = None,
        keep_seen: bool = False,
        exact: bool = False,
        vector: Floats | None = None,
        fallback: bool = False,
    ) -> Answer:
        """Return the `k` items with the highest scores for a user, without seen items unless `keep_seen`.

        `allow` and `ban` are item ids; `where` requires an item column to equal a value, or to hold it (a column of lists).
        An unknown user gets the tower's vector of what the request gives ("cold_start"), or the most popular items if it
        gives nothing ("popular"). `vector` (1, D) replaces the one of `embed_request`. `fallback` answers with the most
        popular items without a search ("fallback"). `exact` scores all items. Raises DataError for an invalid argument,
        Unavailable if the server of the index does not answer.
        """
        started = time.perf_counter()
        check_k(k)
        if isinstance(allow, str) or isinstance(ban, str):
            raise DataError("allow or ban is a text, expected a list of item ids")
        check_method(method)
        row = self._find_user(request)
        source = _answer_source(request, row)
        unknown: list[str] = []
        named = self._item_rows_by_id(request)
        excluded = self._known_item_rows(ban)
        if not keep_seen:
            given = np.array([r for r in named.values() if r >= 0], np.int64)
            stored = row_of(self.seen, row) if row is not None else excluded[:0]
            excluded = np.concatenate([excluded, given, stored])
        allowed = self._allowed_rows(allow, where)
        if fallback:
            source = "fallback"
        if fallback or (vector is None and source == "popular"):
            rows, scores = self._most_popular(k, excluded, allowed)
        else:
            if vector is None:
                vector = self._request_vector(request, row, method, named, unknown)
            elif source == "popular":
                source = "cold_start"
            found, values = self.index.search(vector, k, allowed=allowed, banned=[excluded], exact=exact)
            rows, scores = found[0], values[0]
        items = self._answer_items(rows, scores)
        spent = (time.perf_counter() - started) * 1e3
        return Answer(items, self.bundle.id, method, source, round(spent, 3), len(items) < k, unknown)

    def embed_request(self, request: Request, method: Method = 2) -> tuple[Floats, Source, list[str]]:
        """Return the vector (1, D) that `recommend` searches with, its source, and the unknown parts of the request.

        With source "popular", a user without data, `recommend` does not search; the vector is then the tower's of empty
        inputs. Raises DataError as `recommend` does.
        """
        check_method(method)
        row = self._find_user(request)
        unknown: list[str] = []
        return (
            self._request_vector(request, row, method, self._item_rows_by_id(request), unknown),
            _answer_source(request, row),
            unknown,
        )

    def _find_user(self, request: Request) -> int | None:
        """Return the row of the request's user, None for an unknown one."""
        return None if request.user_id is None else self.user_ids.row(request.user_id)

    def unknown_items(self, items: Iterable[str]) -> list[str]:
        """Return the distinct item ids that are not in the bundle."""
        distinct = list(dict.fromkeys(items))
        return [i for i, row in zip(distinct, self.item_ids.rows(distinct), strict=True) if row < 0]

    def _item_rows_by_id(self, request: Request) -> dict[str, int]:
        """Return the row of each item in history and events, -1 for unknown items."""
        items = [i for i, _ in (*(request.history or ()), *request.events)]
        return dict(zip(items, self.item_ids.rows([str(i) for i in items]), strict=True))

    def _request_vector(
        self, request: Request, row: int | None, method: Method, named: dict[str, int], unknown: list[str]
    ) -> Floats:
        if method == 2 or row is None:
            return self._run_tower(request, row, named, unknown)
        if request.features:
            raise DataError(
                f"request: method 1 (precomputed user vectors) takes no features, and user '{request.user_id}' has some; use "
                "method 2, or leave the features out"
            )
        vector: Floats = self.user_vectors[row : row + 1]
        return vector

    def explain(self, request: Request, method: Method = 2) -> tuple[Floats, list[tuple[GateInfo, Floats]]]:
        """Return the vector (1, D) that `recommend` searches with, and the weights (fields,) of each SENet gate.

        Raises DataError as `recommend` does.
        """
        check_method(method)
        row = self._find_user(request)
        named = self._item_rows_by_id(request)
        vector, weights = self.tower.explain(self._tower_inputs(request, row, named, []))
        if method == 1 and row is not None:
            vector = self._request_vector(request, row, 1, named, [])
        _check_vector(vector)
        return vector, [(gate, w[0]) for gate, w in zip(self.tower.gates, weights, strict=True)]

    def _run_tower(self, request: Request, row: int | None, named: dict[str, int], unknown: list[str]) -> Floats:
        """Return the user tower's vector (1, D) of the stored columns of `row`, updated by the request."""
        vector = self.tower(self._tower_inputs(request, row, named, unknown))
        _check_vector(vector)
        return vector

    def _tower_inputs(self, request: Request, row: int | None, named: dict[str, int], unknown: list[str]) -> Feed:
        """Return the inputs of the user tower for a request."""
        given = self._request_columns(request, row)
        values: dict[str, npt.NDArray[Any]] = {}
        for f in self._features:
            if isinstance(f, Sequence):
                values[f.name] = self._sequence_codes(f, request, row, named, unknown)
                continue
            if f.source in given:
                values[f.name] = row_of(self.dataset.encoders.encode(f, given[f.source]), 0)
            elif row is not None:
                values[f.name] = row_of(self.columns[f.name], row)
            else:
                default = self._default_inputs[f.name]
                if isinstance(default, str):
                    raise DataError(default)
                values[f.name] = default
            if f.source in request.features and _is_unknown(values[f.name]):
                unknown.append(f.name)
        return feed_row(self.fields, values)

    def _request_columns(self, request: Request, row: int | None) -> dict[str, pl.Series]:
        """Return one value of the column's type for each column that the request names."""
        values, key = dict(request.features), self.schema.user_id
        if request.user_id is not None and row is None:
            values.setdefault(key, request.user_id)
        columns: dict[str, pl.Series] = {}
        for name, value in values.items():
            if name not in self._request_dtypes:
                if name == key:  # no feature reads it
                    continue
                allowed = sorted(self.user_columns)
                raise DataError(
                    f"request: no feature '{name}'{did_you_mean(name, allowed)} (allowed: {', '.join(allowed) or 'none'})"
                )
            dtype = self._request_dtypes[name]
            try:
                if isinstance(value, dict):
                    raise TypeError
                given = pl.Series(name, [value], strict=False)
                columns[name] = _cast_value(given, dtype, name in self._categorical_columns)
            except (pl.exceptions.PolarsError, TypeError, ValueError, OverflowError):  # ValueError: a lone surrogate
                if name == key:  # an id of another kind is an unknown user
                    continue
                raise DataError(f"request: feature '{name}' is {value!r}, expected {dtype}") from None
        return columns

    @cached_property
    def _features(self) -> tuple[Feature, ...]:
        """Features of the user tower."""
        return self.schema.side("user")

    @cached_property
    def _request_dtypes(self) -> dict[str, pl.DataType]:
        """Columns that a request may give, with their types; statistics are computed, not given."""
        frame = self.dataset.users.frame.schema
        read = {
            f.source: frame[f.source]
            for f in self._features
            if not isinstance(f, Sequence) and not (isinstance(f, Numeric) and f.statistic)
        }
        # A text column of digits only was read as numbers; a request may give any text.
        return read | {f.source: pl.String() for f in self.schema.texts("user")}

    @cached_property
    def _categorical_columns(self) -> set[str]:
        """Columns that are read as values of a vocabulary, not as numbers."""
        numbers = {f.source for f in self._features if isinstance(f, Numeric | Vector)}
        return {f.source for f in self._features if isinstance(f, Categorical | MultiHot)} - numbers

    @cached_property
    def _default_inputs(self) -> dict[str, npt.NDArray[Any] | str]:
        """Input of each feature for a request without a value, or the error message if a value is required."""
        empty = self.dataset.users.frame.clear(1)
        found: dict[str, npt.NDArray[Any] | str] = {}
        for f in self._features:
            if isinstance(f, Sequence):
                continue
            series = empty[f.source].cast(self._request_dtypes.get(f.source, empty.schema[f.source]))
            if isinstance(f, Numeric) and f.statistic == "count":
                series = series.fill_null(0.0)
            try:
                found[f.name] = row_of(self.dataset.encoders.encode(f, series), 0)
            except DataError as e:
                found[f.name] = str(e)
        return found

    def _sequence_codes(
        self, feature: Sequence, request: Request, row: int | None, named: dict[str, int], unknown: list[str]
    ) -> Codes:
        """Return the codes of a sequence: the stored or given history, extended by the events."""
        if request.history is not None:
            codes = self._event_codes(feature, request.history, named, unknown)
        else:
            codes = row_of(self.columns[feature.name], row) if row is not None else np.zeros(0, np.int32)
        if request.events:
            events = request.events
            if self.schema.duplicates == "last":  # as in training: the last interaction of a pair counts
                codes = codes[~np.isin(codes, self._codes_of_events(feature, events, named))]
                last: dict[str, bool] = {}
                for item, liked in events:
                    last.pop(item, None)
                    last[item] = liked
                events = list(last.items())
            codes = np.concatenate([codes, self._event_codes(feature, events, named, unknown)])
        return codes[-feature.max_length :]  # 0: all

    def _event_codes(
        self, feature: Sequence, history: abc.Sequence[tuple[str, bool]], named: dict[str, int], unknown: list[str]
    ) -> Codes:
        """Return the codes of those events that belong to a sequence and whose items are known."""
        rows: list[int] = []
        unknown_items: dict[str, None] = {}
        for item, liked in history:
            row = named[item]
            if row < 0:
                unknown_items[item] = None
            elif feature.interactions == "all" or (feature.interactions == "positive") == liked:
                rows.append(row)
        if unknown_items:
            unknown[:] = dict.fromkeys([*unknown, *unknown_items])
        return self._item_codes[feature.name][np.array(rows, np.int64)]

    def _codes_of_events(
        self, feature: Sequence, events: abc.Sequence[tuple[str, bool]], named: dict[str, int]
    ) -> Codes:
        """Return the codes of the items of events, liked or not, without the code of unknown items."""
        codes = self._item_codes[feature.name][np.array([r for i, _ in events if (r := named[i]) >= 0], np.int64)]
        known: Codes = codes[codes != UNKNOWN]
        return known

    @cached_property
    def _item_codes(self) -> dict[str, Codes]:
        """Code of each item row, by sequence feature of the user side."""
        encoders, ids = self.dataset.encoders, self.dataset.items.ids
        return {f.name: encoders.sequence_codes(f, ids) for f in self.schema.side("user") if isinstance(f, Sequence)}

    def _most_popular(self, k: int, excluded: Ints, allowed: Ints | None) -> tuple[Ints, Floats]:
        # The first k + len(excluded) suffice; a catalogue may be large.
        n = k + len(excluded)
        if allowed is None:
            rows = self.popular[:n]
        else:
            rank = self._popularity_rank[allowed]
            rows = self.popular[np.sort(np.partition(rank, n)[:n] if n < len(rank) else rank)]
        rows = rows[~np.isin(rows, excluded)][:k]
        return rows, np.zeros(len(rows), np.float32)

    def _answer_items(self, rows: Ints, scores: Floats) -> list[Item]:
        ids, titles = self.item_ids.column, self.titles.column
        found = zip(rows.tolist(), scores.tolist(), strict=True)
        return [Item(ids[row], score, titles[row]) for row, score in found if row >= 0]

    def _known_item_rows(self, ids: abc.Sequence[str]) -> Ints:
        """Return the rows of those item ids that are in the bundle."""
        return np.array([r for r in self.item_ids.rows([str(i) for i in ids]) if r >= 0], np.int64)

    def count_allowed(self, allow: abc.Sequence[str] | None, where: Mapping[str, str] | None) -> int | None:
        """Return the number of items that pass the filters, None without filters. Raises DataError."""
        allowed = self._allowed_rows(allow, where)
        return None if allowed is None else len(allowed)

    def _allowed_rows(self, allow: abc.Sequence[str] | None, where: Mapping[str, str] | None) -> Ints | None:
        """Return the rows of the items that pass the filters, ascending; None without filters."""
        allowed = None if allow is None else np.unique(self._known_item_rows(allow))
        if not where:
            return allowed
        rows = self._matching_rows(tuple((column, str(value)) for column, value in where.items()))
        return rows if allowed is None else _intersection(rows, allowed)

    def _matching_rows(self, wanted: tuple[tuple[str, str], ...]) -> Ints:
        """Return the item rows, ascending, whose columns have the values; recent results are cached."""
        with self._filter_lock:
            if (rows := self._filter_cache.pop(wanted, None)) is not None:
                self._filter_cache[wanted] = rows  # now the most recent
                return rows
        if len(wanted) == 1:
            rows = self._rows_with_value(*wanted[0])
        else:
            rows = reduce(_intersection, (self._matching_rows((one,)) for one in wanted))
        rows.setflags(write=False)
        with self._filter_lock:
            self._filter_cache[wanted] = rows
            while (
                sum(map(len, self._filter_cache.values())) > FILTER_CACHE_ROWS
                or len(self._filter_cache) > FILTER_CACHE_ENTRIES
            ):
                del self._filter_cache[next(iter(self._filter_cache))]
        return rows

    def _rows_with_value(self, column: str, value: str) -> Ints:
        """Return the item rows whose column equals the value, or holds it (a column of lists)."""
        frame = self.dataset.items.frame
        known = _visible_columns(frame.columns)
        if column not in known:
            raise DataError(
                f"filter: items have no column '{column}'{did_you_mean(column, known)} (allowed: {', '.join(known)})"
            )
        series = frame[column]
        value = value.encode(errors="backslashreplace").decode()  # a lone surrogate, which no column holds
        for f in self.schema.side("item"):
            if isinstance(f, MultiHot) and f.source == column and f.separator and series.dtype == pl.String:
                series = series.str.split(f.separator)
        if isinstance(series.dtype, pl.List):
            found = series.cast(pl.List(pl.String)).list.contains(value)
        elif series.dtype.is_nested():
            raise DataError(f"filter: items' column '{column}' holds {series.dtype}, which cannot be compared")
        else:
            found = canonical_ids(series).cast(pl.String) == value
        return np.flatnonzero(found.fill_null(False).to_numpy()).astype(np.int64)

    # ---- text search

    def search(
        self,
        text: str,
        k: int = 10,
        feature: str = "",
        *,
        allow: abc.Sequence[str] | None = None,
        ban: abc.Sequence[str] = (),
        where: Mapping[str, str] | None = None,
        exact: bool = False,
    ) -> Answer:
        """Return the `k` items with the highest scores for a text, by the user tower with that text as its only input.

        `feature` names a text feature of the users, and is required if their text features read several columns. Filters
        are those of `recommend`. If the model knows none of the text's n-grams, the answer is the most popular items
        (source "popular"), and `unknown` names the features. Raises DataError for an unknown feature or a text without a
        word.
        """
        if not isinstance(text, str):
            raise DataError(f"search: the text is {text!r}, expected text")
        column = self._text_column(feature)
        for f in self.schema.side("user"):
            if f.missing == "error" and f.source != column:
                raise DataError(
                    f"search: feature '{f.name}' of the users has missing = 'error', so a text alone does not suffice; use "
                    "recommend, with features"
                )
        text = text.encode(errors="replace").decode()  # a lone surrogate is no letter
        if not len(words(pl.Series(column, [text]))[1]):
            raise DataError("search: the text holds no word, expected at least one letter or digit")
        request = Request(features={column: text})
        answer = self.recommend(request, k, 2, allow=allow, ban=ban, where=where, exact=exact)
        if len(answer.unknown) < sum(f.source == column for f in self.schema.side("user")):
            return replace(answer, source="model")
        popular = self.recommend(Request(), k, 2, allow=allow, ban=ban, where=where)
        return replace(popular, unknown=answer.unknown)

    def _text_column(self, name: str) -> str:
        """Return the column of the text feature `name` of the users, or the column that all text features read."""
        columns = {f.name: f.source for f in self.schema.texts("user")}
        if not columns:
            raise DataError(
                "search: the users of this bundle have no text feature; train with a feature of kind = 'text', side = 'user'"
            )
        if name and name not in columns:
            raise DataError(
                f"search: no text feature '{name}'{did_you_mean(name, columns)} (allowed: {', '.join(columns)})"
            )
        if not name and len(set(columns.values())) > 1:
            raise DataError(f"search: the users have {len(columns)} text features; name one of {', '.join(columns)}")
        return columns[name] if name else next(iter(columns.values()))

    # ---- items

    def similar(self, item_id: str, k: int = 10) -> Answer:
        """Return the `k` items with the highest cosine to an item, without the bias columns.

        Raises UnknownId for an unknown item, DataError for one without a vector, Unavailable.
        """
        started = time.perf_counter()
        check_k(k)
        row = self.item_ids.row(str(item_id))
        if row is None:
            raise UnknownId(f"item '{item_id}' is not among the {len(self.item_ids):,} items of this bundle")
        query = self._vectors_without_bias(np.array([row]))
        if not len(query):
            raise DataError(f"item '{item_id}' has no vector (the index rejected it: not finite, or of norm 0)")
        query /= np.maximum(np.linalg.norm(query), 1e-12)
        if self.index.remote:
            rows, scores = self._nearest(query, k)
        else:
            rows, lengths = self._norms
            scores = self.index.scores(query) / lengths
        if (at := int(np.searchsorted(rows, row))) < len(rows) and rows[at] == row:
            scores[at] = -np.inf
        n = min(k, len(scores) - 1)
        best = np.argpartition(scores, len(scores) - n)[len(scores) - n :] if n else np.zeros(0, np.int64)
        best = best[np.lexsort((best, -scores[best]))]
        items = self._answer_items(rows[best], scores[best])
        spent = (time.perf_counter() - started) * 1e3
        return Answer(items, self.bundle.id, 1, "model", round(spent, 3), len(items) < k)

    def _nearest(self, query: Floats, k: int) -> tuple[Ints, Floats]:
        """Return rows, ascending, that include those nearest to a unit vector (1, D), and their cosines.

        The index ranks by inner product; if norms differ, more candidates are needed to include the highest cosines.
        """
        n = min(len(self.index), k + 1 if self.bundle.manifest.similarity == "cosine" else 8 * k + 64)
        rows = np.sort(self.index.search(query, n)[0][0])
        rows = rows[rows >= 0]
        vectors = self._vectors_without_bias(rows)
        cosines = (vectors @ query[0]) / np.maximum(np.linalg.norm(vectors, axis=1), 1e-12)
        return rows, cosines

    def _vectors_without_bias(self, rows: Ints) -> Floats:
        """Return the vectors (n, D) of rows of the index, with zeros in the bias columns."""
        vectors = np.array(self.index.vectors(rows), np.float32)
        if self.bundle.manifest.bias:
            vectors[:, -2:] = 0
        return vectors

    @cached_property
    def _norms(self) -> tuple[Ints, Floats]:
        """Rows (N,) of the index, and the norms (N,) of their vectors without the bias columns."""
        rows = self.index.rows
        lengths = np.empty(len(rows), np.float32)
        for start in range(0, len(rows), NORM_BLOCK_ROWS):
            part = slice(start, start + NORM_BLOCK_ROWS)
            lengths[part] = np.linalg.norm(self._vectors_without_bias(rows[part]), axis=1)
        return rows, np.maximum(lengths, 1e-12)

    @cached_property
    def unit_vectors(self) -> tuple[Floats, Ints, Ints]:
        """Unit vectors (n, D) without the bias columns, their item rows (n,), and the position of each item row (-1: none).

        Of a remote index, only the most popular items. Raises Unavailable.
        """
        if self.index.remote:
            known = self.popular[np.isin(self.popular, self.index.rows)]
            rows = np.sort(known[:REMOTE_MAP_ITEMS])
            vectors = self.index.vectors(rows)
            lengths = np.maximum(
                np.linalg.norm(vectors[:, :-2] if self.bundle.manifest.bias else vectors, axis=1), 1e-12
            )
        else:
            rows, lengths = self._norms
            vectors = self.index.vectors(rows)
        if self.bundle.manifest.bias:
            vectors = vectors[:, :-2]
        position = np.full(len(self.item_ids), -1, np.int64)
        position[rows] = np.arange(len(rows))
        return vectors / lengths[:, None], rows, position

    # ---- many users

    def rank_items(
        self, users: Ints, k: int, method: Method, seen: Ragged, exact: bool = False, block: int = 256
    ) -> Ints:
        """Return the top `k` item rows (B, k) for user rows (B,), without those in `seen`, padded with -1."""
        best = np.full((len(users), k), -1, np.int64)
        for start in range(0, len(users), block):
            rows = users[start : start + block]
            vectors = self.embed_users(rows, method)
            banned = [np.unique(row_of(seen, int(r))) for r in rows]
            best[start : start + block] = self.index.search(vectors, k, banned=banned, exact=exact)[0]
        return best

    def embed_users(self, users: Ints, method: Method) -> Floats:
        """Return the vectors (B, D) of user rows (B,): precomputed (1), or by the tower on stored features (2)."""
        if method == 1:
            return np.asarray(self.user_vectors[users], np.float32)
        # Attention holds a weight for every two items of a history, for all users of a call.
        longest = max((f.limit for f in self.fields), default=0)
        step = max(1, ATTENTION_MAX_CELLS // longest**2) if longest else max(1, len(users))
        blocks = range(0, max(1, len(users)), step)
        return np.concatenate([self.tower(feed(self.fields, self.columns, users[b : b + step])) for b in blocks])

    def seen_before(self, part: int) -> Ragged:
        """Return the item rows of each user's interactions in the parts before `part`."""
        pairs, parts = self.dataset.pairs, self.dataset.parts
        keep = (parts < part) if part != TRAIN else np.zeros(len(parts), bool)
        return Ragged.from_pairs(pairs.user[keep], pairs.item[keep], len(self.user_ids))


def _cast_value(given: pl.Series, dtype: pl.DataType, category: bool) -> pl.Series:
    """Cast a value of a request to the column's type. Raises PolarsError.

    Categories of whole numbers keep their spelling: "007" is not 7, and 1.5 not 1.
    """
    column = given.cast(dtype, strict=True) if given.dtype != dtype else given
    given_type, kept = (t.inner if isinstance(t, pl.List | pl.Array) else t for t in (given.dtype, dtype))
    return given if category and kept.is_integer() and (given_type == pl.String or given_type.is_float()) else column


def _matrix(path: Path) -> Floats:
    found: Floats = np.asarray(read_array(path, "r"))
    if found.ndim != 2 or found.dtype != np.float32:
        raise ValueError(f"{found.dtype} of shape {found.shape}, expected vectors of float32")
    return found


def _check_vector(vector: Floats) -> None:
    if not np.linalg.norm(vector.astype(np.float64)) < MAX_NORM:
        raise DataError("request: the user tower's vector is not finite; use smaller numbers in the features")


def _answer_source(request: Request, row: int | None) -> Source:
    if row is not None:
        return "model"
    return "cold_start" if request.has_details else "popular"


def _visible_columns(columns: Iterable[str]) -> list[str]:
    """Return the columns of a table without those of computed statistics."""
    return [c for c in columns if not c.startswith("__")]


def _intersection(rows: Ints, others: Ints) -> Ints:
    """Return the rows in both ascending arrays."""
    fewer, more = (rows, others) if len(rows) < len(others) else (others, rows)
    return fewer[is_in_sorted(more, fewer)]


def _is_unknown(values: npt.NDArray[Any]) -> bool:
    """Return True if one row of an encoded column holds only the code of unknown values."""
    return values.dtype == np.int32 and not values.any()
