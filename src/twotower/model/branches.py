"""The parallel parts of a tower: each reads the joined fields, and what they give stands side by side.

How a branch begins. A product of fresh embeddings is the smaller the more of them it multiplies (0.05, 0.05², …), that of
grown or normalised ones the larger: beside the fields a branch of products would be dead at first, or drown them. So the
products of `fm`, `cin` and `bilinear` are normalised row by row, as He and Chua 2017 (section 3.2) normalise theirs, with a
learned scale that begins at the deviation of the fields. (At 1 instead of 0.05 the products did drown the fields: test AUC
0.793 instead of 0.806.) `cross` and `mlp` need none: a cross adds its products to the fields, which pass through it.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from twotower.config import BilinearBranch, Branch, CinBranch, CrossBranch, FmBranch, MlpBranch
from twotower.errors import ConfigError
from twotower.model.layers import SenetGate, norm_activation_dropout


class Mlp(nn.Module):
    """Hidden layers, each activated: y = act(W x + b)."""

    def __init__(self, width: int, config: MlpBranch) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for w in config.layers:
            layers += [
                nn.Linear(width, w),
                *norm_activation_dropout(w, config.activation, config.layer_norm, config.dropout),
            ]
            width = w
        self.layers, self.size = nn.Sequential(*layers), width

    def forward(self, x: Tensor) -> Tensor:
        """(U, N) -> (U, last width)."""
        out: Tensor = self.layers(x)
        return out


class Cross(nn.Module):
    """Products of all numbers, of one degree more a layer: x <- x0 * (W x + b) + x (DCN-v2, Wang et al. 2021,
    equation 1; W = A B of a low rank in equation 4)."""

    def __init__(self, width: int, config: CrossBranch) -> None:
        """Raises ConfigError if the rank saves nothing."""
        super().__init__()
        r = config.rank
        if 2 * r > width:
            raise ConfigError(
                f"rank = {r} of a cross branch over {width} joined numbers is larger than the full matrix; "
                f"give at most {width // 2}, or 0 for the full matrix"
            )
        self.layers = nn.ModuleList()
        for _ in range(config.depth):
            last = nn.Linear(r or width, width)
            # With biases of zero a layer begins as x0 * (W x) + x: the fields, and a few per cent of products.
            nn.init.zeros_(last.bias)
            self.layers.append(nn.Sequential(nn.Linear(width, r, bias=False), last) if r else last)
        self.size = width

    def forward(self, x: Tensor) -> Tensor:
        """(U, N) -> (U, N)."""
        first = x
        for layer in self.layers:
            x = torch.addcmul(x, first, layer(x))
        return x


class Fm(nn.Module):
    """The sum of all products of two fields, ½((Σv)² - Σv²) (bi-interaction pooling, He and Chua 2017, equation 4)."""

    def __init__(self, n: int, width: int) -> None:
        super().__init__()
        self.n, self.width, self.size = n, width, width

    def forward(self, x: Tensor) -> Tensor:
        """F fields of width E side by side (U, F E) -> (U, E)."""
        fields = x.view(len(x), self.n, self.width)
        # Each field times the sum of those before it: the difference of squares loses digits, and its norm shows it.
        return (fields[:, 1:] * fields.cumsum(1)[:, :-1]).sum(1)


class Cin(nn.Module):
    """Feature maps X_k = W_k (all products of a row of X_{k-1} and a field), each summed over its width (xDeepFM, Lian
    et al. 2018, equations 6 and 7, no activation)."""

    def __init__(self, n: int, width: int, config: CinBranch) -> None:
        super().__init__()
        self.n, self.width = n, width
        before = [n, *config.widths[:-1]]
        # The sum of H F products by weights of variance 1 / (H F) is as large as one product.
        self.maps = nn.ParameterList(
            nn.Parameter(torch.randn(w, h * n) / math.sqrt(h * n)) for h, w in zip(before, config.widths, strict=True)
        )
        self.size = sum(config.widths)

    def forward(self, x: Tensor) -> Tensor:
        """F fields of width E side by side (U, F E) -> (U, number of maps)."""
        fields = x.view(len(x), self.n, self.width).transpose(1, 2)  # (U, E, F), so that a map is one matrix product
        maps, out = fields, []
        for weight in self.maps:
            maps = nn.functional.linear((maps[:, :, :, None] * fields[:, :, None]).flatten(2), weight)  # (U, E, H)
            out.append(maps.sum(1))
        return torch.cat(out, 1)


class Bilinear(nn.Module):
    """For each two fields i < j the numbers (v_i W) * v_j (FiBiNET, Huang et al. 2019, section 3.3)."""

    def __init__(self, n: int, width: int, config: BilinearBranch) -> None:
        super().__init__()
        self.n, self.width, self.of = n, width, config.matrices
        self.first, self.second = (
            list(i) for i in zip(*[(i, j) for i in range(n) for j in range(i + 1, n)], strict=True)
        )
        count = {"all": 1, "each": n - 1, "interaction": len(self.first)}[self.of]
        # v W is as large as v.
        self.matrices = nn.Parameter(torch.randn(count, width, width) / math.sqrt(width))
        self.size = len(self.first) * width

    def forward(self, x: Tensor) -> Tensor:
        """F fields of width E side by side (U, F E) -> (U, ½ F (F - 1) E)."""
        fields = x.view(len(x), self.n, self.width)
        weight = self.matrices.to(x.dtype)
        if self.of == "all":
            left = (fields @ weight[0])[:, self.first]
        else:
            left = fields[:, :-1] if self.of == "each" else fields[:, self.first]
            left = torch.einsum("ufe,feg->ufg", left, weight)
            left = left[:, self.first] if self.of == "each" else left
        return (left * fields[:, self.second]).flatten(1)


class TowerBranch(nn.Module):
    """One branch: its gate, what it computes, and the norm of it."""

    def __init__(self, config: Branch, widths: list[int], pieces: list[int], deviation: float) -> None:
        """`widths` of the fields and of their `pieces`, which `fm`, `cin` and `bilinear` multiply; the `deviation` of
        their numbers at the start.

        Raises ConfigError if these are of different widths, or one alone.
        """
        super().__init__()
        self.senet = SenetGate(widths, config.senet) if config.senet.enabled else None
        self.module: nn.Module
        if isinstance(config, MlpBranch):
            self.module = Mlp(sum(widths), config)
        elif isinstance(config, CrossBranch):
            self.module = Cross(sum(widths), config)
        elif isinstance(config, FmBranch | CinBranch | BilinearBranch):
            if len(set(pieces)) > 1:
                raise ConfigError(
                    f"a branch of kind '{config.kind}' multiplies fields of one width, found {sorted(set(pieces))}; "
                    "give all fields of the tower one width, or take the kind 'cross' or 'mlp'"
                )
            if len(pieces) < 2:
                raise ConfigError(
                    f"a branch of kind '{config.kind}' multiplies fields with each other, and the tower has one; give it "
                    "another, or take the kind 'cross' or 'mlp'"
                )
            n, width = len(pieces), pieces[0]
            if isinstance(config, FmBranch):
                self.module = Fm(n, width)
            elif isinstance(config, CinBranch):
                self.module = Cin(n, width, config)
            else:
                self.module = Bilinear(n, width, config)
        else:
            self.module = nn.Identity()
        self.size = cast(int, self.module.size) if hasattr(self.module, "size") else sum(widths)
        self.parts = list(config.widths) if isinstance(config, CinBranch) else [self.size]
        """Widths that are normalised apart: the maps of one layer are products of one degree."""
        self.norms = nn.ModuleList()
        if isinstance(self.module, Fm | Cin | Bilinear):
            # Products of fresh embeddings are far below the usual 1e-5 under the root.
            self.norms.extend(nn.LayerNorm(w, eps=1e-10) for w in self.parts)
        for norm in self.norms:
            nn.init.constant_(cast(nn.LayerNorm, norm).weight, deviation)
        if self.norms and min(self.parts) < 2:
            raise ConfigError(
                f"a branch of kind '{config.kind}' gives a part of width 1, which normalised says nothing; give its fields "
                "(fm) or its maps (cin) a width of at least 2"
            )

    def forward(self, x: Tensor) -> Tensor:
        """The joined fields (U, N) -> (U, size)."""
        if self.senet is not None:
            x = self.senet.weigh(x)
        out: Tensor = self.module(x)
        if not self.norms:
            return out
        return torch.cat([n(p) for n, p in zip(self.norms, torch.split(out, self.parts, 1), strict=True)], 1)
