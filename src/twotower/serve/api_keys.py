"""API keys: a file of names, scopes and SHA-256 digests; the keys themselves are nowhere."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import secrets
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twotower.bundle import BundleError
from twotower.errors import ConfigError
from twotower.escaping import command
from twotower.files import read_regular
from twotower.serve.file_reader import FileReader

log = logging.getLogger("twotower.api_keys")

KEY_PREFIX = "tt_"
POLL_SECONDS = 2.0
"""Seconds between two looks at the file."""
READ_TIMEOUT = 5.0
"""Seconds that a look may take: a file that cannot be read for so long lets nobody in."""
MAX_FILE_BYTES = 1 << 20
"""Bytes of a file of keys: some six thousand."""


@dataclass(frozen=True)
class ApiKey:
    """Who may ask, and whether they may also roll back."""

    name: str
    digest: bytes
    admin: bool


class ApiKeys:
    """The keys of a file, read again at every look. While the file cannot be used, nobody is let in."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.why = ""
        """The reason why nobody is let in; empty while the file can be used."""
        self._keys: list[ApiKey] = []
        self._reader = FileReader("keys")
        self.take(self.look())

    def find(self, token: str) -> ApiKey | None:
        """Whose key it is. Every key is compared, in a time that does not depend on where they differ."""
        digest = hashlib.sha256(token.encode(errors="replace")).digest()
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found

    def look(self) -> tuple[list[ApiKey], str]:
        """The keys of the file, and why there are none. Old keys do not outlive a file that is gone, empty or broken: that
        is how all of them are taken away in a hurry."""
        try:
            return read_keys(self.path), ""
        except ConfigError as e:
            return [], str(e)

    def take(self, found: tuple[list[ApiKey], str]) -> bool:
        """Let in whom a look has found; whether that is anybody else than before."""
        before, (self._keys, self.why) = (self._keys, self.why), found
        return before != found

    @property
    def busy(self) -> bool:
        """True while a thread reads the file, or hangs there."""
        return self._reader.busy

    async def follow(self, failed: Callable[[], None]) -> None:
        """Look every so often, for ever; `failed` is told of every look that finds no keys."""
        changed = bool(self.why)
        while True:
            if self.why:
                failed()
            if changed and self.why:
                log.error("the keys cannot be used, nobody is let in", extra={"fields": {"detail": self.why}})
            elif changed:
                log.info("keys were read again")
            await asyncio.sleep(POLL_SECONDS)
            try:
                found = await self._reader.run(self.look, READ_TIMEOUT)
            except BundleError:
                found = [], f"{self.path} does not answer"
            changed = self.take(found)


def read_keys(path: Path) -> list[ApiKey]:
    """Raises ConfigError for what cannot be read, holds no key, or holds something else."""
    try:
        told: Any = tomllib.loads(read_regular(path.resolve(), MAX_FILE_BYTES).decode())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as e:
        why = e.strerror if isinstance(e, OSError) else e
        raise ConfigError(
            f"{path}: no keys can be read ({why}); `{command('key', 'NAME')} >> {command(path, program='').strip()}` makes one"
        ) from None
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
        keys.append(ApiKey(name, digest, scope == "admin"))
    return keys


def make_key(name: str, admin: bool) -> tuple[str, str]:
    """A new key, and the lines of the file that let it in."""
    if not name.isprintable() or not name or '"' in name or "\\" in name:
        raise ConfigError(f"a key's name is {name!r}, expected printable text without quotes")
    key = KEY_PREFIX + secrets.token_urlsafe(32)
    digest = hashlib.sha256(key.encode()).hexdigest()
    scope = "admin" if admin else "ask"
    return key, f'[[keys]]\nname = "{name}"\nsha256 = "{digest}"\nscope = "{scope}"\n'
