"""HISTORY.jsonl: a line for each publish, refusal, rollback, removal and recovery of a store."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import JsonValue

from twotower.errors import warn_once
from twotower.files.readers import parse_json
from twotower.files.urls import Url
from twotower.store.manifest import JsonObject, RecallCheck

Action = Literal["publish", "refused", "rollback", "gc", "recover"]

MAX_HISTORY_BYTES = 64 << 20  # some 200,000 lines
_CURRENT_ACTIONS = ("publish", "rollback", "recover")


def new_line(
    action: Action, name: str, old: str, reason: str, recall_check: RecallCheck | None = None, forced: bool = False
) -> JsonObject:
    """Return a line about a bundle; `old` is the bundle that was current before."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"), "action": action, "bundle": name, "from": old,
        "reason": reason, "recall_check": recall_check.model_dump() if recall_check else None, "forced": forced,
    }  # fmt: skip


def with_line(data: bytes, line: JsonObject) -> bytes:
    """Return the content of the file, whose last line may lack its end, with one more line."""
    text = json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n"
    return data + b"\n" * (data[-1:] not in (b"", b"\n")) + text.encode(errors="backslashreplace")


def read_lines(data: bytes, at: Path | Url) -> list[JsonObject]:
    """Return the valid lines of the file `at`, the oldest first, and log the numbers of the others."""
    texts = data.decode(errors="replace").split("\n")
    lines = {number: parse_line(text) for number, text in enumerate(texts, 1) if text.strip()}
    if invalid := [str(number) for number, line in lines.items() if line is None]:
        shown = f"line{'s' * (len(invalid) > 1)} {', '.join(invalid[:5])}{' …' * (len(invalid) > 5)}"
        warn_once(f"{at}: skipped damaged {shown}; a rollback without `to` may miss a bundle")
    return [line for line in lines.values() if line is not None]


def parse_line(text: str) -> JsonObject | None:
    """Return a line of the history; None for text without an action and the id of a bundle, which may be empty."""
    with suppress(ValueError, RecursionError):
        line = parse_json(text)
        if isinstance(line, dict) and all(_is_ascii_text(line.get(name)) for name in ("bundle", "action")):
            return line
    return None


def current_ids(lines: Iterable[JsonObject]) -> list[str]:
    """Return the ids of the bundles that became current; an empty one for a recovery without a bundle."""
    return [str(line["bundle"]) for line in lines if line["action"] in _CURRENT_ACTIONS]


def previous_id(current_ids: list[str], existing: list[str]) -> str | None:
    """Return the latest existing bundle that was current before the last of `current_ids`.

    Bundles rolled back from are skipped."""
    path: list[str] = []
    for name in current_ids:
        if name in path:
            del path[path.index(name) + 1 :]
        else:
            path.append(name)
    return next((name for name in reversed(path[:-1]) if name in existing), None)


def _is_ascii_text(value: JsonValue) -> bool:
    return isinstance(value, str) and value.isascii()
