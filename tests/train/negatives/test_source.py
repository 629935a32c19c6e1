"""Every source of negatives keeps its protocol: those that are registered, and the example from outside the package."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from candidate_worlds import batch_of, columns_of, own_items, positives
from mykinds.negatives import Recent
from trainers import contrastive, same
from worlds import settings

from twotower.data.dataset import Dataset
from twotower.errors import ConfigError
from twotower.evaluation.factors import Factors
from twotower.train.negatives import SOURCES
from twotower.train.negatives.attribute import AttributeNegatives
from twotower.train.negatives.config import NegativesConfig
from twotower.train.negatives.hard import HardNegatives
from twotower.train.negatives.in_batch import InBatchNegatives
from twotower.train.negatives.mixture import CandidateSampler
from twotower.train.negatives.source import (
    NegativeSource,
    PairSource,
    PerPositiveSource,
    SharedSource,
)
from twotower.train.samplers import PairSampler
from twotower.train.trainer import Trainer

OPTIONS: dict[str, NegativeSource] = {
    "attribute": AttributeNegatives(feature="brand", n=3),
    "hard": HardNegatives(n=2, ranks=(1, 20), ratio=1),
    "cross_batch_memory": SOURCES.parse({"kind": "cross_batch_memory", "n": 30}),
}
ALL = [*(OPTIONS.get(kind.kind) or kind() for kind in SOURCES), Recent(n=40)]
SHARED = [source for source in ALL if isinstance(source, SharedSource)]
PER_POSITIVE = [source for source in ALL if isinstance(source, PerPositiveSource)]
PAIRS = [source for source in ALL if isinstance(source, PairSource)]
each = pytest.mark.parametrize("source", ALL, ids=lambda s: s.kind)
CPU = torch.device("cpu")


def vectors(data: Dataset, seed: int = 0) -> Factors:
    rng = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(len(data.users), 4, generator=rng), torch.randn(len(data.items), 4, generator=rng))


def prepared(source: NegativeSource, data: Dataset, seed: int = 3, mask_positives: bool = True) -> CandidateSampler:
    """A mixture in its second epoch, after a batch: the source alone, or per-positive ones beside those of the
    batch."""
    beside = (InBatchNegatives(),) if source in PER_POSITIVE else ()
    sampler = CandidateSampler(data, NegativesConfig(sources=(*beside, source), mask_positives=mask_positives), seed)
    sampler.begin_epoch(lambda: vectors(data), 1)
    if source.remembered:
        earlier = np.random.default_rng(5).integers(0, len(data.items), 50)
        sampler.remember(torch.from_numpy(earlier), torch.ones(50, 4), torch.ones(50))
    return sampler


def batches(
    data: Dataset, sampler: CandidateSampler, n: int = 40
) -> Iterator[tuple[list[int], list[list[int]], np.ndarray]]:
    """The drawn items of some batches: those of the columns with their counts, and those of each positive."""
    user, item = positives(data, 30)
    for step in range(n):
        c = sampler(batch_of(user, item), step)
        yield columns_of(c), own_items(c), c.counts.numpy()


@each
def test_a_source_is_documented_and_is_read_from_what_it_is_written_as(source: NegativeSource) -> None:
    assert (source in SHARED) != (source in PER_POSITIVE)
    assert source.gives_pairs == (source in PAIRS)
    first_sentence = " ".join((type(source).__doc__ or "").split()).partition(". ")[0]
    assert 10 < len(first_sentence) < 120, "it stands in a table of the reference"
    assert all(info.description for info in type(source).model_fields.values())
    config = NegativesConfig(sources=(source,))
    written = config.model_dump(mode="json")
    assert NegativesConfig.model_validate(written) == config
    assert {*SOURCES.names} <= written.keys()
    assert [kind for kind, options in written.items() if options and kind != "mask_positives"] == [source.kind]


@each
def test_draws_depend_on_the_seed_and_the_step_alone(source: NegativeSource, everything_data: Dataset) -> None:
    user, item = positives(everything_data, 30)
    one, other, seeded = (prepared(source, everything_data, seed) for seed in (3, 3, 4))
    drawn = [one(batch_of(user, item), step) for step in range(3)]
    np.random.seed(3)
    torch.manual_seed(3)
    before = torch.random.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"].tolist()
    for step in (2, 0, 1):
        again = other(batch_of(user, item), step)
        assert (again.items == drawn[step].items).all()
        assert torch.equal(again.per_positive, drawn[step].per_positive)
        assert torch.equal(again.counts, drawn[step].counts)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert np.random.get_state(legacy=False)["state"]["key"].tolist() == before[1]
    if source.draws and not source.exclusive and not source.remembered:
        assert any(
            not np.array_equal(a.items, b.items) or not torch.equal(a.per_positive, b.per_positive)
            for a, b in ((drawn[step], seeded(batch_of(user, item), step)) for step in range(3))
        )


@pytest.mark.parametrize("source", SHARED, ids=lambda s: s.kind)
def test_the_mean_count_of_an_item_is_its_expected_number_of_draws(
    source: SharedSource, everything_data: Dataset
) -> None:
    data, n = everything_data, len(everything_data.items)
    rng, seen, expected = np.random.default_rng(0), np.zeros(n), np.zeros(n)
    sampler = source.build(data, 3, CPU)
    rows = data.positive_indices
    for _ in range(400):
        item = data.pairs.item[rng.choice(rows, 30)]
        found = sampler.draw(item, rng)
        assert found.min(initial=0) >= 0
        assert found.max(initial=0) < n
        seen += np.bincount(found, minlength=n)
        if sampler.memory is not None:
            seen += np.bincount(sampler.memory.items.numpy(), minlength=n)
            assert len(sampler.memory.items) <= source.remembered
        expected += sampler.expected(np.arange(n), len(item))
        if source.remembered:
            sampler.remember(torch.from_numpy(item.astype(np.int64)), torch.zeros(len(item), 2), torch.ones(len(item)))
    times = 4 if source.remembered else 1
    assert np.abs((seen - expected) / np.sqrt(times * np.maximum(expected, 1))).max() < 4.5
    assert seen.sum() == pytest.approx(expected.sum(), rel=0.02)


@pytest.mark.parametrize("source", PER_POSITIVE, ids=lambda s: s.kind)
def test_what_is_drawn_for_a_positive_is_no_positive_of_its_user_and_differs(
    source: PerPositiveSource, everything_data: Dataset
) -> None:
    data = everything_data
    liked = {(u, i) for u, i, p in zip(data.train.user, data.train.item, data.train.positive, strict=True) if p}
    user, item = positives(data, 30)
    seen: set[int] = set()
    for _, own, _ in batches(data, prepared(source, data)):
        for u, i, row in zip(user.tolist(), item.tolist(), own, strict=True):
            assert len(set(row)) == len(row)
            assert i not in row
            assert not {(u, j) for j in row} & liked
            seen |= set(row)
    assert len(seen) > 5


@each
def test_every_positive_has_a_candidate_of_a_certain_source_and_exclusive_ones_are_the_catalogue(
    source: NegativeSource, everything_data: Dataset
) -> None:
    data = everything_data
    _, item = positives(data, 30)
    for columns, own, counts in batches(data, prepared(source, data, mask_positives=False), 3):
        shared = {i for i, n in zip(columns, counts, strict=True) if n}
        drawn = [{*row} if source in PER_POSITIVE else shared - {i} for i, row in zip(item.tolist(), own, strict=True)]
        assert all(drawn) or not source.certain
        assert shared == set(range(len(data.items))) or not source.exclusive
        assert not set.union(*drawn) <= {*item.tolist()} or not source.beyond_batch


@each
def test_a_source_continues_from_its_state(source: NegativeSource, everything_data: Dataset) -> None:
    whole, again = prepared(source, everything_data), prepared(source, everything_data, seed=4)
    state = whole.samplers[source.kind].state()
    fresh = CandidateSampler(everything_data, NegativesConfig(sources=(source,)), 3).samplers[source.kind]
    assert bool(state) == source.warms_up
    fresh.load_state({})
    assert not fresh.state(), "before the first epoch"
    again.samplers[source.kind].load_state(state)
    assert same(again.samplers[source.kind].state(), state)


@pytest.mark.parametrize("source", PAIRS, ids=lambda s: s.kind)
def test_pairs_are_drawn_for_users_that_there_is_an_item_for_and_carry_their_share(
    source: PairSource, everything_data: Dataset
) -> None:
    source = source.model_copy(update={"n": 2, "share": 0.4})
    epoch = PairSampler(everything_data, NegativesConfig(sources=(source,)), seed=1).epoch(0)
    drawn, negative = epoch.all.source < 0, epoch.all.label == 0
    assert drawn.any()
    assert negative[drawn].all()
    assert epoch.all.weight[drawn].sum() / epoch.all.weight[negative].sum() == pytest.approx(0.4, rel=1e-5)
    assert source.build_pairs(everything_data).can_draw(epoch.all.user[drawn]).all()


@pytest.mark.parametrize("source", [s for s in ALL if s.draws], ids=lambda s: s.kind)
def test_a_source_trains_and_its_tensors_are_in_the_checkpoint(
    source: NegativeSource, everything_data: Dataset
) -> None:
    negatives = {"sources": (SOURCES.find("in_batch")(), source)}
    config = settings(loss={"kind": "softmax"}, negatives=negatives, train={"epochs": 2, "batch_size": 100})
    trainer = Trainer(everything_data, config)
    history = trainer.run().history
    assert all(np.isfinite(h["train.loss"]) for h in history)
    found = {name.rpartition("/")[0] for name in trainer.objective.state()}
    assert found == ({source.kind} if source.warms_up else set())
    assert source.kind in contrastive(trainer).candidates.samplers


def test_sources_of_elsewhere_draw_after_the_registered_ones_by_name(everything_data: Dataset) -> None:
    class Late(Recent):
        """Another source."""

    late, recent, uniform = Late(n=5), Recent(n=5), SOURCES.parse({"kind": "uniform", "n": 5})
    config = NegativesConfig(sources=(late, recent, uniform))
    assert config.sources == (uniform, *sorted((late, recent), key=lambda source: source.kind))
    assert config == NegativesConfig(sources=(recent, uniform, late))


def test_the_example_draws_what_was_liked_lately_and_needs_a_time(everything_data: Dataset) -> None:
    recent = Recent(n=200, share=0.2)
    rows = everything_data.positive_indices
    times = everything_data.times[rows]
    latest = set(everything_data.pairs.item[rows[times >= np.quantile(times, 0.8)]].tolist())
    drawn = recent.build(everything_data, 0, CPU).draw(np.zeros(1, np.int32), np.random.default_rng(0))
    assert set(drawn.tolist()) <= latest
    with pytest.raises(ConfigError, match=r"mykinds\.negatives:Recent needs a time"):
        recent.check(replace(everything_data, schema=everything_data.schema.model_copy(update={"time": ""})))
