"""A folder of buckets that grows by a segment is prepared as the whole log, apart from the order of the codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pytest
from bucket_vectors import user_order
from worlds import EVERYTHING_SCHEMA, everything

from twotower.arrays.ragged import Ragged
from twotower.data import prepare
from twotower.data.buckets import Buckets
from twotower.data.buckets.check import check_buckets
from twotower.data.config import DataConfig
from twotower.data.dataset import Dataset
from twotower.data.prepare.bucket_reader import BucketReader, SplitBuckets
from twotower.data.prepare.options import PrepareOptions
from twotower.data.split import SplitConfig
from twotower.data.splits import TEST, TRAIN
from twotower.errors import RunError
from twotower.features.categorical import Categorical
from twotower.features.schema import Schema
from twotower.features.side import SIDES
from twotower.files import layout

SCHEMA: Schema = EVERYTHING_SCHEMA.model_copy(
    update={
        "features": (
            *(f for f in EVERYTHING_SCHEMA.features if f.name not in ("fans", "city")),
            Categorical(name="city", side="user"),
            Categorical(name="device", side="context"),
        )
    }
)
KEPT = SCHEMA.model_copy(update={"duplicates": "keep"})
SPLITS = {
    "last": SplitConfig(kind="last"),
    "last of some": SplitConfig(kind="last", users=0.7, seed=5),
    "gap": SplitConfig(kind="time", test=0.13, validation=0.11, gap=500),
    "random": SplitConfig(kind="random", test=0.13, validation=0.11, seed=7),
}
SMALL = PrepareOptions(piece_rows=101, bucket_rows=150, side_block_rows=17)
DAY = 500
"""Rows of the last day."""


def tables() -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """A last day has users and items that no earlier day has, pairs of earlier days, some with earlier times, and
    pairs that it repeats."""
    users, items, log = everything()
    log = log.with_columns(stars=pl.col("stars").cast(pl.Int64), device=pl.col("when") % 3)
    is_new = pl.col("uid").is_in(["u3", "u17", "u40", "u59"]) | pl.col("iid").is_in(["i2", "i31"])
    days, day = log.filter(~is_new), pl.concat([log.filter(is_new), log.filter(~is_new).tail(200)])
    days = days.head(days.height - 200)
    again = pl.concat([days.sample(60, seed=1), day.sample(30, seed=2)]).with_columns(
        stars=pl.lit(5, pl.Int64), when=1_600_000_000 + pl.int_range(90) * 800
    )
    day = pl.concat([day, again]).sample(fraction=1, shuffle=True, seed=3).tail(DAY)
    return users, items, pl.concat([days, day])


def parquet(folder: Path, users: pl.DataFrame, items: pl.DataFrame, log: pl.DataFrame) -> DataConfig:
    folder.mkdir()
    named = {"users": users, "items": items, "interactions": log}
    for name, frame in named.items():
        frame.write_parquet(folder / f"{name}.parquet")
    return DataConfig(**{name: str(folder / f"{name}.parquet") for name in named})


def first_days(folder: Path, schema: Schema) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Write the buckets of all days but the last, and return the tables of all."""
    users, items, log = tables()
    days = log.head(log.height - DAY)
    known = users.join(days, on="uid", how="semi"), items.join(days, on="iid", how="semi")
    prepare.write_buckets(parquet(folder.parent / "days", *known, days), schema, folder, SMALL)
    return users, items, log


def add_segment(folder: Path, users: pl.DataFrame, items: pl.DataFrame, log: pl.DataFrame) -> None:
    """Add the rows of a log that a folder lacks, as docs/prepared-format.md says, without code of the package."""
    facts = json.loads((folder / "buckets.json").read_text())
    last = facts["segments"][-1]
    first, number = last["read"][1], len(facts["segments"])
    rows, ends = dict[str, dict[str, int]](), {"read": [first, log.height]}
    for key, name, table, order in (("uid", "users", users, user_order), ("iid", "items", items, str)):
        known = pl.read_parquet(folder / f"{name}.parquet")
        new = sorted({*log[key][first:]} - {*known[key]}, key=order)
        added = pl.DataFrame({key: new}, schema={key: known[key].dtype}).join(
            table, on=key, how="left", maintain_order="left"
        )
        grown = pl.concat([known, added.select(known.columns)], how="vertical_relaxed")
        grown.write_parquet(folder / f"{name}.parquet")
        rows[key], ends[name] = {id_: row for row, id_ in enumerate(grown[key])}, [known.height, grown.height]
    day = log.with_row_index("row").slice(first).select(
        pl.col("uid").replace_strict(rows["uid"], return_dtype=pl.Int32).alias("user"),
        pl.col("iid").replace_strict(rows["iid"], return_dtype=pl.Int32).alias("item"),
        (pl.col("stars") > 3).alias("positive"),
        pl.col("row").cast(pl.Int64),
        (pl.col("when") * 1_000_000).alias("time"),
        pl.col("stars").cast(pl.Float64).alias("value.stars"),
        pl.col("device").alias("context.device"),
    ).sort("user", "time", "row")  # fmt: skip
    if facts["duplicates"] == "last":
        day = day.unique(["user", "item"], keep="last", maintain_order=True)
    facts["buckets"] += [{"users": [*ends["users"]], "files": []}]
    for n, bucket in enumerate(facts["buckets"]):
        own = day.filter(pl.col("user").is_between(bucket["users"][0], bucket["users"][1] - 1))
        if own.height or not bucket["files"]:
            file = f"{n:05d}-{number}.parquet"
            own.write_parquet(folder / "interactions" / file)
            bucket["files"].append({"file": file, "segment": number, "rows": own.height})
    facts["segments"].append(ends)
    facts["rows"] += day.height
    facts["positives"] += int(day["positive"].sum())
    facts["first_time"] = min(facts["first_time"], day["time"].min())
    facts["last_time"] = max(facts["last_time"], day["time"].max())
    (folder / "buckets.json").write_text(json.dumps(facts), encoding="utf-8")


def append_segment(folder: Path, users: pl.DataFrame, items: pl.DataFrame, log: pl.DataFrame) -> None:
    """Add the same rows with the package."""
    facts = Buckets.open(folder).facts
    data = parquet(folder.parent / f"day {len(facts.segments)}", users, items, log.slice(facts.read))
    schema = SCHEMA.model_copy(update={"duplicates": facts.duplicates})
    prepare.append_segment(
        data.model_copy(update={"buckets": str(folder)}), schema, SplitConfig(), data.interactions, SMALL
    )


def interactions(data: Dataset) -> pl.DataFrame:
    """All interactions by ids, each with its part, time and encoded context."""
    pairs = data.pairs
    return pl.DataFrame(
        {
            "u": data.users.ids.gather(pairs.user), "i": data.items.ids.gather(pairs.item), "time": data.times,
            "positive": pairs.positive, "part": data.parts, "device": data.context["device"],
        }
    ).sort("u", "i", "time", "part", "positive")  # fmt: skip


def by_id(data: Dataset, ids: pl.Series, column: Any, of_items: bool = False) -> dict[str, Any]:
    """The values of a column by id; values that are rows of items by their ids. Sums over users are rounded by their
    order."""

    def plain(values: npt.NDArray[Any]) -> Any:
        if of_items:
            return data.items.ids.gather(values.astype(np.int64)).to_list()
        return np.nan_to_num(values.astype(np.float64), nan=-9).round(5).tolist()

    rows = (column.row(r) if isinstance(column, Ragged) else column[r] for r in range(len(ids)))
    return {id_: plain(np.asarray(values)) for id_, values in zip(ids, rows, strict=True)}


@pytest.mark.parametrize("add", [add_segment, append_segment], ids=["by hand", "by append"])
@pytest.mark.parametrize(
    ("kind", "schema"),
    [("last of some", SCHEMA), ("gap", SCHEMA), ("random", SCHEMA), ("last", KEPT)],
    ids=["last of some", "gap", "random", "last with repeats"],
)
def test_a_segment_that_is_added_gives_the_dataset_of_the_whole_log(
    tmp_path: Path, kind: str, schema: Schema, add: Callable[..., None], messages: list[str]
) -> None:
    split, folder = SPLITS[kind], tmp_path / "buckets"
    everyone = first_days(folder, schema)
    before = [pl.read_parquet(folder / f"{side}s.parquet") for side in SIDES]
    add(folder, *everyone)
    assert check_buckets(folder, schema) == []
    for side, known in zip(SIDES, before, strict=True):
        grown = pl.read_parquet(folder / f"{side}s.parquet")
        assert grown.height > known.height
        assert grown.head(known.height).equals(known), "codes do not move"
    messages.clear()
    found = prepare.write_prepared(DataConfig(buckets=str(folder)), schema, split, tmp_path / "out", SMALL)
    repeats = any("rows repeated a pair of an earlier segment, the last of each was kept" in m for m in messages)
    assert repeats == (schema is SCHEMA)
    data = parquet(tmp_path / "whole", *everyone)
    whole = prepare.write_prepared(data, schema, split, tmp_path / "prepared", SMALL)
    in_gap = [m for m in messages if "in the gap" in m]
    assert len(in_gap) == (2 if kind == "gap" else 0)
    assert len({*in_gap}) <= 1

    assert found.users.ids.to_list() != whole.users.ids.to_list()
    assert interactions(found).equals(interactions(whole))
    vocabularies = [(d.folder / layout.VOCABULARIES).read_bytes() for d in (found, whole)]
    assert vocabularies[0] == vocabularies[1]
    for side in SIDES:
        for part in (TRAIN, TEST):
            mine, other = found.side_before(side, part), whole.side_before(side, part)
            assert mine.columns.keys() == other.columns.keys()
            for name in mine.columns:
                assert by_id(found, mine.ids, mine.columns[name]) == by_id(whole, other.ids, other.columns[name]), name
    for name in ("seen_items", "positive_items", "interacted_items"):
        ours, others = (
            {u: sorted(rows) for u, rows in by_id(d, d.users.ids, getattr(d, name), of_items=True).items()}
            for d in (found, whole)
        )
        assert ours == others, name
    assert positives(found) == positives(whole)
    ours, others = (dict(zip(d.items.ids, d.item_positive_counts.tolist(), strict=True)) for d in (found, whole))
    assert ours == others


def positives(data: Dataset) -> dict[str, list[str]]:
    """The items of the training positives of each user, oldest first."""
    return {
        user: data.items.ids.gather(data.pairs.item[data.positives_by_user.row(r)].astype(np.int64)).to_list()
        for r, user in enumerate(data.users.ids)
    }


@pytest.fixture
def grown(tmp_path: Path) -> Path:
    """A folder of two segments."""
    add_segment(tmp_path / "buckets", *first_days(tmp_path / "buckets", SCHEMA))
    return tmp_path / "buckets"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.reverse(), "rule 10: record 1 has user"),
        (lambda t: t.with_columns(pl.col("row") - DAY), "rule 9: record 0 has row .* as of segment 1"),
        (lambda t: t.with_columns(pl.col("user").cast(pl.Int64)), "rule 6: other columns or types"),
        (lambda t: t.drop("value.stars"), "no column 'value.stars'"),
    ],
)  # fmt: skip
def test_fault_G30_a_file_of_a_segment_that_breaks_a_rule_is_refused(
    grown: Path, change: Callable[[pl.DataFrame], pl.DataFrame], expected: str
) -> None:
    path = grown / "interactions" / "00001-1.parquet"
    change(pl.read_parquet(path)).write_parquet(path)
    with pytest.raises(RunError, match=f"00001-1.parquet: .*{expected}"):
        prepare.write_prepared(DataConfig(buckets=str(grown)), SCHEMA, SPLITS["last"], grown.parent / "out", SMALL)


def test_fault_G30_a_pair_of_two_segments_is_refused_where_none_is_repeated(grown: Path) -> None:
    facts = json.loads((grown / "buckets.json").read_text())
    (grown / "buckets.json").write_text(json.dumps(facts | {"duplicates": "error"}))
    assert any(": rule 11: record " in line for line in check_buckets(grown))
    with pytest.raises(RunError, match=r"-1.parquet: .*rule 11: record \d+ repeats user"):
        prepare.write_prepared(DataConfig(buckets=str(grown)), SCHEMA, SPLITS["last"], grown.parent / "out", SMALL)


@pytest.mark.parametrize("kind", ["last of some", "gap", "random"])
def test_a_segment_splits_again_only_what_it_changes_where_the_rule_allows(tmp_path: Path, kind: str) -> None:
    """The parts of all buckets are those of a split from nothing."""
    folder, split = tmp_path / "buckets", SPLITS[kind]
    users, items, log = first_days(folder, SCHEMA)

    def split_into(marks: Path) -> tuple[set[str], dict[str, Any]]:
        """The names of the buckets that are split, and the parts of all."""
        marks.mkdir(exist_ok=True)
        buckets = Buckets.open(folder)
        of = SplitBuckets(BucketReader.open(buckets, SCHEMA), split, marks)
        rule = of.rule(pl.read_parquet(buckets.table("user"))["uid"])
        made = {bucket.name for bucket in of.buckets if of.make(bucket, rule)}
        return made, {bucket.name: of.kept(bucket)[1].tolist() for bucket in of.buckets}

    first, _ = split_into(tmp_path / "marks")
    assert split_into(tmp_path / "marks")[0] == set()
    add_segment(folder, users, items, log.head(log.height - DAY + 3))
    buckets = Buckets.open(folder).facts.buckets
    changed = {bucket.name for bucket in buckets if bucket.files[-1].segment == 1}
    assert first - changed
    assert changed & first
    made, parts = split_into(tmp_path / "marks")
    assert made == (changed if kind == "last of some" else {bucket.name for bucket in buckets})
    assert parts == split_into(tmp_path / "fresh")[1]
