"""Vectors of tables that are larger than memory: a piece at a time, encoded and sent through its tower."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt
import polars as pl
import torch

from twotower import schema as meanings
from twotower import storage
from twotower.data.batches import Bag, Inputs, Padded, Prefixes, Windows
from twotower.data.feed import padded
from twotower.data.splits import TEST
from twotower.data.tables import as_integers, check_utf8, need, with_ids
from twotower.encoders import CategoricalEncoder, Column, Field, Ragged
from twotower.errors import DataError, RunError
from twotower.evaluation import evaluating
from twotower.run import Run
from twotower.schema import SideName

BLOCK = 32_768
"""Rows a tower embeds at once: more takes memory, fewer makes its threads wait for each other more often."""

VECTORS, IDS = "vectors.npy", "ids.parquet"


def embed(
    run: Run,
    side: SideName,
    source: Path | str,
    out: Path | str,
    batch_rows: int = 65_536,
    say: Callable[[str], None] = lambda line: None,
) -> int:
    """Vectors of every row of `source` (CSV, TSV or Parquet), which may be larger than memory; gives their number.

    The folder `out` then holds vectors.npy (n, D) float32 and ids.parquet, the ids in the same order. A row whose id
    the run knows has the sequences and statistics that the run has for it; a new one has empty sequences, a count of
    zero and no mean. An id that comes twice has two vectors.

    Raises DataError for a table that is not as the schema says, RunError if `out` holds anything else or the model
    gives a vector that is not finite.
    """
    source, out = Path(source), Path(out)
    _claim(out)
    started = told = time.perf_counter()
    tower = run.model.user_vectors if side == "user" else run.model.item_vectors
    device = run.model.log_temperature.device
    n = width = 0
    with storage.new_folder(out) as folder:
        scratch = folder / "scratch"
        scratch.mkdir()
        rows = _Rows(run, side)
        with (folder / VECTORS).open("w+b") as file:
            for frame in _batches(source, rows, scratch, batch_rows):
                ids, columns = rows(frame)
                for start in range(0, len(ids), BLOCK):
                    inputs = _inputs(rows.fields, columns, slice(start, start + BLOCK), device)
                    with evaluating(run.model):
                        vectors = tower(inputs).cpu().numpy()
                    if not np.isfinite(vectors).all():
                        raise RunError(f"a vector of {source} is not finite; the model is broken, train it again")
                    if not width:
                        width = vectors.shape[1]
                        _header(file, 0, width)
                    file.write(np.ascontiguousarray(vectors).data)
                ids.to_frame().write_parquet(scratch / f"{n:015d}.parquet")
                n += len(ids)
                if time.perf_counter() > told + 5:
                    told = time.perf_counter()
                    say(f"{n:,} {side}s embedded, {n / (told - started):,.0f} a second")
            _header(file, n, width)
        _join(sorted(scratch.glob("*.parquet")), folder / IDS)
        shutil.rmtree(scratch)
    say(f"{n:,} {side}s embedded, {n / (time.perf_counter() - started):,.0f} a second: {out}")
    return n


def _claim(out: Path) -> None:
    """Raises RunError unless `out` is new, empty, or holds vectors and their ids and nothing else."""
    if not out.exists():
        return
    strange = sorted({p.name for p in out.iterdir()} - {VECTORS, IDS}) if out.is_dir() else [out.name]
    if strange:
        raise RunError(f"{out}: not a folder of vectors (it holds {strange[0]}); choose another folder")


def _header(file: BinaryIO, n: int, width: int) -> None:
    """The header of a .npy file of shape (n, width); numpy leaves room in it for any n."""
    file.seek(0)
    about = {"descr": "<f4", "fortran_order": False, "shape": (n, width)}
    np.lib.format.write_array_header_1_0(file, about)


def _join(parts: list[Path], path: Path) -> None:
    """The ids of all parts in one file and of one type: an id that is no integer makes all of them text."""
    types = {pl.read_parquet_schema(p)["id"] for p in parts}
    if len(types) == 1:
        pl.scan_parquet(parts).sink_parquet(path)
        return
    common = pl.String if pl.String in types else pl.UInt64
    pl.concat([pl.scan_parquet(p).select(pl.col("id").cast(common)) for p in parts]).sink_parquet(path)


class _Rows:
    """A piece of a side's table -> ids and encoded columns."""

    def __init__(self, run: Run, side: SideName) -> None:
        self.side, self.schema, self.encoders = side, run.dataset.schema, run.dataset.encoders
        self.key = self.schema.id_column(side)
        self.fields = self.encoders.fields(side)
        features = self.schema.side(side)
        self.statistics = [f for f in features if isinstance(f, meanings.Numeric) and f.statistic]
        self.sequences = [f for f in features if isinstance(f, meanings.Sequence)]
        made = {f.name for f in (*self.statistics, *self.sequences)}
        self.columns = list(dict.fromkeys([self.key, *(f.source for f in features if f.name not in made)]))
        self.known = run.dataset.side_before(side, TEST)
        self._numbers = CategoricalEncoder(self.known.ids)

    def check(self, names: Sequence[str]) -> None:
        """Raises DataError if a column is missing."""
        need(pl.DataFrame(schema=dict.fromkeys(names, pl.Null)), self.columns, self.side + "s", self.schema)

    def __call__(self, frame: pl.DataFrame) -> tuple[pl.Series, dict[str, Column]]:
        frame = with_ids(frame, self.key, self.side + "s")
        if self.known.ids.dtype == pl.String:
            frame = frame.with_columns(pl.col(self.key).cast(pl.String))
        if self.statistics or self.sequences:
            numbers = self._numbers.transform(frame[self.key])  # 0 for new ones, else 1 + the run's row
        for f in self.statistics:
            values = self.known.frame[f.source]
            new = pl.Series([0.0 if f.statistic == "count" else None], dtype=values.dtype)
            frame = frame.with_columns(pl.concat([new, values]).gather(numbers).alias(f.source))
        columns = self.encoders.transform(self.side, frame)
        for s in self.sequences:
            columns[s.name] = _picked(cast(Ragged, self.known.columns[s.name]), numbers)
        return frame[self.key].rename("id"), columns


def _picked(ragged: Ragged, numbers: npt.NDArray[np.int32]) -> Ragged:
    """Row number - 1 of `ragged` for each of `numbers`, nothing for 0."""
    starts, lengths = np.r_[0, ragged.offsets[:-1]][numbers], np.r_[0, ragged.lengths][numbers]
    offsets = np.zeros(len(numbers) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    flat = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
    return Ragged(ragged.values[flat], offsets)


def _inputs(fields: tuple[Field, ...], columns: dict[str, Column], part: slice, device: torch.device) -> Inputs:
    """Rows of encoded columns for a forward pass: as `SideTensors.take`, without what only a backward pass needs."""
    arrays: dict[str, Any] = {f.name: columns[f.name] for f in fields}
    lookups = [arrays[f.name][part] for f in fields if f.kind == "lookup"]
    bags: dict[str, Bag | Prefixes | Windows | Padded] = {}
    none = torch.zeros(0, dtype=torch.int32)
    rows = range(*part.indices(len(arrays[fields[0].name])))
    for f in fields:
        if f.kind == "bag":
            ragged = cast(Ragged, columns[f.name])
            if f.limit:
                bags[f.name] = Padded(torch.from_numpy(padded(ragged, np.array(rows), f.limit)).to(device))
                continue
            offsets = ragged.offsets[rows.start : rows.stop + 1]
            values = torch.from_numpy(ragged.values[offsets[0] : offsets[-1]]).to(device)
            bags[f.name] = Bag(values, torch.from_numpy((offsets - offsets[0]).astype(np.int32)).to(device), none, none)
    lookup = np.stack(lookups, 1).astype(np.int64) if lookups else np.zeros((len(rows), 0), np.int64)
    dense = {f.name: torch.from_numpy(arrays[f.name][part]).to(device) for f in fields if f.kind == "dense"}
    return Inputs(len(rows), torch.from_numpy(lookup).to(device), bags, dense)


def _batches(source: Path, rows: _Rows, scratch: Path, batch_rows: int) -> Iterator[pl.DataFrame]:
    """The columns that are read, `batch_rows` rows at a time. Raises DataError as `tables.read_file` does."""
    if not source.is_file():
        raise DataError(f"{source}: no such file")
    ending = source.suffix.lower()
    if ending not in (".parquet", ".pq", ".csv", ".tsv"):
        raise DataError(f"{source}: found a '{ending}' file, expected .csv, .tsv or .parquet; convert or rename it")
    text = ending in (".csv", ".tsv")
    try:
        table = _from_text(source, rows, scratch / "table") if text else pl.scan_parquet(source)
        rows.check(table.collect_schema().names())
        table = table.select(rows.columns)
        n = int(table.select(pl.len()).collect().item())
        if not n:
            raise DataError(f"{rows.side}s: the table has no rows, expected at least one; fill it")
        for start in range(0, n, batch_rows):
            # Slices of a Parquet file are stable and skip what comes before; streamed batches are read far ahead.
            frame = table.slice(start, batch_rows).collect(engine="streaming")
            yield frame.with_columns(as_integers(frame[rows.key])) if text else frame
    except pl.exceptions.NoDataError:
        raise DataError(f"{source}: the file is empty; it needs a header line and at least one row") from None
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as e:
        if text:
            check_utf8(source)
        line = (str(e).splitlines() or [type(e).__name__])[0]
        raise DataError(f"{source}: cannot be read as {ending[1:]} ({line}); is the file complete?") from None


def _from_text(source: Path, rows: _Rows, path: Path) -> pl.LazyFrame:
    """A CSV as Parquet: its types are those of all its rows, and it is read once."""
    separator = "\t" if source.suffix.lower() == ".tsv" else ","
    names = pl.read_csv(source, separator=separator, n_rows=0, infer_schema=False).columns
    rows.check(names)
    table = pl.scan_csv(
        source,
        separator=separator,
        infer_schema_length=None,
        try_parse_dates=True,
        schema_overrides={rows.key: pl.String},
    )
    table.select(rows.columns).sink_parquet(path)
    return pl.scan_parquet(path)
