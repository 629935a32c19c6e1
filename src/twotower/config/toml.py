"""Reading, writing and overriding of configs in TOML."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, time
from pathlib import Path
from typing import TypeAlias

import tomli_w
from pydantic import ValidationError

from twotower import files
from twotower.config.experiment import Config
from twotower.config.scorers import with_scorers
from twotower.errors import ConfigError, did_you_mean
from twotower.features.schema import Schema
from twotower.kinds import Kind, Kinds
from twotower.model.pooling import check_poolings
from twotower.section import Section, first_problem

TomlValue: TypeAlias = "str | float | date | time | Sequence[TomlValue] | Mapping[str, TomlValue]"
"""Value of a key in TOML."""

CONFIG_FORMAT = 4
"""Value of `format` in a written config. Optional in a file written by hand."""


def parse_config(
    data: Mapping[str, TomlValue], where: str = "config", trust: bool = False
) -> tuple[Schema | None, Config]:
    """Return (schema or None, config) of parsed TOML, with pairs of towers for the scorers where there is a schema.
    Raises ConfigError with one line.

    Here and below, `trust` imports the modules of kinds that are named by import path."""
    schema, config = parse_sections(data, where, trust)
    if schema is None:
        return None, config
    try:
        return with_scorers(schema, config)
    except ConfigError as e:
        raise ConfigError(f"{where}: {e}") from None


def parse_sections(
    data: Mapping[str, TomlValue], where: str = "config", trust: bool = False
) -> tuple[Schema | None, Config]:
    """Return (schema or None, config) of parsed TOML as it is written. Raises ConfigError with one line."""
    rest = dict(data)
    if (form := rest.pop("format", CONFIG_FORMAT)) != CONFIG_FORMAT or type(form) is not int:
        what = f"{where}: format {form!r}, this version reads {CONFIG_FORMAT}"
        raise ConfigError(f"{what}; begin with the keys of `config_template(everything=True)`")
    schema = rest.pop("schema", None)
    known = [*Config.model_fields, "schema"]
    for key in rest:
        if key not in known:
            what = f"unknown section '{key}'{did_you_mean(key, known)} (allowed: {', '.join(known)})"
            raise ConfigError(f"{where}: {what}")
    try:
        config = Config.model_validate(rest, context={"trust": trust})
        parsed = Schema.model_validate(schema, context={"trust": trust}) if schema is not None else None
    except ValidationError as e:
        raise ConfigError(f"{where}: {first_problem(e)}") from None
    if parsed is not None:
        check_poolings(parsed, trust, f"{where}: ")
    return parsed, config


def load_config(path: Path, overrides: Iterable[str] = (), trust: bool = False) -> tuple[Schema | None, Config]:
    """Read a TOML file and apply `key=value` overrides. Data paths become relative to the file's folder."""
    try:
        data: Mapping[str, TomlValue] = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; `config_template()` gives a template") from None
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path}: not UTF-8 at byte {e.start}; save it as UTF-8") from None
    except tomllib.TOMLDecodeError as e:
        escape = "; between double quotes a backslash begins an escape: write a path with / or between single quotes"
        hint = escape if re.search(r"hex value|Unescaped '\\'", str(e)) else ""
        raise ConfigError(f"{path}: not valid TOML: {e}{hint}") from None
    except RecursionError:
        raise ConfigError(f"{path}: not valid TOML: lists or tables nested too deep for any option") from None
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror}") from None
    schema, config = parse_config(override_settings(data, overrides), str(path), trust)
    files.check_name(path)
    return schema, config.model_copy(update={"data": config.data.located(path.resolve().parent)})


def override_config(config: Config, overrides: Iterable[str], trust: bool = False) -> Config:
    """Return the config with `key=value` overrides applied. Raises ConfigError."""
    return parse_config(override_settings(config.model_dump(mode="json"), overrides), trust=trust)[1]


def override_settings(data: Mapping[str, TomlValue], overrides: Iterable[str]) -> Mapping[str, TomlValue]:
    """Return parsed TOML with `key=value` overrides applied. Raises ConfigError."""
    for text in overrides:
        data = _override(data, text)
    return data


def dump_config(schema: Schema, config: Config) -> str:
    """Return the resolved settings as TOML, with their format, for `load_config`."""
    settings = config.model_dump(mode="json") | {"schema": schema.model_dump(mode="json")}
    return tomli_w.dumps({"format": CONFIG_FORMAT} | settings)


def _override(data: Mapping[str, TomlValue], text: str) -> Mapping[str, TomlValue]:
    """Return `data` with `a.b.0.c=value` applied. The value is TOML, else text."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"`overrides` {text}: expected key=value, such as train.epochs=3")
    try:
        parsed = tomllib.loads(f"v = {value}")["v"]
    except (tomllib.TOMLDecodeError, RecursionError):
        parsed = value
    path = _split_key(key.strip())
    if path[-1] == "kind" and isinstance(parsed, str):
        data = _without_options_of_other_kinds(data, path[:-1], parsed)
    return _replace_key(data, [], path, parsed, text)


def registry_at(path: list[str]) -> Kinds[Kind] | None:
    """Return the registry of the kinds at a path of keys in a config; None for any other value."""
    section: type[Section] = Config
    for step in path:
        field = section.model_fields.get(step)
        if field is None:
            return None
        registry = next((m for m in field.metadata if isinstance(m, Kinds)), None)
        if registry is not None:
            return registry if step is path[-1] else None
        if not (isinstance(field.annotation, type) and issubclass(field.annotation, Section)):
            return None
        section = field.annotation
    return None


def _split_key(key: str) -> list[str]:
    """Return the steps of a dotted key. A quoted step may hold dots."""
    try:
        node: TomlValue = tomllib.loads(f"{key} = 0")
    except tomllib.TOMLDecodeError:
        return key.split(".")
    path: list[str] = []
    while isinstance(node, Mapping):
        ((step, node),) = node.items()
        path.append(step)
    return path


def _without_options_of_other_kinds(
    data: Mapping[str, TomlValue], path: list[str], kind: str
) -> Mapping[str, TomlValue]:
    """Return `data` without the options of the section `path` that the new `kind` lacks, if they have their defaults.

    A written config has every default. An option that a user has set stays, and is refused."""
    registry, node = registry_at(path), data
    for step in path:
        inner = node.get(step)
        if not isinstance(inner, Mapping):
            return data
        node = inner
    if registry is None or kind not in registry or node.get("kind") not in registry:
        return data
    old, new = registry.find(str(node["kind"])).model_fields, registry.find(kind).model_fields
    kept = {k: v for k, v in node.items() if k in new or k not in old or old[k].get_default() != v}
    return _replace_key(data, [], path, kept, "")


def _replace_key(
    node: Mapping[str, TomlValue], above: list[str], path: list[str], value: TomlValue, text: str
) -> dict[str, TomlValue]:
    """Return the section `node`, at the path `above`, with the value at `path` below it replaced."""
    step, *rest = path
    if rest:
        inner = node.get(step, [{}] if rest[0].isdigit() else {})
        if isinstance(inner, bool):  # a switch takes the options of what it switches
            inner = {}
        if isinstance(inner, str) and registry_at([*above, step]):  # the name of a kind without options
            inner = {"kind": inner}
        value = _replace(inner, [*above, step], rest, value, text)
    return {**node, step: value}


def _replace(node: TomlValue, above: list[str], path: list[str], value: TomlValue, text: str) -> TomlValue:
    """Return a section or a list with the value at `path` below it replaced. Raises ConfigError for any other value."""
    if isinstance(node, Mapping):
        return _replace_key(node, above, path, value, text)
    if not isinstance(node, list):
        raise ConfigError(f"`overrides` {text}: '{'.'.join(above)}' is a value, not a section")
    step, *rest = path
    if not step.isdigit() or int(step) >= len(node):
        raise ConfigError(f"`overrides` {text}: expected an index 0..{len(node) - 1} instead of '{step}'")
    place = int(step)
    return [
        *node[:place],
        _replace(node[place], [*above, step], rest, value, text) if rest else value,
        *node[place + 1 :],
    ]
