"""Embedding tables of a model, and their initial rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

import torch
from torch import Tensor, nn

from twotower.arrays.types import F32, Float, Int
from twotower.model.inputs.code_layout import CodeLayout
from twotower.model.layers import gather

NORMAL_BLOCK = 2**20
"""Random numbers drawn at a time for a deferred table."""
_mode: ContextVar[Literal["drawn", "deferred", "blank"]] = ContextVar("mode", default="drawn")


@contextmanager
def deferred_tables() -> Iterator[None]:
    """Create the tables of the body on the meta device, to be replaced by others with the `initial_rows` of each. All random
    numbers of the body are those drawn with whole tables."""
    token = _mode.set("deferred")
    try:
        yield
    finally:
        _mode.reset(token)


@contextmanager
def blank_tables() -> Iterator[None]:
    """Create the tables of the body without initial rows, for a model whose weights are loaded."""
    token = _mode.set("blank")
    try:
        yield
    finally:
        _mode.reset(token)


class Table(nn.Embedding):
    """Embedding table (rows, width) that this rank holds whole."""

    def __init__(self, rows: int, width: int) -> None:
        self.deferred = _mode.get() == "deferred"
        weight = torch.empty(rows, width, device="meta" if self.deferred else None)
        super().__init__(rows, width, _weight=weight)
        self._draws = _mode.get() == "drawn"
        self._initial: tuple[Tensor, float, tuple[int, ...]] | None = (
            None  # state of the generator, deviation, rows of zeros
        )
        if self.deferred:
            self._skip_draws(1.0)  # which `reset_parameters` draws
        elif self._draws:
            self.reset_parameters()

    def initialize(self, std: float, zero_rows: Sequence[int] = ()) -> None:
        """Initialise the rows: normal with standard deviation `std`, zeros if that is 0; `zero_rows` are zeros."""
        if self.deferred:
            self._initial = torch.get_rng_state(), std, tuple(zero_rows)
            self._skip_draws(std)
            return
        if not self._draws:
            return
        if std:
            nn.init.normal_(self.weight, std=std)
        else:
            nn.init.zeros_(self.weight)
        for row in zero_rows:
            nn.init.zeros_(self.weight[row])

    def initial_rows(self, block: int = NORMAL_BLOCK) -> Iterator[tuple[slice, F32[Tensor, "n E"]]]:
        """Yield the initial rows of a deferred table and their numbers, about `block` numbers at a time."""
        if self._initial is None:
            raise RuntimeError("a table that holds its rows has no deferred ones")
        state, std, zero_rows = self._initial
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(state)
            for rows, drawn in _normal(self.num_embeddings, self.embedding_dim, std, block):
                for row in zero_rows:
                    if rows.start <= row < rows.stop:
                        drawn[row - rows.start] = 0
                yield rows, drawn

    def _skip_draws(self, std: float) -> None:
        for _ in _normal(self.num_embeddings, self.embedding_dim, std, NORMAL_BLOCK):
            pass

    def forward(self, codes: Int[Tensor, "*n"]) -> Float[Tensor, "*n E"]:
        """Return the rows at codes."""
        return gather(self.weight, codes)

    def rows(self, first: int, rows: int) -> Float[Tensor, "n E"]:
        """Return `rows` rows from the row `first` on."""
        return self.weight if len(self.weight) == rows else self.weight[first : first + rows]

    def for_bag(self, first: int, rows: int, bag: CodeLayout) -> tuple[Float[Tensor, "n E"], CodeLayout]:
        """Return a table for `bag`, whose code 0 is the row `first`, and the bag in codes of that table."""
        return self.rows(first, rows), bag


def named_tables(module: nn.Module) -> Iterator[tuple[str, Table]]:
    """Yield every table of a module with its qualified name."""
    for name, submodule in module.named_modules():
        if isinstance(submodule, Table):
            yield name, submodule


def _normal(rows: int, width: int, std: float, block: int) -> Iterator[tuple[slice, F32[Tensor, "n E"]]]:
    """Yield the rows and numbers that `Tensor.normal_` draws for (rows, width), about `block` at a time; none for an `std` of 0.

    A CPU draws in groups of 16 and, for a remainder, draws the last 16 numbers again. Therefore every block but the
    last is a whole number of groups, and the last has at least 16 rows.
    """
    step = max(16, block // width // 16 * 16)
    first = 0 if std else rows
    while first < rows:
        last = first + step
        if rows - last < 16:
            last = rows
        yield slice(first, last), torch.empty(last - first, width).normal_(0, std)
        first = last
