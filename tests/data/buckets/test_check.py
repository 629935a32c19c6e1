"""The checker of buckets: folders that meet the contract, and one mutation or more for each of its rules."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import duckdb_buckets
import polars as pl
import pyarrow.parquet as pq
import pytest
from bucket_vectors import LOG, SAME_HASH, Event, Log, user_order, write_buckets
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import JsonValue

from twotower import api
from twotower.cli.app import run_command
from twotower.config.experiment import Config
from twotower.config.toml import dump_config
from twotower.data.buckets import BucketFacts
from twotower.data.buckets.check import Rule, check_buckets
from twotower.features.categorical import Categorical
from twotower.features.numeric import Numeric
from twotower.features.schema import Schema

ROOT = Path(__file__).resolve().parents[3]
USERS, ITEMS, FACTS = "users.parquet", "items.parquet", "buckets.json"
FIRST, SECOND, THIRD, LAST = (f"interactions/{b:05d}.parquet" for b in range(4))
SCHEMA = Schema(
    label="label",
    positive_above=2,
    time="at",
    title="title",
    features=(
        Categorical(name="user_id", side="user"),
        Numeric(name="age", side="user"),
        Numeric(name="liking", side="user", statistic="mean"),
        Categorical(name="item_id", side="item"),
    ),
)
Change = Callable[[Path], None]


def table(name: str, change: Callable[[pl.DataFrame], pl.DataFrame]) -> Change:
    """A change of a Parquet file."""
    return lambda folder: change(pl.read_parquet(folder / name)).write_parquet(folder / name)


def cell(name: str, column: str, record: int, value: JsonValue) -> Change:
    """A change of one value of a Parquet file."""

    def change(frame: pl.DataFrame) -> pl.DataFrame:
        values = frame[column].to_list()
        values[record] = value
        return frame.with_columns(pl.Series(column, values, frame[column].dtype))

    return table(name, change)


def facts(**changed: JsonValue) -> Change:
    """A change of keys of buckets.json; None removes a key."""

    def change(folder: Path) -> None:
        found = json.loads((folder / FACTS).read_text()) | changed
        (folder / FACTS).write_text(json.dumps({k: v for k, v in found.items() if k not in changed or v is not None}))

    return change


def bucket(number: int, **changed: JsonValue) -> Change:
    """A change of a bucket in buckets.json."""

    def change(folder: Path) -> None:
        found = json.loads((folder / FACTS).read_text())
        found["buckets"][number] |= changed
        (folder / FACTS).write_text(json.dumps(found))

    return change


def content(name: str, data: bytes) -> Change:
    """A change of all bytes of a file."""

    def change(folder: Path) -> None:
        (folder / name).write_bytes(data)

    return change


def cut(folder: Path) -> None:
    data = (folder / FIRST).read_bytes()
    (folder / FIRST).write_bytes(data[: len(data) // 2])


def damaged_page(name: str, column: str) -> Change:
    """A change of the first page of a column, which no other column shows."""

    def change(folder: Path) -> None:
        group = pq.read_metadata(folder / name).row_group(0)
        chunk = next(c for c in map(group.column, range(group.num_columns)) if c.path_in_schema == column)
        data = bytearray((folder / name).read_bytes())
        start = chunk.dictionary_page_offset or chunk.data_page_offset
        data[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
        (folder / name).write_bytes(data)

    return change


def folder_as_bucket(folder: Path) -> None:
    (folder / FIRST).unlink()
    (folder / FIRST).mkdir()


def swapped(name: str, one: int, other: int) -> Change:
    def change(frame: pl.DataFrame) -> pl.DataFrame:
        order = list(range(frame.height))
        order[one], order[other] = order[other], order[one]
        return frame[order]

    return table(name, change)


def each(change: Callable[[pl.DataFrame], pl.DataFrame]) -> Change:
    """A change of every bucket."""

    def change_all(folder: Path) -> None:
        for name in (FIRST, SECOND, THIRD, LAST):
            table(name, change)(folder)

    return change_all


def untimed(folder: Path) -> None:
    shutil.rmtree(folder)
    write_buckets(folder, LOG, timed=False)


def milliseconds(folder: Path) -> None:
    shutil.rmtree(folder)
    write_buckets(folder, [replace(e, time=e.time // 1000) for e in LOG])


def more_users(folder: Path) -> None:
    """A user of the largest hash of ten thousand."""
    last = max(map(str, range(10_000)), key=user_order)
    table(USERS, lambda t: pl.concat([t, pl.DataFrame({"user_id": last, "age": 1.0})]))(folder)


def no_last_time(folder: Path) -> None:
    text = (folder / FACTS).read_text()
    (folder / FACTS).write_text(re.sub(r'"last_time": \d+', '"last_time": null', text))


def less_records(folder: Path) -> None:
    """The last bucket without its last record, which decides no other number."""
    table(LAST, lambda t: t.head(1))(folder)


def parts(values: list[Any]) -> Change:
    """A column of parts in all buckets, whose values come again and again."""

    def change(folder: Path) -> None:
        for name in (FIRST, SECOND, THIRD, LAST):
            frame = pl.read_parquet(folder / name)
            column = pl.Series("part", [values[i % len(values)] for i in range(frame.height)])
            dtype = column.dtype if isinstance(values[0], str) else pl.Int8
            frame.with_columns(column.cast(dtype)).write_parquet(folder / name)

    return change


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_buckets(tmp_path / "buckets", LOG)
    return tmp_path / "buckets"


MUTATIONS: list[tuple[Rule, str, Change, str]] = [
        (Rule.FILES, "no bucket", lambda f: (f / FIRST).unlink(), f"{FIRST}: rule 1: no such file"),
        (Rule.FILES, "text as a table", content(ITEMS, b"item_id,title\n1,film 1\n"), f"{ITEMS}: rule 1: damaged"),
        (Rule.FILES, "half a bucket", cut, f"{FIRST}: rule 1: damaged"),
        (Rule.FILES, "a damaged page of a bucket", damaged_page(FIRST, "context.device"), f"{FIRST}: rule 1: damaged"),
        (Rule.FILES, "a folder as a bucket", folder_as_bucket, f"{FIRST}: rule 1: a folder or special file"),
        (Rule.FILES, "a bucket left by another run", content("interactions/00004.parquet", b""),
     "00004.parquet: rule 1: not a"),
        (Rule.IDS, "a null id", cell(USERS, "user_id", 3, None), f"{USERS}: rule 2: record 3 has no id"),
        (Rule.IDS, "a repeated user", cell(USERS, "user_id", 4, "用户"), "rule 2: record 4 repeats id '用户'"),
        (Rule.IDS, "32-bit ids", table(ITEMS, lambda t: t.with_columns(pl.col("item_id").cast(pl.Int32))),
     "rule 2: first column 'item_id' holds Int32, expected Int64, UInt64 or String"),
        (Rule.FEATURES, "no feature", table(USERS, lambda t: t.drop("age")),
     "rule 3: no column 'age', which the schema names"),
        (Rule.FEATURES, "another name of the ids", table(USERS, lambda t: t.rename({"user_id": "customer"})),
     "rule 3: first column 'customer', expected 'user_id', the id of the schema"),
        (Rule.USER_ORDER, "users in another order", swapped(USERS, 2, 3),
     "rule 4: record 3 has id 'a' of hash 214005177 after '用户' of hash 533736080"),
        (Rule.VALUES, "a part that is none", parts([0, 3, 1, 2]),
     "rule 7: record 1 has part 3, expected a part from 0 to 2"),
        (Rule.COLUMNS, "no label", table(FIRST, lambda t: t.drop("positive")),
     f"{FIRST}: rule 5: no column 'positive'"),
        (Rule.COLUMNS, "an unknown column", table(FIRST, lambda t: t.rename({"event": "kind"})),
     "rule 5: unknown column 'kind'"),
        (Rule.COLUMNS, "times as dates", table(FIRST, lambda t: t.with_columns(pl.col("time").cast(pl.Datetime("us")))),
     "rule 5: column 'time' holds Datetime"),
        (Rule.SAME_COLUMNS, "weights in some", table(SECOND, lambda t: t.drop("weight")),
     f"{SECOND}: rule 6: context.device String, event String"),
        (Rule.VALUES, "a null item in a bucket", cell(FIRST, "item", 2, None),
     f"{FIRST}: rule 7: record 2 has item null"),
        (Rule.VALUES, "a weight of NaN", cell(FIRST, "weight", 5, float("nan")),
     "record 5 has weight nan, expected a finite"),
        (Rule.RANGES, "a user of the next bucket", cell(FIRST, "user", 6, 4),
     "rule 8: record 6 has user 4, expected a row from 0 to 3"),
        (Rule.RANGES, "a negative item", cell(FIRST, "item", 0, -1), "rule 8: record 0 has item -1"),
        (Rule.ROWS, "a row after the log", cell(FIRST, "row", 6, 20),
     "rule 9: record 6 has row 20, expected a row from 0 to 19"),
        (Rule.ROWS, "a row twice in a bucket", cell(FIRST, "row", 6, 11),
     f"{FIRST}: rule 9: record 6 has row 11, which another"),
        (Rule.ROWS, "a row of another bucket", cell(LAST, "row", 1, 11),
     f"{LAST}: rule 9: record 1 has row 11, which another"),
        (Rule.ORDER, "times in another order", swapped(FIRST, 4, 5),
     "rule 10: record 5 has user 2, time 1700000008000000, row 9 after"),
        (Rule.ORDER, "users in another order in a bucket", swapped(FIRST, 0, 6), "rule 10: record 1 has user 1"),
        (Rule.PAIRS, "a pair twice, apart", cell(FIRST, "item", 5, 2),
     "rule 11: record 5 repeats user 2 and item 2, expected each"),
        (Rule.SCHEMA, "no times", untimed, f"{FIRST}: rule 12: no column 'time', which the schema needs"),
        (Rule.SCHEMA, "milliseconds", milliseconds,
     "rule 12: record 0 has time 1700000000000, expected microseconds since"),
        (Rule.FACTS, "no facts", lambda f: (f / FACTS).unlink(), f"{FACTS}: rule 13: no such file"),
        (Rule.FACTS, "the former format", facts(format=1), "rule 13: format 1, this version reads 2; write the"),
        (Rule.FACTS, "another hash", facts(hash="xxh64"), "rule 13: does not follow docs/prepared-format.md (hash: "),
        (Rule.FACTS, "users between two buckets", bucket(1, users=[5, 6]),
     "expected ranges that follow one another from 0 to 10"),
        (Rule.FACTS, "a bucket elsewhere", bucket(0, files=[{"file": "../users.parquet", "segment": 0, "rows": 7}]),
     "(buckets.0.files.0.file: "),
        (Rule.COUNTS, "a user too many", more_users,
     f"{USERS}: rule 14: number of users 11, expected 10 as in buckets.json"),
        (Rule.COUNTS, "a record less", less_records,
     f"{LAST}: rule 14: number of records 1, expected 2 as in buckets.json"),
        (Rule.COUNTS, "positives", facts(positives=8), f"{FACTS}: rule 14: positives 8, expected 9 as in the buckets"),
        (Rule.COUNTS, "no latest time", no_last_time, "rule 14: last_time None, expected 1700000010000000"),
    ]  # fmt: skip
"""Rule, name of the mutation, the mutation, and what the problem says."""


DAYS: Log = [*LOG, *(Event(user, item, 1_700_000_100_000_000 + n, 5.0) for n, (user, item) in enumerate(
    [("d", 4), ("new", 9), ("e", 9), ("newer", 1), ("a", 9)]))]  # fmt: skip
"""The log and a further day, of two new users and a new item."""
DAY, NEW = "interactions/00002-1.parquet", "interactions/00004-1.parquet"
"""File of the day of users of the log, and of new ones."""


@pytest.fixture
def grown(tmp_path: Path) -> Path:
    """A folder of two segments."""
    write_buckets(tmp_path / "buckets", DAYS, later=[len(LOG)])
    return tmp_path / "buckets"


def files_of(number: int, change: Callable[[list[Any]], list[Any]]) -> Change:
    """A change of the files of a bucket in buckets.json."""

    def change_files(folder: Path) -> None:
        found = json.loads((folder / FACTS).read_text())["buckets"][number]["files"]
        bucket(number, files=change(found))(folder)

    return change_files


def joined(folder: Path) -> None:
    """The last bucket of the first segment has the new users too."""
    found = json.loads((folder / FACTS).read_text())["buckets"]
    found[3]["users"][1] = 12
    for later in found[4:]:
        later["users"] = [12, 12]
    facts(buckets=found)(folder)


SEGMENT_MUTATIONS: list[tuple[Rule, str, Change, str]] = [
        (Rule.IDS, "an id that the first segment has", cell(USERS, "user_id", 11, "d"),
     f"{USERS}: rule 2: record 11 repeats id 'd', expected each id once in all segments"),
        (Rule.IDS, "an item that the first segment has", cell(ITEMS, "item_id", 4, 2),
     f"{ITEMS}: rule 2: record 4 repeats id '2'"),
        (Rule.USER_ORDER, "new users in another order", swapped(USERS, 10, 11), f"{USERS}: rule 4: record 11 has id "),
        (Rule.FACTS, "files in another order", files_of(2, lambda files: files[::-1]),
     "bucket 00002-1.parquet: files of the segments [1, 0], expected rising ones below 2"),
        (Rule.FACTS, "a segment that is not listed", files_of(2, lambda files: [files[0], files[1] | {"segment": 2}]),
     "bucket 00002.parquet: files of the segments [0, 2], expected rising ones below 2"),
        (Rule.FACTS, "a file twice", files_of(2, lambda of: [of[0], of[1] | {"file": "00003.parquet"}]),
     "00003.parquet is named twice"),
        (Rule.FACTS, "users of a former bucket", joined,
     "bucket 00003.parquet: users 8 to 12, expected some of 0 to 10"),
        (Rule.FACTS, "rows between two segments",
     facts(segments=[{"users": [0, 10], "items": [0, 4], "read": [0, 20]},
                     {"users": [10, 12], "items": [4, 5], "read": [21, 25]}]),
     "read of the segments: expected ranges that follow one another from 0 to 25"),
        (Rule.ROWS, "rows that go back", cell(DAY, "row", 0, 7),
     f"{DAY}: rule 9: record 0 has row 7, expected a row from 20 to 24, as of segment 1"),
        (Rule.RANGES, "an item of a later segment", cell(FIRST, "item", 0, 4),
     f"{FIRST}: rule 8: record 0 has item 4, expected a row from 0 to 3, as of segment 0"),
        (Rule.RANGES, "a former user in a file of new ones", cell(NEW, "user", 0, 9), f"{NEW}: rule 8: record 0 has"),
        (Rule.SAME_COLUMNS, "a day of other columns", table(DAY, lambda t: t.drop("weight")), f"{DAY}: rule 6: "),
        (Rule.COUNTS, "a record less", table(DAY, lambda t: t.head(0)), f"{DAY}: rule 14: number of records 0"),
        (Rule.PAIRS, "a pair of an earlier segment", facts(duplicates="error"),
     f"{DAY}: rule 11: record 0 repeats user 6 and item 3, expected each pair once"),
    ]  # fmt: skip
"""As `MUTATIONS`, of a folder of two segments."""


@pytest.mark.parametrize(
    ("rule", "name", "mutate", "words"), SEGMENT_MUTATIONS, ids=[f"{m[0].value} {m[1]}" for m in SEGMENT_MUTATIONS]
)
def test_fault_G30_a_segment_that_breaks_a_rule_is_refused_by_its_number(
    rule: Rule, name: str, mutate: Change, words: str, grown: Path
) -> None:
    mutate(grown)
    is_refused(check_buckets(grown), {rule}, words, {Rule.COUNTS})


def test_a_segment_that_repeats_pairs_meets_the_contract(grown: Path) -> None:
    assert check_buckets(grown, SCHEMA) == []


def is_refused(problems: list[str], wanted: set[Rule], words: str, follow: Set[Rule] = frozenset()) -> None:
    """Check that the problems are of one rule, on lines of their own, apart from those that follow from it."""
    assert rules(problems) - follow == wanted - follow, problems
    assert any(words in line for line in problems), problems
    assert not any("\n" in line for line in problems)


def rules(problems: list[str]) -> set[int]:
    return {int(re.findall(r": rule (\d+): ", line)[0]) for line in problems}


@pytest.mark.parametrize(
    ("rule", "name", "mutate", "words"), MUTATIONS, ids=[f"{m[0].value} {m[1]}" for m in MUTATIONS]
)
def test_fault_G30_a_folder_that_breaks_a_rule_is_refused_by_its_number(
    rule: Rule, name: str, mutate: Change, words: str, folder: Path
) -> None:
    mutate(folder)
    is_refused(check_buckets(folder, SCHEMA), {rule}, words)


def test_every_rule_of_the_contract_has_a_mutation() -> None:
    page = (ROOT / "docs" / "prepared-format.md").read_text(encoding="utf-8")
    numbers = [int(n) for n in re.findall(r"^(\d+)\. ", page, re.M)]
    assert numbers == [rule.value for rule in Rule]
    assert {rule for rule, *_ in MUTATIONS} == set(Rule)


def test_a_folder_that_plain_python_wrote_meets_the_contract(folder: Path) -> None:
    assert check_buckets(folder, SCHEMA) == []
    assert api.check_buckets(folder) == []


def test_a_schema_without_times_or_averages_needs_none(tmp_path: Path) -> None:
    write_buckets(tmp_path / "buckets", LOG, timed=False, rich=False)
    features = [f for f in SCHEMA.features if f.name != "liking"]
    schema = Schema.model_validate(SCHEMA.model_dump() | {"time": "", "features": features})
    assert check_buckets(tmp_path / "buckets", schema) == []
    assert rules(check_buckets(tmp_path / "buckets", SCHEMA)) == {Rule.SCHEMA}


def test_a_schema_that_allows_no_repeated_pairs_needs_a_log_without(folder: Path) -> None:
    strict = SCHEMA.model_copy(update={"duplicates": "error"})
    (problem,) = check_buckets(folder, strict)
    assert problem == f"{FACTS}: rule 12: duplicates 'last', expected 'error' as in the schema"
    facts(duplicates="error")(folder)
    assert check_buckets(folder, strict) == []
    assert check_buckets(folder, SCHEMA) == []


def test_kept_repeats_are_no_problem_and_need_a_schema_that_keeps_them(folder: Path) -> None:
    cell(FIRST, "item", 2, 1)(folder)
    assert rules(check_buckets(folder)) == {Rule.PAIRS}
    facts(duplicates="keep")(folder)
    kept = SCHEMA.model_copy(update={"duplicates": "keep"})
    assert check_buckets(folder, kept) == []
    (problem,) = check_buckets(folder, SCHEMA)
    assert problem == f"{FACTS}: rule 12: duplicates 'keep', expected 'last' as in the schema"


def test_every_problem_is_one_of_the_list(folder: Path) -> None:
    """One line for each rule that a file breaks; further files are read to their end."""
    for change in (swapped(FIRST, 4, 5), swapped(FIRST, 1, 2), cell(LAST, "item", 1, 9), facts(positives=1)):
        change(folder)
    assert [line.partition(",")[0] for line in check_buckets(folder)] == [
        f"{FIRST}: rule 10: record 2 has user 1",
        f"{LAST}: rule 8: record 1 has item 9",
        f"{FACTS}: rule 14: positives 1",
    ]


IDS = st.sampled_from(
    [*(i for ids in SAME_HASH.values() for i in map(str, ids)), "", "a", "用户", "🙂", "a b", "\u0000"]
)
NUMBERS = st.sampled_from([3447, 102617, 0, -1, 2**63 - 1, -(2**63), 5])
EVENTS = [
    st.builds(Event, ids, st.integers(0, 5), st.integers(1_600_000_000_000_000, 1_600_000_000_000_003), st.just(3.0))
    for ids in (IDS, NUMBERS)
]


@settings(deadline=None, max_examples=30)
@given(
    log=st.one_of(*(st.lists(e, min_size=1, max_size=30) for e in EVENTS)),
    n_buckets=st.integers(1, 9),
    timed=st.booleans(),
    rich=st.booleans(),
    later=st.lists(st.integers(1, 30), max_size=2),
)
def test_any_small_log_that_a_naive_writer_sorted_meets_the_contract(
    log: Log, n_buckets: int, timed: bool, rich: bool, later: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("log") / "buckets"
    write_buckets(folder, log, n_buckets, timed, rich, sorted(row for row in later if row <= len(log)))
    assert check_buckets(folder) == []


def test_the_writer_in_sql_makes_the_buckets_that_plain_python_makes(tmp_path: Path) -> None:
    log = pl.DataFrame(
        {
            "user_id": [str(e.user) for e in LOG],
            "item_id": [e.item for e in LOG],
            "rating": [e.label for e in LOG],
            "rated_at": [e.time // 1_000_000 for e in LOG],
        }
    )
    log.write_parquet(tmp_path / "log.parquet")
    duckdb_buckets.write_buckets(tmp_path / "log.parquet", tmp_path / "sql")
    write_buckets(tmp_path / "plain", LOG, n_buckets=duckdb_buckets.N_BUCKETS)
    averaging = {
        "label": "rating",
        "positive_above": 3.0,
        "time": "rated_at",
        "title": "",
        "features": SCHEMA.features[0:1] + SCHEMA.features[2:],
    }
    schema = Schema.model_validate(SCHEMA.model_dump() | averaging)
    assert check_buckets(tmp_path / "sql", schema) == []
    for name in (FIRST, SECOND, THIRD, LAST):
        sql, plain = (pl.read_parquet(tmp_path / made / name) for made in ("sql", "plain"))
        keys = ["user", "item", "row", "time"]
        assert sql.select(keys).equals(plain.select(pl.col(keys).cast(pl.Int64))), name
        assert sql["positive"].to_list() == [LOG[row].label > 3 for row in plain["row"]]


def test_the_sql_of_the_page_adds_the_segment_that_plain_python_adds(tmp_path: Path) -> None:
    folder, first = tmp_path / "sql", len(LOG)
    columns = {
        "user_id": [str(e.user) for e in DAYS], "item_id": [e.item for e in DAYS], "rating": [e.label for e in DAYS],
        "rated_at": [e.time / 1_000_000 for e in DAYS],
    }  # fmt: skip
    log = pl.DataFrame(columns)
    log.head(first).write_parquet(tmp_path / "first.parquet")
    log.slice(first).write_parquet(tmp_path / "day.parquet")
    duckdb_buckets.write_buckets(tmp_path / "first.parquet", folder)
    page = (ROOT / "docs" / "prepared-format.md").read_text(encoding="utf-8")
    (sql,) = re.findall(r"^```sql\n(.*?)^```$", page, re.M | re.S)
    _, _, kept = duckdb_buckets.TABLES.partition("CREATE TABLE kept")
    db = duckdb.connect()
    for view, file in (("log", tmp_path / "day.parquet"), ("users", folder / USERS), ("items", folder / ITEMS)):
        db.read_parquet(str(file), file_row_number=True).create_view(view if view == "log" else f"former_{view}")
    for side in ("user", "item"):
        view = f"SELECT file_row_number AS {side}_row, {side}_id FROM former_{side}s"
        db.execute(f"CREATE TABLE known_{side}s AS {view}")
    db.execute(sql + "CREATE TABLE kept" + kept.replace("file_row_number", f"file_row_number + {first}"))
    write_buckets(tmp_path / "plain", DAYS, later=[first])
    for side in ("user", "item"):
        found = db.sql(f"SELECT {side}_id FROM {side}s ORDER BY {side}_row").pl()
        assert found.equals(pl.read_parquet(tmp_path / "plain" / f"{side}s.parquet").select(f"{side}_id"))
    day = [pl.read_parquet(path) for path in sorted((tmp_path / "plain" / "interactions").glob("*-1.parquet"))]
    keys = ["user", "item", "row", "time"]
    expected = pl.concat(day).select(pl.col(keys).cast(pl.Int64)).sort("user", "time", "row")
    assert db.sql('SELECT "user", item, row, time FROM kept ORDER BY "user", time, row').pl().equals(expected)


def test_the_example_of_facts_on_the_page_is_valid() -> None:
    page = (ROOT / "docs" / "prepared-format.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```json\n(.*?)^```$", page, re.M | re.S)
    assert set(json.loads(example)) == set(BucketFacts.model_fields)
    BucketFacts.model_validate_json(example)


def test_check_buckets_prints_what_a_good_folder_holds(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = folder.parent / "config.toml"
    config.write_text(dump_config(SCHEMA, Config()), encoding="utf-8")
    assert run_command(["check-buckets", str(folder), "--config", str(config)]) == 0
    said = capsys.readouterr()
    assert said.out == (
        f"{folder}: 18 interactions of 20 read, of 10 users and 4 items in 4 buckets, meet docs/prepared-format.md\n"
    )
    assert said.err == ""


def test_fault_G30_check_buckets_prints_problems_and_ends_with_code_2(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    swapped(USERS, 2, 3)(folder)
    assert run_command(["check-buckets", str(folder)]) == 2
    said = capsys.readouterr()
    assert said.out.startswith(f"{USERS}: rule 4: record 3 has id 'a'")
    assert said.err == (f"error: {folder}: 1 problem; docs/prepared-format.md has the rules, write the buckets again\n")
