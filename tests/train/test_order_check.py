"""Settings that read an order are refused without times, and told so if the log shows none; a world is swept from none to strong."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pytest
from worlds import settings

from twotower.arrays.types import Ints
from twotower.config.experiment import Config
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.order_evidence import OrderEvidence
from twotower.data.split import SplitConfig
from twotower.data.tables import check
from twotower.errors import ConfigError
from twotower.features.categorical import Categorical
from twotower.features.field import MEAN
from twotower.features.schema import Schema
from twotower.features.sequence import Sequence
from twotower.train.order_check import check_order, check_times, order_problem, training_order

SCHEMA = Schema(
    user_id="user", item_id="item", time="at", time_unit="order",
    features=(Sequence(name="met", side="user", pooling={"kind": "decay"}), Categorical(name="item", side="item")),
)  # fmt: skip
CAUSAL = {"loss": {"kind": "softmax"}, "train": {"history_scope": "causal"}}
N_USERS, LENGTH = 300, 20


def log_of(strength: float) -> tuple[Ints, Ints]:
    """Users and items, oldest first: the next item follows from the last with the probability `strength`."""
    rng = np.random.default_rng(0)
    items = rng.integers(60, size=(N_USERS, LENGTH))
    for at in range(1, LENGTH):
        follows = rng.random(N_USERS) < strength
        items[follows, at] = (items[follows, at - 1] + 7) % 60
    return np.repeat(np.arange(N_USERS), LENGTH), items.ravel()


def dataset(strength: float, times: Ints | None = None, schema: Schema = SCHEMA) -> Dataset:
    user, item = log_of(strength)
    frame = pl.DataFrame({"user": user, "item": item, "at": np.arange(len(user)) if times is None else times})
    return build_dataset(check(None, None, frame, schema), schema, SplitConfig(kind="last"))


def config(**sections: dict[str, Any]) -> Config:
    return settings(**{key: sections.get(key, {}) | value for key, value in CAUSAL.items()})


@pytest.mark.parametrize(("strength", "exists"), [(0.0, False), (0.02, False), (0.2, True), (0.5, True), (1.0, True)])
def test_a_causal_training_is_told_that_there_is_no_order(
    strength: float, exists: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "twotower"):
        check_order(dataset(strength), config())
    said = [
        "train.history_scope = 'causal' and the pooling 'decay' of feature 'met' need an order, and the log shows none",
        "set train.history_scope = 'leave_batch_out' and schema.features.0.pooling = 'mean' if the times are not those",
    ]
    assert [all(text in caplog.text for text in said), any(text in caplog.text for text in said)] == [not exists] * 2


def test_shuffled_times_have_no_order_and_others_read_none(caplog: pytest.LogCaptureFixture) -> None:
    shuffled = dataset(1.0, np.random.default_rng(0).permutation(N_USERS * LENGTH))
    features = tuple(f.model_copy(update={"pooling": MEAN}) if f.history else f for f in shuffled.schema.features)
    means = replace(shuffled, schema=shuffled.schema.model_copy(update={"features": features}))
    with caplog.at_level(logging.WARNING, "twotower"):
        check_order(means, settings(loss={"kind": "softmax"}))
    assert not caplog.text
    with caplog.at_level(logging.WARNING, "twotower"):
        check_order(shuffled, settings(loss={"kind": "softmax"}))
    assert "the pooling 'decay' of feature 'met' needs an order, and the log" in caplog.text, (
        "of a pair that no step reads"
    )
    caplog.clear()
    with caplog.at_level(logging.WARNING, "twotower"):
        check_order(shuffled, config())
    assert "the log shows none: pairs (item, next item) agree 1.0" in caplog.text or "agree 0.9" in caplog.text


def test_one_time_for_all_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"all times of 'at' are equal for each user; name another column .*'mean'$"):
        check_order(dataset(1.0, np.zeros(N_USERS * LENGTH, np.int64)), config())


def test_the_order_of_a_training_is_that_of_some_whole_users() -> None:
    data = dataset(1.0)
    every, some = training_order(data), training_order(data, max_rows=500)
    assert every is not None
    assert some is not None
    assert every.pairs == len(data.train) - N_USERS
    assert 300 < some.pairs < 500
    assert every.exists
    assert some.exists
    timeless = Schema(user_id="user", item_id="item")
    frame = pl.DataFrame(dict(zip(("user", "item"), log_of(1.0), strict=True)))
    assert training_order(build_dataset(check(None, None, frame, timeless), timeless, SplitConfig())) is None


@pytest.mark.parametrize(
    ("evidence", "told"),
    [
        (OrderEvidence(1000, 25, 25, 5, 0), True),
        (OrderEvidence(999, 25, 25, 5, 0), False),  # few pairs
        (OrderEvidence(10**6, 10, 24, 5, 0), False),  # a long tail, in which no pair occurs twice either way
        (OrderEvidence(1000, 60, 25, 5, 0), False),  # an order
    ],
)
def test_nothing_is_said_of_an_order_that_few_pairs_could_not_show(evidence: OrderEvidence, told: bool) -> None:
    assert bool(order_problem(evidence)) is told


def test_without_a_time_all_that_needs_one_is_named() -> None:
    timeless = SCHEMA.model_copy(update={"time": ""})
    with pytest.raises(ConfigError) as found:
        check_times(timeless, SplitConfig(kind="last"), config())
    assert str(found.value) == (
        "split.kind = 'last', train.history_scope = 'causal' and the pooling 'decay' of feature 'met' need a time, and schema.time is "
        "empty; name its column in schema.time, or set split.kind = 'random', train.history_scope = 'leave_batch_out' and "
        "schema.features.0.pooling = 'mean'"
    )
    with pytest.raises(ConfigError, match="split.kind = 'time' needs a time"):
        check_times(Schema(user_id="user", item_id="item"), SplitConfig(kind="time"), Config())
    with pytest.raises(
        ConfigError, match=r"split.from_train = 'time', .* need a time.*set split.from_train = 'random'"
    ):
        check_times(SCHEMA.model_copy(update={"time": ""}), SplitConfig(kind="files", from_train="time"), config())
    check_times(SCHEMA, SplitConfig(kind="last"), config())
    check_times(Schema(user_id="user", item_id="item"), SplitConfig(), Config())
