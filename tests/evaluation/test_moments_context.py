"""Vectors in the context of an interaction, with versions of users and items."""

from __future__ import annotations

import numpy as np
import pytest
from version_worlds import CHANGING_SCHEMA, changing
from worlds import settings

from twotower import api
from twotower.data.splits import TEST
from twotower.evaluation.moments import ContextFactors
from twotower.features.hour_of_day import HourOfDay
from twotower.features.side import SIDES
from twotower.runs import Run
from twotower.train.factors import _tensors, context_factors


@pytest.fixture(scope="module")
def run() -> Run:
    """A model of users and items with versions that reads the hour."""
    schema = CHANGING_SCHEMA.model_copy(update={"features": (*CHANGING_SCHEMA.features, HourOfDay(name="hour"))})
    config = settings(train={"epochs": 1}, loss={"kind": "softmax"}, negatives={"uniform": 8})
    return api.fit(changing(), schema, config)


def test_a_pair_has_the_versions_and_the_context_of_its_interaction(run: Run) -> None:
    data, factors = run.dataset, run.factors_during(TEST)
    assert isinstance(factors, ContextFactors)
    rows = data.part_indices(TEST)
    scores = factors.part_scores(data, TEST)
    users, items = data.pairs.user[rows].astype(np.int64), data.pairs.item[rows]
    catalogue = factors.catalogue_scores(users, rows).cpu().numpy()
    assert catalogue.shape == (len(rows), len(data.items))
    np.testing.assert_allclose(catalogue[np.arange(len(rows)), items], scores, rtol=1e-4, atol=1e-5)
    versions = data.items.versions
    assert versions is not None
    expected = factors.of_users(users, rows) @ factors.items.T
    for n in range(0, len(rows), 9):
        for item in range(len(data.items)):
            held = versions.at(np.array([item]), data.times[rows[n : n + 1]])[0]
            assert catalogue[n, item] == pytest.approx(float(expected[n, held]), rel=1e-4, abs=1e-5)


def test_another_moment_gives_another_vector(run: Run) -> None:
    data, factors = run.dataset, run.factors_during(TEST)
    assert isinstance(factors, ContextFactors)
    hours = data.context["hour"]
    assert isinstance(hours, np.ndarray)
    one, other = int(np.argmin(hours)), int(np.argmax(hours))
    user = np.zeros(1, np.int64)
    a, b = (factors.of_users(user, np.array([row])).numpy() for row in (one, other))
    assert not np.allclose(a, b)
    assert len(factors.of_users(user[:0], user[:0])) == 0


def test_vectors_do_not_depend_on_the_block(run: Run) -> None:
    data = run.dataset
    sides = [data.side_before(side, TEST).by_version() for side in SIDES]
    users, items = _tensors(run.model, data, sides, data.context)
    rows = data.part_indices(TEST)
    user = data.pairs.user[rows].astype(np.int64)
    found = [context_factors(run.model, users, items, data, block, codes) for block, codes in ((4096, 2**20), (7, 30))]
    one, other = (f.of_users(user, rows).numpy() for f in found)
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
