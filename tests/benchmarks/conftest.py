"""Results of scripts without the limits of the machine."""

from __future__ import annotations

import pytest

from benchmarks.lib import report


@pytest.fixture(autouse=True)
def no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits that are not measured: the machine is busy."""
    bounds = {"fp32_gflops": 100.0, "bf16_gflops": 200.0, "read_gb_per_s": 10.0}
    monkeypatch.setattr(report, "limits", lambda threads: {"threads": threads} | bounds)
