"""Histories read by attention: every moment sees what came before it and nothing else, however the rows are cut."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from scored import rank_catalogue
from torch import Tensor
from worlds import settings

from twotower.arrays.ragged import Ragged
from twotower.config.toml import parse_config
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.side import Side
from twotower.data.tables import check
from twotower.errors import ConfigError
from twotower.features.categorical import Categorical
from twotower.features.field import InputField, PoolingSpec
from twotower.features.schema import Schema
from twotower.features.sequence import Sequence
from twotower.model.inputs.code_layout import CONTEXT_DIVISOR, HistoryWindows, Padded
from twotower.model.inputs.side_tensors import SideTensors
from twotower.model.pooling import POOLINGS
from twotower.model.pooling.history_encoder import HistoryEncoder, Rotation
from twotower.model.pooling.transformer import Transformer
from twotower.train.trainer import Trainer

WIDTH, ROWS = 8, 300
ATTENDING = ("attention", "transformer")


def encoder(pooling: str = "transformer", limit: int = 1000, max_tokens: int = 2**14, **config: Any) -> HistoryEncoder:
    torch.manual_seed(0)
    options = POOLINGS.parse({"kind": pooling, "window": limit, "heads": 2} | config)
    made = options.build(WIDTH, "history")
    assert isinstance(made, HistoryEncoder)
    made.max_tokens = max_tokens
    for p in made.parameters():  # no gate half open, no norm of ones
        p.data.add_(torch.randn_like(p) * 0.2)
    return made.eval()


TABLE = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))


def tensors(lengths: list[int], limit: int, seed: int = 0) -> tuple[SideTensors, Ragged]:
    """Rows with training histories of these lengths, in which every interaction is a moment."""
    rng = np.random.default_rng(seed)
    offsets = np.r_[0, np.cumsum(lengths)].astype(np.int64)
    n = int(offsets[-1])
    # The numbers of the interactions say nothing about their order.
    history = Ragged(rng.integers(0, ROWS, n).astype(np.int32), offsets, rng.permutation(n))
    timeline = Ragged(history.source, offsets)  # type: ignore[arg-type]
    field = InputField(
        "history", "bag", rows=ROWS, pooling=PoolingSpec(kind="transformer", window=limit), sequence=True
    )
    side = Side(pl.DataFrame({"row": np.arange(len(lengths))}), {"history": history}, "row")
    return SideTensors(side, [field], "cpu", timeline), history


def moments(history: Ragged) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], list[list[int]]]:
    """Row and interaction of every moment, users one after another, and the codes that were known."""
    assert history.source is not None
    row = np.repeat(np.arange(len(history)), history.lengths)
    known = [history.values[a : a + i].tolist() for a, b in pairwise(history.offsets.tolist()) for i in range(b - a)]
    return row, history.source, known


def one(model: HistoryEncoder, codes: list[int]) -> Tensor:
    vectors: torch.Tensor = model(TABLE, Padded(torch.tensor([codes or [-1]])))
    return vectors[0]


@pytest.mark.parametrize(
    ("pooling", "config"),
    [
        ("attention", {}),
        ("attention", {"heads": 4}),
        ("transformer", {}),
        ("transformer", {"block": "plain", "blocks": 1}),
        ("transformer", {"blocks": 3, "heads": 4}),
    ],
)
def test_a_moment_is_what_it_is_where_nothing_came_after(pooling: str, config: dict[str, Any]) -> None:
    model = encoder(pooling, **config)
    side, history = tensors([3, 0, 1, 17, 40, 2], limit=1000)
    row, source, known = moments(history)
    windows = side.take_before(row, source).bags["history"]
    assert isinstance(windows, HistoryWindows)
    assert len(windows.codes) == 1
    with torch.no_grad():
        found = model(TABLE, windows)
        for vector, codes in zip(found, known, strict=True):
            torch.testing.assert_close(vector, one(model, codes), atol=2e-5, rtol=1e-4)
            assert codes or not vector.any()


def test_a_history_longer_than_a_row_is_used_whole_and_no_moment_is_without_a_past() -> None:
    limit = 32
    side, history = tensors([150, 5, 31, 32, 33, 64, 1, 90], limit)
    row, source, known = moments(history)
    windows = side.take_before(row, source).bags["history"]
    assert isinstance(windows, HistoryWindows)
    codes, owner = windows.codes.flatten(), windows.sequence.flatten()
    wide = windows.codes.shape[1]
    assert wide <= limit
    read = 0
    for place, length, before in zip(windows.place.tolist(), windows.length.tolist(), known, strict=True):
        assert length == len(before)
        if not before:
            continue
        start = place // wide * wide
        visible = [int(codes[p]) for p in range(start, place + 1) if owner[p] == owner[place]]
        assert visible == before[-len(visible) :]  # the latest ones, up to the present
        assert len(visible) >= min(len(before), limit // CONTEXT_DIVISOR)
        read = max(read, len(visible))
    assert read > limit // 2
    # What is read twice is the past of the rows, no more.
    assert windows.codes.numel() <= (len(source) + len(windows.codes) * (limit // CONTEXT_DIVISOR + 1))


def test_cut_rows_give_what_their_items_give_alone() -> None:
    limit = 16
    model = encoder(limit=limit)
    side, history = tensors([70, 9, 33], limit)
    row, source, _ = moments(history)
    windows = side.take_before(row, source).bags["history"]
    assert isinstance(windows, HistoryWindows)
    wide = windows.codes.shape[1]
    with torch.no_grad():
        found = model(TABLE, windows)
        for u, (place, length) in enumerate(zip(windows.place.tolist(), windows.length.tolist(), strict=True)):
            if not length:
                continue
            r, at = divmod(place, wide)
            mine = windows.sequence[r] == windows.sequence[r, at]
            codes = [int(c) for c in windows.codes[r, : at + 1][mine[: at + 1]]]
            torch.testing.assert_close(found[u], one(model, codes), atol=2e-5, rtol=1e-4)


def test_whole_histories_are_read_up_to_the_limit_without_what_is_left_out() -> None:
    side, history = tensors([9, 0, 3, 5], limit=4)
    assert history.source is not None
    rows = np.array([0, 3, 1, 2])
    bag = side.take(rows).bags["history"]
    assert isinstance(bag, Padded)
    wanted = [history.values[history.offsets[r] : history.offsets[r + 1]].tolist()[-4:] for r in rows]
    assert [[c for c in row if c >= 0] for row in bag.codes.tolist()] == wanted
    out = history.source[[8, 12, 2]]  # the last of row 0, the first of row 3, and one that is too old to be read
    bag = side.take(rows, out).bags["history"]
    assert isinstance(bag, Padded)
    values = history.values.tolist()
    wanted = [values[4:8], values[13:17], [], values[9:12]]
    assert [[c for c in row if c >= 0] for row in bag.codes.tolist()] == wanted


@pytest.mark.parametrize("pooling", ATTENDING)
def test_many_histories_at_once_are_what_they_are_one_by_one(pooling: str) -> None:
    model = encoder(pooling, limit=20, max_tokens=50)  # several passes
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, ROWS, n).tolist() for n in (3, 0, 25, 1, 20, 19, 60, 7, 0)]
    codes = torch.full((len(rows), 60), -1)
    for i, r in enumerate(rows):
        codes[i, : len(r)] = torch.tensor(r, dtype=torch.long)
    with torch.no_grad():
        found = model(TABLE, Padded(codes))
        for vector, r in zip(found, rows, strict=True):
            torch.testing.assert_close(vector, one(model, r[-20:]), atol=2e-5, rtol=1e-4)


def test_rotated_products_know_distances_only() -> None:
    x, y = torch.randn(1, 6), torch.randn(1, 6)
    a = [Rotation(50, 6)(v.expand(50, 6)) for v in (x, y)]
    products = a[0] @ a[1].T
    for distance in (-7, 0, 12):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4, rtol=1e-4)
    assert (products[0] - products[0, 0]).abs().max() > 0.1


# ---- training


def interleaved_world(n_users: int = 120, ring: int = 20, length: int = 18, **options: Any) -> Dataset:
    """A user goes round two rings by turns, so that the next item follows the last but one."""
    rng = np.random.default_rng(0)
    rows = []
    for u in range(n_users):
        starts = rng.integers(0, ring, 2)
        rows += [(u, int(t % 2 * ring + (starts[t % 2] + t // 2) % ring), t) for t in range(length)]
    user, item, time = zip(*rows, strict=True)
    pooling = {"kind": "transformer", "window": 16, "heads": 2, "dropout": 0.0, "input_dropout": 0.0} | options
    schema = Schema(
        user_id="u", item_id="i", time="t", time_unit="order", duplicates="last",
        features=(
            Sequence(name="order", side="user", pooling=pooling),
            Categorical(name="item", column="i", side="item"),
        ),
    )  # fmt: skip
    actions = pl.DataFrame({"u": user, "i": item, "t": time})
    return build_dataset(check(None, None, actions, schema), schema, parse_config({"split": {"kind": "last"}})[1].split)


def trainer(data: Dataset, **train: Any) -> Trainer:
    config = settings(
        model={
            "width": 32, "similarity": "dot", "temperature": 1.0, "bias": False, "unknown_rate": 0.0,
            "pairs": [{
                "user": {"layers": [32], "output_norm": True},
                "item": {"layers": []},
            }],
        },
        loss={"kind": "softmax"},
        negatives={"full": True, "mask_positives": False},
        train={"history_scope": "causal", "batch_size": 512, "lr": 0.01, "monitor": "validation.recall@5"} | train,
        split={"kind": "last"},
    )  # fmt: skip
    return Trainer(data, config)


@pytest.mark.parametrize("block", ["gated", "plain"])
def test_a_world_whose_next_item_follows_the_last_but_one_is_learnt_by_a_transformer(block: str) -> None:
    data = interleaved_world(block=block)
    done = trainer(data, epochs=20, precision="bf16")
    done.run()
    factors = done.factors()
    _, _, hit = rank_catalogue(factors.users, factors.items, data.validation, [data.train], 1)
    assert hit.mean() > 0.75


def test_pairs_with_other_interactions_as_history_train_attention_too() -> None:
    data = interleaved_world(30, heads=4, dropout=0.2, input_dropout=0.2)
    config = settings(
        model={"width": 8, "pairs": [{"user": {"layers": [8]}, "item": {"layers": [8]}}]},
        train={"epochs": 1, "monitor": "validation.recall@5"}, negatives={"random": 1}, split={"kind": "last"},
    )  # fmt: skip
    made = Trainer(data, config)
    before = {n: p.detach().clone() for n, p in made.model.named_parameters() if "encoders" in n}
    some, _, _ = made.objective.examples(made.objective.sampler.epoch(0), 0)
    batch = made.objective.batcher(some.user, some.item, some.label, some.weight, some.source, some.source)
    bag = batch.users.bags["order"]
    assert isinstance(bag, Padded)
    assert bag.codes.shape[1] <= 16
    made.run()
    assert before
    assert all(not torch.equal(before[n], p) for n, p in made.model.named_parameters() if n in before)


# ---- errors


def test_heads_must_share_the_width_in_pairs_of_numbers() -> None:
    with pytest.raises(ConfigError, match=r"width 8, which 3 heads cannot share.*multiple of 6"):
        Transformer(window=5, heads=3).build(8, "history")
