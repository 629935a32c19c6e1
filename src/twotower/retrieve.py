"""The best items for a user, from a published bundle: two methods behind one call.

Method 1 looks the user's vector up. Method 2 runs the user tower on the features and the history of the request.
Both search the same index, so an unchanged user gets the same answer. Evaluation asks this same object.

No torch: the tower is an ONNX graph.
"""

from __future__ import annotations

import json
import time
import tomllib
from collections.abc import Mapping
from collections.abc import Sequence as Many
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import polars as pl

from twotower import config as settings
from twotower import index as indexes
from twotower import storage
from twotower.bundle import Bundle
from twotower.config import Config
from twotower.data import dataset as datasets
from twotower.data.dataset import Dataset
from twotower.data.feed import feed
from twotower.data.splits import TEST, TRAIN
from twotower.encoders import UNKNOWN, Column, Floats, Ints, Ragged, spelled, words
from twotower.errors import ConfigError, DataError, RunError, nearest
from twotower.index import Index
from twotower.index.exact import LONGEST
from twotower.onnx_tower import OnnxTower
from twotower.schema import MultiHot, Numeric, Schema, Sequence

Method = Literal[1, 2]
Source = Literal["model", "cold_start", "popular"]
MAX_K = 10_000
CELLS = 2**21
"""Products of two items of a history that a call of the tower may hold for each of its heads."""


@dataclass(frozen=True)
class Request:
    """Who asks. `user_id` is known or not; `features` replace the stored ones; `history` replaces the stored one, and
    `events` have happened since: they go on from whichever it is.

    Method 1 answers a known user from the stored vector: it only leaves out what `history` and `events` name,
    and takes no `features`.
    """

    user_id: str | None = None
    features: Mapping[str, Any] = field(default_factory=dict)
    history: Many[tuple[str, bool]] | None = None  # item ids, oldest first, and whether the user liked each
    events: Many[tuple[str, bool]] = ()  # likewise

    def __post_init__(self) -> None:
        if self.user_id is not None:
            object.__setattr__(self, "user_id", str(self.user_id))

    @classmethod
    def parse(cls, body: Any) -> Request:
        """From JSON: {"user_id", "features": {column: value}, "history": [id or {"id", "liked"}], "events": [likewise]}.

        Raises DataError for anything else.
        """
        if not isinstance(body, dict):
            raise DataError('a request is a JSON object such as {"features": {"age": 25}, "history": ["1", "2"]}')
        known = ("user_id", "features", "history", "events")
        for key in body:
            if key not in known:
                raise DataError(f"request: unknown key '{key}'{nearest(key, known)} (allowed: {', '.join(known)})")
        user_id, features = body.get("user_id"), body.get("features")
        if isinstance(user_id, bool) or not isinstance(user_id, str | int | None):
            raise DataError(f"request: user_id is {user_id!r}, expected text or a number")
        if not isinstance(features, dict | None):
            raise DataError("request: features is not an object of columns and values")
        lists: dict[str, list[tuple[str, bool]]] = {}
        for name in ("history", "events"):
            if (value := body.get(name)) is not None:
                if not isinstance(value, list):
                    raise DataError(f"request: {name} is not a list")
                lists[name] = [_event(e) for e in value]
        return cls(
            None if user_id is None else str(user_id), features or {}, lists.get("history"), lists.get("events", [])
        )


def _event(event: Any) -> tuple[str, bool]:
    if isinstance(event, str | int) and not isinstance(event, bool):
        return str(event), True
    if isinstance(event, dict) and set(event) <= {"id", "liked"}:
        item, liked = event.get("id"), event.get("liked", True)
        if isinstance(item, str | int) and not isinstance(item, bool) and isinstance(liked, bool):
            return str(item), liked
    raise DataError(f'request: {event!r} is no event of a history, expected an item id or {{"id": …, "liked": true}}')


@dataclass(frozen=True)
class Item:
    """An item by external id, with its score (the logit; for `similar` a cosine) and the line to show."""

    id: str
    score: float
    title: str


@dataclass(frozen=True)
class Answer:
    """What a call gives back; `to_json` is the wire form."""

    items: list[Item]
    bundle_id: str
    method: int
    source: Source
    milliseconds: float
    truncated: bool = False
    """Fewer than k were left to give."""
    unknown: list[str] = field(default_factory=list)
    """Features whose values the model has never met, and items of the history it does not know."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False, allow_nan=False)


class Retriever:
    """One bundle, loaded."""

    def __init__(self, bundle: Bundle, threads: int = 1) -> None:
        """`bundle` has been verified by `Bundle.open`. Raises RunError or BundleError if its parts do not agree."""
        self.bundle = bundle
        with bundle.lease():  # once everything is open or read, nobody can take it away
            self._load(bundle, threads)

    def _load(self, bundle: Bundle, threads: int) -> None:
        folder = bundle.folder
        schema, self.config = _settings(folder)
        # The item tower is not asked here, so its columns are not made.
        self.dataset: Dataset = datasets.load(folder, schema, self.config.split, encode=("user",))
        self.index: Index = indexes.load(folder / "index")
        self.index.threads = threads
        self.user_vectors: Floats = datasets.read(folder / "user_vectors.npy", lambda p: np.load(p, mmap_mode="r"))
        self.tower = OnnxTower(folder / "user_tower.onnx", threads)
        self.fields = self.dataset.encoders.fields("user")
        told = datasets.read(folder / "vectors.json", storage.read_json)
        digests = {entry["path"]: entry["sha256"] for entry in bundle.manifest["files"]}
        bundle.agree(
            {
                "encoders.json": {"vocab_hash": digests.get("encoders.json")},
                "model.safetensors": {"model": digests.get("model.safetensors")},
                "vectors.json": {n: told.get(n) for n in ("model", "dims", "metric", "users", "items")},
                "user_vectors.npy": {"users": len(self.user_vectors), "dims": self.user_vectors.shape[1]},
                "index": {
                    "items": len(self.index) + len(self.index.rejected),
                    "dims": self.index.width,
                    "metric": self.index.metric,
                },
                "users.parquet": {"users": len(self.dataset.users)},
                "items.parquet": {"items": len(self.dataset.items)},
                "user_tower.onnx": {"model": self.tower.model, "dims": self.tower.width},
                "config.toml": {"metric": self.config.model.metric},
            }
        )
        self.columns: dict[str, Column] = self.dataset.side_before("user", TEST).columns
        self.titles = self.dataset.titles()
        self.user_ids = self.dataset.users.ids.cast(pl.String).to_list()
        self.item_ids = self.dataset.items.ids.cast(pl.String).to_list()
        self._user_row = {user: row for row, user in enumerate(self.user_ids)}
        self._item_row = {item: row for row, item in enumerate(self.item_ids)}
        _ = self.seen, self._codes  # made now, not by the first who asks

    @property
    def schema(self) -> Schema:
        return self.dataset.schema

    @cached_property
    def seen(self) -> Ragged:
        """User row -> item rows of all their interactions, whatever the part."""
        pairs = self.dataset.pairs
        return Ragged.from_pairs(pairs.user, pairs.item, len(self.user_ids))

    @cached_property
    def _popular(self) -> Ints:
        """Item rows, most training positives first."""
        train = self.dataset.train
        counts = np.bincount(train.item[train.positive], minlength=len(self.item_ids))
        return np.argsort(-counts, kind="stable")

    # ---- one user

    def recommend(
        self,
        request: Request,
        k: int = 10,
        method: Method = 1,
        *,
        allow: Many[str] | None = None,
        ban: Many[str] = (),
        where: Mapping[str, str] | None = None,
        keep_seen: bool = False,
        exact: bool = False,
    ) -> Answer:
        """The best `k` items for who asks, what they have met left out unless `keep_seen`.

        `allow` and `ban` are item ids, `where` wants an item column to equal a value (or to hold it, for a column of
        several). A user the bundle does not know gets the tower on what the request says of them ("cold_start"), or
        the most popular items if it says nothing ("popular"). Raises DataError for what cannot be used.
        """
        started = time.perf_counter()
        _check_k(k)
        if isinstance(allow, str) or isinstance(ban, str):
            raise DataError("allow and ban are lists of item ids, not one text")
        if method not in (1, 2):
            raise DataError(f"method is {method}, expected 1 (stored vectors) or 2 (the user tower live)")
        row = self._user_row.get(request.user_id) if request.user_id is not None else None
        told = bool(request.features or request.events) or request.history is not None
        unknown: list[str] = []
        source: Source = "model" if row is not None else "cold_start" if told else "popular"
        banned = [self._rows(ban, strict=False)]
        if not keep_seen:
            if row is not None:
                banned.append(_row_of(self.seen, row))
            met = [i for i, _ in (*(request.history or ()), *request.events)]
            banned.append(self._rows(met, strict=False))
        out = np.unique(np.concatenate(banned))
        allowed = self._allowed(allow, where)
        if source == "popular":
            rows, scores = self._most_popular(k, out, allowed)
        else:
            if method == 2 or row is None:
                vector = self._live(request, row, unknown)
            elif request.features:
                raise DataError(
                    f"request: method 1 answers user '{request.user_id}' from the stored vector, which features do not "
                    "change; ask by method 2, or leave the features out"
                )
            else:
                vector = np.asarray(self.user_vectors[row : row + 1])
            found, values = self.index.search(vector, k, allowed=allowed, banned=[out], exact=exact)
            rows, scores = found[0], values[0]
        items = self._items(rows, scores)
        spent = (time.perf_counter() - started) * 1e3
        return Answer(items, self.bundle.id, method, source, round(spent, 3), len(items) < k, unknown)

    def _live(self, request: Request, row: int | None, unknown: list[str]) -> Floats:
        """(1, D): the user tower on the stored columns of `row`, with what the request says in their place."""
        if row is not None and not request.features and request.history is None and not request.events:
            return self.tower(feed(self.fields, self.columns, np.array([row])))
        frame = self._frame(request, row)
        columns = self.dataset.encoders.transform("user", frame)
        for f in self.schema.side("user"):
            if isinstance(f, Sequence):
                stored = _row_of(self.columns[f.name], row) if row is not None else np.zeros(0, np.int64)  # type: ignore[arg-type]
                codes = stored if request.history is None else self._history(f, request.history, unknown)
                if request.events:
                    events = request.events
                    if self.schema.duplicates == "last":  # as in training: a pair is what it was last
                        codes = codes[~np.isin(codes, self._met(f, events))]
                        last: dict[str, bool] = {}
                        for item, liked in events:
                            last.pop(item, None)
                            last[item] = liked
                        events = list(last.items())
                    codes = np.concatenate([codes, self._history(f, events, unknown)])
                codes = codes[-f.max_length :]  # 0: all
                columns[f.name] = Ragged(codes.astype(np.int32), np.array([0, len(codes)]))
            elif f.source in request.features and _is_unknown(columns[f.name]):
                unknown.append(f.name)
        vector = self.tower(feed(self.fields, columns, np.array([0])))
        if not np.linalg.norm(vector.astype(np.float64)) < LONGEST:
            raise DataError("request: the user tower's vector is not finite; is a number among the features too large?")
        return vector

    def _frame(self, request: Request, row: int | None) -> pl.DataFrame:
        """One row of the users table: the stored one or nulls, with the request's features in their place."""
        users = self.dataset.users.frame
        frame = users[row] if row is not None else users.clear(1)
        # A column of texts that all are digits was read as numbers; what is asked may be anything.
        texts = dict.fromkeys(f.source for f in self.schema.texts("user"))
        frame = frame.with_columns(spelled(frame[name]).cast(pl.String).alias(name) for name in texts)
        wanted, counts = set(), []
        for f in self.schema.side("user"):
            if isinstance(f, Numeric) and f.statistic:  # of the training interactions: not for a request to say
                counts += [f.source] if f.statistic == "count" else []
            elif not isinstance(f, Sequence):
                wanted.add(f.source)
        if row is None:
            frame = frame.with_columns(pl.lit(0.0, frame.schema[name]).alias(name) for name in counts)
        allowed = sorted(wanted - {self.schema.user_id})
        values = dict(request.features)
        if request.user_id is not None and row is None:
            values.setdefault(self.schema.user_id, request.user_id)
        for name, value in values.items():
            if name not in wanted and name != self.schema.user_id:
                raise DataError(
                    f"request: no feature '{name}'{nearest(name, allowed)} (allowed: {', '.join(allowed) or 'none'})"
                )
            dtype = frame.schema[name]
            try:
                if isinstance(value, dict):
                    raise TypeError
                given = pl.Series(name, [value], strict=False)
                series = given.cast(dtype, strict=True) if given.dtype != dtype else given
            except (pl.exceptions.PolarsError, TypeError, ValueError, OverflowError):  # ValueError: half a character
                if name == self.schema.user_id:  # an id of another kind is an unknown user
                    continue
                raise DataError(f"request: feature '{name}' is {value!r}, expected {dtype}") from None
            frame = frame.with_columns(series)
        return frame

    def _history(self, feature: Sequence, history: Many[tuple[str, bool]], unknown: list[str]) -> Ints:
        """The codes of a sequence, of the events that belong in it and whose items are known."""
        rows = []
        for item, liked in history:
            row = self._item_row.get(item)
            if row is None:
                if item not in unknown:
                    unknown.append(item)
            elif feature.of == "all" or (feature.of == "positive") == liked:
                rows.append(row)
        codes = self._codes[feature.name][np.array(rows, np.int64)]
        return codes.astype(np.int64)

    def _met(self, feature: Sequence, events: Many[tuple[str, bool]]) -> Ints:
        """The codes of the items of the events, liked or not; the unknown code is of many items, and none of them."""
        rows = [row for item, _ in events if (row := self._item_row.get(item)) is not None]
        codes = self._codes[feature.name][np.array(rows, np.int64)].astype(np.int64)
        met: Ints = codes[codes != UNKNOWN]
        return met

    @cached_property
    def _codes(self) -> dict[str, npt.NDArray[np.int32]]:
        """Per sequence of the user side the code of every item row."""
        encoders, ids = self.dataset.encoders, self.dataset.items.ids
        return {f.name: encoders.sequence_codes(f, ids) for f in self.schema.side("user") if isinstance(f, Sequence)}

    def _most_popular(self, k: int, out: Ints, allowed: Ints | None) -> tuple[Ints, Floats]:
        # Without a filter the first k and as many as are left out are enough; a catalogue may be large.
        rows = self._popular[: k + len(out)] if allowed is None else self._popular[np.isin(self._popular, allowed)]
        rows = rows[~np.isin(rows, out)][:k]
        return rows, np.zeros(len(rows), np.float32)

    def _items(self, rows: Ints, scores: Floats) -> list[Item]:
        return [
            Item(self.item_ids[r], float(s), self.titles[r]) for r, s in zip(rows.tolist(), scores.tolist(), strict=True)
            if r >= 0
        ]  # fmt: skip

    def _rows(self, ids: Many[str], strict: bool) -> Ints:
        """Rows of item ids; unknown ones are an error if `strict`, else left out."""
        rows = [self._item_row.get(str(i), -1) for i in ids]
        if strict and -1 in rows:
            raise DataError(
                f"item '{ids[rows.index(-1)]}' is not among the {len(self.item_ids):,} items of this bundle"
            )
        return np.array([r for r in rows if r >= 0], np.int64)

    def _allowed(self, allow: Many[str] | None, where: Mapping[str, str] | None) -> Ints | None:
        """Rows that the filters let through, or None without filters."""
        allowed = None if allow is None else np.unique(self._rows(allow, strict=False))
        for column, value in (where or {}).items():
            rows = self._having(column, str(value))
            allowed = rows if allowed is None else np.intersect1d(allowed, rows, assume_unique=True)
        return allowed

    def _having(self, column: str, value: str) -> Ints:
        """Item rows whose column equals the value, or holds it."""
        frame = self.dataset.items.frame
        known = [c for c in frame.columns if not c.startswith("__")]
        if column not in known:
            raise DataError(
                f"filter: items have no column '{column}'{nearest(column, known)} (found: {', '.join(known)})"
            )
        series = frame[column]
        value = value.encode(errors="backslashreplace").decode()  # half a character, which no column holds
        for f in self.schema.side("item"):
            if isinstance(f, MultiHot) and f.source == column and f.separator and series.dtype == pl.String:
                series = series.str.split(f.separator)
        if isinstance(series.dtype, pl.List):
            found = series.cast(pl.List(pl.String)).list.contains(value)
        elif series.dtype.is_nested():
            raise DataError(f"filter: items' column '{column}' holds {series.dtype}, which cannot be compared")
        else:
            found = spelled(series).cast(pl.String) == value
        return np.flatnonzero(found.fill_null(False).to_numpy()).astype(np.int64)

    # ---- a text

    def search(
        self,
        text: str,
        k: int = 10,
        feature: str = "",
        *,
        allow: Many[str] | None = None,
        ban: Many[str] = (),
        where: Mapping[str, str] | None = None,
        exact: bool = False,
    ) -> Answer:
        """The best `k` items for a text, by the user tower on that alone (method 2).

        `feature` names a text feature of the users, if they have some of different columns; filters are as in `recommend`.
        A text of whose grams the model knows none gets the most popular items ("popular"), and `unknown` names its
        features. Raises DataError if there is no such feature, or the text holds no word.
        """
        if not isinstance(text, str):
            raise DataError(f"search: the text is {text!r}, expected text")
        column = self._text_column(feature)
        for f in self.schema.side("user"):
            if f.missing == "error" and f.source != column:
                raise DataError(
                    f"search: feature '{f.name}' of the users has missing = 'error', and a text alone does not give it; "
                    "ask recommend, with features"
                )
        text = text.encode(errors="replace").decode()  # half a character is no letter
        if not len(words(pl.Series(column, [text]))[1]):
            raise DataError("search: the text holds no word; give at least one letter or digit")
        request = Request(features={column: text})
        answer = self.recommend(request, k, 2, allow=allow, ban=ban, where=where, exact=exact)
        if len(answer.unknown) < sum(f.source == column for f in self.schema.side("user")):
            return replace(answer, source="model")
        popular = self.recommend(Request(), k, 2, allow=allow, ban=ban, where=where)
        return replace(popular, unknown=answer.unknown)

    def _text_column(self, name: str) -> str:
        """The column that the text feature `name` of the users reads, or the one that all of them read."""
        columns = {f.name: f.source for f in self.schema.texts("user")}
        if not columns:
            raise DataError(
                "search: this bundle's users have no text feature; train one with kind = 'text', side = 'user'"
            )
        if name and name not in columns:
            raise DataError(f"search: no text feature '{name}'{nearest(name, columns)} (allowed: {', '.join(columns)})")
        if not name and len(set(columns.values())) > 1:
            raise DataError(f"search: the users have {len(columns)} text features; name one of {', '.join(columns)}")
        return columns[name] if name else next(iter(columns.values()))

    # ---- items

    def similar(self, item_id: str, k: int = 10) -> Answer:
        """The `k` items whose vectors point most nearly the same way (biases left out). Raises DataError for an item
        the bundle does not know."""
        started = time.perf_counter()
        _check_k(k)
        row = int(self._rows([item_id], strict=True)[0])
        directions, rows, place = self._directions
        if not place[row] >= 0:
            raise DataError(f"item '{item_id}' has no vector to compare (it was rejected when the index was built)")
        scores = directions @ directions[place[row]]
        scores[place[row]] = -np.inf
        n = min(k, len(scores) - 1)
        best = np.argpartition(-scores, n - 1)[:n] if n else np.zeros(0, np.int64)
        best = best[np.argsort(-scores[best], kind="stable")]
        items = self._items(rows[best], scores[best])
        spent = (time.perf_counter() - started) * 1e3
        return Answer(items, self.bundle.id, 1, "model", round(spent, 3), len(items) < k)

    @cached_property
    def _directions(self) -> tuple[Floats, Ints, Ints]:
        """Unit vectors of the index's rows without the bias columns, these rows, and the place of every item row
        (-1: none)."""
        rows = self.index.rows
        vectors = np.array(self.index.vectors(rows), np.float32)
        if self.config.model.bias:
            vectors = vectors[:, :-2]
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        place = np.full(len(self.item_ids), -1, np.int64)
        place[rows] = np.arange(len(rows))
        return vectors, rows, place

    # ---- many users

    def rank(self, users: Ints, k: int, method: Method, seen: Ragged, exact: bool = False, block: int = 256) -> Ints:
        """(len(users), k) item rows for known users by row, what `seen` holds for them left out; -1 past the end."""
        best = np.full((len(users), k), -1, np.int64)
        for start in range(0, len(users), block):
            rows = users[start : start + block]
            vectors = self.vectors(rows, method)
            banned = [np.unique(_row_of(seen, int(r))) for r in rows]
            best[start : start + block] = self.index.search(vectors, k, banned=banned, exact=exact)[0]
        return best

    def vectors(self, users: Ints, method: Method) -> Floats:
        """(len(users), D) of known users: looked up, or by the tower on their stored features and history."""
        if method == 1:
            return np.asarray(self.user_vectors[users], np.float32)
        # Attention holds a number for every two items of a history, and as many rows as it is asked with.
        longest = max((f.limit for f in self.fields), default=0)
        step = max(1, CELLS // longest**2) if longest else max(1, len(users))
        blocks = range(0, max(1, len(users)), step)
        return np.concatenate([self.tower(feed(self.fields, self.columns, users[b : b + step])) for b in blocks])

    def seen_before(self, part: int) -> Ragged:
        """User row -> item rows of the interactions that come before `part`."""
        pairs, parts = self.dataset.pairs, self.dataset.parts
        keep = (parts < part) if part != TRAIN else np.zeros(len(parts), bool)
        return Ragged.from_pairs(pairs.user[keep], pairs.item[keep], len(self.user_ids))


def _settings(folder: Path) -> tuple[Schema, Config]:
    path = folder / "config.toml"
    try:
        schema, config = settings.parse(tomllib.loads(datasets.read(path, datasets.text)), str(path))
    except (tomllib.TOMLDecodeError, ConfigError) as e:
        raise RunError(f"{path}: {e}") from None
    if schema is None:
        raise RunError(f"{path}: the schema is missing")
    return schema, config


def _check_k(k: object) -> None:
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or not 1 <= k <= MAX_K:
        raise DataError(f"k is {k!r}, expected 1 to {MAX_K:,}")


def _row_of(ragged: Ragged, row: int) -> Ints:
    return ragged.values[ragged.offsets[row] : ragged.offsets[row + 1]].astype(np.int64)


def _is_unknown(column: Column) -> bool:
    """Whether an encoded row holds nothing the model has met."""
    if isinstance(column, Ragged):
        return not (column.values != UNKNOWN).any()
    return column.dtype == np.int32 and not column.any()
