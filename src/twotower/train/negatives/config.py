"""Section of the negatives."""

from __future__ import annotations

from pydantic import Field, model_validator

from twotower.section import Positive, Section


class NegativesConfig(Section):
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
