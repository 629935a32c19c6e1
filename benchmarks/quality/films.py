"""The next film of each user of MovieLens 1M: the split by sequence, and ranks in the whole catalogue."""

import zipfile
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import polars as pl
import torch
from torch import Tensor

from twotower.arrays.types import Ints
from twotower.data.datasets.ml_1m import MovieLens1M
from twotower.evaluation.factors import CatalogueScorer

Part = Literal["validation", "test"]
HELD: dict[Part, int] = {"validation": 2, "test": 1}


@dataclass(frozen=True)
class Films:
    """Sequences of item rows by user: the last item tests, the one before validates, the rest train."""

    values: Ints  # (n,) item rows in time order
    offsets: Ints  # (n_users + 1,) where each user begins
    user_ids: Ints  # ids behind the user rows
    item_ids: Ints  # ids behind the item rows

    @classmethod
    def of(cls, users: Ints, items: Ints) -> Self:
        """Build the split from the ids of all interactions, ordered by user, then by time."""
        begin = np.flatnonzero(np.r_[True, users[1:] != users[:-1]])
        item_ids, values = np.unique(items, return_inverse=True)
        return cls(values.astype(np.int64), np.r_[begin, len(users)].astype(np.int64), users[begin], item_ids)

    @classmethod
    def read(cls, sequences: str) -> Self:
        """Read the order of a zip with sequences.txt (a user a line, the id, then item ids in time order), or with a
        table of ratings, ratings.dat of MovieLens or .inter of RecBole; "": that of the archive, of items with five or
        more interactions; equal timestamps keep the order of its table."""
        if not sequences:
            ratings = MovieLens1M().load().interactions
            kept = ratings.filter(pl.len().over("item_id") >= 5).sort("user_id", "timestamp", maintain_order=True)
            return cls.of(kept["user_id"].to_numpy(), kept["item_id"].to_numpy())
        with zipfile.ZipFile(sequences) as archive:
            if tables := [name for name in archive.namelist() if name.endswith(("ratings.dat", ".inter"))]:
                return cls.of_ratings(archive.read(tables[0]))
            lines = [np.array(line.split(), np.int64) for line in archive.read("sequences.txt").splitlines()]
        users = np.repeat([line[0] for line in lines], [len(line) - 1 for line in lines])
        return cls.of(users, np.concatenate([line[1:] for line in lines]))

    @classmethod
    def of_ratings(cls, table: bytes) -> Self:
        """Read lines of user, item, rating and time; of users with three or more items."""
        lines = table.decode("latin-1").replace("::", "\t").splitlines()
        rows = np.array([line.split("\t")[:4] for line in lines if line[0].isdigit()]).astype(float).astype(np.int64)
        log = pl.DataFrame(rows[:, [0, 1, 3]], schema=["user", "item", "time"]).sort("time", maintain_order=True)
        log = log.unique(["user", "item"], keep="first", maintain_order=True)
        log = log.filter(pl.len().over("user") >= 3).sort("user", maintain_order=True)
        return cls.of(log["user"].to_numpy(), log["item"].to_numpy())

    def tables(self, bare: bool = False) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
        """Return users, films and interactions whose time is their position in the user's sequence. With `bare` users
        and items have their ids alone, which are the titles too: sequences of something else than films."""
        user = np.repeat(self.user_ids, np.diff(self.offsets))
        order = np.arange(len(user)) - np.repeat(self.offsets[:-1], np.diff(self.offsets))
        interactions = pl.DataFrame({"user_id": user, "item_id": self.item_ids[self.values], "timestamp": order})
        if bare:
            items = pl.DataFrame({"item_id": self.item_ids, "title": self.item_ids.astype(str)})
            return pl.DataFrame({"user_id": self.user_ids}), items, interactions
        raw = MovieLens1M().load()
        return raw.users, raw.items.filter(pl.col("item_id").is_in(self.item_ids.tolist())), interactions

    def ends(self, part: Part) -> Ints:
        """Return (n_users,) ends of histories: train before validation, train and validation before test."""
        return self.offsets[1:] - HELD[part]

    def target(self, part: Part) -> Ints:
        """Return (n_users,) the target, the first item after the history."""
        return self.values[self.ends(part)]

    def history(self, part: Part) -> tuple[Ints, Ints]:
        """Return (user rows, positions in `values`) of all histories before `part`."""
        user = np.repeat(np.arange(len(self.user_ids)), np.diff(self.offsets))
        at = np.flatnonzero(np.arange(len(user)) < self.ends(part)[user])
        return user[at], at

    def recent(self, at: Ints, user: Ints, n: int) -> Ints:
        """Return (len(at), n) the user's items before position `at`, the oldest first, -1 where there are fewer."""
        back = at[:, None] - np.arange(n, 0, -1)
        return np.where(back >= self.offsets[user][:, None], self.values[np.maximum(back, 0)], -1)

    def popularity(self, part: Part = "validation") -> Ints:
        """Return (n_items,) the number of interactions of each item before `part`."""
        return np.bincount(self.values[self.history(part)[1]], minlength=len(self.item_ids))

    def matrix(self, part: Part) -> Tensor:
        """Return (n_users, n_items) ones where the history before `part` has the item."""
        (user, at), out = self.history(part), torch.zeros(len(self.user_ids), len(self.item_ids))
        out[torch.from_numpy(user), torch.from_numpy(self.values[at])] = 1
        return out

    def ranks(self, scores: CatalogueScorer, part: Part, block: int = 1024) -> Ints:
        """Return (n_users,) the rank of each target, from 1, in the whole catalogue without the user's history.

        Ties: the target comes after every item of an equal score.
        """
        target, seen, out = torch.from_numpy(self.target(part)), self.matrix(part).bool(), []
        for start in range(0, len(target), block):
            rows = slice(start, start + block)
            found = scores.catalogue_scores(np.arange(len(target))[rows])
            wanted = found.gather(1, target[rows, None])
            if not wanted.isfinite().all():
                raise ValueError("scores that are not finite")
            out.append(
                (found.masked_fill_(seen[rows], -torch.inf).scatter_(1, target[rows, None], wanted) >= wanted).sum(1)
            )
        return torch.cat(out).numpy()
