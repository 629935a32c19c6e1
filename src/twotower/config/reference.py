"""Options of a config with their meanings, in three tiers, the commented template, and the writer of a config."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Annotated, Literal, TypeAlias, get_args, get_origin

import tomli_w
from pydantic.fields import FieldInfo

from twotower.config.experiment import Config
from twotower.config.toml import TomlValue
from twotower.escaping import escape_controls
from twotower.features.field import PoolingSpec
from twotower.features.schema import Schema
from twotower.kinds import Added, ByName, Kind, Kinds, Written
from twotower.model.pooling import POOLINGS
from twotower.model.pooling.pooling import Pooling
from twotower.section import Section, Tier

SectionType: TypeAlias = type[Section]
WIDTH = 110
"""Width of comments in a config, in characters."""


@dataclass(frozen=True)
class Option:
    """An option: its key, default as TOML, meaning, and tier."""

    key: str
    default: str
    """Empty if the option is required."""
    meaning: str
    tier: Tier
    commented: bool = False
    """True if the template has it as a comment: without the option, the data may decide it."""


@dataclass(frozen=True)
class OptionTable:
    """A table of TOML: the options of a section, or those of one kind alone."""

    name: str
    options: tuple[Option, ...]
    about: str
    listed: bool = False
    """True if a config holds any number of them, `[[name]]`."""
    kind: str = ""
    optional: bool = False
    """True if the table chooses or adds a kind, so that it is not part of the default config."""
    always: bool = False
    """True if `kind` is always on, and not named in a config."""
    same_as: str = ""
    """Name of an earlier table with the same options."""


def config_tables() -> tuple[OptionTable, ...]:
    """Return all tables of a config but the schema, in the order of a TOML file."""
    return tuple(_section_tables("", _Content(Config), {}))


def schema_tables() -> tuple[OptionTable, ...]:
    return tuple(_section_tables("schema", _Content(Schema), {}))


def of_tier(tables: Iterable[OptionTable], tier: Tier) -> list[OptionTable]:
    """Return the tables with only the options of a tier, without empty ones. A kind's documentation is in "tune"."""
    narrowed = [replace(table, options=tuple(o for o in table.options if o.tier == tier)) for table in tables]
    names = {table.name for table in narrowed if table.options}
    with_kinds = {table.name for table in narrowed if table.kind}
    return [
        table
        for table in narrowed
        if table.options
        or table.same_as in names
        or ((table.name in with_kinds or table.optional) and tier == "tune")
        or (table.listed and not table.optional and any(name.startswith(f"{table.name}.") for name in names))
    ]


@dataclass(frozen=True)
class _Content:
    """Sections that a field holds."""

    section: SectionType
    """The section, or the protocol of its kinds."""
    kinds: Mapping[str, SectionType] = field(default_factory=dict)
    listed: bool = False
    added: bool = False
    """True if a config adds kinds to those that are always on."""
    by_name: frozenset[str] | None = None
    """Kinds that are on by default, if each has a subsection of its name; else None."""


def _content(info: FieldInfo) -> _Content | None:
    """Return the sections that a field holds, one or a tuple of them; None for any other value."""
    held, *marks = (info.annotation, *info.metadata)
    if listed := get_origin(held) is tuple:
        element = get_args(held)[0]
        held, *marks = get_args(element) if get_origin(element) is Annotated else (element,)
    if registry := next((m for m in marks if isinstance(m, Kinds)), None):
        by_name = frozenset(kind.kind for kind in info.default) if ByName in info.metadata else None
        return _Content(registry.protocol, {k.kind: k for k in registry}, listed, Added in info.metadata, by_name)
    if held is PoolingSpec:  # a lower layer than the poolings
        return _Content(Pooling, {kind.kind: kind for kind in POOLINGS}, listed)
    return _Content(held, listed=listed) if isinstance(held, type) and issubclass(held, Section) else None


def _section_tables(
    name: str,
    content: _Content,
    seen: dict[SectionType, str],
    kind: Option | None = None,
    about: str = "",
    optional: bool = False,
) -> Iterator[OptionTable]:
    """Yield the tables of a section, of its kinds, and of its subsections. `kind` is the option that names a kind."""
    section, kinds, listed = content.section, content.kinds, content.listed
    if (first := seen.setdefault(section, name)) != name:
        yield OptionTable(name, (), about, listed, same_as=first)
        return
    options = (*([kind] if kind and kinds else []), *_own_options(section))
    yield OptionTable(
        name, options, about or _documentation(section), listed, optional=optional or (bool(kinds) and listed)
    )
    for word, found in kinds.items():
        own, about = _options_of_kind(found, section), _documentation(found)
        yield OptionTable(name, own, about, listed, word, optional=True, always=content.added and _is_always_on(found))
    of_kinds = ((key, info) for kind in kinds.values() for key, info in kind.model_fields.items())
    nested = [(k, i) for k, i in of_kinds if k not in section.model_fields and (c := _content(i)) and c.kinds]
    for key, info in [*_fields(section), *nested]:
        path, inner = f"{name}.{key}".strip("."), _content(info)
        if inner and inner.by_name is not None:
            for word, found in inner.kinds.items():
                options = tuple(_own_options(found, inner.section))
                yield OptionTable(f"{name}.{word}", options, _documentation(found), optional=True)
        elif inner and seen.get(inner.section) != path:
            default = str(getattr(info.default, "kind", ""))
            named = [word for word, found in inner.kinds.items() if not (inner.added and _is_always_on(found))]
            meaning = f"{', '.join(named)}, or the import path of another kind, `module:Class`."
            shown = toml_value(default) if default or info.default == "" else ""  # "": none
            kind = Option("kind", shown, meaning, section.tier(key))
            yield from _section_tables(path, inner, seen, kind, info.description or "", (key, info) in nested)


def _fields(section: SectionType) -> Iterator[tuple[str, FieldInfo]]:
    return ((key, info) for key, info in section.model_fields.items() if Written not in info.metadata)


def _is_always_on(section: SectionType) -> bool:
    return issubclass(section, Kind) and section.always


@cache
def _options_of_kind(kind: SectionType, protocol: SectionType) -> tuple[Option, ...]:
    """Return the options of a kind that its protocol does not have, or has with another default."""
    return tuple(_own_options(kind, protocol))


def _own_options(section: SectionType, protocol: SectionType | None = None) -> Iterator[Option]:
    """Yield the options of a section that are values.

    With the `protocol` of a kind: the options that the protocol does not have, or has with another default, and the
    options of subsections."""
    shared = {} if protocol is None else protocol.model_fields
    for key, info in _fields(section):
        if protocol is not None and (key == "kind" or repr(shared.get(key)) == repr(info)):
            continue
        inner = _content(info)
        if inner and inner.by_name is not None:
            for word, found in inner.kinds.items():
                about = " ".join(_documentation(found).split()).partition(". ")[0].rstrip(".")
                yield Option(
                    word, toml_value(word in inner.by_name), f"{about}.", section.tier(word), word not in inner.by_name
                )
        elif inner is None or (protocol is not None and inner.kinds):
            default = info.default.kind if isinstance(info.default, PoolingSpec | Kind) else info.default
            yield Option(key, "" if info.is_required() else toml_value(default), _meaning(info), section.tier(key))
        elif protocol is not None:
            yield from (replace(o, key=f"{key}.{o.key}") for o in _own_options(inner.section))


def _documentation(section: SectionType) -> str:
    return inspect.cleandoc(section.__doc__ or "")


def _meaning(info: FieldInfo) -> str:
    choices = get_args(info.annotation) if get_origin(info.annotation) is Literal else ()
    allowed = f" [{', '.join(repr(c) for c in choices)}]" if choices else ""
    return f"{info.description or ''}{allowed}"


def config_template(everything: bool = False) -> str:
    """Return a config file with the defaults and meanings of the options to start with, or of all options."""
    which = "every option" if everything else "the options to start with"
    schema, config = (
        tables if everything else of_tier(tables, "start here") for tables in (schema_tables(), config_tables())
    )
    lines = [f"# A twotower config: {which}, with the defaults. Delete what you do not change."]
    lines += [line for table in schema for line in _template_lines(table)]
    lines.append(_FEATURES.rstrip())
    lines += [line for table in config for line in _template_lines(table)]
    return "\n".join(lines) + "\n"


def _template_lines(table: OptionTable) -> Iterator[str]:
    """Yield the lines of a table. Options of a kind, and of elements of a list of kinds, are comments."""
    heading = f"[[{table.name}]]" if table.listed else f"[{table.name}]"
    about = " ".join(table.about.partition("\n\n")[0].split())
    if table.same_as:
        yield f"\n# {heading}: as [{table.same_as}]"
    elif table.optional:
        word = f"{table.kind}, measured always" if table.always else f"kind = {toml_value(table.kind)}"
        yield f"# {word}: {about}" if table.kind else f"\n# {heading}: {about}"
        yield from (f"#   {o.key} = {o.default or '…'}  # {o.meaning}" for o in table.options)
    elif table.options or table.listed:
        yield f"\n{heading}  # {about}"
        yield from (f"# {o.meaning}\n{'# ' * o.commented}{o.key} = {o.default}" for o in table.options)


def write_document(settings: Mapping[str, TomlValue], head: str, comments: Mapping[str, str]) -> str:
    """Return settings as TOML, after `head` as a comment, with comments by dotted key, such as train.epochs.

    A key without a comment has the first sentence of its meaning in the reference."""
    lines = [line for part in head.splitlines() for line in _comment(part)]
    meanings = dict[str, str]()
    for table in (*schema_tables(), *config_tables()):
        for option in () if table.kind else table.options:
            sentence = re.split(r"(?<=\.) |; ", " ".join(option.meaning.split()), maxsplit=1)[0]
            meanings.setdefault(f"{table.name}.{option.key}".removeprefix("."), sentence.rstrip(".") + ".")
    for name, values in settings.items():  # a key of no table comes before all tables
        if isinstance(values, list):
            lines += ["", *_list_lines(name, name, values, comments, meanings)]
    for path, said in comments.items():  # of a list that is left out
        if "." not in path and path not in settings:
            lines += ["", *_comment(said)]
    for name, values in settings.items():
        if isinstance(values, Mapping):
            lines += ["", f"[{name}]", *_section_lines(name, values, comments, meanings)]
    return "\n".join(lines) + "\n"


def _section_lines(
    name: str, values: Mapping[str, TomlValue], comments: Mapping[str, str], meanings: Mapping[str, str]
) -> Iterator[str]:
    """Yield the lines of a section: its values, then the tables of its pairs of towers."""
    for key, value in values.items():
        said = comments.get(f"{name}.{key}") or meanings.get(f"{name}.{key}", "")
        if key == "pairs" and isinstance(value, list):
            continue
        if not (isinstance(value, list) and value and isinstance(value[0], Mapping)):
            yield from _commented(f"{_key(key)} = {toml_value(value)}", said)
            continue
        yield from _list_lines(key, f"{name}.{key}", value, comments, meanings)
    pairs = values.get("pairs", [])
    for place, pair in enumerate(pairs if isinstance(pairs, list) else ()):
        yield from ("", f"[[{name}.pairs]]")
        for side, options in pair.items():
            yield f"[{name}.pairs.{side}]"
            for option, value in options.items():
                said = "" if place else meanings.get(f"{name}.pairs.user.{option}", "")
                said = comments.get(f"{name}.pairs.{place}.{side}.{option}") or said
                yield from _commented(f"{_key(option)} = {toml_value(value)}", said)


def _list_lines(
    key: str, path: str, entries: Sequence[TomlValue], comments: Mapping[str, str], meanings: Mapping[str, str]
) -> Iterator[str]:
    """Yield the lines of a list of sections, an entry a line."""
    yield from [*_comment(comments.get(path) or meanings.get(path, "")), f"{_key(key)} = ["]
    for place, entry in enumerate(entries):
        lines = _commented(f"{toml_value(entry)},", comments.get(f"{path}.{place}", ""))
        yield from (f"  {line}" for line in lines)
    yield "]"


def _commented(line: str, text: str) -> list[str]:
    """Return a line with its comment: behind it where both fit, else before it."""
    both = f"{line}  # {_plain(text)}"
    return [line] if not text else [both] if len(both) <= WIDTH else [*_comment(text), line]


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(_plain(text), WIDTH, break_on_hyphens=False)]


def _plain(text: str) -> str:
    """Return a text on one line without control characters, which a comment may not hold."""
    return escape_controls(" ".join(text.split()))


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else tomli_w.dumps({key: 0}).partition(" = ")[0]


def toml_value(value: TomlValue) -> str:
    """Return a value as TOML on one line."""
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{_key(key)} = {toml_value(v)}' for key, v in value.items())} }}" if value else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    return tomli_w.dumps({"v": value}, multiline_strings=False).split("=", 1)[1].strip(" \n").replace("\t", "\\t")


_FEATURES = """
[[schema.features]]
name = "user_id"
side = "user"
kind = "categorical"

[[schema.features]]
name = "item_id"
side = "item"
kind = "categorical"
"""
