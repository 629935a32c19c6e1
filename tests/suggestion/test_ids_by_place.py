"""Ids that no name of a column tells."""

from __future__ import annotations

from datetime import date, timedelta

import numpy as np
import polars as pl
import pytest

from twotower.errors import DataError
from twotower.suggestion.columns import guess_columns
from twotower.suggestion.ids_by_place import are_several, ids_by_place, too_few

FRAME = pl.DataFrame(
    {"a": [i % 3 for i in range(1000)], "b": [i % 10 for i in range(1000)], "c": ["x", "y"] * 500, "d": [0.5] * 1000}
)


def test_the_first_columns_of_enough_values_are_ids() -> None:
    assert ids_by_place(FRAME, (), "", ["user_id", "item_id"]) == ({"user_id": "b"}, ["a", "c"], {})
    assert ids_by_place(FRAME.head(299), (), "", ["user_id", "item_id"]) == ({"user_id": "a", "item_id": "b"}, [], {})
    assert ids_by_place(FRAME, ("b",), "b", ["item_id"]) == ({}, ["a", "c"], {})
    assert are_several(FRAME, ())
    assert not are_several(FRAME, ("a", "b"))
    assert too_few(FRAME, ["a", "c"]) == "'a' has 3 values, 'c' has 2 values, too few for ids that no name tells"
    assert too_few(FRAME, []) == ""


@pytest.mark.parametrize(("slots", "rows", "fits"), [(3, 1000, False), (9, 1000, False), (10, 1000, True), (3, 300, True), (3, 399, True), (3, 400, False)])  # fmt: skip
def test_few_values_are_no_ids_of_a_long_log(slots: int, rows: int, fits: bool) -> None:
    shown = pl.DataFrame({"slot": [i % slots for i in range(rows)], "item_id": [f"i{i % 37}" for i in range(rows)]})
    if fits:
        assert guess_columns(shown, {}, {}).options["user_id"] == "slot"
    else:
        told = rf"no column of user_id is found .*; 'slot' has {slots} values, too few for ids that no name tells\); name it"
        with pytest.raises(DataError, match=told):
            guess_columns(shown, {}, {})
        with_city = guess_columns(shown.with_columns(city=pl.Series([f"c{i % 41}" for i in range(rows)])), {}, {})
        assert with_city.options["user_id"] == "city"
        (remark,) = with_city.remarks
        assert f"tells it; 'slot' has {slots} values, too few for ids that no name tells; an override" in remark
    assert guess_columns(shown, {"user_id": "slot"}, {}).options["item_id"] == "item_id"


@pytest.mark.parametrize(
    ("names", "user", "item"),
    [(("slip", "party", "ware"), "party", "ware"), (("slip", "client_id", "ware"), "client_id", "ware"), (("ware", "slip", "party"), "party", "ware")],
    ids=["no name tells", "a name tells the user", "the goods first"],
)  # fmt: skip
def test_a_number_of_orders_is_neither_a_user_nor_an_item(names: tuple[str, ...], user: str, item: str) -> None:
    of_order = np.arange(3000) // 4
    columns = {
        "slip": 5_000 + of_order,
        "party": 100 + of_order % 90,
        "client_id": 100 + of_order % 90,
        "ware": 7 + np.random.default_rng(0).integers(60, size=3000),
    }
    days = [date(2026, 1, 1) + timedelta(days=int(n) // 10) for n in of_order]
    orders = pl.DataFrame({name: columns[name] for name in names} | {"on": days})
    found = guess_columns(orders, {}, {})
    assert (found.options["user_id"], found.options["item_id"]) == (user, item)
    assert any(note.startswith("'slip': each of its values has one '") for note in found.notes)
    assert guess_columns(orders.drop("on"), {}, {}).options["user_id"] != "party", "without a time nothing tells"


def test_a_column_of_one_date_and_one_other_value_each_is_no_number_of_orders() -> None:
    rng = np.random.default_rng(0)
    party, ware = rng.integers(300, size=3000), rng.integers(80, size=3000)
    of_party, of_ware = (
        {"area": 500 + party % 20, "joined": [date(2020, 1, 1) + timedelta(days=int(n)) for n in party]},
        {"maker": 700 + ware % 15, "released": [date(2010, 1, 1) + timedelta(days=int(n)) for n in ware]},
    )
    for beside in (of_party, of_ware, {"order_area": of_party["area"], "on": of_ware["released"]}):
        for on in ({}, {"at": [date(2026, 1, 1) + timedelta(days=n // 30) for n in range(3000)]}):
            found = guess_columns(pl.DataFrame({"party": party, "ware": ware} | beside | on), {}, {})
            assert (found.options["user_id"], found.options["item_id"]) == ("party", "ware")


def test_a_code_of_the_user_is_no_item_if_another_column_is_left() -> None:
    rng = np.random.default_rng(0)
    airline = rng.integers(0, 30, 1000)
    rows = pl.DataFrame({"Airline": airline, "AirlineID": 19_000 + airline, "Source": rng.integers(0, 60, 1000)})
    named = rows.with_columns(pl.format("L{}", "Airline").alias("Airline"))
    assert (
        guess_columns(named, {}, {}).options | {"user_id": "Airline", "item_id": "Source"}
        == guess_columns(named, {}, {}).options
    )
    assert guess_columns(named.drop("Source"), {}, {}).options["item_id"] == "AirlineID"
    post = named.rename({"Source": "zip"})
    assert guess_columns(post, {}, {}).options["item_id"] == "zip", "a post code stands before a code of the user"
    reserved = named.rename({"AirlineID": "__key"}).select("__key", "Airline", "Source")
    found_without = guess_columns(reserved, {}, {})
    assert found_without.options["user_id"] == "Airline", "no schema may name the first"
    assert found_without.notes[0].startswith(
        "'__key': names that begin with '__' are the package's own; rename the column"
    )
    once = pl.DataFrame({"a": range(1000), "b": rng.integers(0, 40, 1000), "c": rng.integers(0, 30, 1000)})
    found, _, _ = ids_by_place(once.with_columns(a=pl.col("a") // 2 * 2), ("a",), "a", ["item_id"])
    assert found == {"item_id": "b"}, "of users of two rows b is no code"


def of_users(pairs: int, rows: int = 5) -> pl.DataFrame:
    """Rows of a hundred users, each with a name of two users, or two of these as far as `pairs` of users and names go, and goods."""
    user = np.repeat(np.arange(100), rows)
    second = (np.arange(len(user)) % rows == 1) & (user < pairs - 100)
    name = np.where(second, user // 2 + 1000, user // 2)
    return pl.DataFrame({"who": user, "name_of": name, "ware": np.random.default_rng(0).integers(50, size=len(user))})


@pytest.mark.parametrize(("pairs", "fixed"), [(100, True), (101, True), (114, True), (116, False), (150, False)])
def test_a_column_of_one_value_for_nearly_every_user_is_no_item_if_another_is_left(pairs: int, fixed: bool) -> None:
    rows = of_users(pairs)
    assert rows.select("who", "name_of").n_unique() == pairs
    once = pl.DataFrame({"who": range(1000, 1400), "name_of": range(400), "ware": [n % 50 for n in range(400)]})
    for shown in (rows, pl.concat([rows, once])):
        found = guess_columns(shown, {}, {})
        assert (found.options["user_id"], found.options["item_id"]) == ("who", "ware" if fixed else "name_of")
        assert not any("nearly every user has one item" in line for line in found.remarks)
        alone = guess_columns(shown.drop("ware"), {}, {})
        assert alone.options["item_id"] == "name_of"
        assert any("'name_of' as the item: nearly every user has one item" in line for line in alone.remarks) == fixed
    given = guess_columns(rows, {"item_id": "name_of"}, {})
    assert not any("nearly every user" in line for line in given.remarks)
    named = guess_columns(rows.rename({"name_of": "item_id"}), {}, {})
    assert named.options["item_id"] == "item_id"
    assert any("'item_id' as the item: nearly every user has one item" in line for line in named.remarks) == fixed


@pytest.mark.parametrize(("shared", "own"), [(0, True), (14, True), (16, False), (100, False)])
def test_a_column_each_value_of_which_is_of_one_user_is_no_item_if_another_is_left(shared: int, own: bool) -> None:
    """Users write from two addresses each, of which some are of two users."""
    user = np.arange(2000) % 50
    address = 2 * user + np.arange(2000) // 50 % 2
    rows = pl.DataFrame({"who": user, "address": address, "file": np.random.default_rng(0).integers(300, size=2000)})
    also = rows.head(shared).with_columns(who=(pl.col("who") + 1) % 50)
    found = guess_columns(pl.concat([rows, also]), {}, {})
    assert (found.options["user_id"], found.options["item_id"]) == ("who", "file" if own else "address")
    alone = guess_columns(rows.drop("file"), {}, {})
    assert alone.options["item_id"] == "address", "no other column is left"
    seldom = rows.with_columns(address=pl.when(pl.int_range(2000) < 900).then("address").otherwise(pl.int_range(2000)))
    assert guess_columns(seldom, {}, {}).options["item_id"] == "address", "most of its values have one row"


def occasions(choices: int) -> pl.DataFrame:
    """Rows of two hundred households of three to twenty occasions, most of few, counted from 1, and what was chosen."""
    rng = np.random.default_rng(0)
    counts = 3 + rng.binomial(1, 0.2, size=200) * rng.integers(18, size=200)
    hid, occasion = np.repeat(np.arange(200), counts), np.concatenate([np.arange(1, n + 1) for n in counts])
    choice = [f"brand {n}" for n in rng.integers(choices, size=len(hid))]
    return pl.DataFrame({"hid": hid, "sale": occasion, "choice": choice})


@pytest.mark.parametrize(("choices", "item"), [(40, "choice"), (5, "choice"), (3, "choice"), (2, "sale")])
def test_numbers_of_the_rows_of_each_user_are_no_items_if_another_column_is_left(choices: int, item: str) -> None:
    found = guess_columns(occasions(choices), {}, {})
    assert (found.options["user_id"], found.options["item_id"]) == ("hid", item)
    assert any("'sale' as the item: it numbers the rows of each user" in line for line in found.remarks) == (
        item == "sale"
    )
    assert found.options.get("time", "sale") == "sale", "the numbers are an order"
    alone = guess_columns(occasions(choices).drop("choice"), {}, {})
    assert alone.options["item_id"] == "sale"


def test_answers_to_the_same_questions_stay_items() -> None:
    rows = pl.DataFrame(
        {
            "who": np.repeat(np.arange(100), 12),
            "ask": np.tile(np.arange(1, 13), 100),
            "mood": [f"m{n % 5}" for n in range(1200)],
        }
    )
    assert guess_columns(rows, {}, {}).options["item_id"] == "ask"


def test_of_items_by_their_names_one_that_numbers_the_rows_of_each_user_stands_last() -> None:
    rows = occasions(40).rename({"hid": "customer", "sale": "item_no", "choice": "sku"})
    found = guess_columns(rows, {}, {})
    assert (found.options["user_id"], found.options["item_id"]) == ("customer", "sku")
    alone = guess_columns(rows.rename({"sku": "shade"}), {}, {})
    assert alone.options["item_id"] == "item_no"
    assert any("'item_no' as the item: it numbers the rows of each user" in line for line in alone.remarks)


def visits(n_users: int = 40, of_user: int = 8, rows: int = 6) -> pl.DataFrame:
    """Rows of visits, each of one user, and pages whose column no name tells."""
    visit = np.repeat(np.arange(n_users * of_user), rows)
    page = np.random.default_rng(0).integers(50, size=len(visit))
    return pl.DataFrame({"client_id": visit // of_user, "visit_ref": 9_000 + visit, "leaf": [f"p{n}" for n in page]})


def test_a_visit_that_no_two_users_share_is_no_item() -> None:
    rows = visits().rename({"visit_ref": "session_id"})
    found = guess_columns(rows, {}, {})
    assert (found.options["user_id"], found.options["item_id"]) == ("client_id", "leaf")
    assert any("'session_id': each of its values has one 'client_id'" in note for note in found.notes)
    with pytest.raises(DataError, match=r"no column of item_id is found .*'session_id': each of its values has one"):
        guess_columns(rows.drop("leaf"), {}, {})
    shared = rows.with_columns(session_id=pl.col("session_id").shuffle(seed=1))
    assert guess_columns(shared.drop("leaf"), {}, {}).options["item_id"] == "session_id"
    assert guess_columns(visits().drop("leaf"), {}, {}).options["item_id"] == "visit_ref", "its name tells nothing"
    of_few = visits(n_users=9).rename({"visit_ref": "session_id"}).drop("leaf")
    assert guess_columns(of_few, {}, {}).options["item_id"] == "session_id", "of nine users nothing is known"


def test_a_session_of_few_values_is_no_user() -> None:
    rows = visits().rename({"client_id": "subject", "leaf": "item"}).drop("visit_ref")
    rows = rows.with_columns(session=pl.int_range(pl.len()) % 3)
    found = guess_columns(rows.select("session", "subject", "item"), {}, {})
    assert (found.options["user_id"], found.options["item_id"]) == ("subject", "item")
    assert guess_columns(rows.select("session", "item"), {}, {}).options["user_id"] == "session", "no other may be it"
    many = rows.with_columns(session=pl.int_range(pl.len()) % 30)
    assert guess_columns(many, {}, {}).options["user_id"] == "session", "the one that a name tells"
    few = rows.rename({"session": "user", "subject": "author"})
    assert guess_columns(few, {}, {}).options["user_id"] == "user", "of a household"


def test_a_subject_is_a_user_by_a_word_for_ids_alone() -> None:
    rng = np.random.default_rng(0)
    rows = pl.DataFrame(
        {
            "borrower": rng.integers(60, size=900),
            "book": rng.integers(50, size=900),
            "subject": rng.integers(20, size=900),
        }
    )
    assert guess_columns(rows, {}, {}).options["user_id"] == "borrower"
    assert guess_columns(rows.rename({"subject": "subject_id"}), {}, {}).options["user_id"] == "subject_id"


@pytest.mark.parametrize("part", ["month", "day", "weekday", "hour", "week"])
def test_a_part_of_a_date_is_no_id(part: str) -> None:
    rng = np.random.default_rng(0)
    rows = pl.DataFrame(
        {part: rng.integers(1, 24, 900), "plot": rng.integers(40, size=900), "kind": rng.integers(30, size=900)}
    )
    found = guess_columns(rows, {}, {})
    assert (found.options["user_id"], found.options["item_id"]) == ("plot", "kind")


def test_users_of_one_row_without_a_table_are_told() -> None:
    rng = np.random.default_rng(0)
    for users, told in ((1000, True), (300, False)):
        rows = pl.DataFrame({"user_id": np.r_[0, np.arange(999)] % users, "item_id": rng.integers(40, size=1000)})
        remarks = guess_columns(rows, {}, {}).remarks
        assert any("so there is hardly a history to learn from" in line for line in remarks) == told
        assert not any(
            "hardly a history" in r for r in guess_columns(rows, {}, {"user_id": ["user_id", "age"]}).remarks
        )


def of_rows(**columns: object) -> pl.DataFrame:
    """Return a log of 60 users and 40 items, named by its first and its last column, with others between them."""
    rng = np.random.default_rng(0)
    first, *others, last = columns
    ends = {first: rng.integers(60, size=2000), last: rng.integers(40, size=2000)}
    return pl.DataFrame({name: ends.get(name, columns[name]) for name in (first, *others, last)})


@pytest.mark.parametrize(
    "ends", [("source", "target"), ("Source", "Target"), ("head", "tail"), ("subject", "object"), ("from_node", "to_node")]
)  # fmt: skip
@pytest.mark.parametrize("kinds", [5, 46])
def test_the_ends_of_edges_are_ids_by_their_names(ends: tuple[str, str], kinds: int) -> None:
    one, other = ends
    edges = of_rows(**{one: (), "relation": [f"r{i % kinds}" for i in range(2000)], "weight": [i % 30 + 1 for i in range(2000)], other: ()})  # fmt: skip
    for frame in (edges, edges.select(one, other, "relation", "weight"), edges.select(one, other)):
        found = guess_columns(frame, {}, {})
        assert (found.options["user_id"], found.options["item_id"]) == ends
        assert found.why["item_id"] == "by its name, as one end of edges"
        assert "label" not in found.options
        assert found.options.get("weight") == ("weight" if "weight" in frame.columns else None)


def test_the_ends_of_edges_are_none_behind_other_ids_and_with_few_values() -> None:
    frame = of_rows(party=(), source=[f"s{i % 12}" for i in range(2000)], target=[i % 30 for i in range(2000)], ware=())
    assert guess_columns(frame.select("party", "ware", "source", "target"), {}, {}).options["item_id"] == "ware"
    found = guess_columns(frame.select("source", "ware", target=pl.col("target") % 2), {}, {})
    assert (found.options["item_id"], found.options["label"]) == ("ware", "target")
    short = guess_columns(frame.select("source", "ware", target=pl.col("target") % 5).head(550), {}, {})
    assert (short.options["item_id"], short.options["label"]) == ("ware", "target"), "of a short log too"


@pytest.mark.parametrize("name", ["price", "days", "age", "amount", "weight", "watch_minutes", "goals", "offset"])
def test_numbers_that_say_how_much_are_no_ids_if_another_column_is_left(name: str) -> None:
    first = -300 if name == "offset" else 1  # no id is far below 0
    frame = of_rows(party=(), **{name: [first + i % 90 for i in range(2000)]}, ware=())
    for columns in (frame, frame.select(name, "party", "ware")):
        found = guess_columns(columns, {}, {})
        assert (found.options["user_id"], found.options["item_id"]) == ("party", "ware")
    assert guess_columns(frame.drop("ware"), {}, {}).options["item_id"] == name, "no other is left"
    few = guess_columns(frame.with_columns(ware=pl.col("ware") % 6), {}, {})
    assert few.options["item_id"] == "ware", "rather one of few values"
    found = guess_columns(frame.select(name, "ware"), {}, {})
    assert found.options["user_id"] == name, "the order of two columns tells more"


def test_a_name_of_each_row_is_no_item_if_another_column_is_left() -> None:
    frame = of_rows(party=(), licence=[f"l{i // 2 if i < 20 else i}" for i in range(2000)], breed=())
    assert guess_columns(frame, {"user_id": "party"}, {}).options["item_id"] == "breed"
    assert guess_columns(frame.drop("breed"), {"user_id": "party"}, {}).options["item_id"] == "licence"


@pytest.mark.parametrize("last", [(), ("days",)])
@pytest.mark.parametrize(
    ("kinds", "item"),
    [(("sign_in", "settings", "pay", "help"), "event"), (("view", "cart", "purchase", "refund"), ""), ((1, 2, 3, 4), "")],
    ids=["of what users do", "with an item", "numbers"],
)  # fmt: skip
def test_kinds_of_events_are_items_where_no_other_column_is_one(
    kinds: tuple[object, ...], item: str, last: tuple[str, ...]
) -> None:
    rng = np.random.default_rng(0)
    frame = pl.DataFrame({"user_id": rng.integers(60, size=2000), "days": rng.integers(-300, 300, size=2000)})
    frame = frame.with_columns(
        event=pl.Series([kinds[i % len(kinds)] for i in rng.integers(12, size=2000)]), timestamp=pl.lit(1_700_000_000) + pl.int_range(2000)
    ).drop([] if last else ["days"])  # fmt: skip
    if item or last:
        found = guess_columns(frame, {}, {})
        assert found.options["item_id"] == (item or last[0])
        assert found.options.get("event") == (None if item else "event")
    else:
        with pytest.raises(DataError, match="no column of item_id is found"):
            guess_columns(frame, {}, {})
    assert guess_columns(frame.with_columns(ware=frame["user_id"] * 7 % 11), {}, {}).options["item_id"] == "ware"


def test_an_id_beside_the_items_is_the_user() -> None:
    rng = np.random.default_rng(0)
    users = rng.integers(60, size=2000)
    frame = pl.DataFrame({"anger": users % 23, "item": rng.integers(24, size=2000), "id": users})
    assert guess_columns(frame, {}, {}).options["user_id"] == "id"
    of_items = frame.with_columns(id=pl.col("item") + 100)
    assert guess_columns(of_items, {}, {}).options["user_id"] == "anger", "an id of the items"
    of_rows_too = frame.with_columns(id=pl.when(pl.int_range(2000) % 200 > 0).then(pl.int_range(2000)).otherwise(7))
    assert guess_columns(of_rows_too, {}, {}).options["user_id"] == "anger", "an id of nearly each row"
    both = frame.rename({"item": "ware"})
    assert guess_columns(both, {}, {}).options["user_id"] == "anger", "the order of the columns tells more"


@pytest.mark.parametrize("bits", [32, 64])
def test_hashes_below_0_are_ids(bits: int) -> None:
    hashes = [
        i % 90 * 2_654_435_761 * (1 if bits == 32 else 7_919_123_456) % 2**bits - 2 ** (bits - 1) for i in range(2000)
    ]
    frame = of_rows(party=(), digest=hashes, area=[i % 31 for i in range(2000)])
    assert guess_columns(frame, {"user_id": "party"}, {}).options["item_id"] == "digest"


def test_kinds_of_events_are_no_items_beside_ids_with_gaps() -> None:
    rng = np.random.default_rng(0)
    frame = pl.DataFrame(
        {"user_id": rng.integers(60, size=2000), "ware": [f"w{i % 41}" if i % 9 else None for i in range(2000)]}
    )
    frame = frame.with_columns(event=pl.Series(["scroll", "hover", "zoom"]).gather(rng.integers(3, size=2000)))
    with pytest.raises(DataError, match="no column of item_id is found"):
        guess_columns(frame, {}, {})
    assert guess_columns(frame.drop("ware"), {}, {}).options["item_id"] == "event"
