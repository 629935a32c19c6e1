"""One log in every form of file gives one dataset, and a file of another form is named."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from messages import one_line
from worlds import settings

from twotower import api
from twotower.cli.app import run_command
from twotower.config.toml import load_config
from twotower.data import prepare
from twotower.data.config import DataConfig, DatasetConfig
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.prepare.options import PrepareOptions
from twotower.data.reading.readers import read_file
from twotower.data.reading.text_files import Reading
from twotower.data.reading.text_format import TextFormat
from twotower.data.source import read
from twotower.data.split import SplitConfig
from twotower.data.tables import Tables, check
from twotower.errors import ConfigError, DataError
from twotower.features.categorical import Categorical
from twotower.features.numeric import Numeric
from twotower.features.schema import Schema
from twotower.index.exact import Exact

SCHEMA = Schema(
    label="stars",
    positive_above=2,
    time="at",
    features=(
        Categorical(name="user_id", side="user"),
        Numeric(name="mean_stars", side="item", statistic="mean"),
        Categorical(name="item_id", side="item"),
    ),
)
SPLIT = SplitConfig(kind="column", column="fold")
SMALL = PrepareOptions(piece_rows=101, bucket_rows=150)


def log() -> pl.DataFrame:
    """Ids that are text in one shard alone, ids that are numbers, half stars, and a part for each row."""
    rng, n = np.random.default_rng(0), 400
    pairs = rng.permutation(40 * 30)[:n]
    return pl.DataFrame(
        {
            "user_id": [f"00{u}" if u < 3 else str(u) for u in sorted(pairs // 30, reverse=True)],
            "item_id": pairs % 30,
            "stars": rng.integers(2, 10, n) / 2,
            "at": 1_600_000_000 + rng.integers(0, 9_999, n),
            "fold": rng.choice(["train", "validation", "test"], n, p=[0.7, 0.1, 0.2]),
        }
    )


def text(separator: str = ",", header: bool = True, bom: bool = False) -> Callable[[pl.DataFrame], bytes]:
    """A writer of text."""

    def write(frame: pl.DataFrame) -> bytes:
        return (b"\xef\xbb\xbf" if bom else b"") + frame.write_csv(separator=separator, include_header=header).encode()

    return write


def gzipped(write: Callable[[pl.DataFrame], bytes]) -> Callable[[pl.DataFrame], bytes]:
    return lambda frame: gzip.compress(write(frame))


def commas(frame: pl.DataFrame) -> bytes:
    """Text with semicolons between the values and decimal commas."""
    return frame.write_csv(separator=";", decimal_comma=True).encode()


NAMES = tuple(log().columns)
FORMS: dict[str, tuple[str, Callable[[pl.DataFrame], bytes], TextFormat]] = {
    "csv": ("csv", text(), TextFormat()),
    "semicolons": ("csv", text(";", bom=True), TextFormat(separator=";")),
    "decimal commas": ("csv", commas, TextFormat(separator=";", decimal=",")),
    "a separator of its own": ("csv", text(";"), TextFormat(separator="|", separators={"interactions": ";"})),
    "tsv.gz": ("TSV.GZ", gzipped(text("\t")), TextFormat()),
    "no header, semicolons, gzip": ("csv.gz", gzipped(text(";", False)), TextFormat(separator=";", columns=NAMES)),
}


def files_of(folder: Path, form: str) -> DataConfig:
    """The log in two files of a form."""
    folder.mkdir()
    frame = log()
    if form == "parquet":
        for n in range(2):
            frame[n * 200 : n * 200 + 200].write_parquet(folder / f"{n}.parquet")
        return DataConfig(interactions=str(folder))
    ending, write, options = FORMS[form]
    for n in range(2):
        (folder / f"{n}.{ending}").write_bytes(write(frame[n * 200 : n * 200 + 200]))
    return DataConfig(interactions=str(folder), format=options)


def dataset(data: DataConfig, schema: Schema, split: SplitConfig, out: Path | None = None) -> Dataset:
    """The dataset of tables in memory, or prepared in a folder."""
    if out:
        return prepare.write_prepared(data, schema, split, out, SMALL)
    tables, schema = read(DatasetConfig(data=data, split=split), schema)
    assert isinstance(tables, Tables)
    return build_dataset(tables, schema, split)


@pytest.mark.parametrize("form", [*FORMS, "parquet"])
def test_a_log_in_any_form_is_the_dataset_of_the_frame(tmp_path: Path, form: str) -> None:
    expected = build_dataset(check(None, None, log(), SCHEMA), SCHEMA, SPLIT)
    data, of_parquet = files_of(tmp_path / "in", form), files_of(tmp_path / "parquet", "parquet")
    found = dataset(data, SCHEMA, SPLIT)
    assert found.digest == expected.digest
    assert found.users.ids.equals(expected.users.ids)
    prepared = [dataset(d, SCHEMA, SPLIT, tmp_path / f"out{n}") for n, d in enumerate((data, of_parquet))]
    assert prepared[0].digest == prepared[1].digest


ORDERED = Schema(
    time="at",
    time_unit="order",
    duplicates="keep",
    features=(Categorical(name="user_id", side="user"), Categorical(name="item_id", side="item")),
)


def ordered() -> pl.DataFrame:
    """Interactions by user and in their order, some repeated; a user is text in the second half alone."""
    rng, n = np.random.default_rng(1), 300
    users = [str(u) if u < 30 else f"u{u}" for u in np.sort(rng.integers(40, size=n))]
    return pl.DataFrame({"user_id": users, "item_id": rng.integers(25, size=n), "at": np.arange(n)})


def lines(separator: str, after_user: str = "", quote: str = "") -> Callable[[pl.DataFrame], bytes]:
    """A writer of one user a line, with an empty line and a user without items; `after_user` follows the user."""

    def write(frame: pl.DataFrame) -> bytes:
        users = frame.group_by("user_id", maintain_order=True).agg(quote + pl.col("item_id").cast(pl.String) + quote)
        rows = [
            f"{quote}{user}{quote}{after_user or separator}{separator.join(items)}" for user, items in users.iter_rows()
        ]
        return "\n".join([*rows, "", f"nobody{separator}", ""]).encode()

    return write


FORMS_IN_ORDER: dict[str, tuple[str, Callable[[pl.DataFrame], bytes], TextFormat]] = {
    "csv": FORMS["csv"], "spaces in a txt": ("txt", text(" "), TextFormat()),
    "one user a line": ("txt", lines(" "), TextFormat(layout="sequences")),
    "one user a line, tab and spaces": ("txt", lines(" ", "\t"), TextFormat(layout="sequences")),
    "one user a line, quotes": ("csv", lines(",", quote='"'), TextFormat(layout="sequences")),
    "one user a line, gzip": ("txt.gz", gzipped(lines(" ")), TextFormat(layout="sequences")),
}  # fmt: skip


def ordered_files(folder: Path, form: str) -> DataConfig:
    """The ordered log in two files of a form; one user stands in both."""
    folder.mkdir()
    ending, write, options = FORMS_IN_ORDER.get(form, ("parquet", text(), TextFormat()))
    for n, part in enumerate((ordered()[:150], ordered()[150:])):
        path = folder / f"{n}.{ending}"
        if ending == "parquet":
            part.write_parquet(path)
        else:
            path.write_bytes(write(part))
    return DataConfig(interactions=str(folder), format=options)


@pytest.mark.parametrize("form", [*FORMS_IN_ORDER, "parquet"])
def test_a_log_in_order_is_the_dataset_of_the_frame_in_any_form_too(tmp_path: Path, form: str) -> None:
    split = SplitConfig(kind="last")
    data, of_parquet = ordered_files(tmp_path / "in", form), ordered_files(tmp_path / "parquet", "parquet")
    expected = build_dataset(check(None, None, ordered(), ORDERED), ORDERED, split)
    found = dataset(data, ORDERED, split)
    assert found.digest == expected.digest
    assert found.users.ids.equals(expected.users.ids)
    prepared = [dataset(d, ORDERED, split, tmp_path / f"out{n}") for n, d in enumerate((data, of_parquet))]
    assert prepared[0].digest == prepared[1].digest


@pytest.mark.parametrize("prepared", [False, True], ids=["memory", "prepared"])
def test_lines_of_users_give_the_parts_of_a_split_and_no_time_unless_named(tmp_path: Path, prepared: bool) -> None:
    (tmp_path / "train.txt").write_text("0 1 2 3\n1 2 3\n")
    (tmp_path / "test.txt").write_text("0 4\n1\n")
    data = DataConfig(
        train=str(tmp_path / "train.txt"), test=str(tmp_path / "test.txt"), format=TextFormat(layout="sequences")
    )
    split = SplitConfig(kind="files", validation=0)
    found = dataset(data, Schema(), split, tmp_path / "out" if prepared else None)
    ids = found.items.ids.to_list()
    users = found.users.ids.gather(found.pairs.user).to_list()
    rows = zip(found.times.tolist(), users, found.pairs.item.tolist(), found.parts.tolist(), strict=True)
    assert sorted((at, user, ids[item], part) for at, user, item, part in rows) == [
        (0, 0, 1, 0), (1, 0, 2, 0), (2, 0, 3, 0), (3, 1, 2, 0), (4, 1, 3, 0), (5, 0, 4, 2),
    ]  # fmt: skip


@pytest.mark.parametrize("prepared", [False, True], ids=["memory", "prepared"])
def test_each_table_has_a_separator_of_its_own(tmp_path: Path, prepared: bool) -> None:
    log().write_csv(tmp_path / "log.csv", separator=";", decimal_comma=True)
    ages = log().select(pl.col("user_id").unique().sort()).with_columns(age=pl.int_range(pl.len()) / 4)
    ages.write_csv(tmp_path / "users.csv", separator="\t", decimal_comma=True)
    items = log().select(pl.col("item_id").unique().sort()).with_columns(price=pl.int_range(pl.len()) / 8)
    items.write_csv(tmp_path / "items.csv")
    form = TextFormat(separator=";", separators={"users": "\\t", "items": ","}, decimal=",")
    paths = {name: str(tmp_path / f"{name}.csv") for name in ("users", "items")}
    data = DataConfig(**paths, interactions=str(tmp_path / "log.csv"), format=form)
    features = (*SCHEMA.features, Numeric(name="age", side="user"), Numeric(name="price", side="item"))
    schema = SCHEMA.model_copy(update={"features": features})
    expected = build_dataset(check(ages, items, log(), schema), schema, SPLIT)
    found = dataset(data, schema, SPLIT, tmp_path / "out" if prepared else None)
    for side, key in (("users", "user_id"), ("items", "item_id")):
        frame, other = (getattr(d, side).frame.sort(key) for d in (found, expected))
        assert frame.equals(other.select(frame.columns))


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ({"separators": {"users": ";"}}, "names users, and no such table is in text files; leave users out"),
        ({"decimal": ","}, "no comma separates, and commas separate those of all tables; set data.format.separator"),
    ],
)
@pytest.mark.parametrize("prepared", [False, True], ids=["memory", "prepared"])
def test_a_form_of_a_table_without_effect_is_one_line(
    tmp_path: Path, form: dict[str, object], words: str, prepared: bool
) -> None:
    log().write_csv(tmp_path / "log.csv")
    log().select(pl.col("item_id").unique()).write_parquet(tmp_path / "items.parquet")
    data = DataConfig(
        interactions=str(tmp_path / "log.csv"),
        items=str(tmp_path / "items.parquet"),
        format=TextFormat.model_validate(form),
    )
    with pytest.raises(DataError, match=words):
        dataset(data, SCHEMA, SPLIT, tmp_path / "out" if prepared else None)


@pytest.mark.parametrize(
    ("name", "content", "form", "words"),
    [
        ("a.csv", "user_id;item_id;stars\n1;2;3\n", TextFormat(),
         "'user_id;item_id;stars' holds ';'; set data.format.separator = \";\", for one table alone in separators"),
        ("a.csv", "1::2::3\n4::5::6\n", TextFormat(columns=NAMES),
         "holds '::'; replace it in the file by a tab"),
        ("a.csv", "1,2\n3,4\n", TextFormat(columns=NAMES),
         "has 2 columns, and data.format.columns names 5; name each once"),
        ("a.tsv", "\ufeffUser_ID\t item_id\n1\t2\n3\t4\n", TextFormat(columns=("user_id", "item_id")),
         "its first line holds the names of data.format.columns"),
        ("a.csv.gz", b"user_id,item_id\n1,\xff\n", TextFormat(), "line 2 is not UTF-8"),
        ("a.txt", "u1,5,6\nu2,5\n", TextFormat(layout="sequences"),
         "holds ','; set data.format.separator = \",\""),
        ("a.txt", "u1,5 6 7\n", TextFormat(layout="sequences"),
         "' ' separates the values, and in the first line 'u1,5' holds ','; separate"),
        ("a.txt", "u1\nu2\n", TextFormat(layout="sequences"), "the table has no rows, expected at least one"),
        ("a.gz", "user_id,item_id\n1,2\n", TextFormat(), "found a '.gz' file, expected .csv, .tsv, .txt or .parquet"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("prepared", [False, True], ids=["memory", "prepared"])
def test_a_file_of_another_form_is_one_line(
    tmp_path: Path, name: str, content: str | bytes, form: TextFormat, words: str, prepared: bool
) -> None:
    path = tmp_path / name
    data = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(data) if name.endswith("csv.gz") else data)
    schema = Schema(features=(Categorical(name="user_id", side="user"), Categorical(name="item_id", side="item")))
    config, out = DataConfig(interactions=str(path), format=form), tmp_path / "out"
    with one_line(DataError, words) as e:
        dataset(config, schema, SplitConfig(), out if prepared else None)
    assert str(e.value).startswith("interactions: " if "no rows" in words else f"{path}: ")
    assert not out.exists()


def test_a_table_of_ids_alone_is_no_file_of_another_separator(tmp_path: Path) -> None:
    (tmp_path / "users.csv").write_text("user id: all\na\nb\n")
    assert read_file(tmp_path / "users.csv", Reading(frozenset())).columns == ["user id: all"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ('separator = "::"', "data.format.separator: '::' is not one ASCII character other than a quote; replace it"),
        ('separators = { users = "" }', "users has an empty separator; leave users out"),
        (
            'columns = ["a", "a"]',
            "data.format.columns: ['a', 'a'] has an empty or repeated name; give each column its own",
        ),
        (
            'layout = "sequences"\n[split]\nkind = "time"',
            "split.kind = 'time' compares times of all users, and data.format.layout = 'sequences' gives the order of "
            "one user's items; set split.kind = 'last', 'user_ratio' or 'random'",
        ),
        ('separator = ";"\n[data.dataset]\nkind = "ml-100k"', "data.dataset reads its own; leave it out"),
    ],
)
def test_options_of_a_form_that_are_none_are_one_line(tmp_path: Path, options: str, words: str) -> None:
    (tmp_path / "mine.toml").write_text(f"format = 4\n[data.format]\n{options}\n")
    with one_line(ConfigError, words):
        load_config(tmp_path / "mine.toml")


def test_values_between_quotes_hold_the_separator_and_ids_hold_others(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('"u 1","i,1",5"\nu2,"say ""hi""",\n')
    reading = Reading(frozenset(), lines=("user_id", "item_id"))
    assert read_file(tmp_path / "a.csv", reading).rows() == [("u 1", "i,1"), ("u 1", '5"'), ("u2", 'say "hi"')]
    (tmp_path / "b.csv").write_text("shop|1,item|1\nshop|2,item|2\n")
    assert read_file(tmp_path / "b.csv", reading).rows() == [("shop|1", "item|1"), ("shop|2", "item|2")]


@pytest.mark.parametrize("prepared", [False, True], ids=["memory", "prepared"])
@pytest.mark.parametrize(
    "options",
    [{"columns": list(NAMES)}, {"encoding": "cp1252"}],
    ids=lambda options: next(iter(options)),
)
def test_a_form_of_parquet_is_one_line(tmp_path: Path, options: dict[str, str | list[str]], prepared: bool) -> None:
    data = files_of(tmp_path / "in", "parquet").model_copy(update={"format": TextFormat.model_validate(options)})
    words = (
        rf"^data\.format\.{next(iter(options))} tells how text files are read, and the table is Parquet; leave it out$"
    )
    with pytest.raises(DataError, match=words):
        dataset(data, Schema(), SplitConfig(), tmp_path / "out" if prepared else None)
    assert not (tmp_path / "out").exists()


def test_a_form_goes_with_parquet_beside_text(tmp_path: Path) -> None:
    data = files_of(tmp_path / "in", "parquet")
    (tmp_path / "users.csv").write_text("user_id;age\n" + "".join(f"{u};3\n" for u in range(40)))
    data = data.model_copy(update={"users": str(tmp_path / "users.csv"), "format": TextFormat(separator=";")})
    tables, _ = read(DatasetConfig(data=data), Schema())
    assert not isinstance(tables, Dataset)
    assert "age" in tables.users.columns


def test_files_of_text_and_of_parquet_are_not_one_log(tmp_path: Path) -> None:
    data = files_of(tmp_path / "in", "csv")
    log().write_parquet(tmp_path / "in" / "9.parquet")
    with pytest.raises(
        DataError, match=r"9\.parquet: is not of the form of 0\.csv; give all files as text or all as Parquet"
    ):
        prepare.write_prepared(data, SCHEMA, SPLIT, tmp_path / "out", SMALL)


@pytest.mark.parametrize("prepared", [False, True], ids=["memory", "prepared"])
def test_an_order_is_no_time(tmp_path: Path, prepared: bool) -> None:
    data, schema = ordered_files(tmp_path / "in", "one user a line"), ORDERED.model_copy(update={"time_unit": "s"})
    with pytest.raises(
        DataError, match=r"gives 'at' an order, and schema.time_unit = 's' wants times; set schema.time_unit = 'order'$"
    ):
        dataset(data, schema, SplitConfig(), tmp_path / "out" if prepared else None)


# ---- tables of other verbs


USERS = pl.DataFrame({"city": ["a", "b,c", "d"], "user_id": [3, 1, 2]})
TABLES: dict[str, tuple[str, Callable[[pl.DataFrame], bytes], list[str]]] = {
    "tab, gzip": ("csv.gz", gzipped(text("\t")), ["--separator", "\t"]),
    "tab as two characters": ("csv", text("\t"), ["--separator", r"\t"]),
    "no header, semicolons": ("tsv", text(";", header=False), ["--columns", "city,user_id", "--separator", ";"]),
}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run and a store of the ordered log, and vectors and answers for the users of a Parquet file."""
    folder = tmp_path_factory.mktemp("published")
    tables = (None, None, ordered().with_columns(pl.col("user_id").str.strip_prefix("u").cast(pl.Int64)))
    run = api.fit(tables, ORDERED, settings(train={"epochs": 1}), folder=folder / "run")
    api.publish(run, folder / "store", Exact())
    USERS.write_parquet(folder / "users.parquet")
    for words in calls(folder, folder / "users.parquet", folder):
        assert run_command(words) == 0
    return folder


def calls(published: Path, table: Path, out: Path) -> list[list[str]]:
    """Words of `embed` and `recommend` for a table of users."""
    return [
        ["embed", str(published / "run"), str(table), "--side", "user", "--out", str(out / "vectors")],
        ["recommend", "--store", str(published / "store"), "--users", str(table), "--out", str(out / "answers"), "-k4"],
    ]


@pytest.mark.parametrize("form", TABLES)
def test_tables_of_embed_and_recommend_have_any_form(published: Path, tmp_path: Path, form: str) -> None:
    ending, write, flags = TABLES[form]
    table = tmp_path / f"users.{ending}"
    table.write_bytes(write(USERS))
    for words in calls(published, table, tmp_path):
        assert run_command([*words, *flags]) == 0
    vectors, answers = (
        [pl.read_parquet(folder / result / "part-*.parquet") for folder in (tmp_path, published)]
        for result in ("vectors", "answers")
    )
    assert vectors[0].equals(vectors[1])
    assert answers[0].equals(answers[1])
    assert answers[0]["user_id"].unique(maintain_order=True).to_list() == [3, 1, 2]


def test_a_table_of_another_form_is_one_line_that_names_the_flag(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    USERS.write_csv(tmp_path / "users.csv", separator=";")
    embed, answer = calls(published, tmp_path / "users.csv", tmp_path / "out")
    USERS.write_csv(tmp_path / "interactions.csv", separator=";")
    look = ["data", "stats", str(tmp_path)]
    for words in (embed, answer, look):
        assert run_command(words) == 2
        assert "holds ';'; set --separator = \";\"" in capsys.readouterr().err
        assert run_command([*words, "--columns", "a,b,c", "--separator", ";"]) == 2
        assert "has 2 columns, and --columns names 3; name each once" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    for _ in range(2):  # the second call finds the answers of the first
        assert run_command([*answer, "--separator", ";"]) == 0
    assert run_command([*answer, "--separator", ";", "--columns", "user_id,city"]) == 2
    assert (
        "of another --separator, --decimal, --columns ([';'] then, [';', 'user_id', 'city'] now)"
        in capsys.readouterr().err
    )


def test_stats_read_lines_of_users(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "interactions.txt").write_bytes(lines(" ")(ordered()))
    assert run_command(["data", "stats", str(tmp_path), "--layout", "sequences"]) == 0
    said = capsys.readouterr().out
    assert "interactions: 300 rows" in said
    assert "item_id          Int64" in said
    assert run_command(["data", "stats", str(tmp_path), "--layout", "lines"]) == 2
    assert capsys.readouterr().err == "error: --layout lines: allowed are rows and sequences\n"


WORDS = ["größer", "Öl", "weiß", "naïve", "Süd"]


def words(folder: Path, encoding: str, ending: str = "csv", text: str | None = None) -> DataConfig:
    """A log and a table of items in an encoding, in two files and one, gzipped if the ending says so."""
    rows = [f"{WORDS[n % 5]}{n % 7};{WORDS[n * 3 % 5]} {n % 11};{n % 9 + 1},5\r\n" for n in range(300)]
    header = "Käufer;Stück;Größe\r\n"
    halves = {"log/a": "".join([header, *rows[:140]]), "log/b": "".join([header, *rows[140:]])}
    items = "".join(["Stück;Name\r\n", *(f"{w} {n};Das {w} {n}\r\n" for w in WORDS for n in range(11))])
    (folder / "log").mkdir(parents=True)
    for name, content in {**halves, "items": items}.items():
        data = (text or content).encode(encoding)
        (folder / f"{name}.{ending}").write_bytes(gzip.compress(data) if ending.endswith("gz") else data)
    return DataConfig.model_validate(
        {
            "interactions": str(folder / "log"), "items": str(folder / f"items.{ending}"),
            "format": {"separator": ";", "decimal": ",", "encoding": encoding},
        }
    )  # fmt: skip


@pytest.mark.parametrize(("encoding", "ending"),
 [
        ("cp1252", "csv"), ("utf-16", "csv.gz"), ("gb18030", "txt"),
    ])  # fmt: skip
def test_text_of_any_encoding_gives_the_dataset_of_utf8(tmp_path: Path, encoding: str, ending: str) -> None:
    schema = Schema(user_id="Käufer", item_id="Stück", label="Größe", positive_above=2, title="Name", duplicates="keep")
    expected, _ = read(DatasetConfig(data=words(tmp_path / "plain", "utf-8")), schema)
    data = words(tmp_path / "other", encoding, ending)
    found, _ = read(DatasetConfig(data=data), schema)
    for side in ("users", "items", "interactions"):
        assert getattr(found, side).equals(getattr(expected, side))
    assert isinstance(found, Tables)
    assert found.items["Name"][0] == "Das größer 0"
    split = SplitConfig(kind="random")
    disk = prepare.write_prepared(data, schema, split, tmp_path / "out", SMALL)
    of_utf8 = prepare.write_prepared(
        words(tmp_path / "again", "utf-8"), schema, split, tmp_path / "plain" / "out", SMALL
    )
    assert disk.encoders.digest == of_utf8.encoders.digest
    assert disk.items.frame.equals(of_utf8.items.frame)


def test_a_file_of_utf8_stays_so_whatever_the_encoding(tmp_path: Path) -> None:
    data = words(tmp_path, "cp1252")
    (tmp_path / "items.csv").write_text((tmp_path / "items.csv").read_text(encoding="cp1252"), encoding="utf-8")
    schema = Schema(user_id="Käufer", item_id="Stück", title="Name", duplicates="keep")
    found, _ = read(DatasetConfig(data=data), schema)
    assert isinstance(found, Tables)
    assert found.items["Name"][0] == "Das größer 0"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le"])
def test_a_log_of_ascii_goes_with_items_of_an_encoding_that_writes_ascii_otherwise(
    tmp_path: Path, encoding: str
) -> None:
    (tmp_path / "log.csv").write_text("user_id,item_id\n1,10\n2,11\n", encoding="ascii")
    (tmp_path / "items.csv").write_text("item_id,name\n10,Öl\n11,Süd\n", encoding=encoding)
    data = {"interactions": str(tmp_path / "log.csv"), "items": str(tmp_path / "items.csv")}
    config = DatasetConfig.model_validate({"data": {**data, "format": {"encoding": encoding}}})
    found, _ = read(config, Schema(title="name"))
    assert isinstance(found, Tables)
    assert found.items["name"].to_list() == ["Öl", "Süd"]
    (tmp_path / "log.csv").write_bytes("user_id,item_id\n1,Öl\n".encode("cp1252"))
    with pytest.raises(DataError, match=rf"log\.csv: line \d is not {encoding}; name the encoding"):
        read(config, Schema(title="name"))


def test_an_encoding_that_is_none_or_does_not_fit_is_named(tmp_path: Path) -> None:
    for unknown in ("klingon", "rot13", "idna", ""):
        with pytest.raises(
            ValueError, match=f"'{unknown}' is no encoding that is known; give one such as 'utf-8', 'cp1252'"
        ):
            TextFormat(encoding=unknown)
    schema = Schema(user_id="Käufer", item_id="Stück", label="Größe", duplicates="keep")
    data = words(tmp_path / "a", "cp1252")
    with pytest.raises(DataError, match=r"a\.csv: line 1 is not UTF-8; set data\.format\.encoding = 'windows-1252' if"):
        read(DatasetConfig(data=data.model_copy(update={"format": TextFormat(separator=";", decimal=",")})), schema)
    path = tmp_path / "a" / "log" / "b.csv"
    path.write_bytes(path.read_bytes().replace(b"\r\n", b"\x81\r\n", 3).replace(b"\x81\r\n", b"\r\n", 2))
    for call in (
        lambda: read(DatasetConfig(data=data), schema),
        lambda: prepare.write_prepared(data, schema, SplitConfig(), tmp_path / "out", SMALL),
    ):
        with pytest.raises(
            DataError, match=r"b\.csv: line 3 is not cp1252; name the encoding of the file in data\.format\.encoding"
        ):
            call()
    half = words(tmp_path / "c", "utf-16")
    path = tmp_path / "c" / "items.csv"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"items\.csv: line \d+ is not utf-16"):
        read(DatasetConfig(data=half), schema)
