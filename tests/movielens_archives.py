"""Small archives in the layouts of MovieLens."""

from __future__ import annotations

import io
import zipfile

from twotower.data.datasets.ml_100k import GENRES_100K

ML_1M = {
    "ml-1m/README": b"read me",
    "ml-1m/users.dat": b"1::F::1::10::48067\n2::M::56::16::V3N4P\n",
    "ml-1m/movies.dat": (
        "1::Toy Story (1995)::Animation|Children's|Comedy\n"
        "2::L\xe9on: The \x85 Professional (1994)::Drama\n"
        "5::Nameless::Film-Noir\n"
    ).encode("latin-1"),
    "ml-1m/ratings.dat": b"1::1::5::978300760\n1::5::3::978302109\n2::2::4::978301968\n",
}


def film(number: int, title: str, *genres: str) -> str:
    flags = "|".join("01"[g in genres] for g in GENRES_100K)
    return f"{number}|{title}|01-Jan-1995||http://us.imdb.com/M?{number}|{flags}\n"


ML_100K = {
    "ml-100k/u.user": b"1|24|M|technician|85711\n2|53|F|other|V3N4P\n",
    "ml-100k/u.item": (
        film(1, "Toy Story (1995)", "Animation", "Children's", "Comedy")
        + film(2, "Mis\xe9rables, Les (1995)", "Drama")
        + film(3, "unknown")
    ).encode("latin-1"),
    "ml-100k/u.data": b"1\t1\t5\t874965758\n1\t3\t3\t876893171\n2\t2\t4\t878542960\n",
}


def zipped(members: dict[str, bytes]) -> bytes:
    """Return a zip whose bytes are those of `members`, whatever the clock says."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()
