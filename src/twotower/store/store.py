"""A store of published models: a bundle for each version, and a pointer that names the current one.

bundles/<id>/    a bundle (bundle.py): the publisher's files and the manifest
CURRENT          the id of the served bundle
HISTORY.jsonl    the changes of the store (history.py)

A store is a folder (folder.py) or a prefix in an object store (object_place.py). The caller passes the functions that
write and probe the files of a bundle; this module knows only the manifest. Readers need no lock.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from twotower.errors import BundleError, ConfigError, RunError
from twotower.escaping import python_literal
from twotower.files.urls import Url, is_url
from twotower.section import first_problem
from twotower.store.bundle import Bundle, is_bundle_id, seal, stray_ids
from twotower.store.folder import FolderPlace
from twotower.store.history import current_ids, new_line, previous_id
from twotower.store.manifest import BundleFacts, JsonObject, Manifest, RecallCheck
from twotower.store.object_place import ObjectPlace
from twotower.store.place import StorePlace

_PROGRAMMING_ERRORS = (AssertionError, AttributeError, IndexError, KeyError, NameError, TypeError)
"""Errors that show a defect of the program, not a mistake in the input or a fault of the machine."""


@dataclass(frozen=True)
class BundleInfo:
    """Entry in the list of bundles.

    `damaged` is the reason why the bundle cannot be opened, else None. Names and sizes of its files are compared with
    the manifest, checksums are not."""

    id: str
    created: str | None
    size: int
    recall_check: RecallCheck | None
    current: bool
    damaged: str | None
    context: tuple[str, ...] = ()
    """Context columns of a request. Empty if the bundle is damaged or names kinds that are not imported."""


def _place(path: Path | Url | str) -> StorePlace:
    if isinstance(path, Url):
        return ObjectPlace(path)
    return ObjectPlace(Url.parse(path)) if is_url(path) else FolderPlace(Path(path))


class Store:
    """Bundles in a folder or at the URL of an object store. Raises BundleError if there is no store."""

    def __init__(self, path: Path | Url | str, place: StorePlace | None = None) -> None:
        """Open the store at `path`. `place` gives access to the same path with settings other than the defaults."""
        self.place = place or _place(path)
        self.at = self.place.path
        if not self.place.exists():
            raise BundleError(f"{self.at}: not a store; `publish(run, store={self._literal})` creates one", "store")

    @property
    def _literal(self) -> str:
        return python_literal(str(self.at))

    @property
    def path(self) -> Path:
        """The folder. Raises BundleError for a store in an object store."""
        if isinstance(self.at, Url):
            raise BundleError(f"{self.at}: is in an object store, and a folder is needed", "store")
        return self.at

    @classmethod
    def create(cls, path: Path | Url | str, place: StorePlace | None = None) -> Store:
        """Open the store at `path`, or create it in a new or empty place. Raises BundleError if it has other files."""
        place = place or _place(path)
        if not place.exists():
            place.create()
        return cls(path, place)

    # ---- reading

    def current(self) -> Bundle:
        """Return the current bundle, verified.

        Raises BundleError. Its message lists the available bundles and the call that returns to an earlier one."""
        name = self.place.current()
        while True:
            try:
                return self.open(name)
            except BundleError as e:
                if e.reason == "store":
                    raise
                tried, name = name, self.place.current()
                if name != tried:  # it was replaced between the two reads
                    continue
                back = f"`rollback(store={self._literal})` returns to an earlier one"
                raise BundleError(f"{e}; {self._available()}; {back}" if name else str(e), e.reason) from e

    def current_stamp(self, serving: str = "") -> tuple[str, int | str]:
        """Return the id in CURRENT, and a mark that changes with each change of the file. Raises BundleError.

        `serving` is the id of the bundle that the caller serves, so that `gc` keeps it. Empty: none."""
        return self.place.stamp(serving)

    def touch_current(self) -> None:
        """Change the mark of CURRENT, so that readers load again. Raises BundleError if no bundle is current."""
        self.place.touch()

    def open(self, name: str) -> Bundle:
        """Return a verified bundle by id, with its files on the local disk. Raises BundleError."""
        self._check_id(name)
        return self.place.open(name)

    def manifest(self, name: str) -> Manifest:
        """Return the manifest of a bundle by id. Raises BundleError."""
        self._check_id(name)
        return self.place.manifest(name)

    def bundles(self) -> list[BundleInfo]:
        """Return all bundles, the oldest first."""
        current = self.place.current()

        def line(name: str) -> BundleInfo:
            try:
                manifest = self.place.glance(name)
            except BundleError as e:
                if e.reason == "store":
                    raise
                return BundleInfo(name, None, 0, None, name == current, e.reason)
            context = tuple[str, ...]()
            with suppress(BundleError):
                context = tuple(manifest.read_sections()[0].request_context())
            check = manifest.recall_check
            return BundleInfo(name, manifest.created, manifest.size, check, name == current, None, context)

        return [line(name) for name in self.place.ids()]

    def history(self) -> list[JsonObject]:
        """Return the valid lines of the history, the oldest first."""
        return self.place.lines()

    def recent_ids(self, n: int) -> list[str]:
        """Return the ids of the last `n` bundles that were current, each once, the latest first."""
        return list(dict.fromkeys(name for name in reversed(current_ids(self.place.lines())) if name))[:n]

    def _check_id(self, name: str) -> None:
        if not name:
            what = f"no bundle is published yet; `publish(run, store={self._literal})` publishes one"
            raise BundleError(f"{self.at}: {what}", "missing")
        if not is_bundle_id(name):
            raise BundleError(f"{self.at}: {name[:80]!r} is not the id of a bundle", "current")

    def _available(self) -> str:
        return f"available: {', '.join(self.place.ids()) or 'none'}"

    def _previous(self) -> str | None:
        """Return the id of the bundle that a rollback makes current, None if there is none."""
        return previous_id([*current_ids(self.place.lines()), self.place.current()], self.place.ids())

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

        `write` returns the facts of the manifest. `force` publishes although the recall is below its threshold, or the
        model is worse than the current one. On a
        failure CURRENT is unchanged and no file remains. Raises BundleError for mistakes in the input and faults of
        the machine. Interrupts and defects of the program keep their exceptions."""
        with self.place.changing("publish") as change:
            stage, name = "write", ""
            try:
                temporary = change.stage()
                facts = write(temporary)
                worse = facts.challenge.shortfall if facts.challenge else ""
                below = "; ".join(filter(None, (facts.recall_check.shortfall, worse)))
                if below and not force:
                    self._log(new_line("refused", "", change.old, below, facts.recall_check))
                    label = "challenge" if worse else "recall"
                    raise BundleError(f"{below}; train or search better, or publish with `force=True`", label)
                created = datetime.now(UTC).isoformat(timespec="seconds")
                name = seal(temporary, change.stamp, facts, created, bool(below))
                bundle = change.complete(temporary, name)
                stage = "probe"
                if probe is not None:
                    probe(bundle)
                stage = "write"
                change.store(bundle)
                reason = "; ".join(filter(None, (reason, str(facts.challenge or ""))))
                line = new_line("publish", name, change.old, reason, facts.recall_check, forced=bool(below))
                change.make_current(name, line)
            except BaseException as e:
                change.discard()
                if name and self._is_current(name):  # only the sync of the folder failed
                    raise
                if _passes_through(e):
                    raise
                if change.is_unsure:
                    lost = f"it is unknown if {name} became current, list the bundles when the store answers"
                    raise BundleError(f"{self.at}: {_message(e)}; {lost}", "store") from e
                message = f"{self.at}: not published, CURRENT stays {change.old or 'unset'}: {_message(e)}"
                raise BundleError(message, _reason(e, stage)) from e
            self._log(line)
            return bundle

    def _is_current(self, name: str) -> bool:
        """Return True if CURRENT can be read and names this bundle."""
        with suppress(BundleError):
            return self.place.current() == name
        return False

    def rollback(self, to: str | None = None, *, reason: str = "") -> Bundle:
        """Make bundle `to` current again. Default: the bundle that was current before. Raises BundleError.

        A second rollback returns to the bundle before that one. To undo a rollback, pass the id of the newer bundle."""
        with self.place.changing("rollback") as change:
            name = to or self._previous()
            if name is None or name not in self.place.ids():
                what = f"no bundle {name}" if name else "no bundle was current before"
                raise BundleError(f"{self.at}: {what}; {self._available()}; choose one with `to`", "missing")
            change.hold(name)
            bundle = self.open(name)
            manifest = bundle.manifest
            line = new_line("rollback", name, change.old, reason, manifest.recall_check, manifest.forced)
            change.make_current(name, line)
            self._log(line)
            return bundle

    def gc(self, keep: int = 2, also: Callable[[], None] = lambda: None) -> list[str]:
        """Remove old bundles and the remains of killed publishers; return the removed ids.

        The `keep` newest bundles stay, and the current one, the one to which a rollback returns, and all with a lease.
        A stray, a folder put there by hand with an invalid or future time, does not count as new. Files that a
        reader has open stay readable. `also` is called last, before other processes may change the store. Raises
        ConfigError if `keep` is below 2."""
        if keep < 2:
            raise ConfigError(f"keep is {keep}, expected at least 2: the current bundle and one for a rollback")
        with self.place.changing("gc") as change:
            found, current = self.place.ids(), self.place.current()
            strays = stray_ids(found, {current, *current_ids(self.place.lines())})
            ids = sorted(found, key=lambda name: (name not in strays, name))
            kept = {current, self._previous(), *ids[-keep:]}
            removed = []
            for name in ids:
                if name not in kept and change.remove(name):
                    self._log(new_line("gc", name, current, f"keep {keep}"))
                    removed.append(name)
            also()
            return removed

    def _log(self, line: JsonObject) -> None:
        try:
            self.place.log(line)
        except RunError as e:
            raise RunError(f"{e}; CURRENT is {self.place.current() or 'unset'}") from e


def _passes_through(error: BaseException) -> bool:
    """Return True for interrupts, defects of the program, and errors with an exit code other than 2."""
    program = not isinstance(error, Exception) or isinstance(error, _PROGRAMMING_ERRORS)
    return program or getattr(error, "exit_code", 2) != 2


def _reason(error: BaseException, stage: str) -> str:
    """Return the reason of a failed publish.

    It is the reason of the error itself, "recall" if the recall is not a number, else the stage that failed."""
    if isinstance(error, ValidationError) and {"recall", "recall_check"} & {*error.errors()[0]["loc"]}:
        return "recall"
    return getattr(error, "reason", stage)


def _message(error: BaseException) -> str:
    """Return the message of a failed publish on one line; the name of the error's type if it has no message."""
    if isinstance(error, ValidationError):
        return first_problem(error)
    what = str(error)
    if isinstance(error, OSError):
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
    return what or type(error).__name__
