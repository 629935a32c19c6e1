"""Pooling `ridge` against the normal equations, solved one user at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from twotower.errors import ConfigError
from twotower.features.field import PoolingSpec
from twotower.model.inputs.bag import Bag
from twotower.model.inputs.code_layout import Padded
from twotower.model.pooling import resolve
from twotower.model.pooling.ridge import Ridge, RidgeLayer

WIDTH = 6
CODES = torch.tensor([[3, 1, 4, 1, 5], [2, -1, -1, -1, -1], [-1, -1, -1, -1, -1], [7, 0, 6, -1, -1]])


def table() -> Tensor:
    return torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()


def layer_with(penalty: Tensor, rate: float) -> RidgeLayer:
    layer = Ridge(steps=24).build(WIDTH, "f")
    layer.set_penalties(penalty, rate)
    return layer


def solved(weights: Tensor, penalty: Tensor, rate: Tensor) -> Tensor:
    """Each user's normal equations, in float64."""
    found = []
    for row in CODES:
        x = weights[row[row >= 0]]
        a = x.T @ x + penalty + len(x) * rate * torch.eye(WIDTH, dtype=x.dtype)
        found.append(torch.linalg.solve(a, x.sum(0)))
    return torch.stack(found)


def test_a_user_vector_is_the_half_step_of_ials() -> None:
    items = table().detach()
    penalty = 0.3 * items.T @ items + 0.3 * 8 * 0.05 * torch.eye(WIDTH)
    found = layer_with(penalty, 0.05)(items, Padded(CODES))
    expected = solved(items.double(), penalty.double(), torch.tensor(0.05, dtype=torch.float64))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def errors(items: Tensor, codes: Tensor, penalty: Tensor, rate: float, **options: int) -> tuple[float, float]:
    """The largest errors of the vectors and of their products with the items, relative to the largest numbers."""
    layer = Ridge(**options).build(items.shape[1], "f")
    layer.set_penalties(penalty, rate)
    x = items[codes].double()
    system = x.mT @ x + penalty.double() + codes.shape[1] * rate * torch.eye(items.shape[1]).double()
    expected, found = torch.linalg.solve(system, x.sum(1)), layer(items, Padded(codes)).detach().double()
    of_products = ((found - expected) @ items.double().T).abs().max() / (expected @ items.double().T).abs().max()
    return float((found - expected).abs().max() / expected.abs().max()), float(of_products)


@pytest.mark.parametrize("rate", [1e-12, 1e-4])
def test_small_penalties_of_a_start_are_solved_as_exactly(rate: float) -> None:
    """Steps that are not scaled are off by a twentieth and more there, and by another one in other software."""
    generator = torch.Generator().manual_seed(4)
    items = torch.randn(60, 48, generator=generator) * torch.logspace(0, -2, 48)
    axes = torch.linalg.eigh(items.double().T @ items.double()).eigenvectors
    items = (items.double() @ axes).float()
    codes = torch.randint(1, 60, (40, 9), generator=generator)
    assert max(errors(items, codes, 1e-4 * items.square().sum(0).diag(), rate)) < 0.005


def test_histories_of_hundreds_are_solved_as_exactly() -> None:
    """With half the steps the vectors are off by more than a thousandth, and depend on rounding."""
    generator = torch.Generator().manual_seed(4)
    items = torch.randn(2000, 128, generator=generator) * torch.logspace(0, -1, 128)
    codes = torch.randint(1, 2000, (20, 400), generator=generator)
    penalty = 1e-3 * items.square().sum(0).diag()
    assert errors(items, codes, penalty, 1e-4)[0] < 1e-5
    assert errors(items, codes, penalty, 1e-4, steps=16)[0] > 1e-3


def test_gradients_are_those_of_the_exact_solution() -> None:
    ours, exact = table(), table().detach().double().requires_grad_()
    layer = layer_with(torch.eye(WIDTH) + 0.1, 0.05)
    factor = layer.factor.detach().double().requires_grad_()
    log_rate = layer.log_rate.detach().double().requires_grad_()
    upstream = torch.randn(len(CODES), WIDTH, generator=torch.Generator().manual_seed(2))
    ours_sum = (layer(ours, Padded(CODES)) * upstream).sum()
    torch.autograd.backward([ours_sum, (solved(exact, factor @ factor.T, log_rate.exp()) * upstream).sum()])
    for found, expected in ((ours, exact), (layer.factor, factor), (layer.log_rate, log_rate)):
        assert found.grad is not None
        assert expected.grad is not None
        torch.testing.assert_close(found.grad.double(), expected.grad, rtol=1e-3, atol=1e-5)


def test_users_in_several_passes_get_the_vectors_of_one() -> None:
    layer = layer_with(torch.eye(WIDTH), 0.05)
    expected = layer(table(), Padded(CODES))
    layer.max_numbers = WIDTH
    torch.testing.assert_close(layer(table(), Padded(CODES)), expected)


def test_bags_are_padded_part_by_part_and_give_what_padded_rows_give() -> None:
    class Bare(Bag):
        def padded(self) -> Padded:
            raise AssertionError("one long row pads all others")

    torch.manual_seed(1)
    lengths = torch.tensor([3, 0, 1, 40, 2, 0, 7, 0])
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    values, none = torch.randint(0, 9, (int(lengths.sum()),)).int(), torch.zeros(0, dtype=torch.int32)
    table, layer = torch.randn(9, 4, requires_grad=True), RidgeLayer(4, Ridge())
    expected = layer.pool_padded(table, Bag(values, offsets, none, none).padded())
    (of_padded,) = torch.autograd.grad(expected.square().sum(), table)
    for layer.max_numbers in (1, 4 * 12, 2**23):
        found = layer(table, Bare(values, offsets, none, none))
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found.square().sum(), table)[0], of_padded)
    assert not layer(table, Bag(none, torch.zeros(4, dtype=torch.int32), none, none)).any()


def test_bf16_products_of_other_layers_leave_the_solution_in_fp32() -> None:
    layer = layer_with(torch.eye(WIDTH), 0.05)
    expected = layer(table(), Padded(CODES))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(table(), Padded(CODES)), expected)


@pytest.mark.parametrize(("option", "value"), [("steps", 0), ("penalty", 0.0), ("rate", -1.0)])
def test_options_out_of_their_range_are_refused(option: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"pooling\.{option}: Input should be greater than"):
        resolve(PoolingSpec.model_validate({"kind": "ridge", option: value}))
