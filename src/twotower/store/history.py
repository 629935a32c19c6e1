"""HISTORY.jsonl: a line for each publish, refusal, rollback, removal and recovery of a store."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import JsonValue

from twotower import files
from twotower.errors import warn_once
from twotower.files import layout
from twotower.files.readers import parse_json
from twotower.files.urls import Url
from twotower.store.current import read_store_file
from twotower.store.manifest import JsonObject, RecallCheck

Action = Literal["publish", "refused", "rollback", "gc", "recover"]

MAX_HISTORY_BYTES = 64 << 20  # some 200,000 lines
_CURRENT_ACTIONS = ("publish", "rollback", "recover")


class History:
    """The changes of a store in a folder, the oldest first."""

    def __init__(self, store: Path) -> None:
        self._path = store / layout.HISTORY

    def lines(self) -> list[JsonObject]:
        """Return the lines, without invalid ones. Raises BundleError if the file cannot be read."""
        return read_lines(read_store_file(self._path, MAX_HISTORY_BYTES), self._path)

    def bundles(self) -> list[str]:
        """Return the ids in all lines; empty where a line has none."""
        return [str(line["bundle"]) for line in self.lines()]

    def current_ids(self) -> list[str]:
        """Return the ids of the bundles that became current; empty after a recovery without one."""
        return current_ids(self.lines())

    def append(self, line: JsonObject) -> None:
        """Add a line. The file is replaced atomically. Raises RunError."""
        before = read_store_file(self._path, MAX_HISTORY_BYTES)
        files.write(self._path, with_line(before, line), 0o644)


def new_line(
    action: Action,
    name: str,
    old: str,
    reason: str,
    recall_check: RecallCheck | None = None,
    forced: bool = False,
) -> JsonObject:
    """Return a line about a bundle; `old` was current before."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"), "action": action, "bundle": name, "from": old,
        "reason": reason, "recall_check": recall_check.model_dump() if recall_check else None, "forced": forced,
    }  # fmt: skip


def with_line(data: bytes, line: JsonObject) -> bytes:
    """Return a file with a line at its end, whose last line may lack its end."""
    text = json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n"
    return data + b"\n" * (data[-1:] not in (b"", b"\n")) + text.encode(errors="backslashreplace")


def read_lines(data: bytes, at: Path | Url) -> list[JsonObject]:
    """Return the lines of the file `at`, without invalid ones, whose numbers are logged."""
    texts = data.decode(errors="replace").split("\n")
    lines = {number: parse_line(text) for number, text in enumerate(texts, 1) if text.strip()}
    if invalid := [str(number) for number, line in lines.items() if line is None]:
        shown = ", ".join(invalid[:5]) + " …" * (len(invalid) > 5)
        warn_once(
            f"{at}: skipped damaged line{'s' * (len(invalid) > 1)} {shown}; a rollback without `to` may miss a bundle"
        )
    return [line for line in lines.values() if line is not None]


def parse_line(text: str) -> JsonObject | None:
    """Return a line of the history; None for text without the id of a bundle, which may be empty, and an action."""
    with suppress(ValueError, RecursionError):
        line = parse_json(text)
        if isinstance(line, dict) and all(_is_ascii_text(line.get(name)) for name in ("bundle", "action")):
            return line
    return None


def current_ids(lines: Iterable[JsonObject]) -> list[str]:
    """Return the ids of the bundles that became current; empty after a recovery without one."""
    return [str(line["bundle"]) for line in lines if line["action"] in _CURRENT_ACTIONS]


def previous_id(current_ids: list[str], existing: list[str]) -> str | None:
    """Return the latest existing bundle that was current before the last of `current_ids`.

    Those rolled back from are skipped."""
    path: list[str] = []
    for name in current_ids:
        if name in path:
            del path[path.index(name) + 1 :]
        else:
            path.append(name)
    return next((name for name in reversed(path[:-1]) if name in existing), None)


def _is_ascii_text(value: JsonValue) -> bool:
    return isinstance(value, str) and value.isascii()
