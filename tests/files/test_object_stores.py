"""Errors of object stores in one line, and addresses."""

from __future__ import annotations

from pathlib import Path

import pytest
from object_server import Fault, ObjectServer

from twotower.files.object_stores import Content, ObjectClient, ObjectError, explain
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
