"""Texts as letter n-grams: known answers, any script, what is lost, and that files give the same back."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from worlds import EVERYTHING_SCHEMA, everything, settings

import twotower
from twotower import diagnostics
from twotower.arrays.ragged import Ragged
from twotower.config.experiment import Config
from twotower.config.toml import parse_config
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.tables import check
from twotower.errors import ConfigError, DataError
from twotower.features.categorical import Categorical
from twotower.features.encoders import Encoders
from twotower.features.schema import Schema
from twotower.features.text import Grams, Text, TextEncoder, grams, words
from twotower.features.values import UNKNOWN

FEW = examples(max_examples=30, deadline=None)
TITLES = ["Good Will Hunting", "The Good, the Bad and the Ugly", "七人の侍", None, "", "  ?! ", "good good"]


def feature(**options: object) -> Text:
    return Text.model_validate({"name": "t", "side": "item"} | options)


def fitted(texts: list[str] | list[str | None], counts: list[int] | None = None, **options: object) -> TextEncoder:
    weights = np.array(counts or [1] * len(texts), np.int64)
    return feature(**options).fit(pl.Series("t", texts, dtype=pl.String), weights)


def split(text: str) -> list[str]:
    return words(pl.Series("t", [text]))[1].to_list()


def cut(word: str, n: int = 3) -> list[str]:
    return grams(pl.Series("w", [word]), n)[1].to_list()


def rows(encoder: TextEncoder, texts: list[str | None]) -> list[list[int]]:
    found = encoder.transform(pl.Series("t", texts, dtype=pl.String))
    return [row.tolist() for row in np.split(found.values, found.offsets[1:-1])]


# ---- words and grams


@pytest.mark.parametrize(
    ("word", "n", "expected"),
    [
        ("good", 3, ["#go", "goo", "ood", "od#"]),
        ("good", 8, ["#good#"]),
        ("a", 3, ["#a#"]),
        ("ab", 5, ["#ab#"]),
        ("侍", 3, ["侍"]),
        ("의자", 3, ["#의자", "의자#"]),
    ],
)
def test_a_word_is_cut_into_the_grams_of_the_paper(word: str, n: int, expected: list[str]) -> None:
    assert cut(word, n) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Good, the BAD & the_Ugly", ["good", "the", "bad", "the", "ugly"]),
        ("七人の侍 1954", ["七", "人", "の", "侍", "1954"]),
        ("ＦＵＬＬ　ｗｉｄｔｈ ﬁne Ⅳ", ["full", "width", "fine", "iv"]),
        ("cafe\u0301 CAFÉ", ["café", "café"]),
        ("हिन्दी फ़िल्म", [unicodedata.normalize("NFKC", w) for w in ("हिन्दी", "फ़िल्म")]),
        ("올드보이 기생충", ["올드보이", "기생충"]),
        ("שלום مرحبا", ["שלום", "مرحبا"]),
        ("🎬 ... ", []),
        ("〡〇々⺀", ["〡", "〇", "々", "⺀"]),
    ],
)
def test_text_is_split_into_words_of_any_script(text: str, expected: list[str]) -> None:
    assert split(text) == expected


@FEW
@given(st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=40), st.integers(2, 5))
def test_words_and_grams_are_those_of_a_loop(text: str, n: int) -> None:
    for word in split(text):
        # All ideographs, of whatever category, and some letters.
        alone = len(word) == 1 and unicodedata.east_asian_width(word) == "W"
        assert alone or all(unicodedata.category(c)[0] in "LMN" for c in word)
        bounded = f"#{word}#"
        looped = [bounded[i : i + n] for i in range(max(1, len(bounded) - n + 1))]
        if re.fullmatch(r"[\u4e00-\u9fff]", word):  # those that everybody agrees on
            assert cut(word, n) == [word]
        elif alone:
            assert cut(word, n) in ([word], looped)
        else:
            assert cut(word, n) == looped
    assert split(" ".join(split(text))) == split(text), "words stay as they are"
    assert split(text.upper().lower()) == split(text.upper())


# ---- the encoder


def test_a_text_is_the_bag_of_its_grams_with_repeats_and_unseen_ones_are_unknown() -> None:
    encoder = fitted(TITLES)
    code = {gram: number for number, gram in enumerate(encoder.values.vocabulary.to_list(), 1)}
    assert list(code) == sorted(code)
    assert encoder.values.rows == len(code) + 1
    good = [code[g] for g in ("#go", "goo", "ood", "od#")]
    assert rows(encoder, ["good good", "GOOD", None, "", "侍", "zzz"]) == [
        good * 2, good, [], [], [code["侍"]], [UNKNOWN, UNKNOWN, UNKNOWN],
    ]  # fmt: skip


def test_the_vocabulary_is_the_most_frequent_grams_of_training_counted_with_repeats() -> None:
    texts, counts = ["aa aa", "bb", "cc", "dd"], [1, 3, 0, 1]
    kept = fitted(texts, counts).values.vocabulary.to_list()
    assert kept == ["#aa", "#bb", "#dd", "aa#", "bb#", "dd#"], "rows without training interactions teach nothing"
    assert fitted(texts, counts, min_count=2).values.vocabulary.to_list() == ["#aa", "#bb", "aa#", "bb#"]
    assert fitted(texts, counts, max_grams=3).values.vocabulary.to_list() == ["#aa", "#bb", "bb#"], "ties by the gram"


def test_hashed_grams_need_no_vocabulary_and_are_the_same_everywhere() -> None:
    encoder = fitted(["nothing of it"], hash_buckets=30_000)
    assert encoder.values.rows == 30_001
    assert rows(encoder, ["good"]) == [[5617, 979, 15491, 4104]]


@FEW
@given(
    st.lists(st.none() | st.text(st.sampled_from("abcé侍 '-"), max_size=12), min_size=1, max_size=8),
    st.integers(0, 9),
    st.booleans(),
)
def test_the_bags_are_those_of_a_loop(texts: list[str | None], keep: int, distinct: bool) -> None:
    encoder = fitted(texts, max_length=keep, distinct=distinct)
    code = {gram: number for number, gram in enumerate(encoder.values.vocabulary.to_list(), 1)}
    looped = [[code[g] for word in split(t or "") for g in cut(word)] for t in texts]
    looped = [[*dict.fromkeys(codes)] if distinct else codes for codes in looped]
    looped = [codes[: keep or None] for codes in looped]
    assert rows(encoder, texts) == looped
    assert [rows(encoder, [t])[0] for t in texts] == looped, "one text has a way of its own"


def test_columns_that_are_no_text() -> None:
    encoder = fitted(["7 seven"])
    assert [len(encoder.transform(pl.Series("t", values))) for values in ([7, 8], [None, None], [True, False])] == [
        2
    ] * 3
    assert encoder.transform(pl.Series("t", [7])).values.tolist() == rows(encoder, ["7"])[0]
    assert (
        encoder.transform(pl.Series("t", ["seven"], dtype=pl.Categorical)).values.tolist()
        == rows(encoder, ["seven"])[0]
    )
    with pytest.raises(DataError, match="column 't': found List"):
        encoder.transform(pl.Series("t", [["a"]]))


# ---- what is lost


def test_words_with_the_same_grams_are_counted_before_and_after_hashing() -> None:
    # The first two have the same pairs of letters as often; aaa and aaaa have not.
    texts = ["xabyabzab xabzabyab", "aaa aaaa aaa"]
    assert Counter(cut("xabyabzab", 2)) == Counter(cut("xabzabyab", 2))
    assert fitted(texts, n=2).report(pl.Series(texts)) == Grams(
        words=4, grams=11, rows=11, collisions=2, code_collisions=2, occurrences=20 + 3 * 4 + 1, unknown=0,
    )  # fmt: skip
    trigrams = fitted(texts).report(pl.Series(texts))
    assert (trigrams.collisions, trigrams.code_collisions) == (2, 2)
    longer = fitted(texts, n=5).report(pl.Series(texts))
    assert (longer.collisions, longer.code_collisions) == (0, 0)
    hashed = fitted(texts, n=5, hash_buckets=1).report(pl.Series(texts))
    # In one bucket only the number of grams is left: seven twice, one and two.
    assert (hashed.rows, hashed.collisions, hashed.code_collisions) == (1, 0, 2)
    cut_short = fitted(texts, n=2, max_grams=1).report(pl.Series(texts))
    assert (cut_short.rows, cut_short.collisions) == (1, 2)
    assert cut_short.unknown > 0


def test_unknown_grams_are_counted_as_often_as_they_occur() -> None:
    encoder = fitted(["good"])
    found = encoder.report(pl.Series(["good goods", None, "good"]))
    assert (found.words, found.grams, found.rows) == (2, 6, 4)
    assert (found.occurrences, found.unknown) == (4 + 5 + 4, 2)
    assert "15.38% of their occurrences unknown" in str(found)
    assert str(encoder.report(pl.Series("t", [None], dtype=pl.String))).startswith("0 words")


@pytest.mark.parametrize(
    ("options", "severity", "words_"),
    [
        ({}, "ok", "The words of texts have distinct codes"),
        ({"hash_buckets": 1}, "warning", "have the same codes as another word"),
        ({"max_grams": 1}, "warning", "of the grams of the item text 'label' are unknown in the test rows"),
    ],
)
def test_the_doctor_says_what_is_lost(options: dict[str, object], severity: str, words_: str) -> None:
    features = (Categorical(name="uid", side="user"), Text(name="label", side="item", column="name", **options))
    schema = EVERYTHING_SCHEMA.model_copy(update={"features": features})
    run = twotower.fit(everything(), schema, settings(train={"epochs": 1}))
    found = [f for f in diagnostics.diagnose(run) if f.name == "text"]
    assert {f.severity for f in found} == {severity}
    assert any(words_ in f.text for f in found)


# ---- shared grams

SHARED = Schema(
    user_id="uid",
    item_id="iid",
    label="stars",
    positive_above=3,
    features=(
        Text(name="motto", side="user", share_with="label", pooling="sqrt"),
        Text(name="label", side="item", column="name", min_count=2),
    ),
)


def shared() -> Dataset:
    return build_dataset(check(*everything(), SHARED), SHARED, Config().split)


def test_texts_that_share_have_one_vocabulary_of_both_columns_and_one_table(tmp_path: Path) -> None:
    data = shared()
    mine, theirs = data.encoders.by_side["user"]["motto"], data.encoders.by_side["item"]["label"]
    assert isinstance(mine, TextEncoder)
    assert isinstance(theirs, TextEncoder)
    assert mine.values is theirs.values
    assert {"#mo", "mor", "#it", "ite"} <= set(mine.values.vocabulary.to_list())
    (field,), (other,) = data.encoders.fields("user"), data.encoders.fields("item")
    assert (field.share_with, field.rows, field.pooling.kind, other.share_with, other.pooling.kind) == (
        "label",
        other.rows,
        "sqrt",
        "",
        "sum",
    )
    data.encoders.save(tmp_path)
    again = Encoders.load(SHARED, tmp_path)
    assert again.digest == data.encoders.digest
    assert "motto" not in json.loads((tmp_path / "encoders.json").read_text())["sides"]["user"], "kept once"
    found, kept = again.transform("user", data.users.frame)["motto"], data.users.columns["motto"]
    assert isinstance(found, Ragged)
    assert isinstance(kept, Ragged)
    assert found.values.tolist() == kept.values.tolist()
    run = twotower.fit(everything(), SHARED, settings(loss={"kind": "softmax"}))
    assert [n for n, _ in run.model.named_parameters() if "tables" in n] == [
        "pairs.0.item.embeddings.tables.bag0.weight"
    ]


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ([{"share_with": "name"}], "text 'q' shares the grams of 'name', which is no text feature of the item side "
            "with grams "
                               r"of its own \(allowed: t\)"),
        ([{"share_with": "t", "n": 4}], "'n' is that of 't', whose grams it shares; set it there"),
        ([{"n": 1}], "greater than or equal to 2, got 1"),
        ([{"pooling": "decay"}], r"pooling: 'q' is no history, and the pooling 'decay' needs the order of time "
            r"\(allowed: mean, sqrt, sum, power, ridge\)"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_text_feature_is_one_line(features: list[dict[str, Any]], message: str) -> None:
    user = [{"kind": "text", "side": "user", "name": "q"} | f for f in features]
    with pytest.raises(ConfigError, match=message):
        parse_config({"schema": {"features": [*user, {"kind": "text", "side": "item", "name": "t"}]}})
