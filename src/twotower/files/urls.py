"""Addresses of files in object stores and at HTTP servers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePath, PurePosixPath
from urllib.parse import unquote

from twotower.errors import ConfigError

OBJECT_STORES = ("s3", "gs", "abfs", "abfss", "az")
"""Schemes of object stores: S3, Google Cloud Storage, Azure."""
SCHEMES = (*OBJECT_STORES, "https", "http")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_OF_PATH = re.compile(rf"({'|'.join(SCHEMES)}):/(?!/)")
"""Beginning of the text of a `Path` made of a URL: one slash remains."""


def is_url(source: PurePath | str) -> bool:
    """Return True for the text of a URL with any scheme, and for a `Path` made of a URL with an allowed scheme."""
    return _URL.match(_text(source)) is not None


@dataclass(frozen=True, order=True)
class Url:
    """A checked address: scheme, bucket (Azure: the container; HTTP: host and port), and the parts of the key."""

    scheme: str
    bucket: str
    parts: tuple[str, ...]

    @classmethod
    def parse(cls, source: PurePath | str) -> Url:
        """Check an address. Raises ConfigError for another scheme, no bucket, a secret, or an unusual key."""
        text = _text(source)
        found = _URL.match(text)
        scheme, rest = (found[1].lower(), found[2]) if found else ("", text)
        if scheme not in SCHEMES:
            raise ConfigError(
                f"{text}: '{scheme}' is no scheme of an address that can be read; allowed are {', '.join(SCHEMES)}"
            )
        bucket, _, key = rest.partition("/")
        login, at, _ = bucket.rpartition("@")
        if at and (":" in login or scheme not in OBJECT_STORES):
            shown = f"{scheme}://…@{bucket.rpartition('@')[2]}"
            raise ConfigError(f"{shown}: holds a login, which a run would keep; set credentials in the environment")
        web = scheme not in OBJECT_STORES
        if web and ("?" in rest or "#" in rest):
            shown = re.split(r"[?#]", text)[0]
            raise ConfigError(
                f"{shown}: has a query after the path, which may be a password that a run would keep; name the object "
                "store (s3://…) with credentials in the environment, or copy the file"
            )
        if not bucket or not text.isprintable():
            what = "server" if web else "bucket"
            raise ConfigError(f"{text!r}: names no {what}; expected {scheme}://{what.upper()}/PATH")
        parts = tuple(key.rstrip("/").split("/")) if key.rstrip("/") else ()
        if any(part in ("", ".", "..") for part in parts):
            raise ConfigError(f"{text}: has an empty part, '.' or '..' in its path; write the path without it")
        return cls(scheme, bucket, parts)

    @property
    def is_object_store(self) -> bool:
        """True for an object store, whose keys can be listed; False for HTTP."""
        return self.scheme in OBJECT_STORES

    @property
    def root(self) -> str:
        """The address of the bucket or server."""
        return f"{self.scheme}://{self.bucket}"

    @property
    def key(self) -> str:
        """The key in the bucket. HTTP: the path with %-escapes decoded."""
        key = "/".join(self.parts)
        return key if self.is_object_store else unquote(key)

    @property
    def path(self) -> PurePosixPath:
        """The bucket and the key as a path."""
        return PurePosixPath(self.bucket, *self.parts)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def parent(self) -> Url:
        return Url(self.scheme, self.bucket, self.parts[:-1])

    def __truediv__(self, key: str) -> Url:
        """Return the address of a key below this one."""
        return Url(self.scheme, self.bucket, (*self.parts, *key.split("/")))

    def of_key(self, key: str) -> Url:
        """Return the address of another key in the bucket."""
        return Url(self.scheme, self.bucket, tuple(key.split("/")))

    def __str__(self) -> str:
        return "/".join([self.root, *self.parts])


def _text(source: PurePath | str) -> str:
    return _OF_PATH.sub(r"\1://", source.as_posix()) if isinstance(source, PurePath) else source
