"""Section `negatives` of a config."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, TypeAlias

from pydantic import (
    Field,
    JsonValue,
    ModelWrapValidatorHandler,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from twotower.kinds import ByName
from twotower.section import Section, unknown_key
from twotower.train.negatives import SOURCES
from twotower.train.negatives.in_batch import InBatchNegatives
from twotower.train.negatives.source import BARE_VALUE, NegativeSource, PairSource, PerPositiveSource, SharedSource

SourceOptions: TypeAlias = "NegativeSource | Mapping[str, JsonValue] | JsonValue"
"""Value of a source: its options, its `shorthand` option, or True for its defaults; False, 0 and "" disable it."""
Value: TypeAlias = "SourceOptions | tuple[SourceOptions, ...]"
_BY_NAME = TypeAdapter(dict[str, Annotated[NegativeSource, SOURCES]])


class NegativesConfig(Section):
    """Negatives: labelled pairs for pointwise losses, candidates for contrastive losses.

    A key is the name of a source or its import path; several sources add up. Its value holds the options of the source,
    or one of them: `negatives.uniform = 512`, `negatives.hard = { n = 2, ranks = [101, 500] }`, `negatives.in_batch =
    false`. In Python `sources` takes instances, in place of the in-batch source. With features of the context
    `mask_positives` excludes positives in the same context: every feature is equal, raw numbers included, so buckets
    make contexts fewer.
    """

    start_here = ("random",)

    sources: Annotated[tuple[Annotated[NegativeSource, SOURCES], ...], ByName] = (InBatchNegatives(),)
    mask_positives: bool = Field(
        True,
        description="Exclusion of a user's other training positives, with features of the context those in the same "
        "context, from the candidates.",
    )

    if TYPE_CHECKING:

        def __init__(
            self, *, sources: tuple[NegativeSource, ...] = ..., mask_positives: bool = ..., **named: SourceOptions
        ) -> None: ...

    @model_validator(mode="before")
    @classmethod
    def _read_names(
        cls, data: Mapping[str, Value] | NegativesConfig, info: ValidationInfo
    ) -> Mapping[str, Value] | NegativesConfig:
        """Turn the keys that name sources into `sources`."""
        if not isinstance(data, Mapping):
            return data
        listed = data.get("sources", ())
        listed = listed if isinstance(listed, tuple | list) else (listed,)
        named = {key: value for key, value in data.items() if key not in cls.model_fields}
        known = (*SOURCES.names, "mask_positives")
        in_python = all(isinstance(source, NegativeSource) for source in listed)
        for name in (*named, *(() if in_python else ("sources",))):
            if name not in SOURCES and ":" not in str(name):
                raise unknown_key(str(name), known, cls.__name__)
        if "sources" not in data:
            named = {source.kind: source for source in cls.model_fields["sources"].default} | named
        on = {name: _with_kind(name, value) for name, value in named.items() if value not in (False, "")}
        found = _BY_NAME.validate_python(on, context=info.context)
        sources = (*listed, *found.values())
        return {key: value for key, value in data.items() if key not in named} | {"sources": sources}

    @model_validator(mode="wrap")
    @classmethod
    def _keep_names(
        cls, data: Mapping[str, Value] | NegativesConfig, handler: ModelWrapValidatorHandler[NegativesConfig]
    ) -> NegativesConfig:
        """Add the names of the sources that are set, on or off, to `model_fields_set`."""
        made = handler(data)
        if isinstance(data, Mapping):
            made.model_fields_set.update(str(name) for name in data)
        return made

    @field_validator("sources")
    @classmethod
    def _in_order(cls, sources: tuple[NegativeSource, ...]) -> tuple[NegativeSource, ...]:
        """Sort the sources by the order of the registry, then sources of elsewhere by name."""
        if repeated := [kind for kind, n in Counter(s.kind for s in sources).items() if n > 1]:
            raise ValueError(f"negatives.{repeated[0]} is set twice; drop one of the two")
        order = SOURCES.names
        return tuple(sorted(sources, key=lambda s: (order.index(s.kind) if s.kind in order else len(order), s.kind)))

    @model_validator(mode="after")
    def _check(self) -> NegativesConfig:
        exclusive = [s for s in self.sources if s.exclusive]
        if exclusive and (others := [s for s in self.sources if s.draws and s != exclusive[0]]):
            raise ValueError(
                f"negatives.{exclusive[0].kind} makes every item a candidate, so negatives.{others[0].kind} adds none; "
                "drop one of the two"
            )
        shares = {f"negatives.{s.kind}.share": s.share for s in self.pairs}
        if sum(shares.values()) >= 1:
            raise ValueError(f"{' and '.join(shares)} add up to {sum(shares.values()):g}; lower them to less than 1")
        return self

    @model_serializer(mode="wrap")
    def _by_name(self, handler: SerializerFunctionWrapHandler) -> dict[str, JsonValue]:
        whole = handler(self)
        dumped: dict[str, JsonValue] = {key: value for key, value in whole.items() if key != "sources"}
        if "sources" not in whole:  # left out as defaults
            return dumped
        on: dict[str, JsonValue] = dict.fromkeys(SOURCES.names, False)
        on |= {str(source.pop("kind")): source or True for source in whole["sources"]}
        return {**on, **dumped}

    @property
    def active(self) -> tuple[NegativeSource, ...]:
        """Sources that have an effect with a contrastive loss."""
        exclusive = tuple(s for s in self.sources if s.exclusive)
        return exclusive or self.sources

    @property
    def remembered(self) -> int:
        return max((s.remembered for s in self.sources), default=0)

    @property
    def shared(self) -> tuple[SharedSource, ...]:
        return tuple(s for s in self.active if isinstance(s, SharedSource))

    @property
    def per_positive(self) -> tuple[PerPositiveSource, ...]:
        return tuple(s for s in self.active if isinstance(s, PerPositiveSource))

    @property
    def pairs(self) -> tuple[PairSource, ...]:
        """Sources of negative pairs."""
        return tuple(s for s in self.active if isinstance(s, PairSource))


def _with_kind(name: str, value: Value) -> NegativeSource | dict[str, Value]:
    if isinstance(value, NegativeSource | Mapping):
        kind = value.kind if isinstance(value, NegativeSource) else value.get("kind", name)
        if kind != name:
            raise ValueError(f"negatives.{name} is a source of kind {kind!r}; name it by its kind")
    if isinstance(value, NegativeSource):
        return value
    options = value if isinstance(value, Mapping) else {} if value is True else {BARE_VALUE: value}
    return {**options, "kind": name}
