"""MovieLens 1M, and queries made of its titles."""

from __future__ import annotations

import zipfile

from twotower.data.datasets.archive import Archive
from twotower.data.datasets.movielens import (
    RATING,
    SOURCE_VARIABLE,
    USER,
    Downloads,
    MovieLens,
    MovieLensTitles,
    films_frame,
    read_rows,
    split_lines,
)
from twotower.data.tables import Tables
from twotower.errors import DataError


class MovieLens1M(MovieLens):
    """MovieLens 1M (Harper and Konstan 2015): a million ratings of 3,706 films by 6,040 users, with gender, age and
    occupation, genres and year. A rating above 3 is a positive.

    Use it to compare models with published results.
    """

    kind = "ml-1m"
    official = Archive(
        "https://files.grouplens.org/datasets/movielens/ml-1m.zip",
        5_917_549,
        "a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20",
    )

    def read(self, archive: zipfile.ZipFile, what: str) -> Tables:
        ratings = read_rows(archive, "ml-1m/ratings.dat", what, "::", RATING)
        users = read_rows(archive, "ml-1m/users.dat", what, "::", USER)
        films = split_lines(archive, "ml-1m/movies.dat", what, "::", 3)
        return Tables(users, films_frame(films, [x[2].split("|") for x in films]), ratings)

    def fall_back(self, error: DataError, downloads: Downloads) -> Tables:
        raise DataError(
            f"{error}; download it elsewhere and pass `archive='path/to/ml-1m.zip'` (data.dataset.archive in a "
            f"config), set {SOURCE_VARIABLE}, or use ml-100k"
        ) from None


class MovieLens1MTitles(MovieLensTitles):
    """Search queries made of the titles of MovieLens 1M, as typed by people who remember a title in part.

    Use it to try text features and a search.
    """

    kind = "ml-1m-titles"
    films = MovieLens1M
