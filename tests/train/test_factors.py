"""Vectors of all rows of both sides of a model."""

from __future__ import annotations

import torch
from worlds import settings as config_of

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
    assert not whole.users.requires_grad
    model.eval()
    model_factors(model, users, items)
    assert not model.training
