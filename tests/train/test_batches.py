"""Batches against plain loops, and no history that contains its target."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from context_worlds import HOUR, flat, hourly, hourly_schema
from taken import equal, rows_of, tensors
from worlds import EVERYTHING_SCHEMA, everything

from twotower.arrays.sets import DistinctRows
from twotower.config.experiment import Config
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.splits import TRAIN
from twotower.data.tables import check
from twotower.features.schema import Schema
from twotower.features.sequence import Sequence
from twotower.features.side import SIDES, SideName
from twotower.model.inputs.code_layout import Inputs
from twotower.model.inputs.side_tensors import SideTensors
from twotower.train.batches import Batcher
from twotower.train.negatives.config import NegativesConfig
from twotower.train.pair_sampler import PairSampler


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
    assert data.times is not None
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
        user, item, source = epoch.user[part], epoch.item[part], epoch.source[part]
        batch = batcher(user, item, epoch.label[part], epoch.weight[part], source)
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
    batch = Batcher(users, items)(pairs.user[:n], pairs.item[:n], ones, ones, np.full(n, -1, np.int64))
    distinct = DistinctRows(users.n)(pairs.user[:n])[0], DistinctRows(items.n)(pairs.item[:n])[0]
    assert equal(batch.users, users.take(distinct[0]))
    assert equal(batch.items, items.take(distinct[1]))
    own = np.flatnonzero(data.parts == TRAIN)[:n]
    real = Batcher(users, items)(pairs.user[:n], pairs.item[:n], ones, ones, own)
    assert not equal(real.users, batch.users)
    assert not equal(real.items, batch.items)


def test_a_batch_names_each_row_once_and_its_pairs_by_index(everything_data: Dataset) -> None:
    data = everything_data
    epoch = PairSampler(data, NegativesConfig(random=2), seed=1).epoch(0)
    part = slice(100, 300)
    arrays: list[npt.NDArray[Any]] = [x[part] for x in (epoch.user, epoch.item, epoch.label, epoch.weight)]
    batch = Batcher(tensors(data, "user"), tensors(data, "item"))(
        arrays[0], arrays[1], arrays[2], arrays[3], epoch.source[part]
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
        SideTensors(data.side(side), data.encoders.fields(side), context=data.context if side == "user" else None)
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
