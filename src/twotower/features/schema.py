"""Schema of the tables: id, label and time columns, and features. Every feature belongs to one side, user or item."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, Field, JsonValue, model_validator

from twotower.features.pooling_spec import MEAN, PoolingSpec
from twotower.features.side import ROW_IDS, SideName, other_side
from twotower.section import Section


class _Feature(Section):
    start_here = ("name", "side")

    name: str = Field(min_length=1, description="Name, unique within its side.")
    side: SideName = Field(description="Tower that reads the feature.")
    column: str = Field("", description="Column of the side's table. Empty: the feature's name.")
    width: int = Field(0, ge=0, description="Embedding width. 0: that of the tower.")
    missing: Literal["impute", "error"] = Field(
        "impute",
        description="Treatment of nulls. impute: unknown value, training mean, missing-value bucket, empty list or "
        "zeros. error: refuse the table.",
    )

    is_history: ClassVar[bool] = False
    """True for codes of interactions, in the order of time."""

    @property
    def source(self) -> str:
        """The column the values are read from."""
        return self.column or self.name

    @property
    def pools(self) -> PoolingSpec | None:
        """Pooling of the codes, if a row has many."""
        return None


class Categorical(_Feature):
    """One value of a vocabulary, or one of a fixed number of hash buckets.

    Row 0 of the embedding is the *unknown* row: values below the frequency cut and values never seen in
    training. It is trained, because a share of the known values is replaced by it (`model.unknown_rate`).
    """

    kind: Literal["categorical"] = "categorical"
    min_count: int = Field(1, ge=1, description="Minimum number of training interactions of a value in the vocabulary.")
    min_rate: float = Field(
        0.0, ge=0, lt=1, description="Minimum share of training interactions of a value in the vocabulary. 0: off."
    )
    hash_buckets: int = Field(0, ge=0, lt=2**31, description="Number of hash buckets. 0: a vocabulary.")


class Numeric(_Feature):
    """A number, standardised or cut into quantile buckets; or a statistic of the training interactions.

    `statistic = "count"` counts the row's training interactions (as log(1 + n)), `"mean"` averages the
    column named by `statistic_column`. Both see the train part only.
    """

    kind: Literal["numeric"] = "numeric"
    buckets: int = Field(
        0, ge=0, le=1_000_000, description="Number of quantile buckets, each with an embedding. 0: standardise."
    )
    statistic: Literal["", "count", "mean"] = Field(
        "",
        description="Statistic of the row's training interactions that replaces a column. count: log(1 + n). mean: of"
        " statistic_column. Empty: none.",
    )
    statistic_column: str = Field(
        "", description="Column of the interactions that statistic = 'mean' averages. Empty: the label."
    )

    @model_validator(mode="after")
    def _check(self) -> Numeric:
        if self.buckets == 1:
            raise ValueError("buckets must be 0 (standardise) or at least 2")
        if self.statistic_column and self.statistic != "mean":
            raise ValueError("'statistic_column' only goes with statistic = 'mean'")
        if self.statistic and self.column:
            raise ValueError(
                "'column' does not go with a statistic; 'statistic_column' names the column that is averaged"
            )
        return self

    @property
    def source(self) -> str:
        """The column the values are read from. A statistic has a column of its own."""
        return f"__{self.statistic}:{self.name}" if self.statistic else super().source


class MultiHot(_Feature):
    """Values of one vocabulary, averaged: a list column, or text split at `separator`."""

    kind: Literal["multi_hot"] = "multi_hot"
    separator: str = Field("", description="Separator of a text column, such as '|'. Empty: a list column.")
    min_count: int = Field(1, ge=1, description="Minimum number of training interactions of a value in the vocabulary.")
    min_rate: float = Field(
        0.0, ge=0, lt=1, description="Minimum share of training interactions of a value in the vocabulary. 0: off."
    )


class Vector(_Feature):
    """A precomputed vector, such as an embedding of a text or an image, projected to the field's width."""

    kind: Literal["vector"] = "vector"
    length: int = Field(0, ge=0, description="Length of the vectors. 0: that of the data.")


class Sequence(_Feature):
    """The row's own training interactions: for a user the items, for an item the users.

    In training a history never contains its target: see `train.history_scope`.
    """

    kind: Literal["sequence"] = "sequence"
    interactions: Literal["all", "positive", "negative"] = Field(
        "all", description="Interactions in the sequence, by label."
    )
    max_length: int = Field(0, ge=0, description="Maximum length, from the latest interaction. 0: unlimited.")
    pooling: PoolingSpec = Field(MEAN, description="Pooling of the embeddings, by name or section.")
    share_embedding: bool = Field(
        True, description="Sharing of the other side's id embedding. false: a table of its own."
    )

    is_history: ClassVar[bool] = True

    @property
    def pools(self) -> PoolingSpec:
        """Pooling of the interactions."""
        return self.pooling


class Text(_Feature):
    """Words as letter n-grams: a bag of the grams of a text, each as often as it occurs (the word hashing of Huang et
    al. 2013, "Learning Deep Structured Semantic Models for Web Search using Clickthrough Data", section 3.2).

    The text is normalised (NFKC, lower case) and split into words, runs of letters and digits of any script; `good`
    gives `#go`, `goo`, `ood` and `od#`. An ideograph is a gram of its own. Row 0 is the *unknown* row, of the grams
    that have none of their own. It is trained on grams that `min_count` and `max_grams` leave out.
    """

    kind: Literal["text"] = "text"
    n: int = Field(3, ge=2, le=8, description="Letters of a gram, with the word boundaries '#'.")
    max_grams: int = Field(
        30_000, ge=1, description="Maximum size of the vocabulary: the most frequent grams of training."
    )
    min_count: int = Field(1, ge=1, description="Minimum number of occurrences of a gram in training interactions.")
    hash_buckets: int = Field(0, ge=0, lt=2**31, description="Number of hash buckets. 0: a vocabulary.")
    pooling: PoolingSpec = Field(
        PoolingSpec(kind="sum"), description="Pooling of the grams' embeddings, of a kind that ignores their order."
    )
    max_length: int = Field(
        1_000, ge=0, lt=2**31, description="Maximum number of grams of a text, from its beginning. 0: unlimited."
    )
    share_with: str = Field(
        "",
        description="Text feature of the other side whose grams and embeddings this one uses. Both columns make the "
        "vocabulary. Empty: none.",
    )

    @model_validator(mode="after")
    def _check(self) -> Text:
        own = ("n", "max_grams", "min_count", "hash_buckets")
        if self.share_with and (set_ := [k for k in own if getattr(self, k) != type(self).model_fields[k].default]):
            raise ValueError(f"'{set_[0]}' is that of '{self.share_with}', whose grams it shares; set it there")
        return self

    @property
    def pools(self) -> PoolingSpec:
        """Pooling of the grams."""
        return self.pooling


Feature = Annotated[Categorical | Numeric | MultiHot | Vector | Sequence | Text, Field(discriminator="kind")]


class Schema(Section):
    """Columns of the three tables, and features. Ids are external values; rows 0..n-1 are internal."""

    start_here = ("label", "time", "features")

    user_id: str = Field("user_id", description="Id column of users and interactions.")
    item_id: str = Field("item_id", description="Id column of items and interactions.")
    label: str = Field("", description="Outcome column of the interactions. Empty: every row is a positive.")
    positive_above: float = Field(0.0, description="Label above which a row is a positive.")
    time: str = Field(
        "", description="Time column of the interactions: datetimes, numbers in time_unit, or text. Empty: none."
    )
    time_unit: Literal["s", "ms", "us", "order"] = Field(
        "s",
        description="Unit of numeric times since 1970, which lie between 1990 and tomorrow. order: any number or date"
        " that grows with time.",
    )
    time_format: str = Field(
        "",
        description="strptime format of times in text or whole numbers, such as '%d/%m/%Y %H:%M:%S.%f' or '%Y%m%d'. "
        "Empty: numbers, or dates such as 2023-01-31 12:30:15.250 and 31/01/2023 12:30.",
    )
    title: str = Field("", description="Title column of the items, shown to people. Empty: the id.")
    duplicates: Literal["last", "error"] = Field(
        "last",
        description="Treatment of repeated ids and repeated (user, item) pairs. last: keep the last row, by time "
        "where there is one. error: refuse the table.",
    )
    features: tuple[Feature, ...] = Field(min_length=2, description="Features that the towers read.")

    @model_validator(mode="after")
    def _check(self) -> Schema:
        self._check_names()
        for side in ("user", "item"):
            names = [f.name for f in self.features if f.side == side]
            if not names:
                raise ValueError(f"no feature on the {side} side; give each tower at least one")
            twice = sorted({n for n in names if names.count(n) > 1})
            if twice:
                raise ValueError(f"feature {twice[0]!r} is defined twice on the {side} side")
        if self.time_format and not self.time:
            raise ValueError("time_format needs time; name the time column")
        if self.time_format and ("%" not in self.time_format or "%f" in self.time_format.replace(".%f", "")):
            raise ValueError(
                f"time_format is {self.time_format!r}, expected a format such as '%d/%m/%Y %H:%M:%S.%f'; .%f is a fraction"
            )
        for f in self.features:
            if isinstance(f, Sequence) and (f.column or f.missing == "error"):
                raise ValueError(
                    f"sequence {f.name!r} is made of interactions; it takes neither 'column' nor 'missing'"
                )
            if isinstance(f, Sequence) and f.share_embedding and self.id_feature(other_side(f.side)) is None:
                raise ValueError(
                    f"sequence {f.name!r} shares the {other_side(f.side)} id embedding, but no categorical feature "
                    f"reads the {other_side(f.side)} id column; add one or set share_embedding = false"
                )
            if isinstance(f, Text) and f.share_with and self.text(other_side(f.side), f.share_with) is None:
                own = [t.name for t in self.texts(other_side(f.side)) if not t.share_with]
                raise ValueError(
                    f"text {f.name!r} shares the grams of {f.share_with!r}, which is no text feature of the "
                    f"{other_side(f.side)} side with grams of its own (allowed: {', '.join(own) or 'none'})"
                )
        return self

    def _check_names(self) -> None:
        """Raise ValueError for a column name that no table can have, or that has two meanings."""
        for key in ("user_id", "item_id"):
            if not getattr(self, key):
                raise ValueError(f"{key} is empty; name the id column")
            for other in ("item_id", "label", "time"):
                if key != other and getattr(self, key) == getattr(self, other):
                    raise ValueError(
                        f"{key} and {other} are both '{getattr(self, key)}'; give each a column of its own"
                    )
        for where, name in self._names():
            if name == "*" or (name.startswith("^") and name.endswith("$")):
                raise ValueError(f"{where} is '{name}', which tables are searched for as a pattern; rename the column")
            if name.startswith("__") and name not in ROW_IDS.values():
                raise ValueError(
                    f"{where} is '{name}'; names that begin with '__' are the package's own: rename the column"
                )

    def _names(self) -> list[tuple[str, str]]:
        """Return (option, column) for each column that the schema names."""
        named = [(key, getattr(self, key)) for key in ("user_id", "item_id", "label", "time", "title")]
        for f in self.features:
            made = isinstance(f, Sequence) or (isinstance(f, Numeric) and f.statistic)
            named += [] if made else [(f"{'column' if f.column else 'name'} of feature {f.name!r}", f.source)]
            named += [(f"statistic_column of feature {f.name!r}", f.statistic_column)] if isinstance(f, Numeric) else []
        return named

    def of_data(self) -> dict[str, JsonValue]:
        """Return the options that the data depend on: all but poolings and widths."""
        return self.model_dump(mode="json", exclude={"features": {"__all__": {"pooling", "width"}}})

    def side(self, side: SideName) -> tuple[Feature, ...]:
        """Return the features of one side, in the order given."""
        return tuple(f for f in self.features if f.side == side)

    def texts(self, side: SideName) -> tuple[Text, ...]:
        """Return the text features of one side, in the order given."""
        return tuple(f for f in self.side(side) if isinstance(f, Text))

    def text(self, side: SideName, name: str) -> Text | None:
        """Return the text feature `name` if it has grams of its own, else None."""
        return next((f for f in self.texts(side) if f.name == name and not f.share_with), None)

    def id_column(self, side: SideName) -> str:
        return self.user_id if side == "user" else self.item_id

    def id_feature(self, side: SideName) -> Categorical | None:
        """Return the categorical feature with a vocabulary that reads the side's id column, else None."""
        for f in self.features:
            if isinstance(f, Categorical) and f.side == side and f.source == self.id_column(side):
                return None if f.hash_buckets else f
        return None


FEATURE_KINDS: dict[str, type[BaseModel]] = {
    "categorical": Categorical,
    "numeric": Numeric,
    "multi_hot": MultiHot,
    "vector": Vector,
    "sequence": Sequence,
    "text": Text,
}
