"""What trainings, exports, searches and requests give is what they gave before, within rounding."""

from __future__ import annotations

import json
from typing import get_args

import golden
import numpy as np
import pytest

from twotower import index
from twotower.data import split
from twotower.features import schema
from twotower.index.protocol import IndexConfig
from twotower.model import branches, two_tower
from twotower.model.pooling import POOLINGS
from twotower.train.losses import LOSSES
from twotower.train.optimizers import OPTIMIZERS

KEPT = json.loads(golden.FILE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", golden.PORTABLE)
def test_numbers_are_what_they_were(case: str) -> None:
    found = golden.numbers(golden.CASES[case]())
    assert found.keys() == KEPT[case].keys()
    for name, expected in KEPT[case].items():
        bound = np.full(len(expected), 1e-5)
        if name != "weights":  # the first is a sum, in which terms cancel; the second is that of their sizes
            bound[0] *= max(1.0, expected[1])
        difference = np.abs(np.subtract(found[name], expected))
        assert (difference <= bound * np.maximum(1.0, np.abs(expected))).all(), f"{case}: {name}: {found[name]}"


def test_every_kind_has_a_case() -> None:
    names = " ".join(golden.TRAININGS)
    for group, found in (
        ("loss", LOSSES.names),
        ("optimizer", OPTIMIZERS.names),
        # A column and files give parts and draw none: tests/data/test_parts.py.
        ("split", set(get_args(split.SplitConfig.model_fields["kind"].annotation)) - {"column", "files"}),
        ("similarity", get_args(two_tower.ModelConfig.model_fields["similarity"].annotation)),
        ("branch", branches.BRANCHES.names),
        ("pooling", POOLINGS.names),
        (
            "negatives",
            ("random", "full", "uniform", "popularity", "cross_batch_memory", "disliked", "hard", "attribute"),
        ),
    ):
        for kind in found:
            assert f"{group} {kind}" in names, f"{group} {kind}"
    assert set(schema.FEATURES.names) == {
        f.kind for s in (golden.IN_CONTEXT, golden.BESIDE, golden.DATED) for f in s.features
    }
    assert {case.split()[1] for case in golden.CASES if case.startswith("index")} == {
        kind.kind for kind in index.INDEXES if not kind.remote and kind.choose is IndexConfig.choose
    }
