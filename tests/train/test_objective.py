"""Weights of interactions: weight 2 is the row twice, and weight 0 is no target, in every loss and source of
negatives."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from candidate_worlds import batch_of, world
from context_worlds import HOUR, flat, hourly, hourly_schema
from mykinds.losses import Focal
from taken import equal, rows_of, tensors
from torch import Tensor
from worlds import EVERYTHING_SCHEMA, everything, settings

from twotower.arrays.pieces import ones
from twotower.arrays.sets import DistinctRows
from twotower.config.experiment import Config
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.splits import TRAIN
from twotower.data.tables import check
from twotower.evaluation.factors import Factors
from twotower.features.schema import Schema
from twotower.features.sequence import Sequence
from twotower.features.side import SIDES, SideName
from twotower.model.inputs.code_layout import Inputs
from twotower.model.inputs.side_tensors import SideTensors
from twotower.train.contrastive import contrastive_loss
from twotower.train.losses import LOSSES
from twotower.train.losses.loss import ContrastiveLoss, PointwiseLoss
from twotower.train.negatives import SOURCES
from twotower.train.negatives.attribute import AttributeNegatives
from twotower.train.negatives.candidates import Candidates
from twotower.train.negatives.config import NegativesConfig
from twotower.train.negatives.hard import HardNegatives
from twotower.train.negatives.in_batch import InBatchNegatives
from twotower.train.negatives.mixture import CandidateSampler
from twotower.train.negatives.source import NegativeSource, SharedSource
from twotower.train.objective import Batcher, Objective, mimic
from twotower.train.samplers import PairSampler, PositiveSampler
from twotower.train.trainer import Trainer

EVERY_LOSS = [*(kind() for kind in LOSSES), Focal()]
CONTRASTIVE = [loss for loss in EVERY_LOSS if isinstance(loss, ContrastiveLoss)]
OPTIONS: dict[str, NegativeSource] = {
    "attribute": AttributeNegatives(feature="item_id", n=3),
    "hard": HardNegatives(n=2, ranks=(1, 20), ratio=1),
    "cross_batch_memory": SOURCES.parse({"kind": "cross_batch_memory", "n": 30}),
}
EVERY_SOURCE = [OPTIONS.get(kind.kind) or kind() for kind in SOURCES]
TIMES = np.array([2, 1, 3, 1, 0, 2, 1, 1])
"""Weights of the positives of a batch."""
ROWS = np.repeat(np.arange(len(TIMES)), TIMES)
"""The same batch, with each positive as a row as often as it weighs."""


def likes(board: Dataset, repeated: bool) -> Dataset:
    """Positives of eight users with their weights, or each as a row as often as it weighs; and three dislikes."""
    liked = [(user, item, True) for user, item in zip(range(8), [3, 4, 3, 5, 6, 7, 8, 3], strict=True)]
    dislikes = [(0, 20, False), (1, 21, False), (2, 22, False)]
    rows = [liked[i] for i in ROWS] if repeated else liked
    data = world(board, rows + dislikes)
    weight = np.ones(len(data.pairs), np.float32)
    if not repeated:
        weight[: len(TIMES)] = TIMES
    return replace(data, pairs=replace(data.pairs, weight=ones(len(weight)) if repeated else weight))


def drawn(data: Dataset, source: NegativeSource) -> tuple[Candidates, Tensor, Tensor, Tensor]:
    """Candidates of the batch, its weights, and random vectors."""
    beside = () if isinstance(source, SharedSource) else (InBatchNegatives(),)
    sampler = CandidateSampler(data, NegativesConfig(sources=(*beside, source)), seed=3)
    rng = torch.Generator().manual_seed(2)
    users, items = torch.randn(40, 5, generator=rng), torch.randn(30, 5, generator=rng)
    sampler.begin_epoch(lambda: Factors(users, items), 1)
    pairs = data.pairs.take(data.pairs.target)
    if source.remembered:
        remembered = torch.tensor([3, 4] if pairs.weighted else [3, 4, 3])
        weights = torch.tensor([2.0, 1] if pairs.weighted else [1.0, 1, 1])
        sampler.remember(remembered, items[remembered], weights)
    c = sampler(batch_of(pairs.user, pairs.item, np.array(pairs.weight)), 0)
    vectors = items[torch.from_numpy(c.items)]
    if c.memory_vectors is not None:
        vectors = torch.cat([vectors, c.memory_vectors])
    return c, c.weights, users[torch.from_numpy(pairs.user.astype(np.int64))], vectors


@pytest.mark.parametrize("loss", CONTRASTIVE, ids=repr)
@pytest.mark.parametrize("source", EVERY_SOURCE, ids=lambda s: s.kind)
def test_weight_2_is_the_positive_twice_and_weight_0_no_target_with_every_loss_and_source(
    board: Dataset, loss: ContrastiveLoss, source: NegativeSource
) -> None:
    c, weights, users, items = drawn(likes(board, False), source)
    assert len(weights) == 7, "weight 0 is no target"
    twice = torch.repeat_interleave(torch.arange(7), weights.long())
    whole = contrastive_loss(users.requires_grad_(), items, c, loss, 30)
    rows = contrastive_loss(users[twice], items, replace(c.take(twice), weights=torch.ones(11)), loss, 30)
    assert whole.item() == pytest.approx(rows.item(), rel=1e-6)
    one, other = (torch.autograd.grad(value, users, retain_graph=True)[0] for value in (whole, rows))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    halves = [
        contrastive_loss(users[p], items, c.take(torch.arange(7)[p]), loss, 30, total_weight=11.0)
        for p in (slice(0, 3), slice(3, 7))
    ]
    assert float(sum(h.detach() for h in halves)) == pytest.approx(whole.item(), rel=1e-6)


@pytest.mark.parametrize("source", [s for s in EVERY_SOURCE if isinstance(s, SharedSource)], ids=lambda s: s.kind)
def test_a_shared_candidate_is_drawn_and_expected_as_often_as_from_repeated_rows(
    board: Dataset, source: NegativeSource
) -> None:
    found = []
    for repeated in (False, True):
        c, *_ = drawn(likes(board, repeated), source)
        items = np.concatenate([c.items[: c.shared], c.memory_items.numpy()])
        n = np.bincount(items, c.counts.numpy(), 30)
        log_q = np.zeros(30)
        log_q[items] = c.log_q
        found.append((n, log_q))
    np.testing.assert_allclose(found[0][0], found[1][0])
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-5)


def test_a_mimic_loss_is_the_weighted_mean() -> None:
    rng = torch.Generator().manual_seed(0)
    a, v, weights = (
        torch.randn(7, 3, generator=rng),
        torch.randn(7, 3, generator=rng),
        torch.tensor([2.0, 0, 1, 3, 1, 0, 1]),
    )
    twice = torch.repeat_interleave(torch.arange(7), weights.long())
    assert mimic(a, v, weights).item() == pytest.approx(
        mimic(a[twice], v[twice], torch.ones(len(twice))).item(), rel=1e-6
    )
    assert mimic(a, v, torch.zeros(7)).item() == 0


def test_drawn_pairs_weigh_what_their_positive_weighs_and_keep_their_share(board: Dataset) -> None:
    data = likes(board, False)
    sampler = PairSampler(data, NegativesConfig(random={"n": 2, "share": 0.5}), seed=1)
    epoch = sampler.epoch(0)
    random = epoch.all.source < 0
    assert len(sampler) == len(epoch) == 11 + 2 * 7, "weight 0 draws none"
    by_user = np.bincount(epoch.all.user[random], epoch.all.weight[random], 8)
    np.testing.assert_allclose(by_user, TIMES * by_user.sum() / TIMES.sum(), rtol=1e-6)
    assert by_user.sum() == pytest.approx(3), "as much as the dislikes"
    own = np.zeros(11)
    own[epoch.all.source[~random]] = epoch.all.weight[~random]
    assert own.tolist() == [*TIMES.tolist(), 1, 1, 1]


def test_positives_of_weight_0_are_in_no_epoch_and_the_others_keep_their_weights(board: Dataset) -> None:
    data = likes(board, False)
    for by_user in (False, True):
        epoch = PositiveSampler(data, seed=1, by_user=by_user).epoch(0)
        assert sorted(zip(epoch.all.user.tolist(), epoch.all.weight.tolist(), strict=True)) == [
            (u, n) for u, n in enumerate(TIMES.tolist()) if n
        ]
    assert data.item_positive_counts[[3, 4, 6]].tolist() == [6, 1, 0]


@pytest.mark.parametrize("loss", EVERY_LOSS, ids=repr)
def test_a_batch_with_weights_has_the_loss_and_gradients_of_repeated_rows(
    board: Dataset, loss: ContrastiveLoss | PointwiseLoss
) -> None:
    data = board
    rng = np.random.default_rng(0)
    times = rng.integers(0, 3, len(data.pairs))
    weighted = replace(data, pairs=replace(data.pairs, weight=times.astype(np.float32)))
    rows = np.repeat(np.arange(len(times)), times)
    repeated = replace(data, pairs=data.pairs.take(rows), parts=data.parts[rows], times=data.times[rows])
    one, other = (loss_and_gradients(d, loss) for d in (weighted, repeated))
    assert one.pop("loss").item() == pytest.approx(other.pop("loss").item(), rel=1e-6)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert any(g.abs().max() > 1e-3 for g in one.values())


def loss_and_gradients(data: Dataset, loss: ContrastiveLoss | PointwiseLoss) -> dict[str, Tensor]:
    """The loss of a batch of all pairs, and its gradients by the parameters of a fresh model."""
    negatives = {} if loss.pointwise else {"full": True, "mask_positives": False}
    train = {"shuffle": False, "batch_size": 4096, "monitor": "validation.auc"}
    objective = Trainer(data, settings(loss=loss.model_dump(), negatives=negatives, train=train)).objective
    objective.model.eval()  # no dropout
    objective.begin_epoch(lambda: Factors(torch.zeros(40, 1), torch.zeros(30, 1)), 0)
    found = objective(objective.sampler.epoch(0), 0, 0)
    found.loss.backward()  # type: ignore[no-untyped-call]
    return {"loss": found.loss} | {n: p.grad for n, p in objective.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("loss", CONTRASTIVE, ids=repr)
def test_pairs_apart_have_the_gradients_that_each_has_alone(board: Dataset, loss: ContrastiveLoss) -> None:
    pairs = [{side: {"layers": [width]} for side in ("user", "item")} for width in (8, 5)]

    def objective(pairs: list[dict[str, dict[str, list[int]]]], how: str) -> Objective[Any]:
        model = {"pairs": pairs, "similarity": "dot", "bias": False, "unknown_rate": 0.0, "embedding_std": 1.0}
        train = {"shuffle": False, "batch_size": 64, "monitor": "validation.auc", "pairs": how}
        made = Trainer(
            board, settings(model=model, loss=loss.model_dump(),
                negatives={"hard": {"n": 2, "ranks": [1, 9]}, "uniform": 7}, train=train)
        ).objective  # fmt: skip
        made.begin_epoch(lambda: Factors(torch.ones(40, 1), torch.ones(30, 1)), 0)
        return made

    both = objective(pairs, "apart")
    found = both(both.sampler.epoch(0), 0, 0)
    found.loss.backward()  # type: ignore[no-untyped-call]
    losses = []
    for number, pair in enumerate(pairs):
        alone = objective([pair], "together")
        alone.model.pairs[0].load_state_dict(both.model.pairs[number].state_dict())
        losses.append(alone(alone.sampler.epoch(0), 0, 0).loss)
        losses[-1].backward()  # type: ignore[no-untyped-call]
        gradients = [
            {n: p.grad for n, p in m.named_parameters()} for m in (alone.model.pairs[0], both.model.pairs[number])
        ]
        torch.testing.assert_close(*gradients)
        assert all(g is not None and g.abs().max() > 0 for g in gradients[0].values())
    assert found.loss.item() == pytest.approx(sum(of_pair.item() for of_pair in losses), rel=1e-6)


def histories(data: Dataset, side: SideName, name: str, inputs: Inputs) -> list[list[int]]:
    """A sequence's codes as internal rows of the other side."""
    other: SideName = "item" if side == "user" else "user"
    history = next(h for h in data.schema.histories(side) if h.name == name)
    codes = data.encoders.history_codes(history, data.side(other).frame).tolist()
    decode = {code: row for row, code in enumerate(codes) if code}
    return [[decode[c] for c in row if c] for row in rows_of(inputs.bags[name])]


def history_by_loop(data: Dataset, side: SideName, feature: Sequence, row: int, gone: set[int]) -> list[int]:
    """The row's own training interactions of the right kind, oldest first and cut, less `gone`."""
    own, other = data.pairs.user, data.pairs.item
    if side == "item":
        own, other = other, own
    kept = []
    for i in np.argsort(data.times, kind="stable").tolist():
        right = feature.interactions == "all" or data.pairs.positive[i] == (feature.interactions == "positive")
        if data.parts[i] == TRAIN and own[i] == row and right:
            kept.append(i)
    return [int(other[i]) for i in kept[-feature.max_length :] if i not in gone]


def many_sequences() -> Dataset:
    """`everything` with a sequence of every kind on both sides."""
    extra = (
        Sequence(name="seen", side="user", interactions="all", max_length=6),
        Sequence(name="viewers", side="item", interactions="all", pooling="sum"),
        Sequence(name="haters", side="item", interactions="negative", share_embedding=False),
    )
    schema: Schema = EVERYTHING_SCHEMA.model_copy(update={"features": (*EVERYTHING_SCHEMA.features, *extra)})
    return build_dataset(check(*everything(), schema), schema, Config().split)


def test_a_batch_has_no_target_in_any_history_and_every_other_item_is_still_there() -> None:
    data = many_sequences()
    batcher = Batcher(tensors(data, "user"), tensors(data, "item"))
    epoch = PairSampler(data, NegativesConfig(random=1), seed=3).epoch(0)
    for start in (0, 128):
        part = slice(start, start + 64)
        user, item, source = epoch.all.user[part], epoch.all.item[part], epoch.all.source[part]
        batch = batcher(user, item, epoch.all.label[part], epoch.all.weight[part], source, source)
        targets = set(zip(user[source >= 0].tolist(), item[source >= 0].tolist(), strict=True))
        gone = set(source[source >= 0].tolist())
        assert 0 < len(gone) < 64
        dropped = 0
        sides: list[tuple[SideName, Inputs, Any, Any]] = [
            ("user", batch.users, user, batch.user),
            ("item", batch.items, item, batch.item),
        ]
        for side, inputs, rows, index in sides:
            at = {int(k): int(r) for k, r in zip(index.tolist(), rows, strict=True)}
            for feature in data.schema.side(side):
                if not isinstance(feature, Sequence):
                    continue
                for k, history in enumerate(histories(data, side, feature.name, inputs)):
                    pairs = {(at[k], other) if side == "user" else (other, at[k]) for other in history}
                    assert not pairs & targets
                    assert history == history_by_loop(data, side, feature, at[k], gone)
                    dropped += len(history_by_loop(data, side, feature, at[k], set())) - len(history)
        assert dropped > 0


def test_random_negatives_leave_nothing_out(everything_data: Dataset) -> None:
    data = everything_data
    users, items = tensors(data, "user"), tensors(data, "item")
    pairs = data.train
    n = 30
    ones = np.ones(n, np.float32)
    none = np.full(n, -1, np.int64)
    batch = Batcher(users, items)(pairs.user[:n], pairs.item[:n], ones, ones, none, none)
    distinct = DistinctRows(users.n)(pairs.user[:n])[0], DistinctRows(items.n)(pairs.item[:n])[0]
    assert equal(batch.users, users.take(distinct[0]))
    assert equal(batch.items, items.take(distinct[1]))
    own = np.flatnonzero(data.parts == TRAIN)[:n]
    real = Batcher(users, items)(pairs.user[:n], pairs.item[:n], ones, ones, own, own)
    assert not equal(real.users, batch.users)
    assert not equal(real.items, batch.items)


def test_a_batch_names_each_row_once_and_its_pairs_by_index(everything_data: Dataset) -> None:
    data = everything_data
    epoch = PairSampler(data, NegativesConfig(random=2), seed=1).epoch(0)
    part = slice(100, 300)
    arrays: list[npt.NDArray[Any]] = [
        x[part] for x in (epoch.all.user, epoch.all.item, epoch.all.label, epoch.all.weight)
    ]
    batch = Batcher(tensors(data, "user"), tensors(data, "item"))(
        arrays[0], arrays[1], arrays[2], arrays[3], epoch.all.source[part], epoch.all.source[part]
    )
    assert len(batch) == 200
    assert batch.label.tolist() == arrays[2].tolist()
    assert batch.weight.tolist() == arrays[3].tolist()
    for inputs, index, rows, column in (
        (batch.users, batch.user, arrays[0], data.users.columns["uid"]),
        (batch.items, batch.item, arrays[1], data.items.columns["iid"]),
    ):
        assert inputs.rows == len(np.unique(rows)) < 200
        assert isinstance(column, np.ndarray)
        assert inputs.lookup[index, 0].tolist() == column[rows].tolist()


def test_a_tower_that_reads_the_context_runs_once_for_each_interaction() -> None:
    schema = hourly_schema(HOUR, Sequence(name="seen", side="user", share_embedding=False))
    data = build_dataset(check(*hourly(300), schema), schema, Config().split)
    users, items = (
        SideTensors(data.side(side), data.encoders.fields(side), context=data.context if side == "user" else {})
        for side in SIDES
    )
    batcher = Batcher(users, items)
    epoch = PairSampler(data, NegativesConfig(random=2), seed=1).epoch(0)
    part = epoch.take(0, slice(0, 80))
    batch = batcher(part.user, part.item, part.label, part.weight, part.source, part.source)
    moments = np.where(part.source < 0, ~part.source, part.source)
    assert batch.users.rows == len(set(moments.tolist()))
    names = [f.name for f in data.encoders.fields("user") if f.kind == "lookup"]
    for place, row in enumerate(moments.tolist()):
        given = batch.users.lookup[batch.user[place]].tolist()
        own = {"hour": data.context["hour"], **data.users.columns}
        for name, code in zip(names, given, strict=True):
            assert code == own[name][row if name == "hour" else part.user[place]]  # type: ignore[index]
    left_out = {int(s) for s in part.source if s >= 0}
    histories = rows_of(batch.users.bags["seen"])
    for place in range(0, len(part), 7):
        kept = [i for i in history_by_index(data, int(part.user[place])) if i not in left_out]
        assert len(histories[int(batch.user[place])]) == len(kept)
    rows = np.array([5, 9, 5])
    positives = batcher.contrastive_batch(data.pairs.user[rows], rows, np.arange(4), earlier=False)
    assert positives.user is None
    assert positives.users.lookup[:, names.index("hour")].tolist() == flat(data, "hour")[rows].tolist()


def history_by_index(data: Dataset, user: int) -> list[int]:
    """The training interactions of a user."""
    return [i for i in range(len(data.pairs)) if data.pairs.user[i] == user and data.parts[i] == TRAIN]
