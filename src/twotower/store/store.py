"""A store of published models: a bundle for each version, and a file that names the current one.

bundles/<id>/    a bundle (bundle.py): the publisher's files and the manifest
CURRENT          the id of the served bundle (current.py)
HISTORY.jsonl    the changes of the store (history.py)
LOCK             locked by the process that changes the store, with the name of that process

The module does not depend on the content of bundles: callables write and probe it. Readers need no lock.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from twotower import files
from twotower.errors import BundleError, ConfigError, RunError
from twotower.escaping import python_literal
from twotower.files import layout, locks
from twotower.store.bundle import Bundle, is_bundle_id, next_stamp, remove_bundle, seal, stamp_of, stray_ids
from twotower.store.current import CurrentPointer
from twotower.store.history import Action, History, previous_id
from twotower.store.manifest import BundleFacts, JsonObject, RecallCheck, problem

_PROGRAMMING_ERRORS = (AssertionError, AttributeError, IndexError, KeyError, NameError, TypeError)
"""Errors of the program, not of input or machine."""


@dataclass(frozen=True)
class BundleInfo:
    """Entry in the list of bundles. `damaged` is the reason of an error, without a check of checksums; None if intact."""

    id: str
    created: str | None
    size: int
    recall_check: RecallCheck | None
    current: bool
    damaged: str | None
    context: tuple[str, ...] = ()
    """Columns of the context that a request may give; none of a damaged bundle, or one of kinds that are not imported."""


class Store:
    """Bundles in a folder. Raises BundleError if the folder is not a store."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._bundles = self.path / layout.BUNDLES
        self._current, self._history = CurrentPointer(self.path), History(self.path)
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
            names = (p.name for p in path.iterdir())
            foreign = sorted(n for n in names if not n.startswith(".") and n not in layout.STORE_FILES)
            if foreign:
                raise BundleError(f"{path}: not empty and not a store (it holds {foreign[0]}); choose another", "store")
            (path / layout.BUNDLES).mkdir(exist_ok=True)
            (path / layout.STORE_LOCK).touch()
            files.sync(path)
            files.sync(path.absolute().parent)
        except OSError as e:
            raise BundleError(f"{path}: cannot create a store ({e.strerror})", "store") from e
        return cls(path)

    # ---- reading

    def current(self) -> Bundle:
        """Return the current bundle, verified. Raises BundleError that names the available bundles and the command."""
        name = self._current.read()
        while True:
            try:
                return self.open(name)
            except BundleError as e:
                tried, name = name, self._current.read()
                if name != tried:  # it was replaced between the two reads
                    continue
                advice = f"{self._available()}; `rollback(store={python_literal(self.path)})` returns to an earlier one"
                raise BundleError(f"{e}; {advice}" if name else str(e), e.reason) from e

    def current_stamp(self) -> tuple[str, int]:
        """Return the content and the modification time (ns) of CURRENT, to detect changes. Raises BundleError."""
        return self._current.stamp()

    def touch_current(self) -> None:
        """Update the modification time of CURRENT, so that readers load again. Raises BundleError if no bundle is current."""
        self._current.touch()

    def open(self, name: str) -> Bundle:
        """Return a bundle by id, verified. Raises BundleError."""
        if not name:
            raise BundleError(
                f"{self.path}: no bundle is published yet; `publish(run, store={python_literal(self.path)})` publishes one",
                "missing",
            )
        if not is_bundle_id(name):
            raise BundleError(f"{self.path}: {name[:80]!r} is not the id of a bundle", "current")
        return Bundle.open(self._bundles / name)

    def bundles(self) -> list[BundleInfo]:
        """Return all bundles, the oldest first."""
        current = self._current.read()

        def line(name: str) -> BundleInfo:
            try:
                bundle = Bundle.open(self._bundles / name, checksums=False)
            except BundleError as e:
                return BundleInfo(name, None, 0, None, name == current, e.reason)
            manifest, context = bundle.manifest, tuple[str, ...]()
            with suppress(BundleError):
                context = tuple(manifest.read_sections()[0].request_context())
            return BundleInfo(
                name, manifest.created, bundle.size, manifest.recall_check, name == current, None, context
            )

        return [line(name) for name in self._ids()]

    def history(self) -> list[JsonObject]:
        """Return the lines of the history, the oldest first, without invalid ones."""
        return self._history.lines()

    def recent_ids(self, n: int) -> list[str]:
        """Return the last `n` current bundles of the history, the latest first."""
        return list(dict.fromkeys(name for name in reversed(self._history.current_ids()) if name))[:n]

    def _ids(self) -> list[str]:
        found = (p for p in self._bundles.iterdir() if is_bundle_id(p.name))
        return sorted(p.name for p in found if p.is_dir() and not p.is_symlink())

    def _available(self) -> str:
        return f"available: {', '.join(self._ids()) or 'none'}"

    def _previous(self) -> str | None:
        """Return the bundle that a rollback returns to."""
        return previous_id([*self._history.current_ids(), self._current.read()], self._ids())

    # ---- changing

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
            old, stage = self._current.read(), "write"
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
                self._current.write(name)
            except BaseException as e:
                if self._current.read() == folder.name:  # it is current already: only the sync of the folder failed
                    raise
                shutil.rmtree(temporary, ignore_errors=True)
                shutil.rmtree(folder, ignore_errors=True)
                if _passes_through(e):
                    raise
                message = f"{self.path}: not published, CURRENT stays {old or 'unset'}: {_message(e)}"
                raise BundleError(message, _reason(e, stage)) from e
            self._log("publish", name, old, reason, facts.recall_check, forced=bool(below))
            return bundle

    def rollback(self, to: str | None = None, *, reason: str = "") -> Bundle:
        """Make bundle `to`, by default the previously current one, current again. Raises BundleError.

        Another rollback goes further back; the bundle rolled back from is reached by its id only.
        """
        with self._locked("rollback"):
            old, name = self._current.read(), to or self._previous()
            if name is None or name not in self._ids():
                what = f"no bundle {name}" if name else "no bundle was current before"
                raise BundleError(f"{self.path}: {what}; {self._available()}; choose one with `to`", "missing")
            bundle = self.open(name)
            self._current.write(name)
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
            current = self._current.read()
            kept = {current, self._previous(), *ids[-keep:]}
            removed = []
            for name in ids:
                if name not in kept and remove_bundle(self._bundles / name):
                    self._log("gc", name, current, f"keep {keep}")
                    removed.append(name)
            also()
            return removed

    def _log(
        self,
        action: Action,
        name: str,
        old: str,
        reason: str,
        recall_check: RecallCheck | None = None,
        forced: bool = False,
    ) -> None:
        try:
            self._history.append(action, name, old, reason, recall_check, forced)
        except RunError as e:
            raise RunError(f"{e}; CURRENT is {self._current.read() or 'unset'}") from e

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
                stamp = "-"
                if action == "publish":
                    stamp = next_stamp({*self._ids(), *self._served()} - self._strays())
                lock.write_holder(action, stamp)
                files.point("store.locked")
                yield stamp
        except locks.LockHeld as e:
            raise BundleError(f"{self.path}: {e}", "locked") from None
        except OSError as e:
            raise BundleError(f"{e.filename or self.path}: cannot be changed ({e.strerror})", "write") from e

    def _recover(self, died: str, stamp: str) -> None:
        """Remove the remains of a killed process, among them a bundle that never became current, and log the recovery."""
        current = self._current.read()
        known = {current, *self._history.bundles()}
        never_current = [name for name in self._ids() if stamp_of(name) == stamp and name not in known]
        for path in [*self._bundles.glob(".tmp-*"), *(self._bundles / name for name in never_current)]:
            shutil.rmtree(path, ignore_errors=True)
        for name in (layout.CURRENT, layout.HISTORY, layout.COLLECTIONS):
            for file in self.path.glob(f".{name}.*.tmp"):
                file.unlink(missing_ok=True)
        logged = ["", *self._history.current_ids()][-1]
        if died or logged != current:
            self._log("recover", current, logged, died or "CURRENT was changed without an entry in HISTORY.jsonl")

    def _served(self) -> set[str]:
        """Return the bundles that are or were current, according to the history."""
        return {self._current.read(), *self._history.current_ids()}

    def _strays(self) -> set[str]:
        """Return ids of folders put there by hand. They do not count as new bundles."""
        return stray_ids(self._ids(), self._served())


def _passes_through(error: BaseException) -> bool:
    """Return True for interrupts, errors of the program, and errors with an exit code of their own."""
    program = not isinstance(error, Exception) or isinstance(error, _PROGRAMMING_ERRORS)
    return program or getattr(error, "exit_code", 2) != 2


def _reason(error: BaseException, stage: str) -> str:
    """Return the label of a publisher's error: its own, "recall" for a recall that is no number, else the stage."""
    if isinstance(error, ValidationError) and {"recall", "recall_check"} & {*error.errors()[0]["loc"]}:
        return "recall"
    return getattr(error, "reason", stage)


def _message(error: BaseException) -> str:
    """Return the message of an error of a publisher in one line, its type if it has none."""
    if isinstance(error, ValidationError):
        return problem(error)
    what = str(error)
    if isinstance(error, OSError):
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
    return what or type(error).__name__
