"""Drawing of a model: fields, gates, branches, layers, vectors and the score of a config, as SVG."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from pydantic import BaseModel

from twotower.errors import ConfigError, did_you_mean
from twotower.features.feature import Feature
from twotower.features.schema import Schema
from twotower.features.side import SIDES, SideName
from twotower.model.towers import TowerConfig
from twotower.model.two_tower import ModelConfig, PairConfig

WIDTHS = {"field": 210, "part": 176, "layer": 78, "vector": 128, "score": 140}
"""Pixels: width of a box of each kind."""
HEIGHT, GAP, COLUMN_GAP, MARGIN, LETTER = 40, 10, 34, 20, 6.1
"""Pixels: height of a box, distance of boxes, distance of columns, margin, width of a letter."""
STYLE = """
  .page { fill: #ffffff } .arrow { fill: none; stroke: #8a94a6; stroke-width: 1.2; marker-end: url(#head) } #head path { fill: #8a94a6 }
  .name { font: 600 12.5px system-ui, sans-serif; fill: #1f2933; text-anchor: middle }
  .note { font: 11px system-ui, sans-serif; fill: #52606d; text-anchor: middle }
  .side { font: 600 14px system-ui, sans-serif }
  .user { fill: #e7effb; stroke: #3b6cb7 } .item { fill: #e6f4ea; stroke: #3d8b58 } .score { fill: #fdf1d8; stroke: #c08a1e }
"""


@dataclass(frozen=True)
class Box:
    """Part of a tower: a name, a note below, and the kind of its width."""

    name: str
    note: str = ""
    kind: str = "part"


@dataclass(frozen=True)
class _Placed:
    box: Box
    x: float
    y: float
    """Left edge and middle."""

    @property
    def right(self) -> float:
        return self.x + WIDTHS[self.box.kind]


def draw_model(schema: Schema, model: ModelConfig) -> str:
    """Return an SVG picture of all pairs of towers, from the fields to the score. Raises ConfigError for a field that no
    feature has."""
    towers = [
        (number, side, tower_columns(schema, model, pair, side))
        for number, pair in enumerate(model.pairs)
        for side in SIDES
    ]
    ends = max(_right(columns[:-1]) for _, _, columns in towers)
    shapes, top, vectors = list[str](), float(MARGIN), list[_Placed]()
    for number, side, columns in towers:
        title = f"{side} tower" + (f" of pair {number}" if len(model.pairs) > 1 else "")
        shapes.append(f'<text class="side" x="{MARGIN}" y="{top + 12:g}">{title}</text>')
        tall = max(len(column) for column in columns) * (HEIGHT + GAP) - GAP
        placed = _place(columns, top + 24 + tall / 2, ends)
        shapes += _tower(placed, side)
        vectors.append(placed[-1][0])
        top += 24 + tall + 22
    score = Box("weighted score" if model.stacking else "score", _score_note(model), "score")
    at = _Placed(score, vectors[0].right + 2 * COLUMN_GAP, (vectors[0].y + vectors[-1].y) / 2)
    shapes += [_arrow(vector, at) for vector in vectors]
    shapes.append(_box(at, "score"))
    size = f"{at.right + MARGIN:g} {top:g}"
    head = '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z"/></marker>'
    body = "\n".join(shapes)
    text = f"Towers of {len(model.pairs)} pair{'s' * (len(model.pairs) > 1)}, from the fields to the score"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" width="{at.right + MARGIN:g}" role="img" aria-label="{text}">\n'
        f'<style>{STYLE}</style>\n<defs>{head}</defs>\n<rect class="page" width="100%" height="100%"/>\n{body}\n</svg>\n'
    )


def tower_columns(schema: Schema, model: ModelConfig, pair: PairConfig, side: SideName) -> list[list[Box]]:
    """Return the parts of a tower from left to right; the parts of one column stand side by side in the model."""
    tower = pair.user if side == "user" else pair.item
    features = _features(schema.tower(side), tower)
    width = tower.width or model.width
    columns = [[Box(f.name, _field_note(f, width), "field") for f in features]]
    if tower.senet.enabled:
        columns.append([Box("SENet gate", "a weight a field")])
    norm = "each normalised" if tower.field_norm else ""
    drop = f"dropout {tower.field_dropout:g}" if tower.field_dropout else ""
    note = ", ".join(filter(None, [norm, drop]))
    if note or len(features) > 1:
        joined = "sum" if tower.join == "sum" else "side by side"
        columns.append([Box(joined if len(features) > 1 else "field", note)])
    branches = [Box(_kind(b), _options(b)) for b in tower.branches]
    if tower.augment:
        branches.append(Box("augmented", "a vector an id"))
    if branches:
        columns.append([*([] if tower.branches else [Box("fields")]), *branches])
    for n, size in enumerate(tower.layers):
        last = n == len(tower.layers) - 1
        active = "" if last and not tower.activate_last else tower.activation
        columns.append([Box(str(size), active or "linear", "layer")])
    more = ["+ linear"] * tower.residual + ["normalised"] * tower.output_norm
    columns.append([Box(f"vector {'u' if side == 'user' else 'v'}", ", ".join(more), "vector")])
    return columns


def _features(of_side: tuple[Feature, ...], tower: TowerConfig) -> list[Feature]:
    known = {f.name: f for f in of_side}
    for name in tower.fields:
        if name not in known:
            near = did_you_mean(name, known)
            raise ConfigError(f"model.pairs: no feature '{name}' on this side{near} (allowed: {', '.join(known)})")
    return [known[name] for name in tower.fields] if tower.fields else list(of_side)


def _field_note(feature: Feature, width: int) -> str:
    pooling = getattr(feature, "pooling", None)
    parts = [_kind(feature)]
    if pooling is not None and feature.history:
        parts.append(pooling.kind.rpartition(":")[2])
    size = feature.width or width
    return f"{' by '.join(parts)}, {size} wide" if not feature.computes else f"{parts[0]}, a number"


def _kind(section: BaseModel) -> str:
    return str(getattr(section, "kind", type(section).__name__)).rpartition(":")[2]


def _options(branch: BaseModel) -> str:
    """Return the sizes of a branch, as a note."""
    given = {name: getattr(branch, name, None) for name in ("layers", "depth", "widths")}
    return ", ".join(_words(name, value) for name, value in given.items() if value is not None)


def _words(name: str, value: int | tuple[int, ...]) -> str:
    return " → ".join(map(str, value)) if isinstance(value, tuple) else f"{name} {value}"


def _score_note(model: ModelConfig) -> str:
    product = "sum of u · v" if len(model.pairs) > 1 else "u · v"
    found = "cosine" if model.similarity == "cosine" else product
    return (
        found
        + (f" / {model.temperature:g}" if model.temperature != 1 else "")
        + (" + biases" if model.bias or model.cold_item_bias else "")
        + (" + recent" if model.recent_popularity else "")
        + (" + own counts" if model.own_counts else "")
    )


def _right(columns: list[list[Box]]) -> float:
    """Return where a column after these begins."""
    return MARGIN + sum(max(WIDTHS[box.kind] for box in column) + COLUMN_GAP for column in columns)


def _place(columns: list[list[Box]], middle: float, ends: float) -> list[list[_Placed]]:
    """Return the boxes from the left margin on, the last column at `ends`."""
    x, found = float(MARGIN), list[list[_Placed]]()
    for number, column in enumerate(columns):
        x = ends if number == len(columns) - 1 else x
        top = middle - (len(column) - 1) * (HEIGHT + GAP) / 2
        found.append([_Placed(box, x, top + n * (HEIGHT + GAP)) for n, box in enumerate(column)])
        x += max(WIDTHS[box.kind] for box in column) + COLUMN_GAP
    return found


def _tower(columns: list[list[_Placed]], side: SideName) -> Iterator[str]:
    for before, after in pairwise(columns):
        yield from (_arrow(a, b) for a in before for b in after)
    for column in columns:
        yield from (_box(placed, side) for placed in column)


def _box(placed: _Placed, style: str) -> str:
    box, width = placed.box, WIDTHS[placed.box.kind]
    middle, top = placed.x + width / 2, placed.y - HEIGHT / 2
    found = f'<rect class="{style}" x="{placed.x:g}" y="{top:g}" width="{width}" height="{HEIGHT}" rx="6"/>'
    lines = [("name", box.name, 0.0)] if not box.note else [("name", box.name, -7.0), ("note", box.note, 9.0)]
    for kind, text, shift in lines:
        found += (
            f'<text class="{kind}" x="{middle:g}" y="{placed.y + shift + 4:g}">{escape(_short(text, width))}</text>'
        )
    return found + f"<title>{escape(f'{box.name}: {box.note}' if box.note else box.name)}</title>"


def _short(text: str, width: int) -> str:
    fits = int(width / LETTER)
    return text if len(text) <= fits else f"{text[: fits - 1]}…"


def _arrow(before: _Placed, after: _Placed) -> str:
    bend = (before.right + after.x) / 2
    return f'<path class="arrow" d="M{before.right:g} {before.y:g}C{bend:g} {before.y:g} {bend:g} {after.y:g} {after.x - 1:g} {after.y:g}"/>'
