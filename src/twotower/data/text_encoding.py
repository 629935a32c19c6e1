"""Encoding of text files, which must be UTF-8."""

from __future__ import annotations

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
"""First bytes of the punctuation and of the 3,755 common characters of GB 2312. Small letters with accents and small Cyrillic ones, in one
byte each, make pairs of other bytes; capitals and other alphabets may not."""
_COMMON_SHARE = 0.6
"""Share of common characters above which text is taken for Chinese."""


def not_utf8(path: TablePath, where: str = "it is") -> DataError:
    """Return the error of a text file that is not UTF-8, with the command that converts it where its first bytes tell from what."""
    with path.open() as f:
        start = f.read(2**16)
    if start[:2] == b"\x1f\x8b":
        return DataError(f"{path}: is gzipped, and its name does not say so; add .gz to the name")
    known = "UTF-16" if start[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
    if not known:
        other = [char.encode("gb18030") for char in start.decode("gb18030", errors="ignore") if not char.isascii()]
        common = sum(len(char) == 2 and char[0] in _COMMON and char[1] > 0xA0 for char in other)
        known = "GB18030" if common > _COMMON_SHARE * len(other) else ""
    how = (
        f"it looks like {known}: convert it with iconv -f {known} -t UTF-8"
        if known
        else "convert the file, for example with iconv -f WINDOWS-1252 -t UTF-8 if Windows of Western Europe or America wrote it"
    )
    return DataError(f"{path}: {where} not UTF-8; {how}")
