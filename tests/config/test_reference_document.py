"""TOML with comments reads back as the settings."""

from __future__ import annotations

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twotower.config.reference import WIDTH, toml_value, write_document
from twotower.config.toml import TomlValue

VALUES = st.recursive(
    st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(min_size=1), inner, max_size=3),
    max_leaves=8,
)


@given(VALUES)
def test_a_value_reads_back(value: TomlValue) -> None:
    line = toml_value(value)
    assert "\n" not in line
    assert tomllib.loads(f"v = {line}")["v"] == value


SETTINGS: dict[str, TomlValue] = {
    "data": {"interactions": "a b.csv", "format": {"layout": "sequences"}},
    "schema": {
        "events": {"a b": 1, "*": "ignored"},
        "features": [{"kind": "text", "name": "t"}, {"kind": "numeric", "name": "n"}],
    },
    "model": {
        "width": 8,
        "pairs": [{"user": {"layers": [8]}, "item": {"layers": []}}, {"user": {"join": "sum"}, "item": {}}],
    },
    "train": {"epochs": 3, "optimizer": {"kind": "Adam", "beta2": 0.98}},
}


def test_a_document_reads_back_and_holds_the_comments() -> None:
    text = write_document(
        SETTINGS, "Head line\n" + "long " * 60, {"train.epochs": "Three.", "schema.features.1": "why"}
    )
    assert tomllib.loads(text) == SETTINGS
    assert text.startswith("# Head line\n# long long")
    assert "epochs = 3  # Three." in text
    assert '{ kind = "numeric", name = "n" },  # why' in text
    assert "width = 8  # " in text  # its meaning in the reference
    assert max(map(len, text.splitlines())) <= WIDTH + 2


@pytest.mark.parametrize("text", ["line\nbreak", "tab\tand # hash", "\x00\u2028 controls"])
def test_a_comment_is_no_line_of_its_own(text: str) -> None:
    assert tomllib.loads(write_document({"train": {"epochs": 3}}, text, {"train.epochs": text})) == {
        "train": {"epochs": 3}
    }
