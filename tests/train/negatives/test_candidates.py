"""A training row sees users, its item and its negatives as they were at its time: losses and gradients against a
loop."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor
from trainers import contrastive, same, weights
from version_worlds import CHANGING_SCHEMA, changing
from worlds import EVERYTHING_SCHEMA, everything, settings

from twotower.config.experiment import Config
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.side import Side
from twotower.data.tables import check
from twotower.data.versions import SINCE, Versions
from twotower.errors import ConfigError
from twotower.train.contrastive import contrastive_loss
from twotower.train.negatives.candidates import CandidateVersions
from twotower.train.order import Examples
from twotower.train.trainer import Trainer

SOURCES: dict[str, Any] = {
    "in_batch": {},
    "shared": {"uniform": 5, "popularity": 4, "in_batch": False},
    "full": {"full": True},
    "per positive": {"random": 3, "disliked": 3},
    "hard": {"hard": {"n": 2, "ranks": [1, 9], "ratio": 2}},
    "unmasked": {"mask_positives": False, "uniform": 5},
}
ADDED: dict[str, Any] = {
    "loss": {"kind": "softmax"},
    "train": {"device": "cpu", "batch_size": 50, "lr": 0.02, "epochs": 1},
}


@cache
def data() -> Dataset:
    """Read only."""
    return build_dataset(check(*changing(), CHANGING_SCHEMA), CHANGING_SCHEMA, Config().split)


def begun(**sections: Any) -> Trainer:
    """A trainer before its first step, with random weights."""
    trainer = Trainer(data(), settings(**sections))
    torch.manual_seed(0)
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    trainer.objective.begin_epoch(trainer.factors, 0)
    trainer.objective.begin_epoch(trainer.factors, 1)
    return trainer


def version(side: Any, row: int, time: int) -> int:
    """The version that holds at a time, by a search through the table."""
    versions = data().side(side).versions
    assert versions is not None
    since = versions.frame[SINCE].to_list()
    own = range(int(versions.offsets[row]), int(versions.offsets[row + 1]))
    return max(v for v in own if since[v] <= time)


def time_of(interaction: int) -> int:
    times = data().times
    return int(times[interaction])


def vectors(trainer: Trainer, side: Any, rows: list[tuple[int, int]], left_out: Any) -> Tensor:
    """The vectors of rows at times."""
    tensors = getattr(trainer.objective, f"{side}s")
    tower = trainer.model.user_vectors if side == "user" else trainer.model.item_vectors
    found: Tensor = tower(tensors.take(np.array([version(side, *row) for row in rows]), left_out))
    return found


def gradients(loss: Tensor, trainer: Trainer) -> dict[str, Tensor]:
    trainer.model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    return {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


def assert_equal(trainer: Trainer, found: Tensor, expected: Tensor) -> None:
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    one, other = gradients(found, trainer), gradients(expected, trainer)
    assert one.keys() == other.keys()
    assert len(one) > 5
    for name, gradient in one.items():
        np.testing.assert_allclose(gradient, other[name], rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("kind", "source"),
    [*(("softmax", s) for s in SOURCES), *((k, s) for k in ("gbce", "bpr") for s in ("shared", "per positive"))],
)
def test_a_contrastive_loss_is_that_of_each_positive_among_the_candidates_of_its_time(kind: str, source: str) -> None:
    trainer = begun(loss={"kind": kind}, train={"batch_size": 25}, negatives=SOURCES[source])
    objective = contrastive(trainer)
    objective.model.eval()  # without dropout and unknown values
    epoch = objective.sampler.epoch(0)
    found = objective(epoch, 1, 1).loss
    whole, ends, own = objective.examples(epoch, 1)
    drawn = objective.candidates(whole, 1, False, ends, own)
    left_out = objective._left_out(whole.source, drawn.interactions)
    losses, moved = [], 0
    for b, source_index in enumerate(whole.source.tolist()):
        time = time_of(source_index)
        user = vectors(trainer, "user", [(int(whole.user[b]), time)], left_out)
        items = vectors(trainer, "item", [(i, time) for i in drawn.items.tolist()], left_out)
        moved += sum(
            version("item", i, time) != version("item", i, time_of(int(whole.source[0]))) for i in drawn.items.tolist()
        )
        one = drawn.take(torch.tensor([b]))
        losses.append(contrastive_loss(user, items, one, objective.loss, len(data().items), total_weight=len(whole)))
    assert moved > 50, "candidates differ between the times of the batch"
    assert_equal(trainer, found, torch.stack(losses).sum())


def test_blocks_of_logits_do_not_change_the_loss() -> None:
    trainer = begun(**ADDED)
    objective = contrastive(trainer)
    whole, ends, own = objective.examples(objective.sampler.epoch(0), 0)
    drawn = objective.candidates(whole, 0, False, ends, own)
    times = objective.dataset.times[whole.source]
    versions = CandidateVersions(drawn, objective.dataset.items, times, torch.device("cpu"))
    assert versions.several
    seen = versions.seen_at(times)
    rng = torch.Generator().manual_seed(0)
    users, items = torch.randn(len(whole), 4, generator=rng), torch.randn(len(versions.rows), 4, generator=rng)
    blocks = [
        contrastive_loss(users, items, drawn, objective.loss, 40, versions=seen, max_block_logits=n) for n in (1, 2**21)
    ]
    assert float(blocks[0]) == pytest.approx(float(blocks[1]), rel=1e-6)


@pytest.mark.parametrize("negatives", [{}, {"random": 3}])
def test_a_pointwise_loss_is_that_of_each_pair_at_its_time(negatives: dict[str, Any]) -> None:
    """A random pair has the time of the positive that it was drawn for."""
    trainer = begun(negatives=negatives, train={"batch_size": 60})
    trainer.model.eval()
    objective = trainer.objective
    epoch = objective.sampler.epoch(0)
    found = objective(epoch, 2, 2).loss
    whole: Examples = objective.examples(epoch, 2)[0]
    beside = np.where(whole.source < 0, ~whole.source, whole.source)
    assert np.array_equal(data().pairs.user[beside], whole.user)
    assert data().pairs.positive[beside[whole.source < 0]].all()
    times = [time_of(i) for i in beside.tolist()]
    left_out = whole.source[whole.source >= 0]
    users = vectors(trainer, "user", list(zip(whole.user.tolist(), times, strict=True)), left_out)
    items = vectors(trainer, "item", list(zip(whole.item.tolist(), times, strict=True)), left_out)
    label, weight = torch.from_numpy(whole.label), torch.from_numpy(whole.weight)
    assert_equal(trainer, found, objective.loss((users * items).sum(1), label, weight, 0.0))  # type: ignore[operator]


def test_the_versions_of_all_candidates_are_those_that_a_search_finds() -> None:
    trainer = begun(**ADDED)
    objective = contrastive(trainer)
    whole, ends, own = objective.examples(objective.sampler.epoch(0), 0)
    drawn = objective.candidates(whole, 0, False, ends, own)
    times = objective.dataset.times[whole.source]
    versions = CandidateVersions(drawn, objective.dataset.items, times, torch.device("cpu"))
    seen = versions.seen_at(times)
    for rows in (slice(0, 50), slice(7, 8), slice(10, 33)):
        found = seen.of_shared(rows)
        assert torch.equal(found, seen.find(torch.arange(drawn.shared)[None], rows))
    assert len({tuple(row) for row in seen.of_shared(slice(0, 50)).tolist()}) > 10


def test_every_version_that_a_time_of_the_batch_sees_is_embedded_once_and_no_other() -> None:
    trainer = begun(**ADDED)
    objective = contrastive(trainer)
    whole, ends, own = objective.examples(objective.sampler.epoch(0), 0)
    drawn = objective.candidates(whole, 0, False, ends, own)
    times = objective.dataset.times[whole.source]
    versions = CandidateVersions(drawn, objective.dataset.items, times, torch.device("cpu"))
    seen = [time_of(i) for i in whole.source.tolist()]
    expected = [sorted({version("item", i, time) for time in seen}) for i in drawn.items.tolist()]
    assert versions.rows.tolist() == [v for of_item in expected for v in of_item]
    assert versions.shared == sum(map(len, expected[: drawn.shared]))


def since_1990(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.with_columns(since=pl.lit(700_000_000))


@pytest.mark.parametrize(
    "sections",
    [
        {"negatives": {"random": 2}},
        ADDED | {"negatives": {"uniform": 9, "disliked": 2, "random": 2}},
        ADDED | {"loss": {"kind": "softmax", "mimic": 0.5}, "model": {"width": 8, "pairs": [{"user": {"layers": [8],
            "augment": True}, "item": {"layers": [8], "augment": True}}]}},
    ],
)  # fmt: skip
def test_one_version_of_each_row_from_the_beginning_trains_what_a_snapshot_trains(sections: dict[str, Any]) -> None:
    """To the same bits: versions change nothing but the features that are read."""
    users, items, actions = everything()
    trained = []
    for tables, schema in (
        ((users, items, actions), EVERYTHING_SCHEMA),
        ((since_1990(users), since_1990(items), actions), CHANGING_SCHEMA),
    ):
        trainer = Trainer(build_dataset(check(*tables, schema), schema, Config().split), settings(**sections))
        result = trainer.run()
        trained.append((weights(trainer), {k: v for k, v in result.history[-1].items() if "seconds" not in k}))
    assert same(trained[0][0], trained[1][0])
    assert trained[0][1] == trained[1][1]


def test_causal_histories_stay_those_of_the_user() -> None:
    """Prefixes belong to users, whatever version of them a positive reads."""
    features = tuple(f for f in CHANGING_SCHEMA.features if f.name not in ("fans", "disliked"))
    schema = CHANGING_SCHEMA.model_copy(update={"features": features})
    causal = build_dataset(check(*changing(), schema), schema, Config().split)
    config = settings(
        loss={"kind": "softmax"}, negatives={"uniform": 9}, train={"history_scope": "causal", "batch_size": 60}
    )
    trainer = Trainer(causal, config)
    objective = contrastive(trainer)
    objective.model.eval()
    whole, *_ = objective.examples(objective.sampler.epoch(0), 1)
    rows = causal.input_rows("user", whole.user, whole.source).astype(np.int64)
    batch = objective.batcher.contrastive_batch(rows, whole.source, np.arange(3), True)
    found = objective.model.user_vectors(batch.users)
    for b in range(0, len(whole), 9):
        alone = objective.batcher.contrastive_batch(rows[[b]], whole.source[[b]], np.arange(3), True)
        torch.testing.assert_close(objective.model.user_vectors(alone.users)[0], found[b], rtol=1e-5, atol=1e-6)
    trainer.step(objective.sampler.epoch(0), 0)


def test_remembered_vectors_and_versions_of_items_exclude_each_other() -> None:
    with pytest.raises(ConfigError) as e:
        Trainer(data(), settings(**ADDED | {"negatives": {"cross_batch_memory": 50}}))
    assert str(e.value) == (
        "negatives.cross_batch_memory keeps item vectors of other times, and with schema.valid_from a positive sees "
        "items as they were at its own; leave it out"
    )
    users, _, actions = changing()
    tables = check(users, everything()[1], actions, CHANGING_SCHEMA)
    Trainer(
        build_dataset(tables, CHANGING_SCHEMA, Config().split),
        settings(**ADDED | {"negatives": {"cross_batch_memory": 50}}),
    )


def test_negatives_that_share_a_value_and_versions_of_items_exclude_each_other() -> None:
    attribute = settings(**ADDED | {"negatives": {"attribute": "brand"}})
    with pytest.raises(ConfigError) as e:
        Trainer(data(), attribute)
    assert str(e.value) == (
        "negatives.attribute draws items by their newest values, and with schema.valid_from a positive sees items as "
        "they were at its own time; leave it out"
    )
    users, _, actions = changing()
    tables = check(users, everything()[1], actions, CHANGING_SCHEMA)
    Trainer(build_dataset(tables, CHANGING_SCHEMA, Config().split), attribute)


def test_a_version_that_begins_with_an_interaction_is_seen_by_it() -> None:
    side = Side(pl.DataFrame(), {}, "item_id", Versions(pl.DataFrame({"__row": [0, 0, 0], SINCE: [-(2**63), 10, 20]})))

    class Drawn:
        items, shared = np.array([0]), 1

    found = CandidateVersions(Drawn(), side, np.array([10, 19, 20]), torch.device("cpu"))  # type: ignore[arg-type]
    assert found.rows.tolist() == [1, 2]
    assert found.seen_at(np.array([10, 19, 20])).find(torch.zeros(1, 1, dtype=torch.int64)).tolist() == [[0], [0], [1]]
