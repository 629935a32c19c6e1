"""Forms of text files, guessed from their first lines."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from twotower.data.table_path import TablePath
from twotower.data.text_format import TextFormat
from twotower.errors import DataError
from twotower.suggestion.text_form import guess_form

ROWS = "1 10 5\n2 11 3\n1 12 4\n3 10 5\n"


def of(tmp_path: Path, name: str, text: str) -> TextFormat:
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return guess_form(TablePath(path))


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.txt", "a.csv.gz"])
@pytest.mark.parametrize("separator", [",", "\t", ";", "|", " "])
def test_the_separator_is_that_of_equal_rows(tmp_path: Path, name: str, separator: str) -> None:
    found = of(tmp_path, name, ("user item rating\n" + ROWS).replace(" ", separator))
    own = {"a.csv": ",", "a.csv.gz": ",", "a.tsv": "\t", "a.txt": " "}[name]
    assert found == TextFormat(separator="" if separator == own else separator)


@pytest.mark.parametrize("name", ["a.csv", "a.txt"])
@pytest.mark.parametrize("separator", ["\t", ";", "|"])
def test_a_decimal_comma_in_every_line_separates_nothing(tmp_path: Path, name: str, separator: str) -> None:
    found = of(tmp_path, name, "7 8 1,5\n9 8 0,5\n7 6 2,0\n".replace(" ", separator))
    assert (found.separator, len(found.columns)) == (separator, 3)


@pytest.mark.parametrize("text", ["7,8,1|5\n9,8,2|5\n", "u7,a;b\nu9,a;b\nu7,c;d\n", "1,5\n2,6\n1,6\n"])
def test_a_comma_between_other_values_separates_them(tmp_path: Path, text: str) -> None:
    assert of(tmp_path, "a.csv", text).separator == ""


@pytest.mark.parametrize("first", ["user,item", "a,b", "userId,title"])
def test_a_header_line_names_the_columns(tmp_path: Path, first: str) -> None:
    assert of(tmp_path, "a.csv", f"{first}\nu1,i1\nu2,i2\nu1,i2\n") == TextFormat()


@pytest.mark.parametrize("text", [ROWS.replace(" ", ","), "u1,i1\nu2,i1\nu1,i2\n"])
def test_without_a_header_line_columns_get_names(tmp_path: Path, text: str) -> None:
    found = of(tmp_path, "a.csv", text)
    assert found.columns == tuple(f"column_{i + 1}" for i in range(text.split("\n")[0].count(",") + 1))


@pytest.mark.parametrize(
    "text", ["1 5 6 7\n2 6\n3 5 7 8 9\n", "ann a b c\nbob b\n", "1 2 3 4 5 6 7\n2 3 4 5 6 7 8\n", "1\t5\t6\n2\t6\n"]
)
def test_lines_of_users_are_sequences(tmp_path: Path, text: str) -> None:
    assert of(tmp_path, "a.txt", text).layout == "sequences"


def test_lines_that_repeat_their_first_value_are_no_sequences(tmp_path: Path) -> None:
    assert of(tmp_path, "a.txt", "1 5 6 7\n1 6\n1 5 7 8 9\n").layout == "rows"


def test_quoted_values_may_hold_the_separator(tmp_path: Path) -> None:
    assert of(tmp_path, "a.csv", 'item,title\n1,"Oz, the great"\n2,"a, b, c"\n') == TextFormat()


@pytest.mark.parametrize(("data", "words"), [(b"", "is empty"), (b"\n\n", "is empty"), (b"\xff\xfe1,2\n", "not UTF-8")])
def test_unreadable_files_are_one_line(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "a.csv").write_bytes(data)
    with pytest.raises(DataError, match=words):
        guess_form(TablePath(tmp_path / "a.csv"))


def test_a_header_that_names_a_column_twice_is_a_header(tmp_path: Path) -> None:
    assert of(tmp_path, "a.csv", "user_id,item_id,item_id\n1,2,2\n2,3,3\n1,3,3\n") == TextFormat()
    assert len(of(tmp_path, "b.csv", "u1,i1,i1\nu2,i2,i2\nu1,i2,i2\n").columns) == 3


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (
            "用户,商品\n用户1,商品2\n".encode("gbk"),
            "looks like GB18030: convert it with `iconv -f GB18030 -t UTF-8 OLD > NEW` if it is Chinese; or save it from a spreadsheet as 'CSV UTF-8'",
        ),
        ("user,item\n1,2\n".encode("utf-16"), "looks like UTF-16: convert it with `iconv -f UTF-16"),
        ("用户,说明\n1,“好”、（新）\n".encode("gbk"), "looks like GB18030"),
        (
            "user,item\nJosé,2\n".encode("latin-1"),
            "not UTF-8; convert the file, for example with `iconv -f WINDOWS-1252",
        ),
        ("shop,item\nSüd,2\nNordöst,3\nÖstlich,3\n".encode("cp1252"), "not UTF-8; convert the file"),
        (
            "покупатель,товар\nМосква,чай\n".encode("cp1251"),
            "looks like WINDOWS-1251: convert it with `iconv -f WINDOWS-1251",
        ),
        ("ПОКУПАТЕЛЬ,ТОВАР\nМОСКВА,ЧАЙ ЧЁРНЫЙ\n".encode("cp1251"), "looks like WINDOWS-1251: "),
        ("ПОКУПЕЦЬ,МІСТО\nЇЖАК,КИЇВ\nЄВА,ЛЬВІВ\n".encode("cp1251"), "looks like WINDOWS-1251: "),
        ("user,item\nАННА,чай\n".encode("cp1251"), "looks like WINDOWS-1251: "),
        (
            "user,item\nМОСКВА,2\n".encode("cp1251"),
            "looks like GB18030 or WINDOWS-1251 or KOI8-R: .*GB18030 -t UTF-8 OLD > NEW` if it is Chinese, or with .*WINDOWS-1251",
        ),
        ("用户,城市\n刘洋,重庆\n张伟,哈尔滨\n".encode("gb18030"), "looks like GB18030: "),
        ("用户,城市\n朱镕基,北京\n李小龙,上海\n".encode("gb18030"), "looks like GB18030: "),
        ("ÄRGER,ÜBER\nÄÖÜ,Größe\nœuvre,“Élan”\n".encode("cp1252"), "not UTF-8; convert the file"),
        (gzip.compress(b"user,item\n1,2\n", mtime=0), "is gzipped, and its name does not say so; add .gz"),
        (b"sep=;\nuser;item\n1;2\n", "the first line is 'sep=;', which spreadsheets alone read"),
        (b"user,item\r1,2\r2,3\r", "its lines end with a carriage return alone; convert it with `tr "),
        (b"PK\x03\x04\x14\x00\x06\x00\xd2\xf6\n", "is no text but a workbook of a spreadsheet, or a zip"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1\n", "is no text but a workbook of a spreadsheet"),
        (b"PAR1\x15\x04\xd2\xf6\n", "is no text but Parquet; name it .parquet"),
        (b"user,note\n1," + b"n" * 140_000, "cannot be read as lines of values .*; does a value begin with a quote"),
    ],
)
def test_other_files_say_what_they_are(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "a.csv").write_bytes(data)
    with pytest.raises(DataError, match=words):
        guess_form(TablePath(tmp_path / "a.csv"))


RUSSIAN = "покупатель,товар\nМосква,чай\n"
GREEK = "χρήστης,προϊόν\nΑθήνα,καφές\nΠάτρα,τυρί και ψωμί\n"


@pytest.mark.parametrize(
    ("text", "encoding", "likely"),
    [
        (RUSSIAN, "WINDOWS-1251", "WINDOWS-1251"),
        (RUSSIAN, "KOI8-R", "KOI8-R"),
        (RUSSIAN, "ISO-8859-5", "ISO-8859-5"),
        ("покупатель,ягода\nМосква,земляника лесная\n", "MACCYRILLIC", "MACCYRILLIC"),
        (RUSSIAN.lower(), "WINDOWS-1251", "WINDOWS-1251"),
        (RUSSIAN.lower(), "KOI8-R", "WINDOWS-1251 or KOI8-R"),
        (RUSSIAN.upper(), "WINDOWS-1251", "WINDOWS-1251 or KOI8-R"),
        (RUSSIAN.lower(), "ISO-8859-5", "ISO-8859-5"),
        (GREEK, "WINDOWS-1253", "WINDOWS-1253"),
        (GREEK.lower(), "WINDOWS-1253", "WINDOWS-1253"),
    ],
)
def test_alphabets_are_told_apart_by_their_words(tmp_path: Path, text: str, encoding: str, likely: str) -> None:
    """Each conversion succeeds, and a wrong one gives other letters. So the message says how one sees that, and what to try then."""
    (tmp_path / "a.csv").write_bytes(text.encode(encoding))
    with pytest.raises(DataError) as e:
        guess_form(TablePath(tmp_path / "a.csv"))
    message, _, hint = str(e.value).rpartition("; or save it from a spreadsheet as ")
    assert hint == "'CSV UTF-8'"
    told, _, then = message.partition("; if that gives no words, or capitals within words, try ")
    letters = "Greek" if text.lower() == GREEK.lower() else "Cyrillic"
    names = likely.split(" or ")
    commands = ", or with ".join(f"`iconv -f {name} -t UTF-8 OLD > NEW` if its letters are {letters}" for name in names)
    assert told.endswith(f"it looks like {likely}: convert it with {commands}")
    others = {"WINDOWS-1251", "KOI8-R", "ISO-8859-5", "WINDOWS-1253", "MACCYRILLIC"} - {*names}
    assert {other.partition(" ")[0] for other in then.split(", ")} == others


def test_damaged_gzip_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"user,item\n" * 100)[:-12])
    with pytest.raises(DataError, match="cannot be read"):
        guess_form(TablePath(tmp_path / "a.csv.gz"))
    (tmp_path / "a.csv.gz").write_bytes(b"user,item\n")
    with pytest.raises(DataError, match="cannot be read"):
        guess_form(TablePath(tmp_path / "a.csv.gz"))
