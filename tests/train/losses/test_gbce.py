"""The beta of gbce is the one of its paper."""

from __future__ import annotations

import pytest

from twotower.train.losses.gbce import Gbce


def test_the_beta_of_gbce_is_the_one_of_the_paper() -> None:
    # gSASRec, section 5: beta(t = 0) = 1 is BCE, beta(t = 1) = alpha; everything sampled needs no correction.
    assert Gbce(calibration=0).beta(0.1) == 1
    assert Gbce(calibration=1).beta(0.1) == pytest.approx(0.1)
    assert Gbce().beta(0.1) == pytest.approx(1 - 0.75 * 0.9)
    assert Gbce(calibration=1).beta(1.0) == Gbce(calibration=0.5).beta(1.0) == 1
