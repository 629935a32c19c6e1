"""Rows that a side of a dataset gives as tensors, and as lists."""

from __future__ import annotations

from itertools import pairwise

import torch

from twotower.data.dataset import Dataset
from twotower.features.side import SideName
from twotower.model.inputs.bag import Bag
from twotower.model.inputs.code_layout import Inputs
from twotower.model.inputs.side_tensors import SideTensors


def tensors(data: Dataset, side: SideName) -> SideTensors:
    return SideTensors(data.side(side), data.encoders.fields(side))


def rows_of(bag: object) -> list[list[int]]:
    assert isinstance(bag, Bag)
    values, offsets = bag.values.tolist(), bag.offsets.tolist()
    assert offsets[0] == 0
    assert offsets[-1] == len(values)
    return [values[a:b] for a, b in pairwise(offsets)]


def equal(a: Inputs, b: Inputs) -> bool:
    bags = all(
        torch.equal(x, y)
        for n in a.bags
        for x, y in zip(vars(a.bags[n]).values(), vars(b.bags[n]).values(), strict=True)
    )
    dense = all(torch.equal(a.dense[n], b.dense[n]) for n in a.dense)
    return bags and dense and a.bags.keys() == b.bags.keys() and torch.equal(a.lookup, b.lookup)
