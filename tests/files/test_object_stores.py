"""Errors of object stores in one line, and addresses."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from object_server import Fault, ObjectServer
from wire import Wire

from twotower.files.object_stores import Content, ObjectClient, ObjectError, RemoteLimits, explain
from twotower.files.urls import Url, is_url

TEXTS = {
    "<Error><Code>NoSuchBucket</Code>": ("bucket", "no such bucket (b)"),
    "Error performing PUT http://169.254.169.254/latest/api/token in 403.2ms": ("refused", "no credentials found"),
    "Error performing GET http://h:401/k in 403.5ms - Server returned non-2xx status code: 503 Slow": (
        "unreachable",
        "503",
    ),
    "Error performing GET http://h/k in 503ms - status code: 403 Forbidden: <?xml ?><Code>AccessDenied</Code>": (
        "refused",
        "access is refused (AccessDenied); check the credentials",
    ),
    "Error performing HEAD http://h/404 in 1ms - HTTP error: error sending request\n\nDebug source: x": (
        "unreachable",
        "HTTP error: error sending request",
    ),
    "Generic S3 error: HTTP error: request or response body error": ("unreachable", "response body error"),
    "status code: 404 Not Found": ("missing", "no such file"),
    "incorrectly configured region": ("other", "cannot be read or written (incorrectly configured region)"),
}


@pytest.mark.parametrize("text", TEXTS)
def test_an_error_is_one_line_with_its_cause_and_without_addresses(text: str) -> None:
    cause, told = TEXTS[text]
    found = explain(OSError(text), Url.parse("s3://b/k"))
    assert found.cause == cause
    assert told in str(found)
    assert "\n" not in str(found)
    assert "http://" not in str(found)
    assert str(found).startswith("s3://b/k: ")


def test_a_web_server_at_the_address_of_metadata_needs_no_credentials() -> None:
    error = OSError("Error performing GET http://169.254.169.254/a.csv in 4ms - HTTP error: error sending request")
    found = explain(error, Url.parse("http://169.254.169.254/a.csv"))
    assert found.cause == "unreachable"
    assert "AZURE" not in str(found)


def test_a_path_made_of_an_address_is_that_address() -> None:
    for text in ("s3://b/a/k", "https://host/a/k"):
        assert is_url(Path(text))
        assert str(Url.parse(Path(text))) == text
    assert not is_url(Path("data/s3:/x"))
    assert not is_url("s3:/b/k")
    assert Url.parse("https://h/a%20b.csv").key == "a b.csv"
    assert Url.parse("s3://b/a%20b.csv").key == "a%20b.csv"
    assert Url.parse("abfss://box@account.dfs.core.windows.net/k").root == "abfss://box@account.dfs.core.windows.net"


def test_a_conditional_write_wants_what_was_read(bucket: str, s3: ObjectServer) -> None:
    client = ObjectClient(Url.parse(bucket))
    client.write("k", b"1", Content())
    with pytest.raises(ObjectError, match="was changed by another process") as caught:
        client.write("k", b"2", Content())
    assert caught.value.cause == "changed"
    read = client.read("k", 10)
    assert (read.data, read.info and read.info.size) == (b"1", 1)
    client.write("k", b"2", read)
    for since in (read, client.read("none", 10)):
        with pytest.raises(ObjectError, match="was changed by another process"):
            client.write("k", b"3", since)
    with pytest.raises(ObjectError, match="1 bytes, expected at most 0"):
        client.read("k", 0)
    client.delete(["k", "none"])
    assert client.list("") == []
    s3.let_happen(Fault("^GET .*/k$", 503, times=99))
    with pytest.raises(ObjectError, match="does not answer as expected") as caught:
        client.read("k", 10)
    assert caught.value.cause == "unreachable"
    s3.let_happen()


DATA = bytes(range(256)) * 1500


@pytest.fixture
def slow(bucket: str, s3: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Wire]:
    """A wire that takes a second and a half for DATA, to which the environment points."""
    wire = Wire(int(s3.address.rpartition(":")[2]), rate=len(DATA) / 1.5)
    monkeypatch.setenv("AWS_ENDPOINT_URL", wire.uri)
    yield wire
    wire.close()


@pytest.mark.system  # the link takes seconds
@pytest.mark.parametrize("way", ["write", "conditional write", "upload", "read in chunks", "read"])
def test_bytes_of_a_slow_link_are_no_silence(
    way: str, bucket: str, s3: ObjectServer, slow: Wire, tmp_path: Path
) -> None:
    """Neither are they the end of a request: without their own seconds each of these ends after one."""
    url = Url.parse(bucket)
    limits = RemoteLimits(silence_seconds=1.0, request_seconds=1.0, retries=0, slowest=2_000.0)
    if way == "read":
        ObjectClient(url).write("k", DATA)
        limits = replace(limits, silence_seconds=60.0)
        assert ObjectClient(url, limits).read("k", len(DATA)).data == DATA
        with pytest.raises(ObjectError, match="does not answer as expected"):
            ObjectClient(url, replace(limits, slowest=1e9)).read("k", len(DATA))
        return
    if way == "read in chunks":
        limits = replace(limits, silence_seconds=60.0)
        ObjectClient(url).write("k", DATA)
        client = ObjectClient(url, limits)
        assert b"".join(client.chunks("k", len(DATA))) == DATA
        with pytest.raises(ObjectError, match="does not answer as expected") as caught:
            list(client.chunks("k", 1))
        assert caught.value.cause == "unreachable"
        return
    client = ObjectClient(url, limits)
    (tmp_path / "file").write_bytes(DATA)
    if way == "upload":
        client.upload("k", tmp_path / "file")
    else:
        client.write("k", DATA, Content() if way == "conditional write" else None)
    assert slow.passed > len(DATA)
    with pytest.raises(ObjectError, match="does not answer as expected"):
        ObjectClient(url, replace(limits, slowest=1e9)).write("other", DATA)


@pytest.mark.system
def test_a_table_is_read_through_a_slow_link(bucket: str, s3: ObjectServer, slow: Wire) -> None:
    noise = pl.DataFrame({"x": np.frombuffer(np.random.default_rng(0).bytes(len(DATA)), np.int64)})
    file = io.BytesIO()
    noise.write_parquet(file)
    ObjectClient(Url.parse(bucket)).write("noise.parquet", file.getvalue())
    limits = RemoteLimits(silence_seconds=60.0, request_seconds=1.0, retries=0)

    def read(by: RemoteLimits) -> pl.DataFrame:
        options = by.for_polars()
        return pl.scan_parquet(f"{bucket}/noise.parquet", storage_options=options, credential_provider=None).collect()

    assert read(limits).equals(noise)
    with pytest.raises(OSError, match="body error|timed out|operation"):
        read(replace(limits, slowest=1e12))


def test_a_transfer_has_the_seconds_of_its_bytes_and_few_clients_differ() -> None:
    limits = RemoteLimits(silence_seconds=30.0, request_seconds=300.0, slowest=1_000.0)
    assert limits.of_transfer(1_000, is_sent=True) == limits
    assert limits.of_transfer(3_500, is_sent=True) == replace(limits, silence_seconds=34.0, request_seconds=304.0)
    assert limits.of_transfer(3_500, is_sent=False) == replace(limits, request_seconds=304.0)
    assert len({limits.of_transfer(n, is_sent=True) for n in range(0, 10**8, 9_973)}) == 15
