"""Every pooling: each layout of codes against one row at a time, gradients, ONNX nodes, order, windows, options."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import onnxruntime
import pytest
import torch
from mykinds.poolings import Recency
from torch import Tensor

from twotower.arrays.ragged import Ragged
from twotower.errors import ConfigError
from twotower.features.categorical import Categorical
from twotower.features.field import PoolingSpec
from twotower.features.schema import Schema
from twotower.features.sequence import Sequence
from twotower.features.text import Text
from twotower.model.inputs.bag import bag_in_both_orders
from twotower.model.inputs.code_layout import Arrays, CodeLayout, Padded, pad, take_prefixes, take_windows
from twotower.model.pooling import POOLINGS, check_poolings, resolve
from twotower.model.pooling.pooling import Pooling, PoolingLayer
from twotower.onnx.builder import GraphBuilder

ROWS, WIDTH, WINDOW = 40, 8, 64
LENGTHS = np.array([3, 0, 1, 33, 17, 2, 32])
KINDS = (*POOLINGS, Recency)

every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)


def pooling_of(kind: type[Pooling]) -> Pooling:
    return kind.model_validate({"window": WINDOW} if kind.reads_windows else {})


def layer_of(kind: type[Pooling]) -> PoolingLayer:
    """A fresh module in evaluation mode, its parameters moved from where they start."""
    torch.manual_seed(0)
    layer = pooling_of(kind).build(WIDTH, "f")
    for p in layer.parameters():
        p.data.add_(torch.randn_like(p) * 0.2)
    return layer.eval()


def table() -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()


def histories(lengths: np.ndarray = LENGTHS) -> Ragged:
    offsets = np.r_[0, np.cumsum(lengths)].astype(np.int64)
    return Ragged(np.random.default_rng(2).integers(0, ROWS, offsets[-1]).astype(np.int32), offsets)


def tensors(layout: CodeLayout[Arrays]) -> CodeLayout:
    return layout.map(lambda array: torch.from_numpy(np.ascontiguousarray(array)))


def rows_of(ragged: Ragged) -> list[list[int]]:
    return [ragged.values[a:b].tolist() for a, b in pairwise(ragged.offsets.tolist())]


def beginnings(ragged: Ragged) -> tuple[np.ndarray, np.ndarray, list[list[int]]]:
    """Row and length of every beginning of every history, the empty ones too, and its codes."""
    row = np.repeat(np.arange(len(ragged)), ragged.lengths + 1)
    length = np.concatenate([np.arange(n + 1) for n in ragged.lengths])
    rows = rows_of(ragged)
    return row, length, [rows[r][:n] for r, n in zip(row.tolist(), length.tolist(), strict=True)]


def whole(lengths: np.ndarray = LENGTHS) -> tuple[CodeLayout, list[list[int]]]:
    return tensors(bag_in_both_orders(histories(lengths), ROWS)), rows_of(histories(lengths))


def padded(lengths: np.ndarray = LENGTHS) -> tuple[CodeLayout, list[list[int]]]:
    codes = np.pad(pad(histories(lengths), np.arange(len(lengths))), ((0, 0), (0, 3)), constant_values=-1)
    return tensors(Padded(codes)), rows_of(histories(lengths))


def prefixes(lengths: np.ndarray = LENGTHS) -> tuple[CodeLayout, list[list[int]]]:
    row, length, codes = beginnings(histories(lengths))
    return tensors(take_prefixes(histories(lengths), np.arange(len(lengths)), row, length)), codes


def windows(lengths: np.ndarray = LENGTHS) -> tuple[CodeLayout, list[list[int]]]:
    row, length, codes = beginnings(histories(lengths))
    layout = take_windows(histories(lengths), np.arange(len(lengths)), row, length, 4 * WINDOW)
    assert len(layout.codes) == 1, "no history is cut"
    return tensors(layout), codes


LAYOUTS: dict[str, Callable[..., tuple[CodeLayout, list[list[int]]]]] = {
    "bag": whole, "padded": padded, "prefixes": prefixes, "windows": windows,
}  # fmt: skip


def one_by_one(layer: PoolingLayer, weights: Tensor, rows: list[list[int]]) -> Tensor:
    """Each row alone, without padding."""
    return torch.cat([layer.pool_padded(weights, Padded(torch.tensor([row or [-1]]))) for row in rows])


@every_kind
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_codes_gives_what_rows_alone_give_and_the_same_gradient(
    kind: type[Pooling], layout: str
) -> None:
    codes, rows = LAYOUTS[layout]()
    layer, ours, alone = layer_of(kind), table(), table()
    found, expected = layer(ours, codes), one_by_one(layer, alone, rows)
    assert found.shape == (len(rows), pooling_of(kind).pieces * WIDTH)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert not found[[i for i, row in enumerate(rows) if not row]].any(), "zeros for a row without codes"
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(3))
    torch.autograd.backward([(found * upstream).sum(), (expected * upstream).sum()])
    assert ours.grad is not None
    assert alone.grad is not None
    torch.testing.assert_close(ours.grad, alone.grad, atol=1e-4, rtol=1e-3)


@every_kind
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_in_the_codes_of_a_smaller_table_reads_the_same_rows(kind: type[Pooling], layout: str) -> None:
    codes, _ = LAYOUTS[layout]()
    layer, weights = layer_of(kind), table().detach()
    known = torch.unique(torch.cat([codes.flat(), torch.tensor([0])]))
    recoded = codes.recoded(lambda c: torch.searchsorted(known, c.long()), len(known))
    torch.testing.assert_close(layer(weights[known], recoded), layer(weights, codes))


@every_kind
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_numbered_layout_reads_a_row_for_each_place(kind: type[Pooling], layout: str) -> None:
    codes, _ = LAYOUTS[layout]()
    layer, ours, expected = layer_of(kind), table(), table()
    found = layer(ours[codes.flat()], codes.numbered())
    torch.testing.assert_close(found, layer(expected, codes))
    found.square().sum().backward()
    layer(expected, codes).square().sum().backward()
    assert ours.grad is not None
    assert expected.grad is not None
    torch.testing.assert_close(ours.grad, expected.grad, atol=1e-4, rtol=1e-4)


@every_kind
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_numbered_layout_of_empty_rows_alone_gives_zeros_and_a_gradient(kind: type[Pooling], layout: str) -> None:
    """As the sequences beside a history give it for users without interactions: a table without rows."""
    codes, rows = LAYOUTS[layout](np.zeros(3, np.int64))
    layer, weights = layer_of(kind), table()
    found = layer(weights[codes.flat()], codes.numbered())
    torch.testing.assert_close(found, torch.zeros(len(rows), pooling_of(kind).pieces * WIDTH))
    found.square().sum().backward()


@every_kind
def test_the_onnx_nodes_give_what_the_module_gives(kind: type[Pooling]) -> None:
    layer, weights = layer_of(kind), table().detach()
    g = GraphBuilder()
    g.input("codes", np.dtype(np.int64).type, ["U", "T"])
    width = pooling_of(kind).pieces * WIDTH
    content = g.serialize(layer.lower(g, g.constant(weights), "codes"), width, {})
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    for rows in (np.arange(len(LENGTHS)), np.array([1]), np.array([2, 1])):
        codes = pad(histories(), rows)
        with torch.no_grad():
            expected = layer(weights, Padded(torch.from_numpy(codes))).numpy()
        np.testing.assert_allclose(session.run(None, {"codes": codes})[0], expected, rtol=1e-4, atol=1e-5)


@every_kind
def test_the_order_of_codes_matters_only_where_the_pooling_says_so(kind: type[Pooling]) -> None:
    layer, weights = layer_of(kind), table().detach()
    one, other = (layer.pool_padded(weights, Padded(torch.tensor([codes]))) for codes in ([1, 2, 3, 4], [3, 1, 2, 4]))
    assert torch.allclose(one, other, atol=1e-4) != pooling_of(kind).in_order


@every_kind
def test_a_pooling_comes_back_from_its_choice_in_a_schema(kind: type[Pooling]) -> None:
    feature = Sequence(name="f", side="user", pooling=pooling_of(kind))
    again = Sequence.model_validate_json(feature.model_dump_json())
    assert (again.pooling, resolve(again.pooling)) == (feature.pooling, pooling_of(kind))
    for window in (1, 5):
        if kind.reads_windows and window == 5:
            assert resolve(PoolingSpec(kind=kind.kind, window=window)).model_dump()["window"] == window
        else:
            with pytest.raises(
                ConfigError, match="reads a limited history" if kind.reads_windows else "reads the whole"
            ):
                resolve(PoolingSpec(kind=kind.kind, window=window))


@every_kind
def test_a_text_takes_the_poolings_that_ignore_order(kind: type[Pooling]) -> None:
    item = Categorical(name="item_id", side="item")
    schema = Schema(features=(Text(name="t", side="user", pooling=pooling_of(kind)), item))
    if pooling_of(kind).in_order:
        with pytest.raises(ConfigError, match=r"schema\.features\.0\.pooling: 't' is no history.*mean, sqrt, sum"):
            check_poolings(schema)
    else:
        check_poolings(schema)
