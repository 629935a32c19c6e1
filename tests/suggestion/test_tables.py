"""Tables found by paths, folders, frames and names."""

from __future__ import annotations

import gzip
from datetime import date, timedelta
from pathlib import Path

import polars as pl
import pytest
from suggestion_worlds import log

from twotower.data.reading.table_path import TablePath
from twotower.data.reading.text_format import TextFormat
from twotower.errors import DataError, OpenRoles
from twotower.suggestion.suggest import suggest
from twotower.suggestion.tables import find_tables, sniff

USERS, ITEMS = (
    pl.DataFrame({"user_id": range(60), "age": range(60)}),
    pl.DataFrame({"item_id": range(40), "size": range(40)}),
)


@pytest.mark.parametrize(
    "names",
    [("users", "items", "interactions"), ("customers", "products", "orders"), ("u.user", "my_movies", "ratings")],
)
@pytest.mark.parametrize("ending", ["csv", "parquet", "tsv"])
def test_a_folder_has_a_file_for_each_table(tmp_path: Path, names: tuple[str, str, str], ending: str) -> None:
    names = tuple("user" if n == "u.user" else n for n in names)  # type: ignore[assignment]
    for name, frame in zip(names, (USERS, ITEMS, log()), strict=True):
        path = tmp_path / f"{name}.{ending}"
        if ending == "parquet":
            frame.write_parquet(path)
        else:
            frame.write_csv(path, separator="," if ending == "csv" else "\t")
    found = find_tables(tmp_path, folder=tmp_path)
    assert found.users is not None
    assert found.items is not None
    assert (found.users.equals(USERS), found.items.equals(ITEMS), found.interactions.equals(log())) == (True,) * 3
    assert found.section == {r: f"{n}.{ending}" for r, n in zip(("users", "items", "interactions"), names, strict=True)}


def test_dictionaries_of_texts_are_texts(tmp_path: Path) -> None:
    """As pandas, Arrow and DuckDB have columns of few texts."""

    def with_dictionaries(frame: pl.DataFrame) -> pl.DataFrame:
        return frame.with_columns(**{s.name: s.cast(pl.Enum(s.unique())) for s in frame if s.dtype == pl.String})

    rows = log().with_columns(
        pl.format("visitor {}", "user_id").alias("visitor"),
        pl.format("a{}", "item_id").alias("article"),
        pl.from_epoch("timestamp").dt.to_string("%Y-%m-%d %H:%M:%S").alias("read_at"),
    )
    rows = rows.select("visitor", "article", "read_at")
    names, days = rows["article"].unique(maintain_order=True), ("a good", "one more", "the last")
    articles = pl.DataFrame(
        {
            "article": names,
            "title": [f"{days[n % 3]} day in town {n}" for n in range(len(names))],
            "tags": [f"{n % 3}|{n % 4}" for n in range(len(names))],
            "released": [str(date(2020, 1, 1) + timedelta(days=7 * n)) for n in range(len(names))],
        }
    )
    texts = suggest(rows, items=articles)
    assert {f.kind for f in texts.schema.side("item")} >= {"multi_hot", "date"}
    assert (texts.schema.time, texts.schema.title) == ("read_at", "title")
    found = suggest(with_dictionaries(rows), items=with_dictionaries(articles))
    assert found.text == texts.text
    for name, frame in (("rows", rows), ("items", articles)):
        with_dictionaries(frame).write_parquet(tmp_path / f"{name}.parquet")
    found = suggest(tmp_path / "rows.parquet", items=tmp_path / "items.parquet")
    assert found.schema == texts.schema


def test_two_files_of_one_role_are_refused(tmp_path: Path) -> None:
    for name in ("ratings", "clicks"):
        log().write_csv(tmp_path / f"{name}.csv")
    with pytest.raises(DataError, match="clicks.csv and ratings.csv both look like interactions"):
        find_tables(tmp_path)


def test_each_table_has_a_separator_of_its_own(tmp_path: Path) -> None:
    log().write_csv(tmp_path / "clicks.csv", separator=";")
    USERS.write_csv(tmp_path / "users.csv", separator="\t")
    ITEMS.write_csv(tmp_path / "items.csv")
    found = find_tables(tmp_path, folder=tmp_path)
    assert found.users is not None
    assert found.items is not None
    assert (found.users.equals(USERS), found.items.equals(ITEMS), found.interactions.equals(log())) == (True,) * 3
    assert found.section is not None
    assert found.section["format"] == {"separator": ";", "separators": {"items": ",", "users": "\t"}}
    again = find_tables(tmp_path, folder=tmp_path, form=TextFormat.model_validate(found.section["format"]))
    assert again.users is not None
    assert again.users.equals(USERS)


def test_decimal_commas_are_read_where_no_comma_separates(tmp_path: Path) -> None:
    rated = log().with_columns(rating=pl.int_range(pl.len()) % 9 / 2)
    rated.write_csv(tmp_path / "ratings.csv", separator=";", decimal_comma=True)
    ITEMS.with_columns(price=pl.col("size") / 8).write_csv(tmp_path / "items.csv")
    found = find_tables(tmp_path, folder=tmp_path)
    assert found.items is not None
    assert found.interactions["rating"].dtype == found.items["price"].dtype == pl.Float64()
    assert found.section is not None
    assert found.section["format"] == {"separator": ";", "separators": {"items": ","}, "decimal": ","}
    assert "Numbers with a decimal comma are read: 'rating'" in suggest(tmp_path, folder=tmp_path).text
    rated.with_columns(half=pl.col("rating").cast(pl.String)).write_csv(
        tmp_path / "ratings.csv", separator=";", decimal_comma=True
    )
    found = find_tables(tmp_path, folder=tmp_path)  # points in one column, commas in another
    assert found.interactions["rating"].dtype == pl.String


def parts(tmp_path: Path, **test: pl.Expr) -> pl.DataFrame:
    log(length=8)[:400].write_csv(tmp_path / "train.csv")
    log(length=8)[400:].with_columns(**test).write_csv(tmp_path / "test.csv")
    return pl.concat([log(length=8)[:400], log(length=8)[400:]])


def test_parts_side_by_side_are_the_parts(tmp_path: Path) -> None:
    frame = parts(tmp_path)
    found = find_tables(tmp_path, folder=tmp_path)
    assert found.interactions.equals(frame)
    assert found.section == {"train": "train.csv", "test": "test.csv"}
    assert found.notes == ("read: train = train.csv, test = test.csv",)


def test_lines_of_users_are_read(tmp_path: Path) -> None:
    (tmp_path / "s.txt").write_text("7 1 2 3\n8 2\n9 3 1\n")
    found = find_tables(tmp_path / "s.txt", folder=tmp_path)
    assert found.layout == "sequences"
    assert found.interactions["item_id"].to_list() == [1, 2, 3, 2, 3, 1]
    assert found.section == {"interactions": "s.txt", "format": {"layout": "sequences"}}


@pytest.mark.parametrize("name", ["ml-1m", "films.zip"])
def test_a_data_set_has_a_schema_of_its_own(name: str) -> None:
    with pytest.raises(DataError, match=r"the recipes of examples/recipes read by data.dataset; name tables"):
        find_tables(name)


def test_what_is_no_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        find_tables(tmp_path / "none.csv")
    with pytest.raises(DataError, match="the table has no rows"):
        find_tables(log()[:0])
    with pytest.raises(DataError, match="give all tables as frames or as paths"):
        find_tables(tmp_path / "none.csv", users=USERS)


def test_the_index_that_pandas_writes_is_no_column(tmp_path: Path) -> None:
    rows = pl.DataFrame(
        {
            "client": [i % 20 for i in range(200)],
            "item": [i * 7 % 30 for i in range(200)],
            "__index_level_0__": range(200),
        }
    )
    rows.write_parquet(tmp_path / "rows.parquet")
    for found in (find_tables(tmp_path / "rows.parquet"), find_tables(rows)):
        assert found.interactions.columns == ["client", "item"]
    assert suggest(tmp_path / "rows.parquet").schema.user_id == "client"


def test_a_line_of_comments_above_the_header_is_to_be_removed(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("# made by x\nuser_id,item_id\n1,2\n1,3\n2,3\n")
    with pytest.raises(DataError, match="remove lines above the header"):
        find_tables(tmp_path / "log.csv")


def test_a_file_without_a_header_line_is_asked_about(tmp_path: Path) -> None:
    log().write_csv(tmp_path / "log.csv", include_header=False)
    with pytest.raises(OpenRoles) as asked:
        suggest(tmp_path / "log.csv")
    assert asked.value.arguments == ["user", "item", "time"]
    assert "    column_1  0, 1, 2" in asked.value.lines
    found = suggest(tmp_path / "log.csv", user="column_1", item="column_2", time="column_3", folder=tmp_path)
    assert found.config.data.format.columns == ("column_1", "column_2", "column_3")
    named = suggest(tmp_path / "log.csv", overrides=['data.format.columns=["user","item","time"]'])
    assert named.recipe == found.recipe == suggest(log()).recipe
    assert (named.schema.user_id, named.schema.time) == ("user", "time")


@pytest.mark.parametrize(
    ("files", "roles"),
    [
        (["train.csv", "valid.csv", "test.csv"], {"train": "train.csv", "validation": "valid.csv", "test": "test.csv"}),
        (["log.train.csv", "log.test.csv"], {"train": "log.train.csv", "test": "log.test.csv"}),
        (["train.csv"], {"interactions": "train.csv"}), (["train.csv", "valid.csv"], {"interactions": "train.csv"}),
        (["用户.csv", "商品.csv", "日志.csv"], {"users": "用户.csv", "items": "商品.csv", "interactions": "日志.csv"}),
    ],
)  # fmt: skip
def test_files_have_roles_by_their_names(tmp_path: Path, files: list[str], roles: dict[str, str]) -> None:
    for name in files:
        {"用户.csv": USERS, "商品.csv": ITEMS}.get(name, log()).write_csv(tmp_path / name)
    found = find_tables(tmp_path, folder=tmp_path)
    assert found.section == roles
    read = {file for part in roles.values() for file in files if Path(file).match(part)}
    assert all(f"not read: {file}: " in "".join(found.notes) for file in {*files} - read)


ROWS = "1 10 5\n2 11 3\n1 12 4\n3 10 5\n"


def sniffed(tmp_path: Path, name: str, text: str | bytes, encoding: str | None = None) -> TextFormat:
    content = text.encode() if isinstance(text, str) else text
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return sniff(TablePath(tmp_path / name, encoding=encoding))


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.txt", "a.csv.gz"])
@pytest.mark.parametrize("separator", [",", "\t", ";", "|", " "])
def test_the_separator_is_sniffed(tmp_path: Path, name: str, separator: str) -> None:
    found = sniffed(tmp_path, name, ("user item rating\n" + ROWS).replace(" ", separator))
    own = {"a.csv": ",", "a.csv.gz": ",", "a.tsv": "\t", "a.txt": " "}[name]
    assert found == TextFormat(separator="" if separator == own else separator)


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("user;item;x\n7;8;1,5\n9;8;0,5\n7;6;2,0\n", TextFormat(separator=";")),
        ("userId,title\nu1,i1\nu2,i2\nu1,i2\n", TextFormat()), ('user,item\nu1,"a, b"\nu2,"c, d"\n', TextFormat()),
        ("u1,i1\nu2,i1\nu1,i2\n", TextFormat(columns=("column_1", "column_2"))),
        (ROWS.replace(" ", ";"), TextFormat(separator=";", columns=("column_1", "column_2", "column_3"))),
        ("1,5,6,7\n2,6\n3,5,7,8,9\n", TextFormat(layout="sequences")), ("a,b\n1,2,3\na,5\n", TextFormat()),
    ],
)  # fmt: skip
def test_the_form_of_a_text_file_is_sniffed(tmp_path: Path, text: str, form: TextFormat) -> None:
    assert sniffed(tmp_path, "a.csv", text) == form


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16"])
def test_another_encoding_is_refused_and_read_by_its_setting(tmp_path: Path, encoding: str) -> None:
    rows = log().select(pl.format("Käufer {}", "user_id").alias("user"), "item_id", "timestamp")
    (tmp_path / "log.csv").write_bytes(rows.write_csv(separator=";").encode(encoding))
    setting = "windows-1252" if encoding == "cp1252" else encoding
    with pytest.raises(DataError, match=rf"set data\.format\.encoding = '{setting}'"):
        suggest(tmp_path / "log.csv")
    found = suggest(tmp_path / "log.csv", overrides=[f"data.format.encoding={encoding}"], folder=tmp_path)
    assert found.config.data.format == TextFormat(separator=";", encoding=encoding)
