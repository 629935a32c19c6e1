"""Encoding of text files, which must be UTF-8."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable
from contextlib import suppress

from twotower.data.table_path import TablePath
from twotower.errors import DataError


def check_utf8(path: TablePath) -> None:
    """Raise DataError with the number of the first line that is not UTF-8. Damage of a gzipped file ends the search."""
    with suppress(EOFError, OSError, zlib.error), path.open() as f:
        for number, line in enumerate(f, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                raise not_utf8(path, f"line {number} is") from None


_COMMON = (*range(0xA1, 0xA4), *range(0xB0, 0xD8))
"""First bytes of the punctuation and of the 3,755 common characters of GB 2312."""
_COMMON_SHARE = 0.6
"""Share of common characters above which text may be Chinese. Small letters of one byte each make pairs of other bytes,
capitals the same."""
_ODD_SHARE = 0.2
"""Share of odd counts of bytes beyond ASCII in a row up to which text may be Chinese, whose characters have two; about
half of the words of an alphabet have an odd count."""
_LETTERS = re.compile(rb"[\xa8\xaa\xaf\xb2\xb3\xb8\xba\xbf-\xff]")
"""Letters of WINDOWS-1251, Ukrainian ones included. About 60 % of the bytes of Chinese text are among them."""
_LETTER_SHARE = 0.95
"""Share of letters from which on text may be of an alphabet of one byte a letter."""


_WORDS = re.compile(rb"(?<![A-Za-z\x80-\xff])[\x80-\xff]{2,}(?![A-Za-z\x80-\xff])")
"""Words without a letter of ASCII. Western letters beyond ASCII stand among those of ASCII."""
_ALPHABETS = {
    "WINDOWS-1251": "Cyrillic", "KOI8-R": "Cyrillic", "ISO-8859-5": "Cyrillic", "WINDOWS-1253": "Greek",
    "MACCYRILLIC": "Cyrillic",
}  # fmt: skip
"""Encodings of one byte a letter that are distinguished, the more usual first -> their letters."""
_IF = {"GB18030": " if it is Chinese", **{name: f" if its letters are {of}" for name, of in _ALPHABETS.items()}}
_SMALL, _CAPITAL = "а-яёіїєґўά-ώ", "А-ЯЁІЇЄҐЎΆΈ-ΏΑ-Ϋ"
_MISREAD = re.compile(
    rf"[{_SMALL}](?=[{_CAPITAL}])|[ЂЃЅЈЉЊЋЌЏђѓѕјљњћќџΐΰ]|ς(?=[ά-ώ])|σ(?![ά-ώ])|[¬√ƒ≈∆÷\u2500-\u259f\ufffd]"
)
"""Signs of a wrong alphabet: capitals after small letters, rare letters, a sigma at the wrong place of a word, and
characters of no word."""
_CAPITALS = re.compile(f"[{_CAPITAL}]{{2,}}")


def _likely_alphabets(start: bytes) -> list[str]:
    """Return the encoding whose letters make the most usual words of the bytes, and WINDOWS-1251 too if it makes
    capitals alone of them."""
    texts = {name: start.decode(name, errors="replace") for name in _ALPHABETS}
    odd = {name: (len(_MISREAD.findall(text)), len(_CAPITALS.findall(text))) for name, text in texts.items()}
    best, usual = min(odd, key=odd.__getitem__), next(iter(_ALPHABETS))
    return [usual, best] if best != usual and odd[best][0] == odd[usual][0] else [best]


def _likely_encodings(start: bytes) -> list[str]:
    """Return the encodings that the bytes look like: GB18030, those of an alphabet, both where few bytes tell no
    difference, or none."""
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
        found += _likely_alphabets(start)
    return found


_NOT_TEXT = {
    b"\x1f\x8b": "is gzipped, and its name does not say so; add .gz to the name",
    b"PK\x03\x04": "is no text but a workbook of a spreadsheet, or a zip; open it there and save it as 'CSV UTF-8', or "
    "unpack it",
    b"\xd0\xcf\x11\xe0": "is no text but a workbook of a spreadsheet; open it there and save it as 'CSV UTF-8'",
    b"PAR1": "is no text but Parquet; name it .parquet",
}
"""First bytes of files of other kinds, and what to do with them."""


def check_line_ends(path: TablePath, first_line: Iterable[str | None]) -> None:
    """Raise DataError if a value of a file's first line holds ends of lines of one character, as old spreadsheets write
    them."""
    if any(re.search(r"\r(?!\n)", value or "") for value in first_line):
        raise DataError(
            f"{path}: its lines end with a carriage return alone; convert it with `tr '\\r' '\\n' < OLD > NEW`, or "
            "save it from a spreadsheet as 'CSV UTF-8'"
        )


class NotUtf8Error(DataError):
    """A text file in another encoding: `encoding` is the likely one that the message names, "" for none."""

    encoding = ""


def not_utf8(path: TablePath, where: str = "it is") -> DataError:
    """Return the error of a text file that is not UTF-8, with the command that converts it where its first bytes tell
    from what."""
    with path.open() as f:
        start = f.read(2**16)
    if other := next((what for mark, what in _NOT_TEXT.items() if start.startswith(mark)), ""):
        return DataError(f"{path}: {other}")
    known = ["UTF-16"] if start[:2] in (b"\xff\xfe", b"\xfe\xff") else _likely_encodings(start)
    if not known:
        convert = "convert the file, for example with `iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW`"
        western = " if Windows of Western Europe or America wrote it"
        setting = f"set data.format.encoding = 'windows-1252'{western}, or {convert}"
        how = setting if path.encoding else convert + western
    else:
        commands = (f"`iconv -f {name} -t UTF-8 OLD > NEW`{_IF.get(name, '')}" for name in known)
        how = f"it looks like {' or '.join(known)}: convert it with {', or with '.join(commands)}"
        if path.encoding:
            settings = (f"set data.format.encoding = '{name.lower()}'{_IF.get(name, '')}" for name in known)
            convert = f"convert the file with `iconv -f {known[0]} -t UTF-8 OLD > NEW`"
            how = f"it looks like {' or '.join(known)}: {', or '.join([*settings, convert])}"
        if any(name in _ALPHABETS for name in known):
            others = [f"{name} ({of})" for name, of in _ALPHABETS.items() if name not in known]
            how += f"; if that gives no words, or capitals within words, try {', '.join(others)}"
    error = NotUtf8Error(f"{path}: {where} not UTF-8; {how}; or save it from a spreadsheet as 'CSV UTF-8'")
    error.encoding = (known or ["windows-1252"])[0].lower() if path.encoding else ""
    return error
