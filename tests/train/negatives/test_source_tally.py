"""Tally of the negatives by source, against loops over every draw."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from candidate_worlds import batch_of, liked_of, positives
from scored import random_factors
from worlds import settings

from twotower.arrays.types import Ints
from twotower.data.dataset import Dataset
from twotower.distributed import DistributedContext
from twotower.train.contrastive import contrastive_loss
from twotower.train.losses import LOSSES
from twotower.train.losses.loss import ContrastiveLoss
from twotower.train.negatives.candidates import Candidates
from twotower.train.negatives.config import NegativesConfig
from twotower.train.negatives.mixture import CandidateSampler
from twotower.train.negatives.source_tally import SourceTally
from twotower.train.progress import EpochRecord
from twotower.train.trainer import Trainer

SEED, STEP, BATCH = 5, 3, 24
NEGATIVES: dict[str, Any] = {
    "uniform": 20, "popularity": 9, "cross_batch_memory": 15, "random": 2,
    "hard": {"n": 3, "ranks": [1, 12], "ratio": 1},
}  # fmt: skip


class _World:
    """A batch, its candidates, and random vectors of all users and items."""

    def __init__(self, board: Dataset, mask: bool) -> None:
        self.data, self.vectors = board, random_factors(board, 1)
        self.sampler = CandidateSampler(board, NegativesConfig(mask_positives=mask, **NEGATIVES), SEED)
        self.sampler.begin_epoch(lambda: self.vectors, 1)
        self.user, self.item = positives(board, BATCH)
        earlier = positives(board, 15, seed=2)[1].astype(np.int64)
        self.old = torch.randn(15, 4, generator=torch.Generator().manual_seed(4))
        self.sampler.remember(torch.from_numpy(earlier), self.old, torch.ones(15))
        self.earlier, self.mask = earlier, mask

    def candidates(self) -> Candidates:
        return self.sampler(batch_of(self.user, self.item), STEP, by_source=True)

    def scored(self, loss: str, weights: torch.Tensor | None, block: int, rows: int = BATCH) -> EpochRecord:
        c, tally, options = self.candidates(), SourceTally(rows), LOSSES.parse({"kind": loss})
        c = c if weights is None else replace(c, weights=weights)
        assert isinstance(options, ContrastiveLoss)
        tally.begin(self.sampler.samplers)
        items = torch.cat([self.vectors.items[torch.from_numpy(c.items)], self.old])
        contrastive_loss(
            self.vectors.users[torch.from_numpy(self.user.astype(np.int64))], items, c, options, 30,
            tally=tally, max_block_logits=block,
        )  # fmt: skip
        tally.end(rows, DistributedContext())
        return tally.take()

    def draws(self, row: int, own: Ints) -> list[tuple[str, int, torch.Tensor]]:
        """Every draw that a positive stands against: kind, item, vector."""
        rng = np.random.Generator(np.random.Philox(key=[SEED, 0x6361], counter=[0, 0, 0, STEP]))
        found = []
        for kind in ("in_batch", "uniform", "popularity"):
            drawn = self.sampler.samplers[kind].draw(self.item, rng)  # type: ignore[attr-defined]
            found += [(kind, int(i), self.vectors.items[int(i)]) for i in drawn]
        found += [("cross_batch_memory", int(i), v) for i, v in zip(self.earlier, self.old, strict=True)]
        kinds = ["random"] * 2 + ["hard"] * 3
        order = [s for s in self.sampler.samplers if s in ("random", "hard")]
        kinds.sort(key=order.index)
        found += [(k, int(i), self.vectors.items[int(i)]) for k, i in zip(kinds, own, strict=True) if i >= 0]
        liked = liked_of(self.data)[int(self.user[row])]
        positive = int(self.item[row])
        return [d for d in found if d[1] != positive and not (self.mask and d[1] in liked)]


def by_loops(world: _World, loss: str, weights: torch.Tensor | None, rows: int = BATCH) -> EpochRecord:
    """What a tally records, from the closed forms of the losses, one draw after another."""
    c = world.candidates()
    of_all = world.sampler.log_q(np.arange(30), BATCH)
    gradients, n, above = defaultdict[str, float](float), defaultdict[str, int](int), defaultdict[str, int](int)
    for row in range(rows):
        positive = int(world.item[row])
        user = world.vectors.users[int(world.user[row])]
        own = np.array([c.items[p] if p >= 0 else -1 for p in c.per_positive[row].tolist()])
        draws = world.draws(row, own)
        best = float(user @ world.vectors.items[positive])
        scores = [float(user @ vector) for _, _, vector in draws]
        weight = 1.0 if weights is None else float(weights[row])
        shifted = [
            s - float(of_all[positive if kind in ("random", "hard") else item])
            for s, (kind, item, _) in zip(scores, draws, strict=True)
        ]
        total = sum(map(math.exp, shifted)) + math.exp(best - float(of_all[positive]))
        for (kind, _, _), score, logit in zip(draws, scores, shifted, strict=True):
            size = {
                "softmax": math.exp(logit) / total,
                "bpr": 1 / (1 + math.exp(best - score)) / len(draws),
                "gbce": 1 / (1 + math.exp(-score)) / (1 + len(draws)),
            }[loss]
            gradients[kind] += size * weight
            n[kind] += 1
            above[kind] += score > best
    record: EpochRecord = {}
    for kind in n:
        record[f"train.negatives.{kind}.share"] = gradients[kind] / sum(gradients.values())
        record[f"train.negatives.{kind}.above"] = above[kind] / n[kind]
        record[f"train.negatives.{kind}.n"] = n[kind] / rows
    return record


@pytest.mark.parametrize("loss", ["softmax", "bpr", "gbce"])
@pytest.mark.parametrize("mask", [True, False], ids=["masked", "unmasked"])
def test_shares_of_sources_are_those_of_every_draw_alone(board: Dataset, loss: str, mask: bool) -> None:
    world = _World(board, mask)
    weights = torch.linspace(0.5, 3, BATCH) if mask else None
    expected = by_loops(world, loss, weights)
    assert {key.split(".")[2] for key in expected} == {"in_batch", *NEGATIVES}
    for block in (1, 2**21):
        assert world.scored(loss, weights, block) == pytest.approx(expected, rel=1e-4)
        assert world.scored(loss, weights, block, 19) == pytest.approx(by_loops(world, loss, weights, 19), rel=1e-4)


def test_a_tally_of_two_ranks_is_that_of_the_batch() -> None:
    class Two(DistributedContext):
        """A rank of two with the same sums."""

        def all_reduce_sum(self, *numbers: float) -> list[float]:
            return [2 * n for n in numbers]

    found = []
    for context, times in ((Two(), 1), (DistributedContext(), 2)):
        tally = SourceTally()
        tally.begin(["a", "b", "none"])
        for _ in range(times):
            tally.add_sums("a", 3.0, 10, 4)
            tally.add_sums("b", 1.0, 5, 0)
        tally.end(2 * times, context)
        found.append(tally.take())
        assert tally.take() == {}
    assert found[0] == found[1]
    assert found[0] == {
        "train.negatives.a.share": 0.75, "train.negatives.a.above": 0.4, "train.negatives.a.n": 5.0,
        "train.negatives.b.share": 0.25, "train.negatives.b.above": 0.0, "train.negatives.b.n": 2.5,
    }  # fmt: skip


def test_labelled_and_drawn_pairs_are_told_apart(board: Dataset) -> None:
    """Against a loop over the pairs of the one batch, scored by the weights before the first step."""
    recipe = settings(train={"epochs": 1, "batch_size": 10_000}, negatives={"random": {"n": 2, "share": 0.4}})
    trainer = Trainer(board, recipe)
    vectors, epoch = trainer.factors(), trainer.objective.sampler.epoch(0)
    batch, _, _ = trainer.objective.examples(epoch, 0)
    (entry,) = trainer.run().history
    scores = (vectors.users[batch.user.astype(int)] * vectors.items[batch.item.astype(int)]).sum(1).tolist()
    best = [s for s, y, w in zip(scores, batch.label, batch.weight, strict=True) if y and w]
    sizes, above = defaultdict[str, list[float]](list), defaultdict[str, list[float]](list)
    for score, label, weight, source in zip(scores, batch.label, batch.weight, batch.source, strict=True):
        if not label and weight:
            kind = "random" if source < 0 else "labelled"
            sizes[kind].append(float(weight) / (1 + math.exp(-score)))
            above[kind].append(sum(p < score for p in best) / len(best))
    assert sorted(sizes) == ["labelled", "random"]
    for kind in sizes:
        share = sum(sizes[kind]) / sum(map(sum, sizes.values()))
        assert entry[f"train.negatives.{kind}.share"] == pytest.approx(share, rel=1e-4)
        assert entry[f"train.negatives.{kind}.above"] == pytest.approx(float(np.mean(above[kind])), abs=1e-3)
        assert entry[f"train.negatives.{kind}.n"] == pytest.approx(len(sizes[kind]) / len(best))


CONTRASTIVE: dict[str, Any] = {
    "loss": {"kind": "softmax"},
    "negatives": {"uniform": 10, "hard": {"n": 2, "ranks": [1, 12], "ratio": 1}},
    "train": {"epochs": 3, "batch_size": 64},
}


def test_each_epoch_records_the_sources_that_have_drawn(board: Dataset) -> None:
    history = Trainer(board, settings(**CONTRASTIVE)).run().history
    kinds = [{key.split(".")[2] for key in entry if key.startswith("train.negatives.")} for entry in history]
    assert kinds == [{"in_batch", "uniform"}, *[{"in_batch", "uniform", "hard"}] * 2]  # hard ones need a ranking
    for entry in history:
        shares = [value for key, value in entry.items() if key.endswith(".share")]
        assert sum(shares) == pytest.approx(1)
    assert history[0]["train.negatives.uniform.n"] < 10  # without the positives


def test_a_batch_that_is_counted_has_the_loss_and_the_gradient_of_one_that_is_not(board: Dataset) -> None:
    steps = []
    for counted in (True, False):
        trainer = Trainer(board, settings(**CONTRASTIVE))
        if not counted:
            trainer.objective.tallied_batch = -1
        result = trainer.run()
        weights = [p.detach().clone() for p in result.model.parameters()]
        steps.append((weights, [entry["train.loss"] for entry in result.history]))
        told = [key for entry in result.history for key in entry if key.startswith("train.negatives.")]
        assert bool(told) is counted
    assert steps[0][1] == steps[1][1]
    assert all(torch.equal(a, b) for a, b in zip(steps[0][0], steps[1][0], strict=True))


def test_what_was_counted_is_kept_by_a_checkpoint_between_the_batch_and_the_end_of_its_epoch(board: Dataset) -> None:
    whole = Trainer(board, settings(**CONTRASTIVE))
    part = Trainer(board, settings(**CONTRASTIVE))
    for trainer in (whole, part):
        trainer.objective.begin_epoch(trainer.factors, 0)
        epoch = trainer.objective.sampler.epoch(0)
        for batch in range(trainer.objective.tallied_batch + 1):
            trainer.step(epoch, batch)
    state = {key: tensor for key, tensor in part.objective.state().items() if key.startswith("tally/")}
    assert sorted(state) == ["tally/hard", "tally/in_batch", "tally/uniform"]
    again = Trainer(board, settings(**CONTRASTIVE))
    again.objective.load_state(state)
    assert again.objective.tally.take() == whole.objective.tally.take() != {}


def test_pairs_of_towers_with_losses_of_their_own_are_counted_together(board: Dataset) -> None:
    tower = {"user": {"layers": [8]}, "item": {"layers": [8]}}
    sections = CONTRASTIVE | {"model": {"width": 8, "pairs": [tower, tower], "similarity": "dot", "bias": False}}
    apart, together = (
        Trainer(board, settings(**sections | {"train": {"epochs": 1, "batch_size": 64, "pairs": pairs}}))
        .run()
        .history[0]
        for pairs in ("apart", "together")
    )
    assert apart["train.negatives.uniform.n"] == together["train.negatives.uniform.n"]
    assert apart["train.negatives.uniform.share"] != together["train.negatives.uniform.share"]
