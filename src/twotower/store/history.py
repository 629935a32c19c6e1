"""HISTORY.jsonl of a store: one JSON line for each publish, refusal, rollback, removal and recovery."""

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
    """Return the line of a change: `name` is the bundle, `old` the bundle that was current before the change."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="microseconds"), "action": action, "bundle": name, "from": old,
        "reason": reason, "recall_check": recall_check.model_dump() if recall_check else None, "forced": forced,
    }  # fmt: skip


def with_line(data: bytes, line: JsonObject) -> bytes:
    """Return the bytes of the file with one more line. A line break is added first if the last line lacks one."""
    text = json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n"
    return data + b"\n" * (data[-1:] not in (b"", b"\n")) + text.encode(errors="backslashreplace")


def read_lines(data: bytes, at: Path | Url) -> list[JsonObject]:
    """Return the valid lines of the file `at`, oldest first. A warning names the numbers of the damaged lines."""
    texts = data.decode(errors="replace").split("\n")
    lines = {number: parse_line(text) for number, text in enumerate(texts, 1) if text.strip()}
    if invalid := [str(number) for number, line in lines.items() if line is None]:
        shown = f"line{'s' * (len(invalid) > 1)} {', '.join(invalid[:5])}{' …' * (len(invalid) > 5)}"
        warn_once(f"{at}: skipped damaged {shown}; a rollback without `to` may miss a bundle")
    return [line for line in lines.values() if line is not None]


def parse_line(text: str) -> JsonObject | None:
    """Parse a line of the history. Return None unless it has an action and a bundle id, which may be empty."""
    with suppress(ValueError, RecursionError):
        line = parse_json(text)
        if isinstance(line, dict) and all(_is_ascii_text(line.get(name)) for name in ("bundle", "action")):
            return line
    return None


def current_ids(lines: Iterable[JsonObject]) -> list[str]:
    """Return the ids of the bundles that became current, oldest first. A recovery without a bundle has the id ""."""
    return [str(line["bundle"]) for line in lines if line["action"] in _CURRENT_ACTIONS]


def previous_id(current_ids: list[str], existing: list[str]) -> str | None:
    """Return the bundle that a rollback makes current, or None.

    It is the latest existing bundle before the last of `current_ids`. Bundles that were rolled back are skipped:
    after a, b, c and a rollback to b, the previous bundle is a."""
    remaining: list[str] = []
    for name in current_ids:
        if name in remaining:
            del remaining[remaining.index(name) + 1 :]
        else:
            remaining.append(name)
    return next((name for name in reversed(remaining[:-1]) if name in existing), None)


def _is_ascii_text(value: JsonValue) -> bool:
    return isinstance(value, str) and value.isascii()
