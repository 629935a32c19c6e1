"""Tables of Delta Lake, written by deltalake, are read as of one version."""

from __future__ import annotations

import io
import os
from pathlib import Path

import polars as pl
import pytest
from deltalake import DeltaTable, write_deltalake
from messages import refused

from twotower.config.toml import load_config
from twotower.data.prepare import write_prepared
from twotower.data.reading.readers import as_frame, read_file
from twotower.data.reading.table_paths import table_files
from twotower.data.source import read
from twotower.data.tables import Tables
from twotower.errors import DataError
from twotower.files.object_stores import ObjectClient, ObjectError
from twotower.files.urls import Url

DAYS = [f"2026-11-{1 + n // 30:02d}" for n in range(90)]
CLICKS = pl.DataFrame(
    {
        "user_id": [f"u{n % 6}" for n in range(90)],
        "item_id": [f"i{n % 11}" for n in range(90)],
        "at": range(90),
        "dt": DAYS,
    }
)
GONE = pl.DataFrame({"user_id": ["u0"], "item_id": ["gone"], "at": [0], "dt": ["2026-11-09"]})


def write(at: str) -> None:
    """A table of three versions, with files that the last one has not: of a day that was deleted."""
    options = {"allow_http": "true"}
    write_deltalake(at, GONE, partition_by=["dt"], storage_options=options)
    write_deltalake(at, CLICKS, mode="append", storage_options=options)
    DeltaTable(at, storage_options=options).delete("dt = '2026-11-09'")


@pytest.fixture(params=["disk", "bucket"])
def table(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    at = str(tmp_path / "clicks")
    if request.param == "bucket":
        at = f"{request.getfixturevalue('bucket')}/lake/clicks"
    write(at)
    return at


def test_the_rows_of_the_current_version_are_read_and_no_others(table: str) -> None:
    found = read_file(table)
    assert found.sort("at").equals(CLICKS)
    assert as_frame(table, "interactions").height == 90
    assert read_file(table, wanted=["item_id"]).columns == ["item_id"]


def test_a_version_that_is_read_stays_while_the_table_changes(table: str) -> None:
    (path,) = table_files(table)
    state = path.state()
    write_deltalake(table, GONE, mode="append", storage_options={"allow_http": "true"})
    assert path.scan().collect().height == 90
    assert path.state() == state
    (again,) = table_files(table)
    assert again.state() != state
    assert again.scan().collect().height == 91


def test_a_version_whose_files_are_told_in_another_order_is_not_read(
    table: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a checkpoint by another writer may list them: parts read before and after would not make one table."""
    (path,) = table_files(table)
    told = DeltaTable.file_uris
    monkeypatch.setattr(DeltaTable, "file_uris", lambda self: told(self)[::-1])
    with pytest.raises(DataError, match=r"version 2 lists other files, or in another order, .*; start again"):
        path.scan()
    (again,) = table_files(table)
    assert again.state() != path.state()


@pytest.mark.parametrize("name", ["my clicks"])
def test_a_path_that_the_log_would_encode_is_refused(tmp_path: Path, name: str) -> None:
    at = tmp_path / name / "_delta_log"
    at.mkdir(parents=True)
    with pytest.raises(DataError, match="in a path of other characters than ASCII letters"):
        read_file(tmp_path / name)


def test_a_file_of_a_bucket_needs_no_right_to_list(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    url = Url.parse(f"{bucket}/one/items.parquet")
    data = io.BytesIO()
    CLICKS.write_parquet(data)
    ObjectClient(url).write(url.key, data.getvalue())
    listed: list[str] = []

    def refuse(self: ObjectClient, prefix: str) -> bool:
        listed.append(prefix)
        raise ObjectError(f"{prefix}: access is refused", "refused")

    monkeypatch.setattr(ObjectClient, "holds", refuse)
    assert read_file(str(url)).height == 90
    assert listed == ["one/_delta_log"]


def test_files_of_the_table_are_not_read_past_its_log(table: str) -> None:
    for pattern in ("*/*.parquet", "**/*.parquet", "dt=2026-11-0*/*.parquet"):
        with pytest.raises(DataError, match="whose log tells which files are in it; name the folder"):
            read_file(f"{table}/{pattern}")


def test_a_damaged_or_silent_table_is_one_line(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(str(tmp_path / "t"))
    for log in (tmp_path / "t" / "_delta_log").glob("*.json"):
        log.write_text("{", encoding="utf-8")
    refused(lambda: read_file(tmp_path / "t"), "cannot be read as a table of Delta Lake")
    write(f"{bucket}/t")
    (path,) = table_files(f"{bucket}/t")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(ObjectError, match="does not answer"):
        path.scan()


@pytest.fixture(autouse=True)
def _few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "TOKIO_WORKER_THREADS", "1")


def test_a_version_that_is_named_is_read_whatever_is_current(table: str) -> None:
    (first,) = table_files(f"{table}@v0")
    assert first.scan().collect().equals(GONE)
    state = first.state()
    assert read_file(f"{table}@v1").height == 91
    assert read_file(f"{table}@v2").sort("at").equals(CLICKS)
    write_deltalake(table, GONE, mode="append", storage_options={"allow_http": "true"})
    (again,) = table_files(f"{table}@v0")
    assert again.state() == state != table_files(table)[0].state()
    for later in (4, 99, 2**63 - 1):  # of which the last would be looked for without an end
        told = rf"clicks: has no version {later}, and the last is 3; name one up to it \(@vNUMBER\)$"
        with pytest.raises(DataError, match=told):
            read_file(f"{table}@v{later}")


def test_a_config_names_a_version(table: str, tmp_path: Path) -> None:
    """A preparation that was stopped goes on after a commit, and a file or folder of such a name is that."""
    path = tmp_path / "config.toml"
    path.write_text(
        f'data.interactions = "{table}@v2"\nschema = {{ time = "at", time_unit = "order" }}\n', encoding="utf-8"
    )
    schema, config = load_config(path)
    assert schema
    write_deltalake(table, GONE, mode="append", storage_options={"allow_http": "true"})
    tables, schema = read(config, schema)
    assert isinstance(tables, Tables)
    assert "gone" not in tables.items["item_id"].to_list()
    prepared = write_prepared(config.data, schema, config.split, tmp_path / "prepared")
    assert prepared.facts.rows == tables.interactions.height
    assert len(prepared.items) == 11
    (tmp_path / "log@v1").mkdir()
    CLICKS.head(3).write_parquet(tmp_path / "log@v1/a.parquet")
    assert read_file(tmp_path / "log@v1").height == 3
    with pytest.raises(DataError, match=r"nothing@v1: no such file"):
        read_file(tmp_path / "nothing@v1")
