"""TOML with comments: sections, tables of towers, and values on one line each."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping

import tomli_w

from twotower.config.reference import config_tables, schema_tables
from twotower.config.toml import TomlValue
from twotower.escaping import escape_controls

WIDTH = 110
"""Width of comments and lists."""

Comments = Mapping[str, str]
"""Comment by dotted key, such as train.epochs."""


def write_document(settings: Mapping[str, TomlValue], head: str, comments: Comments) -> str:
    """Return settings as TOML, after `head` as a comment. A key without a comment has the first sentence of its meaning in the
    reference."""
    lines = [line for part in head.splitlines() for line in _comment(part)]
    meanings = _meanings()
    for name, section in settings.items():
        assert isinstance(section, Mapping)
        lines += ["", f"[{name}]", *_section(name, section, comments, meanings)]
    return "\n".join(lines) + "\n"


def _section(name: str, section: Mapping[str, TomlValue], comments: Comments, meanings: Comments) -> Iterator[str]:
    """Yield the lines of a table: its values, then its towers and other tables that are lists."""
    tables = {key: value for key, value in section.items() if _is_tables(key, value)}
    for key, value in section.items():
        if key not in tables:
            path = f"{name}.{key}"
            yield from _value(path, key, value, comments, comments.get(path) or meanings.get(path, ""))
    for key, value in tables.items():
        assert isinstance(value, list)
        for place, entry in enumerate(value):
            yield from ("", f"[[{name}.{key}]]")
            for inner, options in entry.items():
                yield f"[{name}.{key}.{inner}]"
                path = f"{name}.{key}.{place}.{inner}"
                for option, v in options.items():
                    said = comments.get(f"{path}.{option}") or (
                        meanings.get(f"{name}.{key}.user.{option}", "") if not place else ""
                    )
                    yield from _commented(f"{_key(option)} = {toml_value(v)}", said)


def _is_tables(key: str, value: TomlValue) -> bool:
    """Return True for a list whose elements hold tables alone: pairs of towers."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(entry, Mapping) and all(isinstance(v, Mapping) for v in entry.values()) for entry in value)
    )


def _value(path: str, key: str, value: TomlValue, comments: Comments, said: str) -> Iterator[str]:
    if not (isinstance(value, list) and value and all(isinstance(entry, Mapping) for entry in value)):
        yield from _commented(f"{_key(key)} = {toml_value(value)}", said)
        return
    yield from _comment(said)
    yield f"{_key(key)} = ["
    for place, entry in enumerate(value):
        said = comments.get(f"{path}.{place}", "")
        yield from (f"  {line}" for line in _commented(f"{toml_value(entry)},", said))
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


def _meanings() -> dict[str, str]:
    """Return the first sentence of the meaning of each option, by its dotted key."""
    found = dict[str, str]()
    for table in (*schema_tables(), *config_tables()):
        if not table.kind:
            for option in table.options:
                sentence = re.split(r"(?<=\.) |; ", " ".join(option.meaning.split()), maxsplit=1)[0]
                found.setdefault(f"{table.name}.{option.key}", sentence.rstrip(".") + ".")
    return found


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else tomli_w.dumps({key: 0}).partition(" = ")[0]


def toml_value(value: TomlValue) -> str:
    """Return a value as TOML on one line."""
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{_key(key)} = {toml_value(v)}' for key, v in value.items())} }}" if value else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    return tomli_w.dumps({"v": value}, multiline_strings=False).split("=", 1)[1].strip(" \n").replace("\t", "\\t")
