"""Encoding of text files, which must be UTF-8."""

from __future__ import annotations

import re

from twotower.data.table_path import TablePath
from twotower.errors import DataError


def check_utf8(path: TablePath) -> None:
    """Raise DataError with the number of the first line that is not UTF-8."""
    with path.open() as f:
        for number, line in enumerate(f, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                raise not_utf8(path, f"line {number} is") from None


_COMMON = (*range(0xA1, 0xA4), *range(0xB0, 0xD8))
"""First bytes of the punctuation and of the 3,755 common characters of GB 2312."""
_COMMON_SHARE = 0.6
"""Share of common characters above which text may be Chinese. Small letters of one byte each make pairs of other bytes, capitals the same."""
_ODD_SHARE = 0.2
"""Share of odd counts of bytes beyond ASCII in a row up to which text may be Chinese, whose characters have two; about half of the words of
an alphabet have an odd count."""
_LETTERS = re.compile(rb"[\xa8\xaa\xaf\xb2\xb3\xb8\xba\xbf-\xff]")
"""Letters of WINDOWS-1251, Ukrainian ones included. About 60 % of the bytes of Chinese text are among them."""
_LETTER_SHARE = 0.95
"""Share of letters from which on text may be of an alphabet of one byte a letter."""


_WORDS = re.compile(rb"(?<![A-Za-z\x80-\xff])[\x80-\xff]{2,}(?![A-Za-z\x80-\xff])")
"""Words without a letter of ASCII. Western letters beyond ASCII stand among those of ASCII."""
_IF = {"WINDOWS-1251": " if its letters are Cyrillic (WINDOWS-1253 if Greek)"}


def _likely_encodings(start: bytes) -> list[str]:
    """Return the encodings that the bytes look like: GB18030, WINDOWS-1251, both where few bytes tell no difference, or none."""
    rows = re.findall(rb"[\x80-\xff]+", start)
    beyond = b"".join(rows)
    if not beyond:
        return []
    found = []
    other = [char.encode("gb18030") for char in start.decode("gb18030", errors="ignore") if not char.isascii()]
    common = sum(len(char) == 2 and char[0] in _COMMON and char[1] > 0xA0 for char in other)
    if common > _COMMON_SHARE * len(other) and sum(len(row) % 2 for row in rows) <= _ODD_SHARE * len(rows):
        found.append("GB18030")
    words = b"".join(_WORDS.findall(start))
    if len(_LETTERS.findall(beyond)) >= _LETTER_SHARE * len(beyond) and 2 * len(words) > len(beyond):
        found.append("WINDOWS-1251")
    return found


def not_utf8(path: TablePath, where: str = "it is") -> DataError:
    """Return the error of a text file that is not UTF-8, with the command that converts it where its first bytes tell from what."""
    with path.open() as f:
        start = f.read(2**16)
    if start[:2] == b"\x1f\x8b":
        return DataError(f"{path}: is gzipped, and its name does not say so; add .gz to the name")
    known = ["UTF-16"] if start[:2] in (b"\xff\xfe", b"\xfe\xff") else _likely_encodings(start)
    if not known:
        how = "convert the file, for example with iconv -f WINDOWS-1252 -t UTF-8 if Windows of Western Europe or America wrote it"
    else:
        commands = (f"iconv -f {name} -t UTF-8{_IF.get(name, '')}" for name in known)
        how = f"it looks like {' or '.join(known)}: convert it with {', or with '.join(commands)}"
    return DataError(f"{path}: {where} not UTF-8; {how}")
