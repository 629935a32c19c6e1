"""Errors of a config in words of its keys."""

from __future__ import annotations

from pydantic import ValidationError

from twotower.errors import did_you_mean
from twotower.features.schema import FEATURE_KINDS
from twotower.model.branches import BRANCH_KINDS


def explain(error: ValidationError) -> str:
    """Return one problem in one line: key, value, allowed values. An unknown key comes first, since it causes others."""
    problems = error.errors()
    first = next((p for p in problems if p["type"] == "unknown_key"), problems[0])
    kinds = FEATURE_KINDS if error.title == "Schema" else BRANCH_KINDS
    path = [str(p) for p in first["loc"] if p not in kinds]
    where = ".".join(["schema", *path] if error.title == "Schema" else path)
    if first["type"] == "unknown_key":
        key, hint, allowed = (first["ctx"][name] for name in ("key", "hint", "allowed"))
        return f"unknown key '{where}{'.' * bool(where)}{key}'{hint} (allowed: {allowed})"
    if first["type"].startswith("union_tag"):
        kind = first["ctx"].get("tag", "")
        given = f"no kind '{kind}'{did_you_mean(kind, kinds)}" if kind else "missing"
        return f"{where}.kind: {given} (allowed: {', '.join(kinds)})"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] in ("value_error", "kind"):
        return f"{where}: {message}" if where else message
    if first["type"] == "missing":
        return f"'{where}' is missing"
    given = first.get("input")
    shown = f", got {given!r}" if isinstance(given, str | int | float | bool) else ""
    return f"{where}: {message[0].lower()}{message[1:]}{shown}"
