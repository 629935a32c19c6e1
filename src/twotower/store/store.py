"""A store of published models: a bundle for each version, and a file that names the current one.

bundles/<id>/    a bundle (bundle.py): the publisher's files and the manifest
CURRENT          the id of the served bundle, replaced atomically
HISTORY.jsonl    a line for each publish, refusal, rollback, removal and recovery
LOCK             locked by the process that changes the store, with the name of that process

An id is a time, later than those of all ids before it, and a digest of the manifest. The module does not depend on the
content of bundles: callables write and probe it. Readers need no lock.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from twotower import files
from twotower.errors import BundleError, ConfigError, RunError
from twotower.escaping import python_literal
from twotower.files import layout, locks
from twotower.files.readers import parse_json, read_regular
from twotower.store.bundle import Bundle, seal
from twotower.store.manifest import BundleFacts, RecallCheck, problem

_ID = re.compile(r"\d{8}T\d{6}Z-[0-9a-f]{6}")
_STAMP = "%Y%m%dT%H%M%SZ"
_PROGRAMMING_ERRORS = (
    AssertionError,
    AttributeError,
    IndexError,
    KeyError,
    NameError,
    TypeError,
)  # errors of the program, not of input or machine
_CURRENT_MAX_BYTES = 1000
_HISTORY_MAX_BYTES = 64 << 20  # some 200,000 lines
_CURRENT_ACTIONS = {"publish", "rollback", "recover"}


@dataclass(frozen=True)
class BundleInfo:
    """Entry in the list of bundles. `damaged` is the reason of an error, without a check of checksums; None if intact."""

    id: str
    created: str | None
    size: int
    recall_check: RecallCheck | None
    current: bool
    damaged: str | None


class Store:
    """Bundles in a folder. Raises BundleError if the folder is not a store."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._bundles = self.path / layout.BUNDLES
        if not self._bundles.is_dir() or not any((self.path / name).is_file() for name in layout.STORE_FILES):
            raise BundleError(f"{path}: not a store; `publish(run, store={python_literal(path)})` creates one", "store")

    @classmethod
    def create(cls, path: Path | str) -> Store:
        """Open the store in `path`, or create it in a new or empty folder. Raises BundleError for any other folder."""
        path = Path(path)
        with suppress(BundleError):
            return cls(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            foreign = sorted(
                p.name for p in path.iterdir() if not p.name.startswith(".") and p.name not in layout.STORE_FILES
            )
            if foreign:
                raise BundleError(f"{path}: not empty and not a store (it holds {foreign[0]}); choose another", "store")
            (path / layout.BUNDLES).mkdir(exist_ok=True)
            (path / layout.STORE_LOCK).touch()
            files.sync(path)
            files.sync(path.absolute().parent)
        except OSError as e:
            raise BundleError(f"{path}: cannot create a store ({e.strerror})", "store") from e
        return cls(path)

    def current(self) -> Bundle:
        """Return the current bundle, verified. Raises BundleError that names the available bundles and the command."""
        name = self._pointer()
        while True:
            try:
                return self.open(name)
            except BundleError as e:
                tried, name = name, self._pointer()
                if name != tried:  # it was replaced between the two reads
                    continue
                advice = f"{self._available()}; `rollback(store={python_literal(self.path)})` returns to an earlier one"
                raise BundleError(f"{e}; {advice}" if name else str(e), e.reason) from e

    def current_stamp(self) -> tuple[str, int]:
        """Return the content and the modification time (ns) of CURRENT, to detect changes. Raises BundleError."""
        name = self._pointer()
        try:
            return name, (self.path / layout.CURRENT).stat().st_mtime_ns
        except OSError:
            return name, 0

    def touch_current(self) -> None:
        """Update the modification time of CURRENT, so that readers load again. Raises BundleError if no bundle is current."""
        try:
            os.utime(self.path / layout.CURRENT)
        except OSError as e:
            raise BundleError(f"{self.path / 'CURRENT'}: cannot be touched ({e.strerror})", "unreadable") from e

    def recent_ids(self, n: int) -> list[str]:
        """Return the last `n` current bundles of the history, the latest first."""
        changes = (line["bundle"] for line in reversed(self.history()) if line.get("action") in _CURRENT_ACTIONS)
        return list(dict.fromkeys(name for name in changes if name))[:n]

    def bundles(self) -> list[BundleInfo]:
        """Return all bundles, the oldest first."""
        current = self._pointer()

        def line(name: str) -> BundleInfo:
            try:
                bundle = Bundle.open(self._bundles / name, checksums=False)
            except BundleError as e:
                return BundleInfo(name, None, 0, None, name == current, e.reason)
            manifest = bundle.manifest
            return BundleInfo(name, manifest.created, bundle.size, manifest.recall_check, name == current, None)

        return [line(name) for name in self._ids()]

    def history(self) -> list[dict[str, Any]]:
        """Return the entries of HISTORY.jsonl, the oldest first, without invalid lines."""
        lines = []
        with suppress(FileNotFoundError):
            for text in self._read(layout.HISTORY, _HISTORY_MAX_BYTES).decode(errors="replace").split("\n"):
                with suppress(ValueError, RecursionError):
                    line = parse_json(text)
                    if isinstance(line, dict) and all(_is_ascii_text(line.get(name)) for name in ("bundle", "action")):
                        lines.append(line)
        return lines

    def publish(
        self,
        write: Callable[[Path], BundleFacts],
        probe: Callable[[Bundle], None] | None = None,
        *,
        reason: str = "",
        force: bool = False,
    ) -> Bundle:
        """Create a bundle of the files that `write` puts into a folder, verify it, probe it, and make it current.

        `write` returns the facts of the manifest. `force` publishes a recall below its threshold. On any failure CURRENT is
        unchanged and no file remains; raises BundleError for errors of input or machine, while interrupts and errors of
        the program pass through.
        """
        with self._locked("publish") as stamp:
            old, stage = self._pointer(), "write"
            temporary = folder = self._bundles / f".tmp-{stamp}"
            try:
                temporary.mkdir()
                facts = write(temporary)
                below = facts.recall_check.shortfall
                if below and not force:
                    self._log("refused", "", old, below, facts.recall_check)
                    raise BundleError(f"{below}; train or search better, or publish with `force=True`", "recall")
                created = datetime.now(UTC).isoformat(timespec="seconds")
                name = seal(temporary, stamp, facts, created, bool(below))
                folder = self._bundles / name
                os.replace(temporary, folder)
                files.point("store.renamed")
                files.sync(self._bundles)
                files.point("store.synced")
                bundle = Bundle.open(folder)
                stage = "probe"
                if probe is not None:
                    probe(bundle)
                stage = "write"
                files.write(self.path / layout.CURRENT, f"{name}\n", 0o644)
            except BaseException as e:
                if self._pointer() == folder.name:  # it is current already: only the sync of the folder failed
                    raise
                shutil.rmtree(temporary, ignore_errors=True)
                shutil.rmtree(folder, ignore_errors=True)
                if (
                    not isinstance(e, Exception)
                    or isinstance(e, _PROGRAMMING_ERRORS)
                    or getattr(e, "exit_code", 2) != 2
                ):
                    raise
                what = problem(e) if isinstance(e, ValidationError) else str(e)
                if isinstance(e, OSError):
                    what = f"{e.filename}: {e.strerror}" if e.filename else str(e.strerror)
                raise BundleError(
                    f"{self.path}: not published, CURRENT stays {old or 'unset'}: {what or type(e).__name__}",
                    getattr(e, "reason", stage),
                ) from e
            self._log("publish", name, old, reason, facts.recall_check, forced=bool(below))
            return bundle

    def rollback(self, to: str | None = None, *, reason: str = "") -> Bundle:
        """Make bundle `to`, by default the previously current one, current again. Raises BundleError.

        Another rollback goes further back; the bundle rolled back from is reached by its id only.
        """
        with self._locked("rollback"):
            old, name = self._pointer(), to or self._previous()
            if name is None or name not in self._ids():
                what = f"no bundle {name}" if name else "no bundle was current before"
                raise BundleError(f"{self.path}: {what}; {self._available()}; choose one with `to`", "missing")
            bundle = self.open(name)
            files.write(self.path / layout.CURRENT, f"{name}\n", 0o644)
            self._log("rollback", name, old, reason, bundle.manifest.recall_check, bundle.manifest.forced)
            return bundle

    def gc(self, keep: int = 2, also: Callable[[], None] = lambda: None) -> list[str]:
        """Remove old bundles and the remains of killed publishers; return the removed ids.

        Kept are the `keep` newest (without strays), the current bundle, the one that a rollback returns to, and those with
        a lease. A reader without a lease keeps its open files. `also` is called at the end, under the lock. Raises
        ConfigError if `keep` is below 2.
        """
        if keep < 2:
            raise ConfigError(f"keep is {keep}, expected at least 2: the current bundle and one for a rollback")
        with self._locked("gc"):
            strays = self._strays()
            ids = sorted(self._ids(), key=lambda name: (name not in strays, name))
            current = self._pointer()
            kept = {current, self._previous(), *ids[-keep:]}
            removed = []
            for name in ids:
                if name not in kept and self._remove(name):
                    self._log("gc", name, current, f"keep {keep}")
                    removed.append(name)
            also()
            return removed

    def _ids(self) -> list[str]:
        return sorted(
            p.name for p in self._bundles.iterdir() if _ID.fullmatch(p.name) and p.is_dir() and not p.is_symlink()
        )

    def _available(self) -> str:
        return f"available: {', '.join(self._ids()) or 'none'}"

    def _pointer(self) -> str:
        """Return the content of CURRENT, an empty string if the file does not exist."""
        try:
            return self._read(layout.CURRENT, _CURRENT_MAX_BYTES).decode(errors="replace").strip()
        except FileNotFoundError:
            return ""

    def _read(self, name: str, max_bytes: int) -> bytes:
        """Return a file of the store. Raises FileNotFoundError, BundleError for a file that is irregular or too large."""
        try:
            return read_regular(self.path / name, max_bytes)
        except FileNotFoundError:
            raise
        except OSError as e:
            raise BundleError(
                f"{self.path / name}: cannot be read ({e.strerror}); restore it, or move it away", "unreadable"
            ) from e

    def open(self, name: str) -> Bundle:
        """Return a bundle by id, verified. Raises BundleError."""
        if not name:
            raise BundleError(
                f"{self.path}: no bundle is published yet; `publish(run, store={python_literal(self.path)})` publishes one",
                "missing",
            )
        if not _ID.fullmatch(name):
            raise BundleError(f"{self.path}: {name[:80]!r} is not the id of a bundle", "current")
        return Bundle.open(self._bundles / name)

    def _previous(self) -> str | None:
        """Return the latest existing bundle that was current before, without those rolled back from."""
        path: list[str] = []
        for name in [
            *(line["bundle"] for line in self.history() if line.get("action") in _CURRENT_ACTIONS),
            self._pointer(),
        ]:
            if name in path:
                del path[path.index(name) + 1 :]
            else:
                path.append(name)
        ids = self._ids()
        return next((name for name in reversed(path[:-1]) if name in ids), None)

    def _log(
        self,
        action: str,
        name: str,
        old: str,
        reason: str,
        recall_check: RecallCheck | None = None,
        forced: bool = False,
    ) -> None:
        line = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "action": action, "bundle": name, "from": old,
                "reason": reason, "recall_check": recall_check.model_dump() if recall_check else None, "forced": forced}  # fmt: skip
        path = self.path / layout.HISTORY
        try:
            before = b""
            with suppress(FileNotFoundError):
                before = self._read(path.name, _HISTORY_MAX_BYTES)
            text = json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n"
            # Replaced atomically: a kill or a full disk never leaves half a line.
            files.write(path, before + text.encode(errors="backslashreplace"), 0o644)
        except RunError as e:
            raise RunError(f"{e}; CURRENT is {self._pointer() or 'unset'}") from e

    def _remove(self, name: str) -> bool:
        """Remove a bundle and return True, unless a reader has a lease on it."""
        folder, removed = self._bundles / name, self._bundles / f".tmp-{name}"
        with ExitStack() as held:
            with suppress(FileNotFoundError, IsADirectoryError):  # a folder without a manifest has no lease
                handle = os.open(folder / layout.MANIFEST, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW)
                held.callback(os.close, handle)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return False
            os.replace(folder, removed)  # an id never names half a bundle
        files.point("store.removed")
        files.sync(self._bundles)
        files.point("store.synced")
        shutil.rmtree(removed, ignore_errors=True)
        files.point("store.cleared")
        return True

    @contextmanager
    def _locked(self, action: str) -> Iterator[str]:
        """Hold the store's lock within the block, after recovery from a killed process. Yields the time of the next id.

        Kernel locks are released when a process dies. A process that ends normally empties LOCK, so text in a free LOCK
        means that its holder was killed.
        """
        try:
            with locks.lock(self.path / layout.STORE_LOCK) as lock:
                left = lock.killed_holder
                self._recover(f"{left.action} {left.process} died" if left else "", left.detail if left else "")
                lock.clear()
                stamp = self._next_stamp() if action == "publish" else "-"
                lock.write_holder(action, stamp)
                files.point("store.locked")
                yield stamp
        except locks.LockHeld as e:
            raise BundleError(f"{self.path}: {e}", "locked") from None
        except OSError as e:
            raise BundleError(f"{e.filename or self.path}: cannot be changed ({e.strerror})", "write") from e

    def _recover(self, died: str, stamp: str) -> None:
        """Remove the remains of a killed process, among them a bundle that never became current, and log the recovery."""
        current, history = self._pointer(), self.history()
        known = {current, *(line["bundle"] for line in history)}
        never_current = [name for name in self._ids() if name[:16] == stamp and name not in known]
        for path in [*self._bundles.glob(".tmp-*"), *(self._bundles / name for name in never_current)]:
            shutil.rmtree(path, ignore_errors=True)
        for name in (layout.CURRENT, layout.HISTORY, layout.COLLECTIONS):
            for file in self.path.glob(f".{name}.*.tmp"):
                file.unlink(missing_ok=True)
        logged = next((line["bundle"] for line in reversed(history) if line.get("action") in _CURRENT_ACTIONS), "")
        if died or logged != current:
            self._log("recover", current, logged, died or "CURRENT was changed without an entry in HISTORY.jsonl")

    def _next_stamp(self) -> str:
        """Return the present time, or a second after the newest bundle of all times if that is later."""
        names = {*self._ids(), *self._served()} - self._strays()
        now = datetime.now(UTC)
        return max([now, *filter(None, map(_next_second, names))]).strftime(_STAMP)

    def _served(self) -> set[str]:
        """Return the bundles that are or were current, according to the history."""
        return {self._pointer(), *(line["bundle"] for line in self.history() if line["action"] in _CURRENT_ACTIONS)}

    def _strays(self) -> set[str]:
        """Return ids with an invalid time, or a future one that never was current: folders put there by hand.

        They do not count as new bundles.
        """
        soon, served = datetime.now(UTC) + timedelta(days=1), self._served()
        times = {name: _next_second(name) for name in self._ids()}
        return {name for name, time in times.items() if time is None or (time > soon and name not in served)}


def _next_second(name: str) -> datetime | None:
    """Return a second after the time of an id, None for an invalid time or the last possible one."""
    try:
        return datetime.strptime(name[:16], _STAMP).replace(tzinfo=UTC) + timedelta(seconds=1)
    except (ValueError, OverflowError):
        return None


def _is_ascii_text(value: Any) -> bool:
    return isinstance(value, str) and value.isascii()
