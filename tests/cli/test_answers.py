"""The context of a request in `recommend` and `search`."""

from __future__ import annotations

import io
import json
import re
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path

import polars as pl
import pytest
from context_worlds import HOUR, hourly, hourly_schema, hourly_settings, right_item

from twotower import api
from twotower.arrays.ragged import Values
from twotower.cli.app import run_command
from twotower.cli.flags import read_context
from twotower.data.dataset import build_dataset
from twotower.data.split import SplitConfig
from twotower.data.tables import check
from twotower.errors import ConfigError
from twotower.features.categorical import Categorical
from twotower.features.hour_of_day import HourOfDay
from twotower.features.numeric import Numeric
from twotower.features.text import Text
from twotower.retrieval.query import Query
from twotower.retrieval.request import Request
from twotower.retrieval.request_body import Json
from twotower.retrieval.user_inputs import ContextValues

WORDS = ["red shoes", "blue sky", "green tea", "old books", "new music", "warm coat", "cold water", "fast car"]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A bundle whose model reads the hour, and a query that says the hour in words; and the last line of its
    publishing."""
    folder = tmp_path_factory.mktemp("answers")
    users, items, actions = hourly()
    actions = actions.with_columns(query=pl.Series([WORDS[h] for h in actions["hour"].to_list()]))
    schema = hourly_schema(HOUR, Text(name="query", side="context"))
    api.fit((users, items, actions), schema, hourly_settings(), folder=folder / "run")
    return folder / "store", publish(folder)


def publish(folder: Path) -> str:
    """Publish folder/run to folder/store, and return the last line of what that prints."""
    with redirect_stdout(io.StringIO()) as out:
        assert run_command(["publish", str(folder / "run"), "--store", str(folder / "store"), "--force"]) == 0
    return out.getvalue().splitlines()[-1]


@pytest.fixture(scope="module")
def store(published: tuple[Path, str]) -> Path:
    return published[0]


def test_similar_items_are_those_of_the_retriever(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = api.retriever(store).similar("3", 4)
    words = ["similar", "--store", str(store), "--item", "3", "-k", "4"]
    assert run_command([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["items"] == [asdict(item) for item in expected.items]
    assert run_command(words) == 0
    shown = capsys.readouterr().out
    assert all(f". {item.title}  (id {item.id}, {item.score:+.3f})" in shown for item in expected.items)


def test_an_item_that_similar_does_not_find_is_one_line(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["similar", "--store", str(store), "--item", "nothing"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert re.fullmatch(r"error: item 'nothing' is not among the \d+ items of this bundle\n", shown.err)


def test_recommend_takes_the_context_of_a_request(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for hour in (2, 6):
        told = ["--context", f"hour={hour}", "--context", f"query={WORDS[hour]}", "--keep-seen"]
        assert run_command(["recommend", "--store", str(store), "--user", "3", "-k", "1", *told, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["items"][0]["id"] == str(right_item(3, hour))
    assert run_command(["recommend", "--store", str(store), "--context", "hour=1", "--context", "query=x"]) == 0


def test_a_file_and_a_flag_do_not_both_give_the_context(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "request.json").write_text('{"context": {"hour": 1}}')
    arguments = ["--features", str(tmp_path / "request.json"), "--context", "hour=1"]
    assert run_command(["recommend", "--store", str(store), *arguments]) == 2
    assert "give one of them" in capsys.readouterr().err


def test_values_are_text_or_lists() -> None:
    given = ["hour=3", 'tags=["a", "b"]', "app=2.10", "price=1.5", "page=a=b", "none=null", 'quoted="x"']
    expected = {
        "hour": "3", "tags": ["a", "b"], "app": "2.10", "price": "1.5", "page": "a=b", "none": "null", "quoted": '"x"',
    }  # fmt: skip
    assert read_context(given) == expected
    with pytest.raises(ConfigError, match="expected COLUMN=VALUE"):
        read_context(["=3"])
    with pytest.raises(ConfigError, match=r"--context tags=\[a\]: no list of JSON"):
        read_context(["tags=[a]"])


def test_text_is_read_as_the_type_of_its_column() -> None:
    users, items, actions = hourly(200)
    actions = actions.with_columns(
        price=pl.Series([1.5, 2.5] * 100), on=pl.Series([True, False] * 100), app=pl.Series(["2.1", "2.10"] * 100)
    )
    kinds = [Categorical(name=name, side="context") for name in ("on", "app", "hour")]
    schema = hourly_schema(*kinds, Numeric(name="price", side="context"), HourOfDay(name="clock"))
    values = ContextValues(build_dataset(check(users, items, actions, schema), schema, SplitConfig()))
    typed: dict[str, Json] = {"price": 1.5, "on": True, "app": "2.10", "hour": 3, "at": 1_700_002_800}
    texts = read_context([f"{name}={str(value).lower()}" for name, value in typed.items()])
    found, expected = dict[str, Values](), dict[str, Values]()
    assert values.read(Query(Request("1", context=texts)), found) == []
    assert values.read(Query(Request("1", context=typed)), expected) == []
    assert {n: v.tolist() for n, v in found.items()} == {n: v.tolist() for n, v in expected.items()}
