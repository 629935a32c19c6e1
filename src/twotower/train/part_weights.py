"""Weights of the parts of a pair's vectors, added to the other pairs: a conditional logit of what users of validation
take anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from twotower.arrays.types import F32, Bools, Int, Shaped
from twotower.data.dataset import Dataset
from twotower.evaluation.factors import Factors
from twotower.train.choices import Choices, ChoiceWeights


def part_weights(
    factors: Factors,
    parts: Sequence[Int[Tensor, "_"]],
    dataset: Dataset,
    seed: int,
    cold: Shaped[Bools, "items"] | None = None,
    popular: F32[Tensor, "items"] | None = None,
) -> ChoiceWeights | None:
    """Return a weight of the items' numbers in each of some `parts` of their dimensions, added to the score of all
    other dimensions and of recent popularity: under these the items that users take in the validation part, and did not
    take before, are most likely. None for no part, for fewer than MIN_ROWS such rows, for so many parts that
    MAX_NUMBERS leave no more, and where the other dimensions are the same for all items. Items that are `cold` have a
    term of their own, as a bias will raise them, and those that the test part alone has are not compared: else columns
    would tell which they are. `popular` numbers of the items have a weight too, the last one."""
    choices = Choices.of(dataset, seed, len(parts) + 2) if parts else None
    if choices is None:
        return None
    terms = choices.products(factors, [other_dimensions(factors, parts), *parts])
    if factors.recent is not None:
        terms[0] += choices.popularity(factors.recent)
    if popular is not None:
        terms.append(choices.of_items(popular))
    if cold is not None:
        terms.append(choices.of_items(torch.from_numpy(cold)))
    found = choices.weights(terms, n_free=cold is not None)
    return found if cold is None or found is None else ChoiceWeights(found.factors[:-1], found.spreads[:-1])


def without_user_bias(factors: Factors) -> Factors:
    """Return factors with columns of biases, without that of the users, which no ranking sees."""
    users = factors.users.clone()
    users[:, -2] = 0
    return replace(factors, users=users)


def other_dimensions(factors: Factors, parts: Sequence[Int[Tensor, "_"]]) -> Int[Tensor, "_"]:
    """Return the dimensions that none of some parts has."""
    rest = torch.ones(factors.items.shape[1], dtype=torch.bool)
    for part in parts:
        rest[part] = False
    return rest.nonzero()[:, 0]
