"""The layout is the only place that spells the name of a file which several modules share."""

from __future__ import annotations

import ast
from pathlib import Path

import twotower
from twotower.files import layout

PACKAGE = Path(twotower.__file__).parent
CONSTANTS = [value for name, value in vars(layout).items() if name.isupper()]
NAMES = (
    {value for value in CONSTANTS if isinstance(value, str)}
    | set(layout.TABLES)
    | {layout.tower("user"), layout.tower("item")}
)


def test_no_other_module_spells_a_name_of_the_layout() -> None:
    """Words of the language, such as "index", are names only where a path is made of them."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        if path == Path(layout.__file__):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            joined = node.right if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) else None
            for constant in (node, joined):
                if isinstance(constant, ast.Constant) and constant.value in NAMES:
                    is_name = joined is not None or "." in constant.value or constant.value.isupper()
                    found += [f"{path.relative_to(PACKAGE)}:{constant.lineno}: {constant.value}"] * is_name
    assert not found


def test_names_of_a_folder_are_distinct() -> None:
    assert len(layout.RUN_FILES) == 16
    assert len({*layout.STORE_FILES, layout.COLLECTIONS}) == 5
    bundle = [
        layout.MANIFEST, layout.USER_VECTORS, layout.INDEX, layout.MODEL_CARD, layout.tower("user"),
        layout.tower("item"),
    ]  # fmt: skip
    assert len({*bundle, *layout.RUN_FILES}) == len(bundle) + len(layout.RUN_FILES)
