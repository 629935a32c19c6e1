"""Tables found by paths, folders, frames and names."""

from __future__ import annotations

import gzip
import zipfile
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from movielens_archives import ML_1M, zipped
from suggestion_worlds import log

from twotower.data.text_format import TextFormat
from twotower.errors import ConfigError, DataError
from twotower.suggestion.suggest import suggest
from twotower.suggestion.tables import find_tables

USERS, ITEMS = (
    pl.DataFrame({"user_id": range(60), "age": range(60)}),
    pl.DataFrame({"item_id": range(40), "size": range(40)}),
)


@pytest.mark.parametrize("names", [("users", "items", "interactions"), ("customers", "products", "orders"), ("u.user", "my_movies", "ratings")])  # fmt: skip
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


def test_a_folder_of_pieces_is_one_table(tmp_path: Path) -> None:
    for part in range(3):
        log(seed=part).write_parquet(tmp_path / f"part-{part}.parquet")
    found = find_tables(tmp_path, folder=tmp_path.parent)
    assert found.interactions.height == 3 * log().height
    assert found.section == {"interactions": tmp_path.name}


def test_tables_are_named_apart(tmp_path: Path) -> None:
    log().write_csv(tmp_path / "a.csv")
    USERS.write_csv(tmp_path / "b.csv")
    found = find_tables(tmp_path / "a.csv", users=tmp_path / "b.csv", folder=tmp_path)
    assert found.section == {"users": "b.csv", "interactions": "a.csv"}
    assert found.users is not None


@pytest.mark.parametrize("dictionary", ["Categorical", "Enum"])
def test_dictionaries_of_texts_are_texts(tmp_path: Path, dictionary: str) -> None:
    """As pandas, Arrow and DuckDB have columns of few texts."""

    def with_dictionaries(frame: pl.DataFrame) -> pl.DataFrame:
        of_names = {
            s.name: s.cast(pl.Enum(s.unique()) if dictionary == "Enum" else pl.Categorical)
            for s in frame
            if s.dtype == pl.String
        }
        return frame.with_columns(**of_names)

    rows = log().with_columns(
        pl.format("visitor {}", "user_id").alias("visitor"),
        pl.format("a{}", "item_id").alias("article"),
        pl.from_epoch("timestamp").dt.to_string("%Y-%m-%d %H:%M:%S").alias("read at"),
    )
    rows = rows.select("visitor", "article", "read at")
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
    assert (texts.schema.time, texts.schema.title) == ("read at", "title")
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


def test_a_folder_without_a_log_is_refused(tmp_path: Path) -> None:
    USERS.write_csv(tmp_path / "users.csv")
    with pytest.raises(DataError, match="no file of interactions"):
        find_tables(tmp_path)


def test_files_of_other_columns_are_no_pieces(tmp_path: Path) -> None:
    log().write_csv(tmp_path / "a.csv")
    USERS.write_csv(tmp_path / "b.csv")
    with pytest.raises(DataError, match="b.csv.*or name the file of the interactions, and give `users` and `items`"):
        find_tables(tmp_path)


def test_columns_without_names_are_named(tmp_path: Path) -> None:
    rated = log().select("user_id", "item_id", pl.lit(1).alias("r") + pl.col("item_id") % 5, "timestamp")
    rated.write_csv(tmp_path / "u.csv", include_header=False)
    found = find_tables(tmp_path / "u.csv", folder=tmp_path)
    assert found.interactions.columns == ["user_id", "item_id", "rating", "time"]
    assert found.section == {"interactions": "u.csv", "format": {"columns": ["user_id", "item_id", "rating", "time"]}}


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ((pl.col("item_id") + pl.col("user_id") * 3) % 2, "label"),
        ((pl.col("item_id") + pl.col("user_id") * 3) % 2 == 0, "label"),
        (pl.lit(1), "column_3"),
        (1 + pl.col("item_id") % 2, "column_3"),
        (1 + pl.col("item_id") % 5, "rating"),
        (pl.col("item_id") % 10 / 2, "rating"),
        (pl.col("item_id") % 5 / 7, "column_3"),
        (pl.col("item_id") % 5 * 100, "column_3"),
        (1_600_000_000 + 86_400 * (pl.col("item_id") % 3), "time"),
        (20200101 + pl.col("item_id") % 3, "time"),
        (pl.format("2020-01-0{}", 1 + pl.col("item_id") % 3), "time"),
    ],
    ids=str,
)
def test_a_column_without_a_name_is_what_its_values_are(tmp_path: Path, values: pl.Expr, name: str) -> None:
    log().select("user_id", "item_id", values.alias("x")).write_csv(tmp_path / "u.csv", include_header=False)
    found = find_tables(tmp_path / "u.csv", folder=tmp_path)
    assert found.interactions.columns == ["user_id", "item_id", name]
    assert f"named by places and values: user_id, item_id, {name}; data.format.columns corrects" in found.notes[1]


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


def test_decimal_commas_beside_points_are_told(tmp_path: Path) -> None:
    log().write_csv(tmp_path / "clicks.csv")
    ITEMS.with_columns(price=pl.col("size") / 8).write_csv(tmp_path / "items.csv", separator=";", decimal_comma=True)
    USERS.with_columns(height=pl.int_range(pl.len()) / 4).write_csv(tmp_path / "users.csv", separator="|")
    found = find_tables(tmp_path, folder=tmp_path)
    told = "numbers with a decimal comma stay text ('price'), because others have a point ('height'); write all with one mark"
    assert told in found.notes
    assert found.section is not None
    assert "decimal" not in str(found.section["format"])


def test_a_file_without_a_header_has_ratings_with_decimal_commas(tmp_path: Path) -> None:
    rated = log().with_columns(rating=pl.int_range(pl.len()) % 9 / 2)
    rated.write_csv(tmp_path / "log.csv", separator=";", decimal_comma=True, include_header=False)
    found = find_tables(tmp_path / "log.csv", folder=tmp_path)
    assert found.interactions["rating"].equals(rated["rating"])
    assert "numbers with a decimal comma are read: 'rating'" in found.notes


@pytest.mark.parametrize("folder", ["day", "user_id", "time"])
def test_folders_around_files_without_a_header_are_columns(tmp_path: Path, folder: str) -> None:
    whole = log()
    for n, rows in enumerate((whole[:300], whole[300:])):
        (tmp_path / "log" / f"{folder}={n}").mkdir(parents=True)
        rows.write_csv(tmp_path / "log" / f"{folder}={n}" / "part.csv", include_header=False)
    found = find_tables(tmp_path / "log", folder=tmp_path)
    assert found.section is not None
    form = TextFormat.model_validate(found.section["format"])
    assert len(form.columns) == whole.width
    assert found.interactions.columns == [*form.columns, folder]
    assert find_tables(tmp_path / "log", folder=tmp_path, form=form).interactions.columns == found.interactions.columns


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


def test_a_part_of_other_columns_is_left_out_and_told(tmp_path: Path) -> None:
    parts(tmp_path, price=pl.lit(1))
    found = find_tables(tmp_path, folder=tmp_path)
    assert (found.section, found.interactions.height) == ({"interactions": "train.csv"}, 400)
    assert "not read: test.csv: no part beside train.csv" in found.notes[1]
    assert "column 'price' is not as in train.csv" in found.notes[1]
    log().write_csv(tmp_path / "test.csv", separator=";")
    assert "the form of test.csv is another" in find_tables(tmp_path, folder=tmp_path).notes[1]


def test_lines_of_users_are_parts_too(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("7 1 2 3\n8 2\n9 3 1\n")
    (tmp_path / "test.txt").write_text("7 4 5\n8 5 6\n9 1 4\n")  # as many in each line
    found = find_tables(tmp_path, folder=tmp_path)
    assert (found.layout, found.interactions.height) == ("sequences", 12)
    assert found.section == {"train": "train.txt", "test": "test.txt", "format": {"layout": "sequences"}}


def test_lines_of_users_are_read(tmp_path: Path) -> None:
    (tmp_path / "s.txt").write_text("7 1 2 3\n8 2\n9 3 1\n")
    found = find_tables(tmp_path / "s.txt", folder=tmp_path)
    assert found.layout == "sequences"
    assert found.interactions["item_id"].to_list() == [1, 2, 3, 2, 3, 1]
    assert found.section == {"interactions": "s.txt", "format": {"layout": "sequences"}}


def test_an_archive_is_its_data_set(tmp_path: Path) -> None:
    path = tmp_path / "films.zip"
    path.write_bytes(zipped(ML_1M))
    found = find_tables(str(path), folder=tmp_path)
    assert found.section == {"dataset": {"kind": "ml-1m", "archive": "films.zip"}}
    assert found.schema is not None
    with pytest.raises(ConfigError, match="has users of its own"):
        find_tables(str(path), users=tmp_path / "u.csv")


def test_another_archive_says_what_to_do(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as z:
        z.writestr("sequences.txt", "1 2 3")
    with pytest.raises(DataError, match="unpack it, and name the tables"):
        find_tables(tmp_path / "x.zip")
    (tmp_path / "y.zip").write_text("no zip")
    with pytest.raises(DataError, match="no zip archive"):
        find_tables(tmp_path / "y.zip")


def test_what_is_no_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nor a data set; did you mean 'ml-1m'"):
        find_tables("ml-1")
    with pytest.raises(DataError, match="no such file"):
        find_tables(tmp_path / "none.csv")
    with pytest.raises(DataError, match="the table has no rows"):
        find_tables(log()[:0])
    with pytest.raises(DataError, match="give all tables as frames or all as paths"):
        find_tables(tmp_path / "none.csv", users=USERS)


def test_a_column_of_objects_is_left_out_and_noted() -> None:
    things = log().with_columns(thing=pl.Series([{1}] * log().height, dtype=pl.Object))
    found = find_tables(things, users=USERS)
    assert found.interactions.columns == log().columns
    assert found.notes == (
        "not read: column 'thing', whose values are objects of Python; make them numbers, texts or times",
    )


def test_of_a_file_without_a_header_line_the_ids_are_the_first_columns_that_may_be_ids(tmp_path: Path) -> None:
    n = 400
    check_ins = pl.DataFrame({
        "row": range(n), "who": [i % 40 for i in range(n)], "at": [f"2010-10-{1 + i % 28:02d}T{i % 24:02d}:10:00Z" for i in range(n)],
        "lat": [30.1 + i % 50 / 7 for i in range(n)], "place": [i * 7 % 60 for i in range(n)],
    })  # fmt: skip
    check_ins.write_csv(tmp_path / "log.txt", separator="\t", include_header=False)
    found = find_tables(tmp_path / "log.txt", folder=tmp_path)
    assert found.interactions.columns == ["column_1", "user_id", "time", "column_4", "item_id"]
    assert found.interactions["item_id"].to_list() == check_ins["place"].to_list()
    others: dict[str, list[object]] = {
        "like seconds": [1_000_000_000 + i % 40 for i in range(n)], "with a gap": [None if i == 3 else i % 40 for i in range(n)],
        "of one row each": [i * 7919 % 100_003 for i in range(n)], "few": [i % 6 for i in range(n)],
    }  # fmt: skip
    for name, users in others.items():
        (tmp_path / name).mkdir()
        pl.DataFrame({"u": users, "i": check_ins["place"], "q": [1 + i % 39 for i in range(n)]}).write_csv(
            tmp_path / name / "log.csv", include_header=False
        )
        columns = find_tables(tmp_path / name / "log.csv", folder=tmp_path).interactions.columns
        assert columns[:2] == ["user_id", "item_id"], name
    liked = check_ins.select(pl.col("row") % 3 // 2, "who", "place")
    liked.write_csv(tmp_path / "liked.csv", include_header=False)
    assert find_tables(tmp_path / "liked.csv", folder=tmp_path).interactions.columns == ["label", "user_id", "item_id"]
    check_ins.select("who", "place", "lat").write_csv(tmp_path / "plain.csv", include_header=False)
    assert find_tables(tmp_path / "plain.csv", folder=tmp_path).interactions.columns == [
        "user_id",
        "item_id",
        "column_3",
    ]


def test_seconds_in_order_are_times_of_a_file_without_a_header_however_many_rows_share_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = pl.DataFrame(
        {
            "at": 1_254_386_420 + 20 * np.sort(rng.integers(0, 300, 2000)),
            "a": rng.integers(1400, 1500, 2000),
            "b": rng.integers(1400, 1500, 2000),
        }
    )
    rows.write_csv(tmp_path / "contacts.tsv", separator="\t", include_header=False)
    found = find_tables(tmp_path / "contacts.tsv")
    assert found.interactions.columns == ["time", "user_id", "item_id"]


@pytest.mark.parametrize("has_time", [False, True])
def test_ids_in_the_range_of_seconds_stay_ids_of_a_file_that_is_sorted_by_them(has_time: bool, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ids = np.unique(rng.integers(1_000_000_000, 1_400_000_000, 300))
    rows = pl.DataFrame({"a": np.sort(rng.choice(ids, 2000)), "b": rng.integers(0, 120, 2000)})
    more = {"c": rng.integers(1, 6, 2000)} | (
        {"d": rng.integers(1_600_000_000, 1_700_000_000, 2000)} if has_time else {}
    )
    rows.with_columns(**{name: pl.Series(values) for name, values in more.items()}).write_csv(
        tmp_path / "log.csv", include_header=False
    )
    found = find_tables(tmp_path / "log.csv")
    assert found.interactions.columns == ["user_id", "item_id", "rating", *(["time"] if has_time else [])]


def test_the_index_that_pandas_writes_is_no_column(tmp_path: Path) -> None:
    rows = pl.DataFrame(
        {
            "client": [i % 20 for i in range(200)],
            "what": [i * 7 % 30 for i in range(200)],
            "__index_level_0__": range(200),
        }
    )
    rows.write_parquet(tmp_path / "rows.parquet")
    for found in (find_tables(tmp_path / "rows.parquet"), find_tables(rows)):
        assert found.interactions.columns == ["client", "what"]
    assert suggest(tmp_path / "rows.parquet").schema.user_id == "client"


def test_a_line_of_comments_above_the_header_is_to_be_removed(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("# made by x\nuser_id,item_id\n1,2\n1,3\n2,3\n")
    with pytest.raises(DataError, match=r"log.csv: the lines above line 2 begin with '#'.*`tail -n \+2 OLD > NEW`"):
        find_tables(tmp_path / "log.csv")
    (tmp_path / "log.csv.gz").write_bytes(gzip.compress((tmp_path / "log.csv").read_bytes()))
    with pytest.raises(DataError, match=r"`gzip -dc OLD \| tail -n \+2 \| gzip > NEW`"):
        find_tables(tmp_path / "log.csv.gz")
