"""Draw docs/figures/house.svg, the rooms of the package and their imports, from the code: `make docs`. A test compares
them.

A box is a package or a module of `src/twotower`, on the row of its layer in the import contract of pyproject.toml. An
arrow is an import at run time that no chain of other arrows implies; all arrows point down.
"""

from __future__ import annotations

import ast
import tomllib
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "twotower"
WIDTH, ROW, BOX_HEIGHT, MARGIN = 900, 86, 44, 16
"""Pixels: width of the picture, distance of rows, height of a box, margin."""
FOUNDATIONS = "foundations"
"""Box of the lowest layer, whose modules may import each other."""
STYLE = """
  .box { fill: #eef3fb; stroke: #3b6cb7; stroke-width: 1.2 }
  .name { font: 600 14px sans-serif; fill: #16335f; text-anchor: middle }
  .note { font: 11px sans-serif; fill: #47597a; text-anchor: middle }
  .arrow { fill: none; stroke: #8aa3c8; stroke-width: 1.3; marker-end: url(#head) }
  #head path { fill: #8aa3c8 }
  .page { fill: #ffffff }
"""


def layers() -> list[list[str]]:
    """Return the rooms of each layer, from the highest to the lowest, as the import contract has them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contract = project["tool"]["importlinter"]["contracts"][0]
    rows = [line.replace("|", " ").replace(":", " ").split() for line in contract["layers"]]
    return [[name.removeprefix("twotower.") for name in row] for row in rows]


def imports() -> dict[str, set[str]]:
    """Return the rooms that each room imports at run time; those of the lowest layer are one."""
    *_, lowest = layers()
    found: dict[str, set[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        room = _room(".".join(path.relative_to(PACKAGE).with_suffix("").parts), lowest)
        if path.parent == PACKAGE and path.stem.startswith("__"):
            continue
        found.setdefault(room, set())
        for module in _imported(ast.parse(path.read_text(encoding="utf-8"))):
            found[room].add(_room(module, lowest))
    return {room: others - {room, ""} for room, others in found.items()}


def _room(module: str, lowest: list[str]) -> str:
    name = module.partition(".")[0]
    return FOUNDATIONS if name in lowest else name


def _imported(tree: ast.AST) -> list[str]:
    """Return the modules of the package that a tree imports, without those of `if TYPE_CHECKING`."""
    found, left = [], [tree]
    while left:
        node = left.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            found += [
                alias.name.removeprefix("twotower.") for alias in node.names if alias.name.startswith("twotower.")
            ]
        if isinstance(node, ast.ImportFrom) and node.module == "twotower":
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("twotower."):
            found.append(str(node.module).removeprefix("twotower."))
        left += ast.iter_child_nodes(node)
    return found


def needed(graph: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Return the edges of a graph without cycles that no longer path implies."""

    def reached(room: str) -> set[str]:
        return {room}.union(*(reached(other) for other in graph[room]))

    return [
        (room, other)
        for room in sorted(graph)
        for other in sorted(graph[room])
        if not any(other in reached(between) for between in graph[room] - {other})
    ]


def picture() -> str:
    """Return the picture as SVG."""
    rows = layers()
    rows[-1] = [FOUNDATIONS]
    place: dict[str, tuple[float, float, float]] = {}  # centre, top, width
    for number, row in enumerate(rows):
        wide = [WIDTH - 2 * MARGIN if name == FOUNDATIONS else max(112, 9 * len(name) + 34) for name in row]
        free = (WIDTH - sum(wide)) / (len(row) + 1)
        left = free
        for name, width in zip(row, wide, strict=True):
            place[name] = (left + width / 2, MARGIN + number * ROW, width)
            left += width + free
    height = 2 * MARGIN + (len(rows) - 1) * ROW + BOX_HEIGHT
    row_of = {name: number for number, row in enumerate(rows) for name in row}
    arrows, boxes = [], []
    for upper, lower in needed(imports()):
        x, top, width = place[upper]
        at, end, wide = place[lower]
        between = [[place[name] for name in row] for row in rows[row_of[upper] + 1 : row_of[lower]]]
        arrows.append(f'<path class="arrow" d="{_path(x, top, between, at, end, wide)}"/>')
    for name, (x, top, width) in place.items():
        note = ", ".join(layers()[-1]) if name == FOUNDATIONS else _size(name)
        boxes.append(
            f'<rect class="box" x="{x - width / 2:.0f}" y="{top}" width="{width:.0f}" height="{BOX_HEIGHT}" rx="6"/>'
            f'<text class="name" x="{x:.0f}" y="{top + 19}">{escape(name)}</text>'
            f'<text class="note" x="{x:.0f}" y="{top + 35}">{escape(note)}</text>'
        )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
            f'height="{height}">',
            f"<title>The rooms of twotower and their imports</title><style>{STYLE}</style>",
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            'orient="auto">'
            '<path d="M0,0 L8,4 L0,8 z"/></marker></defs>',
            f'<rect class="page" width="{WIDTH}" height="{height}"/>',
            *arrows,
            *boxes,
            "</svg>\n",
        ]
    )


def _path(
    x: float, top: float, between: list[list[tuple[float, float, float]]], at: float, end: float, wide: float
) -> str:
    """Return the path of an arrow from a box to one below, past the boxes of the rows between, in SVG's words."""
    y = top + BOX_HEIGHT
    path = f"M{x:.0f},{y:.0f}"
    if wide > WIDTH / 2:  # a box as wide as the picture is met from straight above
        at = x
    for number, row in enumerate(between, 1):
        aim = x + (at - x) * number / (len(between) + 1)
        edges = sorted((centre - width / 2 - 9, centre + width / 2 + 9) for centre, _, width in row)
        for left, right in edges:
            if left < aim < right:
                aim = left if aim - left < right - aim else right
        path += _curve(x, y, aim, row[0][1]) + f" L{aim:.0f},{row[0][1] + BOX_HEIGHT:.0f}"
        x, y = aim, row[0][1] + BOX_HEIGHT
        at = x if wide > WIDTH / 2 else at
    return path + _curve(x, y, at, end - 2)


def _curve(x: float, y: float, at: float, end: float) -> str:
    bend = (end - y) * 0.6
    return f" C{x:.0f},{y + bend:.0f} {at:.0f},{end - bend:.0f} {at:.0f},{end:.0f}"


def _size(room: str) -> str:
    """Return the number of modules of a room, or nothing for a module."""
    folder = PACKAGE / room
    n = len([p for p in folder.rglob("*.py") if p.name != "__init__.py"]) if folder.is_dir() else 0
    return f"{n} modules" if n > 1 else "1 module"


if __name__ == "__main__":
    (ROOT / "docs" / "figures" / "house.svg").write_text(picture(), encoding="utf-8")
