"""Protocol of the branches of a tower, and a branch as part of a tower: gate, module, normalisation."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from twotower.arrays.types import Float
from twotower.errors import ConfigError
from twotower.kinds import Kind
from twotower.model.layers import SenetConfig, SenetGate
from twotower.model.lowering import LoweredModule, lower

if TYPE_CHECKING:
    from twotower.onnx.builder import GraphBuilder


class BranchModule(LoweredModule):
    """Module of a branch: `forward` maps the joined fields (U, N) to (U, size), `lower` builds it for ONNX."""

    size: int
    """Width of the output."""
    norm_widths: Sequence[int] = ()
    """Widths of the parts of the output, each layer-normalised on its own. Empty: no normalisation."""


class Branch(Kind):
    """Options of a branch."""

    senet: SenetConfig = SenetConfig()

    @abstractmethod
    def build(self, widths: list[int], pieces: list[int]) -> BranchModule:
        """Return a fresh module over joined fields of the `widths`. Raises ConfigError for options that do not fit.

        `pieces` are the widths of the vectors to multiply: a field of several means has several."""


class ProductBranch(Branch):
    """Options of a branch that multiplies fields of one width."""

    @abstractmethod
    def product(self, n_fields: int, width: int) -> BranchModule:
        """Return a fresh module over `n_fields` joined vectors of a width."""

    def build(self, widths: list[int], pieces: list[int]) -> BranchModule:
        """Return the module. Raises ConfigError for a single piece, and for pieces of several widths."""
        if len(set(pieces)) > 1:
            raise ConfigError(
                f"a branch of kind '{self.kind}' needs fields of one width, found the widths {sorted(set(pieces))}; "
                "give all fields of the tower one width, or set the kind 'cross' or 'mlp'"
            )
        if len(pieces) < 2:
            raise ConfigError(
                f"a branch of kind '{self.kind}' needs at least two fields, and the tower has one; add a field, or set "
                "the kind 'cross' or 'mlp'"
            )
        return self.product(len(pieces), pieces[0])


class TowerBranch(nn.Module):
    """One branch of a tower: y = LayerNorm(module(gate(x))). Gate and norm are optional.

    A product of k fresh embeddings of standard deviation 0.05 is of the order 0.05^k. Therefore products are
    layer-normalised per row (He and Chua 2017, section 3.2) and multiplied by a learned scale, which starts at the
    standard deviation of the fields. `cross`, which adds products to the fields, and `mlp` have none.
    """

    def __init__(self, config: Branch, widths: list[int], pieces: list[int], deviation: float) -> None:
        """Build the branch over fields of this standard deviation at the start. Raises ConfigError for options that do
        not fit the fields, and for a part of width 1 to normalise."""
        super().__init__()
        self.senet = SenetGate(widths, config.senet) if config.senet.enabled else None
        self.kind = config.kind
        self.module = config.build(widths, pieces)
        self.size = self.module.size
        if min(self.module.norm_widths, default=2) < 2:
            raise ConfigError(
                f"a branch of kind '{config.kind}' has an output of width 1, and the norm of one number is constant; "
                "set the widths of the fields or feature maps that it multiplies to at least 2"
            )
        # The variance of products of fresh embeddings is far below the default epsilon of 1e-5.
        norms = [nn.LayerNorm(w, eps=1e-10) for w in self.module.norm_widths]
        for norm in norms:
            nn.init.constant_(norm.weight, deviation)
        self.norms = nn.ModuleList(norms)

    def forward(self, x: Float[Tensor, "U N"]) -> Float[Tensor, "U size"]:
        if self.senet is not None:
            x = self.senet.reweight(x)
        out: Tensor = self.module(x)
        if not self.norms:
            return out
        parts = torch.split(out, list(self.module.norm_widths), 1)
        return torch.cat([norm(p) for norm, p in zip(self.norms, parts, strict=True)], 1)

    def lower(self, g: GraphBuilder, x: str, gate: str, fields: list[str]) -> str:
        """Build `forward`. The SENet gate becomes the gate `gate` over `fields` of the graph."""
        if self.senet is not None:
            x = self.senet.lower(g, x, gate, fields)
        x = self.module.lower(g, x)
        if not self.norms:
            return x
        parts = g.split(x, self.module.norm_widths)
        return g.concat([lower(norm, g, p) for norm, p in zip(self.norms, parts, strict=True)])
