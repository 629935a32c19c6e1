"""Vectors of all rows of both sides of a model."""

from __future__ import annotations

import numpy as np
import torch
from worlds import settings as config_of

from twotower.arrays.ragged import Ragged
from twotower.data.dataset import Dataset
from twotower.model.inputs.side_tensors import SideTensors
from twotower.model.two_tower import TwoTower
from twotower.train.factors import model_factors


def test_vectors_come_from_evaluation_mode_in_blocks_and_leave_the_mode_as_it_was(
    everything_data: Dataset,
) -> None:
    data = everything_data
    fields = data.encoders.fields("user"), data.encoders.fields("item")
    tower = {"layers": [8], "field_dropout": 0.5}
    model = TwoTower(config_of(model={"width": 4, "pairs": [{"user": tower, "item": tower}]}).model, *fields)
    users, items = SideTensors(data.users, fields[0]), SideTensors(data.items, fields[1])
    model.train()
    whole, parts = model_factors(model, users, items), model_factors(model, users, items, block=7)
    assert model.training
    assert torch.allclose(whole.users, parts.users, atol=1e-6)
    assert torch.allclose(whole.items, parts.items, atol=1e-6)
    few_codes = model_factors(model, users, items, codes=9)
    assert torch.allclose(whole.users, few_codes.users, atol=1e-6)
    assert torch.allclose(whole.items, few_codes.items, atol=1e-6)
    assert not whole.users.requires_grad
    model.eval()
    model_factors(model, users, items)
    assert not model.training


def test_blocks_cover_every_row_once_with_few_codes_or_one_row(everything_data: Dataset) -> None:
    data = everything_data
    fields = data.encoders.fields("user")
    users = SideTensors(data.users, fields)
    bags = [c for f in fields if isinstance(c := data.users.columns[f.name], Ragged) and not f.limit]
    assert len(bags) > 1
    lengths = np.sum([bag.lengths for bag in bags], axis=0)
    for rows, codes in ((7, 10**6), (1000, 60), (7, 60), (1000, 0)):
        blocks = list(users.blocks(rows, codes))
        assert np.concatenate(blocks).tolist() == list(range(len(data.users)))
        for block, after in zip(blocks, [*blocks[1:], None], strict=True):
            assert len(block) == 1 or (len(block) <= rows and lengths[block].sum() <= codes)
            if after is not None:  # no block could be longer
                assert len(block) == rows or lengths[block].sum() + lengths[after[0]] > codes
