"""Run the tests of the rooms that a change touches: `make quick`, or `make quick BASE=COMMIT`.

The change is the difference of the working tree to a commit. A file of `src/twotower/ROOM/` or `tests/ROOM/` selects
the tests of the room, a module of the root its own tests; `tests/test_architecture.py` is always run. A test file that
needs a package that is not installed is left out and named.
"""

from __future__ import annotations

import argparse
import ast
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
FIXTURES = {"s3": {"moto", "obstore"}, "bucket": {"moto", "obstore"}}
"""Packages that fixtures of shared_fixtures.py use in another process."""
LIBRARY = {"twotower.engines.ray": "ray"}
"""Packages that the functions of a module import, if a test names the module."""
BY_NAME = ("import_module", "importlib.import_module", "preloaded.load")
"""Functions that import what a text names."""
OTHER = {"benchmarks": "benchmarks", "docs": "test_docs.py", "examples": "test_extending.py", "README": "test_docs.py"}
"""Tests of a folder of the repository, or of files whose names begin so."""
MARKS = ("system", "hosts", "spark", "real")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base", default="", help="Commit to compare with; default: the branch point from main.")
    parser.add_argument("--list", action="store_true", help="Print the test files, and run none.")
    parser.add_argument("pytest", nargs="*", help="Arguments of pytest, after --.")
    chosen = parser.parse_args(arguments)
    os.chdir(ROOT)
    names = changed(chosen.base or branch_point())
    selected = {test for name in names for test in tests_of(name)} | {TESTS / "test_architecture.py"}
    missing = {test: packages for test in sorted(selected) if (packages := missing_packages(test))}
    for test, packages in missing.items():
        print(f"not run: {test.relative_to(ROOT)} needs {', '.join(sorted(packages))} (make test has it)")
    if rest := [name for name in names if name.endswith(".py") and not tests_of(name)]:
        print(f"no test is selected for {', '.join(rest)}; make test covers it")
    found = [str(test.relative_to(ROOT)) for test in sorted(selected - missing.keys())]
    print(*found, sep="\n", flush=True)
    return 0 if chosen.list else subprocess.call([sys.executable, "-m", "pytest", *chosen.pytest, *found])


def git(*words: str) -> list[str]:
    """Return the lines that a command of git prints in the working folder. Exits if it fails."""
    done = subprocess.run(["git", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: git {' '.join(words)}: {done.stderr.strip()}")
    return [line for line in done.stdout.splitlines() if line]


def branch_point() -> str:
    """Return the commit where the branch left main, or the last commit but one on main itself."""
    (base,) = git("merge-base", "HEAD", "main")
    return base if base not in git("rev-parse", "HEAD") else "HEAD~"


def changed(base: str) -> list[str]:
    """Return the files that differ from a commit, new ones included, as paths from the root of the repository."""
    return sorted({*git("diff", "--name-only", base), *git("ls-files", "--others", "--exclude-standard")})


def tests_of(name: str) -> list[Path]:
    """Return the test files of the room, or of the module of the root, that a file belongs to."""
    parts = name.split("/")
    if parts[:2] == ["src", "twotower"]:
        return room(parts[2].removesuffix(".py"))
    if parts[0] == "tests" and len(parts) > 2:
        return room(parts[1])
    if parts[0] == "tests":
        return [TESTS / parts[1]] if parts[1].startswith("test_") and (TESTS / parts[1]).exists() else []
    known = [test for start, test in OTHER.items() if parts[0].startswith(start)]
    return [path for test in known for path in ([TESTS / test] if test.endswith(".py") else room(test))]


def room(name: str) -> list[Path]:
    """Return the tests of a room, or of a module of the root."""
    return [*(TESTS / name).rglob("test_*.py"), *TESTS.glob(f"test_{name}.py"), *TESTS.glob(f"test_{name}_*.py")]


def missing_packages(test: Path) -> set[str]:
    """Return the packages that a test file needs and that are not installed."""
    parts = list(ast.walk(_tree(test)))
    parameters = {part.arg for part in parts if isinstance(part, ast.arg)}
    needed = set().union(*(packages for fixture, packages in FIXTURES.items() if fixture in parameters))
    calls = (part for part in parts if isinstance(part, ast.Call) and ast.unparse(part.func) in BY_NAME)
    named = (word.value for call in calls for word in call.args if isinstance(word, ast.Constant))
    needed |= {str(name).partition(".")[0] for name in named}
    waiting, seen = [test], {test}
    while waiting:
        path = waiting.pop()
        for module in _imports(path):
            if module in LIBRARY and path.is_relative_to(TESTS):
                needed.add(LIBRARY[module])
            found = _file(module)
            if found is None:
                needed.add(module.partition(".")[0])
            elif found not in seen:
                seen.add(found)
                waiting.append(found)
    return {package for package in needed if not _is_installed(package)}


@cache
def _imports(path: Path) -> tuple[str, ...]:
    """Return the modules that a file imports when it is loaded; of a test or a helper also those of functions."""
    return tuple(_imported(_tree(path), inner=path.is_relative_to(TESTS)))


def _imported(tree: ast.AST, inner: bool) -> Iterator[str]:
    """Yield imported modules, with `inner` those of functions too, but for tests that `make test` does not run."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            inside = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (node.module, *filter(_file, inside))
        elif isinstance(node, ast.FunctionDef):
            if inner and not any(f"mark.{mark}" in ast.unparse(one) for one in node.decorator_list for mark in MARKS):
                yield from _imported(node, inner)
        elif isinstance(node, (ast.ClassDef, ast.With, ast.Try)) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test)
        ):
            yield from _imported(node, inner)


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def _file(module: str) -> Path | None:
    """Return the file of a module of the repository."""
    name = module.replace(".", "/")
    places = (ROOT / "src", TESTS, ROOT / "examples", ROOT)
    files = (place / f"{name}{end}" for place in places for end in (".py", "/__init__.py"))
    return next((path for path in files if path.is_file()), None)


@cache
def _is_installed(package: str) -> bool:
    return package in sys.stdlib_module_names or find_spec(package) is not None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
