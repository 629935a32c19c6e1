"""All settings with default, meaning and range; reading and writing TOML, overrides, the commented template.

An unknown key is an error that names the nearest valid one; a key of a former name is an error that names the present one.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import tomli_w
from pydantic import BaseModel, Field, ValidationError, model_validator

from twotower import files
from twotower.errors import ConfigError, did_you_mean
from twotower.features.schema import Categorical, MultiHot, Numeric, Schema, Sequence, Settings, Text, Vector

FEATURE_KINDS: dict[str, type[BaseModel]] = {
    "categorical": Categorical,
    "numeric": Numeric,
    "multi_hot": MultiHot,
    "vector": Vector,
    "sequence": Sequence,
    "text": Text,
}


CONFIG_FORMAT = 2
"""Value of `format` in a written config. Optional in a file written by hand. Format 1 has the former keys of `RENAMED`."""

RENAMED: dict[str, str] = {
    "data.source": "data.archive",
    "schema.features.numeric.of": "schema.features.numeric.statistic_column",
    "schema.features.sequence.of": "schema.features.sequence.interactions",
    "schema.features.sequence.share": "schema.features.sequence.share_embedding",
    "schema.features.text.shares": "schema.features.text.share_with",
    "model.pairs.user.decay_scale": "model.pairs.user.weight_decay_scale",
    "model.pairs.item.decay_scale": "model.pairs.item.weight_decay_scale",
    "model.pairs.user.branches.kind = 'plain'": "model.pairs.user.branches.kind = 'identity'",
    "model.pairs.item.branches.kind = 'plain'": "model.pairs.item.branches.kind = 'identity'",
    "negatives.alpha": "negatives.popularity_alpha",
    "negatives.memory": "negatives.cross_batch_memory",
    "negatives.observed": "negatives.disliked",
    "train.shards": "train.data_shards",
    "train.tables": "train.embedding_placement",
    "train.sharding": "train.embedding_sharding",
    "train.embedding_sharding = 'table'": "train.embedding_sharding = 'table_wise'",
    "train.embedding_sharding = 'column'": "train.embedding_sharding = 'column_wise'",
    "train.embedding_sharding = 'row'": "train.embedding_sharding = 'row_wise'",
    "train.histories": "train.history_scope",
    "train.history_scope = 'others'": "train.history_scope = 'leave_batch_out'",
    "train.history_scope = 'earlier'": "train.history_scope = 'causal'",
    "train.decay_rate": "train.lr_decay_rate",
    "train.decay_epochs": "train.lr_decay_epochs",
    "train.average": "train.ema_decay",
    "evaluation.users": "evaluation.max_users",
    "index.recall": "index.min_recall",
}
"""Former key, or `key = 'value'`, to the present one. Keys of lists have no index; a feature's have its kind."""

Positive = Annotated[int, Field(ge=1)]


class DataConfig(Settings):
    """Source of the data: tables, a prepared dataset, or a MovieLens by name."""

    dataset: Literal["", "ml-1m", "ml-100k", "ml-1m-titles", "ml-100k-titles"] = Field(
        "",
        description="Name of a MovieLens, or of queries made from its titles. Brings a [schema] where none is given. "
        "Empty: your own tables.",
    )
    archive: str = Field(
        "", description="Path of the MovieLens zip of `dataset`. Empty: TWOTOWER_DATA, then the network."
    )
    users: str = Field(
        "",
        description="Users: a CSV or Parquet file, a folder of them, or a pattern. Empty: the user ids of the "
        "interactions.",
    )
    items: str = Field(
        "",
        description="Items: a CSV or Parquet file, a folder of them, or a pattern. Empty: the item ids of the "
        "interactions.",
    )
    interactions: str = Field(
        "",
        description="Interactions: a CSV or Parquet file, a folder of them, or a pattern. Paths are relative to the "
        "config file.",
    )
    prepared: str = Field(
        "", description="Folder written by `twotower prepare`, to train on instead of tables. Empty: none."
    )

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.archive and not self.dataset:
            raise ValueError("data.archive needs data.dataset; set it, or name data.interactions instead")
        if self.dataset and (self.users or self.items or self.interactions):
            raise ValueError("give either data.dataset or data.interactions (with users and items), not both")
        if self.prepared and self.dataset:
            raise ValueError("give either data.dataset or data.prepared, not both")
        return self


class SplitConfig(Settings):
    """Split of the interactions into train, validation and test part."""

    kind: Literal["random", "last", "time"] = Field(
        "random",
        description="Rule of the split. random: random rows. last: each user's last row tests and the one before "
        "validates. time: the latest rows.",
    )
    test: float = Field(0.2, gt=0, lt=1, description="Share of all rows in the test part (kinds random and time).")
    validation: float = Field(
        0.1, gt=0, lt=1, description="Share of the remaining rows in the validation part (kinds random and time)."
    )
    seed: int = Field(2022, ge=0, lt=2**32, description="Seed of the random split.")


class SenetConfig(Settings):
    """SENet gate: squeeze each field to one number, excite, multiply (FiBiNET, Huang et al. 2019, section 3.2)."""

    enabled: bool = Field(False, description="SENet gate between the embeddings and the next layer.")
    squeeze: Literal["mean", "sum", "max"] = Field("mean", description="Pooling of a field to one number.")
    reduction: float = Field(
        2.0, ge=1, description="Number of fields divided by the width of the gate's hidden layer, which is at least 1."
    )


class HistoryConfig(Settings):
    """Encoder of sequences with pooling = 'attention' or 'transformer'."""

    block: Literal["plain", "gated"] = Field(
        "gated",
        description="Transformer block. plain: x + f(norm(x)) (SASRec). gated: each change is multiplied by a sigmoid"
        " gate of its input (LiGR).",
    )
    blocks: int = Field(2, ge=1, description="Number of transformer blocks.")
    heads: int = Field(4, ge=1, description="Number of attention heads. Divides the width of the sequence.")
    feed_forward: int = Field(
        2,
        ge=1,
        description="Hidden width of a transformer block's feed-forward layers, as a multiple of the sequence's width.",
    )
    dropout: float = Field(
        0.2, ge=0, lt=1, description="Dropout rate of the output of each sub-layer of a transformer block."
    )
    input_dropout: float = Field(
        0.2, ge=0, lt=1, description="Dropout rate of the item embeddings that attention reads."
    )


Activation = Literal["LeakyReLU", "ReLU", "GELU", "SiLU", "Tanh", "Sigmoid"]


class _Branch(Settings):
    senet: SenetConfig = SenetConfig()


class MlpBranch(_Branch):
    """Hidden layers with activations."""

    kind: Literal["mlp"] = "mlp"
    layers: tuple[Positive, ...] = Field(
        (64,), min_length=1, description="Widths of the hidden layers. Every layer is activated."
    )
    activation: Activation = Field("LeakyReLU", description="Activation function after each layer.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout rate of the hidden units.")
    layer_norm: bool = Field(False, description="Layer normalisation before each activation.")


class CrossBranch(_Branch):
    """Cross layers x <- x0 * (W x + b) + x over the joined fields x0 (DCN-v2, Wang et al. 2021)."""

    kind: Literal["cross"] = "cross"
    depth: int = Field(2, ge=1, description="Number of cross layers.")
    rank: int = Field(0, ge=0, description="Rank of W as a product of two matrices. 0: one full matrix.")


class FmBranch(_Branch):
    """½((Σv)² - Σv²) over the fields: a vector of their width (He and Chua 2017). Fields of one width only."""

    kind: Literal["fm"] = "fm"


class CinBranch(_Branch):
    """Compressed interaction network: feature maps X_k = W_k (products of X_{k-1} with the fields), summed over their
    width (xDeepFM, Lian et al. 2018). Fields of one width only."""

    kind: Literal["cin"] = "cin"
    widths: tuple[Positive, ...] = Field((16, 16), min_length=1, description="Number of feature maps of each layer.")


class BilinearBranch(_Branch):
    """(v_i W) * v_j for each pair of fields (FiBiNET, Huang et al. 2019, section 3.3). Fields of one width only."""

    kind: Literal["bilinear"] = "bilinear"
    matrices: Literal["all", "each", "interaction"] = Field(
        "interaction",
        description="Sharing of W. all: one for all pairs of fields. each: one per left field. interaction: one per "
        "pair.",
    )


class IdentityBranch(_Branch):
    """The joined fields, unchanged."""

    kind: Literal["identity"] = "identity"


Branch = Annotated[
    MlpBranch | CrossBranch | FmBranch | CinBranch | BilinearBranch | IdentityBranch, Field(discriminator="kind")
]
BRANCH_KINDS: dict[str, type[BaseModel]] = {
    "mlp": MlpBranch,
    "cross": CrossBranch,
    "fm": FmBranch,
    "cin": CinBranch,
    "bilinear": BilinearBranch,
    "identity": IdentityBranch,
}


class TowerConfig(Settings):
    """One tower of a pair: fields -> SENet -> branches -> layers -> vector."""

    fields: tuple[str, ...] = Field(
        (), description="Names of the features that the tower reads. Empty: all features of its side."
    )
    width: int = Field(0, ge=0, description="Embedding width of the tower's fields. 0: model.width.")
    join: Literal["concat", "sum"] = Field(
        "concat",
        description="Combination of the fields. concat: side by side. sum: added and activated, as a first layer over"
        " one-hot inputs.",
    )
    senet: SenetConfig = SenetConfig()
    history: HistoryConfig = HistoryConfig()
    branches: tuple[Branch, ...] = Field(
        (), description="Parallel branches between the joined fields and the layers, each with its `kind`. Empty: none."
    )
    augment: bool = Field(
        False, description="Augmented vector per id beside the fields, which loss.mimic trains (DAT)."
    )
    layers: tuple[Positive, ...] = Field(
        (64, 32),
        description="Layer widths. The last one is the width of the vector and has no activation, unless "
        "activate_last is set.",
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
        if self.augment and not self.layers:
            raise ValueError("augment needs layers, and layers is empty; set it to the vector's width, such as [64]")
        if self.residual and not self.layers:
            raise ValueError("residual needs layers, and layers is empty")
        if self.activate_last and not self.layers:
            raise ValueError("activate_last needs layers, and layers is empty")
        return self


class PairConfig(Settings):
    """A user tower and an item tower. The vectors of all pairs are concatenated, so their scores add up."""

    user: TowerConfig = TowerConfig()
    item: TowerConfig = TowerConfig()


class ModelConfig(Settings):
    """The model: pairs of towers and the similarity of their vectors."""

    width: int = Field(16, ge=1, description="Embedding width of a field.")
    pairs: tuple[PairConfig, ...] = Field(
        (PairConfig(),),
        min_length=1,
        description="Pairs of a user tower and an item tower. Their vectors are concatenated, so their scores add up."
        " One pair: the classic DSSM.",
    )
    similarity: Literal["cosine", "dot"] = Field(
        "cosine", description="Similarity of user and item vectors, over all pairs together."
    )
    temperature: float = Field(0.1, gt=0, description="Initial temperature. logit = similarity / temperature.")
    learn_temperature: bool = Field(True, description="Training of the temperature (similarity cosine only).")
    bias: bool = Field(
        True, description="Global bias, and a bias per value of each categorical feature, folded into the vectors."
    )
    unknown_rate: float = Field(
        0.01, ge=0, lt=1, description="Share of categorical values replaced by the unknown value in training. 0: off."
    )
    embedding_std: float = Field(0.05, gt=0, description="Standard deviation of initial embeddings.")

    @property
    def metric(self) -> Literal["cosine", "dot"]:
        """The metric by which an index over the item vectors ranks."""
        return "cosine" if self.similarity == "cosine" and not self.bias else "dot"


class LossConfig(Settings):
    """The loss over logits."""

    kind: Literal["bce", "softmax", "gbce", "bpr"] = Field(
        "bce",
        description="Loss. bce: pointwise, over labelled pairs. softmax, gbce and bpr: contrastive, each positive "
        "against candidates.",
    )
    log_q: bool = Field(
        True,
        description="Correction of each candidate's logit by the log of its sampling rate (softmax; Yi et al. 2019).",
    )
    calibration: float = Field(
        0.75,
        ge=0,
        le=1,
        description="Calibration t of gbce (gSASRec). 0: plain BCE over candidates. 1: fully calibrated.",
    )
    mimic: float = Field(
        0.0,
        ge=0,
        description="Weight of the adaptive-mimic loss: squared distance of augmented vectors to the other tower's. "
        "0: off.",
    )


class NegativesConfig(Settings):
    """Negatives: labelled pairs for the loss 'bce', candidates for contrastive losses."""

    random: int = Field(
        0,
        ge=0,
        le=100_000,
        description="Random unseen items per positive. bce: negative pairs, redrawn every epoch. Other losses: "
        "per-positive candidates without repeats, redrawn every batch. 0: off.",
    )
    random_share: float = Field(
        0.2,
        gt=0,
        lt=1,
        description="Share of random negatives in the total weight of negatives, beside disliked ones (bce).",
    )
    full: bool = Field(
        False, description="All items of the catalogue as candidates. Excludes other sources of candidates."
    )
    in_batch: bool = Field(True, description="Positives of the batch as shared candidates.")
    uniform: int = Field(
        0,
        ge=0,
        le=10_000_000,
        description="Number of items drawn uniformly from the catalogue for each batch, as shared candidates. 0: off.",
    )
    popularity: int = Field(
        0,
        ge=0,
        le=10_000_000,
        description="Number of items drawn by popularity^popularity_alpha for each batch, as shared candidates. 0: "
        "off.",
    )
    popularity_alpha: float = Field(
        0.75, ge=0, le=1, description="Exponent of the popularity draw. 0: uniform. 1: proportional to popularity."
    )
    cross_batch_memory: int = Field(
        0, ge=0, description="Number of positives of earlier batches whose item vectors are shared candidates. 0: off."
    )
    disliked: int = Field(
        0,
        ge=0,
        le=100_000,
        description="Number of items per positive drawn from the user's training interactions that are no positives. "
        "0: off.",
    )
    hard: int = Field(
        0, ge=0, le=16, description="Maximum number of hard negatives per positive. Values above 2 seldom help. 0: off."
    )
    hard_ranks: tuple[Positive, Positive] = Field(
        (101, 500),
        description="First and last rank, from 1, of the catalogue as the current model ranks it, from which hard "
        "negatives are drawn.",
    )
    hard_ratio: float = Field(100.0, gt=0, description="Minimum number of other candidates per hard negative.")
    hard_every: int = Field(
        1, ge=1, description="Epochs between refreshes of the hard negatives. The first epoch has none."
    )
    hard_margin: float = Field(
        0.0, ge=0, description="Drop hard negatives that score within this margin of the positive. 0: off."
    )
    attribute: str = Field(
        "",
        description="Item feature, such as a genre or a city, whose values candidates share with the positive. Empty:"
        " off.",
    )
    attribute_items: int = Field(
        1,
        ge=1,
        le=100_000,
        description="Number of items per positive that share a value of `attribute` with it.",
    )
    mask_positives: bool = Field(
        True, description="Exclusion of a user's other training positives from the candidates."
    )

    @model_validator(mode="after")
    def _check(self) -> NegativesConfig:
        if self.hard_ranks[0] > self.hard_ranks[1]:
            raise ValueError(f"negatives.hard_ranks {list(self.hard_ranks)} ends before it begins")
        if self.full and (drawn := self.drawn()):
            raise ValueError(
                f"negatives.full makes every item a candidate, so negatives.{drawn[0]} adds none; drop one of the two"
            )
        return self

    def drawn(self) -> list[str]:
        """Return the names of the sources of candidates that are on, without `full` and `in_batch`."""
        return [
            s
            for s in ("uniform", "popularity", "cross_batch_memory", "disliked", "hard", "attribute")
            if getattr(self, s)
        ]


class TrainConfig(Settings):
    """Optimisation, checkpoints and devices."""

    epochs: int = Field(10, ge=1, description="Passes over the training interactions.")
    batch_size: int = Field(2048, ge=1, description="Training pairs per step, over all ranks together.")
    data_shards: int = Field(
        1,
        ge=1,
        description="Number of user ranges shuffled separately. Each batch takes an equal part of each range. A "
        "multiple of the number of ranks lets each rank read only its own ranges.",
    )
    embedding_placement: Literal["replicated", "torchrec"] = Field(
        "replicated",
        description="Placement of the embedding tables. replicated: whole on every rank. torchrec: sharded over the "
        "ranks by TorchRec (docs/scale.md).",
    )
    embedding_sharding: Literal["auto", "table_wise", "column_wise", "row_wise"] = Field(
        "auto",
        description="Sharding of tables under embedding_placement = 'torchrec'. auto: column_wise for tables above an"
        " equal share of all parameters, else table_wise.",
    )
    history_scope: Literal["leave_batch_out", "causal"] = Field(
        "leave_batch_out",
        description="Interactions that a training pair's sequences hold. leave_batch_out: all of the user's or "
        "item's, without the pairs of the batch. causal: only earlier ones (equal times: in table order).",
    )
    shuffle: bool = Field(
        True,
        description="New order of the training pairs every epoch (history_scope causal: of the users). false: the "
        "table's order, random negatives last.",
    )
    optimizer: Literal["Adam", "AdamW", "SGD", "Adagrad"] = Field("Adam", description="Optimizer.")
    lr: float = Field(1e-3, gt=0, description="Learning rate.")
    beta2: float = Field(0.999, ge=0, lt=1, description="Adam/AdamW beta2: decay of the second moment.")
    weight_decay: float = Field(0.0, ge=0, description="Weight decay of the layers. 0: off.")
    embedding_weight_decay: float = Field(0.0, ge=0, description="Weight decay of the embeddings. 0: off.")
    bias_weight_decay: float = Field(0.0, ge=0, description="Weight decay of the biases and the temperature. 0: off.")
    schedule: Literal["constant", "cosine", "step"] = Field("constant", description="Schedule of the learning rate.")
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up of the learning rate. 0: off.")
    lr_decay_rate: float = Field(
        0.5, gt=0, le=1, description="Factor of the learning rate at each step of the step schedule."
    )
    lr_decay_epochs: int = Field(1, ge=1, description="Epochs between steps of the step schedule.")
    clip_norm: float = Field(0.0, ge=0, description="Maximum gradient norm. 0: off.")
    ema_decay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Decay of the exponential moving average of the weights, which evaluation uses. 0: off.",
    )
    monitor: str = Field(
        "validation.auc", description="Validation metric that selects the best epoch, such as validation.recall@10."
    )
    patience: int = Field(
        0, ge=0, description="Validations without a better metric after which training stops. 0: off."
    )
    validate_every: int = Field(1, ge=1, description="Epochs between validations.")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="Precision of matrix products in the layers. Weights are fp32."
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="Device. auto: cuda, else mps, else cpu.")
    seed: int = Field(1, ge=0, lt=2**31, description="Seed of initial weights, order, negatives and dropout.")
    timeout: float = Field(600.0, gt=0, description="Seconds after which a rank gives up waiting for another.")
    checkpoint_seconds: float = Field(
        60.0, ge=0, description="Seconds between checkpoints. A checkpoint also follows every epoch."
    )
    checkpoint_steps: int = Field(0, ge=0, description="Steps between checkpoints. 0: only by time.")

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if self.embedding_sharding != "auto" and self.embedding_placement != "torchrec":
            raise ValueError(
                f"embedding_sharding = '{self.embedding_sharding}' goes with embedding_placement = 'torchrec'; set that too, or leave it out"
            )
        return self


class EvaluationConfig(Settings):
    """Metrics and slices of the report."""

    k: tuple[Positive, ...] = Field(
        (10, 50), min_length=1, description="Cut-offs of the ranking metrics. The first is the headline."
    )
    max_users: int = Field(
        0, ge=0, description="Maximum number of users in the ranking metrics, drawn once. 0: all users."
    )
    bootstrap: int = Field(
        200, ge=0, le=1_000_000, description="Bootstrap resamples of the users for 95 % intervals. 0: no intervals."
    )
    head_share: float = Field(0.2, gt=0, lt=1, description="Share of items, the most popular ones, in the head slice.")
    new_user_below: int = Field(
        5, ge=1, description="Number of training interactions below which a user counts as new."
    )
    new_item_below: int = Field(
        5, ge=1, description="Number of training interactions below which an item counts as new."
    )


class IndexConfig(Settings):
    """Index over the item vectors of a published model."""

    kind: Literal["auto", "exact", "flat", "ivf", "hnsw", "ivfpq", "milvus"] = Field(
        "auto", description="Kind of index. auto: by the size of the catalogue, never milvus."
    )
    min_recall: float = Field(
        0.95,
        gt=0,
        le=1,
        description="Minimum recall against exact search, over held-out users, that publishing accepts. Search "
        "parameters are tuned to it.",
    )
    k: int = Field(100, ge=1, description="Cut-off of min_recall.")
    queries: int = Field(
        1000,
        ge=20,
        description="Number of held-out users in the recall check: one half tunes the index, the other half measures "
        "it.",
    )
    uri: str = Field(
        "",
        description="Milvus server, as http://HOST:PORT, or a path ending in .db for milvus-lite (kind milvus). The "
        "token comes from TWOTOWER_MILVUS_TOKEN.",
    )
    prefix: str = Field(
        "twotower",
        pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,199}$",
        description="Alias of the current bundle's collection, and prefix of collection names (kind milvus). Unique "
        "to a store.",
    )
    type: Literal["auto", "FLAT", "IVF_FLAT", "IVF_SQ8", "HNSW"] = Field(
        "auto", description="Milvus index type (kind milvus). auto: by the size of the catalogue."
    )
    timeout: float = Field(
        300.0,
        gt=0,
        description="Seconds that one step of publishing to Milvus may take, with building its index (kind milvus).",
    )

    @model_validator(mode="after")
    def _check(self) -> IndexConfig:
        if self.kind != "milvus":
            for name in ("uri", "prefix", "type", "timeout"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} is an option of kind = 'milvus', not of '{self.kind}'; leave it out")
        elif not self.uri:
            raise ValueError(
                "kind = 'milvus' needs index.uri: http://HOST:PORT, or a path ending in .db for milvus-lite"
            )
        elif self.uri.startswith(("http://", "https://")):
            if "@" in self.uri:
                raise ValueError("uri holds a user or password, which a bundle would carry; set TWOTOWER_MILVUS_TOKEN")
        elif "://" in self.uri or not self.uri.endswith(".db"):
            raise ValueError(f"uri is '{self.uri}', expected http://HOST:PORT, https://…, or a path ending in .db")
        return self


class Config(Settings):
    """All settings without the schema."""

    data: DataConfig = DataConfig()
    split: SplitConfig = SplitConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    negatives: NegativesConfig = NegativesConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    index: IndexConfig = IndexConfig()

    @model_validator(mode="after")
    def _check(self) -> Config:
        n = self.negatives
        others = "set loss.kind = 'softmax', 'gbce' or 'bpr'"
        if self.loss.kind == "bce":
            if asked := [*n.drawn(), *(["full"] if n.full else [])]:
                raise ValueError(f"negatives.{asked[0]} gives candidates, and loss.kind = 'bce' takes pairs; {others}")
            if self.train.history_scope == "causal":
                raise ValueError(f"train.history_scope = 'causal' needs candidates; {others}")
        elif n.random and n.full:
            raise ValueError(
                "negatives.full makes every item a candidate, so negatives.random adds none; drop one of the two"
            )
        if self.loss.kind != "bce" and not (n.full or n.in_batch or n.random or n.uniform or n.popularity):
            raise ValueError(
                f"loss.kind = '{self.loss.kind}' has no candidates; set negatives.in_batch = true, or a number for "
                "negatives.random, negatives.uniform or negatives.popularity, or negatives.full = true"
            )
        if self.loss.mimic and not any(t.augment for p in self.model.pairs for t in (p.user, p.item)):
            raise ValueError(
                "loss.mimic trains augmented vectors, and no tower has them; set augment = true in a tower of model.pairs"
            )
        known = metric_names(self.evaluation.k)
        part, _, metric = self.train.monitor.partition(".")
        if part != "validation" or metric not in known:
            raise ValueError(
                f"train.monitor '{self.train.monitor}' is not measured{did_you_mean(metric, known)} "
                f"(allowed: validation. followed by one of {', '.join(known)})"
            )
        return self


def metric_names(k: Iterable[int]) -> list[str]:
    """Return the names of the metrics of one part, without the part's name."""
    ranked = [f"{m}@{n}" for n in k for m in ("recall", "ndcg", "mrr", "hit_rate", "coverage")]
    return ["auc", "gauc", "log_loss", *ranked]


def parse_config(data: Mapping[str, Any], where: str = "config") -> tuple[Schema | None, Config]:
    """Return (schema or None, config) of a mapping as TOML gives it. Raises ConfigError with one line."""
    rest = dict(data)
    if (form := rest.pop("format", CONFIG_FORMAT)) != CONFIG_FORMAT or type(form) is not int:
        raise ConfigError(
            f"{where}: format {form!r}, this version reads {CONFIG_FORMAT}; begin with the keys of `config_template()`"
        )
    refuse_renamed(rest, where)
    schema = rest.pop("schema", None)
    known = [*Config.model_fields, "schema"]
    for key in rest:
        if key not in known:
            raise ConfigError(
                f"{where}: unknown section '{key}'{did_you_mean(key, known)} (allowed: {', '.join(known)})"
            )
    try:
        config = Config.model_validate(rest)
        return (Schema.model_validate(schema) if schema is not None else None), config
    except ValidationError as e:
        raise ConfigError(f"{where}: {_explain(e)}") from None


def load_config(path: Path, overrides: Iterable[str] = ()) -> tuple[Schema | None, Config]:
    """Read a TOML file and apply `key=value` overrides; data paths become relative to the file's folder."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; `config_template()` gives a template") from None
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path}: not UTF-8 at byte {e.start}; save it as UTF-8") from None
    except tomllib.TOMLDecodeError as e:
        raise ConfigError(f"{path}: not valid TOML: {e}") from None
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror}") from None
    refuse_renamed(data, str(path))
    for text in overrides:
        _override(data, text)
    schema, config = parse_config(data, str(path))
    files.check_name(path)
    folder, located = path.resolve().parent, {}
    for name in ("users", "items", "interactions", "prepared", "archive"):
        if value := getattr(config.data, name):
            files.check_name(folder / value)
            located[name] = str((folder / value).resolve())
    return schema, config.model_copy(update={"data": config.data.model_copy(update=located)})


def override_config(config: Config, overrides: Iterable[str]) -> Config:
    """Return the config with `key=value` overrides applied. Raises ConfigError."""
    data = config.model_dump(mode="json")
    for text in overrides:
        _override(data, text)
    return parse_config(data)[1]


def refuse_renamed(data: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError for the first key or value of `RENAMED` in a mapping as TOML gives it."""
    for shown, name, value in _settings(data):
        key = RENAMED.get(name, name)
        entry = RENAMED.get(f"{key} = {value!r}", "") if isinstance(value, str) else ""
        if not entry and key == name:
            continue
        new = ".".join([*shown.split(".")[:-1], (entry or key).rpartition(".")[2]])
        old = f"{shown} = {value!r}" if entry else shown
        raise ConfigError(f"{where}: {old} is renamed to {new}")


def _settings(node: Any, shown: str = "", name: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yield each key with its path, its name in `RENAMED`, and its value, outermost first."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield f"{shown}{key}", f"{name}{key}", value
            yield from _settings(value, f"{shown}{key}.", f"{name}{key}.")
    elif isinstance(node, list):
        for i, value in enumerate(node):
            kind = value.get("kind") if name == "schema.features." and isinstance(value, Mapping) else None
            yield from _settings(value, f"{shown}{i}.", f"{name}{kind}." if isinstance(kind, str) else name)


def dump_config(schema: Schema, config: Config) -> str:
    """Return the resolved settings as TOML, with their format. `load_config` reads them back."""
    body: dict[str, Any] = {"format": CONFIG_FORMAT} | config.model_dump(mode="json")
    body["schema"] = schema.model_dump(mode="json")
    return tomli_w.dumps(body)


def _override(data: dict[str, Any], text: str) -> None:
    """Set `a.b.0.c=value` in place; the value is read as TOML, else taken as text."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"`overrides` {text}: expected key=value, such as train.epochs=3")
    try:
        parsed = tomllib.loads(f"v = {value}")["v"]
    except tomllib.TOMLDecodeError:
        parsed = value
    *path, last = key.strip().split(".")
    node: Any = data
    for i, step in enumerate(path):
        if isinstance(node, list):
            node = _element(node, step, text)
        elif isinstance(node, dict):
            following = [*path, last][i + 1]
            node = node.setdefault(step, [{}] if following.isdigit() else {})
        else:
            raise ConfigError(f"`overrides` {text}: '{'.'.join(path[:i])}' is a value, not a section")
    if isinstance(node, list):
        _element(node, last, text)
        node[int(last)] = parsed
    elif isinstance(node, dict):
        node[last] = parsed
    else:
        raise ConfigError(f"`overrides` {text}: '{'.'.join(path)}' is a value, not a section")
    refuse_renamed(data, f"`overrides` {text}")


def _element(node: list[Any], step: str, text: str) -> Any:
    if not step.isdigit() or int(step) >= len(node):
        raise ConfigError(f"`overrides` {text}: expected an index 0..{len(node) - 1} where '{step}' stands")
    return node[int(step)]


def _explain(error: ValidationError) -> str:
    """Return one problem in one line: key, value, allowed values. An unknown key comes first, since it causes others."""
    problems = error.errors()
    first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    model: Any = Schema if error.title == "Schema" else Config
    kinds = FEATURE_KINDS if error.title == "Schema" else BRANCH_KINDS
    path = [str(p) for p in first["loc"] if p not in kinds]
    where = ".".join(["schema", *path] if error.title == "Schema" else path)
    if first["type"] == "extra_forbidden":
        allowed = _allowed(model, [str(p) for p in first["loc"][:-1]])
        return f"unknown key '{where}'{did_you_mean(path[-1], allowed)} (allowed: {', '.join(allowed)})"
    if first["type"].startswith("union_tag"):
        kind = first["ctx"].get("tag", "")
        given = f"no kind '{kind}'{did_you_mean(kind, kinds)}" if kind else "missing"
        return f"{where}.kind: {given} (allowed: {', '.join(kinds)})"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{where}: {message}" if where else message
    if first["type"] == "missing":
        return f"'{where}' is missing"
    given = first.get("input")
    shown = f", got {given!r}" if isinstance(given, str | int | float | bool) else ""
    return f"{where}: {message[0].lower()}{message[1:]}{shown}"


def _allowed(model: Any, path: list[str]) -> list[str]:
    """Return the keys of the section at `path` below `model`."""
    for step in path:
        if kind := (FEATURE_KINDS | BRANCH_KINDS).get(step):
            model = kind
        elif isinstance(model, type) and issubclass(model, BaseModel) and step in model.model_fields:
            annotation = model.model_fields[step].annotation
            while get_origin(annotation) is tuple:
                annotation = get_args(annotation)[0]
            model = annotation
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def options() -> Iterator[tuple[str, str, str, str]]:
    """Yield every option as (section, key, default as TOML, meaning), in the order of the template."""
    for name, info in Config.model_fields.items():
        yield from _section_options(name, info.annotation)


def _section_options(name: str, section: Any) -> Iterator[tuple[str, str, str, str]]:
    """Yield the section's own options, then those of its sub-sections, in TOML's order."""
    inner: list[tuple[str, Any]] = []
    for key, info in section.model_fields.items():
        if key == "pairs":
            inner += [(f"model.pairs.{side}", TowerConfig) for side in ("user", "item")]
        elif isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            inner.append((f"{name}.{key}", info.annotation))
        else:
            yield name, key, _toml(info.default), _meaning(info)
    for inner_name, inner_section in inner:
        yield from _section_options(inner_name, inner_section)


def feature_options() -> Iterator[tuple[str, str, str, str]]:
    """Yield every option of a feature, without name, side and kind, as (kind, key, default as TOML, meaning)."""
    for kind, model in FEATURE_KINDS.items():
        for key, info in model.model_fields.items():
            if key not in ("name", "side", "kind"):
                yield kind, key, _toml(info.default), _meaning(info)


def branch_options() -> Iterator[tuple[str, str, str, str]]:
    """Yield every option of a branch, without kind and senet, as (kind, key, default as TOML, meaning)."""
    for kind, model in BRANCH_KINDS.items():
        for key, info in model.model_fields.items():
            if key not in ("kind", "senet"):
                yield kind, key, _toml(info.default), _meaning(info)


def _meaning(info: Any) -> str:
    choices = get_args(info.annotation) if get_origin(info.annotation) is Literal else ()
    allowed = f" [{', '.join(repr(c) for c in choices)}]" if choices else ""
    return f"{info.description or ''}{allowed}"


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(_toml(v) for v in value)}]"
    return tomli_w.dumps({"v": value}, multiline_strings=False).split("=", 1)[1].strip()


def config_template() -> str:
    """Return a complete config file: a schema to adapt, and every option with its default and meaning."""
    lines = [_SCHEMA_TEMPLATE]
    section = ""
    for kind, key, default, meaning in feature_options():
        if kind != section:
            lines.append(f"# options of kind = {_toml(kind)}:")
            section = kind
        lines.append(f"#   {key} = {default}  # {meaning}")
    for name, key, default, meaning in options():
        if name != section:
            if name == "model.pairs.user.senet":
                lines.append(_branch_lines())
            if name == "model.pairs.user":
                lines.append("\n[[model.pairs]]  # repeat the block for parallel pairs")
            lines.append(f"\n[{name}]")
            section = name
        lines.append(f"# {meaning}\n{key} = {default}")
    return "\n".join(lines) + "\n"


def _branch_lines() -> str:
    """Return the options of every kind of branch as comments."""
    lines = ['\n# branches = [{ kind = "mlp" }, { kind = "fm", senet = { enabled = true } }]; by kind:']
    for kind, model in BRANCH_KINDS.items():
        lines.append(f"# {_toml(kind)}: {' '.join((model.__doc__ or '').split())}")
        lines += [f"#   {key} = {default}  # {meaning}" for k, key, default, meaning in branch_options() if k == kind]
    return "\n".join(lines)


_SCHEMA_TEMPLATE = """\
# A twotower config: every option with its default. Delete what you do not change.

[schema]
user_id = "user_id"
item_id = "item_id"
label = ""            # outcome column of the interactions. Empty: every row is a positive.
positive_above = 0.0  # label above which a row is a positive
time = ""             # time column of the interactions (needed for split.kind = "last" or "time")
time_unit = "s"       # 's', 'ms', 'us' since 1970, or 'order'
time_format = ""      # strptime format of times in text, such as '%d/%m/%Y %H:%M'. Empty: detected.
title = ""            # title column of the items, shown to people
duplicates = "last"   # repeated ids and pairs: 'last' keeps the last row, 'error' refuses the table

# kind: categorical, numeric, multi_hot, vector, sequence or text; side: user or item
[[schema.features]]
name = "user_id"
side = "user"
kind = "categorical"

[[schema.features]]
name = "item_id"
side = "item"
kind = "categorical"
"""
