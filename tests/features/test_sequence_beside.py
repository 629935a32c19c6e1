"""Sequences beside a sequence: their embeddings added up at each interaction, in every layout, in a bundle and in
diagnoses."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_worlds import World, build, tower
from pydantic import ValidationError
from worlds import EVERYTHING_SCHEMA, everything

from twotower.config.experiment import Config
from twotower.data.dataset import build_dataset
from twotower.data.tables import check
from twotower.features.field import PoolingSpec
from twotower.features.schema import Schema
from twotower.features.sequence import Sequence
from twotower.model.inputs.side_tensors import SideTensors
from twotower.onnx.export import export_tower

ATTENTION = PoolingSpec.model_validate({"kind": "transformer", "window": 800, "heads": 2, "blocks": 1})


def schema_of(pooling: Any, beside: tuple[str, ...] = ("brands",)) -> Schema:
    features = tuple(f for f in EVERYTHING_SCHEMA.features if not f.history and not f.computes)
    own = (
        Sequence(name="brands", side="user", feature="brand", share_embedding=False),
        Sequence(name="history", side="user", pooling=pooling, beside=beside),
    )
    return EVERYTHING_SCHEMA.model_copy(update={"features": (*features, *own)})


@cache
def world(pooling: str) -> World:
    schema = schema_of(ATTENTION if pooling == "transformer" else pooling)
    data = build_dataset(check(*everything(), schema), schema, Config().split)
    users = SideTensors(data.users, data.encoders.fields("user"), timeline=data.timeline)
    return World(data, users, SideTensors(data.items, data.encoders.fields("item")))


POOLINGS = pytest.mark.parametrize("pooling", ["mean", "decay", "ridge", "transformer"])


@POOLINGS
def test_the_embeddings_are_added_up_at_each_interaction(pooling: str) -> None:
    """One table of all pairs of an item and a brand gives the same vectors."""
    of = world(pooling)
    model = build((tower(), tower()), of=of)
    embeddings = model.towers("user")[0].embeddings
    assert "brands" not in [f.name for f in embeddings.fields]
    inputs = of.users.take(np.arange(of.users.n))
    items, brands = embeddings.rows_of("history"), embeddings.rows_of("brands")
    ids, of_brand = inputs.bags["history"].padded(), inputs.bags["brands"].padded()
    pairs = (items[:, None] + brands).flatten(0, 1)
    joined = type(ids)((ids.codes * len(brands) + of_brand.codes).where(ids.codes >= 0, -1))
    name = next(name for name, f in embeddings.others.items() if f.name == "history")
    layer: Any = embeddings.encoders[name]
    width = layer(pairs, joined).shape[1]
    found = embeddings(inputs)
    places = [found[:, i : i + width] for i in range(found.shape[1] - width + 1)]
    assert any(torch.allclose(p, layer(pairs, joined), atol=1e-5) for p in places)


@POOLINGS
def test_a_prefix_gives_what_the_whole_history_gives(pooling: str) -> None:
    """The layouts of causal training beside that of evaluation."""
    of = world(pooling)
    model = build((tower(), tower()), of=of)
    timeline = of.data.timeline
    user = int(np.argmax(timeline.lengths))
    last = timeline.row(user)[-1:].astype(np.int64)
    rows = np.array([user])
    with torch.no_grad():
        before = model.user_vectors(of.users.take_before(rows, last))
        without = model.user_vectors(of.users.take(rows, left_out=last))
        whole = model.user_vectors(of.users.take(rows))
    torch.testing.assert_close(before, without, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(before, whole, atol=1e-4)


@POOLINGS
def test_the_exported_tower_gives_what_the_model_gives(pooling: str, tmp_path: Path) -> None:
    of = world(pooling)
    model = build((tower(), tower()), (tower(fields=["history"]), tower()), of=of)
    difference = export_tower(model, "user", of.data.encoders.fields("user"), tmp_path / "user.onnx", of.data.users)
    assert difference < 1e-4


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"beside": ("brnds",)}, "names 'brnds', which is no other sequence of the users; did you mean 'brands'? "
            "(found: brands)"),
        ({"beside": ("brands", "brands")}, "names 'brands' twice; name it once"),
        ({"max_length": 3}, "whose max_length is 0, not 3; give both the same interactions"),
        ({"interactions": "positive"}, "whose interactions is 'all', not 'positive'"),
        (Sequence(name="more", side="user", beside=("brands",)), "which is added to 'history' already"),
        (Sequence(name="more", side="user", beside=("history",)), "which has a beside of its own"),
        (Sequence(name="history", side="user", beside=("sums",)), "which is pooled with 'history'; leave out the "
            "pooling of 'sums'"),
    ],
)  # fmt: skip
def test_sequences_that_cannot_stand_beside_are_refused(changed: dict[str, Any] | Sequence, words: str) -> None:
    *others, host = schema_of("mean").features
    if isinstance(changed, dict):
        others.append(host.model_copy(update=changed))
    else:
        summed = Sequence(name="sums", side="user", feature="brand", pooling=PoolingSpec(kind="sum"))
        others += [summed, changed] if changed.name == "history" else [host, changed]
    with pytest.raises(ValidationError) as e:
        Schema.model_validate(EVERYTHING_SCHEMA.model_dump() | {"features": others})
    assert words in str(e.value)
