"""Queries made of the titles of MovieLens 100K."""

from __future__ import annotations

from twotower.data.datasets.ml_100k import MovieLens100K
from twotower.data.datasets.movielens import MovieLensTitles


class MovieLens100KTitles(MovieLensTitles):
    """Search queries made of the titles of MovieLens 100K, as typed by people who remember a title in part.

    Use it for a quick try of text features and a search.
    """

    kind = "ml-100k-titles"
    films = MovieLens100K
