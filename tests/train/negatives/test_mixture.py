"""What stands against a positive: drawn as often as it says, masked exactly, mined from the right ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from candidate_worlds import ROW, batch_of, columns_of, liked_of, own_items, positives, world
from context_worlds import HOUR, flat, hourly, hourly_schema
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from twotower.arrays.ragged import Ragged
from twotower.config.experiment import Config
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.splits import TEST, TRAIN
from twotower.data.tables import check
from twotower.evaluation.factors import Factors
from twotower.features.multi_hot import MultiHot
from twotower.features.numeric import Numeric
from twotower.train.negatives.candidates import Candidates, Exclusions
from twotower.train.negatives.config import NegativesConfig
from twotower.train.negatives.mixture import CandidateSampler, ContextPositives
from twotower.train.samplers import PairSampler, PositiveSampler


def refreshed(sampler: CandidateSampler, users: Tensor, items: Tensor, epoch: int) -> None:
    sampler.begin_epoch(lambda: Factors(users, items), epoch)


def same(a: Candidates | Exclusions | None, b: Candidates | Exclusions | None) -> bool:
    if a is None or b is None:
        return a is b
    pairs = [(getattr(a, f), getattr(b, f)) for f in vars(a)]
    return all(
        np.array_equal(x, y) if isinstance(x, np.ndarray)
        else torch.equal(x, y) if isinstance(x, Tensor)
        else same(x, y) if isinstance(x, Exclusions)
        else x == y
        for x, y in pairs
    )  # fmt: skip


# ---- how often


def zipf(board: Dataset) -> Dataset:
    """Item i is liked by about 40 / (1 + i) of 40 users, items 25 to 29 by nobody; some dislikes."""
    rows = [((7 * u + i) % 40, i, True) for i in range(25) for u in range(max(1, 40 // (1 + i)))]
    return world(board, rows + [((3 * i + 1) % 40, i, False) for i in range(20, 30)])


MIXTURES: dict[str, dict[str, Any]] = {
    "in batch": {},
    "uniform": {"in_batch": False, "uniform": 25},
    "popularity": {"in_batch": False, "popularity": {"n": 25, "alpha": 1.0}},
    "popularity^0.5": {"in_batch": False, "popularity": {"n": 25, "alpha": 0.5}},
    "popularity^0": {"in_batch": False, "popularity": {"n": 25, "alpha": 0.0}},
    "uniform and memory": {"in_batch": False, "uniform": 10, "cross_batch_memory": 70},
    "all": {"uniform": 10, "popularity": 15, "cross_batch_memory": 70},
}

DRAWN = {"in batch": 0, "uniform and memory": 10} | dict.fromkeys(
    ("uniform", "popularity", "popularity^0.5", "popularity^0", "all"), 25
)
"""Items that the sources of each mixture draw for a batch."""


@pytest.mark.parametrize("name", MIXTURES)
def test_the_mean_count_of_an_item_is_the_exponential_of_its_log_q(board: Dataset, name: str) -> None:
    data, config = zipf(board), NegativesConfig(**MIXTURES[name])
    sampler, source = CandidateSampler(data, config, seed=3), PositiveSampler(data, seed=5)
    n, batch, step = len(data.items), 20, 0
    seen, expected = np.zeros(n), np.zeros(n)
    for number in range(80):
        epoch = source.epoch(number)
        for start in range(0, len(epoch), batch):
            user, item = epoch.all.user[start : start + batch], epoch.all.item[start : start + batch]
            c = sampler(batch_of(user, item), step)
            step += 1
            columns = columns_of(c)
            np.add.at(seen, columns, c.counts.numpy())
            # Expected of every item, also of those that were not drawn.
            log_q = sampler.log_q(np.arange(n), len(user))
            expected += np.exp(log_q.astype(np.float64))
            np.testing.assert_allclose(c.log_q.numpy(), log_q[columns], rtol=1e-6)
            assert c.counts[: c.shared].sum() == DRAWN[name] + MIXTURES[name].get("in_batch", True) * len(user)
            sampler.remember(torch.from_numpy(item.astype(np.int64)), torch.zeros(len(item), 1), torch.ones(len(item)))
    assert len(c.memory_items) == config.remembered
    # A count is a sum of draws, each in the memory up to 70 / 20 + 1 times: its variance is at most so many means.
    times = 5 if config.remembered else 1
    off = (seen - expected) / np.sqrt(times * np.maximum(expected, 0.2))
    assert np.abs(off).max() < 4.5, off
    assert seen.sum() == pytest.approx(expected.sum(), rel=1e-3)
    # And it is not any density: that of another source is far away.
    popular = np.bincount(data.train.item[data.train.positive], minlength=n) / data.train.positive.sum()
    other = expected.sum() * (popular if name == "uniform" else np.ones(n) / n)
    other = np.maximum(other, 0.2)
    assert np.abs((seen - other) / np.sqrt(times * other)).max() > (4.5 if name == "uniform and memory" else 9)


def test_popularity_counts_what_was_liked_in_training_and_nothing_else(board: Dataset) -> None:
    rows = [(u, 1, True) for u in range(8)] + [(u, 2, True) for u in range(2)] + [(u, 3, False) for u in range(9)]
    data = world(board, [*rows, *((u, 4, True) for u in range(9))])
    data = replace(data, parts=np.array([TRAIN] * len(rows) + [TEST] * 9, np.int8))
    config = NegativesConfig(in_batch=False, popularity={"n": 1, "alpha": 1.0})
    told = np.exp(CandidateSampler(data, config, 1).log_q(np.arange(6), 0))
    assert told.tolist() == pytest.approx([0, 0.8, 0.2, 0, 0, 0])
    rooted = np.exp(
        CandidateSampler(data, NegativesConfig(in_batch=False, popularity={"n": 1, "alpha": 0.5}), 1).log_q(
            np.arange(6), 0
        )
    )
    assert rooted.tolist() == pytest.approx([0, 2 / 3, 1 / 3, 0, 0, 0])


@pytest.mark.parametrize(
    ("source", "drawn"), [({"full": {"cold": False}}, 3), ({"uniform": {"n": 400, "cold": False}}, 400)]
)
def test_items_that_training_lacks_are_no_candidates_unless_they_are_cold(
    board: Dataset, source: dict[str, dict[str, Any]], drawn: int
) -> None:
    rows = [(0, 1, True), (1, 2, True), (2, 5, True), (0, 3, True), (1, 4, True)]
    parts = np.array([TRAIN] * 3 + [TEST] * 2, np.int8)
    data = replace(world(board, rows), parts=parts)
    user, item = positives(data, 3)
    c = CandidateSampler(data, NegativesConfig.model_validate({"in_batch": False, **source}), 1)(
        batch_of(user, item), 0
    )
    assert sorted(columns_of(c)) == [1, 2, 5]
    assert c.counts.sum() == drawn
    assert c.log_q.exp().tolist() == pytest.approx([drawn / 3] * 3)
    both = {kind: {**options, "cold": True} for kind, options in source.items()}
    every = NegativesConfig.model_validate({"in_batch": False, **both})
    assert set(columns_of(CandidateSampler(data, every, 1)(batch_of(user, item), 0))) == set(range(30))


# ---- what is not there


@settings(
    deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    rows=st.lists(ROW, min_size=1, max_size=60, unique_by=lambda row: row[:2]),
    memory=st.lists(st.integers(0, 29), max_size=12),
    mask=st.booleans(),
    in_batch=st.booleans(),
    step=st.integers(0, 99),
)
def test_a_users_other_positives_are_no_candidates_and_its_own_positive_stays(
    board: Dataset, rows: list[tuple[int, int, bool]], memory: list[int], mask: bool, in_batch: bool, step: int
) -> None:
    data = world(board, [*rows, (39, 3, True)])
    config = NegativesConfig(
        in_batch=in_batch, uniform=9, popularity=4, cross_batch_memory=12, disliked=2,
        hard={"n": 2, "ranks": [1, 20], "ratio": 1},
        mask_positives=mask,
    )  # fmt: skip
    sampler = CandidateSampler(data, config, seed=4)
    rng = torch.Generator().manual_seed(step)
    refreshed(sampler, torch.randn(40, 3, generator=rng), torch.randn(30, 3, generator=rng), 1)
    user, item = positives(data, 20, step)
    if memory:
        sampler.remember(torch.tensor(memory), torch.zeros(len(memory), 1), torch.ones(len(memory)))
    c = sampler(batch_of(user, item), step)
    liked, columns = liked_of(data), columns_of(c)
    assert len(set(c.items.tolist())) == len(c.items)
    assert columns[len(columns) - len(memory) :] == memory
    assert len(columns) == len(c.counts) == len(c.log_q) == c.shared + len(memory)
    for part in (slice(0, 7), slice(7, 20)):  # as the blocks of a contest ask
        logits = torch.zeros(len(user[part]), len(columns))
        c.mask_excluded(logits, part)
        for b, row in enumerate(logits.isfinite().tolist(), part.start):
            own = int(c.positive[b])
            assert columns[own] == item[b]
            assert own < c.shared
            gone = liked[int(user[b])] if mask else {int(item[b])} if memory else set()
            # Its own column is put back by the contest, and is the only one of that item there may be.
            there = [x or column == own for column, x in enumerate(row)]
            assert there == [column == own or i not in gone for column, i in enumerate(columns)]
            assert sum(x and i == item[b] for x, i in zip(there, columns, strict=True)) == 1
    for b, row in enumerate(own_items(c)):
        assert not set(row) & liked[int(user[b])]
        assert item[b] not in row


# ---- mined


@pytest.mark.parametrize(("ranks", "kept"), [((1, 10), 10), ((2, 2), 1), ((1, 500), 14)])
@pytest.mark.parametrize(("ratio", "each"), [(1.0, 2.0), (40.0, 1.5), (120.0, 0.5), (6000.0, 0.01)])
def test_so_many_are_mined_that_the_others_outnumber_them_as_asked_and_never_more_than_hard(
    board: Dataset, ranks: tuple[int, int], kept: int, ratio: float, each: float
) -> None:
    """60 others a positive: at least `ratio` of them for each mined one, on average, at most two mined ones."""
    config = NegativesConfig(in_batch=False, uniform=60, hard={"n": 2, "ranks": [*ranks], "ratio": ratio})
    sampler = CandidateSampler(board, config, seed=1)
    user, item = positives(board, 300)
    assert sampler(batch_of(user, item), 0).per_positive.shape[1] == 0  # nothing is mined yet
    rng = torch.Generator().manual_seed(0)
    refreshed(sampler, torch.randn(40, 4, generator=rng), torch.randn(30, 4, generator=rng), 1)
    counts, seen = [], set()
    for step in range(20):
        c = sampler(batch_of(user, item), step)
        found = own_items(c)
        counts += [len(row) for row in found]
        assert all(len(set(row)) == len(row) for row in found)
        seen |= {(u, i) for u, row in zip(user.tolist(), found, strict=True) for i in row}
    assert max(counts) <= 2
    wanted = min(each, kept)
    assert np.mean(counts) == pytest.approx(wanted, abs=0.05 if wanted % 1 else 1e-9)
    if each == 2:
        at_least = sum(min(kept, 30 - len(liked)) for u, liked in liked_of(board).items() if u in set(user.tolist()))
        assert len(seen) >= at_least  # every mined item has its turn


def test_others_of_mined_items_are_candidates_whatever_they_weigh(board: Dataset) -> None:
    user, item = positives(board, 60)
    drawn = []
    for weight in (None, *(np.full(60, w, np.float32) for w in (1, 0.01, 50))):
        sampler = CandidateSampler(board, NegativesConfig(hard={"n": 2, "ranks": [1, 10], "ratio": 40}), seed=1)
        rng = torch.Generator().manual_seed(0)
        refreshed(sampler, torch.randn(40, 4, generator=rng), torch.randn(30, 4, generator=rng), 1)
        drawn.append([sampler(batch_of(user, item, weight), step).per_positive.tolist() for step in range(8)])
    assert 0 < sum(place >= 0 for step in drawn[0] for row in step for place in row) < 8 * 60 * 2
    assert drawn[1:] == drawn[:1] * 3


# ---- the same again

EVERY_SOURCE = NegativesConfig(
    uniform=20, popularity=20, random=3, disliked=2, hard={"n": 2, "ranks": [1, 20], "ratio": 7},
    attribute={"feature": "brand", "n": 2}, cross_batch_memory=30,
)  # fmt: skip


def test_a_draw_looks_at_the_rows_of_its_batch_alone(everything_data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lengths of all rows are a pass over all users, or all items: seconds a batch where there are many."""
    sampler = CandidateSampler(everything_data, EVERY_SOURCE, seed=1)
    rng = torch.Generator().manual_seed(0)

    def of_all_rows(self: Ragged) -> None:
        raise AssertionError("the lengths of all rows")

    monkeypatch.setattr(Ragged, "lengths", property(of_all_rows))
    refreshed(sampler, torch.randn(60, 4, generator=rng), torch.randn(40, 4, generator=rng), 1)
    assert sampler(batch_of(*positives(everything_data, 20)), 0).per_positive.shape[1] == 9


def test_random_candidates_count_among_the_others_that_mined_ones_are_measured_by(board: Dataset) -> None:
    rng = torch.Generator().manual_seed(0)
    vectors = torch.randn(40, 4, generator=rng), torch.randn(30, 4, generator=rng)
    user, item = positives(board, 300)
    means = []
    for random in (0, 10):
        config = NegativesConfig(
            in_batch=False, uniform=10, random=random, hard={"n": 2, "ranks": [1, 10], "ratio": 20}
        )
        sampler = CandidateSampler(board, config, seed=1)
        refreshed(sampler, *vectors, 1)
        means.append(
            np.mean([int((sampler(batch_of(user, item), s).per_positive[:, -2:] >= 0).sum()) / 300 for s in range(20)])
        )
    assert means == pytest.approx([0.5, 1.0], abs=0.05)


@pytest.fixture(scope="module")
def data() -> Dataset:
    """A log with contexts of a code, a number and a bag, of which some of a user are equal, and random items."""
    users, items, actions = hourly(400)
    rng = np.random.default_rng(2)
    some = rng.integers(0, 3, actions.height)
    actions = actions.with_columns(
        hour=pl.Series(rng.integers(0, 2, actions.height)),
        item_id=pl.Series(rng.integers(0, 16, actions.height)),
        price=pl.Series(rng.integers(0, 2, actions.height).astype(float)),
        tags=pl.Series([["a", "b", "c"][:k] if k < 2 else ["b"] for k in some]),
    )
    schema = hourly_schema(HOUR, Numeric(name="price", side="context"), MultiHot(name="tags", side="context"))
    return build_dataset(check(users, items, actions, schema), schema, Config().split)


def moment(data: Dataset, row: int) -> tuple[object, ...]:
    """User and context of an interaction."""
    bag = data.context["tags"]
    assert isinstance(bag, Ragged)
    code, number = int(flat(data, "hour")[row]), float(flat(data, "price")[row, 0])
    return int(data.pairs.user[row]), code, number, tuple(bag.row(row).tolist())


def in_the_same_context(data: Dataset, row: int) -> set[int]:
    rows = np.flatnonzero((data.parts == TRAIN) & data.pairs.target)
    return {int(data.pairs.item[j]) for j in rows.tolist() if moment(data, j) == moment(data, row)}


def test_positives_of_the_same_context_are_found(data: Dataset) -> None:
    rows = data.positive_indices[::3]
    items, lengths = ContextPositives(data)(data.pairs.user[rows], rows)
    found = np.split(items, np.cumsum(lengths)[:-1])
    expected = [in_the_same_context(data, row) for row in rows.tolist()]
    assert [set(f.tolist()) for f in found] == expected
    assert max(map(len, expected)) > 1


@pytest.mark.parametrize("negatives", [{"full": True}, {"random": 6}], ids=["shared", "per-positive"])
def test_candidates_lack_the_positives_of_the_context_and_no_others(
    data: Dataset, negatives: dict[str, object]
) -> None:
    sampler = CandidateSampler(data, NegativesConfig(**negatives), seed=1)  # type: ignore[arg-type]
    batch = PositiveSampler(data, seed=2).epoch(0).take(0, slice(0, 60))
    drawn = sampler(batch, 0)
    for b, row in enumerate(batch.source.tolist()):
        gone = in_the_same_context(data, row) - {int(batch.item[b])}
        assert not gone & {int(drawn.items[j]) for j in drawn.per_positive[b].tolist() if j >= 0}
        assert drawn.exclusions is not None
        group = int(drawn.exclusions.group[b])
        first, end = drawn.exclusions.offsets[group : group + 2].tolist()
        left_out = {int(drawn.items[c]) for c in drawn.exclusions.columns[first:end].tolist()}
        present = {int(i) for i in drawn.items[: drawn.shared]}
        assert left_out - {int(batch.item[b])} == gone & present


def test_without_a_mask_nothing_is_left_out(data: Dataset) -> None:
    sampler = CandidateSampler(data, NegativesConfig(full=True, mask_positives=False), seed=1)
    batch = PositiveSampler(data, seed=2).epoch(0).take(0, slice(0, 20))
    assert sampler(batch, 0).exclusions is None


def test_a_drawn_pair_has_the_context_of_its_positive_and_no_item_that_is_right_in_it(data: Dataset) -> None:
    epoch = PairSampler(data, NegativesConfig(random=4), seed=3).epoch(0)
    drawn = epoch.all.source < 0
    positives = ~epoch.all.source[drawn]
    assert drawn.sum() == 4 * len(data.positive_indices)
    assert np.array_equal(
        np.bincount(positives, minlength=len(data.pairs)) > 0,
        np.isin(np.arange(len(data.pairs)), data.positive_indices),
    )
    assert np.array_equal(data.pairs.user[positives], epoch.all.user[drawn])
    right = [
        int(item) in in_the_same_context(data, row)
        for item, row in zip(epoch.all.item[drawn], positives.tolist(), strict=True)
    ]
    assert (epoch.all.item[drawn] != data.pairs.item[positives])[right].any()
    assert np.array_equal(epoch.all.weight[drawn] == 0, right)
