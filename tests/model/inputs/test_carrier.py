"""Every carrier: rows together, alone and as a tower reads them; exported with its module."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from mykinds.carriers import Curve

from twotower.arrays.ragged import row_of
from twotower.errors import ConfigError
from twotower.features.field import InputField
from twotower.model.inputs import CARRIERS, carrier, stacked
from twotower.model.inputs.carrier import Carrier
from twotower.model.inputs.gather import ColumnRows, OneRow, feed
from twotower.model.inputs.side_tensors import SideTensors
from twotower.model.two_tower import ModelConfig, TwoTower
from twotower.onnx.export import export_tower, random_side
from twotower.onnx.tower import OnnxTower

KINDS = (*CARRIERS, Curve)
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)


def field_of(kind: type[Carrier]) -> InputField:
    return InputField("x", kind.kind, rows=9 if kind.has_table else 0, length=0 if kind.has_table else 3, width=4)


@every_kind
def test_rows_together_and_alone_give_the_same_array(kind: type[Carrier]) -> None:
    field, of = field_of(kind), carrier(kind.kind)
    assert isinstance(of, kind)
    column = of.sample(field, 30, np.random.default_rng(0))
    together = of.feed(ColumnRows({"x": column}, np.arange(30)), field)
    assert together.shape[0] == len(column) == 30
    for row in range(30):
        alone = of.feed(OneRow({"x": row_of(column, row)}), field)
        assert (alone.dtype, alone.shape[0]) == (together.dtype, 1)
        assert np.array_equal(alone[0], together[row, : alone.shape[1]])
        assert (together[row, alone.shape[1] :] == -1).all(), "padding"


@every_kind
def test_a_tower_reads_it_and_is_exported_with_it(kind: type[Carrier], tmp_path: Path) -> None:
    fields, items = (InputField("id", "lookup", rows=5), field_of(kind)), (InputField("item", "lookup", rows=7),)
    torch.manual_seed(0)
    model = TwoTower(ModelConfig(width=4), fields, items).eval()
    assert len(stacked(fields)) == 1 + kind.is_stacked
    side = random_side(fields)
    inputs = SideTensors(side, fields).take(np.arange(8))
    with torch.no_grad():
        expected = model.user_vectors(inputs)
    torch.autograd.backward(model.user_vectors(inputs).sum())
    embeddings = model.towers("user")[0].embeddings
    parameter = embeddings.rows_of("x") if kind.has_table else next(embeddings.projections.parameters())
    leaf = parameter if parameter.is_leaf else next(embeddings.tables.parameters())
    assert leaf.grad is not None
    assert leaf.grad.any()
    path = tmp_path / "tower.onnx"
    assert export_tower(model, "user", fields, path) < 1e-5
    found = OnnxTower(path)(feed(fields, side.columns, np.arange(8)))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_an_unknown_carrier_is_named() -> None:
    with pytest.raises(ConfigError, match="no carrier of kind 'bags'; did you mean 'bag'"):
        carrier("bags")
