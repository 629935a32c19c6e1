"""API keys: a file of names, scopes and SHA-256 digests. The keys themselves are not stored."""

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

from twotower.errors import BundleError, ConfigError
from twotower.files.readers import read_regular
from twotower.serve.file_reader import FileReader

log = logging.getLogger("twotower.api_keys")

KEY_PREFIX = "tt_"
MAX_FILE_BYTES = 1 << 20
"""Largest key file in bytes: about 6,000 keys."""


@dataclass(frozen=True)
class ApiKey:
    """A key by its name and SHA-256 digest; `admin` keys may also roll back and reload."""

    name: str
    digest: bytes
    admin: bool


class ApiKeys:
    """The keys of a file, read again every `poll` seconds. While the file cannot be used, no key is valid.

    A read that takes longer than `read_timeout` seconds counts as a file that cannot be used."""

    def __init__(
        self,
        path: Path,
        poll: float = 2.0,
        read_timeout: float = 5.0,
        read: Callable[[Path], list[ApiKey]] | None = None,
    ) -> None:
        self.path = path
        self.error = ""
        """Reason why no key is valid; empty while the file can be used."""
        self._poll, self._read_timeout, self._read = poll, read_timeout, read or read_keys
        self._keys: list[ApiKey] = []
        self._reader = FileReader("keys")
        self.apply(self.read())

    def find(self, token: str) -> ApiKey | None:
        """Return the key with this secret. Compares the digests of all keys, each in constant time."""
        digest = hashlib.sha256(token.encode(errors="replace")).digest()
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found

    def read(self) -> tuple[list[ApiKey], str]:
        """Return the keys of the file, and the reason if there are none, else "".

        A missing, empty or damaged file revokes all keys."""
        try:
            return self._read(self.path), ""
        except ConfigError as e:
            return [], str(e)

    def apply(self, found: tuple[list[ApiKey], str]) -> bool:
        """Use the result of `read` from now on; return whether it differs from the previous one."""
        before, (self._keys, self.error) = (self._keys, self.error), found
        return before != found

    @property
    def busy(self) -> bool:
        """True while a thread reads the file, or hangs there."""
        return self._reader.busy

    async def watch(self, on_failure: Callable[[], None]) -> None:
        """Read the file again and again; call `on_failure` for every read that finds no usable keys."""
        changed = bool(self.error)
        while True:
            if self.error:
                on_failure()
            if changed and self.error:
                log.error("key file cannot be used, every key is refused", extra={"fields": {"detail": self.error}})
            elif changed:
                log.info("key file was read again")
            await asyncio.sleep(self._poll)
            try:
                found = await self._reader.run(self.read, self._read_timeout)
            except BundleError:
                found = [], f"{self.path} does not answer"
            changed = self.apply(found)


def read_keys(path: Path) -> list[ApiKey]:
    """Return the keys of a file. Raises ConfigError if it cannot be read, holds no key, or holds anything else."""
    try:
        content = tomllib.loads(read_regular(path.resolve(), MAX_FILE_BYTES).decode("utf-8-sig"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as e:
        why = e.strerror if isinstance(e, OSError) else e
        raise ConfigError(f"{path}: key file cannot be read ({why}); `make_key(name)` gives the lines of one") from None
    entries, keys = content.get("keys"), []
    for entry in entries if isinstance(entries, list) and entries else [{}]:
        try:
            name, digest, scope = entry["name"], bytes.fromhex(entry["sha256"]), entry.get("scope", "ask")
            if set(content) != {"keys"} or set(entry) - {"name", "sha256", "scope"}:
                raise ValueError
            if not isinstance(name, str) or len(digest) != 32 or scope not in ("ask", "admin"):
                raise ValueError
        except (KeyError, TypeError, ValueError, AttributeError):
            raise ConfigError(
                f'{path}: expected [[keys]] with name = "…", sha256 = "64 hex digits" and scope = "ask" or "admin"; '
                "`make_key(name)` gives one"
            ) from None
        keys.append(ApiKey(name, digest, scope == "admin"))
    return keys


def make_key(name: str, admin: bool) -> tuple[str, str]:
    """Return a new key, and its lines for a key file. Raises ConfigError for an invalid name."""
    if not name.isprintable() or not name or '"' in name or "\\" in name:
        raise ConfigError(f"a key's name is {name!r}, expected printable text without quotes")
    key = KEY_PREFIX + secrets.token_urlsafe(32)
    digest = hashlib.sha256(key.encode()).hexdigest()
    scope = "admin" if admin else "ask"
    return key, f'[[keys]]\nname = "{name}"\nsha256 = "{digest}"\nscope = "{scope}"\n'
