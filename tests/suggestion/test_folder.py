"""Tables of a folder, and what is said of files that are not read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from twotower.errors import DataError
from twotower.suggestion.folder import folder_tables


def of(tmp_path: Path, *files: str) -> tuple[str, dict[str, str], dict[str, str], list[str]]:
    """Return log, parts, sides and lines of a folder with some files."""
    for name in files:
        (tmp_path / name).write_text("user_id,item_id\n1,2\n")
    found = folder_tables(tmp_path)
    parts, sides = ({key: path.name for key, path in paths.items()} for paths in (found.parts, found.sides))
    return found.log.name, parts, sides, [*found.unread]


@pytest.mark.parametrize(
    ("train", "validation", "test"),
    [
        ("train.csv", "valid.csv", "test.csv"),
        ("ratings_train.csv", "ratings_val.csv", "ratings_test.csv"),
        ("training.parquet", "dev.parquet", "testing.parquet"),
        ("Train.tsv.gz", "Validation.tsv.gz", "Test.tsv.gz"),
        ("train_1.csv", "validation_1.csv", "test_1.csv"),
        ("gowalla.train.csv", "gowalla.valid.csv", "gowalla.test.csv"),
        ("log.train.tsv.gz", "log.dev.tsv.gz", "log.test.tsv.gz"),
    ],
)
def test_parts_stand_side_by_side(tmp_path: Path, train: str, validation: str, test: str) -> None:
    log, parts, sides, unread = of(tmp_path, train, validation, test, "users.csv")
    assert (log, parts) == (train, {"train": train, "validation": validation, "test": test})
    assert (sides, unread) == ({"users": "users.csv"}, [])


def test_files_that_differ_in_a_number_are_a_pattern(tmp_path: Path) -> None:
    pieces = [f"train-0000{i}-of-00002.csv" for i in range(2)]
    log, parts, _, _ = of(tmp_path, *pieces, "test-00000-of-00001.csv")
    assert (log, parts["train"]) == ("train-*-of-*.csv", "train-*-of-*.csv")
    (tmp_path / "train-b.csv").write_text("x")
    with pytest.raises(DataError, match="both look like one part"):
        folder_tables(tmp_path)


def test_a_part_train_alone_is_the_log(tmp_path: Path) -> None:
    log, parts, _, unread = of(tmp_path, "train.csv", "valid.csv", "notes.md", "other.csv")
    assert (log, parts) == ("train.csv", {})
    assert [re.split(": |;", line)[0] for line in unread] == ["notes.md", "other.csv", "valid.csv"]
    assert [line.split(": ")[1] for line in unread] == [
        "no table",
        "its name is none of users, items and interactions; rename it, or name the tables one by one",
        "a part train and no part test; name a file test, or split by a rule",
    ]


def test_a_part_beside_a_log_is_told(tmp_path: Path) -> None:
    log, parts, _, unread = of(tmp_path, "ratings.csv", "test.csv")
    assert (log, parts, unread) == ("ratings.csv", {}, ["test.csv: a part of the interactions without a part train"])
    (tmp_path / "train.csv").write_text("x")
    with pytest.raises(DataError, match=r"ratings\.csv and train\.csv both look like interactions"):
        folder_tables(tmp_path)


@pytest.mark.parametrize(
    ("name", "part", "other"), [("test.csv", "test", "base.csv"), ("u1.val.csv", "validation", "u1.test.csv")]
)
def test_a_part_is_no_piece_of_a_table(tmp_path: Path, name: str, part: str, other: str) -> None:
    for file in (name, other):
        (tmp_path / file).write_text("user_id,item_id\n1,2\n")
    with pytest.raises(
        DataError, match=f"{name} looks like the part {part} of the interactions, {other} stands beside it"
    ):
        folder_tables(tmp_path)


def test_pieces_of_one_part_alone_are_the_log(tmp_path: Path) -> None:
    assert of(tmp_path, "test_1.csv", "test_2.csv")[:2] == (tmp_path.name, {})


def test_a_file_that_is_named_has_others_beside_it(tmp_path: Path) -> None:
    of(tmp_path, "train.csv", "test.csv", "items.csv", "other.csv")
    assert folder_tables(tmp_path / "train.csv").unread == (
        "test.csv: stands beside train.csv; name the folder to train and test on the parts as they are",
    )
    assert folder_tables(tmp_path / "test.csv").unread == folder_tables(tmp_path / "other.csv").unread == ()


def test_tables_of_sides_are_no_parts(tmp_path: Path) -> None:
    _, parts, sides, _ = of(tmp_path, "train.csv", "test.csv", "train_items.csv")
    assert (list(parts), sides) == (["train", "test"], {"items": "train_items.csv"})
