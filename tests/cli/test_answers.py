"""The context of a request in `recommend` and `search`."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest
from context_worlds import HOUR, hourly, hourly_schema, hourly_settings, right_item

from twotower import api
from twotower.cli.app import run_command
from twotower.cli.flags import read_context
from twotower.errors import ConfigError
from twotower.features.text import Text

WORDS = ["red shoes", "blue sky", "green tea", "old books", "new music", "warm coat", "cold water", "fast car"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose model reads the hour, and a query that says the hour in words."""
    folder = tmp_path_factory.mktemp("answers")
    users, items, actions = hourly()
    actions = actions.with_columns(query=pl.Series([WORDS[h] for h in actions["hour"].to_list()]))
    schema = hourly_schema(HOUR, Text(name="query", side="context"))
    run = api.fit((users, items, actions), schema, hourly_settings(), folder=folder / "run")
    api.publish(run, folder / "store")
    return folder / "store"


def test_recommend_takes_the_context_of_a_request(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for hour in (2, 6):
        told = ["--context", f"hour={hour}", "--context", f"query={WORDS[hour]}", "--method", "2", "--keep-seen"]
        assert run_command(["recommend", "--store", str(store), "--user", "3", "-k", "1", *told, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["items"][0]["id"] == str(right_item(3, hour))
    assert (
        run_command(
            ["recommend", "--store", str(store), "--context", "hour=1", "--context", "query=x", "--method", "2"]
        )
        == 0
    )


def test_search_takes_a_text_and_the_rest_of_the_context(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["search", "--store", str(store), WORDS[4], "--context", "hour=4", "-k", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {item["id"] for item in found["items"]} == {str(right_item(user, 4)) for user in (0, 1)}
    assert run_command(["search", "--store", str(store), WORDS[4]]) == 2
    assert "context lacks 'hour'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--user", "3"], "use method 2"),
        (["--user", "3", "--method", "2"], "context lacks 'hour' (needed: hour, query)"),
        (["--user", "3", "--method", "2", "--context", "hour"], "--context hour: expected COLUMN=VALUE"),
        (["--user", "3", "--context", "hour=1", "--context", "hour=2"], "a second value of hour"),
        (["--users", "u.csv", "--out", "o", "--context", "hour=1"], "leave out --user, --features, --context"),
    ],
)
def test_a_wrong_context_is_refused_in_one_line(
    store: Path, arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["recommend", "--store", str(store), *arguments]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


def test_a_file_and_a_flag_do_not_both_give_the_context(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "request.json").write_text('{"context": {"hour": 1}}')
    arguments = ["--features", str(tmp_path / "request.json"), "--context", "hour=1"]
    assert run_command(["recommend", "--store", str(store), *arguments]) == 2
    assert "give one of them" in capsys.readouterr().err


def test_values_are_json_or_text() -> None:
    given = ["hour=3", 'tags=["a", "b"]', "device=phone", "price=1.5", "page=a=b", "none=null"]
    expected = {"hour": 3, "tags": ["a", "b"], "device": "phone", "price": 1.5, "page": "a=b", "none": None}
    assert read_context(given) == expected
    with pytest.raises(ConfigError, match="expected COLUMN=VALUE"):
        read_context(["=3"])
