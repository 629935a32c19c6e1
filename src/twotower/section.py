"""Base class of the sections of a schema and a config."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from twotower.errors import did_you_mean
from twotower.escaping import representation

T = TypeVar("T")
Tier: TypeAlias = Literal["start here", "tune", "research"]

MAX_WHOLE_NUMBER = 2**32 - 1
"""Largest whole number allowed in a schema or a config."""
_WORDS = {"valid tuple": "list", "Tuple": "List", " after validation": ""}
"""Words of pydantic, and the words of a config."""


def _check_whole_numbers(value: T) -> T:
    """Return the value unchanged. Raises ValueError if it, or an element, is a whole number above MAX_WHOLE_NUMBER."""
    for number in value if isinstance(value, tuple) else (value,):
        if type(number) is int and number > MAX_WHOLE_NUMBER:
            raise ValueError(f"at most {MAX_WHOLE_NUMBER:,} is allowed, got {number:,}")
    return value


class Section(BaseModel):
    """A section of a schema or a config: frozen, without unknown keys, whole numbers up to MAX_WHOLE_NUMBER."""

    start_here: ClassVar[tuple[str, ...]] = ()
    """Options to set first. Options that neither this nor `research` names are to tune."""
    research: ClassVar[tuple[str, ...]] = ()
    """Options whose defaults are right for nearly everybody."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())
    _bound = field_validator("*")(_check_whole_numbers)

    def __repr__(self) -> str:
        """Return the options that differ from their defaults, on one line."""
        options = ((key, getattr(self, key), field) for key, field in type(self).model_fields.items())
        changed = (
            f"{key}={value!r}" for key, value, field in options if value != field.get_default(call_default_factory=True)
        )
        return representation(type(self), ", ".join(changed))

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, data: Any) -> Any:
        for key in data if isinstance(data, dict) and cls.model_config["extra"] == "forbid" else ():
            if key not in (known := list(cls.model_fields)):
                raise unknown_key(str(key), known, cls._shown())
        return data

    @classmethod
    def _shown(cls) -> str:
        """Return the name of the section in a message."""
        return cls.__name__

    @classmethod
    def tier(cls, key: str) -> Tier:
        """Return the tier of an option in the reference."""
        for base in cls.__mro__:
            if key in base.__dict__.get("start_here", ()):
                return "start here"
            if key in base.__dict__.get("research", ()):
                return "research"
        return "tune"


Positive = Annotated[int, Field(ge=1)]


def unknown_key(key: str, known: Collection[str], where: str) -> PydanticCustomError:
    """Return the error of a key of the section `where` that is not one of the `known`."""
    hint, allowed = did_you_mean(key, known), ", ".join(known) or f"none; {where} has no options"
    message = "unknown key '{key}'{hint} (allowed: {allowed})"
    return PydanticCustomError("unknown_key", message, {"key": key, "hint": hint, "allowed": allowed})


def first_problem(error: ValidationError) -> str:
    """Return one problem in one line: key, value, allowed values. An unknown key, which causes others, comes first."""
    problems = error.errors(include_url=False)
    first = next((p for p in problems if p["type"] == "unknown_key"), problems[0])
    where = ".".join([*(["schema"] if error.title == "Schema" else []), *map(str, first["loc"])])
    if first["type"] == "unknown_key":
        key, hint, allowed = (first["ctx"][name] for name in ("key", "hint", "allowed"))
        return f"unknown key '{where}{'.' * bool(where)}{key}'{hint} (allowed: {allowed})"
    message = (first["msg"].removeprefix("Value error, ").splitlines() or [""])[0]
    if first["type"] in ("value_error", "kind", "kind_type", "untrusted_kind"):
        return f"{where}: {message}" if where else message
    if first["type"] == "missing":
        return f"'{where}' is missing"
    for theirs, ours in _WORDS.items():
        message = message.replace(theirs, ours)
    given = first.get("input")
    shown = f", got {given!r:.80}" if isinstance(given, str | int | float | bool) else ""
    return f"{where}{': ' * bool(where)}{message[:1].lower()}{message[1:]}{shown}"
