"""Seven changes, made for real: a new kind is one file and one registration.

    python tests/changes.py [NAME ...]     make each change in a scratch worktree, run its suite, print what git counts

A change copies an example of `examples/mykinds` into the package, gives it a name of its own, and registers it. The
suite of its protocol then finds it by itself. `make changes` runs all of them.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class KindChange:
    """A kind that is added to the package."""

    name: str
    example: str
    """Class in `examples/mykinds`, as module:Class."""
    kind: str
    """Its name in a config."""
    room: str
    """Package below `src/twotower`, where its file stands."""
    registry: str
    """Module of the package that registers it."""
    suite: str
    """Tests that run over every registered kind."""

    def make(self, tree: Path) -> None:
        """Write the file of the kind and register it."""
        module, _, class_ = self.example.partition(":")
        source = (tree / "examples" / "mykinds" / f"{module}.py").read_text(encoding="utf-8")
        new = tree / "src" / "twotower" / self.room / f"{self.kind}.py"
        assert not new.exists(), f"{new}: exists"
        new.write_text(named(source, class_, self.kind), encoding="utf-8")
        registry = new.with_name(f"{self.registry}.py")
        imported = f"from twotower.{self.room.replace('/', '.')}.{self.kind} import {class_}"
        registry.write_text(registered(registry.read_text(encoding="utf-8"), imported, class_), encoding="utf-8")


def named(source: str, class_: str, kind: str) -> str:
    """Return a module whose class has a name of its own for configs."""
    found = next(n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == class_)
    lines = source.splitlines(keepends=True)
    after = found.body[0].end_lineno or 0
    return "".join([*lines[:after], f'\n    kind = "{kind}"\n', *lines[after:]])


def registered(source: str, imported: str, class_: str) -> str:
    """Return the module of a registry with one import and one kind more."""
    calls = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)]
    call = next(c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "Kinds")
    last = call.args[-1]
    lines = source.splitlines(keepends=True)
    row, column = (last.end_lineno or 0) - 1, last.end_col_offset or 0
    lines[row] = f"{lines[row][:column]}, {class_}{lines[row][column:]}"
    first = next(i for i, line in enumerate(lines) if line.startswith("from twotower"))
    return "".join([*lines[:first], f"{imported}\n", *lines[first:]])


CHANGES = (
    KindChange("a loss", "losses:Focal", "focal", "train/losses", "__init__", "train/losses/test_loss.py"),
    KindChange("a feature", "features:Cyclic", "cyclic", "features", "schema", "features/test_feature.py"),
    KindChange("an index", "indexes:Lsh", "lsh", "index", "__init__", "index/test_protocol.py"),
    KindChange(
        "a source of negatives", "negatives:Recent", "recent", "train/negatives", "config",
        "train/negatives/test_source.py"
    ),
    KindChange("a pooling", "poolings:Recency", "recency", "model/pooling", "__init__",
     "model/pooling/test_pooling.py"),
    KindChange(
        "a metric", "metrics:TailShare", "tail", "evaluation/metrics", "__init__",
        "evaluation/test_metrics_conformance.py"
    ),
    KindChange(
        "a data set", "datasets:Shop", "shop", "data/datasets", "__init__", "data/datasets/test_named_dataset.py"
    ),
)  # fmt: skip


def run(command: list[str], tree: Path) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(str(tree / name) for name in ("src", "examples", "tests"))
    environment = os.environ | {"PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=tree, env=environment, text=True, capture_output=True, check=False)


def tried(change: KindChange, tree: Path) -> tuple[str, bool]:
    """Make a change in a worktree; return its row of the table, and True if the suite passes."""
    started = time.monotonic()
    change.make(tree)
    run(["git", "add", "-A"], tree)
    counted = run(["git", "diff", "--cached", "--numstat"], tree).stdout.splitlines()
    lines = {path: (int(added), int(removed)) for added, removed, path in (line.split("\t") for line in counted)}
    registry = f"src/twotower/{change.room}/{change.registry}.py"
    own = sum(added for path, (added, _) in lines.items() if path != registry)
    suite = [sys.executable, "-m", "pytest", "-v", "-n", "0", "-p", "no:cacheprovider", f"tests/{change.suite}"]
    done = run(suite, tree)
    passed = [line for line in done.stdout.splitlines() if " PASSED" in line]
    of_kind = [line for line in passed if change.kind in line.lower()]
    ok = done.returncode == 0 and bool(of_kind)
    if not ok:
        print(done.stdout[-3000:], done.stderr[-1000:], file=sys.stderr)
    tests = f"{len(passed)}, of which {len(of_kind)} name it" if ok else "failed"
    edits = "+{} -{}".format(*lines[registry])
    return f"| {change.name} | {len(lines)} | {own} | {edits} | {tests} | {time.monotonic() - started:.0f} |", ok


def main(names: list[str]) -> int:
    print("| change | files | lines of its file | lines of the registry | tests of the protocol that pass | seconds |")
    print("|---|---|---|---|---|---|")
    good = True
    for change in CHANGES:
        if names and change.kind not in names:
            continue
        with tempfile.TemporaryDirectory(prefix="twotower-change-") as folder:
            tree = Path(folder) / "tree"
            subprocess.run(["git", "-C", str(ROOT), "worktree", "add", "-q", "--detach", str(tree)], check=True)
            try:
                row, ok = tried(change, tree)
            finally:
                subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(tree)], check=True)
        print(row, flush=True)
        good &= ok
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
