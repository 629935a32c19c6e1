"""Every setting with its default, meaning and range: TOML in and out, overrides, the commented template.

Data only. An unknown key is an error that names the nearest valid one.
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
from twotower.schema import Categorical, MultiHot, Numeric, Schema, Sequence, Settings, Text, Vector

FEATURE_KINDS: dict[str, type[BaseModel]] = {
    "categorical": Categorical,
    "numeric": Numeric,
    "multi_hot": MultiHot,
    "vector": Vector,
    "sequence": Sequence,
    "text": Text,
}


CONFIG_FORMAT = 2
"""Number that a written config carries as `format`, and a config written by hand may. Format 1 has the former keys of `RENAMED`."""

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
    """Where the tables are: three files, or a MovieLens by name."""

    dataset: Literal["", "ml-1m", "ml-100k", "ml-1m-titles", "ml-100k-titles"] = Field(
        "",
        description="a MovieLens, or queries made of its films' titles; brings its own [schema] if none is given",
    )
    archive: str = Field("", description="local archive of that MovieLens; TWOTOWER_DATA or the network if empty")
    users: str = Field(
        "", description="CSV or Parquet of users: a file, a folder or a pattern; empty: the ids of the interactions"
    )
    items: str = Field("", description="as users, of items")
    interactions: str = Field("", description="as users, of interactions; paths are relative to the config file")
    prepared: str = Field(
        "", description="a folder that `twotower prepare` made of such tables, to train on instead of them"
    )

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.archive and not self.dataset:
            raise ValueError("data.archive is that of data.dataset; set data.dataset, or name data.interactions")
        if self.dataset and (self.users or self.items or self.interactions):
            raise ValueError("give either data.dataset or data.interactions (with users and items), not both")
        if self.prepared and self.dataset:
            raise ValueError("give either data.dataset or data.prepared, not both")
        return self


class SplitConfig(Settings):
    """Which interactions train, validate and test."""

    kind: Literal["random", "last", "time"] = Field(
        "random", description="random rows, each user's last two, or the latest rows"
    )
    test: float = Field(0.2, gt=0, lt=1, description="share of the rows that test (random, time)")
    validation: float = Field(0.1, gt=0, lt=1, description="share of the other rows that validate (random, time)")
    seed: int = Field(2022, ge=0, lt=2**32, description="of the random split")


class SenetConfig(Settings):
    """A gate per field: squeeze each field to one number, excite, multiply (FiBiNET, Huang et al. 2019, 3.2)."""

    enabled: bool = Field(False, description="put the gate between the embeddings and the layers")
    squeeze: Literal["mean", "sum", "max"] = Field("mean", description="how a field becomes one number")
    reduction: float = Field(2.0, ge=1, description="fields / reduction is the width of the middle layer, at least 1")


class HistoryConfig(Settings):
    """How sequences with pooling = 'attention' or 'transformer' are read."""

    block: Literal["plain", "gated"] = Field(
        "gated", description="transformer: SASRec's block, or one whose changes pass a sigmoid gate of its input (LiGR)"
    )
    blocks: int = Field(2, ge=1, description="transformer: blocks one after another")
    heads: int = Field(4, ge=1, description="of attention; a head's width is the sequence's divided by them")
    feed_forward: int = Field(2, ge=1, description="transformer: hidden width of a block's layers, in widths")
    dropout: float = Field(0.2, ge=0, lt=1, description="transformer: share dropped of what a block changes")
    input_dropout: float = Field(0.2, ge=0, lt=1, description="share dropped of the embeddings that are read")


Activation = Literal["LeakyReLU", "ReLU", "GELU", "SiLU", "Tanh", "Sigmoid"]


class _Branch(Settings):
    senet: SenetConfig = SenetConfig()


class MlpBranch(_Branch):
    """Hidden layers, each with its activation."""

    kind: Literal["mlp"] = "mlp"
    layers: tuple[Positive, ...] = Field((64,), min_length=1, description="layer widths, all activated")
    activation: Activation = Field("LeakyReLU", description="after each layer")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of hidden units dropped in training")
    layer_norm: bool = Field(False, description="normalise each layer before its activation")


class CrossBranch(_Branch):
    """x <- x0 * (W x + b) + x, the fields first: products of one degree more a layer (DCN-v2, Wang et al. 2021)."""

    kind: Literal["cross"] = "cross"
    depth: int = Field(2, ge=1, description="layers")
    rank: int = Field(0, ge=0, description="W is the product of two matrices of this rank; 0 is one full matrix")


class FmBranch(_Branch):
    """½((Σv)² - Σv²) over the fields, a vector of their width (He and Chua 2017). Fields of one width only."""

    kind: Literal["fm"] = "fm"


class CinBranch(_Branch):
    """Maps X_k = W_k (products of X_{k-1} with the fields), summed over their width (xDeepFM, Lian et al. 2018).
    Fields of one width only."""

    kind: Literal["cin"] = "cin"
    widths: tuple[Positive, ...] = Field((16, 16), min_length=1, description="maps of each layer")


class BilinearBranch(_Branch):
    """(v_i W) * v_j for each two fields (FiBiNET, Huang et al. 2019, section 3.3). Fields of one width only."""

    kind: Literal["bilinear"] = "bilinear"
    matrices: Literal["all", "each", "interaction"] = Field(
        "interaction", description="one W for all, one for each left field, or one for each two fields"
    )


class IdentityBranch(_Branch):
    """The joined fields as they are."""

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
    """One side of one pair: fields -> SENet -> branches -> layers -> vector."""

    fields: tuple[str, ...] = Field((), description="names of the features it reads; empty: all of its side")
    width: int = Field(0, ge=0, description="embedding width of its fields; 0 takes model.width")
    join: Literal["concat", "sum"] = Field(
        "concat",
        description="fields side by side, or added up and activated (a first layer over one-hot inputs)",
    )
    senet: SenetConfig = SenetConfig()
    history: HistoryConfig = HistoryConfig()
    branches: tuple[Branch, ...] = Field(
        (), description="parallel parts between the joined fields and the layers, by kind; empty: none between"
    )
    augment: bool = Field(
        False, description="join a vector per id that loss.mimic trains to be like the other side's vectors"
    )
    layers: tuple[Positive, ...] = Field(
        (64, 32), description="layer widths; the last is the vector's, without activation unless activate_last"
    )
    activation: Activation = Field("LeakyReLU", description="between the layers")
    activate_last: bool = Field(False, description="activation after the last layer too, as in the 2013 DSSM")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of hidden units dropped in training")
    field_dropout: float = Field(0.0, ge=0, lt=1, description="share of joined inputs dropped in training")
    weight_decay_scale: float = Field(
        1.0, ge=0, description="multiplies train.embedding_weight_decay for its embeddings"
    )
    layer_norm: bool = Field(False, description="normalise each hidden layer before its activation")
    field_norm: bool = Field(False, description="normalise each field before they are joined")
    residual: bool = Field(False, description="add a linear map of the joined fields to the last layer")
    output_norm: bool = Field(False, description="normalise the vector, with a learned scale and shift per number")

    @model_validator(mode="after")
    def _check(self) -> TowerConfig:
        if self.senet.enabled and self.join == "sum":
            raise ValueError("senet needs join = 'concat'")
        if self.join == "sum" and (self.branches or self.augment):
            raise ValueError(f"{'branches' if self.branches else 'augment'} needs join = 'concat'")
        if self.augment and not self.layers:
            raise ValueError("augment goes through the layers, and layers is empty; name the vector's width there")
        if self.residual and not self.layers:
            raise ValueError("residual is added to the last layer, and layers is empty")
        if self.activate_last and not self.layers:
            raise ValueError("activate_last is about the last layer, and layers is empty")
        return self


class PairConfig(Settings):
    """A pair of towers whose vectors are compared; the pairs' vectors stand side by side, so their scores add up."""

    user: TowerConfig = TowerConfig()
    item: TowerConfig = TowerConfig()


class ModelConfig(Settings):
    """What is trained."""

    width: int = Field(16, ge=1, description="embedding width of a field")
    pairs: tuple[PairConfig, ...] = Field(
        (PairConfig(),), min_length=1, description="pairs of towers side by side; one is the classic DSSM"
    )
    similarity: Literal["cosine", "dot"] = Field(
        "cosine", description="of the user and item vectors (of all pairs together)"
    )
    temperature: float = Field(0.1, gt=0, description="logit = similarity / temperature")
    learn_temperature: bool = Field(True, description="train the temperature (cosine only)")
    bias: bool = Field(
        True, description="a global bias and one per value of each categorical feature, folded into the vectors"
    )
    unknown_rate: float = Field(0.01, ge=0, lt=1, description="share of categorical values trained as unknown")
    embedding_std: float = Field(0.05, gt=0, description="standard deviation of fresh embeddings")

    @property
    def metric(self) -> Literal["cosine", "dot"]:
        """What an index over the item vectors must rank by."""
        return "cosine" if self.similarity == "cosine" and not self.bias else "dot"


class LossConfig(Settings):
    """How logits become a loss."""

    kind: Literal["bce", "softmax", "gbce", "bpr"] = Field(
        "bce",
        description="bce: labelled pairs, liked or not; the others set each positive against a row of candidates",
    )
    log_q: bool = Field(
        True, description="softmax: correct each candidate's logit by the log of how often it is expected to be drawn"
    )
    calibration: float = Field(
        0.75, ge=0, le=1, description="gbce: t of gSASRec; 0 is plain BCE over candidates, 1 is calibrated in full"
    )
    mimic: float = Field(
        0.0, ge=0, description="weight of the squared distance of augmented vectors to the other side's; 0 is off"
    )


class NegativesConfig(Settings):
    """What stands against the positives: pairs for the loss 'bce', candidates for the others."""

    random: int = Field(
        0,
        ge=0,
        le=100_000,
        description="random items for each positive, its own, never one the user has met in training; bce: drawn anew "
        "every epoch, as pairs; the others: drawn anew in every batch, no item twice, as candidates",
    )
    random_share: float = Field(
        0.2,
        gt=0,
        lt=1,
        description="bce: share of the negatives' weight that the random ones carry beside observed ones",
    )
    full: bool = Field(False, description="candidates: the whole catalogue; no other source of candidates is needed")
    in_batch: bool = Field(True, description="candidates: the batch's own positives")
    uniform: int = Field(
        0, ge=0, le=10_000_000, description="candidates: so many items a batch, each as likely as any other"
    )
    popularity: int = Field(
        0, ge=0, le=10_000_000, description="candidates: so many items a batch, drawn by popularity^alpha"
    )
    popularity_alpha: float = Field(0.75, ge=0, le=1, description="exponent of the popularity draw")
    cross_batch_memory: int = Field(
        0, ge=0, description="candidates: the item vectors of so many positives of earlier batches"
    )
    disliked: int = Field(
        0, ge=0, le=100_000, description="candidates: so many items a positive that its user met and did not like"
    )
    hard: int = Field(0, ge=0, le=16, description="candidates: up to so many mined items a positive; 2 is plenty")
    hard_ranks: tuple[Positive, Positive] = Field(
        (101, 500), description="mined from these ranks (from 1, both included) of the present model's catalogue"
    )
    hard_ratio: float = Field(100.0, gt=0, description="at least so many other candidates for each mined one")
    hard_every: int = Field(1, ge=1, description="epochs between two minings; the first epoch has none")
    hard_margin: float = Field(
        0.0, ge=0, description="a mined item must score so much below the positive, else it is left out; 0 is no guard"
    )
    attribute: str = Field("", description="item feature, such as a genre or a city; empty draws none")
    attribute_items: int = Field(
        1,
        ge=1,
        le=100_000,
        description="candidates: so many items a positive that share a value of `attribute` with it",
    )
    mask_positives: bool = Field(True, description="a user's other positives are no candidates")

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
        """Names of the sources of candidates that are asked for, beside `full` and `in_batch`."""
        return [
            s
            for s in ("uniform", "popularity", "cross_batch_memory", "disliked", "hard", "attribute")
            if getattr(self, s)
        ]


class TrainConfig(Settings):
    """How it is trained."""

    epochs: int = Field(10, ge=1, description="passes over the training interactions")
    batch_size: int = Field(2048, ge=1, description="pairs a step, those of all ranks together")
    data_shards: int = Field(
        1,
        ge=1,
        description="ranges of users that are shuffled each by itself, and of which a batch takes equal parts; with a "
        "multiple of the number of ranks, each rank reads its own only",
    )
    embedding_placement: Literal["replicated", "torchrec"] = Field(
        "replicated",
        description="where embeddings lie: every rank has all of them, or each a part, by TorchRec (docs/scale.md)",
    )
    embedding_sharding: Literal["auto", "table_wise", "column_wise", "row_wise"] = Field(
        "auto",
        description="of embedding_placement = 'torchrec': each table whole on one rank, its columns or its rows on all; auto cuts the "
        "columns of tables larger than an equal share of all",
    )
    history_scope: Literal["leave_batch_out", "causal"] = Field(
        "leave_batch_out",
        description="what a training pair sees of the sequences: the row's other interactions, or only earlier ones "
        "(equal times: those above it in the table)",
    )
    shuffle: bool = Field(
        True,
        description="a new order of the pairs (with history_scope = 'causal': of the users) every epoch; false keeps the "
        "table's, random negatives last",
    )
    optimizer: Literal["Adam", "AdamW", "SGD", "Adagrad"] = Field("Adam", description="update rule")
    lr: float = Field(1e-3, gt=0, description="learning rate")
    beta2: float = Field(
        0.999, ge=0, lt=1, description="Adam, AdamW: memory of the squared gradients; 0.98 follows faster"
    )
    weight_decay: float = Field(0.0, ge=0, description="of the layers")
    embedding_weight_decay: float = Field(0.0, ge=0, description="of the embeddings")
    bias_weight_decay: float = Field(0.0, ge=0, description="of the biases and the temperature")
    schedule: Literal["constant", "cosine", "step"] = Field("constant", description="of the learning rate")
    warmup_steps: int = Field(0, ge=0, description="steps over which the learning rate rises from zero")
    lr_decay_rate: float = Field(0.5, gt=0, le=1, description="factor of the step schedule")
    lr_decay_epochs: int = Field(1, ge=1, description="epochs between two factors of the step schedule")
    clip_norm: float = Field(0.0, ge=0, description="largest gradient norm; 0 does not clip")
    ema_decay: float = Field(
        0.0, ge=0, lt=1, description="exponential average of the weights, used to evaluate; 0 is off"
    )
    monitor: str = Field(
        "validation.auc", description="metric that chooses the best epoch, such as validation.recall@10"
    )
    patience: int = Field(0, ge=0, description="stop after so many validations without a better one; 0 never stops")
    validate_every: int = Field(1, ge=1, description="epochs between validations")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of the layers' products; weights stay fp32")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="auto: cuda, then mps, then cpu")
    seed: int = Field(1, ge=0, lt=2**31, description="of weights, order, negatives and dropout")
    timeout: float = Field(600.0, gt=0, description="seconds after which a rank that waits for another gives up")
    checkpoint_seconds: float = Field(60.0, ge=0, description="time between checkpoints; one also follows every epoch")
    checkpoint_steps: int = Field(0, ge=0, description="steps between checkpoints; 0 leaves it to the clock")

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if self.embedding_sharding != "auto" and self.embedding_placement != "torchrec":
            raise ValueError(
                f"embedding_sharding = '{self.embedding_sharding}' goes with embedding_placement = 'torchrec'; set that too, or leave it out"
            )
        return self


class EvaluationConfig(Settings):
    """What is reported."""

    k: tuple[Positive, ...] = Field(
        (10, 50), min_length=1, description="cut-offs of the ranking metrics; the first is headline"
    )
    max_users: int = Field(
        0, ge=0, description="ranking metrics of so many users at most, drawn once; 0 asks all, which is what to report"
    )
    bootstrap: int = Field(
        200, ge=0, le=1_000_000, description="resamples of the users for the 95 % intervals; 0 gives none"
    )
    head_share: float = Field(0.2, gt=0, lt=1, description="most popular share of the items that is the head")
    new_user_below: int = Field(5, ge=1, description="a user with fewer training interactions is new")
    new_item_below: int = Field(5, ge=1, description="an item with fewer training interactions is new")


class IndexConfig(Settings):
    """How a published model is searched."""

    kind: Literal["auto", "exact", "flat", "ivf", "hnsw", "ivfpq", "milvus"] = Field(
        "auto", description="auto chooses by the size of the catalogue, never milvus, and says why"
    )
    min_recall: float = Field(
        0.95, gt=0, le=1, description="least recall against exact search, by held-out users, to publish; tuned to it"
    )
    k: int = Field(100, ge=1, description="cut-off of that recall")
    queries: int = Field(1000, ge=20, description="users that are asked for it: one half tunes, the other half judges")
    uri: str = Field(
        "",
        description="of kind milvus: http://HOST:PORT of a server, or a path ending in .db, which milvus-lite opens; "
        "a token is read from TWOTOWER_MILVUS_TOKEN",
    )
    prefix: str = Field(
        "twotower",
        pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,199}$",
        description="of kind milvus: the alias of the current bundle's collection, and how names of collections begin; "
        "a store has its own",
    )
    type: Literal["auto", "FLAT", "IVF_FLAT", "IVF_SQ8", "HNSW"] = Field(
        "auto", description="of kind milvus: its index type; auto chooses by the size of the catalogue and says why"
    )
    timeout: float = Field(
        300.0,
        gt=0,
        description="of kind milvus: seconds that one step of publishing may take there, building the index too",
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
    """All settings but the schema."""

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
    """The metrics of one part, without the part's name."""
    ranked = [f"{m}@{n}" for n in k for m in ("recall", "ndcg", "mrr", "hit_rate", "coverage")]
    return ["auc", "gauc", "log_loss", *ranked]


def parse_config(data: Mapping[str, Any], where: str = "config") -> tuple[Schema | None, Config]:
    """A mapping as TOML gives it -> (schema or None, config). Raises ConfigError with one line."""
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
    """A config with `key=value` overrides applied. Raises ConfigError."""
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
    """The resolved settings as TOML, with their format; `load_config` gives the same back."""
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
    """One problem in one line: where, what was given, what is allowed; an unknown key first, as it is a cause."""
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
    """Names of the fields of the section at `path` below `model`."""
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
    """Every option as (section, key, default as TOML, meaning), in the order of the template."""
    for name, info in Config.model_fields.items():
        yield from _section_options(name, info.annotation)


def _section_options(name: str, section: Any) -> Iterator[tuple[str, str, str, str]]:
    """The section's own options, then those of the sections inside it, as TOML wants them."""
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
    """Every option of a feature but its name, side and kind, as (kind, key, default as TOML, meaning)."""
    for kind, model in FEATURE_KINDS.items():
        for key, info in model.model_fields.items():
            if key not in ("name", "side", "kind"):
                yield kind, key, _toml(info.default), _meaning(info)


def branch_options() -> Iterator[tuple[str, str, str, str]]:
    """Every option of a branch but its kind, as (kind, key, default as TOML, meaning); the gate's are those of a
    tower's."""
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
    """A complete config file: a schema to adapt, and every option with its default and meaning."""
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
    """What a branch may hold, as comments."""
    lines = ['\n# branches = [{ kind = "mlp" }, { kind = "fm", senet = { enabled = true } }]; by kind:']
    for kind, model in BRANCH_KINDS.items():
        lines.append(f"# {_toml(kind)}: {' '.join((model.__doc__ or '').split())}")
        lines += [f"#   {key} = {default}  # {meaning}" for k, key, default, meaning in branch_options() if k == kind]
    return "\n".join(lines)


_SCHEMA_TEMPLATE = """\
# A twotower config. Every option is here with its default; delete what you do not change.

[schema]
user_id = "user_id"
item_id = "item_id"
label = ""            # outcome column of the interactions; empty: every row is a positive
positive_above = 0.0  # a row is a positive when its label is greater than this
time = ""             # time column of the interactions (needed for split.kind = "last" or "time")
time_unit = "s"       # 's', 'ms', 'us' since 1970, or 'order'
time_format = ""      # of a time that is text: '%d/%m/%Y %H:%M'; empty: ISO 8601, or as all rows agree
title = ""            # column of the items to show to people
duplicates = "last"   # repeated ids and pairs: keep the 'last', or 'error'

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
