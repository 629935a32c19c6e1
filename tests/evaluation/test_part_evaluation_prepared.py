"""An evaluation of prepared data is that of the same tables in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compared import comparison_data
from disk_worlds import on_disk_and_in_memory
from mykinds.metrics import Herfindahl, TailShare

from twotower.config.experiment import Config
from twotower.data.dataset import Dataset
from twotower.data.splits import TEST, VALIDATION
from twotower.evaluation.comparison import compare_factors
from twotower.evaluation.config import EvaluationConfig
from twotower.evaluation.factors import Factors
from twotower.evaluation.metrics import METRICS, Arp, Diversity, Gini, Novelty
from twotower.evaluation.part_evaluation import PartEvaluation, evaluate_model
from twotower.evaluation.ranking import evaluation_queries

NAMED = (TailShare(), Herfindahl(), Novelty(), Diversity(column="item_id"), Arp(), Gini())
OPTIONS: dict[str, Any] = {
    "k": (2, 7),
    "bootstrap": 20,
    "new_user_below": 12,
    "metrics": NAMED,
    "slices": ("user_id",),
    "slice_min_users": 2,
}


def vectors(data: Dataset, seed: int = 0) -> Factors:
    """Vectors with equal scores among them."""
    rng = torch.Generator().manual_seed(seed)
    users, items = (torch.randint(-2, 3, (len(side), 4), generator=rng).float() for side in (data.users, data.items))
    return Factors(users, items)


@pytest.mark.parametrize("split", ["last", "time", "random"])
@pytest.mark.parametrize(("max_users", "weighted"), [(0, False), (9, False), (0, True)])
def test_every_metric_slice_interval_and_baseline_of_a_disk_is_that_of_memory(
    tmp_path: Path, split: str, max_users: int, weighted: bool
) -> None:
    disk, memory = on_disk_and_in_memory(tmp_path / "world", split, weighted)
    config = EvaluationConfig(max_users=max_users, weighted=weighted, **OPTIONS)
    for part in (VALIDATION, TEST):
        found, expected = (PartEvaluation.from_factors(vectors(d), d, part, config) for d in (disk, memory))
        names = {name.partition("@")[0] for name in found.metrics()}
        assert names == {*(kind.kind for kind in METRICS), "tail_share", "herfindahl"}
        assert found.users.tolist() == expected.users.tolist()
        for of_disk, of_memory in (
            (found.metrics(), expected.metrics()),
            (found.slices(), expected.slices()),
            (found.intervals(), expected.intervals()),
        ):
            assert of_disk.keys() == of_memory.keys()
            for name, value in of_disk.items():
                # A sum over pairs follows their order, which is that of users on a disk; all others have the same bits.
                rounding = 1e-12 if name == "log_loss" else 0
                assert value == pytest.approx(of_memory[name], rel=rounding, abs=0, nan_ok=True), name
    whole = evaluate_model(lambda part: vectors(disk, part), disk, config)
    assert whole == pytest.approx(evaluate_model(lambda part: vectors(memory, part), memory, config), rel=1e-6)


@pytest.mark.parametrize("split", ["last", "time", "random"])
def test_a_comparison_on_a_disk_is_that_of_memory(tmp_path: Path, split: str) -> None:
    found = []
    for data in on_disk_and_in_memory(tmp_path / "world", split):
        test = comparison_data(data, np.arange(1, len(data.users), 2))
        found.append(compare_factors(vectors(data), vectors(data, 1), test, [3, 5], 50))
    assert found[0] == found[1]
    assert {c.metric for c in found[0]} > {"auc", "ndcg@3", "recall@5"}


def test_the_summary_says_which_users_are_not_ranked_and_why(tmp_path: Path) -> None:
    disk, memory = on_disk_and_in_memory(tmp_path / "world", "time")
    config = Config().evaluation.model_copy(update={"max_users": 9})
    for data in (disk, memory):
        every = evaluation_queries(data, TEST, Config().evaluation)
        tested, liked = (len(np.unique(data.test.user[keep])) for keep in (slice(None), data.test.positive))
        assert every.summary.read == tested
        assert every.summary.kept == len(every.users) == liked
        some = evaluation_queries(data, TEST, config)
        assert f"{liked - 9} are beyond evaluation.max_users" in str(some.summary)
        assert some.summary.kept == len(some.users) == 9
