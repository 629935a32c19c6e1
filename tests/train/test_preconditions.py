"""Recipes that do not go with the data are refused before anything is trained."""

from __future__ import annotations

from typing import Any

import pytest
from worlds import CHECKERBOARD_SCHEMA, ID_FEATURES, checkerboard, settings

from twotower.data.dataset import Dataset, build_dataset
from twotower.data.split import SplitConfig
from twotower.data.tables import check
from twotower.errors import ConfigError, DataError
from twotower.evaluation.metrics.measured import ScoredPairs
from twotower.evaluation.metrics.metric import PairMetric
from twotower.features.sequence import Sequence
from twotower.train.trainer import Trainer


@pytest.mark.parametrize(
    ("features", "time", "history_scope", "words"),
    [
        ([Sequence(name="s", side="user", pooling="decay")], "at", "leave_batch_out",
         "feature 's': pooling = 'decay' needs the order of time; set train.history_scope = 'causal'"),
        ([Sequence(name="s", side="item")], "at", "causal", "feature 's': a sequence on the item side does not go with"),
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
