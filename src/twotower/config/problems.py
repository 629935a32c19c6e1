"""Errors of a config in words of its keys."""

from __future__ import annotations

from pydantic import BaseModel, ValidationError

from twotower.config.experiment import Config
from twotower.config.reference import section_of
from twotower.errors import did_you_mean
from twotower.features.schema import FEATURE_KINDS, Schema
from twotower.model.branches import BRANCH_KINDS


def explain(error: ValidationError) -> str:
    """Return one problem in one line: key, value, allowed values. An unknown key comes first, since it causes others."""
    problems = error.errors()
    first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    model = Schema if error.title == "Schema" else Config
    kinds = FEATURE_KINDS if error.title == "Schema" else BRANCH_KINDS
    path = [str(p) for p in first["loc"] if p not in kinds]
    where = ".".join(["schema", *path] if error.title == "Schema" else path)
    if first["type"] == "extra_forbidden":
        allowed = _allowed(model, [str(p) for p in first["loc"][:-1]])
        return f"unknown key '{where}'{did_you_mean(path[-1], allowed)} (allowed: {', '.join(allowed)})"
    if first["type"].startswith("union_tag"):
        kind = first["ctx"].get("tag", "")
        given = f"no kind '{kind}'{did_you_mean(kind, kinds)}" if kind else "missing"
        return f"{where}.kind: {given} (allowed: {', '.join(kinds)})"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{where}: {message}" if where else message
    if first["type"] == "missing":
        return f"'{where}' is missing"
    given = first.get("input")
    shown = f", got {given!r}" if isinstance(given, str | int | float | bool) else ""
    return f"{where}: {message[0].lower()}{message[1:]}{shown}"


def _allowed(model: type[BaseModel], path: list[str]) -> list[str]:
    """Return the keys of the section at `path` below `model`, none if that is no section."""
    found: type[BaseModel] | None = model
    for step in path:
        if kind := (FEATURE_KINDS | BRANCH_KINDS).get(step):
            found = kind
        elif found and step in found.model_fields:
            found = section_of(found.model_fields[step])
    return list(found.model_fields) if found else []
