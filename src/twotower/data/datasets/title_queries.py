"""Synthetic search queries made from the titles of a catalogue, as typed by people who remember a title in part.

No public log of queries and clicks on titles has a licence that allows its use. The queries are drawn with a fixed
seed: words are left out, shuffled or cut short, letters omitted, inserted, replaced or swapped, articles moved, years
added.
"""

from __future__ import annotations

import random
import re
import unicodedata

import numpy as np
import polars as pl

from twotower.data.tables import Tables

QUERIES_PER_FILM = 10
"""Maximum number of queries of an item."""
LATE_ITEM_SHARE = 0.1
"""Share of the items whose queries all come in the last tenth of the time."""
_ARTICLES = [
    "the", "a", "an", "la", "le", "les", "il", "lo", "el", "los", "las", "der", "die", "das", "un", "une", "una", "o",
    "os",
]  # fmt: skip
_YEAR = re.compile(r"\s*\((\d{4})\)\s*$")
_MOVED = re.compile(rf"^(.+), ({'|'.join(_ARTICLES)}|l')$", re.I)
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def make_title_queries(items: pl.DataFrame, seed: int = 2013) -> Tables:
    """Return queries as users (query_id, query), the items, and the item of each query as interactions (query_id,
    item_id, arrived). `items` have the columns item_id and title.

    Texts are distinct; a text made from the titles of two items is left out. `arrived` is an order: all queries for a
    share LATE_ITEM_SHARE of the items are in its last tenth, so that split.kind = "time" tests items without training
    queries.
    """
    rng = random.Random(seed)
    meant: dict[str, int] = {}
    for row, title in enumerate(items["title"].to_list()):
        for text in _queries(title or "", rng):
            meant[text] = -1 if meant.get(text, row) != row else row
    texts = [text for text, row in meant.items() if row >= 0]
    rows = np.array([meant[text] for text in texts], np.int64)
    draw = np.random.default_rng(seed)
    new = draw.random(items.height) < LATE_ITEM_SHARE
    times = draw.random(len(texts))
    times = np.where(new[rows], 0.9 + 0.1 * times, times)
    query_ids = np.arange(len(texts))
    return Tables(
        pl.DataFrame({"query_id": query_ids, "query": texts}, schema_overrides={"query": pl.String}),
        items,
        pl.DataFrame({"query_id": query_ids, "item_id": items["item_id"][rows], "arrived": times.argsort().argsort()}),
    )


def title_words(title: str) -> tuple[list[list[str]], str]:
    """Return the words of every name in a title, in spoken order, and its year ('' without one).

    "Lost City, The (Cité perdue, La) (1995)" is "the lost city" and "la cité perdue" of 1995.
    """
    found = _YEAR.search(title)
    year, rest = (found[1], title[: found.start()]) if found else ("", title)
    parts = [re.sub(r"\(.*", "", rest), *re.findall(r"\(([^()]+)\)", rest)]
    out = []
    for part in parts:
        part = re.sub(r"^a\.?k\.?a\.? ", "", part.strip())
        if moved := _MOVED.match(part):
            part = f"{moved[2]} {moved[1]}"
        plain = unicodedata.normalize("NFKC", part).lower()
        if words := re.findall(r"[^\W_]+(?:'[^\W_]+)*", plain):
            out.append(words)
    return out, year


def _queries(title: str, rng: random.Random) -> list[str]:
    """Return at most QUERIES_PER_FILM distinct queries for a title."""
    known, year = title_words(title)
    found: dict[str, None] = {}
    for _ in range(3 * QUERIES_PER_FILM):
        if known and len(found) < QUERIES_PER_FILM:
            words = known[0] if len(known) == 1 or rng.random() < 0.7 else rng.choice(known[1:])
            found[_query(words, year, rng)] = None
    return list(found)


def _query(words: list[str], year: str, rng: random.Random) -> str:
    words = [w.replace("'", "") if rng.random() < 0.5 else w for w in words]
    if words[0] in _ARTICLES and len(words) > 1:
        article, *rest = words
        words = rng.choices([words, rest, [*rest, article]], (5, 4, 1))[0]
    words = _pick_words(words, rng)
    for _ in range(rng.choices((0, 1, 2), (50, 35, 15))[0]):
        long = [i for i, w in enumerate(words) if len(w) >= 4]
        if long:
            place = rng.choice(long)
            words[place] = _mistype(words[place], rng)
    if len(words[-1]) > 4 and rng.random() < 0.15:  # not typed to the end
        words[-1] = words[-1][: rng.randint(3, len(words[-1]) - 1)]
    if year and rng.random() < 0.15:
        words.append(year)
    return " ".join(words)


def _pick_words(words: list[str], rng: random.Random) -> list[str]:
    """Return some of the words, shuffled at times."""
    n = len(words)
    if n == 1 or (how := rng.random()) < 0.4:
        return list(words)
    if how < 0.6:
        return rng.sample(words, n)
    if how < 0.75:
        return words[: rng.randint(max(1, n // 2), n - 1)]
    kept = sorted(rng.sample(range(n), rng.randint((n + 1) // 2, n - 1)))
    if all(len(words[i]) < 3 or words[i] in _ARTICLES for i in kept):
        return list(words)
    return [words[i] for i in (kept if how < 0.9 else rng.sample(kept, len(kept)))]


def _mistype(word: str, rng: random.Random) -> str:
    """Return the word with one letter left out, inserted, replaced, or swapped with the next."""
    at = rng.randrange(len(word) - 1)
    before, letter, after = word[:at], word[at], word[at + 1 :]
    how = rng.randrange(4)
    if how == 0:
        return before + after
    if how == 1:
        return before + letter + rng.choice(_LETTERS) + after
    if how == 2:
        return before + rng.choice(_LETTERS) + after
    return before + after[0] + letter + after[1:]
