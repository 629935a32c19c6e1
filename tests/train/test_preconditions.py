"""Recipes that do not go with the data are refused before anything is trained."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pytest
from worlds import CHECKERBOARD_SCHEMA, ID_FEATURES, checkerboard, settings

from twotower.arrays.types import Ints
from twotower.config.experiment import Config
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.evidence import OrderEvidence
from twotower.data.split import SplitConfig
from twotower.data.splits import VALIDATION
from twotower.data.tables import check
from twotower.errors import ConfigError, DataError
from twotower.evaluation.metrics.measured import ScoredPairs
from twotower.evaluation.metrics.metric import PairMetric
from twotower.features.categorical import Categorical
from twotower.features.field import MEAN, PoolingSpec
from twotower.features.schema import Schema
from twotower.features.sequence import Sequence
from twotower.train.defaults import with_defaults
from twotower.train.preconditions import check_order, check_times, order_problem, training_order
from twotower.train.trainer import Trainer


@pytest.mark.parametrize(
    ("features", "time", "history_scope", "words"),
    [
        ([Sequence(name="s", side="user", pooling="decay")], "at", "leave_batch_out",
         "feature 's': pooling = 'decay' needs the order of time; set train.history_scope = 'causal'"),
        ([Sequence(name="s", side="item")], "at", "causal",
            "feature 's': a sequence on the item side does not go with"),
        ([Sequence(name="s", side="user", max_length=5)], "at", "causal", "feature 's': a sequence with max_length"),
        ([Sequence(name="s", side="user")], "", "causal", "'causal' needs a time; name its column in schema.time"),
        ([], "", "causal", "'causal' needs a time"),
    ],
)  # fmt: skip
def test_sequences_that_cannot_be_had_as_asked_are_refused(
    features: list[Sequence], time: str, history_scope: str, words: str
) -> None:
    schema = CHECKERBOARD_SCHEMA.model_copy(update={"time": time, "features": (*ID_FEATURES, *features)})
    data = build_dataset(check(*checkerboard(), schema), schema, SplitConfig())
    with pytest.raises(ConfigError, match=words):
        Trainer(data, settings(loss={"kind": "softmax"}, train={"history_scope": history_scope}))


@pytest.mark.parametrize(
    ("tower", "names"),
    [
        ({"layers": [8], "dropout": 0.2}, "dropout changes nothing"),
        ({"layers": [8], "dropout": 0.2, "layer_norm": True, "activation": "GELU"}, "dropout and layer_norm and "
            "activation change nothing"),
        ({"layers": [8], "activation": "GELU", "activate_last": True}, ""),
        ({"layers": [8], "activation": "GELU", "join": "sum", "dropout": 0.2}, ""),
        ({"layers": [8, 8], "dropout": 0.2, "layer_norm": True}, ""),
    ],
)  # fmt: skip
def test_options_of_hidden_units_of_a_tower_without_any_are_told(
    tower: dict[str, Any], names: str, caplog: pytest.LogCaptureFixture
) -> None:
    data = build_dataset(check(*checkerboard(), CHECKERBOARD_SCHEMA), CHECKERBOARD_SCHEMA, SplitConfig())
    Trainer(data, settings(model={"pairs": [{"user": tower, "item": {"layers": [8]}}]}))
    told = [line.split(",")[0] for line in caplog.messages if "no hidden units" in line]
    assert told == ([f"model.pairs.0.user: {names}"] if names else [])


AT_ONE_RATE = PoolingSpec.model_validate({"kind": "decay", "rates": [0.8]})


def test_a_history_that_no_step_reads_needs_no_scope_of_the_past() -> None:
    """A pair that is solved after the last epoch reads the order of the log, whatever the steps read."""
    decayed = Sequence(name="s", side="user", share_embedding=False, pooling=AT_ONE_RATE, interactions="positive")
    schema = CHECKERBOARD_SCHEMA.model_copy(update={"time": "at", "features": (*ID_FEATURES, decayed)})
    data = build_dataset(check(*checkerboard(), schema), schema, SplitConfig())
    item = {"fields": ["item_id"], "layers": []}
    pairs = [{"user": {"fields": [name], "layers": []}, "item": item} for name in ("user_id", "s")]
    sections: dict[str, Any] = {
        "model": {"pairs": pairs, "similarity": "dot", "bias": False},
        "loss": {"kind": "softmax"},
        "negatives": {"full": True},
    }
    Trainer(data, settings(**sections, train={"solved": [{"kind": "slit"}]}))
    with pytest.raises(ConfigError, match="feature 's': pooling = 'decay' needs the order of time"):
        Trainer(data, settings(**sections))


def test_ranks_beyond_the_catalogue_and_an_attribute_that_is_not_there_are_refused_before_training(
    board: Dataset,
) -> None:
    cases: list[tuple[dict[str, object], str]] = [
        ({"hard": 1}, r"negatives.hard.ranks starts at 101, and the catalogue has 30 items; lower it"),
        ({"attribute": "item_ids"}, r"no item feature 'item_ids' .*did you mean 'item_id'"),
    ]
    for negatives, words in cases:
        with pytest.raises(ConfigError, match=words):
            Trainer(board, settings(loss={"kind": "softmax"}, negatives=negatives))


def test_positives_alone_are_enough_for_candidates_and_not_for_pairs() -> None:
    schema = CHECKERBOARD_SCHEMA.model_copy(update={"positive_above": -1.0})
    data = build_dataset(check(*checkerboard(), schema), schema, SplitConfig())
    monitor = {"monitor": "validation.recall@5", "epochs": 1}
    with pytest.raises(DataError, match="loss.kind = 'softmax'"):
        Trainer(data, settings(train=monitor))
    sizes = settings(loss={"kind": "softmax"}, train=monitor, negatives={"mask_positives": False})
    assert Trainer(data, sizes).run().history
    observed = settings(loss={"kind": "softmax"}, train=monitor, negatives={"disliked": 1})
    with pytest.raises(ConfigError, match=r"negatives\.disliked .* every training interaction is a positive; drop it"):
        Trainer(data, observed)


def weighed(likes: float, dislikes: float) -> Dataset:
    """The checkerboard with a weight for likes and one for dislikes."""
    users, items, log = checkerboard(20, 16)
    schema = CHECKERBOARD_SCHEMA.model_copy(update={"weight": "w"})
    log = log.with_columns(w=pl.when(pl.col("liked") == 1).then(likes).otherwise(dislikes))
    return build_dataset(check(users, items, log, schema), schema, SplitConfig())


def test_dislikes_of_weight_0_are_no_second_class() -> None:
    data, monitor = weighed(1, 0), {"monitor": "validation.recall@5", "epochs": 1}
    with pytest.raises(DataError, match="every training interaction of a weight above 0 is a positive, as 'liked' is"):
        Trainer(data, settings(train=monitor))
    disliked = settings(loss={"kind": "softmax"}, train=monitor, negatives={"disliked": 1})
    with pytest.raises(ConfigError, match="every training interaction of a weight above 0 is a positive; drop it"):
        Trainer(data, disliked)
    drawn = settings(negatives={"random": 1}, train=monitor)
    assert with_defaults(drawn.model_copy(update={"train": drawn.train.model_copy(update={"monitor": ""})}), data) == (
        settings(negatives={"random": 1}, train=monitor | {"monitor": "validation.recall@5"})
    )
    assert Trainer(data, drawn)
    weight = (data.parts != VALIDATION).astype(np.float32)
    with pytest.raises(
        ConfigError, match=r"no row of the validation part has a weight above 0, .* split.validation = 0"
    ):
        Trainer(replace(data, pairs=replace(data.pairs, weight=weight)), drawn)


@pytest.mark.parametrize(("weight", "kind", "said"), [
    (0.02, "softmax", "0.02"), (0.02, "gbce", "0.02"), (30, "softmax", "30"), (1, "softmax", ""), (0.02, "bce", ""),
])  # fmt: skip
def test_weights_that_are_no_numbers_of_rows_are_one_line_of_the_log(
    weight: float, kind: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    Trainer(weighed(weight, 1), settings(loss={"kind": kind}, train={"epochs": 1}))
    lines = [r.getMessage() for r in caplog.records if "mean weight" in r.getMessage()]
    assert len(lines) == bool(said)
    if said:
        assert lines[0].startswith(
            f"the mean weight of the training targets is {said}, and a loss over candidates reads a"
        )
        assert "\n" not in lines[0]


class Accuracy(PairMetric):
    """A metric that is defined for one class."""

    def value(self, pairs: ScoredPairs) -> float:
        return float(((pairs.scores > 0) == pairs.positive).mean())


class Separation(PairMetric):
    """A metric that is not."""

    def value(self, pairs: ScoredPairs) -> float:
        liked, disliked = pairs.scores[pairs.positive], pairs.scores[~pairs.positive]
        return float(liked.mean() - disliked.mean()) if len(liked) and len(disliked) else float("nan")


@pytest.mark.parametrize("refused", ["auc", "gauc", "separation", ""])
def test_a_monitor_says_itself_if_one_class_is_enough(refused: str) -> None:
    schema = CHECKERBOARD_SCHEMA.model_copy(update={"label": ""})
    data = build_dataset(check(*checkerboard(), schema), schema, SplitConfig())
    sections: dict[str, dict[str, Any]] = {
        "loss": {"kind": "softmax"},
        "evaluation": {"k": [5], "metrics": [Accuracy(), Separation()]},
    }
    if not refused:
        for name in ("accuracy", "log_loss", "recall@5"):
            Trainer(data, settings(**sections, train={"monitor": f"validation.{name}"}))
        return
    with pytest.raises(ConfigError, match=f"'validation.{refused}' .* one class only; use .* 'validation.recall@5'"):
        Trainer(data, settings(**sections, train={"monitor": f"validation.{refused}"}))


@pytest.mark.parametrize(
    ("given", "told"), [({"batch_size": 256}, True), ({"batch_size": 0}, False), ({"batch_size": 32}, False)]
)
def test_a_batch_that_leaves_few_steps_is_told(
    given: dict[str, Any], told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    data = build_dataset(check(*checkerboard(), CHECKERBOARD_SCHEMA), CHECKERBOARD_SCHEMA, SplitConfig())
    Trainer(data, settings(train=given))
    line = (
        "train.batch_size = 256 makes 4 steps an epoch, too few to learn much; set 0, which follows the number of rows"
    )
    assert (line in caplog.text) == told
    assert ("steps an epoch, too few" in caplog.text) == told


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
        "split.kind = 'last', train.history_scope = 'causal' and the pooling 'decay' of feature 'met' need a time, and "
        "schema.time is empty; name its column in schema.time, or set split.kind = 'random', train.history_scope = "
        "'leave_batch_out' and schema.features.0.pooling = 'mean'"
    )
    with pytest.raises(ConfigError, match="split.kind = 'time' needs a time"):
        check_times(Schema(user_id="user", item_id="item"), SplitConfig(kind="time"), Config())
    with pytest.raises(
        ConfigError, match=r"split.from_train = 'time', .* need a time.*set split.from_train = 'random'"
    ):
        check_times(SCHEMA.model_copy(update={"time": ""}), SplitConfig(kind="files", from_train="time"), config())
    check_times(SCHEMA, SplitConfig(kind="last"), config())
    check_times(Schema(user_id="user", item_id="item"), SplitConfig(), Config())
