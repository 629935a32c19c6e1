"""The loop: it learns, it stops and goes on exactly, it never keeps a broken model."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from mykinds.losses import Focal
from mykinds.optimizers import RmsProp
from torch import nn
from trainers import contrastive, same, weights
from worlds import CHECKERBOARD_SCHEMA, ID_FEATURES, checkerboard, settings

from twotower.config.experiment import Config
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.split import SplitConfig
from twotower.data.splits import TRAIN, VALIDATION
from twotower.data.tables import check
from twotower.errors import ConfigError, Interrupted, TrainingError
from twotower.evaluation.part_evaluation import evaluate_part
from twotower.features.categorical import Categorical
from twotower.features.schema import Schema
from twotower.features.sequence import Sequence
from twotower.model.inputs.bag import Bag
from twotower.model.inputs.code_layout import Prefixes
from twotower.model.pooling.decay import Decay
from twotower.train.checkpoint import EVALUATION, Checkpoint
from twotower.train.losses import LOSSES
from twotower.train.negatives.candidates import Candidates
from twotower.train.negatives.hard import HardSampler
from twotower.train.negatives.mixture import CandidateSampler
from twotower.train.objective import ContrastiveBatch
from twotower.train.optimizers import OPTIMIZERS
from twotower.train.progress import Callback
from twotower.train.trainer import Trainer


class Solved(Exception):
    """Raised by a training that is good enough."""


def best_auc(data: Dataset, config: Config, wanted: float) -> float:
    """Train until the validation AUC is above `wanted`, or to the end; return the best one."""
    found: list[float] = []

    class Until(Callback):
        def on_epoch_end(self, history: list[dict[str, Any]]) -> None:
            found.append(history[-1].get("validation.auc", 0.0))
            if found[-1] > wanted:
                raise Solved

    with contextlib.suppress(Solved):
        Trainer(data, config, callback=Until()).run()
    return max(found)


# ---- learning ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("tower", [{"layers": [16, 8]}, {"layers": [8], "senet": {"enabled": True}}, {"layers": []}])
@pytest.mark.parametrize("random", [0, 2])
def test_the_checkerboard_is_solved_by_every_tower_similarity_and_sampler(
    board: Dataset, similarity: str, tower: dict[str, Any], random: int
) -> None:
    config = settings(
        model={"width": 8, "similarity": similarity, "pairs": [{"user": tower, "item": tower}]},
        negatives={"random": random},
        train={"epochs": 25, "batch_size": 64, "lr": 0.03, "device": "cpu"},
    )
    assert best_auc(board, config, 0.97) > 0.97


CANDIDATES: dict[str, dict[str, Any]] = {
    "in batch": {},
    "uniform": {"in_batch": False, "uniform": 20},
    "popularity": {"in_batch": False, "popularity": 20},
    "full": {"full": True},
    "all": {
        "uniform": 10, "popularity": 10, "cross_batch_memory": 64, "disliked": 1,
        "hard": {"n": 1, "ranks": [2, 6], "ratio": 20, "margin": 0.1}, "attribute": "item_id",
    },
}  # fmt: skip


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("loss", ["softmax", "bpr", "gbce"])
@pytest.mark.parametrize("candidates", CANDIDATES)
def test_the_checkerboard_is_solved_by_every_loss_and_source_of_candidates(
    board: Dataset, candidates: str, loss: str, similarity: str
) -> None:
    pair = {side: {"layers": [4]} for side in ("user", "item")}
    # What weighs one positive against a hundred candidates learns late to tell them apart.
    epochs = 24 if (loss, candidates) == ("gbce", "all") else 12
    config = settings(
        model={
            "width": 4, "similarity": similarity, "embedding_std": 0.3, "pairs": [pair],
            "temperature": 0.2 if similarity == "cosine" else 1.0,
        },
        loss={"kind": loss},
        negatives=CANDIDATES[candidates],
        train={"epochs": epochs, "batch_size": 64, "lr": 0.05, "device": "cpu", "validate_every": 2},
    )  # fmt: skip
    assert best_auc(board, config, 0.96) > 0.96


def parity_world(n_users: int = 60, n_items: int = 24) -> Dataset:
    """Each user likes half of the items, shown in a mixed order; which half is told by the history alone, as the
    users have no id and no feature."""
    rng = np.random.default_rng(0)
    pairs = rng.permutation(n_users * n_items)
    user, item = pairs // n_items, pairs % n_items
    taste = rng.integers(0, 2, n_users)
    schema = CHECKERBOARD_SCHEMA.model_copy(
        update={
            "features": (
                Categorical(name="item_id", side="item"),
                Sequence(name="liked", side="user", interactions="positive", pooling=Decay(rates=(0.0, 0.8, 1.0))),
            )
        }
    )
    tables = check(
        {"user_id": np.arange(n_users)},
        {"item_id": np.arange(n_items)},
        {"user_id": user, "item_id": item, "liked": (taste[user] == item % 2).astype(int), "at": np.arange(len(pairs))},
        schema,
    )
    return build_dataset(tables, schema, SplitConfig(kind="time"))


@pytest.mark.parametrize("loss", ["softmax", "bpr", "gbce"])
def test_tastes_that_only_the_earlier_history_tells_are_learnt_from_it(loss: str) -> None:
    config = settings(
        model={"width": 8, "bias": False, "pairs": [{s: {"layers": [8]} for s in ("user", "item")}]},
        loss={"kind": loss},
        negatives={"uniform": 20},
        train={"epochs": 12, "batch_size": 64, "lr": 0.03, "history_scope": "causal", "validate_every": 4},
    )
    assert best_auc(parity_world(), config, 0.97) > 0.97


@pytest.mark.parametrize("history_scope", ["leave_batch_out", "causal"])
def test_no_history_holds_an_observed_candidate_of_its_user(history_scope: str) -> None:
    schema = CHECKERBOARD_SCHEMA.model_copy(
        update={
            "features": (
                *ID_FEATURES,
                Sequence(name="met", side="user", interactions="negative", share_embedding=False),
            )
        }
    )
    data = build_dataset(check(*checkerboard(), schema), schema, SplitConfig(kind="time"))
    config = settings(
        loss={"kind": "softmax"}, negatives={"disliked": 2}, train={"history_scope": history_scope, "batch_size": 64}
    )
    trainer = Trainer(data, config)
    codes = data.encoders.history_codes(schema.histories("user")[0], data.items.frame)
    batches: list[Candidates] = []
    asked: list[list[set[int]]] = []

    def watched(*args: Any) -> ContrastiveBatch:
        found = contrastive_batch(*args)
        bag, lists = found.users.bags["met"], []
        if isinstance(bag, Prefixes):
            for last, n in zip(bag.last.tolist(), bag.length.int().tolist(), strict=True):
                lists.append(set(bag.codes.flatten()[last - n + 1 : last + 1].tolist() if n else []))
        else:
            assert isinstance(bag, Bag)
            ends = bag.offsets.tolist()
            lists = [set(bag.values[ends[u] : ends[u + 1]].tolist()) for u in found.user.tolist()]  # type: ignore[union-attr]
        asked.append(lists)
        return found

    def drawn(*args: Any) -> Candidates:
        batches.append(sampler(*args))
        return batches[-1]

    contrastive_batch, sampler = trainer.objective.batcher.contrastive_batch, contrastive(trainer).candidates
    setattr(trainer.objective.batcher, "contrastive_batch", watched)  # noqa: B010
    setattr(trainer.objective, "candidates", drawn)  # noqa: B010
    epoch = trainer.objective.sampler.epoch(0)
    n = 0
    for number in range(3):
        trainer.step(epoch, number)
        assert any(asked[number])
        for own, known in zip(batches[number].per_positive.tolist(), asked[number], strict=True):
            against = {int(codes[batches[number].items[place]]) for place in own if place >= 0}
            assert not against & known
            n += len(against)
    assert n > 100


@pytest.mark.parametrize("temperature", [0.05, 1.0, 20.0])
def test_the_correction_by_log_q_is_not_scaled_by_the_temperature(board: Dataset, temperature: float) -> None:
    config = settings(
        model={"width": 8, "bias": False, "unknown_rate": 0, "temperature": temperature},
        loss={"kind": "softmax"},
        negatives={"uniform": 15, "popularity": 15},
        train={"batch_size": 50},
    )
    trainer = Trainer(board, config)
    epoch = trainer.objective.sampler.epoch(0)
    _, loss, _ = trainer.objective(epoch, 0, 0)
    user = epoch.all.user[:50]
    c = contrastive(trainer).candidates(epoch.all[:50], 0)
    factors = trainer.factors()
    u, v = (nn.functional.normalize(x.double()) for x in (factors.users[user], factors.items[c.items]))
    liked = set(zip(*(x[board.train.positive].tolist() for x in (board.train.user, board.train.item)), strict=True))
    total = 0.0
    for b in range(50):
        terms = [
            times * math.exp(float(u[b] @ v[column]) / temperature - q)
            for column, (times, q) in enumerate(zip(c.counts.tolist(), c.log_q.tolist(), strict=True))
            if column != c.positive[b] and (int(user[b]), int(c.items[column])) not in liked
        ]
        own = math.exp(float(u[b] @ v[c.positive[b]]) / temperature - float(c.log_q[c.positive[b]]))
        total -= math.log(own / (own + sum(terms)))
    assert loss.item() == pytest.approx(total / 50, rel=1e-4)


@pytest.mark.parametrize(("every", "epochs"), [(1, [1, 2, 3, 4, 5]), (2, [1, 3, 5]), (4, [1, 5])])
def test_hard_candidates_are_mined_from_the_present_model_every_so_many_epochs_but_the_first(
    board: Dataset, monkeypatch: pytest.MonkeyPatch, every: int, epochs: list[int]
) -> None:
    negatives = {"hard": {"n": 1, "ranks": [1, 3], "ratio": 1, "every": every}}
    trainer = Trainer(board, settings(loss={"kind": "bpr"}, negatives=negatives, train={"epochs": 6}))
    mined: list[int] = []
    widths: dict[int, set[int]] = {}
    mine, draw = HardSampler.refresh, CandidateSampler.__call__

    def watch(self: HardSampler, users: torch.Tensor, items: torch.Tensor, epoch: int) -> None:
        now = trainer.factors()
        assert torch.equal(now.users, users)
        assert torch.equal(now.items, items)
        mined.append(epoch)
        assert trainer.progress.epoch == epoch
        mine(self, users, items, epoch)

    def drawn(self: CandidateSampler, *args: Any) -> Any:
        found = draw(self, *args)
        widths.setdefault(trainer.progress.epoch, set()).add(found.per_positive.shape[1])
        return found

    monkeypatch.setattr(HardSampler, "refresh", watch)
    monkeypatch.setattr(CandidateSampler, "__call__", drawn)
    trainer.run()
    assert mined == epochs
    assert widths == {0: {0}, **{e: {1} for e in range(1, 6)}}


def test_a_wrong_use_of_the_memory_would_be_seen_the_columns_are_the_latest_positives(board: Dataset) -> None:
    config = settings(loss={"kind": "softmax"}, negatives={"cross_batch_memory": 90}, train={"batch_size": 40})
    trainer = Trainer(board, config)
    objective = contrastive(trainer)
    epoch = objective.sampler.epoch(0)
    vectors: list[torch.Tensor] = []
    for number in range(4):
        part = slice(40 * number, 40 * (number + 1))
        with torch.no_grad():
            trainer.model.train()
            trainer._seed(trainer.progress.step)
            drawn = objective.candidates(epoch.all[part], number)
            assert drawn.memory_items.tolist() == epoch.all.item[: 40 * number][-90:].tolist()
            batch = objective.batcher.contrastive_batch(
                epoch.all.user[part], epoch.all.source[part], drawn.items, False
            )
            trainer.model.user_vectors(batch.users)  # draws the unknown values that come first
            vectors.append(trainer.model.item_vectors(batch.items)[drawn.positive])
        trainer.step(epoch, number)
        remembered = objective.candidates(epoch.all[part], number).memory_vectors
        assert remembered is not None
        assert not remembered.requires_grad
        # As the model was then: nothing is embedded again.
        torch.testing.assert_close(remembered, torch.cat(vectors)[-90:])


@pytest.mark.parametrize("optimizer", [*OPTIMIZERS.names, RmsProp.kind])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_optimizer_and_precision_lowers_the_loss(board: Dataset, optimizer: str, precision: str) -> None:
    lr = {"SGD": 1.0, "Adagrad": 0.1}.get(optimizer, 0.02)
    config = settings(train={"epochs": 8, "batch_size": 64, "lr": lr, "optimizer": optimizer, "precision": precision})
    losses = [h["train.loss"] for h in Trainer(board, config).run().history]
    assert losses[-1] < losses[0] - 0.02


@pytest.mark.parametrize("loss", [*LOSSES.names, Focal.kind])
def test_every_loss_falls(board: Dataset, loss: str) -> None:
    config = settings(loss={"kind": loss}, train={"epochs": 4, "batch_size": 64})
    losses = [h["train.loss"] for h in Trainer(board, config).run().history]
    assert losses[-1] < losses[0] - 0.02


def test_the_best_weights_are_kept_not_the_last(board: Dataset) -> None:
    config = settings(train={"epochs": 12, "batch_size": 64, "lr": 0.5, "device": "cpu"})
    trainer = Trainer(board, config)
    trained = trainer.run()
    aucs = [h["validation.auc"] for h in trained.history]
    assert trained.metrics["train.best_epoch"] == 1 + int(np.argmax(aucs))
    pairs = board.validation
    from twotower.evaluation.metrics.auc import auc

    assert auc(trainer.factors().scores(pairs), pairs.positive) == pytest.approx(max(aucs), abs=1e-12)


def test_patience_stops_early(board: Dataset) -> None:
    config = settings(train={"epochs": 50, "batch_size": 64, "lr": 0.5, "device": "cpu", "patience": 2})
    history = Trainer(board, config).run().history
    assert len(history) < 50
    best = int(np.argmax([h["validation.auc"] for h in history]))
    assert len(history) == best + 3


def test_log_loss_is_monitored_downwards(board: Dataset) -> None:
    config = settings(train={"epochs": 6, "batch_size": 64, "lr": 0.05, "monitor": "validation.log_loss"})
    trained = Trainer(board, config).run()
    losses = [h["validation.log_loss"] for h in trained.history]
    assert trained.metrics["train.best_epoch"] == 1 + int(np.argmin(losses))


def test_the_average_of_the_weights_is_what_is_evaluated(board: Dataset) -> None:
    config = settings(train={"epochs": 1, "batch_size": 64, "lr": 0.05, "ema_decay": 0.9})
    trainer = Trainer(board, config)
    expected = weights(trainer)
    epoch = trainer.objective.sampler.epoch(0)
    for number in range(trainer.objective.steps_per_epoch):
        trainer.step(epoch, number)
        keep = min(0.9, (number + 1) / (number + 11))
        expected = {n: keep * expected[n] + (1 - keep) * p.detach() for n, p in trainer.model.named_parameters()}
    again = Trainer(board, config)
    again.run()
    for name, value in weights(again).items():
        torch.testing.assert_close(value, expected[name])


# ---- stopping


def test_mining_is_training_time(board: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(self: HardSampler, *args: Any) -> None:
        mined.append(time.perf_counter())
        time.sleep(0.5)

    mined: list[float] = []
    monkeypatch.setattr(HardSampler, "refresh", slow)
    config = settings(loss={"kind": "softmax"}, negatives={"hard": {"n": 1, "ranks": [1, 3]}})
    found = Trainer(board, config).run()
    first, second = (h["train.seconds"] for h in found.history)
    assert len(mined) == 1
    assert second - first >= 0.5


def test_sigint_stops_like_sigterm_and_handlers_are_restored(board: Dataset, folder: Path) -> None:
    before = signal.getsignal(signal.SIGINT)

    class Press(Callback):
        def on_step_end(self, done: int, total: int, loss: float) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="after step 1;"):
        Trainer(board, settings(), folder, Press()).run()
    assert signal.getsignal(signal.SIGINT) is before


def test_fault_B2_a_signal_ends_a_validation_saved_and_the_resumed_training_is_the_same(
    board: Dataset, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(train={"epochs": 3, "ema_decay": 0.9})
    once, stopped = Trainer(board, config), Trainer(board, config, folder)
    once.run()
    reached = list[int]()

    def interrupted(*arguments: Any) -> dict[str, float]:
        reached.append(stopped.progress.step)
        if len(reached) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            reached.append(-1)
        return evaluate_part(*arguments)

    monkeypatch.setattr("twotower.train.trainer.evaluate_part", interrupted)
    with pytest.raises(Interrupted, match=r"after step \d+; a checkpoint") as stop:
        stopped.run()
    monkeypatch.undo()
    assert stop.value.exit_code == 128 + signal.SIGTERM
    assert reached == [once.objective.steps_per_epoch, 2 * once.objective.steps_per_epoch]
    again = Trainer(board, config, folder)
    assert again.resume()
    assert again.progress.step == reached[-1]
    again.run()
    assert same(weights(again), weights(once))
    assert len(again.progress.history) == 3


def test_fault_B2_a_signal_while_the_best_weights_are_measured_again_leaves_the_present_ones_in_the_checkpoint(
    board: Dataset, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Trainer(board, settings(train={"epochs": 2}), folder)
    first.checkpoints.fingerprint = {EVALUATION: "then"}
    first._train_epoch(first.objective.sampler.epoch(0))
    first.step(first.objective.sampler.epoch(1), 0)
    first._save()
    saved = Checkpoint.newest(folder)
    again = Trainer(board, settings(train={"epochs": 2}), folder)
    again.checkpoints.fingerprint = {EVALUATION: "now"}
    assert again.resume()

    def interrupted(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("twotower.train.trainer.evaluate_part", interrupted)
    with pytest.raises(Interrupted, match=r"after step \d+; a checkpoint"):
        again.run()
    found = Checkpoint.newest(folder)
    assert saved
    assert found
    assert same(found.tensors, saved.tensors)


def test_fault_B2_a_signal_ends_what_comes_before_the_first_step_of_an_epoch(
    board: Dataset, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: HardSampler, *arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        reached.append(True)

    reached = list[bool]()
    monkeypatch.setattr(HardSampler, "refresh", interrupted)
    config = settings(loss={"kind": "softmax"}, negatives={"hard": {"n": 1, "ranks": [1, 3]}})
    with pytest.raises(Interrupted, match=r"after step \d+; a checkpoint") as stop:
        Trainer(board, config, folder).run()
    assert stop.value.exit_code == 128 + signal.SIGINT
    assert not reached


def test_fault_B4_a_loss_that_is_not_finite_stops_with_step_rows_and_last_good_checkpoint(
    board: Dataset, folder: Path
) -> None:
    trainer = Trainer(board, settings(train={"epochs": 1, "batch_size": 100}), folder)
    epoch = trainer.objective.sampler.epoch(0)
    trainer.step(epoch, 0)
    trainer._save()
    with torch.no_grad():
        trainer.model.log_temperature.fill_(math.nan)
    with pytest.raises(TrainingError, match=r"step 2 \(interactions \d+.*step-000000001") as error:
        trainer.step(epoch, 1)
    assert error.value.exit_code == 1
    with pytest.raises(TrainingError, match="a weight is not finite"):
        trainer._save()
    found = Checkpoint.newest(folder)
    assert found is not None
    assert all(bool(torch.isfinite(t).all()) for t in found.tensors.values())


def test_fault_B4_weights_that_are_not_finite_are_never_the_best(board: Dataset) -> None:
    trainer = Trainer(board, settings())
    with torch.no_grad():
        next(iter(trainer.model.parameters())).fill_(math.inf)
    with pytest.raises(TrainingError, match="a weight is not finite"):
        trainer._validate()
    assert not trainer.best.weights


@pytest.mark.parametrize("validation", [0.0, 0.2])
@pytest.mark.parametrize("context", [False, True])
def test_fault_B4_weights_whose_vectors_are_not_finite_are_never_the_best(context: bool, validation: float) -> None:
    features = [Categorical(name="user_id", side="user"), Categorical(name="item_id", side="item")]
    schema = Schema(features=(*features, *([Categorical(name="hour", side="context")] if context else [])))
    rng = np.random.default_rng(0)
    log = pl.DataFrame({name: rng.integers(0, n, 600) for name, n in (("user_id", 30), ("item_id", 20), ("hour", 24))})
    split = SplitConfig(kind="random", test=0.2, validation=validation)
    of = settings(model={"similarity": "dot"}, train={"epochs": 1, "batch_size": 10_000, "lr": 1e30})
    trainer = Trainer(build_dataset(check(None, None, log, schema), schema, split), of)
    with pytest.raises(TrainingError, match=r"a vector is not finite after step 1; .* try a lower train.lr"):
        trainer.run()
    assert not trainer.best.weights


def test_a_device_that_is_not_there_is_an_error(board: Dataset) -> None:
    if torch.cuda.is_available():
        assert Trainer(board, settings(train={"device": "cuda"})).device.type == "cuda"
    else:
        with pytest.raises(ConfigError, match="this machine has no such device"):
            Trainer(board, settings(train={"device": "cuda"}))


def test_validation_of_one_class_is_monitored_by_recall(board: Dataset) -> None:
    parts = np.where((board.parts == VALIDATION) & ~board.pairs.positive, TRAIN, board.parts)
    assert Trainer(replace(board, parts=parts), settings()).recipe.train.monitor == "validation.recall@5"
