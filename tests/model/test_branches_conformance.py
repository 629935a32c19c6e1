"""Every registered branch, and one of elsewhere, keeps the promises of its protocol."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from mykinds.branches import MaskBranch
from pydantic import ValidationError
from torch import Tensor, nn

from twotower.kinds import outside_operators
from twotower.model.branches import BRANCHES
from twotower.model.branches.branch import Branch, TowerBranch
from twotower.model.layers import SenetConfig
from twotower.onnx.allow_list import OPERATORS
from twotower.onnx.builder import GraphBuilder

KINDS = [*BRANCHES, MaskBranch]
WIDTHS = [4, 4, 4]


def name_of(kind: type[Branch]) -> str:
    return kind.kind


def made(kind: type[Branch], seed: int = 0, **options: object) -> TowerBranch:
    """A branch over three fields, with random weights everywhere."""
    torch.manual_seed(seed)
    branch = TowerBranch(kind.model_validate(options), WIDTHS, WIDTHS, 1.0)
    for p in branch.parameters():
        nn.init.normal_(p, std=0.4)
    return branch.eval()


def fields(n: int = 6, seed: int = 1) -> Tensor:
    return torch.randn(n, sum(WIDTHS), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_a_branch_maps_each_row_by_itself_to_a_vector_of_its_size(kind: type[Branch], gated: bool) -> None:
    branch, x = made(kind, senet=SenetConfig(enabled=gated)), fields()
    out = branch(x)
    assert out.shape == (6, branch.size)
    assert torch.isfinite(out).all()
    assert torch.allclose(branch(x[2:3]), out[2:3], atol=1e-6)
    assert branch(x[:0]).shape == (0, branch.size)
    assert sum(branch.module.norm_widths) in (0, branch.size)


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_the_gradient_reaches_every_field_and_weight_and_is_that_of_differences(kind: type[Branch]) -> None:
    branch, x = made(kind).double(), fields(2).double().requires_grad_()
    torch.autograd.backward(branch(x).square().sum())
    assert x.grad is not None
    assert (x.grad.abs().view(2, len(WIDTHS), -1).sum(2) > 0).all()
    for name, p in branch.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().max() > 0, name
    assert torch.autograd.gradcheck(branch, (x,))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_the_nodes_of_a_branch_give_what_its_module_gives(kind: type[Branch], gated: bool) -> None:
    branch, x, g = made(kind, senet=SenetConfig(enabled=gated)), fields(), GraphBuilder()
    out = branch.lower(g, g.input("x", np.float32, ["U", sum(WIDTHS)]), "gate", ["a", "b", "c"])
    session = onnxruntime.InferenceSession(g.serialize(out, branch.size, {}))
    found = session.run(["vector"], {"x": x.numpy()})[0]
    with torch.no_grad():
        np.testing.assert_allclose(found, branch(x).numpy(), rtol=1e-4, atol=1e-5)
    written = {node.op_type for node in g.nodes}
    assert written <= OPERATORS.keys() | kind.operators.keys() | outside_operators(Branch).keys()


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_a_branch_has_a_documentation_a_default_and_no_options_of_others(kind: type[Branch]) -> None:
    assert len(kind.__doc__ or "") > 20
    assert BRANCHES.parse(kind().model_dump()) == kind() == BRANCHES.parse(kind.kind)
    for other in KINDS:
        for option in other.model_fields.keys() - kind.model_fields.keys():
            with pytest.raises(ValidationError, match=f"unknown key '{option}'"):
                kind.model_validate({option: 1})
