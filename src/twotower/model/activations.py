"""Activation functions of hidden layers, each with its lowering."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from torch import nn

from twotower.model.lowering import lower

if TYPE_CHECKING:
    from twotower.onnx.builder import GraphBuilder

Activation = Literal["LeakyReLU", "ReLU", "GELU", "SiLU", "Tanh", "Sigmoid", "Identity"]
"""Names of the activations, which are those of torch.nn. Identity: none."""


def activation_module(name: Activation) -> nn.Module:
    """Return the activation of a name."""
    module: nn.Module = getattr(nn, name)()
    return module


@lower.register(nn.LeakyReLU)
def _(module: nn.LeakyReLU, g: GraphBuilder, x: str) -> str:
    return g("LeakyRelu", x, alpha=module.negative_slope)


@lower.register(nn.ReLU)
def _(module: nn.ReLU, g: GraphBuilder, x: str) -> str:
    return g("Relu", x)


@lower.register(nn.GELU)
def _(module: nn.GELU, g: GraphBuilder, x: str) -> str:
    half = g("Mul", x, g.constant(0.5))  # the pattern that onnxruntime fuses into one node
    return g("Mul", half, g("Add", g("Erf", g("Div", x, g.constant(math.sqrt(2)))), g.constant(1.0)))


@lower.register(nn.SiLU)
def _(module: nn.SiLU, g: GraphBuilder, x: str) -> str:
    return g("Mul", x, g("Sigmoid", x))


@lower.register(nn.Tanh)
def _(module: nn.Tanh, g: GraphBuilder, x: str) -> str:
    return g("Tanh", x)


@lower.register(nn.Sigmoid)
def _(module: nn.Sigmoid, g: GraphBuilder, x: str) -> str:
    return g("Sigmoid", x)


@lower.register(nn.Identity)
def _(module: nn.Identity, g: GraphBuilder, x: str) -> str:
    return x
