"""Errors of a config in words of its keys."""

from __future__ import annotations

from pydantic import ValidationError

_WORDS = {"valid tuple": "list", "Tuple": "List", " after validation": ""}
"""Words of pydantic, and those of a config."""


def explain(error: ValidationError) -> str:
    """Return one problem in one line: key, value, allowed values. An unknown key comes first, since it causes others."""
    problems = error.errors()
    first = next((p for p in problems if p["type"] == "unknown_key"), problems[0])
    where = ".".join([*(["schema"] if error.title == "Schema" else []), *map(str, first["loc"])])
    if first["type"] == "unknown_key":
        key, hint, allowed = (first["ctx"][name] for name in ("key", "hint", "allowed"))
        return f"unknown key '{where}{'.' * bool(where)}{key}'{hint} (allowed: {allowed})"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] in ("value_error", "kind", "kind_type", "untrusted_kind"):
        return f"{where}: {message}" if where else message
    if first["type"] == "missing":
        return f"'{where}' is missing"
    for theirs, ours in _WORDS.items():
        message = message.replace(theirs, ours)
    given = first.get("input")
    shown = f", got {given!r}" if isinstance(given, str | int | float | bool) else ""
    return f"{where}: {message[0].lower()}{message[1:]}{shown}"
