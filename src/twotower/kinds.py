"""Kinds: the variants of a protocol, each with the options of its own, and the explicit list that registers them.

A kind is one class in one file. A config names it by its registered name or, if it is defined outside twotower, by its
import path, `kind = "mypackage.losses:Focal"`; in Python an instance is passed. Outside code is imported only with
`trust`. A run has the digests of the files of outside kinds, so that a change after the training is noticed.
"""

from __future__ import annotations

import hashlib
import logging
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from importlib import import_module
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Generic, LiteralString, TypeVar

from pydantic import (
    GetCoreSchemaHandler,
    JsonValue,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    model_serializer,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from twotower.errors import ConfigError, did_you_mean, first_line, missing_package
from twotower.section import Section

log = logging.getLogger(__name__)

Operators = Mapping[str, Collection[str]]
"""Operators of the default ONNX domain, each with the attributes that are written."""

CODE = "code"
"""Key of the digests of code in `model.json`."""
CODE_OF = "code of "
"""Prefix of a module in the fingerprint of a training."""
SCRIPTS = ("__main__", "__mp_main__")
"""Names of the module of a running script."""
_digests = dict[str, tuple[ModuleSpec | None, str]]()
"""Digest of each module's file, with the specification that loaded the module."""
_IMPORT_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


class Kind(Section):
    """Section whose class is one of several kinds, each with its own options."""

    kind: ClassVar[str]
    """Name in a config. Default: the import path, `module:Class`."""
    always: ClassVar[bool] = False
    """True for a registered kind that is always on, in a field with the mark `Added`."""
    operators: ClassVar[Operators] = {}
    """ONNX operators that the kind writes into a tower, for the allow-list of towers."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "kind" not in cls.__dict__:
            cls.kind = f"{cls.__module__}:{cls.__qualname__}"

    @classmethod
    def _shown(cls) -> str:
        return f"'{cls.kind}'"

    @model_serializer(mode="wrap")
    def _with_kind(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        options: dict[str, Any] = handler(self)
        return {"kind": self.kind} | options

    @model_validator(mode="before")
    @classmethod
    def _without_kind(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or "kind" not in data:
            return data
        if data["kind"] != cls.kind:
            raise ValueError(f"kind is {data['kind']!r}, expected {cls.kind!r}")
        return {key: value for key, value in data.items() if key != "kind"}


class UntrustedKind(ConfigError):
    """A kind from outside twotower whose module is neither imported nor trusted."""

    def __init__(self, name: str) -> None:
        self.name, module = name, name.partition(":")[0]
        given = f"kind '{name}' is code outside twotower, and {module} is not imported; import it, or pass "
        self.in_data = f"{given}`kinds={module!r}`"
        """Message for a name in a file for which no code is imported."""
        super().__init__(f"{given}`trust=True`")

    def __reduce__(self) -> tuple[type[UntrustedKind], tuple[str]]:
        return type(self), (self.name,)


K = TypeVar("K", bound=Kind)


class Kinds(Generic[K]):
    """The kinds of one protocol, and the pydantic annotation of a field that holds one of them.

    LOSSES = Kinds("loss", Loss, Bce, Softmax)
    class Recipe(Section):
        loss: Annotated[Loss, LOSSES] = Bce()

    Such a field takes an instance, the name of a kind without options, or a mapping of `kind` and options."""

    def __init__(
        self, noun: str, protocol: type[K], *kinds: type[K], default: type[K] | None = None,
        families: tuple[type[K], ...] = (),
    ) -> None:  # fmt: skip
        """Register `kinds` of the `protocol`, each of one of the `families` (default: the protocol).

        `noun` names them in messages. `default` is the kind of a mapping without `kind`. Raises ValueError if two kinds
        have one name."""
        self.noun, self.protocol, self.default, self.families = noun, protocol, default, families or (protocol,)
        self._by_name: dict[str, type[K]] = {}
        for kind in kinds:
            if (same := self._by_name.setdefault(kind.kind, kind)) is not kind:
                names = f"{same.__qualname__} and {kind.__qualname__}"
                raise ValueError(f"{names} are both a {noun} of kind '{kind.kind}'; give one another name")

    def __iter__(self) -> Iterator[type[K]]:
        return iter(self._by_name.values())

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._by_name)

    def find(self, name: str, trust: bool = False) -> type[K]:
        """Return the kind of a registered name or an import path. Raises ConfigError.

        `trust` imports the module of a path; without it the module must be loaded already."""
        if name in self._by_name:
            return self._by_name[name]
        if not _IMPORT_PATH.fullmatch(name):
            hint = did_you_mean(name, self.names)
            raise ConfigError(f"no {self.noun} of kind '{name}'{hint} (allowed: {', '.join(self.names)})")
        module = name.partition(":")[0]
        if module not in sys.modules and not trust:
            raise UntrustedKind(name)
        return self._checked(name, load_object(name) if trust else _loaded_object(name))

    def _checked(self, name: str, found: object) -> type[K]:
        if (
            not isinstance(found, type)
            or not issubclass(found, self.families)
            or found in (self.protocol, *self.families)
        ):
            bases = " or ".join(f"{base.__module__}.{base.__qualname__}" for base in self.families)
            raise ConfigError(f"'{name}' is no {self.noun}; make it a subclass of {bases}")
        if self._by_name.get(found.kind) is not found and ":" not in found.kind:
            what = f"'{name}' names itself '{found.kind}', by which no config finds it"
            raise ConfigError(f"{what}; leave kind out of its class")
        if missing := sorted(found.__abstractmethods__):
            raise ConfigError(f"'{name}' is no complete {self.noun}; give it {', '.join(missing)}")
        return found

    def parse(self, value: object, trust: bool = False) -> K:
        """Return the kind of a value: an instance, a name, or a mapping of `kind` and options.

        Raises ValidationError."""
        if isinstance(value, self.protocol):
            try:
                self._checked(f"{type(value).__module__}:{type(value).__qualname__}", type(value))
            except ConfigError as e:
                raise self._error("kind", str(e), value) from None
            return value
        if isinstance(value, str):
            value = {"kind": value}
        if not isinstance(value, Mapping):
            raise self._error("kind_type", f"expected a kind of {self.noun} or a section, got {value!r:.60}", value)
        name = value.get("kind", "" if self.default is None else self.default.kind)
        if not isinstance(name, str) or not name:
            raise self._error("kind", f"missing (allowed: {', '.join(self.names)})", value, "kind")
        try:
            found = self.find(name, trust)
        except UntrustedKind as e:
            raise self._error("untrusted_kind", str(e), value, "kind", name=e.name) from None
        except ConfigError as e:
            raise self._error("kind", str(e), value, "kind") from None
        return found.model_validate({**value, "kind": found.kind}, context={"trust": trust})

    def _error(self, type_: LiteralString, message: str, value: object, *where: str, name: str = "") -> ValidationError:
        problem = PydanticCustomError(type_, "{message}", {"message": message, "name": name})
        return ValidationError.from_exception_data(self.noun, [{"type": problem, "loc": where, "input": value}])

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        def validate(value: object, info: ValidationInfo) -> K:
            return self.parse(value, trusts(info))

        def serialize(value: K, info: core_schema.SerializationInfo) -> dict[str, JsonValue]:
            return value.model_dump(mode=info.mode, exclude_defaults=info.exclude_defaults)

        return core_schema.with_info_plain_validator_function(
            validate, serialization=core_schema.plain_serializer_function_ser_schema(serialize, info_arg=True)
        )


class ByName:
    """Mark of a field of several kinds: a config has each as a subsection of its name, in the section of the field."""


class Written:
    """Mark of a field that the package writes into a config, and no user."""


class Added:
    """Mark of a field of kinds in addition to the registered kinds that are always on, which it does not name."""


def trusts(info: ValidationInfo) -> bool:
    """Return True if a validation may import outside code: its context is {"trust": True}."""
    return bool((info.context or {}).get("trust"))


def untrusted_kind(error: ValidationError) -> UntrustedKind | None:
    """Return the first outside kind that a validation did not trust; None if it failed for another reason."""
    names = [problem["ctx"]["name"] for problem in error.errors() if problem["type"] == "untrusted_kind"]
    return UntrustedKind(names[0]) if names else None


def import_modules(modules: Iterable[str]) -> None:
    """Import modules with kinds from outside twotower, so that files may name the kinds. Raises ConfigError."""
    for name in modules:
        try:
            import_module(name)
        except Exception as e:
            if isinstance(e, ModuleNotFoundError) and (missing := missing_package(e, f"`kinds={name!r}`")):
                raise missing from None
            what = str(e) if isinstance(e, ImportError) else f"{type(e).__name__}: {first_line(e)}"
            raise ConfigError(f"`kinds={name!r}`: {what}; name an installed module, such as mypackage.losses") from None


def foreign_modules(*sections: Section) -> tuple[str, ...]:
    """Return the imported modules that sections name in import paths, so that another process imports them too."""
    names = {name for s in sections for name in re.findall(r'"([^\W\d][\w.]*):[^\W\d][\w.]*"', s.model_dump_json())}
    return tuple(sorted(names & sys.modules.keys()))


def load_object(path: str) -> object:
    """Return the object of an import path `module:name`. Raises ConfigError if there is none."""
    module, _, name = path.partition(":")
    try:
        found = import_module(module)
        for step in name.split("."):
            found = getattr(found, step)
    except Exception as e:
        what = str(e) if isinstance(e, ImportError | AttributeError) else f"{type(e).__name__}: {first_line(e)}"
        raise ConfigError(f"cannot import '{path}': {what}; expected module:Class of an installed package") from None
    return found


def _loaded_object(path: str) -> object:
    """Return the object of an import path in a loaded module without running code, such as a module's `__getattr__`.

    Raises ConfigError if there is none."""
    module, _, name = path.partition(":")
    found = sys.modules[module]
    for step in name.split("."):
        names = vars(found) if isinstance(found, type | ModuleType) else {}
        if step not in names:
            raise ConfigError(f"cannot find '{path}': {module} has no class {name}")
        found = names[step]
    return found


def outside_operators(kinds: type[Kind] = Kind) -> dict[str, set[str]]:
    """Return the ONNX operators of all loaded outside kinds, each with its attributes."""
    found: dict[str, set[str]] = {}
    for kind in kinds.__subclasses__():
        own = {} if kind.__module__.partition(".")[0] == "twotower" else kind.operators
        for declared in (own, outside_operators(kind)):
            for operator, attributes in declared.items():
                found.setdefault(operator, set()).update(attributes)
    return found


def code_digests(*sections: JsonValue) -> dict[str, JsonValue]:
    """Return the SHA-256 of the file of each module whose kinds the sections name by import path.

    An interactive session and a running script have no digest."""
    modules = sorted({name.partition(":")[0] for section in sections for name in _kinds(section) if ":" in name})
    return {module: digest for module in modules if (digest := _code_digest(module))}


def warn_of_changes(trained: JsonValue, place: Path) -> None:
    """Log a warning for each loaded module with another digest than in `trained`, of the training in `place`."""
    if not isinstance(trained, Mapping):
        return
    for module, digest in trained.items():
        if (now := _code_digest(module)) and now != digest:
            log.warning(
                f"{place}: {sys.modules[module].__file__} has changed since the training, whose weights are of the "
                f"kinds of {module} as they were; train again, or restore the file"
            )


def _kinds(value: JsonValue) -> Iterator[str]:
    """Yield the names of all kinds in a section, and its keys, which name sources of negatives."""
    if isinstance(value, Mapping):
        yield from value
        if isinstance(kind := value.get("kind"), str):
            yield kind
        value = [*value.values()]
    for one in value if isinstance(value, list | tuple) else ():
        yield from _kinds(one)


def _code_digest(name: str) -> str:
    """Return the SHA-256 of a loaded module's file at the first call for it; empty for other modules and scripts."""
    module = sys.modules.get(name)
    if module is None or name in SCRIPTS:
        return ""
    known = _digests.get(name)
    if known is None or known[0] is not module.__spec__:  # a reload makes another one
        file = getattr(module, "__file__", None)
        try:
            digest = hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""
        except OSError:
            digest = ""
        known = _digests[name] = (module.__spec__, digest)
    return known[1]
