"""Queries made of the titles of MovieLens 1M."""

from __future__ import annotations

from twotower.data.datasets.ml_1m import MovieLens1M
from twotower.data.datasets.movielens import MovieLensTitles


class MovieLens1MTitles(MovieLensTitles):
    """Search queries made of the titles of MovieLens 1M, as typed by people who remember a title in part.

    Use it to try text features and a search.
    """

    kind = "ml-1m-titles"
    films = MovieLens1M
