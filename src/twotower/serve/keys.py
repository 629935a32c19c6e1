"""API keys: a file of names, scopes and SHA-256 digests; the keys themselves are nowhere."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twotower.errors import ConfigError

PREFIX = "tt_"


@dataclass(frozen=True)
class Key:
    """Who may ask, and whether they may also roll back."""

    name: str
    digest: bytes
    admin: bool


class Keys:
    """The keys of a file, read again when it changes."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError for a file that holds no key or something else."""
        self.path = path
        self._seen = self._stamp()
        self._keys = read(path)

    def find(self, token: str) -> Key | None:
        """Whose key it is. Every key is compared, in a time that does not depend on where they differ."""
        digest = hashlib.sha256(token.encode(errors="replace")).digest()
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found

    def refresh(self) -> bool:
        """Whether the file has changed and was read; raises ConfigError, and keeps the old keys, if it cannot be used."""
        stamp = self._stamp()
        if stamp == self._seen:
            return False
        self._seen = stamp
        self._keys = read(self.path)
        return True

    def _stamp(self) -> tuple[int, ...]:
        try:
            info = self.path.stat()
        except OSError as e:
            raise ConfigError(f"{self.path}: no keys can be read ({e.strerror})") from None
        return info.st_ino, info.st_mtime_ns, info.st_size


def read(path: Path) -> list[Key]:
    """Raises ConfigError."""
    try:
        told: Any = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as e:
        raise ConfigError(f"{path}: no file of keys ({e}); `twotower key NAME >> {path}` makes one") from None
    entries, keys = told.get("keys"), []
    for entry in entries if isinstance(entries, list) and entries else [{}]:
        try:
            name, digest, scope = entry["name"], bytes.fromhex(entry["sha256"]), entry.get("scope", "ask")
            if set(told) != {"keys"} or set(entry) - {"name", "sha256", "scope"}:
                raise ValueError
            if not isinstance(name, str) or len(digest) != 32 or scope not in ("ask", "admin"):
                raise ValueError
        except (KeyError, TypeError, ValueError, AttributeError):
            raise ConfigError(
                f'{path}: expected [[keys]] with name = "…", sha256 = "64 hex digits" and scope = "ask" or "admin"; '
                "`twotower key NAME` prints one"
            ) from None
        keys.append(Key(name, digest, scope == "admin"))
    return keys


def make(name: str, admin: bool) -> tuple[str, str]:
    """A new key, and the lines of the file that let it in."""
    if not name.isprintable() or not name or '"' in name or "\\" in name:
        raise ConfigError(f"a key's name is {name!r}, expected printable text without quotes")
    key = PREFIX + secrets.token_urlsafe(32)
    digest = hashlib.sha256(key.encode()).hexdigest()
    scope = "admin" if admin else "ask"
    return key, f'[[keys]]\nname = "{name}"\nsha256 = "{digest}"\nscope = "{scope}"\n'
