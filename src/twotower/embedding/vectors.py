"""Vectors of blocks of a table: a pure function of a run and a block, for a bulk embedding or any other engine.

vectors = TableVectors(run, "item")
found = vectors(frame)     the columns `id` and `vector` of the n rows of a table with the columns `vectors.columns`
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import polars as pl

from twotower.arrays.pieces import pieces
from twotower.arrays.ragged import Column, Ragged
from twotower.data.context import default_context
from twotower.data.reading.readers import TableLike, as_frame, need
from twotower.data.splits import TEST
from twotower.data.tables import with_id_name, with_known_ids
from twotower.embedding.folder import StoredVectors
from twotower.errors import ConfigError, RunError
from twotower.features.categorical import CategoricalEncoder
from twotower.features.side import SideName
from twotower.model.inputs.gather import ColumnRows, TowerFields
from twotower.model.inputs.side_tensors import carry_forward, tensors
from twotower.model.two_tower import evaluation_mode
from twotower.runs import Run

Precision = Literal["fp32", "fp16"]
_DTYPES = {"fp32": "<f4", "fp16": "<f2"}
_TOWER_ROWS = 32_768  # more are slower: glibc gets each array above 32 MiB from the kernel, page by page


class TableVectors:
    """Computes the vectors of rows of a side's table.

    A row with an id of the run has the run's sequences and statistics; a new row has empty sequences, a count of zero
    and no mean. Ids have the type of the run's ids."""

    def __init__(self, run: Run, side: SideName, precision: Precision = "fp32") -> None:
        """Take the model of a run. All users get the default of each context feature. Raises ConfigError for an unknown
        precision, or for users of a model with a context feature without a default."""
        if precision not in _DTYPES:
            raise ConfigError(f"precision '{precision}': allowed are {', '.join(_DTYPES)}")
        self._dtype = np.dtype(_DTYPES[precision])
        self.side, self.schema, self._encoders = side, run.dataset.schema, run.dataset.encoders
        self.key = self.schema.id_column(side)
        self._model, self._fields = run.model, TowerFields(self._encoders.fields(side))
        self._statistics, self._histories = self.schema.statistics(side), self.schema.histories(side)
        self.columns = list(dict.fromkeys([self.key, *(f.source for f in self.schema.columns(side) if not f.computes)]))
        """Columns that are read: the ids first."""
        self.known = run.dataset.side_before(side, TEST)
        self._known_rows, self._context = CategoricalEncoder(self.known.ids), dict[str, Column]()
        if side == "user" and self.schema.side("context"):
            self._context = default_context(self._encoders, run.dataset.context_frame)

    def __call__(self, table: TableLike) -> pl.DataFrame:
        """Return the ids of a block, column `id`, and their vectors, column `vector` of arrays (D,), a row for each
        row.

        Raises DataError; RunError for a vector that is not finite, or outside the range of the precision."""
        ids, columns = self._encoded(as_frame(table, f"{self.side}s"))
        blocks = [self._block(columns, rows) for rows in [*pieces(len(ids), _TOWER_ROWS)] or [slice(0, 0)]]
        return pl.DataFrame({"id": ids, "vector": np.concatenate(blocks)})

    def _block(self, columns: dict[str, Column], rows: slice) -> StoredVectors:
        block, model = ColumnRows(columns, rows, self._context, np.zeros(rows.stop - rows.start, np.int64)), self._model
        tower = model.user_vectors if self.side == "user" else model.item_vectors
        with evaluation_mode(model), np.errstate(over="ignore"):
            vectors = tower(tensors(self._fields, block, carry_forward, model.log_temperature.device)).cpu().numpy()
            found: StoredVectors = vectors.astype(self._dtype, copy=False)
        if not np.isfinite(vectors).all():
            raise RunError("a vector is not finite; the model is broken, train it again")
        if not np.isfinite(found).all():
            raise RunError("a vector has a number above 65,504, which fp16 does not reach; use fp32")
        return found

    def _encoded(self, frame: pl.DataFrame) -> tuple[pl.Series, dict[str, Column]]:
        """Return the ids, and the columns that the tower reads."""
        if self.schema.table_id(self.side) in frame.columns:
            frame = with_id_name(frame, self.side, self.schema)
        need(frame, self.columns, f"{self.side}s")
        frame = with_known_ids(frame, self.key, f"{self.side}s", self.known.ids.dtype)
        if self._statistics or self._histories:
            known_rows = self._known_rows.transform(frame[self.key])  # 0 for a new id, else 1 + its row in the run
        for s in self._statistics:
            values = self.known.frame[s.source]
            new = pl.Series([s.unseen], dtype=values.dtype)
            frame = frame.with_columns(pl.concat([new, values]).gather(known_rows).alias(s.source))
        columns = self._encoders.transform(self.side, frame)
        for h in self._histories:
            known = self.known.columns[h.name]
            assert isinstance(known, Ragged)
            columns[h.name] = Ragged(known.values, np.r_[0, known.offsets]).take(known_rows)  # row 0 is empty
        return frame[self.key].rename("id"), columns
