"""Tower: field embeddings -> SENet gate -> branches -> layers -> head."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from twotower.arrays.types import Float, Int
from twotower.errors import ConfigError, did_you_mean
from twotower.features.field import InputField
from twotower.features.values import UNKNOWN
from twotower.model.branches import BRANCHES
from twotower.model.branches.branch import Branch, TowerBranch
from twotower.model.embeddings import FieldEmbeddings
from twotower.model.inputs import stacked
from twotower.model.inputs.code_layout import Inputs
from twotower.model.layers import (
    Activation,
    Dropout,
    SenetConfig,
    SenetGate,
    activation_module,
    lower_normalized_pieces,
    norm_activation_dropout,
    normalize_pieces,
    with_unknown,
)
from twotower.model.lowering import lower
from twotower.model.tables import FieldTables, Table
from twotower.section import Positive, Section

if TYPE_CHECKING:
    from twotower.onnx.builder import GraphBuilder


class TowerConfig(Section):
    """One tower of a pair: fields -> SENet -> branches -> layers -> vector."""

    start_here = ("layers",)
    research = ("join", "augment", "activate_last", "weight_decay_scale")

    fields: tuple[str, ...] = Field(
        (), description="Names of the features that the tower reads. Empty: all features of its side."
    )
    width: int = Field(0, ge=0, description="Embedding width of the tower's fields. 0: model.width.")
    join: Literal["concat", "sum"] = Field(
        "concat", description="Combination of the fields. sum: added and activated, as a layer over one-hot inputs."
    )
    senet: SenetConfig = SenetConfig()
    branches: tuple[Annotated[Branch, BRANCHES], ...] = Field(
        (), description="Parallel branches between the joined fields and the layers, each with its `kind`. Empty: none."
    )
    augment: bool = Field(False, description="Augmented vector per id, which loss.mimic trains (DAT).")
    layers: tuple[Positive, ...] = Field(
        (64, 32), description="Layer widths. The last one is the width of the vector, by default without activation."
    )
    activation: Activation = Field("LeakyReLU", description="Activation function of the hidden layers.")
    activate_last: bool = Field(False, description="Activation after the last layer too, as in the DSSM of 2013.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout rate of the hidden units.")
    field_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout rate of the joined fields.")
    weight_decay_scale: float = Field(
        1.0, ge=0, description="Factor of train.embedding_weight_decay for this tower's embeddings."
    )
    layer_norm: bool = Field(False, description="Layer normalisation before each activation.")
    field_norm: bool = Field(False, description="Layer normalisation of each field before the fields are joined.")
    residual: bool = Field(False, description="Linear map of the joined fields, added to the last layer.")
    output_norm: bool = Field(False, description="Layer normalisation of the vector, with learned scale and shift.")

    @model_validator(mode="after")
    def _check(self) -> TowerConfig:
        if self.senet.enabled and self.join == "sum":
            raise ValueError("senet needs join = 'concat'")
        if self.join == "sum" and (self.branches or self.augment):
            raise ValueError(f"{'branches' if self.branches else 'augment'} needs join = 'concat'")
        for option in ("augment", "residual", "activate_last"):
            if getattr(self, option) and not self.layers:
                raise ValueError(f"{option} needs layers, and layers is empty; set it to the vector's width, as [64]")
        return self

    @property
    def without_effect(self) -> tuple[str, ...]:
        """Options that are set and have no effect: options of hidden units in a tower without any."""
        if self.join == "sum" or len(self.layers) > 1:
            return ()
        names = ("dropout", "layer_norm", *(() if self.activate_last else ("activation",)))
        return tuple(name for name in names if getattr(self, name) != type(self).model_fields[name].default)


class Tower(nn.Module):
    """One tower of a two-tower model: inputs of U rows -> vectors (U, D) and biases (U, 1).

    v = head(layers(concat(branch_1(x), …, augmented)), x), x the concatenated or summed fields after the gate. All
    parts but the fields are optional. D is the width of the last layer, or of x (Huang et al. 2013, DSSM).
    """

    def __init__(
        self, config: TowerConfig, side_fields: tuple[InputField, ...], tables: FieldTables, shared: FieldTables,
        std: float, unknown_rate: float = 0.0, bias: bool = False, id_dropout: float = 0.0,
    ) -> None:  # fmt: skip
        """Build the tower and its `tables`; `shared` are the tables of the other tower of its pair.

        `std` is the standard deviation of fresh embeddings. An unknown row that neither `unknown_rate` nor, for ids,
        `id_dropout` trains starts at zero. With `bias` a tower with layers returns biases. Raises ConfigError for
        settings that do not fit the fields."""
        super().__init__()
        self.unknown_rate = unknown_rate
        self.weight_decay_scale = config.weight_decay_scale
        untrained = {f.name for f in side_fields if not (unknown_rate or (f.identifies and id_dropout))}
        self.embeddings = FieldEmbeddings(tables, shared, side_fields, std, untrained)
        widths = self.embeddings.widths
        self.senet = SenetGate(widths, config.senet) if config.senet.enabled else None
        self.field_dropout = Dropout(config.field_dropout)
        self.pieces = self.embeddings.pieces if config.field_norm else []
        after = (config.activation, config.layer_norm, config.dropout)
        layers: list[nn.Module] = []
        if config.join == "sum":
            if len(set(widths)) > 1:
                found = ", ".join(f"{f.name} {w}" for f, w in zip(self.embeddings.fields, widths, strict=True))
                raise ConfigError(f"join = 'sum' needs fields of one width, found {found}; give them one width")
            joined = widths[0]
            self.shift: nn.Parameter | None = nn.Parameter(torch.zeros(joined))
            layers += norm_activation_dropout(joined, *after)
        else:
            self.shift = None
            joined = sum(widths)
        deviation = 1.0 if config.field_norm else std
        branches = [TowerBranch(b, widths, self.embeddings.pieces, deviation) for b in config.branches]
        self.branches = nn.ModuleList(branches)
        size = sum(b.size for b in branches) if branches else joined
        self.augmented = AugmentedVectors(side_fields, config.layers[-1]) if config.augment else None
        if self.augmented is not None:
            size += self.augmented.width
        for width in config.layers[:-1]:
            layers += [nn.Linear(size, width), *norm_activation_dropout(width, *after)]
            size = width
        self.layers = nn.Sequential(*layers)
        self.head = TowerHead(
            size,
            joined,
            config.layers[-1] if config.layers else None,
            bias=bias,
            residual=config.residual,
            activation=config.activation if config.activate_last else None,
            norm=config.output_norm,
        )
        self.size = self.head.width

    def gates(self, inputs: Inputs) -> dict[str, Float[Tensor, "U F"]]:
        """Return the weights of every SENet gate by its config section, in the order of `field_names`."""
        fields = self.joined_fields(inputs)
        found = {} if self.senet is None else {"senet": self.senet(fields)}
        if self.senet is not None:
            fields = self.senet.reweight(fields)
        for number, branch in enumerate(self._branches()):
            if branch.senet is not None:
                found[f"branches.{number}.senet"] = branch.senet(fields)
        return found

    @property
    def field_names(self) -> list[str]:
        return [f.name for f in self.embeddings.fields]

    def joined_fields(self, inputs: Inputs) -> Float[Tensor, "U N"]:
        """Return the concatenated fields, normalised if `field_norm` is set."""
        fields: Tensor = self.embeddings(inputs, self.unknown_rate)
        return normalize_pieces(fields, self.pieces) if self.pieces else fields

    def forward(self, inputs: Inputs) -> tuple[Float[Tensor, "U D"], Float[Tensor, "U 1"] | None]:
        """Return the vectors, and the biases or None."""
        joined = self.joined_fields(inputs)
        if self.senet is not None:
            joined = self.senet.reweight(joined)
        if self.shift is not None:
            joined = joined.view(len(joined), len(self.field_names), len(self.shift)).sum(1) + self.shift
        joined = self.field_dropout(joined)
        outputs = [branch(joined) for branch in self.branches] or [joined]
        if self.augmented is not None:
            outputs.append(self.augmented(inputs, self.unknown_rate))
        hidden = self.layers(torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0])
        vectors, bias = self.head(hidden, joined)
        return vectors, bias

    def lower(self, g: GraphBuilder, inputs: Mapping[str, str], number: int) -> tuple[str, str]:
        """Build `forward` of the tower of pair `number`, from 0; return the vectors, and the biases or "".

        `inputs` maps a field to its input."""
        pair, fields = f"pair {number + 1}", self.field_names
        joined = self.embeddings.lower(g, inputs, number)
        if self.pieces:
            joined = lower_normalized_pieces(g, joined, self.pieces)
        if self.senet is not None:
            joined = self.senet.lower(g, joined, pair, fields)
        if self.shift is not None:
            joined = g.reshape(joined, len(fields), len(self.shift))
            joined = g("Add", g.reduce("Sum", joined, 1, keep=False), g.constant(self.shift))
        outputs = [
            branch.lower(g, joined, f"{pair}, branch {i} ({branch.kind})", fields)
            for i, branch in enumerate(self._branches(), 1)
        ] or [joined]
        if self.augmented is not None:
            outputs.append(self.augmented.lower(g, number))
        return self.head.lower(g, lower(self.layers, g, g.concat(outputs)), joined)

    def _branches(self) -> list[TowerBranch]:
        return [branch for branch in self.branches if isinstance(branch, TowerBranch)]


def select_fields(fields: tuple[InputField, ...], names: tuple[str, ...]) -> tuple[InputField, ...]:
    """Return the fields of these names and the sequences added to them; without names all. Raises ConfigError for an
    unknown or repeated name."""
    known = {f.name: f for f in fields if not f.added_to}
    for name in names:
        if name not in known:
            raise ConfigError(
                f"model.pairs: no feature '{name}' on this side{did_you_mean(name, known)} (allowed: "
                f"{', '.join(known)})"
            )
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"model.pairs: feature '{min(twice)}' is listed twice in one tower's fields; name it once")
    if not names:
        return fields
    return tuple(g for name in names for g in (known[name], *(f for f in fields if f.added_to == name)))


class AugmentedVectors(nn.Module):
    """Augmented vector per id of a side: a table row trained towards the other side's vectors of the id's positives.

    This is the adaptive-mimic mechanism of DAT (Yu et al. 2021, "A Dual Augmented Two-tower Model for Online
    Large-scale Recommendation", section 3.2). Rows start at zero; unknown ids read row 0.
    """

    def __init__(self, side_fields: tuple[InputField, ...], width: int) -> None:
        """Create the table. Raises ConfigError unless a field reads the side's ids without hashing."""
        super().__init__()
        lookups = stacked(side_fields)
        own = [number for number, f in enumerate(lookups) if f.identifies]
        if not own:
            raise ConfigError(
                "augment = true needs a categorical feature over the id column of its side, without hash_buckets; "
                "add one to schema.features"
            )
        self.column, self.width = own[0], width
        self.table: Table = Table(lookups[own[0]].rows, width)
        self.table.initialize(0)

    def forward(self, inputs: Inputs, unknown_rate: float = 0.0) -> Float[Tensor, "U D"]:
        """Return the vectors; in training a share `unknown_rate` of the rows reads row 0."""
        codes = inputs.lookup[:, self.column]
        if self.training:
            codes = with_unknown(codes, unknown_rate)
        out: Tensor = self.table(codes)
        return out

    def codes(self, inputs: Inputs) -> Int[Tensor, "n"]:
        """Return the table rows that `forward` may read."""
        codes = inputs.lookup[:, self.column]
        return torch.cat([codes, codes.new_tensor([UNKNOWN])])

    def lower(self, g: GraphBuilder, key: Hashable) -> str:
        """Build `forward`; `key` is the pair, for the name of the table."""
        codes = g("Gather", "lookup", g.constant([self.column]), axis=1)
        return g.reshape(g("Gather", g.constant(self.table.weight, (key, "augmented")), codes, axis=0), self.width)


class TowerHead(nn.Module):
    """Last layer of a tower: hidden units h and joined fields x -> the vector v (U, D) and the bias b (U, 1).

    (v, b) = W h + c + R x, then v <- norm(act(v)). R, the bias, the activation and the norm are optional. Without a
    layer h is the vector, without a bias.
    """

    def __init__(
        self, hidden: int, joined: int, width: int | None, *, bias: bool, residual: bool = False,
        activation: Activation | None = None, norm: bool = False,
    ) -> None:  # fmt: skip
        """Build the head over `hidden` units and `joined` numbers. `width` is D; None: no layer."""
        super().__init__()
        self.width = width or hidden
        self.has_bias = bias and width is not None
        outputs = self.width + self.has_bias
        self.layer = nn.Linear(hidden, outputs) if width else None
        self.residual = nn.Linear(joined, outputs, bias=False) if residual else None
        self.activation = activation_module(activation) if activation else None
        self.norm = nn.LayerNorm(self.width) if norm else None

    def forward(
        self, hidden: Float[Tensor, "U H"], joined: Float[Tensor, "U N"]
    ) -> tuple[Float[Tensor, "U D"], Float[Tensor, "U 1"] | None]:
        """Return the vectors, and the biases or None."""
        out: Tensor = hidden if self.layer is None else self.layer(hidden)
        if self.residual is not None:
            out = out + self.residual(joined)
        vector, bias = (out[:, : self.width], out[:, self.width :]) if self.has_bias else (out, None)
        if self.activation is not None:
            vector = self.activation(vector)
        if self.norm is not None:
            vector = self.norm(vector)
        return vector, bias

    def lower(self, g: GraphBuilder, hidden: str, joined: str) -> tuple[str, str]:
        """Build `forward`; return the names of the vectors and of the biases or ""."""
        out = hidden if self.layer is None else lower(self.layer, g, hidden)
        if self.residual is not None:
            out = g("Add", out, lower(self.residual, g, joined))
        vector, bias = g.split(out, [self.width, 1]) if self.has_bias else (out, "")
        for module in (self.activation, self.norm):
            vector = vector if module is None else lower(module, g, vector)
        return vector, bias
