"""Splits that a log brings along, by a column or by files, and splits without a validation part."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from event_worlds import shop_schema, shopping
from messages import one_line
from worlds import CHECKERBOARD_SCHEMA, checkerboard, settings

import twotower
from twotower import api
from twotower.arrays.ragged import Ragged
from twotower.config.toml import load_config
from twotower.data import prepare
from twotower.data.config import DataConfig, DatasetConfig
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.memmap import MemmapDataset
from twotower.data.parts import PartFiles
from twotower.data.prepare.options import PrepareOptions
from twotower.data.source import read
from twotower.data.split import PART_NAMES, SplitConfig
from twotower.data.splits import TEST, TRAIN, VALIDATION
from twotower.data.tables import check
from twotower.diagnostics import diagnose
from twotower.errors import ConfigError, DataError, RunError
from twotower.features.schema import Schema
from twotower.features.sequence import Sequence
from twotower.runs import Run
from twotower.train.progress import Callback, EpochRecord

SMALL = PrepareOptions(piece_rows=101, bucket_rows=150)
COLUMN = SplitConfig(kind="column", column="fold")
FILES = SplitConfig(kind="files")


LEFT_OUT = "leaves out {} rows whose pair of user and item comes again later"


@pytest.mark.parametrize(
    ("split", "duplicates", "again", "tells"),
    [
        (SplitConfig(kind="last"), "last", 10**6, True),
        (SplitConfig(kind="time"), "last", 10**6, True),
        (SplitConfig(kind="random"), "last", 10**6, False),
        (SplitConfig(kind="last"), "keep", 10**6, False),
        (SplitConfig(kind="last"), "last", 0, False),
    ],
)
def test_fault_C4_rows_that_later_parts_take_out_of_training_are_told(
    split: SplitConfig, duplicates: str, again: int, tells: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows of seven users are repeated `again` seconds later; a preparation does not know how much later."""
    _, _, actions = checkerboard()
    times = actions.with_columns(at=pl.int_range(1_700_000_000, 1_700_000_000 + len(actions)))
    schema = CHECKERBOARD_SCHEMA.model_copy(update={"time": "at", "duplicates": duplicates})
    some = times.unique("user_id", keep="first", maintain_order=True)[:7]
    log = pl.concat([times, some.with_columns(pl.col("at") + again)])
    with caplog.at_level("WARNING", "twotower"):
        build_dataset(check(None, None, log, schema), schema, split)
    assert (LEFT_OUT.format(7) in caplog.text) == tells
    caplog.clear()
    log.write_parquet(tmp_path / "log.parquet")
    with caplog.at_level("WARNING", "twotower"):
        prepare.write_prepared(
            DataConfig(interactions=str(tmp_path / "log.parquet")), schema, split, tmp_path / "p", SMALL
        )
    assert (LEFT_OUT.format("up to 7") in caplog.text) == (tells or not again)


@pytest.mark.parametrize(
    ("first", "second", "tells"), [("train", "test", True), ("train", "train", False), ("test", "train", False)]
)
@pytest.mark.parametrize("timed", [True, False])
def test_fault_C4_rows_that_a_given_later_part_takes_out_of_training_are_told(
    first: str, second: str, tells: bool, timed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Seven rows of one part stand in another one too, at the same time."""
    _, _, actions = checkerboard()
    fold = pl.Series(["train", "train", "validation", "test"] * len(actions))[: len(actions)]
    log = actions.with_columns(at=pl.int_range(pl.len()), fold=fold)
    some = log.filter(pl.col("fold") == first)[:7]
    log = pl.concat([log, some.with_columns(fold=pl.lit(second))])
    schema = CHECKERBOARD_SCHEMA.model_copy(update={"time": "at" if timed else "", "time_unit": "order"})
    with caplog.at_level("WARNING", "twotower"):
        build_dataset(check(None, None, log, schema), schema, COLUMN)
    assert (LEFT_OUT.format(7) in caplog.text) == tells


def published() -> pl.DataFrame:
    """A log with a part for each row, in an order that has nothing to do with time."""
    actions = checkerboard()[2]
    folds = np.random.default_rng(5).choice(PART_NAMES, actions.height, p=[0.7, 0.1, 0.2])
    return actions.with_columns(fold=pl.Series(folds))


def part_files(folder: Path, log: pl.DataFrame, ending: str) -> DataConfig:
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for (name,), rows in log.group_by("fold", maintain_order=True):
        path = folder / f"{name}.{ending}"
        rows = rows.drop("fold")
        rows.write_parquet(path) if ending == "parquet" else rows.write_csv(path)
        paths[str(name)] = str(path)
    return DataConfig(**paths)


def by_id(data: Dataset) -> list[tuple[Any, ...]]:
    """The rows of a dataset as ids, with the name of their part."""
    users, items = data.users.ids.to_list(), data.items.ids.to_list()
    return sorted(
        (users[u], items[i], PART_NAMES[p], bool(y))
        for u, i, p, y in zip(data.pairs.user, data.pairs.item, data.parts, data.pairs.positive, strict=True)
    )


def dataset_of(log: Path, split: SplitConfig, out: Path | None) -> Dataset:
    """The dataset of a log in memory, or prepared in a folder."""
    if out:
        return prepare.write_prepared(DataConfig(interactions=str(log)), CHECKERBOARD_SCHEMA, split, out, SMALL)
    return build_dataset(check(None, None, log, CHECKERBOARD_SCHEMA), CHECKERBOARD_SCHEMA, split)


@pytest.mark.parametrize("validation", [True, False], ids=["three parts", "no validation"])
@pytest.mark.parametrize(
    "way", ["frame", "csv column", "parquet files", "csv files", "prepared column", "prepared files"]
)
def test_a_published_split_is_reproduced_row_by_row(tmp_path: Path, way: str, validation: bool) -> None:
    log = published()
    if not validation:
        log = log.filter(pl.col("fold") != "validation")
    split = FILES if "files" in way else COLUMN
    split = split if validation else split.model_copy(update={"validation": 0.0})
    if way == "frame":
        data = build_dataset(check(None, None, log, CHECKERBOARD_SCHEMA), CHECKERBOARD_SCHEMA, split)
    else:
        ending = "csv" if "csv" in way else "parquet"
        named = part_files(tmp_path / "in", log, ending)
        if split.kind == "column":
            path = tmp_path / f"log.{ending}"
            log.write_csv(path) if ending == "csv" else log.write_parquet(path)
            named = DataConfig(interactions=str(path))
        if "prepared" in way:
            data = prepare.write_prepared(named, CHECKERBOARD_SCHEMA, split, tmp_path / "out", SMALL)
        else:
            tables, schema = read(DatasetConfig(data=named, split=split), CHECKERBOARD_SCHEMA)
            assert not isinstance(tables, Dataset)
            data = build_dataset(tables, schema, split)
    assert by_id(data) == sorted((u, i, fold, liked > 0) for u, i, liked, _, fold in log.rows())
    assert len(data.validation) == (log["fold"] == "validation").sum()


def two_parts(kind: str) -> tuple[pl.DataFrame, Schema]:
    """A log of train and test alone, whose test rows are any, later than all of train, or the last of each user; times
    fall, so that the last row is not that of the table."""
    log = checkerboard()[2].with_columns(at=10**6 - pl.int_range(pl.len()))
    newest = pl.col("at").rank("ordinal").over("user_id") > pl.len().over("user_id") - 3
    test = {"time": pl.col("at") > 10**6 - 300, "last": newest}.get(kind, pl.int_range(pl.len()) % 4 == 0)
    log = log.with_columns(fold=pl.when(test).then(pl.lit("test")).otherwise(pl.lit("train")))
    features = (*CHECKERBOARD_SCHEMA.features, Sequence(name="history", side="user"))
    return log, CHECKERBOARD_SCHEMA.model_copy(update={"features": features})


@pytest.mark.parametrize("kind", ["random", "time", "last"])
def test_without_a_validation_part_rows_of_train_validate_as_the_test_part_follows_them(
    tmp_path: Path, kind: str, messages: list[str]
) -> None:
    log, schema = two_parts(kind)
    log.write_parquet(tmp_path / "log.parquet")
    split = COLUMN.model_copy(update={"ordered": kind != "random"})
    data = build_dataset(check(None, None, log, schema), schema, split)
    assert data.split.from_train == kind
    assert data.time_ordered
    assert any(f"split.from_train = '{kind}'" in text for text in messages)
    ids = data.users.ids.to_list(), data.items.ids.to_list()
    fold = {(u, i): PART_NAMES.index(name) for u, i, name in log.select("user_id", "item_id", "fold").rows()}
    given = np.array([fold[ids[0][u], ids[1][i]] for u, i in zip(data.pairs.user, data.pairs.item, strict=True)])
    validates, train = data.parts == VALIDATION, data.parts == TRAIN
    assert (given[validates] == TRAIN).all()
    assert (data.parts[~validates] == given[~validates]).all()
    times, users = data.times, data.pairs.user
    if kind == "time":
        assert times[validates].min() > times[train].max()
    elif kind == "last":
        liked = (given == TRAIN) & data.pairs.positive
        last = np.array([times[liked & (users == user)].max() for user in range(len(ids[0]))])
        assert (validates == ((given == TRAIN) & (times >= last[users]))).all()
    if kind != "last":
        assert validates.sum() == pytest.approx(0.1 * (given == TRAIN).sum(), rel=0.2)
    config = DataConfig(interactions=str(tmp_path / "log.parquet"))
    prepared = prepare.write_prepared(config, schema, split, tmp_path / "out", SMALL)
    assert by_id(prepared) == by_id(data)
    prepared.check(schema, split)
    for part, known in ((VALIDATION, train), (TEST, given == TRAIN)):
        for found in (prepared, data):
            history = found.side_before("user", part).columns["history"]
            assert isinstance(history, Ragged)
            assert history.lengths.sum() == np.count_nonzero(known)


def test_the_last_positive_validates_with_the_rows_that_follow_it() -> None:
    """Rows of events that are no targets end a user's training rows."""
    schema = shop_schema()
    data = build_dataset(
        check(*shopping("type"), schema), schema, SplitConfig(kind="column", column="part", ordered=True)
    )
    assert data.split.from_train == "last"
    for user in range(0, len(data.users), 9):
        own, validates = data.pairs.user == user, data.parts == VALIDATION
        assert np.count_nonzero(data.pairs.target[own & validates]) == 1
        assert np.count_nonzero(own & validates) == 3
        assert data.times[own & (data.parts == TRAIN)].max() < data.times[own & validates].min()


def test_a_user_of_one_training_row_keeps_it() -> None:
    rows = [(user, item, "test" if item == 9 else "train") for user in range(200) for item in (user % 7, 9)]
    log = pl.DataFrame(rows, schema=["user_id", "item_id", "fold"], orient="row")
    schema = Schema(features=CHECKERBOARD_SCHEMA.features)
    data = build_dataset(check(None, None, log, schema), schema, COLUMN)
    assert not len(data.validation)


@pytest.mark.parametrize("validation", [0.0, 0.1])
def test_given_rows_and_a_share_of_none_take_nothing_from_train(validation: float) -> None:
    log = published() if validation else published().filter(pl.col("fold") != "validation")
    split = COLUMN.model_copy(update={"validation": validation})
    data = build_dataset(check(None, None, log, CHECKERBOARD_SCHEMA), CHECKERBOARD_SCHEMA, split)
    assert not data.split.from_train
    assert len(data.train) == (log["fold"] == "train").sum()
    if validation:
        both = split.model_copy(update={"from_train": "last"})
        with pytest.raises(ConfigError, match="takes a validation part from train, and one is given; leave one"):
            build_dataset(check(None, None, log, CHECKERBOARD_SCHEMA), CHECKERBOARD_SCHEMA, both)


def test_files_of_ids_that_are_numbers_in_one_and_text_in_another_are_one_column(tmp_path: Path) -> None:
    for name, ids in (("train", ["1", "2", "x"]), ("test", ["1", "2", "2"])):
        items = ["3", "4", "5"] if name == "train" else ["6", "7", "8"]
        pl.DataFrame({"user_id": ids, "item_id": items}).write_csv(tmp_path / f"{name}.csv")
    users = pl.DataFrame({"user_id": ["1", "2", "x"]})
    users.write_csv(tmp_path / "users.csv")
    schema = CHECKERBOARD_SCHEMA.model_copy(update={"label": "", "time": ""})
    files = PartFiles({name: tmp_path / f"{name}.csv" for name in ("train", "test")})
    found = check(tmp_path / "users.csv", None, files, schema)
    assert found.interactions["user_id"].to_list() == ["1", "2", "x", "1", "2", "2"]
    assert found.interactions["item_id"].to_list() == [3, 4, 5, 6, 7, 8]


def replaced(value: str | None) -> Callable[[pl.DataFrame], pl.DataFrame]:
    """A change of the first part name of a log."""
    return lambda log: log.with_columns(fold=pl.Series([value, *log["fold"][1:]]))


@pytest.mark.parametrize("prepared", [False, True], ids=["memory", "prepared"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (replaced("val"), "column 'fold' names the part 'val' in 1 rows; did you mean 'validation'? (allowed: train"),
        (replaced(None), "column 'fold' has 1 missing parts; fill them with train, validation, test, or drop"),
        (lambda log: log.rename({"fold": "folds"}), "no column 'fold'; did you mean 'folds'? (found: user_id"),
        (lambda log: log.with_columns(fold=pl.lit("train")), "leaves no test rows out of 1200 interactions"),
    ],
    ids=["val", "null", "another column", "train alone"],
)
def test_part_names_that_are_none_are_one_line(
    tmp_path: Path, change: Callable[[pl.DataFrame], pl.DataFrame], words: str, prepared: bool
) -> None:
    log = change(published())
    path = tmp_path / "log.parquet"
    log.write_parquet(path)
    with one_line(DataError, words):
        dataset_of(path, COLUMN, tmp_path / "out" if prepared else None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.parquet"]


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ('[data]\ntrain = "a.csv"\n', "data.train is given without data.test; name its file too"),
        ('[data]\ntrain = "a.csv"\ntest = "b.csv"\n',
         "data.train goes with split.kind = 'files', not 'random'; set that"),
        ('[data]\ntrain = "a"\ntest = "b"\ninteractions = "c"\n',
         "give either data.interactions or data.train, not both"),
        ('[data]\ninteractions = "a"\n[split]\nkind = "files"\n', "split.kind = 'files' reads data.train"),
        ('[split]\nusers = 0.5\n',
         "users goes with split.kind = 'last' or 'user_ratio' or 'user_random', not 'random'; leave it out, or set "
         "split.users = 1.0"),
        ('[split]\nfrom_train = "last"\n', "from_train goes with split.kind = 'column' or 'files', not 'random'"),
    ],
)  # fmt: skip
def test_settings_of_a_split_that_contradict_are_one_line(tmp_path: Path, toml: str, words: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f"format = 4\n{toml}")
    with one_line(ConfigError, words):
        load_config(path)


def test_one_file_for_two_parts_is_refused(tmp_path: Path) -> None:
    checkerboard()[2].write_csv(tmp_path / "a.csv")
    paths = {"train": tmp_path / "a.csv", "test": tmp_path / "*.csv"}
    with pytest.raises(DataError, match=r"a\.csv: named by data\.train and by data\.test; name a file for one part"):
        check(None, None, PartFiles(paths), CHECKERBOARD_SCHEMA)
    with pytest.raises(DataError, match=r"PartFiles names the part 'dev' \(allowed: train, validation, test\)"):
        PartFiles({"dev": "a.csv"})


def test_files_are_asked_for_if_the_split_reads_files() -> None:
    with pytest.raises(ConfigError, match=r"data\.train is missing; name the files of data\.train and data\.test"):
        read(DatasetConfig(split=FILES), CHECKERBOARD_SCHEMA)
    with pytest.raises(DataError, match=r"split\.kind = 'files' needs files for the parts; set data\.train"):
        build_dataset(check(None, None, published(), CHECKERBOARD_SCHEMA), CHECKERBOARD_SCHEMA, FILES)


@pytest.mark.parametrize("prepared", [False, True], ids=["memory", "prepared"])
def test_a_gap_without_seconds_is_refused(tmp_path: Path, prepared: bool) -> None:
    split = SplitConfig(kind="time", gap=5)
    path = tmp_path / "log.parquet"
    published().write_parquet(path)
    with pytest.raises(DataError, match=r"split\.gap is in seconds, and schema\.time_unit = 'order' has none"):
        dataset_of(path, split, tmp_path / "out" if prepared else None)


@pytest.mark.parametrize("made", ["column", "files"])
def test_buckets_keep_given_parts(tmp_path: Path, made: str) -> None:
    log, split = published(), COLUMN if made == "column" else FILES
    data = part_files(tmp_path / "in", log, "parquet")
    if made == "column":
        log.write_parquet(tmp_path / "log.parquet")
        data = DataConfig(interactions=str(tmp_path / "log.parquet"))
    prepare.write_buckets(data, CHECKERBOARD_SCHEMA, tmp_path / "buckets", SMALL, split)
    assert api.check_buckets(tmp_path / "buckets", CHECKERBOARD_SCHEMA) == []
    buckets = DataConfig(buckets=str(tmp_path / "buckets"))
    found = prepare.write_prepared(buckets, CHECKERBOARD_SCHEMA, split, tmp_path / "out", SMALL)
    whole = prepare.write_prepared(data, CHECKERBOARD_SCHEMA, split, tmp_path / "whole", SMALL)
    assert found.digest == whole.digest
    other = prepare.write_prepared(buckets, CHECKERBOARD_SCHEMA, SplitConfig(kind="last"), tmp_path / "last", SMALL)
    assert len(other.parts) == log.height


def test_buckets_without_parts_are_refused_by_a_split_that_reads_them(tmp_path: Path) -> None:
    published().write_parquet(tmp_path / "log.parquet")
    data = DataConfig(interactions=str(tmp_path / "log.parquet"))
    prepare.write_buckets(data, CHECKERBOARD_SCHEMA, tmp_path / "buckets", SMALL)
    with pytest.raises(RunError, match="no column 'part', which the split needs"):
        prepare.write_prepared(
            DataConfig(buckets=str(tmp_path / "buckets")), CHECKERBOARD_SCHEMA, COLUMN, tmp_path / "out", SMALL
        )


def trained(folder: Path, prepared: bool = False, callback: Callback | None = None, **train: Any) -> Run:
    """A training without a validation part."""
    split = SplitConfig(kind="last", validation=0)
    config = settings(split={"kind": "last", "validation": 0}, train={"epochs": 3, **train})
    data: Any
    if prepared:
        log = folder.parent / f"{folder.name}.parquet"
        checkerboard()[2].write_parquet(log)
        out = folder.parent / f"{folder.name}-prepared"
        data = prepare.write_prepared(DataConfig(interactions=str(log)), CHECKERBOARD_SCHEMA, split, out, SMALL)
    else:
        data = (None, None, checkerboard()[2])
    resume = (folder / "checkpoints").exists()
    return api.fit(data, CHECKERBOARD_SCHEMA, config, folder=folder, callback=callback, resume=resume)


@pytest.mark.parametrize("prepared", [False, True], ids=["memory", "prepared"])
def test_without_a_validation_part_the_last_epoch_is_kept(tmp_path: Path, prepared: bool, messages: list[str]) -> None:
    run = trained(tmp_path / "run", prepared)
    assert "no validation part: training runs train.epochs epochs and keeps the last one" in messages
    assert not len(run.dataset.validation)
    assert run.metrics["train.best_epoch"] == run.metrics["train.epochs"] == 3
    assert not [name for name in (*run.metrics, *(n for h in run.history for n in h if n != "validation.seconds"))
                if name.startswith("validation")]  # fmt: skip
    assert run.metrics["test.recall@5"] > 0
    shorter = trained(tmp_path / "shorter", prepared, epochs=2)
    weights = run.model.state_dict()
    assert not all(torch.equal(weights[n], w) for n, w in shorter.model.state_dict().items())
    again = twotower.load(tmp_path / "run")
    assert api.evaluate(again) == {n: v for n, v in run.metrics.items() if not n.startswith("train.")}
    assert isinstance(again.dataset, MemmapDataset) == prepared


class Stop(Callback):
    """Ends a training after its second epoch."""

    def on_epoch_end(self, history: list[EpochRecord]) -> None:
        if len(history) == 2:
            raise KeyboardInterrupt


def test_a_training_without_validation_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut", callback=Stop())
    resumed = trained(tmp_path / "cut")
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name


def test_patience_without_a_validation_part_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="train.patience = 2 needs a validation part, and the split has none; set"):
        trained(tmp_path / "run", patience=2)
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_a_run_without_a_validation_part_is_diagnosed_and_published(tmp_path: Path) -> None:
    run = trained(tmp_path / "run")
    found = diagnose(run)
    assert "The training loss falls." in {f.text for f in found}
    assert not [f for f in found if f.severity == "error"]
    twotower.publish(run, tmp_path / "store")
    served = api.evaluate_bundle(twotower.retriever(tmp_path / "store"))
    assert served["exact"]["recall@5"] == pytest.approx(run.metrics["test.recall@5"], abs=1e-6)
    assert (tmp_path / "run" / "report.html").stat().st_size > 1000
