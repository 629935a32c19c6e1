"""Options of a config with their meanings, and the commented template."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args, get_origin

import tomli_w
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from twotower.config.experiment import Config
from twotower.features.schema import FEATURE_KINDS
from twotower.model.branches import BRANCH_KINDS
from twotower.model.towers import TowerConfig


def options() -> Iterator[tuple[str, str, str, str]]:
    """Yield every option as (section, key, default as TOML, meaning), in the order of the template."""
    for name, info in Config.model_fields.items():
        if section := section_of(info):
            yield from _section_options(name, section)


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """Return the section that a field, or an element of it, holds; None for any other value."""
    annotation = field.annotation
    while get_origin(annotation) is tuple:
        annotation = get_args(annotation)[0]
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _section_options(name: str, section: type[BaseModel]) -> Iterator[tuple[str, str, str, str]]:
    """Yield the section's own options, then those of its sub-sections, in TOML's order."""
    inner: list[tuple[str, type[BaseModel]]] = []
    for key, info in section.model_fields.items():
        if key == "pairs":
            inner += [(f"model.pairs.{side}", TowerConfig) for side in ("user", "item")]
        elif found := section_of(info):
            inner.append((f"{name}.{key}", found))
        else:
            yield name, key, _toml(info.default), _meaning(info)
    for inner_name, inner_section in inner:
        yield from _section_options(inner_name, inner_section)


def feature_options() -> Iterator[tuple[str, str, str, str]]:
    """Yield every option of a feature, without name, side and kind, as (kind, key, default as TOML, meaning)."""
    for kind, model in FEATURE_KINDS.items():
        for key, info in model.model_fields.items():
            if key not in ("name", "side", "kind"):
                yield kind, key, _toml(info.default), _meaning(info)


def branch_options() -> Iterator[tuple[str, str, str, str]]:
    """Yield every option of a branch, without kind and senet, as (kind, key, default as TOML, meaning)."""
    for kind, model in BRANCH_KINDS.items():
        for key, info in model.model_fields.items():
            if key not in ("kind", "senet"):
                yield kind, key, _toml(info.default), _meaning(info)


def _meaning(info: FieldInfo) -> str:
    choices = get_args(info.annotation) if get_origin(info.annotation) is Literal else ()
    allowed = f" [{', '.join(repr(c) for c in choices)}]" if choices else ""
    return f"{info.description or ''}{allowed}"


def _toml(value: str | float | tuple[str | float, ...]) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(_toml(v) for v in value)}]"
    return tomli_w.dumps({"v": value}, multiline_strings=False).split("=", 1)[1].strip()


def config_template() -> str:
    """Return a complete config file: a schema to adapt, and every option with its default and meaning."""
    lines = [_SCHEMA_TEMPLATE]
    section = ""
    for kind, key, default, meaning in feature_options():
        if kind != section:
            lines.append(f"# options of kind = {_toml(kind)}:")
            section = kind
        lines.append(f"#   {key} = {default}  # {meaning}")
    for name, key, default, meaning in options():
        if name != section:
            if name == "model.pairs.user.senet":
                lines.append(_branch_lines())
            if name == "model.pairs.user":
                lines.append("\n[[model.pairs]]  # repeat the block for parallel pairs")
            lines.append(f"\n[{name}]")
            section = name
        lines.append(f"# {meaning}\n{key} = {default}")
    return "\n".join(lines) + "\n"


def _branch_lines() -> str:
    """Return the options of every kind of branch as comments."""
    lines = ['\n# branches = [{ kind = "mlp" }, { kind = "fm", senet = { enabled = true } }]; by kind:']
    for kind, model in BRANCH_KINDS.items():
        lines.append(f"# {_toml(kind)}: {' '.join((model.__doc__ or '').split())}")
        lines += [f"#   {key} = {default}  # {meaning}" for k, key, default, meaning in branch_options() if k == kind]
    return "\n".join(lines)


_SCHEMA_TEMPLATE = """\
# A twotower config: every option with its default. Delete what you do not change.

[schema]
user_id = "user_id"
item_id = "item_id"
label = ""            # outcome column of the interactions. Empty: every row is a positive.
positive_above = 0.0  # label above which a row is a positive
time = ""             # time column of the interactions (needed for split.kind = "last" or "time")
time_unit = "s"       # 's', 'ms', 'us' since 1970, or 'order'
time_format = ""      # strptime format of times in text, such as '%d/%m/%Y %H:%M'. Empty: detected.
title = ""            # title column of the items, shown to people
duplicates = "last"   # repeated ids and pairs: 'last' keeps the last row, 'error' refuses the table

# kind: categorical, numeric, multi_hot, vector, sequence or text; side: user or item
[[schema.features]]
name = "user_id"
side = "user"
kind = "categorical"

[[schema.features]]
name = "item_id"
side = "item"
kind = "categorical"
"""
