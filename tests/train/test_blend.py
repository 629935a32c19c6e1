"""A pair has the weight that is best with the bias of cold items that is best beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch

from twotower.evaluation.factors import Factors
from twotower.train.blend import Blend

COLD = np.array([False, True])
UNIT = 2.0


def blend(of: Callable[[float, float], float], cold: bool = True) -> Blend:
    """A pair in column 1 of two items, the second of which is cold; a score by the pair's weight and by the bias of the
    cold item."""
    items = torch.tensor([[1.0, 1.0, 1.0, 0.5], [1.0, 0.0, 1.0, 0.5]])

    def measure(factors: Factors) -> Mapping[str, float]:
        warm, new = factors.items
        assert warm[-1] == 0.5
        return {"found": of(float(warm[1]) / UNIT, float(new[-1]) - 0.5)}

    return Blend(
        Factors(torch.ones(3, 4), items),
        slice(1, 2),
        UNIT,
        measure,
        lambda found: found["found"],
        COLD if cold else None,
        spread,
    )


def best(made: Blend, *given: float) -> float:
    return made.best(given, lambda weight: made.metrics(weight)["found"])


def spread(factors: Factors) -> float:
    """Return 2 without the pair, and more the greater its weight."""
    return 2 + float(factors.items[0, 1]) / UNIT


def test_each_weight_has_the_bias_that_is_best_beside_it() -> None:
    made = blend(lambda weight, bias: 10 - 9 * abs(weight - 0.1) - abs(bias - 1 - 10 * weight))
    assert best(made, 0.0, 0.1, 1.0) == pytest.approx(0.1)
    assert made.raised[0.0] == 1.0  # half a deviation
    assert made.raised[0.1] == pytest.approx(2.1)  # one, of 2.1
    assert made.raised[1.0] == 8.625  # two and a half, of 3, and the finer steps: the most


def test_a_weight_whose_bias_lies_between_the_first_steps_is_not_behind_one_whose_bias_is_a_step() -> None:
    """The best one of the weight .1 is 2.1, a deviation, that of the weight 1 is 4.125, of 3 as a deviation."""
    of = {0.1: (0.9, 2.1), 1.0: (1.0, 4.125)}

    def score(weight: float, bias: float) -> float:
        value, at = of.get(round(weight, 6), (0.0, 0.0))
        return value - abs(bias - at)

    made = blend(score)
    assert best(made, 0.1, 1.0) == 1.0
    assert made.raised[1.0] == 4.125


def test_biases_that_change_nothing_hide_no_better_one() -> None:
    made = blend(lambda weight, bias: 10 - abs(bias - 4) if bias >= 3 else 5.0)
    made.metrics(0.0)
    assert (made.raised[0.0], made.scores[0.0]) == (4.0, 10.0)


def test_of_weights_that_are_as_good_beside_cold_items_the_least_is_taken() -> None:
    def of(weight: float, bias: float) -> float:
        return {0.0: 96.9, 0.1: 97.1, 1.0: 100.0}.get(round(weight, 6), 50.0)

    assert best(blend(of), 0.0, 0.1, 1.0) == 0.1
    assert best(blend(of, cold=False), 0.0, 0.1, 1.0) == 1.0
    assert best(replace(blend(of), tells_cold=True), 0.0, 0.1, 1.0) == 1.0, "a pair of columns spreads cold items too"
    assert best(blend(lambda weight, bias: 100.0 + 3.0 * (weight == 1)), 0.0, 1.0) == 0.0


def test_without_cold_items_no_bias_is_added() -> None:
    made = blend(lambda weight, bias: 1 - abs(bias) if not bias else 99.0, cold=False)
    assert best(made, 0.0, 0.3, 1.0) in (0.0, 0.3, 1.0)
    assert {*made.raised.values()} == {0.0}


def test_one_weight_is_not_measured() -> None:
    made = blend(lambda weight, bias: 0.0)
    assert best(made, 0.7) == 0.7
    assert not made.scores


@pytest.mark.parametrize(("at_one", "expected"), [(0.996, 1.0), (0.98, 2.0)])
def test_the_weight_of_a_fit_is_kept_unless_another_is_clearly_better(at_one: float, expected: float) -> None:
    """2 is the best weight given, and those beside it are worse."""
    values = {0.0: 0.5, 1.0: at_one, 2.0: 1.0}
    for is_fitted in (False, True):
        made = blend(lambda weight, _: values.get(round(weight, 3), 0.9), cold=False)
        made.tolerance = (lambda _: lambda _: 0.01) if is_fitted else None
        assert best(made, 0.0, 1.0, 2.0) == (expected if is_fitted else 2.0)


def test_weights_are_compared_by_the_vectors_that_gave_their_scores() -> None:
    """Each with the bias of the cold item that is best beside it, of weights that are worse alone."""
    made, compared = blend(lambda weight, bias: 10 - abs(weight - 2) - abs(bias - 4)), list[tuple[float, float]]()

    def shown(found: Factors) -> tuple[float, float]:
        return float(found.items[0, 1]) / UNIT, float(found.items[1, -1]) - 0.5

    def tolerance(best: Factors) -> Callable[[Factors], float]:
        compared.append(shown(best))

        def allowed(other: Factors) -> float:
            compared.append(shown(other))
            return 0.7 if len(compared) == 4 else 0.1

        return allowed

    made.tolerance = tolerance
    found = best(made, 0.0, 1.0, 2.0)
    nearest = sorted((w for w in made.scores if w), key=lambda w: abs(math.log(w)))
    assert found == nearest[2] not in (1.0, 2.0)
    assert compared == [pytest.approx((w, made.raised[w])) for w in (2.0, *nearest[:3])]


def test_a_fit_that_adds_nothing_has_the_weight_0() -> None:
    made = blend(lambda weight, _: 1.0 - 0.001 * weight, cold=False)
    made.tolerance = lambda _: lambda _: 0.01
    assert best(made, 0.0, 0.3, 1.0) == 0.0
