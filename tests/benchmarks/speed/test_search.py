"""FAISS at its best."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.speed import search


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, None),
        ({"threshold": 128_000}, "threshold is 128000, not 640"),
        ({"blas": {"faiss": "Zen"}}, "runs Zen, not those of HASWELL"),
        ({"blas": {}}, "runs unknown kernels"),
    ],
)
def test_a_peer_without_its_settings_is_marked(changed: Any, said: str | None) -> None:
    told: dict[str, dict[str, Any]] = {
        "as shipped": {"threshold": 128_000, "blas": {}},
        "ours": {"threshold": None, "blas": {}},
    }
    found = search.settings_doubt(told | {"HASWELL": {"threshold": 640, "blas": {"faiss": "Haswell"}} | changed}, 64)
    assert (said is None and not found) or (said or "") in found["doubt"]
