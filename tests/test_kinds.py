"""Kinds: found by name or import path, with their own options alone; outside code runs only where it is trusted."""

from __future__ import annotations

import importlib
import re
import sys
from abc import abstractmethod
from pathlib import Path
from types import ModuleType
from typing import Annotated

import pytest
from pydantic import Field, ValidationError

from twotower.errors import ConfigError
from twotower.kinds import Kind, Kinds, import_modules, outside_operators
from twotower.section import Section

ROOT = Path(__file__).resolve().parents[1]


class Shape(Kind):
    """A protocol."""

    scale: float = 1.0


class Circle(Shape):
    """A kind."""

    kind = "circle"


class Box(Shape):
    """A kind with options of its own."""

    kind = "box"
    sides: tuple[Annotated[int, Field(ge=1)], ...] = (1, 2)


class Star(Shape):
    """A kind that is not registered."""

    points: int = 5
    operators = {"Mod": {"fmod"}}


class Sketch(Shape):
    """A kind that lacks a method."""

    @abstractmethod
    def area(self) -> float:
        """Return the area."""


SHAPES = Kinds("shape", Shape, Circle, Box, default=Circle)


class Drawing(Section):
    """A section with kinds."""

    ground: Annotated[Shape, SHAPES] = Circle()
    shapes: tuple[Annotated[Shape, SHAPES], ...] = ()


MODULE = """
from test_kinds import Shape

class Ring(Shape):
    hole: float = 0.5

class Other:
    pass
"""


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that is installed and not loaded."""
    name = "kinds_of_elsewhere"
    (tmp_path / f"{name}.py").write_text(MODULE.replace("test_kinds", __name__), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, __name__, sys.modules[Shape.__module__])
    monkeypatch.delitem(sys.modules, name, raising=False)
    return name


def problem(value: object, trust: bool = False) -> str:
    with pytest.raises(ValidationError) as caught:
        Drawing.model_validate({"ground": value}, context={"trust": trust})
    error = caught.value.errors()[0]
    return f"{'.'.join(map(str, error['loc']))}: {error['msg']}"


def test_a_field_takes_an_instance_a_name_and_a_section() -> None:
    drawing = Drawing.model_validate({"shapes": ["box", {"kind": "box", "sides": [3]}, Star(points=6), {"scale": 2}]})
    assert drawing.shapes == (Box(), Box(sides=(3,)), Star(points=6), Circle(scale=2))


def test_a_registry_refuses_two_kinds_of_one_name() -> None:
    class Square(Box):
        kind = "box"

    with pytest.raises(ValueError, match="Box and .*Square are both a shape of kind 'box'; give one another name"):
        Kinds("shape", Shape, Circle, Box, Square)


def test_a_dump_names_the_kind_and_is_read_back() -> None:
    drawing = Drawing(ground=Box(scale=3), shapes=(Circle(), Star(points=7)))
    dumped = drawing.model_dump(mode="json")
    assert dumped["ground"] == {"kind": "box", "scale": 3.0, "sides": [1, 2]}
    assert dumped["shapes"][1] == {"kind": f"{__name__}:Star", "scale": 1.0, "points": 7}
    assert Drawing.model_validate(dumped | {"shapes": dumped["shapes"][:1]}).ground == drawing.ground
    assert Drawing.model_validate_json(Drawing(ground=Box()).model_dump_json()) == Drawing(ground=Box())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("circel", "ground.kind: no shape of kind 'circel'; did you mean 'circle'? (allowed: circle, box)"),
        ({"kind": "circle", "sides": [1]}, "ground: unknown key 'sides' (allowed: scale)"),
        ({"kind": "box", "sides": [0]}, "ground.sides.0: Input should be greater than or equal to 1"),
        ({"kind": 3}, "ground.kind: missing (allowed: circle, box)"),
        (3, "ground: expected a kind of shape or a section, got 3"),
        ("os:system", f"ground.kind: 'os:system' is no shape; make it a subclass of {__name__}.Shape"),
        (f"{__name__}:Sketch", f"ground.kind: '{__name__}:Sketch' is no complete shape; give it area"),
        ("pathlib:Nothing", "ground.kind: cannot find 'pathlib:Nothing': pathlib has no class Nothing"),
    ],
)
def test_a_wrong_kind_is_refused_with_what_is_allowed(value: object, message: str) -> None:
    assert problem(value).startswith(message)


def test_a_kind_of_elsewhere_is_imported_only_if_it_is_trusted(elsewhere: str) -> None:
    value = {"kind": f"{elsewhere}:Ring", "hole": 0.2}
    assert "code outside twotower" in problem(value)
    assert elsewhere not in sys.modules
    found = Drawing.model_validate({"ground": value}, context={"trust": True})
    assert found.model_dump()["ground"] == {"kind": f"{elsewhere}:Ring", "scale": 1.0, "hole": 0.2}
    assert Drawing.model_validate({"ground": value}) == found, "a loaded module needs no trust"
    assert "is no shape" in problem({"kind": f"{elsewhere}:Other"})
    assert "cannot import" in problem({"kind": "no_such_module_anywhere:Ring"}, trust=True)


def test_modules_are_imported_by_name(elsewhere: str) -> None:
    import_modules([elsewhere])
    value = {"kind": f"{elsewhere}:Ring"}
    assert Drawing.model_validate({"ground": value}).model_dump()["ground"]["kind"] == value["kind"]
    for wrong in ("no_such_module_anywhere", "no_such_package.losses", ".losses", ""):
        with pytest.raises(ConfigError, match=f"`kinds='{wrong}'`.*; name an installed module"):
            import_modules([wrong])


def test_a_kind_that_is_imported_from_where_it_is_not_defined_is_written_as_where_it_is(
    elsewhere: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[Shape.__module__], "Ring", Star, raising=False)
    found = Drawing.model_validate({"ground": {"kind": f"{__name__}:Ring", "points": 3}})
    assert found.model_dump()["ground"] == {"kind": f"{__name__}:Star", "scale": 1.0, "points": 3}


def test_a_name_in_data_runs_no_code_of_a_loaded_module(elsewhere: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package may make an attribute, and import for it, when it is asked for one."""
    made = ModuleType("makes_attributes")
    asked: list[str] = []
    monkeypatch.setattr(made, "__getattr__", asked.append, raising=False)
    monkeypatch.setitem(sys.modules, "makes_attributes", made)
    assert "cannot find 'makes_attributes:part.Ring'" in problem("makes_attributes:part.Ring")
    assert not asked
    for name in (f".{elsewhere}:Ring", f"{elsewhere}:", ":Ring", f"{elsewhere}:Ring()", "a b:C"):
        assert f"no shape of kind '{name}'" in problem(name, trust=True)


def test_a_kind_of_elsewhere_is_named_by_its_path_alone() -> None:
    class Named(Circle):
        kind = "circle"

    class New(Circle):
        kind = "ring"

    for mine in (Named(), New()):
        assert f"names itself '{mine.kind}', by which no config finds it; leave kind out" in problem(mine)


def test_a_protocol_and_what_is_of_no_family_are_no_kinds() -> None:
    families = Kinds("shape", Shape, Circle, Box, families=(Circle, Box))
    for name in ("Shape", "Star"):
        with pytest.raises(
            ConfigError, match=f"'{__name__}:{name}' is no shape; make it a subclass of .*Circle or .*Box"
        ):
            families.find(f"{__name__}:{name}")
    with pytest.raises(ConfigError, match="is no shape"):
        SHAPES.find(f"{__name__}:Shape")


def test_the_operators_of_kinds_of_elsewhere_are_collected() -> None:
    assert outside_operators(Shape) == {"Mod": {"fmod"}}


REGISTRIES = [
    (path, found[1])
    for path in sorted((ROOT / "src" / "twotower").rglob("*.py"))
    for found in re.finditer(r"^([A-Z]+)(?:: .*)? = Kinds\(", path.read_text(encoding="utf-8"), re.MULTILINE)
]
"""The modules of the registries, and the names of these there."""


@pytest.mark.parametrize(("path", "name"), REGISTRIES, ids=[name for _, name in REGISTRIES])
def test_a_registry_exports_its_protocol_and_kinds_and_each_kind_says_when_to_use_it(path: Path, name: str) -> None:
    where = ".".join(path.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__")
    module = importlib.import_module(where)
    kinds: Kinds[Kind] = getattr(module, name)
    assert {name, kinds.protocol.__name__, *(kind.__name__ for kind in kinds)} <= set(module.__all__)
    for kind in kinds:
        text = kind.__doc__ or ""
        assert re.search(r"(?:^|\.\s+|\n\n *)Use it\b", text), kind
        assert max(map(len, text.splitlines())) <= 132, kind


def test_all_registries_are_found() -> None:
    assert len({name for _, name in REGISTRIES}) == 11
