"""Reads of object stores and HTTP servers, with an end: S3, Google Cloud Storage, Azure (obstore), whose credentials and
endpoints are those of the environment (AWS_…, GOOGLE_…, AZURE_…).
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, BinaryIO, Literal

from twotower.errors import ConfigError, RunError, first_line, missing_package
from twotower.files.urls import Url

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer
    from obstore import ObjectMeta, ReadableFile
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

Cause = Literal["missing", "refused", "unreachable", "other"]


class ObjectError(RunError):
    """An object store or HTTP server that could not do what it was asked for. `cause` says why."""

    def __init__(self, message: str, cause: Cause) -> None:
        super().__init__(message)
        self.cause = cause


@dataclass(frozen=True)
class RemoteLimits:
    """Ends of remote reads and writes. A try that fails by the network, or by a status of the server that may pass, is repeated
    after a random pause, which grows from a tenth of a second."""

    connect_seconds: float = 5.0
    """Seconds for a connection."""
    silence_seconds: float = 30.0
    """Seconds without a byte of an answer."""
    request_seconds: float = 300.0
    """Seconds of one request. A large file is several requests."""
    retries: int = 4
    """Repetitions of a request."""
    retry_seconds: float = 60.0
    """Seconds after which no repetition begins."""

    def for_polars(self) -> dict[str, str | int]:
        """Return the limits as `storage_options` of polars."""
        return {
            "connect_timeout": _seconds(self.connect_seconds), "read_timeout": _seconds(self.silence_seconds),
            "timeout": _seconds(self.request_seconds), "max_retries": self.retries,
            "retry_timeout_ms": int(self.retry_seconds * 1000),
        }  # fmt: skip

    def client(self) -> ClientConfig:
        """Return the limits as options of a client of obstore."""
        return {
            "connect_timeout": _seconds(self.connect_seconds), "read_timeout": _seconds(self.silence_seconds),
            "timeout": _seconds(self.request_seconds), "allow_http": True,
        }  # fmt: skip

    def retry(self) -> RetryConfig:
        """Return the repetitions as options of obstore."""
        pauses = {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=10), "base": 2}
        return {"max_retries": self.retries, "retry_timeout": timedelta(seconds=self.retry_seconds), "backoff": pauses}  # type: ignore[typeddict-item]


def _seconds(value: float) -> str:
    return f"{int(value * 1000)}ms"


@dataclass(frozen=True)
class ObjectInfo:
    """An object: key, size in bytes, and the tag that changes with its content (of HTTP servers without tags the time of change)."""

    key: str
    size: int
    tag: str


class ObjectClient:
    """The objects of a bucket, or the files of an HTTP server. Errors are of type ObjectError."""

    def __init__(self, url: Url, limits: RemoteLimits = RemoteLimits()) -> None:
        """Address the bucket of `url`. Raises ConfigError without obstore, or for settings of the environment that it refuses."""
        self.url, self.limits = url, limits
        settings = sorted((k, v) for k, v in os.environ.items() if k.startswith(("AWS_", "GOOGLE_", "AZURE_")))
        self.store = _client(url.root, url.is_object_store, limits, tuple(settings))

    def head(self, key: str) -> ObjectInfo | None:
        """Return what is known of an object, None if it is missing."""
        try:
            with remote_errors(self.url.of_key(key)):
                return _info(self.store.head(key))
        except ObjectError as e:
            if e.cause != "missing" or "bucket" in str(e):
                raise
            return None

    def list(self, prefix: str) -> list[ObjectInfo]:
        """Return the objects below a prefix of whole parts, in the order of their keys."""
        with remote_errors(self.url.of_key(prefix) if prefix else self.url):
            found = [_info(o) for o in self.store.list(prefix=prefix or None).collect()]
        return sorted(found, key=lambda o: o.key)

    def open(self, key: str) -> BinaryIO:
        """Return an object as a file for reading."""
        import obstore

        with remote_errors(self.url.of_key(key)):
            return io.BufferedReader(_ObjectFile(obstore.open_reader(self.store, key), self.url.of_key(key)))


class _ObjectFile(io.RawIOBase):
    """An object as a file of the standard library."""

    def __init__(self, file: ReadableFile, url: Url) -> None:
        self._file, self._url = file, url

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        with remote_errors(self._url):
            found = self._file.read(len(view)).to_bytes()
        view[: len(found)] = found
        return len(found)


@lru_cache(maxsize=32)
def _client(
    root: str, is_object_store: bool, limits: RemoteLimits, _settings: tuple[tuple[str, str], ...]
) -> ObjectStore:
    try:
        from obstore.exceptions import BaseError
        from obstore.store import HTTPStore, from_url
    except ModuleNotFoundError as e:
        raise missing_package(e, root) or e from None
    make = from_url if is_object_store else HTTPStore.from_url
    try:
        return make(root, client_options=limits.client(), retry_config=limits.retry())
    except (BaseError, ValueError, TypeError) as e:
        raise ConfigError(
            f"{root}: cannot be addressed ({first_line(e)[:200]}); check it and the environment"
        ) from None


def _info(found: ObjectMeta) -> ObjectInfo:
    tag = found["e_tag"] or f"{found['last_modified']:%Y-%m-%dT%H:%M:%S.%f}"
    return ObjectInfo(found["path"], found["size"], tag)


@contextmanager
def remote_errors(url: Url) -> Iterator[None]:
    """Turn errors of obstore about an address into ObjectErrors of one line."""
    from obstore.exceptions import BaseError

    try:
        yield
    except (BaseError, OSError) as e:
        raise explain(e, url) from None


_NO_BUCKET = re.compile(r"NoSuchBucket|ContainerNotFound|specified bucket does not exist")
_NO_CREDENTIALS = re.compile(
    r"169\.254\.169\.254|/latest/api/token|metadata\.google|/metadata/identity|/metadata/instance"
)
_REFUSED = re.compile(
    r"\b(401|403)\b|AccessDenied|SignatureDoesNotMatch|InvalidAccessKeyId|lacked the necessary privileges", re.I
)
_MISSING = re.compile(r"\b404\b|not found|NoSuchKey", re.I)
_UNREACHABLE = re.compile(
    r"error sending request|connect|timed out|timeout|\b5\d\d\b|\b429\b|dns|after \d+ retries", re.I
)
_CODE = re.compile(r"<Code>(\w+)</Code>")


def explain(error: BaseException, url: Url) -> ObjectError:
    """Return an error of obstore or polars about an address as one line: its cause, and what to do."""
    text = str(error)
    code = found[1] if (found := _CODE.search(text)) else ""
    if _NO_BUCKET.search(text):
        return ObjectError(
            f"{url}: no such bucket ({url.bucket}); check its name, and the endpoint in the environment", "missing"
        )
    if isinstance(error, FileNotFoundError):
        return ObjectError(f"{url}: no such file", "missing")
    if _NO_CREDENTIALS.search(text):
        names = {"s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY", "gs": "GOOGLE_APPLICATION_CREDENTIALS"}
        wanted = names.get(url.scheme, "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY")
        return ObjectError(f"{url}: no credentials found; set {wanted} in the environment", "refused")
    if _REFUSED.search(text):
        why = f" ({code})" if code else ""
        what = (
            "check the credentials in the environment, and their rights"
            if url.is_object_store
            else "HTTP is read without a login"
        )
        return ObjectError(f"{url}: access is refused{why}; {what}", "refused")
    if _MISSING.search(text):
        return ObjectError(f"{url}: no such file", "missing")
    reason = re.sub(r"\s+", " ", re.sub(r"Debug source:.*|Caused by:.*|<\?xml.*", "", text, flags=re.DOTALL)).strip()[
        :300
    ]
    if _UNREACHABLE.search(text):
        return ObjectError(
            f"{url}: the server does not answer as expected ({reason}); check the network and the endpoint in the environment, or call again",
            "unreachable",
        )
    return ObjectError(f"{url}: cannot be read or written ({reason})", "other")
