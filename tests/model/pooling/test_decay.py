"""Histories as they were at every moment: equal to loops over what was known, and blind to what came later."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import onnxruntime
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_worlds import bag_of, pool
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from worlds import CHECKERBOARD_SCHEMA, ID_FEATURES, checkerboard

from twotower.config.experiment import Config
from twotower.data.dataset import Dataset, assemble_dataset, build_dataset
from twotower.data.pairs import Pairs
from twotower.data.splits import TEST, TRAIN, VALIDATION
from twotower.data.tables import check
from twotower.features.categorical import Categorical
from twotower.features.multi_hot import MultiHot
from twotower.features.schema import Schema
from twotower.features.sequence import Sequence
from twotower.model.inputs.bag import Bag
from twotower.model.inputs.code_layout import SCAN_CHUNK, Inputs, Padded, Prefixes
from twotower.model.inputs.side_tensors import SideTensors
from twotower.model.pooling import POOLINGS
from twotower.model.pooling.decay import Decay, inverse_weight_sum, reach
from twotower.model.two_tower import ModelConfig, TwoTower
from twotower.onnx.builder import GraphBuilder

RATES = (0.0, 0.5, 0.93, 1.0)
USERS, ITEMS = 12, 120
KINDS: dict[str, Any] = {"all": "seen", "positive": "liked", "negative": "disliked"}
SCHEMA: Schema = CHECKERBOARD_SCHEMA.model_copy(
    update={
        "features": (
            *ID_FEATURES,
            Categorical(name="name", column="user_id", side="user"),
            MultiHot(name="hobbies", side="user"),
            *(
                Sequence(
                    name=name, side="user", interactions=of, pooling=Decay(rates=RATES), share_embedding=of == "all"
                )
                for of, name in KINDS.items()
            ),
        )
    }
)


@cache
def base() -> Dataset:
    users, items, actions = checkerboard(USERS, ITEMS)
    users = users.with_columns(hobbies=pl.Series([[f"h{h}" for h in range(u % 3)] for u in range(USERS)]))
    return build_dataset(check(users, items, actions, SCHEMA), SCHEMA, Config().split)


Row = tuple[int, int, bool, int, int]  # user, item, liked, time, part


def world(rows: list[Row]) -> Dataset:
    """The interactions `rows`, in this order of the table, over the users and items of `base`; and one more, so that
    there is something to learn."""
    rows = [*rows, (11, 5, True, 10**6, TRAIN)]
    user, item, liked, time, part = (np.array([r[i] for r in rows]) for i in range(5))
    pairs = Pairs(user.astype(np.int32), item.astype(np.int32), liked.astype(bool))
    b = base()
    parts = part.astype(np.int8)
    return assemble_dataset(b.encoders, b.users.frame, b.items.frame, pairs, parts, time.astype(np.int64))


def long_world(seed: int = 0) -> Dataset:
    """User 0 has 110 interactions, the others from 1 to 70; a third of the times are ties, and no row is in order."""
    rng = np.random.default_rng(seed)
    rows: list[Row] = []
    for u, n in enumerate([110, 1, 2, 31, 32, 33, 34, 63, 64, 65, 66, 70]):
        for item in rng.choice(ITEMS, n, replace=False):
            part = TRAIN if rng.random() < 0.93 or u == 0 else int(rng.choice([VALIDATION, TEST]))
            rows.append((u, int(item), bool(rng.random() < 0.6), int(rng.integers(0, 3 * n)) // 3, part))
    order = rng.permutation(len(rows))
    return world([rows[i] for i in order])


def known(data: Dataset, feature: Sequence, interactions: Iterable[int]) -> list[list[int]]:
    """For each interaction the codes of its user's earlier training interactions of the right kind, oldest first."""
    seconds, user = data.times.tolist(), data.pairs.user.tolist()
    codes = data.encoders.history_codes(feature.history, data.items.frame)[data.pairs.item].tolist()
    right = [
        feature.interactions == "all" or p == (feature.interactions == "positive") for p in data.pairs.positive.tolist()
    ]
    usable = [i for i, part in enumerate(data.parts.tolist()) if part == TRAIN and right[i]]
    out = []
    for now in interactions:
        # Ties keep the table's order.
        found = [(seconds[i], i) for i in usable if user[i] == user[now] and (seconds[i], i) < (seconds[now], now)]
        out.append([codes[i] for _, i in sorted(found)])
    return out


def pooled(
    table: Tensor, rows: list[list[int]], pooling: str, rates: tuple[float, ...], upstream: Tensor
) -> tuple[Tensor, Tensor]:
    """`pool` and the gradient of the table in float64, an interaction at a time."""
    rates = rates if pooling == "decay" else (1.0,)
    x, width = table.double().numpy(), table.shape[1]
    value, gradient = np.zeros((len(rows), len(rates), width)), np.zeros(x.shape)
    g = upstream.double().numpy().reshape(value.shape)
    for r, codes in enumerate(rows):
        for k, rate in enumerate(rates):
            weights = [1.0 if age == 0 else rate**age for age in range(len(codes))]
            n = len(codes)
            divisor = {"decay": sum(weights), "mean": n, "sqrt": n**0.5, "sum": 1, "power": n**0.35}[pooling]
            for weight, code in zip(weights, reversed(codes), strict=True):
                value[r, k] += weight / divisor * x[code]
                gradient[code] += weight / divisor * g[r, k]
    return torch.from_numpy(value).flatten(1).float(), torch.from_numpy(gradient).float()


def sequences(data: Dataset) -> list[Sequence]:
    return [f for f in data.schema.features if isinstance(f, Sequence)]


def side(data: Dataset) -> SideTensors:
    return SideTensors(data.users, data.encoders.fields("user"), timeline=data.timeline)


def before(data: Dataset, interactions: np.ndarray) -> Inputs:
    return side(data).take_before(data.pairs.user[interactions].astype(np.int64), interactions)


def table_for(data: Dataset, seed: int = 0, width: int = 3) -> Tensor:
    return torch.randn(ITEMS + 1, width, generator=torch.Generator().manual_seed(seed))


def assert_pools_like_a_loop(
    bag: Bag | Prefixes | Padded, rows: list[list[int]], pooling: str, rates: tuple[float, ...] = RATES
) -> None:
    """Values and the gradient of the table."""
    table = table_for(base()).requires_grad_()
    found = pool(table, bag, Decay(rates=rates) if pooling == "decay" else POOLINGS.parse(pooling))
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
    expected, gradient = pooled(table.detach(), rows, pooling, rates, upstream)
    torch.testing.assert_close(found.detach(), expected, atol=2e-5, rtol=1e-4)
    torch.autograd.backward((found * upstream).sum())
    assert table.grad is not None
    torch.testing.assert_close(table.grad, gradient, atol=1e-4, rtol=1e-3)


# ---- pooling


@pytest.mark.parametrize("pooling", ["decay", "mean", "sqrt", "sum", "power"])
def test_every_moment_of_a_history_is_pooled_like_a_loop_over_what_was_known(pooling: str) -> None:
    data = long_world()
    rng = np.random.default_rng(3)
    train = np.flatnonzero(data.parts == TRAIN)
    # All moments of the longest history and some of the others, in any order and some twice.
    picked = np.concatenate([train[data.pairs.user[train] == 0], rng.choice(train, 60)])
    picked = rng.permutation(picked)
    inputs = before(data, picked)
    assert inputs.rows == len(picked)
    for feature in sequences(data):
        rows = known(data, feature, picked.tolist())
        bag = inputs.bags[feature.name]
        assert isinstance(bag, Prefixes)
        assert bag.length.tolist() == [len(codes) for codes in rows]
        if feature.interactions == "all":
            assert {0, 1, 31, 32, 33, 64, 65, 96, 100, 109} <= {len(codes) for codes in rows}
        assert_pools_like_a_loop(bag, rows, pooling)


def test_what_float32_rounds_away_is_not_read() -> None:
    """Rows of interactions older than the reach are not finite, so that a product with one of them would show."""
    rates = (0.0, 0.1, 0.3)
    limit = reach(rates)
    assert limit == 14
    assert 0.3**limit <= 2**-24 < 0.3 ** (limit - 1)
    lengths = [0, 1, limit - 1, limit, limit + 1, 100, 0]
    codes = [list(range(100 - n, 100)) for n in lengths]
    values, offsets = (torch.from_numpy(a.astype(np.int32)) for a in (np.concatenate(codes), np.cumsum([0, *lengths])))
    table = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    expected, _ = pooled(table, codes, "decay", rates, torch.ones(len(lengths), 9))
    table[: 100 - limit] = np.nan
    layer = Decay(rates=rates).build(3, "seen")
    torch.testing.assert_close(layer(table, Bag(values, offsets, values, offsets)), expected, atol=1e-6, rtol=0)

    g = GraphBuilder()
    g.input("codes", np.int64, ["U", "T"])
    content = g.serialize(layer.lower(g, g.constant(table), "codes"), 9, {})
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    for rows in (range(7), range(1), range(3)):  # as wide as the longest, no code at all, and below the reach
        width = max([1, *(lengths[r] for r in rows)])
        padded = np.array([codes[r] + [-1] * (width - lengths[r]) for r in rows])
        found = session.run(None, {"codes": padded})[0]
        np.testing.assert_allclose(found, expected[: len(rows)], atol=1e-6)


def test_a_reach_beyond_the_history_costs_nothing() -> None:
    """A rate near 1 reads millions of interactions, of which a history has three."""
    rates = (0.5, 0.9999999)
    assert (reach(rates) or 0) > 10**8
    table = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    g = GraphBuilder()
    g.input("codes", np.int64, ["U", "T"])
    content = g.serialize(Decay(rates=rates).build(3, "seen").lower(g, g.constant(table), "codes"), 6, {})
    assert len(content) < 10_000
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    expected, _ = pooled(table, [[1, 2, 3], [4]], "decay", rates, torch.ones(2, 6))
    found = session.run(None, {"codes": np.array([[1, 2, 3], [4, -1, -1]])})[0]
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.98, 0.9999, 1.0])
def test_the_weights_of_a_mean_add_up_to_one(rate: float) -> None:
    n = torch.tensor([0, 1, 2, 33, 1000])
    expected = [0.0] + [1 / sum(rate**a if a else 1.0 for a in range(k)) for k in (1, 2, 33, 1000)]
    assert inverse_weight_sum(n, rate).tolist() == pytest.approx(expected, rel=1e-3)


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remembers how much the largest tensor that anything gave had to hold, in numbers of four bytes."""

    n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            self.n = max(self.n, x.untyped_storage().nbytes() // 4 if isinstance(x, Tensor) else 0)
        return out


@pytest.mark.parametrize("chunks", [1, 3])
def test_memory_grows_with_the_interactions_of_a_batch_not_with_their_square(chunks: int) -> None:
    n, width = 900, 2
    number = torch.arange(chunks).repeat(n // chunks)
    last = torch.arange(chunks * SCAN_CHUNK - 1, n * SCAN_CHUNK, chunks * SCAN_CHUNK)
    known = Prefixes(
        torch.ones(n, SCAN_CHUNK, dtype=torch.int64), number, last, torch.full((len(last),), 32.0 * chunks)
    )
    table = torch.ones(2, width, requires_grad=True)
    with Largest() as largest:  # type: ignore[no-untyped-call]
        found = pool(table, known, Decay(rates=(0.5, 1.0)))
        torch.autograd.backward(found.sum())
    torch.testing.assert_close(found, torch.ones(len(last), 2 * width))
    assert largest.n <= n * SCAN_CHUNK * 2 * width < n * n


# ---- nothing of what came later


ACTIONS = st.lists(
    st.tuples(
        st.integers(0, 2), st.integers(0, ITEMS - 1), st.booleans(), st.integers(0, 6),
        st.sampled_from([TRAIN, TRAIN, TRAIN, VALIDATION, TEST]),
    ),
    min_size=2, max_size=15, unique_by=lambda row: row[:2],
)  # fmt: skip


@settings(deadline=None, max_examples=25)
@given(rows=ACTIONS, data_of=st.data())
def test_what_comes_later_or_is_held_out_changes_no_state_and_what_came_before_does(
    rows: list[Row], data_of: st.DataObject
) -> None:
    rows = [(0, 0, True, 3, TRAIN), *[r for r in rows if r[:2] != (0, 0)]]
    target = data_of.draw(st.sampled_from([i for i, r in enumerate(rows) if r[4] == TRAIN]))
    now = (rows[target][3], target)

    def states(changed: list[Row]) -> dict[str, Tensor]:
        inputs = before(world(changed), np.array([target]))
        return {name: pool(table_for(base()), bag_of(inputs, name), Decay(rates=RATES)) for name in KINDS.values()}

    def other(row: Row) -> Row:
        return (row[0], (row[1] + 1) % ITEMS, not row[2], row[3], row[4])

    def mine_before(i: int) -> bool:
        return rows[i][0] == rows[target][0] and rows[i][4] == TRAIN and (rows[i][3], i) < now

    start = states(rows)
    # Everything but what the user did before in training becomes something else, the target too.
    later = states([r if mine_before(i) else other(r) for i, r in enumerate(rows)])
    assert all(torch.equal(start[n], later[n]) for n in start)
    fewer = states([r for i, r in enumerate(rows) if mine_before(i) or i <= target])
    assert all(torch.equal(start[n], fewer[n]) for n in start)
    if past := [i for i in range(len(rows)) if mine_before(i)]:
        one = data_of.draw(st.sampled_from(past))
        without = states([other(r) if i == one else r for i, r in enumerate(rows)])
        assert not any(torch.equal(start[n], without[n]) for n in start)


# ---- the towers


def model_of(data: Dataset, **options: Any) -> TwoTower:
    torch.manual_seed(0)
    tower = {"layers": [5]} | options
    config = ModelConfig.model_validate(
        {"width": 4, "embedding_std": 0.5, "pairs": [{"user": tower, "item": {"layers": [5]}}]}
    )
    return TwoTower(config, data.encoders.fields("user"), data.encoders.fields("item")).eval()


@pytest.mark.parametrize("options", [{}, {"field_norm": True, "senet": {"enabled": True}}])
def test_a_users_vector_at_a_moment_is_the_one_it_has_where_nothing_came_after(options: dict[str, Any]) -> None:
    data = long_world(5)
    model = model_of(data, **options)
    rng = np.random.default_rng(0)
    picked = rng.choice(np.flatnonzero(data.parts == TRAIN), 40, replace=False)
    with torch.no_grad():
        at_once = model.user_vectors(before(data, picked))
        for vector, i in zip(at_once, picked, strict=True):
            order = np.arange(len(data.parts))
            kept = (data.times < data.times[i]) | ((data.times == data.times[i]) & (order < i))
            past = replace(data, parts=np.where(kept, data.parts, TEST).astype(np.int8))
            past = assemble_dataset(
                data.encoders, data.users.frame, data.items.frame, past.pairs,
                np.where((order == i) | kept, past.parts, TEST).astype(np.int8), data.times,
            )  # fmt: skip
            past.users.columns.update(
                {f.name: past.history(f.history, kept & (data.parts == TRAIN)) for f in sequences(data)}
            )
            then = SideTensors(past.users, past.encoders.fields("user")).take(data.pairs.user[[i]].astype(np.int64))
            torch.testing.assert_close(model.user_vectors(then)[0], vector, atol=2e-5, rtol=1e-4)
