"""The package as a house: light to import, imports in one direction, one word per thing; tests stand where modules
do."""

from __future__ import annotations

import ast
import gc
import inspect
import pickle
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

import twotower
from twotower.errors import MissingPackage, TwoTowerError
from twotower.kinds import Kind, Kinds, UntrustedKind

SOURCE = Path(twotower.__file__).parent
ROOT = SOURCE.parent.parent
TESTS = ROOT / "tests"
WHOLE = {
    "architecture",
    "docs",
    "extending",
    "golden",
    "hosts",
    "image",
    "installation",
    "notebooks",
    "portability",
    "preloaded",
    "quick",
    "real",
}
"""Tests of the repository as a whole, or of what other tests use."""


@cache
def nodes(path: Path) -> list[ast.AST]:
    """The nodes of a file, parsed and walked once for all tests, without garbage being looked for, which takes as long
    again."""
    gc.disable()
    try:
        return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    finally:
        gc.enable()


@pytest.fixture(scope="module", autouse=True)
def _nodes_are_let_go() -> Iterator[None]:
    """Millions of nodes would slow the collector of garbage in what comes after."""
    yield
    nodes.cache_clear()


def sources() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = (
        "import sys, twotower\n"
        "heavy = {'torch', 'polars', 'numpy', 'faiss', 'fastapi', 'onnxruntime'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_schema_tables_and_retriever_work_without_torch() -> None:
    code = (
        "import sys\nsys.modules['torch'] = None\nimport twotower.features.schema, twotower.features.encoders, "
        "twotower.retrieval.retriever, twotower.data.tables, twotower.data.datasets.movielens"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", twotower.__all__)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    assert getattr(twotower, name).__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'fitt'"):
        twotower.fitt  # noqa: B018


def test_modules_are_nouns_of_the_field() -> None:
    for path in SOURCE.rglob("*.py"):
        assert path.stem not in {"utils", "common", "core", "base", "helpers", "misc"}


def test_no_class_name_stands_for_two_things() -> None:
    names = Counter(n.name for path in sources() for n in nodes(path) if isinstance(n, ast.ClassDef))
    assert not [name for name, n in names.items() if n > 1]


@pytest.mark.parametrize("folder", [SOURCE, TESTS, ROOT / "benchmarks"], ids=lambda p: p.name)
def test_no_module_of_the_package_is_renamed_at_import(folder: Path) -> None:
    """Imports are found in the text, as to parse every test takes seconds."""
    for path in folder.rglob("*.py"):
        imports = re.findall(r"^ *from twotower\b.* import (\([^)]*\)|.*)", path.read_text(encoding="utf-8"), re.M)
        renamed = [(a, b) for names in imports for a, b in re.findall(r"(\w+) as (\w+)", names) if a != b]
        assert not renamed, f"{path.name}: {renamed}"


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """The docstrings of modules, classes and functions of a file, and the texts that stand under a name."""
    for node in nodes(path):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            for before, after in pairwise([None, *node.body]):
                named = before is None or isinstance(before, ast.Assign | ast.AnnAssign)
                if named and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                    yield after.lineno, str(after.value.value)


def test_docstrings_open_with_a_verb_or_a_noun_phrase() -> None:
    found = [
        f"{path.relative_to(SOURCE)}:{line}: {text[:60]}"
        for path in sources()
        for line, text in docstrings(path)
        if re.match(r"(What|Whether|Where|How|Who|When|Which|Why)\b", text.strip())
    ]
    assert not found


def test_tests_stand_where_their_modules_do() -> None:
    """tests/serve/test_admission.py, or test_admission_more.py, tests twotower/serve/admission.py."""
    for path in TESTS.rglob("test_*.py"):
        words = path.stem.removeprefix("test_").split("_")
        folder = path.parent.relative_to(TESTS)
        room = ROOT / folder if folder.parts[:1] == ("benchmarks",) else SOURCE / folder
        names = ["_".join(words[:n]) for n in range(1, len(words) + 1)]
        if not (folder == Path() and names[0] in WHOLE):
            assert any((room / f"{n}.py").exists() or (room / n).is_dir() for n in names), f"{path}: no such module"


def test_every_room_has_tests() -> None:
    for folder in {path.parent for path in sources()}:
        room = TESTS.joinpath(*folder.relative_to(SOURCE).parts[:1])  # a room within a room is tested with it
        assert room.is_dir() or room.with_name(f"test_{room.name}.py").exists(), folder.name


def test_no_test_patches_a_constant_of_a_module() -> None:
    """A number that a test needs another value of is an argument."""
    found = []
    for path in TESTS.rglob("*.py"):
        if not re.search(
            r"""setattr\([^"']{0,200}["']([\w.]*\.)?_?[A-Z][A-Z0-9_]*["']""", path.read_text(encoding="utf-8")
        ):
            continue  # to parse every test takes seconds
        for node in nodes(path):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "setattr":
                texts = [str(a.value) for a in node.args[:2] if isinstance(a, ast.Constant)]
                if any(re.search(r"(^|\.)_?[A-Z][A-Z0-9_]*$", text) for text in texts):
                    found.append(f"{path.relative_to(TESTS)}:{node.lineno}: {texts}")
    assert not found


def test_no_property_depends_on_the_speed_of_the_machine() -> None:
    assert settings.default is not None
    assert settings.default.deadline is None
    assert HealthCheck.too_slow in settings.default.suppress_health_check
    for path in (ROOT / "tests").rglob("test_*.py"):
        own = re.findall(r"suppress_health_check=\[([^\]]*)\]", path.read_text(encoding="utf-8"))
        assert all("too_slow" in checks for checks in own), path


def test_the_package_has_no_switch_for_tests() -> None:
    for path in sources():
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"FAIL_(AT|POINT)|TWOTOWER_TEST", text), path.name


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_no_module_has_more_than_600_lines() -> None:
    assert not [path.relative_to(SOURCE) for path in sources() if lines(path) > 600]


def test_the_root_of_the_package_holds_few_modules_and_the_house_few_layers() -> None:
    assert len(list(SOURCE.glob("*.py"))) <= 12
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ][0]
    assert len(contract["layers"]) == 11
    assert "ignore_imports" not in contract


def untyped(path: Path) -> int:
    """Number of parameters, results and fields of a module that are Any or object, and of casts. An array may hold any
    number."""
    n = 0
    for node in nodes(path):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            given = node.args
            arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
            wanted = [a.annotation for a in arguments if a and node.name not in ("__exit__", "__aexit__", "__eq__")]
            n += sum(map(names_any, [*wanted, node.returns]))
        elif isinstance(node, ast.AnnAssign):
            n += names_any(node.annotation)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            n += node.func.id == "cast"
    return n


def names_any(annotation: ast.expr | None) -> bool:
    if annotation is None:
        return False
    text = re.sub(r"(NDArray|integer)\[[^\]]*\]*", "", ast.unparse(annotation))
    return re.search(r"\b(Any|object)\b", text) is not None


def test_few_things_have_any_type() -> None:
    found = {str(path.relative_to(SOURCE)): n for path in sources() if (n := untyped(path))}
    assert sum(found.values()) <= 40, found


def test_imports_point_down() -> None:
    done = subprocess.run(
        [str(Path(sys.executable).parent / "lint-imports")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_no_file_of_the_repository_names_a_folder_of_one_machine_or_carries_data() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in listed:
        path = ROOT / name
        assert path.suffix not in {".zip", ".dat", ".parquet", ".safetensors"}, name
        if path.suffix in {".py", ".md", ".toml", ".yml"} or path.name in {"Makefile", "run"}:
            text = path.read_text(encoding="utf-8")
            for folder in ("/work" + "/", "/root" + "/", "/home" + "/"):
                assert folder not in text, f"{name}: {folder}"


def test_the_repository_has_no_symbolic_link() -> None:
    """Git on Windows writes one as a file that holds its target."""
    listed = subprocess.run(["git", "ls-files", "-s"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not [line for line in listed.splitlines() if line.startswith("120000")]


SHAPED = ("model", "train", "evaluation", "index")
SHAPES = {"F32", "F64", "Float", "I32", "I64", "Int", "Bool", "Shaped"}
ARRAYS = {"Tensor", "NDArray", "ndarray", "Ints", "Codes", "Floats", "Bools", "Doubles", "Vectors", "Rows", "Array"}


def has_no_shape(annotation: ast.AST) -> bool:
    """Whether an annotation names an array that no shape stands around."""
    if (
        isinstance(annotation, ast.Subscript)
        and isinstance(annotation.value, ast.Name)
        and annotation.value.id in SHAPES
    ):
        return False
    name = getattr(annotation, "id", getattr(annotation, "attr", ""))
    return name in ARRAYS or any(map(has_no_shape, ast.iter_child_nodes(annotation)))


@pytest.mark.parametrize("room", SHAPED)
def test_every_array_of_a_signature_has_its_shape(room: str) -> None:
    found = []
    for path in sorted((SOURCE / room).rglob("*.py")):
        for node in nodes(path):
            if isinstance(node, ast.FunctionDef):
                given = node.args
                arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
                annotations = [*(a.annotation for a in arguments if a), node.returns]
                if any(annotation and has_no_shape(annotation) for annotation in annotations):
                    found.append(f"{path.relative_to(SOURCE)}:{node.lineno} {node.name}")
    assert not found


ASKED = {"kind", "pooling", "optimizer", "loss", "carrier", "monitor", "metric", "metrics"}
"""Names of what holds a kind, or the word for one."""
SPLIT = {"data/split.py", "data/splits.py"}
"""The section of the splits and their rules, in two files: a manifest reads the first without numpy."""


@cache
def kinds() -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """The modules of the package's kinds: by the name of the class, and by the word in a config."""
    classes: dict[str, set[str]] = {}
    words: dict[str, set[str]] = {}

    def collect(protocol: type[Kind]) -> None:
        for kind in protocol.__subclasses__():
            if kind.__module__.startswith("twotower.") and ":" not in kind.kind:
                classes.setdefault(kind.__name__, set()).add(kind.__module__)
                words.setdefault(kind.kind, set()).add(kind.__module__)
            collect(kind)

    for path in sources():
        if path.stem not in ("__main__", "table_group"):  # the latter needs TorchRec
            import_module(module_of(path))
    collect(Kind)
    return classes, words


def test_every_error_of_the_package_comes_from_another_process_as_it_is() -> None:
    """By a pickle, as engines with processes send them."""
    kinds()  # imports every module
    found, left = [], [TwoTowerError]
    while left:
        error = left.pop()
        left += error.__subclasses__()
        if error.__module__.startswith("twotower."):
            found.append(error)
    assert {TwoTowerError, MissingPackage, UntrustedKind} < set(found)
    for error in found:
        taken = [p for p in inspect.signature(error.__init__).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        raised = error(*[f"a.b:C{n}" for n in range(max(1, len(taken) - 1))])  # without self
        back = pickle.loads(pickle.dumps(raised))
        assert type(back) is error
        assert str(back) == str(raised) != ""
        assert vars(back) == vars(raised), error


def test_every_registry_has_a_suite_over_its_kinds_and_one_from_outside() -> None:
    """A test module imports it, and holds a list such as `[*LOSSES, Focal]`."""
    kinds()
    loaded = [module for name, module in sys.modules.items() if name.split(".")[0] == "twotower"]
    registries = {name for module in loaded for name, value in vars(module).items() if isinstance(value, Kinds)}
    run_over = set()
    for path in TESTS.rglob("test_*.py"):
        if not any(name in path.read_text(encoding="utf-8") for name in registries):
            continue
        imported = {a.name for node in nodes(path) if isinstance(node, ast.ImportFrom) for a in node.names}
        for node in nodes(path):
            match node:
                case ast.List([ast.Starred(all_), ast.Name() | ast.Call(), *_]) | ast.Tuple([ast.Starred(all_), *_]):
                    run_over |= {n.id for n in ast.walk(all_) if isinstance(n, ast.Name)} & imported
    assert len(registries) == 11
    assert not registries - run_over


def module_of(path: Path) -> str:
    return ".".join(["twotower", *path.relative_to(SOURCE).with_suffix("").parts]).removesuffix(".__init__")


def ladders(path: Path) -> Iterator[str]:
    """What tells kinds apart outside their files: types, words, patterns, tables by kind."""
    classes, words = ({name for name, homes in known.items() if module_of(path) not in homes} for known in kinds())

    def named(node: ast.AST) -> set[str]:
        dotted = {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute) and getattr(n.value, "id", "") != "pl"}
        return ({n.id for n in ast.walk(node) if isinstance(n, ast.Name)} | dotted) & classes

    def worded(node: ast.AST) -> set[str]:
        texts = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        return {word for text in texts for word in re.split("[.@]", text)} & words  # validation.recall@10

    for node in nodes(path):
        found: set[str] = set()
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass"):
            found = named(node.args[1])
        elif isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            asked = {getattr(side, "attr", getattr(side, "id", "")) for side in sides} & ASKED
            found = set().union(*map(named, sides), *(map(worded, sides) if asked else ()))
        elif isinstance(node, ast.match_case):
            found, line = named(node.pattern) | worded(node.pattern), node.pattern.lineno
        elif isinstance(node, ast.Dict) and path.name != "__init__.py":
            found = set().union(*(named(key) | worded(key) for key in node.keys if key))
            found = found if len(found) == len(node.keys) > 1 else set()
        if found:
            yield f"{path.relative_to(SOURCE)}:{line}: {sorted(found)}"


def test_kinds_are_told_apart_in_their_own_files_only() -> None:
    assert len(kinds()[0]) > 50
    assert not [at for path in sources() if str(path.relative_to(SOURCE)) not in SPLIT for at in ladders(path)]
