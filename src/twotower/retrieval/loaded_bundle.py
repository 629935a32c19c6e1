"""The files of a bundle, loaded for answers and compared with one another."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from twotower.arrays.ragged import Column, Ragged
from twotower.arrays.types import Floats, Ints, ItemRow, UserRow
from twotower.data import memmap
from twotower.data.dataset import Dataset
from twotower.data.ids import ItemIds, TextColumn, UserIds
from twotower.data.splits import TEST
from twotower.errors import DataError, RunError, TwoTowerError, first_line
from twotower.evaluation.own_items import HistoryScores, HistoryTerm, Recency
from twotower.features.field import InputField
from twotower.files import layout
from twotower.files.readers import read_array, read_checked, read_json
from twotower.index import Index, load_index
from twotower.index.vector_store import MAX_NORM
from twotower.kinds import CODE, warn_of_changes
from twotower.onnx.tower import InspectionLimits, OnnxTower, inspect_towers
from twotower.store.bundle import Bundle


@dataclass(frozen=True)
class LoadedBundle:
    """Parts of a bundle that answers are computed from, without torch."""

    bundle: Bundle
    dataset: Dataset
    """Tables and interactions. Only user columns are encoded: the item tower is not run."""
    columns: dict[str, Column]
    """Encoded user features, with the histories that the tower reads."""
    fields: tuple[InputField, ...]
    """Fields of the user tower."""
    tower: OnnxTower
    user_vectors: Floats | None
    """(users, D), precomputed. None: a context feature has no default."""
    index: Index
    user_ids: UserIds
    item_ids: ItemIds
    titles: TextColumn[str]
    history_scores: HistoryScores | None
    """Scores of the items of a history. None: the model has no such term."""
    popularity: Floats | None
    """(items,) for unknown users. None: the number of positives."""

    @classmethod
    def load(cls, bundle: Bundle, threads: int, limits: InspectionLimits) -> LoadedBundle:
        """Load and compare the files. Raises RunError or BundleError if they are damaged or inconsistent,
        Unavailable."""
        folder, manifest = bundle.folder, bundle.manifest
        digests, (schema, split) = manifest.sha256, manifest.read_sections()
        with ThreadPoolExecutor(2) as pool:  # both calls wait for child processes that verify files
            index = pool.submit(load_index, folder / layout.INDEX)
            towers = {folder / path: digest for path, digest in digests.items() if path.endswith(".onnx")}
            weights = digests.get(layout.WEIGHTS, "")
            inspected = pool.submit(inspect_towers, towers, weights, limits=limits)
            dataset = memmap.load(folder, schema, split, encode=("user",), newest=True)
            warn_of_changes(read_json(folder / layout.MODEL).get(CODE), folder)
            columns = dataset.side_before("user", TEST).columns
            user_ids, item_ids = UserIds(dataset.users.ids, UserRow), ItemIds(dataset.items.ids, ItemRow)
            titles: TextColumn[str] = TextColumn(dataset.title_column())
            vectors = read_checked(folder / layout.USER_VECTORS, _matrix) if schema.precomputes else None
            own = None
            if facts := manifest.history_term:
                numbers, stored = read_checked(folder / layout.HISTORY_TERM, _numbers), columns.get(facts.history)
                if not isinstance(stored, Ragged):
                    raise RunError(
                        f"{folder}: damaged (a term names no history of the users, but {facts.history!r:.80})"
                    )
                try:
                    recency = Recency(facts.rate, facts.exponent)
                    own = HistoryScores.of(dataset, stored, HistoryTerm(facts.history, numbers, facts.factor, recency))
                except RunError as e:
                    raise RunError(f"{folder / layout.HISTORY_TERM}: damaged ({e})") from None
            popularity = None
            if layout.POPULARITY in digests:
                popularity = read_checked(folder / layout.POPULARITY, _numbers)
            inspected.result()
            user_tower = OnnxTower(folder / layout.tower("user"), threads, limits, weights=weights)
            fields = dataset.encoders.fields("user")
            loaded = cls(
                bundle, dataset, columns, fields, user_tower, vectors, index.result(), user_ids, item_ids, titles, own,
                popularity,
            )  # fmt: skip
        loaded.index.threads = threads
        loaded._compare_with_manifest()
        loaded._compare_rows()
        return loaded

    def stored_vectors(self, users: Ints | slice) -> Floats:
        """Return the precomputed vectors (n, D) of some user rows. Raises DataError if there are none."""
        if self.user_vectors is None:
            raise self.no_vectors()
        return np.asarray(self.user_vectors[users], np.float32)

    def no_vectors(self) -> DataError:
        """Return the error of method 1 without precomputed vectors."""
        names = [f.name for f in self.dataset.schema.side("context") if f.defaults is None]
        return DataError(
            "method 1 (precomputed user vectors) has no vectors: the model reads the context, and feature "
            f"'{names[0]}' has no default; use method 2 (online user tower)"
        )

    def _compare_with_manifest(self) -> None:
        digests, index = self.bundle.manifest.sha256, self.index
        found: dict[str, dict[str, str | int | None]] = {
            layout.ENCODERS: {"vocab_hash": digests.get(layout.ENCODERS)},
            layout.WEIGHTS: {"model": digests.get(layout.WEIGHTS)},
            "index": {"items": len(index) + len(index.rejected), "dims": index.width, "metric": index.metric},
            layout.table("user"): {"users": len(self.dataset.users)},
            layout.table("item"): {"items": len(self.dataset.items)},
            layout.tower("user"): {"model": self.tower.model, "dims": self.tower.width},
        }
        if (vectors := self.user_vectors) is not None:
            found[layout.USER_VECTORS] = {"users": len(vectors), "dims": vectors.shape[1]}
        if index.remote:
            found["index"]["model"] = index.model
        self.bundle.check_consistency(found)

    def _compare_rows(self) -> None:
        """Raise RunError unless every column has a row for each user or item."""
        data = self.dataset
        counts = {name: len(column) for name, column in self.columns.items()}
        features = data.schema.side("user")
        for name, found, expected in (
            *((f"user column '{f.name}'", counts.get(f.name, 0), len(self.user_ids)) for f in features),
            ("seen items of users", len(data.interacted_items), len(self.user_ids)),
            ("positives of items", len(data.item_positive_counts), len(self.item_ids)),
            *(() if self.popularity is None else (("popularity", len(self.popularity), len(self.item_ids)),)),
        ):
            if found != expected:
                raise RunError(f"{self.bundle.folder}: damaged ({name}: {found:,} rows, expected {expected:,})")


@contextmanager
def naming_damage(folder: Path) -> Iterator[None]:
    """Turn any error of the block, which only a damaged file of the bundle can cause, into a RunError with the
    folder."""
    try:
        yield
    except (TwoTowerError, MemoryError):
        raise
    except (Exception, pl.exceptions.PanicException) as e:
        what = f"{type(e).__name__}: {first_line(e)}"
        raise RunError(f"{folder}: damaged, or of another version ({what})") from e


def _numbers(path: Path) -> Floats:
    found: Floats = np.asarray(read_array(path))
    if found.ndim != 1 or found.dtype != np.float32 or not (np.abs(found) < MAX_NORM).all():
        raise ValueError(f"{found.dtype} of shape {found.shape}, expected numbers of float32 below {MAX_NORM:.0e}")
    return found


def _matrix(path: Path) -> Floats:
    found: Floats = np.asarray(read_array(path, "r"))
    if found.ndim != 2 or found.dtype != np.float32:
        raise ValueError(f"{found.dtype} of shape {found.shape}, expected vectors of float32")
    return found
