"""The training positives as a sparse matrix X (users, items), in both orders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from twotower.arrays.ragged import Ragged, offsets_of
from twotower.arrays.sets import distinct_keys, pair_keys
from twotower.arrays.types import F32, I64, Codes, Float, Floats, Ints, Shaped
from twotower.data.dataset import Dataset
from twotower.features.values import UNKNOWN

T = TypeVar("T")


@dataclass(frozen=True)
class PositiveSequences:
    """Codes of the positives of each user, the oldest first, repeats too: one user after the other, `lengths` (U,)."""

    codes: Shaped[Codes, "n"]
    lengths: Shaped[Ints, "U"]
    weights: Shaped[Floats, "n"]


@dataclass(frozen=True)
class PositiveMatrix:
    """R rows of columns with values: X_rc = 1, or the sum of the weights of the pairs that r and c have."""

    columns: Shaped[Codes, "L"]
    offsets: Shaped[Ints, "_"]  # (R + 1,)
    values: Shaped[Floats, "L"]
    n_columns: int
    histories: PositiveSequences | None = None
    """Positives in their order; None of a matrix that is no users by items."""
    _made: dict[str, object] = field(default_factory=dict, init=False, compare=False, repr=False)

    @classmethod
    def of(cls, dataset: Dataset, codes: Shaped[Codes, "items"], n_codes: int) -> PositiveMatrix:
        """Return a row for each user, and a column for each code of the items. Items of the unknown code are left out;
        repeats of a pair are one."""
        by_user, pairs = dataset.positives_by_user, dataset.pairs
        code = codes[pairs.item[by_user.values]]
        known = code != UNKNOWN
        keys = pair_keys(by_user.owners[known], code[known], n_codes)
        weights = pairs.weight[by_user.values[known]]
        histories = PositiveSequences(code[known], np.bincount(by_user.owners[known], minlength=len(by_user)), weights)
        if not pairs.weighted:
            keys = distinct_keys(keys)
            weights = np.ones(len(keys), np.float32)
        return cls.of_sums(keys, weights, len(by_user), n_codes, histories)

    @classmethod
    def of_sums(
        cls, keys: Shaped[Ints, "n"], values: Shaped[Floats, "n"], n_rows: int, n_columns: int,
        histories: PositiveSequences | None,
    ) -> PositiveMatrix:  # fmt: skip
        """Return the sums of the values of each key of a row and a column (`pair_keys`)."""
        distinct = distinct_keys(keys)
        sums = np.bincount(np.searchsorted(distinct, keys), values, len(distinct)).astype(np.float32)
        rows, columns = np.divmod(distinct, n_columns)
        offsets = offsets_of(np.bincount(rows, minlength=n_rows))
        return cls(columns.astype(np.int32), offsets, sums, n_columns, histories)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def owners(self) -> Shaped[Ints, "L"]:
        """Row of each value."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    @property
    def n_items(self) -> int:
        """Number of columns that have a value."""
        return len(np.unique(self.columns))

    def once(self, name: str, make: Callable[[], T]) -> T:
        """Return what the first call with this name made: what a closed form computes, and none of the values of its
        `choices` changes."""
        if name not in self._made:
            self._made[name] = make()
        return cast(T, self._made[name])

    def transposed(self) -> PositiveMatrix:
        """Return the columns as rows."""
        turned = Ragged.from_pairs(self.columns, self.owners, self.n_columns, np.arange(len(self.columns)))
        assert turned.source is not None
        return PositiveMatrix(turned.values, turned.offsets, self.values[turned.source], len(self))

    def product(self, dense: Float[Tensor, "C E"]) -> Float[Tensor, "R E"]:
        """Return X times a dense matrix, of its type."""
        columns, offsets, values = (
            torch.from_numpy(a) for a in (self.columns.astype(np.int64), self.offsets, self.values)
        )
        return torch.nn.functional.embedding_bag(
            columns, dense, offsets, mode="sum", include_last_offset=True, per_sample_weights=values.to(dense.dtype)
        )

    def gram(self) -> Float[Tensor, "C C"]:
        """Return X^T X, made 256 columns at a time. Sums of ones are exact in float32, which is faster; those of
        weights, whose squares differ by orders of magnitude, are made in float64."""
        dtype = torch.float32 if (self.values == 1).all() else torch.float64
        turned, out = self.transposed(), torch.empty(self.n_columns, self.n_columns, dtype=dtype)
        for start in range(0, self.n_columns, 256):
            some = torch.zeros(self.n_columns, min(256, self.n_columns - start), dtype=dtype)
            some[start : start + some.shape[1]].fill_diagonal_(1.0)
            out[:, start : start + 256] = turned.product(self.product(some))
        return out

    def passes(self, numbers: int) -> Iterator[tuple[I64[Tensor, "n"], I64[Tensor, "n T"], F32[Tensor, "n T"]]]:
        """Yield rows of similar length, at most `numbers` padded places of them at a time or one row: their numbers,
        columns, and values, 0 after the end of a row. Rows without values are left out."""
        lengths = np.diff(self.offsets)
        order = np.argsort(lengths, kind="stable")
        order = order[lengths[order] > 0]
        start = 0
        while start < len(order):
            longest = lengths[order[start : start + max(1, numbers // lengths[order[start]])]]
            stop = start + max(1, int((np.arange(1, len(longest) + 1) * longest <= numbers).sum()))
            rows = order[start:stop]
            within = np.arange(int(lengths[rows[-1]]))
            known = within < lengths[rows, None]
            at = np.where(known, self.offsets[rows, None] + within, 0)
            columns = torch.from_numpy(self.columns[at].astype(np.int64))
            yield torch.from_numpy(rows), columns, torch.from_numpy(self.values[at] * known)
            start = stop
