"""Lowering of modules: the ONNX nodes of a module's `forward`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import singledispatch
from typing import TYPE_CHECKING

from torch import Tensor, nn

from twotower.arrays.types import Float
from twotower.errors import RunError

if TYPE_CHECKING:
    from twotower.onnx.builder import GraphBuilder


MAX_TABLE_BYTES = (1 << 31) - (1 << 20)
"""Largest size of the constants of an ONNX file, in bytes: protobuf limits a message to 2 GiB."""


class LoweredModule(nn.Module, ABC):
    """Module of one input and one output with ONNX nodes of its own."""

    @abstractmethod
    def lower(self, g: GraphBuilder, x: str) -> str:
        """Build the nodes of `forward` in evaluation mode over the value `x`; return the name of the output."""


@singledispatch
def lower(module: nn.Module, g: GraphBuilder, x: str) -> str:
    """Build the nodes of a module over the value `x`; return the output. Raises RunError without a lowering."""
    raise RunError(
        f"a layer of kind {type(module).__name__} cannot be exported; make it a subclass of {LoweredModule.__module__}."
        f"{LoweredModule.__name__}"
    )


@lower.register(LoweredModule)
def _(module: LoweredModule, g: GraphBuilder, x: str) -> str:
    return module.lower(g, x)


@lower.register(nn.Sequential)
def _(module: nn.Sequential, g: GraphBuilder, x: str) -> str:
    for inner in module:
        x = lower(inner, g, x)
    return x


@lower.register(nn.Linear)
def _(module: nn.Linear, g: GraphBuilder, x: str) -> str:
    return lower_linear(g, x, module.weight, module.bias)


@lower.register(nn.LayerNorm)
def _(module: nn.LayerNorm, g: GraphBuilder, x: str) -> str:
    weights = (g.constant(module.weight), g.constant(module.bias))
    return g("LayerNormalization", x, *weights, axis=-1, epsilon=module.eps)


def lower_linear(g: GraphBuilder, x: str, weight: Float[Tensor, "m n"], bias: Float[Tensor, "m"] | None) -> str:
    """Build W x + b: (U, n) -> (U, m)."""
    return g("Gemm", x, g.constant(weight), *([] if bias is None else [g.constant(bias)]), transB=1)
