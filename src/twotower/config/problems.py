"""Errors of a config in words of its keys."""

from __future__ import annotations

from pydantic import ValidationError

from twotower.config.reference import config_tables, schema_tables
from twotower.errors import did_you_mean


def explain(error: ValidationError) -> str:
    """Return one problem in one line: key, value, allowed values. An unknown key comes first, since it causes others."""
    problems = error.errors()
    first = next((p for p in problems if p["type"] == "unknown_key"), problems[0])
    of_schema = error.title == "Schema"
    kinds = [t.kind for t in (schema_tables() if of_schema else config_tables()) if t.kind]
    path = [str(p) for p in first["loc"] if p not in kinds]
    where = ".".join(["schema", *path] if of_schema else path)
    if first["type"] == "unknown_key":
        key, hint, allowed = (first["ctx"][name] for name in ("key", "hint", "allowed"))
        return f"unknown key '{where}{'.' * bool(where)}{key}'{hint} (allowed: {allowed})"
    if first["type"].startswith("union_tag"):
        kind = first["ctx"].get("tag", "")
        given = f"no kind '{kind}'{did_you_mean(kind, kinds)}" if kind else "missing"
        return f"{where}.kind: {given} (allowed: {', '.join(kinds)})"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] in ("value_error", "kind", "kind_type", "untrusted_kind"):
        return f"{where}: {message}" if where else message
    if first["type"] == "missing":
        return f"'{where}' is missing"
    given = first.get("input")
    shown = f", got {given!r}" if isinstance(given, str | int | float | bool) else ""
    return f"{where}: {message[0].lower()}{message[1:]}{shown}"
