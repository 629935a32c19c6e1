"""Tables of Apache Iceberg, written by pyiceberg, are read as of one snapshot."""

from __future__ import annotations

import os
from pathlib import Path

import polars as pl
import pytest
from messages import refused
from pyiceberg.catalog.sql import SqlCatalog
from pyiceberg.table import Table
from pyiceberg.types import IntegerType

from twotower.data.reading.readers import as_frame, read_file
from twotower.data.reading.table_paths import table_files
from twotower.errors import DataError

CLICKS = pl.DataFrame({"user": ["a", "b", "c"], "item": [1, 2, 3]})


def made(warehouse: str, folder: Path) -> Table:
    """A table of three snapshots: a row was deleted from the last one."""
    given = {"s3.endpoint": os.environ.get("AWS_ENDPOINT_URL", ""), "s3.access-key-id": "tester"}
    given |= {"s3.secret-access-key": "secret", "s3.region": "us-east-1"}
    catalog = SqlCatalog("tests", uri=f"sqlite:///{folder}/catalog.db", warehouse=warehouse, **given)
    catalog.create_namespace("shop")
    table = catalog.create_table("shop.clicks", schema=CLICKS.to_arrow().schema)
    table.append(CLICKS.to_arrow())
    table.append(CLICKS.with_columns(item=pl.col("item") + 10).to_arrow())
    table.delete("user == 'a'")
    catalog.close()
    return table


@pytest.fixture(params=["disk", "bucket"])
def table(request: pytest.FixtureRequest, tmp_path: Path) -> Table:
    if request.param == "bucket":
        return made(f"{request.getfixturevalue('bucket')}/lake", tmp_path)
    return made(f"file://{tmp_path}/lake", tmp_path)


def place(table: Table) -> str:
    return str(table.metadata_location).removeprefix("file://")


def test_a_metadata_file_is_its_current_snapshot(table: Table) -> None:
    found = read_file(place(table))
    assert sorted(found.rows()) == [("b", 2), ("b", 12), ("c", 3), ("c", 13)]
    (path,) = table_files(place(table))
    snapshot = table.current_snapshot()
    assert snapshot
    assert path.state()[0] == snapshot.snapshot_id
    assert not path.is_text


def test_a_folder_is_read_where_it_names_its_metadata(table: Table) -> None:
    folder, _, name = place(table).rpartition("/metadata/")
    with pytest.raises(DataError, match="whose catalog alone knows the current version; name its metadata file"):
        read_file(folder)
    if folder.startswith("/"):
        (Path(folder) / "metadata" / "version-hint.text").write_text(
            name.removesuffix(".metadata.json"), encoding="utf-8"
        )
        assert read_file(folder).height == 4


def test_a_table_in_python_is_an_arrow_stream(table: Table) -> None:
    assert as_frame(table.scan(row_filter="item > 10").to_arrow_batch_reader(), "interactions").height == 2


def test_what_is_no_table_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "v1.metadata.json").write_text("{", encoding="utf-8")
    refused(lambda: read_file(tmp_path / "v1.metadata.json"), "cannot be read as a table of Apache Iceberg")
    (tmp_path / "t" / "metadata").mkdir(parents=True)
    (tmp_path / "t" / "metadata" / "a.csv").write_text("x\n1\n", encoding="utf-8")
    with pytest.raises(DataError, match="found the folder metadata in it"):
        read_file(tmp_path / "t")
    (tmp_path / "u").mkdir()
    (tmp_path / "u" / "metadata").write_text("x", encoding="utf-8")
    with pytest.raises(DataError, match="metadata: found a '' file"):
        read_file(tmp_path / "u")


def test_a_snapshot_that_is_named_is_read_whatever_is_current(table: Table) -> None:
    first, second, *_ = table.snapshots()
    at = place(table)
    assert sorted(read_file(f"{at}@v{first.snapshot_id}").rows()) == [("a", 1), ("b", 2), ("c", 3)]
    assert read_file(f"{at}@v{second.snapshot_id}").height == 6
    (path,) = table_files(f"{at}@v{first.snapshot_id}")
    assert path.state()[0] == first.snapshot_id
    with table.update_schema() as changed:
        changed.add_column("more", IntegerType())
    assert read_file(f"{place(table)}@v{first.snapshot_id}").columns == ["user", "item"]
    with pytest.raises(DataError, match=r"has no snapshot 7, and the last ones are \d+, \d+, .*; name one of them"):
        read_file(f"{at}@v7")
