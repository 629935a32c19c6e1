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


_CJK = ("\u3000", "\u9fff")
"""First and last character of Chinese and Japanese text."""


def not_utf8(path: TablePath, where: str = "it is") -> DataError:
    """Return the error of a text file that is not UTF-8, with the command that converts it where its first bytes tell from what."""
    with path.open() as f:
        start = f.read(2**16)
    if start[:2] == b"\x1f\x8b":
        return DataError(f"{path}: is gzipped, and its name does not say so; add .gz to the name")
    known = "UTF-16" if start[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
    if not known:
        text = start.decode("gb18030", errors="ignore")
        other = sum(not char.isascii() for char in text)
        known = "GB18030" if other and sum(_CJK[0] <= char <= _CJK[1] for char in text) > 0.8 * other else ""
    how = (
        f"it looks like {known}: convert it with iconv -f {known} -t UTF-8"
        if known
        else "convert the file, for example with iconv"
    )
    return DataError(f"{path}: {where} not UTF-8; {how}")
