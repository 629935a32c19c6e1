"""Reads and writes of object stores (S3, Google Cloud Storage, Azure), and reads of HTTP servers, all with time limits.

The client is obstore. Credentials and endpoints are in the environment (AWS_…, GOOGLE_…, AZURE_…).
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal

from pydantic import BaseModel, ConfigDict, StrictInt, StrictStr

from twotower import files
from twotower.errors import ConfigError, RunError, first_line, missing_package
from twotower.files.readers import file_digest
from twotower.files.urls import Url

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer
    from obstore import ObjectMeta, PutMode, ReadableFile
    from obstore.store import ClientConfig, ObjectStore, RetryConfig, S3Config

CHUNK_BYTES = 16 << 20
"""Bytes of one part of a large upload or download."""
PARTS = 2
"""Parts of a large upload that are sent at a time."""
POLARS_BYTES = 1 << 30
"""Bytes that polars requests at a time: many requests of up to 64 MiB."""
TRANSFERS = 4
"""Files that a process reads or writes at a time."""
Cause = Literal["missing", "bucket", "refused", "unreachable", "changed", "size", "checksum", "foreign", "other"]


class ObjectError(RunError):
    """A failed request to an object store or HTTP server, with its `cause`."""

    def __init__(self, message: str, cause: Cause) -> None:
        super().__init__(message)
        self.cause = cause

    def __reduce__(self) -> tuple[type[ObjectError], tuple[str, Cause]]:
        return type(self), (str(self), self.cause)


@dataclass(frozen=True)
class RemoteLimits:
    """Limits of remote reads and writes. A try that fails by the network, or by a passing status of the server, is
    repeated after a random pause, which grows from a tenth of a second."""

    connect_seconds: float = 5.0
    """Seconds for a connection."""
    silence_seconds: float = 30.0
    """Seconds without a byte of an answer, in addition to the time of sent bytes."""
    request_seconds: float = 300.0
    """Seconds of one request, in addition to the time of its bytes."""
    slowest: float = 500_000.0
    """Bytes a second of the slowest link. A request of more than a second's bytes gets the time of its bytes."""
    retries: int = 4
    """Repetitions of a request."""
    retry_seconds: float = 60.0
    """Seconds after which no repetition begins."""

    def for_polars(self) -> dict[str, str | int]:
        """Return the limits as `storage_options` of polars, whose requests share the link."""
        request_seconds = self.of_transfer(POLARS_BYTES, is_sent=False).request_seconds
        return {
            "connect_timeout": _seconds(self.connect_seconds), "read_timeout": _seconds(self.silence_seconds),
            "timeout": _seconds(request_seconds), "max_retries": self.retries,
            "retry_timeout_ms": int(self.retry_seconds * 1000),
        }  # fmt: skip

    def for_delta(self) -> dict[str, str]:
        """Return the limits as `storage_options` of deltalake."""
        return {
            "connect_timeout": _seconds(self.connect_seconds), "timeout": _seconds(self.request_seconds),
            "max_retries": str(self.retries), "retry_timeout": _seconds(self.retry_seconds), "allow_http": "true",
        }  # fmt: skip

    def of_transfer(self, size: int, is_sent: bool) -> RemoteLimits:
        """Return the limits of a request of `size` bytes. The client counts the time of sent bytes as silence.

        The added seconds are rounded up to a power of two, so that few clients are made."""
        more = 2.0 ** math.ceil(math.log2(size / self.slowest)) if size > self.slowest else 0.0
        silence = self.silence_seconds + (more if is_sent else 0.0)
        return replace(self, silence_seconds=silence, request_seconds=self.request_seconds + more)

    def client(self) -> ClientConfig:
        """Return the limits as options of a client of obstore."""
        return {
            "connect_timeout": _seconds(self.connect_seconds), "read_timeout": _seconds(self.silence_seconds),
            "timeout": _seconds(self.request_seconds), "allow_http": True,
        }  # fmt: skip

    def retry(self) -> RetryConfig:
        """Return the repetitions as options of obstore."""
        pauses = {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=10), "base": 2}
        end = timedelta(seconds=self.retry_seconds)
        return {"max_retries": self.retries, "retry_timeout": end, "backoff": pauses}  # type: ignore[typeddict-item]


def _seconds(value: float) -> str:
    return f"{int(value * 1000)}ms"


@dataclass(frozen=True)
class ObjectInfo:
    """An object: key, size in bytes, tag, and time of the last change by the server's clock, in seconds since 1970.

    The tag changes with the content; of an HTTP server without tags it is the time of the last change."""

    key: str
    size: int
    tag: str
    changed: float
    version: str = ""
    """Number of the version, if the object store has versions."""


@dataclass(frozen=True)
class Content:
    """Content and facts of a small object; `info` None: it is missing."""

    data: bytes = b""
    info: ObjectInfo | None = None


class FileEntry(BaseModel):
    """A file of a folder: path in the folder, size in bytes, digest."""

    model_config = ConfigDict(frozen=True)

    path: StrictStr
    size: StrictInt
    sha256: StrictStr


class ObjectClient:
    """The objects of a bucket, or the files of an HTTP server. Errors are of type ObjectError."""

    def __init__(self, url: Url, limits: RemoteLimits = RemoteLimits()) -> None:
        """Address the bucket of `url`. Raises ConfigError without obstore, or if it refuses the environment."""
        self.url, self.limits = url, limits
        self.store = self._of_limits(limits)

    def _of_limits(self, limits: RemoteLimits) -> ObjectStore:
        settings = sorted((k, v) for k, v in os.environ.items() if k.startswith(("AWS_", "GOOGLE_", "AZURE_")))
        return _client(self.url.root, self.url.is_object_store, limits, tuple(settings))

    def head(self, key: str) -> ObjectInfo | None:
        """Return the facts about an object, None if it is missing."""
        try:
            with remote_errors(self.url.of_key(key)):
                return _info(self.store.head(key))
        except ObjectError as e:
            if e.cause != "missing":
                raise
            return None

    def list(self, prefix: str, skip: Callable[[str], None] | None = None) -> list[ObjectInfo]:
        """Return the objects below a prefix of whole parts, in the order of their keys.

        A key with an empty part, ".", ".." or a control character makes a listing fail: raises ObjectError "foreign".
        `skip` is called with the message instead, and the listing begins after such parts, or at each folder."""
        with remote_errors(self.url.of_key(prefix) if prefix else self.url):
            try:
                found = self.store.list(prefix=prefix or None).collect()
            except Exception as e:
                if skip is None or type(e).__name__ != "InvalidPathError":
                    raise
                skip(f"{explain(e, self.url)}; it is skipped")
                try:
                    found = self.store.list(prefix=prefix, offset=f"{prefix}/0").collect()
                except type(e):
                    level = self.store.list_with_delimiter(prefix)
                    folders = [o for folder in level["common_prefixes"] for o in self.list(folder, skip)]
                    return sorted([*map(_info, level["objects"]), *folders], key=lambda o: o.key)
        return sorted(map(_info, found), key=lambda o: o.key)

    def holds(self, prefix: str) -> bool:
        """Return True if there is an object below a prefix of whole parts."""
        with remote_errors(self.url.of_key(prefix)):
            return any(page for page in self.store.list(prefix=prefix, chunk_size=1))

    def read(self, key: str, max_bytes: int) -> Content:
        """Return an object, without content if it is missing. Raises ObjectError if it has more than `max_bytes`."""
        url = self.url.of_key(key)
        try:
            with remote_errors(url):
                found = self.store.get(key)
                if (size := found.meta["size"]) > max_bytes:
                    raise ObjectError(f"{url}: {size:,} bytes, expected at most {max_bytes:,}", "other")
                if size > self.limits.slowest * self.limits.request_seconds / 2:  # needs more seconds
                    found = self._of_limits(self.limits.of_transfer(size, is_sent=False)).get(key)
                return Content(found.bytes().to_bytes(), _info(found.meta))
        except ObjectError as e:
            if e.cause != "missing":
                raise
            return Content()

    def chunks(self, key: str, size: int) -> Iterator[bytes]:
        """Yield the content of an object of `size` bytes in pieces of some megabytes."""
        store = self._of_limits(self.limits.of_transfer(size, is_sent=False))
        with remote_errors(self.url.of_key(key)):
            for chunk in store.get(key).stream(min_chunk_size=CHUNK_BYTES):
                yield bytes(chunk)

    def fetch(self, at: Url, listed: Iterable[FileEntry], folder: Path) -> None:
        """Write the objects below `at` into a folder, unless its files have their sizes and digests already.

        Raises ObjectError, "size" or "checksum" if an object has others, OSError."""
        with ThreadPoolExecutor(TRANSFERS) as pool:
            list(pool.map(lambda entry: self._fetch(at / entry.path, folder / entry.path, entry), listed))

    def _fetch(self, url: Url, path: Path, entry: FileEntry) -> None:
        if path.is_file() and path.stat().st_size == entry.size and file_digest(path) == entry.sha256:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        digest, found, half = hashlib.sha256(), 0, path.with_name(f".{path.name}.tmp")
        with half.open("wb") as file:
            for chunk in self.chunks(url.key, entry.size):
                found += len(chunk)
                if found > entry.size:
                    break
                digest.update(chunk)
                file.write(chunk)
        if found == entry.size and digest.hexdigest() == entry.sha256:
            os.replace(half, path)
            files.point("cache.file")
            return
        half.unlink()
        if found != entry.size:
            raise ObjectError(f"{url}: damaged ({found:,} bytes or more, {entry.size:,} expected)", "size")
        raise ObjectError(f"{url}: damaged, or another file (checksum)", "checksum")

    def write(self, key: str, data: bytes, since: Content | None = None) -> None:
        """Replace an object. Raises ObjectError "changed" if it has changed after the read `since`."""
        mode: PutMode = "overwrite"
        if since is not None:
            mode = "create" if since.info is None else {"e_tag": since.info.tag}
            if since.info is not None and since.info.version:
                mode = {"e_tag": since.info.tag, "version": since.info.version}
        store = self._of_limits(self.limits.of_transfer(len(data), is_sent=True))
        with remote_errors(self.url.of_key(key)):
            store.put(key, data, mode=mode, use_multipart=False)

    def upload_all(self, at: Url, paths: Iterable[str], folder: Path) -> None:
        """Write files of a folder as objects below `at`."""
        with ThreadPoolExecutor(TRANSFERS) as pool:
            list(pool.map(lambda path: self.upload((at / path).key, folder / path), paths))

    def upload(self, key: str, path: Path) -> None:
        """Write a file as an object, a large file in parts. No reader sees a part. TRANSFERS files share the link."""
        with remote_errors(self.url.of_key(key)):
            at_once = min(path.stat().st_size, CHUNK_BYTES * PARTS) * TRANSFERS
            store = self._of_limits(self.limits.of_transfer(at_once, is_sent=True))
            store.put(key, path, chunk_size=CHUNK_BYTES, max_concurrency=PARTS)
        files.point("bucket.file")

    def delete(self, keys: Sequence[str]) -> None:
        """Delete objects, if they exist."""
        if keys:
            with remote_errors(self.url.of_key(keys[0])):
                self.store.delete([*keys])

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
        if root.startswith("s3://") and "AWS_CHECKSUM_ALGORITHM" not in os.environ:
            # the server compares the received bytes with the sent SHA-256
            config: S3Config = {"checksum_algorithm": "SHA256"}
            return from_url(root, config=config, client_options=limits.client(), retry_config=limits.retry())
        return make(root, client_options=limits.client(), retry_config=limits.retry())
    except (BaseError, ValueError, TypeError) as e:
        what = f"cannot be addressed ({first_line(e)[:200]})"
        raise ConfigError(f"{root}: {what}; check it and the environment") from None


def _info(found: ObjectMeta) -> ObjectInfo:
    tag = found["e_tag"] or f"{found['last_modified']:%Y-%m-%dT%H:%M:%S.%f}"
    changed = found["last_modified"].timestamp()
    return ObjectInfo(found["path"], found["size"], tag, changed, found["version"] or "")


@contextmanager
def remote_errors(url: Url) -> Iterator[None]:
    """Turn errors of obstore about an address into ObjectErrors of one line."""
    from obstore.exceptions import BaseError

    try:
        yield
    except (BaseError, OSError) as e:
        raise explain(e, url) from None


_NO_BUCKET = re.compile(r"NoSuchBucket|ContainerNotFound|specified bucket does not exist")
_METADATA = re.compile(r"169\.254\.169\.254|/latest/api/token|metadata\.google|/metadata/(identity|instance)")
"""Addresses of the servers of credentials, for an environment without credentials."""
_REFUSED = re.compile(r"status code: 40[13]|lacked the necessary privileges|AccessDenied|InvalidAccessKeyId")
_SILENT = re.compile(
    r"status code: (5\d\d|429)|error sending request|body error|timed out|timeout|connection|dns error"
    r"|after \d+ retries",
    re.I,
)
_MISSING = re.compile(r"status code: 404|NoSuchKey")
_CODE = re.compile(r"<Code>(\w+)</Code>")
_DETAILS = re.compile(r"Error performing [\w ]+ \S+ in [\w.µ]+,?|Debug source:.*|Caused by:.*|<\?xml.*", re.DOTALL)
"""Parts of a message with addresses or repetitions."""
_MAX_REASON = 300


def explain(error: BaseException, url: Url) -> ObjectError:
    """Return an error of obstore or polars about an address in one line, with its cause and a remedy."""
    text = str(error).partition("Debug source:")[0]
    if type(error).__name__ in ("AlreadyExistsError", "PreconditionError"):
        return ObjectError(f"{url}: was changed by another process meanwhile", "changed")
    if type(error).__name__ == "InvalidPathError" and (key := re.search(r'Path "(.*?)"', text, re.DOTALL)):
        what = "has an empty part, '.', '..' or a control character"
        return ObjectError(f"{url.root}: the key {key[1]!r} {what}, and cannot be read; delete or rename it", "foreign")
    if _NO_BUCKET.search(text):
        what = f"no such bucket ({url.bucket}); check its name, and the endpoint in the environment"
        return ObjectError(f"{url}: {what}", "bucket")
    if url.is_object_store and _METADATA.search(text):
        names = {"s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY", "gs": "GOOGLE_APPLICATION_CREDENTIALS"}
        wanted = names.get(url.scheme, "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY")
        return ObjectError(f"{url}: no credentials found; set {wanted} in the environment", "refused")
    if _REFUSED.search(text) or isinstance(error, PermissionError):
        why = f" ({found[1]})" if (found := _CODE.search(text)) else ""
        what = "check the credentials in the environment, and their rights"
        what = what if url.is_object_store else "HTTP is read without a login"
        return ObjectError(f"{url}: access is refused{why}; {what}", "refused")
    if isinstance(error, FileNotFoundError) or _MISSING.search(text):
        return ObjectError(f"{url}: no such file", "missing")
    reason = re.sub(r"\s+", " ", _DETAILS.sub("", text)).strip(" ()")[:_MAX_REASON]
    if _SILENT.search(text):
        what = f"the server does not answer as expected ({reason})"
        hint = "check the network and the endpoint in the environment, or call again"
        return ObjectError(f"{url}: {what}; {hint}", "unreachable")
    return ObjectError(f"{url}: cannot be read or written ({reason})", "other")
