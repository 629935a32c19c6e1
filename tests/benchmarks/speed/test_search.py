"""FAISS at its best."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.lib import page, report
from benchmarks.speed import search


def test_faiss_runs_with_the_settings_that_its_row_states(tmp_path: Path) -> None:
    words = "--scale 3000 --width 32 --batch 16 --k 5 --rounds 1 --threads 2 --kinds= --out"
    chosen = report.options(search.__file__, [*words.split(), str(tmp_path / "found.json")])
    with report.Report(chosen, "search_speed") as told:
        search.main(chosen, told)
    batch, single = json.loads((tmp_path / "found.json").read_text())["results"]
    for found in (batch, single):
        best, shipped = found["peer"]
        assert (best.partition(", ")[2], shipped.partition(", ")[2]) == ("at its best", "as shipped")
        assert "distance_compute_blas_threshold=320" in found["settings"][best]
        assert "doubt" not in found
        assert found["agreement_with_faiss"] == 1
        for way, kernels in found["blas"].items():
            assert kernels["faiss"], way
            assert way not in search.KERNELS or kernels["faiss"].upper() == way
        assert {"faiss flat, as shipped", "search, ours"} < set(found["tried"])
        assert {way.partition(",")[0] for way in found["tried"]} >= {"faiss flat", "faiss knn", "faiss shards"}
    text = page.page({batch["name"]: batch}, {}, [], [], "2026-01-31")
    assert "at its best (distance_compute_blas_threshold=320, OPENBLAS_CORETYPE=" in text


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
