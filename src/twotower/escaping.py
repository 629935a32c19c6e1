"""Data in output: control characters escaped for a terminal, words quoted for a shell."""

from __future__ import annotations

import os
import re
import shlex
import unicodedata
from pathlib import Path

_CONTROL_CATEGORIES = ("Cc", "Cs", "Zl", "Zp")  # controls, lone surrogates, separators of lines and paragraphs
_DIRECTION_CONTROLS = frozenset(chr(c) for c in (*range(0x202A, 0x202F), *range(0x2066, 0x206A)))

REPRESENTATION = 200


def escape_controls(text: str) -> str:
    """Return one line in which control characters and changes of writing direction are escaped as in `\\u001b`.

    JSON stays equivalent JSON."""
    if text.isprintable():
        return text
    return "".join(f"\\u{ord(c):04x}" if _is_control(c) else c for c in text)


def representation(kind: type, facts: str) -> str:
    """Return the name of a class and facts, on one line of at most REPRESENTATION characters, for a `__repr__`."""
    text = escape_controls(f"{kind.__name__}({facts})")
    return text if len(text) <= REPRESENTATION else f"{text[: REPRESENTATION - 2]}…)"


def _is_control(character: str) -> bool:
    return unicodedata.category(character) in _CONTROL_CATEGORIES or character in _DIRECTION_CONTROLS


def python_literal(value: str | Path) -> str:
    """Return a Python string literal for a call in backticks, such as `rollback(store='a b')`."""
    return repr(str(value)).replace("`", "\\x60")


WINDOWS = os.name == "nt"
_NEEDS_NO_QUOTES = re.compile(r"(?![@~-])[\w@+=:./\\~-]+|-[\w=:/\\-]+")
"""Words without a special meaning in both shells of Windows.

PowerShell has one for a comma, for an '@' or '~' at the beginning, and for a dot after a '-'."""


def shell_command(*words: str | int | Path, program: str = "twotower", windows: bool = WINDOWS) -> str:
    """Return a command line quoted for a POSIX shell or for Windows, with './' before a `Path` that begins with '-'."""
    found = [str(w) for w in words]
    paths = [isinstance(w, Path) and str(w).startswith("-") for w in words]
    quoted = (shell_word(f"./{w}" if path else w, windows) for w, path in zip(found, paths, strict=True))
    return " ".join([program, *quoted])


def shell_word(word: str, windows: bool = WINDOWS) -> str:
    """Return a word quoted for a POSIX shell, or in double quotes for cmd and PowerShell.

    In these cmd expands %NAME% and PowerShell $name. A double quote in a word is escaped for cmd alone."""
    if windows:
        word = escape_controls(word)
        if _NEEDS_NO_QUOTES.fullmatch(word):
            return word
        # as CommandLineToArgvW reads it
        escaped = re.sub(r'(\\*)("|$)', lambda m: m[1] * 2 + ("\\" + m[2] if m[2] else ""), word)
        return f'"{escaped}"'
    if not any(map(_is_control, word)):
        return shlex.quote(word)
    inside = "".join(_byte_escapes(c) if _is_control(c) else f"\\{c}" if c in "\\'" else c for c in word)
    return f"$'{inside}'"


def _byte_escapes(character: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in os.fsencode(character))
