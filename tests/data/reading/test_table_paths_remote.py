"""Tables at URLs, read from a local S3 server, are those of the disk."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import obstore
import polars as pl
import pytest
from object_server import ObjectServer
from obstore.store import from_url

from twotower import files
from twotower.cli.app import run_command
from twotower.config.toml import load_config
from twotower.data.prepare import write_prepared
from twotower.data.prepare.options import PrepareOptions
from twotower.data.reading.readers import as_frame, read_file
from twotower.data.source import read
from twotower.data.tables import Tables
from twotower.errors import ConfigError, DataError
from twotower.files.object_stores import ObjectError

ROOT = Path(__file__).resolve().parents[3]
FRAME = pl.DataFrame({"user": ["01", "2", "01"], "item": [1, 2, 3], "place": ["x", "ü", "z"]})


def put(bucket: str, key: str, content: bytes) -> None:
    obstore.put(from_url(bucket, client_options={"allow_http": True}), key, content)


def parquet(frame: pl.DataFrame = FRAME) -> bytes:
    buffer = BytesIO()
    frame.write_parquet(buffer)
    return buffer.getvalue()


def csv(frame: pl.DataFrame = FRAME, separator: str = ",") -> bytes:
    return frame.write_csv(separator=separator).encode()


FORMS: dict[str, Callable[[], bytes]] = {
    "t.parquet": parquet, "t.csv": csv, "t.tsv": lambda: csv(separator="\t"), "t.csv.gz": lambda: gzip.compress(csv()),
    "a folder/with ü [1]/t%3A?#.parquet": parquet,
}  # fmt: skip


@pytest.mark.parametrize("key", FORMS)
def test_a_file_in_a_bucket_is_read_as_that_on_the_disk(key: str, bucket: str) -> None:
    put(bucket, key, FORMS[key]())
    assert read_file(f"{bucket}/{key}").equals(FRAME)
    assert as_frame(f"{bucket}/{key}", "interactions").equals(FRAME)


def test_folders_and_patterns_of_a_bucket_are_tables_in_the_order_of_their_names(bucket: str) -> None:
    frames = {name: FRAME.with_columns(item=pl.col("item") + 10 * n) for n, name in enumerate(("a", "b", "c"))}
    for name in ("b", "a"):
        put(bucket, f"log/{name}.parquet", parquet(frames[name]))
    for skipped in ("_SUCCESS", ".a.parquet.crc", ".hidden/0/x.parquet"):
        put(bucket, f"log/{skipped}", b"?")
    put(bucket, "logs/c.parquet", parquet(frames["c"]))
    of_folder = pl.concat([frames["a"], frames["b"]])
    for source in ("log", "log/", "log/*.parquet", "log/[ab].parquet", "*/[a-b].parquet"):
        assert read_file(f"{bucket}/{source}").equals(of_folder), source
    assert read_file(f"{bucket}/**/*.parquet").equals(pl.concat(frames.values())), "hidden folders are in no pattern"
    put(bucket, "log/_temporary/0/x.parquet", b"?")
    assert read_file(f"{bucket}/log").equals(of_folder)


def test_a_folder_of_spark_that_is_named_like_a_file_is_a_folder(bucket: str) -> None:
    put(bucket, "clicks.parquet/part-0.parquet", parquet())
    put(bucket, "clicks.parquet/_SUCCESS", b"")
    assert read_file(f"{bucket}/clicks.parquet").equals(FRAME)


@pytest.mark.parametrize("form", ["parquet", "csv"])
def test_folders_of_a_bucket_give_their_columns(form: str, bucket: str) -> None:
    for day in ("2026-11-02", "2026-11-01"):
        put(bucket, f"log/dt={day}/hour=7/p.{form}", parquet() if form == "parquet" else csv())
        put(bucket, f"log/dt={day}_$folder$", b"")
    for source in ("log", "log/**/*", "log/dt=*/hour=*/*"):
        found = read_file(f"{bucket}/{source}")
        assert found.columns == [*FRAME.columns, "dt", "hour"]
        assert found["dt"].cast(pl.String).to_list() == ["2026-11-01"] * 3 + ["2026-11-02"] * 3
        assert found["dt"].dtype == (pl.Date if form == "parquet" else pl.String)
        assert found["hour"].to_list() == [7] * 6


def test_an_http_server_gives_files(s3: ObjectServer, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    at = f"{s3.address}/{bucket.removeprefix('s3://')}"
    obstore.put(
        from_url(bucket, client_options={"allow_http": True, "default_headers": {"x-amz-acl": "public-read"}}),
        "a b.csv",
        csv(),
    )
    assert read_file(f"{at}/a%20b.csv").equals(FRAME)
    assert read_file(f"{at}/a b.csv").equals(FRAME)
    with pytest.raises(DataError, match=r"no such file \(a server of https:// cannot list"):
        read_file(f"{at}/*.csv")
    put(bucket, "private.csv", csv())
    with pytest.raises(DataError, match="access is refused; HTTP is read without a login"):
        read_file(f"{at}/private.csv")


ADDRESSES = {
    "ftp://host/a.csv": "'ftp' is no scheme",
    "s3://": "names no bucket",
    "https://me:secret@host/a.csv": "holds a login",
    "https://host/a.csv?X-Amz-Signature=secret": "has a query",
    "s3://b/a/../c.csv": "has an empty part",
}


@pytest.mark.parametrize(("address", "what"), ADDRESSES.items())
def test_an_address_of_no_use_is_one_line_without_its_secrets(address: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what) as e:
        read_file(address)
    assert "secret" not in str(e.value)
    assert "\n" not in str(e.value)


def test_what_is_not_there_is_one_line(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put(bucket, "log/a.parquet", parquet())
    put(bucket, "log/sub/a.parquet", parquet())
    put(bucket, "cut.parquet", parquet()[:-9])
    put(bucket, "latin.csv", "a,b\nx,é\n".encode("latin-1"))
    for source, what in {
        "none.parquet": "no such file",
        "none": "no file found; name a table",
        "log/*.csv": "no file found; name a table",
        "log": "found the folder sub in it",
        "cut.parquet": "cannot be read as parquet",
        "latin.csv": "line 2 is not UTF-8",
    }.items():
        with pytest.raises(DataError, match=what) as e:
            read_file(f"{bucket}/{source}")
        assert str(e.value).startswith(f"{bucket}/{source}: ")
    for source in ("a.parquet", "folder", "*.parquet"):
        with pytest.raises(DataError, match=r"no such bucket \(no-lake\)"):
            read_file(f"s3://no-lake/{source}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(DataError, match="no credentials found; set AWS_ACCESS_KEY_ID"):
        read_file(f"{bucket}/log/a.parquet")


@pytest.fixture
def config(bucket: str, tmp_path: Path) -> Path:
    """The config of the example, with its tables in a bucket: clicks by day, in folders."""
    text = (ROOT / "examples" / "own-data.toml").read_text(encoding="utf-8")
    for path in sorted((ROOT / "examples" / "own-data").glob("*.csv")):
        put(bucket, f"shop/{path.name}", path.read_bytes())
    (tmp_path / "there.toml").write_text(text.replace('"own-data/', f'"{bucket}/shop/'), encoding="utf-8")
    shutil.copytree(ROOT / "examples" / "own-data", tmp_path / "own-data")
    (tmp_path / "here.toml").write_text(text, encoding="utf-8")
    return tmp_path / "there.toml"


def test_a_config_of_a_bucket_gives_the_tables_of_the_disk_in_memory_and_prepared(config: Path, bucket: str) -> None:
    digests = set()
    for path in (config, config.with_name("here.toml")):
        schema, found = load_config(path, [])
        tables, schema = read(found, schema)
        assert isinstance(tables, Tables)
        assert tables.interactions.height == 2_422
        prepared = write_prepared(
            found.data, schema, found.split, path.with_suffix(".prepared"), PrepareOptions(piece_rows=999)
        )
        digests.add((prepared.digest, tables.interactions.hash_rows().sum(), tables.items.hash_rows().sum()))
    assert len(digests) == 1


def test_a_bucket_that_falls_silent_ends_a_preparation_that_goes_on_later(
    config: Path, monkeypatch: pytest.MonkeyPatch, s3: ObjectServer, messages: list[str]
) -> None:
    schema, found = load_config(config, [])
    assert schema
    out = config.with_name("prepared")

    class Silence:
        def point(self, name: str) -> None:
            if name == "made.renamed":
                monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")

    monkeypatch.setattr(files, "hooks", Silence())
    with pytest.raises(ObjectError, match="the server does not answer"):
        write_prepared(found.data, schema, found.split, out)
    assert not out.exists()
    monkeypatch.setattr(files, "hooks", files.Hooks())
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.address)
    assert write_prepared(found.data, schema, found.split, out).facts.rows > 0
    assert any("going on with what an earlier call has left" in line for line in messages)


@pytest.mark.parametrize("setting", ["data.prepared", "data.buckets"])
def test_what_is_mapped_into_memory_is_no_address(
    setting: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["train", str(config), "--run", str(config.parent / "run"), "--set", f"{setting}=s3://b/x"]) == 2
    assert "is an address, expected a folder on a disk" in capsys.readouterr().err
    assert not (config.parent / "run").exists()
