"""Recipe: the sections of a config that decide the weights of a model."""

from __future__ import annotations

from collections.abc import Collection
from itertools import compress
from typing import Annotated, Literal

from pydantic import Field, JsonValue, field_validator, model_validator

from twotower.errors import ConfigError, did_you_mean, listed
from twotower.evaluation.config import EvaluationConfig
from twotower.features.field import InputField
from twotower.kinds import Written
from twotower.model.two_tower import ModelConfig
from twotower.scorers import SCORERS
from twotower.scorers.scorer import AddedScorer, FittedTerm, TermScorer
from twotower.scorers.start import Start
from twotower.section import Section
from twotower.train.losses import LOSSES
from twotower.train.losses.bce import Bce
from twotower.train.losses.loss import ContrastiveLoss, PointwiseLoss
from twotower.train.negatives import SOURCES
from twotower.train.negatives.config import NegativesConfig
from twotower.train.optimizers import OPTIMIZERS
from twotower.train.optimizers.adam import Adam
from twotower.train.optimizers.optimizer import Optimizer


class TrainConfig(Section):
    """Optimisation, checkpoints and devices.

    With several `model.pairs` trained apart, each pair has a loss of its own score, and their sum ranks as an ensemble.
    Histories with equal times follow the order of the table.
    """

    start_here = ("epochs", "lr", "monitor")
    research = (
        "data_shards", "embedding_placement", "embedding_sharding", "shuffle", "bias_weight_decay", "timeout",
        "checkpoint_seconds", "checkpoint_steps",
    )  # fmt: skip

    epochs: int = Field(10, ge=0, description="Passes over the training interactions. 0: scorers alone are the model.")
    batch_size: int = Field(
        0,
        ge=0,
        description="Training pairs per step over all ranks. 0: a power of two from 64 to 2,048 with at least 20 "
        "steps per epoch.",
    )
    data_shards: int = Field(
        1,
        ge=1,
        description="Number of user ranges that are shuffled separately; with a multiple of the number of ranks, each "
        "rank reads its own ranges.",
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
        description="Interactions in a training pair's sequences. leave_batch_out: all but those of the batch. "
        "causal: earlier ones.",
    )
    pairs: Literal["together", "apart"] = Field(
        "together",
        description="Loss of several model.pairs. together: one loss of the summed score. apart: one loss per pair.",
    )
    solved: Annotated[tuple[Annotated[Start, SCORERS], ...], Written] = ()
    """Closed forms of the last of `model.pairs`, which a config has in place of its `scorers`."""
    shuffle: bool = Field(
        True,
        description="New order of the training pairs, or with causal histories of the users, in every epoch. false: "
        "table order.",
    )
    optimizer: Annotated[Optimizer, OPTIMIZERS] = Adam()
    lr: float = Field(1e-3, gt=0, description="Learning rate.")
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
        "",
        description="Validation metric that selects the best epoch. Empty: validation.auc; for contrastive losses, or "
        "without negatives, validation.recall at the first of evaluation.k.",
    )
    patience: int = Field(
        0, ge=0, description="Validations without a better metric after which training stops. 0: off."
    )
    validate_every: int = Field(1, ge=1, description="Epochs between validations.")
    refit: bool = Field(
        False,
        description="Train again on all parts, for the epochs and with the weights that validation has chosen; this "
        "model is published.",
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="Precision of matrix products in training. auto: bf16 for large products if the device has "
        "instructions for it, else fp32.",
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
                f"embedding_sharding = '{self.embedding_sharding}' goes with embedding_placement = 'torchrec'; set "
                "that too, or leave it out"
            )
        return self


class NarrowConfig(Section):
    """Narrow vectors: after the last epoch a linear map of the vectors of all pairs, fitted to their scores.

    `auto` takes the smallest of 64, 128, 256 and 512 that keeps 98 % of train.monitor on the validation part. Biases
    take two of the numbers. Words and contexts want all of them: 0.
    """

    width: int | Literal["auto"] = Field(
        0, description="Numbers of a served vector, with those of biases. 0: all of the pairs. auto: by validation."
    )

    @field_validator("width", mode="before")
    @classmethod
    def _allowed(cls, value: JsonValue) -> JsonValue:
        if value != "auto" and not (type(value) is int and (value == 0 or value > 2)):
            raise ValueError(f"0, a whole number from 3, or 'auto' is allowed, got {value!r:.80}")
        return value


class Recipe(Section):
    """All settings that decide the weights of a model on a dataset, and how they are chosen."""

    start_here = ("loss",)

    model: ModelConfig = ModelConfig()
    loss: Annotated[PointwiseLoss | ContrastiveLoss, LOSSES] = Field(
        Bce(), description="Loss that training minimises: of labelled pairs, or of positives among candidates."
    )
    negatives: NegativesConfig = NegativesConfig()
    train: TrainConfig = TrainConfig()
    scorers: tuple[Annotated[AddedScorer, SCORERS], ...] = Field(
        (),
        description="Terms that the mix adds to the score of the trained towers, each with its `kind`; "
        "without epochs they are the score.",
    )
    narrow: NarrowConfig = NarrowConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        n = self.negatives
        others = f"set loss.kind to one of {', '.join(loss.kind for loss in LOSSES if not loss.pointwise)}"
        if self.loss.pointwise:
            if unused := [s.kind for s in n.sources if s.draws and not s.gives_pairs]:
                raise ValueError(
                    f"negatives.{unused[0]} gives candidates, and loss.kind = '{self.loss.kind}' takes pairs; leave "
                    f"it out, or {others}"
                )
            if self.train.history_scope == "causal":
                raise ValueError(
                    f"train.history_scope = 'causal' needs candidates and times; {others} and schema.time to a "
                    "column, or set train.history_scope = 'leave_batch_out'"
                )
        elif not any(s.certain for s in n.sources):
            raise ValueError(
                f"loss.kind = '{self.loss.kind}' has no candidates; switch on one of the sources "
                f"{', '.join(f'negatives.{s.kind}' for s in SOURCES if s.certain)}"
            )
        if self.train.pairs == "apart":
            self._check_apart()
        self._check_starts()
        if self.loss.mimic and not any(t.augment for p in self.model.pairs for t in (p.user, p.item)):
            raise ValueError(
                "loss.mimic trains augmented vectors, and no tower has them; set augment = true in a tower of "
                "model.pairs"
            )
        known = self.evaluation.metric_set.names(self.evaluation.k)
        part, _, metric = self.train.monitor.partition(".")
        if self.train.monitor and (part != "validation" or metric not in known):
            raise ValueError(
                f"train.monitor '{self.train.monitor}' is not measured{did_you_mean(metric, known)} "
                f"(allowed: validation. followed by one of {', '.join(known)})"
            )
        return self

    @property
    def solved(self) -> dict[int, Start]:
        """Closed forms by the number of their pair, which no step trains."""
        return dict(enumerate(self.train.solved, len(self.model.pairs) - len(self.train.solved)))

    @property
    def trained_pairs(self) -> list[int] | None:
        """Pairs whose vectors a step needs; None: all."""
        return self._pairs_without(self.solved)

    @property
    def first_starts(self) -> dict[int, Start]:
        """Without epochs the first closed form, which others are added to."""
        return {} if self.train.epochs else dict([*self.solved.items()][:1])

    @property
    def last_starts(self) -> dict[int, Start]:
        """Closed forms that are solved, and weighted by the mix, after the last epoch."""
        return self.solved if self.train.epochs else dict([*self.solved.items()][1:])

    @property
    def pairs_of_epochs(self) -> list[int] | None:
        """Pairs whose scores are measured after an epoch: those without `last_starts`; None: all."""
        return self._pairs_without(self.last_starts)

    @property
    def terms(self) -> list[TermScorer]:
        """Scorers without a pair of towers."""
        return [scorer for scorer in self.scorers if isinstance(scorer, TermScorer)]

    def terms_for(self, users: tuple[InputField, ...], items: tuple[InputField, ...]) -> list[FittedTerm]:
        """Return the numbers of the terms of a model of these fields. Raises ConfigError, also for two of one name, and
        for two that a retriever adds to the items of a history."""
        found = [term.term(users, items) for term in self.terms]
        served = [term.name for term in found if type(term).served is not FittedTerm.served]
        if twice := next((n for n in (t.name for t in found) if [t.name for t in found].count(n) > 1), ""):
            raise ConfigError(f"scorers names '{twice}' twice; leave one of them out")
        if len(served) > 1:
            raise ConfigError(
                f"the scorers {listed([repr(name) for name in served])} both add to the items of a history; leave one "
                "of them out"
            )
        return found

    @property
    def is_mixed(self) -> bool:
        """True if the mix adds weighted terms to the scores after the last epoch."""
        return self.model.cold_item_bias or (self.weights_popularity and not self.model.stacking)

    @property
    def adds_popularity(self) -> bool:
        """True if the mix weights popularity where nothing is trained."""
        return self.model.bias and not self.model.stacking and bool(self.train.solved) and not self.train.epochs

    @property
    def weights_popularity(self) -> bool:
        """True if the mix weights popularity, where items have biases; a bias of cold items alone does not."""
        return bool(self.last_starts or self.terms or self.adds_popularity)

    def reads_in_steps(self, side: str, feature: str) -> bool:
        """Return True if a step needs the vectors of a tower that reads a feature. Without epochs there is no step."""
        if not self.train.epochs:
            return False
        pairs = range(len(self.model.pairs)) if self.trained_pairs is None else self.trained_pairs
        towers = [self.model.pairs[pair].user if side == "user" else self.model.pairs[pair].item for pair in pairs]
        return any(not tower.fields or feature in tower.fields for tower in towers)

    @property
    def phases(self) -> list[str]:
        """Names of the phases of a training and its evaluation, in order."""
        names = "closed forms", "epochs", "closed forms after the epochs", "fits to validation", "narrow vectors"
        runs = self.first_starts, self.train.epochs, self.last_starts, self.fitted_last, self.narrow.width
        return ["reading", *compress(names, runs), *["refit"] * self.train.refit, "evaluation"]

    @property
    def fitted_last(self) -> str:
        """Words for what is fitted to validation after the last epoch. Empty: nothing."""
        model, pairs = self.model, [str(pair) for pair in self.last_starts]
        popular = self.adds_popularity and not pairs and not self.terms
        names, fits = (
            ("stacking", "the bias of cold items", "popularity"),
            (model.stacking, model.cold_item_bias, popular),
        )
        found = [*compress(names, fits), *(term.label or f"'{term.kind}'" for term in self.terms)]
        found += [f"pair{'s' * (len(pairs) > 1)} {listed(pairs)}"] if pairs else []
        return listed(found) if found else ""

    def _pairs_without(self, without: Collection[int]) -> list[int] | None:
        return [pair for pair in range(len(self.model.pairs)) if pair not in without] if without else None

    def _check_starts(self) -> None:
        """Raise ValueError if scorers do not go with the tables, or nothing makes a score."""
        train, has_scorers = self.train, bool(self.scorers or self.train.solved)
        if has_scorers and train.embedding_placement == "torchrec":
            raise ValueError(
                "scorers fill whole tables, and train.embedding_placement = 'torchrec' has pieces; set 'replicated', "
                "or leave them out"
            )
        if self.narrow.width:
            self._check_narrow()
        if not (train.epochs or has_scorers):
            raise ValueError(
                "train.epochs = 0 trains no towers; name a scorer, such as scorers = ['ials'], or set train.epochs to "
                "1 or more"
            )

    def _check_narrow(self) -> None:
        """Raise ValueError if there are no vectors that can be made narrow."""
        if not (self.train.epochs or self.train.solved or any(isinstance(s, Start) for s in self.scorers)):
            raise ValueError(
                "narrow.width is that of vectors, and no scorer here has any; add one that does, such as 'ials', set "
                "train.epochs to 1 or more, or set narrow.width = 0"
            )
        if self.train.embedding_placement == "torchrec":
            raise ValueError(
                "narrow.width reads whole tables, and train.embedding_placement = 'torchrec' has pieces; set "
                "'replicated', or narrow.width = 0"
            )

    def _check_apart(self) -> None:
        """Raise ValueError if the model's score is not the sum of the pairs' scores."""
        reason = ""
        if len(self.model.pairs) == 1:
            reason = "model.pairs has one pair; add another"
        elif self.loss.pointwise:
            reason = f"loss.kind = '{self.loss.kind}' gives log-odds, which do not add up; set loss.kind = 'softmax'"
        elif self.model.bias or self.model.similarity != "dot":
            reason = (
                "biases and cosine lengths belong to all pairs; set model.similarity = 'dot' and model.bias = false"
            )
        if reason:
            raise ValueError(
                f"train.pairs = 'apart' trains each pair alone, and {reason}, or set train.pairs = 'together'"
            )
