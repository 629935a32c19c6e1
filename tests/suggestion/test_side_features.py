"""Features of the columns of a table, by their values."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence

import polars as pl
import pytest

from twotower.suggestion.side_features import MAX_CATEGORIES, MAX_NAMES, MAX_NUMBERS, MAX_STEPS, guess_features

N = 2200


def kind(name: str, values: Sequence[object], n: int = N) -> tuple[str, Mapping[str, object]]:
    """Return the kind and the options of a column that repeats some values, "" and the note if it is left out."""
    table = pl.DataFrame({"item_id": range(n), name: [values[i % len(values)] for i in range(n)]}, strict=False)
    found = guess_features(table, "item", "item_id")
    if not found.features:
        return "", {"note": found.notes[0]}
    options = dict(found.features[0].options)
    assert options.pop("side") == "item"
    assert options.pop("name") == name
    return str(options.pop("kind")), options


@pytest.mark.parametrize("name", ["price", "page_count"])
def test_numbers_that_are_text_are_told_and_are_no_title(name: str) -> None:
    for make in ("{}", "{}.50"):
        numbers = [make.format(n) for n in range(1, N + 1)]
        assert kind(name, numbers)[1]["note"] == (
            f"'{name}' of the items, {N:,} distinct values of numbers that are text; make them numbers"
        )
    for make in ("{}.50", "${}.50"):
        table = pl.DataFrame({"item_id": range(N), name: [make.format(n) for n in range(N)]})
        assert guess_features(table, "item", "item_id").title == ""
    assert kind("price", [f"{n}" for n in range(60)])[0] == ""
    assert kind("version", [f"1.{n}" for n in range(60)])[0] == "categorical"
    assert kind("zip", [f"{n:04}" for n in range(60)])[0] == "categorical"


@pytest.mark.parametrize(
    "dtype",
    [pl.String, pl.Float64, pl.List(pl.Float32), pl.List(pl.String), pl.Array(pl.Float64, 3), pl.Date, pl.Boolean],
)
def test_a_column_without_a_value_is_missing(dtype: pl.DataType) -> None:
    table = pl.DataFrame({"item_id": range(N), "x": pl.Series([None] * N, dtype=dtype)})
    found = guess_features(table, "item", "item_id")
    assert (found.features, found.notes) == ((), (f"'x' of the items, {N:,} of {N:,} values are missing",))


def test_sparse_columns_whose_values_recur_in_no_other_row_are_left_out() -> None:
    for value in ("https://a/{}", "note {} of this", "a{0}|b{0}"):
        texts = [value.format(n) if n % 8 == 0 else None for n in range(N)]
        assert "values are missing" in str(kind("x", texts)[1]["note"])
    lists = [[f"a{n}", f"b{n}"] if n % 8 == 0 else None for n in range(N)]
    assert "values are missing" in str(kind("x", lists)[1]["note"])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["red", "blue"], "categorical"),
        ([True, False], "categorical"),
        ([*range(MAX_NUMBERS)], "categorical"),
        ([*range(MAX_NUMBERS + 1)], "numeric"),
        ([i / 3 for i in range(50)], "numeric"),
        ([f"c{i}" for i in range(MAX_CATEGORIES)], "categorical"),
        ([*range(N)], ""),
        ([7], ""),
        (["x", None, None], ""),
        ([datetime.date(2020, 1, 1 + i) for i in range(20)], "date"),
        ([f"A film about {i} things" for i in range(N)], "text"),
        ([f"电影{i}" for i in range(N)], "text"),
        (["young adults", "old people"], "categorical"),
        ([["a", "b"], ["b"], []], "multi_hot"),
        ([[0.5, 1.5], [2.0, 1.0]], "vector"),
        ([[0.5, 1.5], [2.0]], ""),
    ],
)
def test_kinds_of_columns(values: list[object], expected: str) -> None:
    assert kind("column", values)[0] == expected


@pytest.mark.parametrize("separator", ["|", ";", ",", " ", ", ", "; ", " | "])
def test_lists_in_text_have_their_separator(separator: str) -> None:
    values = [separator.join(["Action", "Drama", "War"][: 1 + i % 3]) for i in range(3)]
    assert kind("genres", values) == ("multi_hot", {"separator": separator})


@pytest.mark.parametrize(("separator", "expected"), [("|", "multi_hot"), ("; ", "multi_hot"), (", ", "text")])
def test_lists_of_many_names_have_a_clear_separator(separator: str, expected: str) -> None:
    """A comma may stand within a name."""
    authors = [separator.join(f"A. Smith{n % 1400}" for n in (i, 7 * i + 1)) for i in range(N)]
    assert kind("authors", authors)[0] == expected
    table = pl.DataFrame({"user_id": range(N), "authors": authors})
    found = guess_features(table, "user", "user_id").features
    assert [f.options["kind"] for f in found] == ["text"], "of users they are too many"


def test_titles_descriptions_and_numbers_with_such_a_separator_are_no_lists_of_names() -> None:
    assert kind("title", [f"Model {i} lamp | Lamps | Acme Store" for i in range(N)])[0] == "text"
    assert (
        kind("description", [f"Lamp number {i} of glass; ships in 2 days; made in China" for i in range(N)])[0]
        == "text"
    )
    assert kind("size", [f"{i % 1400}.5|{i % 7}" for i in range(N)])[0] != "multi_hot"


def test_a_sentence_is_no_list() -> None:
    sentences = [f"A{i}, the {['good', 'bad'][i % 2]}, of {i % 7}, or more" for i in range(N)]
    assert kind("about", sentences)[0] == "text"
    assert kind("title", ["red planet", "blue moon"])[0] == "text"


@pytest.mark.parametrize(
    ("distinct", "n", "expected"),
    [(1650, N, "categorical"), (1651, N, "text"), (MAX_NAMES, 2 * MAX_NAMES, "categorical"), (MAX_NAMES + 1, 3 * MAX_NAMES, "text")],
)  # fmt: skip
def test_names_that_recur_are_categories(distinct: int, n: int, expected: str) -> None:
    assert kind("author", [f"A. Smith{i}" for i in range(distinct)], n)[0] == expected
    assert kind("author", [f"A. Smith{i} of no fixed abode" for i in range(1100)])[0] == "text", "no name"
    assert kind("title", [f"A. Smith{i}" for i in range(1100)])[0] == "text", "by its name"


@pytest.mark.parametrize(("alone", "expected"), [(900, "categorical"), (901, "text")])
def test_names_most_of_which_stand_once_are_categories_where_half_of_the_items_share_theirs(
    alone: int, expected: str
) -> None:
    """As of directors: a few have most of the films, and most have one."""
    n = 1800
    names = [f"A. Smith{i}" for i in range(alone)] + [f"B. Jones{i % 300}" for i in range(n - alone)]
    table = pl.DataFrame({"item_id": range(n), "director": names})
    found = guess_features(table, "item", "item_id").features[0]
    assert found.options["kind"] == expected
    assert found.is_name == (expected == "categorical"), "what tells few items apart makes no others the same"
    assert ("50% have one that another has too" in found.why) == found.is_name
    assert guess_features(table.rename({"director": "title"}), "item", "item_id").features[0].is_text
    of_users = guess_features(table.rename({"item_id": "user_id"}), "user", "user_id")
    assert [f.options["kind"] for f in of_users.features] == ["text"], "of users they are too many"


def test_few_names_of_one_word_are_categories_where_half_of_the_items_share_theirs() -> None:
    brands = [f"b{i}" for i in range(25)] + [f"c{i % 9}" for i in range(25)]
    assert kind("brand", brands, 50)[0] == "categorical"
    assert "too many for a category" in str(kind("brand", [f"d{i}" for i in range(30)] + brands[30:], 50)[1]["note"])


def test_names_of_half_of_the_items_recur_among_those() -> None:
    assert kind("author", [f"tale of {i}" for i in range(900)] + [None] * 900, 1800)[0] == "text"


@pytest.mark.parametrize("separator", [" |", "|  ", ",  "])
def test_spaces_that_would_be_part_of_the_values_make_no_list(separator: str) -> None:
    values = [separator.join(["Action", "Drama", "War"][: 1 + i % 3]) for i in range(3)]
    assert kind("genres", values)[0] != "multi_hot"


@pytest.mark.parametrize(("n", "expected"), [(MAX_CATEGORIES, 1), (MAX_CATEGORIES + 1, 0)])
def test_categories_of_users_are_fewer(n: int, expected: int) -> None:
    table = pl.DataFrame({"user_id": range(N), "area": [f"c{i % n}" for i in range(N)]})
    assert len(guess_features(table, "user", "user_id").features) == expected


def test_lists_with_a_space_behind_some_separators_are_text() -> None:
    values = ["Action, Drama", "Drama,War", "War, Action"]
    assert kind("genres", [f"{value}, {i}" for i, value in enumerate(values * 400)])[0] == "text"


def test_numbers_have_buckets() -> None:
    assert kind("price", [i / 3 for i in range(500)]) == ("numeric", {"buckets": 10})


def test_whole_numbers_beside_missing_ones_are_categories_as_without_a_gap() -> None:
    codes = [float(i) for i in range(MAX_NUMBERS)]
    assert kind("subgroup", [*codes, None]) == ("categorical", {})
    assert kind("subgroup", [*codes[1:], float("nan")]) == ("categorical", {})
    assert kind("subgroup", codes)[0] == "numeric", "a program has no reason to write a point"
    assert kind("subgroup", [*codes, MAX_NUMBERS, None])[0] == "numeric"
    assert kind("subgroup", [*codes, 0.5, None][1:])[0] == "numeric"
    assert kind("num_pages", [*codes, None])[0] == "numeric", "a measure"


@pytest.mark.parametrize(
    "name",
    [
        "brand_id",
        "manufacturerId",
        "colour_code",
        "department_no",
        "category",
        "seller",
        "main_category",
        "品牌",
        "店铺编号",
        "categoryid",
        "brand_number",
        "cat_idx",
        "from_city_id",
        "country_of_origin_id",
        "age_group_id",
    ],
)
def test_numbers_of_a_code_are_categories(name: str) -> None:
    codes = [7 * i for i in range(1100)]
    assert kind(name, codes) == ("categorical", {})
    assert kind(name, [*map(float, codes), float("nan")], 2202) == ("categorical", {}), (
        "as a program writes them beside missing ones"
    )
    assert kind("price", codes) == ("numeric", {"buckets": 10})
    assert kind(name, [i / 3 for i in range(500)])[0] == "numeric", "no whole numbers"
    assert "too many for a category" in str(kind(name, [*range(1101)])[1]["note"]), "each stands for two rows"


@pytest.mark.parametrize(
    "name",
    [
        "zip_code",
        "postcode_id",
        "rank_in_category",
        "distance_to_city",
        "num_colour",
        "area",
        "followers_of_artist",
        "reviews_no",
    ],
)
def test_near_post_codes_are_near_places_and_quantities_are_no_codes(name: str) -> None:
    assert kind(name, [*range(500)])[0] == "numeric"


@pytest.mark.parametrize(("n", "expected"), [(MAX_CATEGORIES, 1), (MAX_CATEGORIES + 1, 0)])
def test_codes_of_users_are_fewer(n: int, expected: int) -> None:
    table = pl.DataFrame({"user_id": range(N), "city_id": [i % n for i in range(N)]})
    assert [f.options["kind"] for f in guess_features(table, "user", "user_id").features] == ["categorical"] * expected


def test_what_is_left_out_is_told() -> None:
    assert "too many for a category" in str(kind("zip", [f"z{i}" for i in range(N)])[1]["note"])
    assert "1,466 of 2,200 values are missing" in str(kind("x", ["x", None, None])[1]["note"])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["red", "blue"], "categorical"),
        (["a|b", "c|a|d", "b"], "multi_hot"),
        ([["a"], ["b", "c"]], "multi_hot"),
        ([0.5, 1.5, 2.25], None),
        (["2001-02-03", "2004-05-06"], None),
        (["words of one", "other words"], "categorical"),
    ],
)
def test_categories_and_lists_are_read_where_most_values_are_missing(
    values: list[object], expected: str | None
) -> None:
    for share, among in ((16, True), (24, False)):
        some = [values[n // share % len(values)] if n % share == 0 else None for n in range(N)]
        found, note = kind("x", some)
        assert (found or None) == (expected if among else None)
        assert "values are missing" in str(note) or found


TITLES = {
    "Bezeichnung": [f"Bohrer {'abcdefghij'[n % 10]}{'xyzuv'[n % 5]} {n}" for n in range(60)],
    "wort": [f"wort{chr(97 + n % 26)}{chr(97 + n // 26)}" for n in range(60)],
    "xx": [f"中文{chr(0x4E00 + 7 * n)}" for n in range(60)],
    "langer_text": [f"a long description of the item with the number {n}" for n in range(60)],
    "sku": [f"SKU-{n:05d}" for n in range(60)],
    "asin": [f"B{n:02d}XW{n:02d}P" for n in range(60)],
    "link": [f"https://shop.example/item{chr(97 + n % 26)}{chr(97 + n // 26)}" for n in range(60)],
    "seit": [f"{1 + n % 28:02d}.{1 + n % 12:02d}.2020 10:{n:02d}" for n in range(60)],
    "marke": ["Acme Works", "Other Works"] * 30,
}


@pytest.mark.parametrize(
    ("columns", "title"),
    [
        (["sku", "marke", "Bezeichnung"], "Bezeichnung"),
        (["langer_text", "wort", "link"], "wort"),
        (["asin", "xx"], "xx"),
        (["seit", "langer_text"], "langer_text"),
        (["asin", "seit", "marke"], ""),
    ],
)
def test_a_text_that_is_nearly_unique_is_the_title_whatever_its_name(columns: list[str], title: str) -> None:
    table = pl.DataFrame({"item_id": range(60), **{c: TITLES[c] for c in columns}})
    assert guess_features(table, "item", "item_id").title == title
    some = table.with_columns(pl.col(title).gather(pl.int_range(60) // 2)) if title else table
    assert not title or guess_features(some, "item", "item_id").title != title or title == "langer_text"
    assert guess_features(table.with_columns(title=pl.lit("x")), "item", "item_id").title == "title"


@pytest.mark.parametrize(
    ("columns", "title"), [(["about", "name"], "name"), (["about"], "about"), (["brand"], ""), (["kind_of"], "")]
)
def test_the_title_is_a_name_or_the_first_text(columns: list[str], title: str) -> None:
    values = {
        "about": [f"words and words {i}" for i in range(60)],
        "name": ["x y", "z y"] * 30,
        "brand": ["a", "b"] * 30,
        "kind_of": ["red a", "red b"] * 30,
    }
    table = pl.DataFrame({"item_id": range(60), **{c: values[c] for c in columns}})
    assert guess_features(table, "item", "item_id").title == title
    assert guess_features(table, "user", "item_id").title == ""


@pytest.mark.parametrize(
    "name",
    [
        "year",
        "releaseYear",
        "birth_year",
        "age",
        "user_age",
        "num_pages",
        "price",
        "年龄",
        "出生年份",
        "页数",
        "rating_count",
    ],
)
def test_whole_numbers_of_a_measure_are_alike_where_they_are_near(name: str) -> None:
    most = [*range(MAX_STEPS)] * 3
    assert kind(name, most)[0] == "categorical", "few steps, such as numbers of rooms"
    assert kind(name, [*range(MAX_STEPS + 1)] * 3)[0] == "numeric"
    assert kind(name, [*range(MAX_STEPS + 1)])[0] == "numeric", "a measure of distinct values is no key"


@pytest.mark.parametrize("name", ["price_category", "age_group", "page_id", "occupation", "score_type", "year_code"])
def test_whole_numbers_of_codes_and_of_unknown_names_are_categories(name: str) -> None:
    assert kind(name, [*range(MAX_STEPS + 1)] * 3)[0] == "categorical"


@pytest.mark.parametrize(
    ("values", "options"),
    [
        ([f"2020-01-{1 + i % 28:02} 10:00:00" for i in range(60)], {}),
        ([f"{1 + i % 28}.{1 + i % 12}.2020" for i in range(60)], {"format": "%d.%m.%Y"}),
        ([f"{1 + i % 12}/{1 + i % 28}/2020 9:30" for i in range(60)], {"format": "%m/%d/%Y %H:%M"}),
        ([f"Jan {1 + i % 28}, 2020" for i in range(60)], {"format": "%b %d, %Y"}),
        ([datetime.datetime(2020, 1, 1 + i % 28, 10) for i in range(60)], {}),
    ],
)
def test_dates_are_days_in_buckets(values: list[object], options: dict[str, str]) -> None:
    assert kind("published", values) == ("date", {"buckets": 16, **options})
    for name in ("last_review", "updated_at", "last_sold_date"):
        assert "a date that changes with the rows gives the answers away" in str(kind(name, values)[1]["note"])


@pytest.mark.parametrize(
    ("values", "form"),
    [
        ([f"19{50 + i % 40}-01-{1 + i % 28:02}" for i in range(60)], ""),
        ([f"{1 + i % 28:02}/02/19{60 + i % 30}" for i in range(60)], "%d/%m/%Y"),
        ([f"{1 + i % 28}-Aug-19{60 + i % 30}" for i in range(60)], "%d-%b-%Y"),
        ([f"21{50 + i % 40}-01-{1 + i % 28:02}" if i % 9 else "" for i in range(60)], ""),
    ],
)
def test_births_and_coming_events_are_dates_too_and_an_empty_cell_is_none(values: list[object], form: str) -> None:
    assert kind("day", values) == ("date", {"buckets": 16} | ({"format": form} if form else {}))


@pytest.mark.parametrize(
    "values",
    [["1.2", "1.3"], ["10-20", "20-30"], ["2020", "2021"], ["20200101", "20200102"], ["A-2020-01", "B-2020-02"]],
)
def test_versions_ranges_and_codes_are_no_dates(values: list[str]) -> None:
    assert kind("code", values * 30)[0] == "categorical"


def test_days_and_months_in_either_order_are_told() -> None:
    values = [f"{1 + i % 12:02}.{1 + i % 7:02}.2020" for i in range(60)]
    told = "its dates fit several formats, %d.%m.%Y and %m.%d.%Y; write them as year-month-day"
    assert told in str(kind("published", values)[1]["note"])


def test_dates_of_several_forms_are_told() -> None:
    values = [*(f"20{i // 28:02}-01-{1 + i % 28:02}" for i in range(600)), "coming soon"]
    assert "no format that is tried reads all its dates; write them as year-month-day" in str(
        kind("published", values)[1]["note"]
    )
