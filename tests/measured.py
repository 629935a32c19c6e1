"""Results that the tests of the benchmarks share."""

from __future__ import annotations

from typing import Any

from benchmarks.lib import report

SPEED, QUALITY = "train_speed: training", "rank_quality: examples/recipes/ranking.toml, test AUC"


def speed(**changed: Any) -> Any:
    given: dict[str, Any] = {"peers": {"torch-rechub 0.9.0": [100.0, 120.0], "RecBole 1.2.1": [50.0]}, "floor": 4000.0}
    return report.result(SPEED, [1000.0, 1200.0, 900.0], "rows/s", **given | changed)


def results() -> Any:
    made = [speed(), report.result(QUALITY, [0.826, 0.828], "", interval=[0.82, 0.83], width=258)]
    made.append(report.result("rank_quality: DSSM, shown pairs only, test AUC", [0.81], ""))
    return {r["name"]: r for r in made}
