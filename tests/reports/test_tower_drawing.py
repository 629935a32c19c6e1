"""The drawing of a model."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from twotower.cli.app import run_command
from twotower.config.toml import load_config
from twotower.features.schema import Schema
from twotower.model.two_tower import ModelConfig
from twotower.reports.tower_drawing import draw_model, tower_columns

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SCHEMA = Schema.model_validate(
    {
        "features": [
            {"kind": "categorical", "side": "user", "name": "city & <town>"},
            {"kind": "sequence", "side": "user", "name": "seen", "pooling": "sqrt"},
            {"kind": "categorical", "side": "context", "name": "device"},
            {"kind": "categorical", "side": "item", "name": "item_id", "width": 24},
            {"kind": "text", "side": "item", "name": "words"},
        ]
    }
)
MODEL = ModelConfig.model_validate(
    {
        "width": 8,
        "pairs": [
            {
                "user": {
                    "senet": {"enabled": True},
                    "branches": [{"kind": "cross", "depth": 3}, {"kind": "mlp", "layers": [12, 6]}],
                    "layers": [32, 16],
                    "output_norm": True,
                },
                "item": {"fields": ["item_id"], "layers": [16], "residual": True},
            }
        ],
    }
)


def names(side: str) -> list[list[str]]:
    pair = MODEL.pairs[0]
    return [[f"{box.name}: {box.note}" for box in column] for column in tower_columns(SCHEMA, MODEL, pair, side)]  # type: ignore[arg-type]


def test_the_parts_of_a_tower_stand_in_the_order_of_its_data() -> None:
    assert names("user") == [
        ["city & <town>: categorical, 8 wide", "seen: sequence by sqrt, 8 wide", "device: categorical, 8 wide"],
        ["SENet gate: a weight a field"],
        ["side by side: "],
        ["cross: depth 3", "mlp: 12 → 6"],
        ["32: LeakyReLU"],
        ["16: linear"],
        ["vector u: normalised"],
    ]
    assert names("item") == [["item_id: categorical, 24 wide"], ["16: linear"], ["vector v: + linear"]]


def test_a_drawing_is_a_picture_of_every_part_and_arrow_within_its_frame() -> None:
    drawing = ET.fromstring(draw_model(SCHEMA, MODEL))
    of = "{http://www.w3.org/2000/svg}"
    _, _, width, height = map(float, drawing.attrib["viewBox"].split())
    boxes = [b for b in drawing.iter(f"{of}rect") if b.attrib["class"] != "page"]
    assert len(boxes) == 10 + 3 + 1
    assert all(float(b.attrib["x"]) + float(b.attrib["width"]) <= width for b in boxes)
    assert all(0 <= float(b.attrib["y"]) <= height - float(b.attrib["height"]) for b in boxes)
    arrows = [p for p in drawing.iter(f"{of}path") if p.attrib.get("class") == "arrow"]
    assert len(arrows) == (3 + 1 + 2 + 2 + 1 + 1) + 2 + 2
    texts = [t.text for t in drawing.iter(f"{of}text")]
    assert "city & <town>" in texts
    assert {"score", "cosine / 0.1 + biases"} <= set(texts)
    assert "weighted score" in draw_model(SCHEMA, MODEL.model_copy(update={"stacking": True}))


@pytest.mark.parametrize("name", sorted(p.name for p in EXAMPLES.glob("*.toml") if p.name != "mykinds.toml"))
def test_every_example_is_drawn(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run_command(["draw", str(EXAMPLES / name), "-o", str(tmp_path / "t.svg")]) == 0
    _, config = load_config(EXAMPLES / name, [])
    drawn = ET.parse(tmp_path / "t.svg").getroot()
    titles = [t.text for t in drawn.iter("{http://www.w3.org/2000/svg}text") if t.attrib["class"] == "side"]
    assert len(titles) == 2 * len(config.model.pairs)
    if len(titles) > 2:  # as model.pairs.0 and train.start name them
        assert titles == [
            f"{side} tower of pair {n}" for n in range(len(config.model.pairs)) for side in ("user", "item")
        ]
    score = [t.text for t in drawn.iter("{http://www.w3.org/2000/svg}title")][-1]
    assert (score or "").startswith("score: sum of") == (len(titles) > 2 and config.model.similarity == "dot"), score


def test_an_unknown_field_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    wrong = "model.pairs.0.user.fields=['agee']"
    assert run_command(["draw", str(EXAMPLES / "own-data.toml"), "--set", wrong]) == 2
    assert "no feature 'agee' on this side; did you mean 'age'?" in capsys.readouterr().err


def test_the_picture_of_the_tutorial_is_up_to_date() -> None:
    schema, config = load_config(EXAMPLES / "parallel.toml", [])
    assert config.data.dataset
    kept = EXAMPLES.parent / "docs" / "figures" / "parallel.svg"
    drawn = draw_model(schema or config.data.dataset.table_schema, config.model)
    assert kept.read_text(encoding="utf-8") == drawn, (
        "run twotower draw examples/parallel.toml -o docs/figures/parallel.svg"
    )


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.toml")), ids=lambda path: path.stem)
def test_no_text_of_an_example_is_cut(path: Path) -> None:
    schema, config = load_config(path, trust=True)
    assert schema
    assert "…" not in draw_model(schema, config.model)
