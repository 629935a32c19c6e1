"""Models with random weights over the world `everything`, and typed access to their parts."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from worlds import EVERYTHING_SCHEMA, everything

from twotower.config.experiment import Config
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.tables import check
from twotower.features.field import InputField
from twotower.features.schema import Schema
from twotower.model.branches.branch import TowerBranch
from twotower.model.embeddings import FieldEmbeddings
from twotower.model.inputs.bag import Bag
from twotower.model.inputs.code_layout import CodeLayout, Inputs, Padded, Prefixes
from twotower.model.inputs.side_tensors import SideTensors
from twotower.model.pooling.pooling import Pooling
from twotower.model.tables import FieldTables, Table
from twotower.model.towers import Tower
from twotower.model.two_tower import ModelConfig, TowerPair, TwoTower

T = TypeVar("T")


class World(NamedTuple):
    data: Dataset
    users: SideTensors
    items: SideTensors

    def inputs(self) -> tuple[Inputs, Inputs]:
        """All rows of both sides."""
        return self.users.take(np.arange(self.users.n)), self.items.take(np.arange(self.items.n))


def world_of(schema: Schema) -> World:
    data = build_dataset(check(*everything(), schema), schema, Config().split)
    users = SideTensors(data.users, data.encoders.fields("user"))
    return World(data, users, SideTensors(data.items, data.encoders.fields("item")))


@cache
def world(without: tuple[str, ...] = ()) -> World:
    """`everything`, also with some features deleted; read only."""
    features = tuple(f for f in EVERYTHING_SCHEMA.features if f.name not in without)
    return world_of(EVERYTHING_SCHEMA.model_copy(update={"features": features}))


def tower(**options: Any) -> dict[str, Any]:
    return {"layers": [6, 5]} | options


def build(
    *pairs: tuple[dict[str, Any], dict[str, Any]], seed: int = 0, of: World | None = None, **options: Any
) -> TwoTower:
    """A model with random weights everywhere, biases included, in evaluation mode."""
    of = of or world()
    config = ModelConfig.model_validate(
        {"width": 4, "embedding_std": 0.5}
        | options
        | {"pairs": [{"user": u, "item": i} for u, i in pairs or [(tower(), tower())]]}
    )
    model = TwoTower(config, of.users.fields, of.items.fields)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name != "log_temperature":
                p.copy_(torch.randn(p.shape, generator=rng) * 0.5)
    return model.eval()


def embeddings_of(
    fields: tuple[InputField, ...], width: int, std: float, other: FieldTables | None = None
) -> FieldEmbeddings:
    """Embeddings of all fields of a side; the other side has the tables `other`."""
    return FieldEmbeddings(FieldTables(fields, width), other or FieldTables((), width), fields, std)


def outputs_of(tower: Tower, inputs: Inputs) -> Tensor:
    """A tower's vectors, and beside them its biases if it has any."""
    return joined_outputs(tower(inputs))


def topped(tower: Tower, joined: Tensor, residual: Tensor | None = None) -> Tensor:
    """What the layers and the head of a tower make of joined fields; the residual reads them too, or others."""
    return joined_outputs(tower.head(tower.layers(joined), joined if residual is None else residual))


def joined_outputs(outputs: tuple[Tensor, Tensor | None]) -> Tensor:
    vectors, bias = outputs
    return vectors if bias is None else torch.cat([vectors, bias], 1)


def fields_of(embeddings: FieldEmbeddings, inputs: Inputs, rate: float = 0.0) -> dict[str, Tensor]:
    """The embedded fields by name, in the order in which they are joined."""
    names, widths = [f.name for f in embeddings.fields], embeddings.widths
    return dict(zip(names, embeddings(inputs, rate).split(widths, 1), strict=True))


def gradient_of(embeddings: FieldEmbeddings, name: str) -> Tensor:
    """The gradient of the rows that hold a field."""
    table, first, rows, *_ = embeddings.tables.place[name]
    gradient = embeddings.tables.table(table).weight.grad
    assert gradient is not None
    return gradient[first : first + rows]


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, atol=tolerance, rtol=1e-5)


def pair_of(model: TwoTower, number: int = 0) -> TowerPair:
    """The pair of towers with this index."""
    pair = model.pairs[number]
    assert isinstance(pair, TowerPair)
    return pair


def branches_of(branches: nn.ModuleList) -> list[TowerBranch]:
    """The branches of a tower."""
    return [b for b in branches if isinstance(b, TowerBranch)]


def not_none(value: T | None) -> T:
    """The value of an optional part that is there."""
    assert value is not None
    return value


def weight_of(module: object) -> Tensor:
    """The weight of a layer or a whole table."""
    assert isinstance(module, Table | nn.Linear | nn.LayerNorm)
    return module.weight


def pool(table: Tensor, codes: CodeLayout, pooling: Pooling) -> Tensor:
    """The rows of a table, pooled by a fresh module."""
    found: Tensor = pooling.build(table.shape[1], "f")(table, codes)
    return found


def bag_of(inputs: Inputs, name: str) -> Bag | Prefixes | Padded:
    """The codes of a field that is pooled."""
    bag = inputs.bags[name]
    assert isinstance(bag, Bag | Prefixes | Padded)
    return bag
