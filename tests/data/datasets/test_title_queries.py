"""Queries made of titles, and a search through the whole product on an invented catalogue."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from worlds import CHECKERBOARD_SCHEMA, checkerboard, settings

import twotower
from twotower import api
from twotower.cli.app import run_command
from twotower.config.experiment import Config
from twotower.config.toml import override_config
from twotower.data.dataset import build_dataset
from twotower.data.datasets import movielens, title_queries
from twotower.data.datasets.title_queries import title_words
from twotower.data.tables import check
from twotower.errors import DataError
from twotower.features.schema import Schema
from twotower.features.text import Text
from twotower.retrieval.retriever import Retriever

ROOT = Path(__file__).resolve().parents[3]
FIRST = ["Silver", "Hidden", "Broken", "Distant", "Golden", "Crimson", "Frozen", "Burning", "Paper", "Velvet"]
SECOND = ["Harbour", "Mountain", "Orchard", "Lantern", "Kingdom", "Station", "Whisper", "Garden"]


def catalogue() -> pl.DataFrame:
    """80 films that never were; every second has an article behind it."""
    titles = [
        f"{a} {b}{', The' if (i + j) % 2 else ''} ({1950 + (7 * i + j) % 50})"
        for i, a in enumerate(FIRST) for j, b in enumerate(SECOND)
    ]  # fmt: skip
    return pl.DataFrame({"item_id": range(100, 100 + len(titles)), "title": titles})


# ---- making them


@pytest.mark.parametrize(
    ("title", "expected", "year"),
    [
        ("Distant Harbour, The (1995)", [["the", "distant", "harbour"]], "1995"),
        ("Orchard, L' (Garden, A) (a.k.a. Plum Tree) (2001)", [["l'", "orchard"], ["a", "garden"], ["plum", "tree"]],
         "2001"),
        ("Nobody's Fool: Part 2", [["nobody's", "fool", "part", "2"]], ""),
        ("1984 (1984)", [["1984"]], "1984"),
        ("七人 (1954)", [["七人"]], "1954"),
        ("(1999)", [], "1999"),
        ("???", [], ""),
    ],
)  # fmt: skip
def test_a_title_has_names_and_a_year(title: str, expected: list[list[str]], year: str) -> None:
    found, when = title_words(title)
    assert when == year
    assert [[w.replace("'", "") for w in name] for name in found] == [[w.replace("'", "") for w in n] for n in expected]


def test_queries_are_the_same_each_time_and_no_text_means_two_films() -> None:
    films = catalogue()
    made, again = title_queries.make_title_queries(films), title_queries.make_title_queries(films)
    for name in ("users", "items", "interactions"):
        assert getattr(made, name).equals(getattr(again, name))
    assert not made.users.equals(title_queries.make_title_queries(films, seed=1).users)
    assert made.users["query"].n_unique() == made.users.height == made.interactions.height
    each = made.interactions.group_by("item_id").len()
    assert each.height == films.height
    assert each["len"].max() <= title_queries.QUERIES_PER_FILM  # type: ignore[operator]
    assert each["len"].mean() > 6  # type: ignore[operator]
    assert made.items.equals(films)
    twins = pl.DataFrame({"item_id": [1, 2, 3], "title": ["Twin (1950)", "Twin (1950)", None]})
    asked = title_queries.make_title_queries(twins).users["query"].to_list()
    assert asked, "typos that one of them alone was asked by"
    assert "twin" not in asked, "it means both"


def test_queries_leave_out_move_shuffle_and_mistype() -> None:
    made = title_queries.make_title_queries(catalogue())
    joined = made.interactions.join(made.users, on="query_id").join(made.items, on="item_id")
    whole = {True: 0, False: 0}
    kinds = dict.fromkeys(("short", "shuffled", "mistyped", "year", "article", "plain"), 0)
    for text, title in joined.select("query", "title").rows():
        (words,), year = title_words(title)
        asked = text.split()
        known = [w for w in asked if w in words]
        kinds["year"] += year in asked
        kinds["article"] += words[0] == "the" and "the" not in asked
        kinds["mistyped"] += any(w not in (*words, year) for w in asked)
        kinds["shuffled"] += known != [w for w in words if w in known]
        kinds["short"] += len([w for w in asked if w != year]) < len([w for w in words if w != "the"])
        kinds["plain"] += asked == words
        whole[set(asked) <= {*words, year}] += 1
    assert min(kinds.values()) > 0.02 * joined.height, kinds
    assert whole[True] > 0.25 * joined.height


def test_films_that_are_asked_for_late_are_new_to_a_split_in_time_and_not_to_a_random_one() -> None:
    schema = movielens.TITLES_SCHEMA
    made = title_queries.make_title_queries(catalogue())
    tables = check(made.users, made.items, made.interactions, schema)
    for kind, new in (("time", True), ("random", False)):
        data = build_dataset(tables, schema, override_config(Config(), [f"split.kind={kind}"]).split)
        asked = np.bincount(data.train.item, minlength=len(data.items))
        assert (asked == 0).any() is np.bool_(new)
        assert set(data.test.user.tolist()).isdisjoint(data.train.user.tolist()), "held-out queries are new"
        late = np.isin(data.test.item, np.flatnonzero(asked == 0))
        assert bool(late.any()) is new


def archive(path: Path) -> Path:
    """A MovieLens 1M with the catalogue's films."""
    films = "\n".join(f"{i}::{t}::Drama" for i, t in catalogue().rows()).encode()
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as z:
        z.writestr("ml-1m/movies.dat", films)
        z.writestr("ml-1m/users.dat", "1::F::1::10::48067\n")
        z.writestr("ml-1m/ratings.dat", "1::100::5::978300760\n")
    path.write_bytes(buffer.getvalue())
    return path


# ---- the whole way


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example trained through the command line on a small archive, and published."""
    folder = tmp_path_factory.mktemp("search")
    source = archive(folder / "ml-1m.zip")
    small = [
        "model.width=32", "model.pairs.0.user.layers=[32, 16]", "model.pairs.0.item.layers=[32, 16]", "train.epochs=25",
        "train.batch_size=64", "train.lr=0.005", "evaluation.bootstrap=0",
        f"data.dataset={{kind='ml-1m-titles', archive='{source}'}}", "split.kind=time",
        "evaluation.new_item_below=1",
    ]  # fmt: skip
    sets = [x for s in small for x in ("--set", s)]
    assert call("train", ROOT / "examples" / "title-search.toml", "--run", folder / "run", *sets) == 0
    assert call("publish", folder / "run", "--store", folder / "store", "--force") == 0
    return folder


def call(*arguments: object) -> int:
    return run_command([str(a) for a in arguments])


@pytest.fixture(scope="module")
def retriever(world: Path) -> Retriever:
    return api.retriever(world / "store")


def test_a_mistyped_title_finds_its_film_and_a_film_nobody_asked_for_is_found_too(world: Path) -> None:
    metrics = api.load(world / "run").metrics
    assert metrics["test.recall@10"] > 0.75
    assert metrics["test.rows.new_item"] > 0
    assert metrics["test.recall@10.new_item"] > 0.5
    assert metrics["baseline.popularity.recall@10"] < 0.3


def test_the_command_line_finds_a_film(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = world / "store"
    assert call("search", "--store", store, "silver harbuor", "-k", 3) == 0
    shown = capsys.readouterr().out
    assert "Silver Harbour" in shown.splitlines()[1]
    assert "method 2, " in shown.splitlines()[0]
    assert call("search", "--store", store, "the frozen lantern", "-k", 2, "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["items"][0]["title"].startswith("Frozen Lantern")
    assert (answer["source"], answer["method"], answer["unknown"], len(answer["items"])) == ("model", 2, [], 2)
    assert call("search", "--store", store, "lantern", "--where", "year=1951", "--json") == 0
    years = {i["title"][-5:-1] for i in json.loads(capsys.readouterr().out)["items"]}
    assert years == {"1951"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([" ?! 🎬"], "the text holds no word"),
        (["lantern", "--feature", "qery"], "no text feature 'qery'; did you mean 'query'? (allowed: query)"),
        (["lantern", "-k", "0"], "k is 0"),
    ],
)
def test_a_search_that_cannot_be_made_is_one_line_and_exit_code_2(
    world: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("search", "--store", world / "store", *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


def test_a_text_of_which_nothing_is_known_gets_what_is_popular(
    world: Path, retriever: Retriever, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = retriever.search("七人の侍", 5)
    assert (answer.source, answer.unknown, len(answer.items)) == ("popular", ["query"], 5)
    assert [i.id for i in answer.items] == [i.id for i in retriever.recommend(twotower.Request(), 5).items]
    assert call("search", "--store", world / "store", "七人の侍") == 0
    assert "no known word in the text: popular items" in capsys.readouterr().out
    mixed = retriever.search("七人 velvet garden", 3)
    assert mixed.source == "model"
    assert mixed.items[0].title.startswith("Velvet Garden")


def test_a_very_long_text_and_half_a_character_are_answered(retriever: Retriever) -> None:
    long = "golden kingdom " * 50_000
    assert retriever.search(long, 1).items[0].title.startswith("Golden Kingdom")
    assert retriever.search("x" * 100_000 + " golden", 1).items
    assert retriever.search("golden kingdom \ud800", 1).items[0].title.startswith("Golden Kingdom")
    with pytest.raises(DataError, match="the text is None, expected text"):
        retriever.search(None)  # type: ignore[arg-type]


def test_a_search_is_the_tower_on_the_text_and_the_same_as_a_stored_query(world: Path, retriever: Retriever) -> None:
    data = api.load(world / "run").dataset
    for row in data.test.user[:20].tolist():
        text = data.users.frame["query"][row]
        found = retriever.search(text, 5)
        stored = retriever.recommend(twotower.Request(str(data.users.ids[row])), 5, keep_seen=True)
        assert [i.id for i in found.items] == [i.id for i in stored.items]
    assert api.evaluate_bundle(retriever)["live"]["recall@10"] == pytest.approx(
        api.evaluate_bundle(retriever)["index"]["recall@10"]
    )


def test_which_text_is_searched_must_be_clear(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    users, items, actions = checkerboard()
    users = users.with_columns(first=pl.lit("even ") + (pl.col("user_id") % 2).cast(pl.String), second=pl.lit("x"))
    schema: Schema = CHECKERBOARD_SCHEMA.model_copy(
        update={"features": (*CHECKERBOARD_SCHEMA.features, *(Text(name=n, side="user") for n in ("first", "second")))}
    )
    for name, given in (("none", CHECKERBOARD_SCHEMA), ("two", schema)):
        run = twotower.fit((users, items, actions), given, settings(train={"epochs": 1}), folder=tmp_path / name)
        api.publish(run, tmp_path / f"{name}-store")
    assert call("search", "--store", tmp_path / "none-store", "even") == 2
    assert "have no text feature" in capsys.readouterr().err
    assert call("search", "--store", tmp_path / "two-store", "even") == 2
    assert "the users have 2 text features; name one of first, second" in capsys.readouterr().err
    assert call("search", "--store", tmp_path / "two-store", "even 1", "--feature", "first") == 0
    both = Text(name="pairs", side="user", column="first", n=2)
    one: Schema = CHECKERBOARD_SCHEMA.model_copy(update={"features": (*schema.features[:3], both)})
    run = twotower.fit((users, items, actions), one, settings(train={"epochs": 1}), folder=tmp_path / "one")
    api.publish(run, tmp_path / "one-store")
    capsys.readouterr()
    assert call("search", "--store", tmp_path / "one-store", "even 1") == 0, (
        "two features of one column are no question"
    )
