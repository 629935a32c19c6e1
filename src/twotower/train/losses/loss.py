"""Protocol of the losses: pointwise over labelled pairs, contrastive over candidates."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from twotower.arrays.types import F32, I64, Float
from twotower.kinds import Kind


class Loss(Kind):
    """A loss over logits: a `PointwiseLoss` or a `ContrastiveLoss`."""

    pointwise: ClassVar[bool]
    """True: labelled pairs. False: positives against candidates."""
    research = ("mimic",)

    mimic: float = Field(
        0.0,
        ge=0,
        description="Weight of the adaptive-mimic loss: squared distance of augmented vectors to the other tower's. "
        "0: off.",
    )


class PointwiseLoss(Loss):
    """A loss of labelled pairs: training interactions and drawn negatives."""

    pointwise: ClassVar[Literal[True]] = True

    @abstractmethod
    def __call__(
        self,
        logits: Float[Tensor, "B"],
        labels: Float[Tensor, "B"],
        weights: Float[Tensor, "B"],
        total_weight: float = 0.0,
    ) -> Float[Tensor, ""]:
        """Return the weighted mean over B pairs with `labels` 0 or 1.

        With `total_weight` the pairs are a part of a batch of that weight, and the result is their part of its mean.
        """


@dataclass(frozen=True)
class Columns:
    """Columns of a batch's logits: candidates shared by all rows, then each row's own negatives."""

    draws: F32[Tensor, "C"]
    """Number of draws of a column's item. 0: the column is present for its positive only."""
    n_items: int
    """Size of the catalogue."""

    @cached_property
    def share(self) -> float:
        """Share of the other items of the catalogue that are candidates of a row."""
        return min(1.0, float((self.draws > 0).sum()) / max(1, self.n_items - 1))

    def weights(self, logits: F32[Tensor, "b C"], positive: I64[Tensor, "b 1"]) -> F32[Tensor, "b C"]:
        """Return the draws as weights of negatives; 0 for the positive and for candidates that a row leaves out."""
        return (self.draws * (logits > -torch.inf)).scatter(1, positive, 0.0)


class Shifts(NamedTuple):
    """Terms added to logits before the loss, one for each of C shared candidates."""

    candidates: F32[Tensor, "C"]
    """Added to the logits of the candidate in the column."""
    positives: F32[Tensor, "C"]
    """Added to the logit of the positive in the column, and to the logits of its own negatives."""


class ContrastiveLoss(Loss):
    """A loss of positives against candidates.

    Its logits have b rows of positives and C columns; -inf is a candidate that a row leaves out. `positive` is the
    column of a row's positive. `rows` is the loss in plain torch, which is differentiated; a faster gradient overrides
    `block`.
    """

    pointwise: ClassVar[Literal[False]] = False

    @abstractmethod
    def rows(self, logits: F32[Tensor, "b C"], positive: I64[Tensor, "b 1"], columns: Columns) -> F32[Tensor, "b"]:
        """Return the loss of each row."""

    def block(
        self,
        logits: F32[Tensor, "b C"],
        positive: I64[Tensor, "b 1"],
        columns: Columns,
        weights: F32[Tensor, "b 1"],
    ) -> F32[Tensor, ""]:
        """Return the weighted sum of the rows' losses, and overwrite the logits with its gradient."""
        leaf = logits.detach().clone().requires_grad_()
        with torch.enable_grad():
            value = (self.rows(leaf, positive, columns) * weights[:, 0]).sum()
            (gradient,) = torch.autograd.grad(value, leaf)
        logits.copy_(gradient)
        return value.detach()

    def shifts(self, draws: F32[Tensor, "C"], log_q: F32[Tensor, "C"]) -> Shifts | None:
        """Return terms to add to logits, from the draws of C shared candidates and the log of their expected number."""
        return None
