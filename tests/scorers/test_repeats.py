"""The baseline of repeats, and evaluations that rank what users have seen."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from worlds import REPLAYED_SCHEMA as KEPT
from worlds import replayed, settings

from twotower import api
from twotower.config.experiment import Config
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.split import SplitConfig
from twotower.data.splits import TEST
from twotower.data.tables import check
from twotower.data.unknown_ids import rows_of_ids
from twotower.errors import ConfigError, RunError
from twotower.evaluation.baselines import popularity_baseline
from twotower.evaluation.part_evaluation import evaluate_model
from twotower.index.exact import Exact
from twotower.reports.compare import compare_runs
from twotower.retrieval.retriever import Retriever
from twotower.scorers import alone
from twotower.scorers.repeats import OwnItemsAlone
from twotower.store.store import Store

BY_TIME = SplitConfig(kind="time", test=0.2, validation=0.1)


def kept(**split: Any) -> Dataset:
    return build_dataset(check(None, None, replayed(), KEPT), KEPT, BY_TIME.model_copy(update=split))


def ranked(data: Dataset, part: int, users: np.ndarray, k: int) -> list[list[int]]:
    """The best items of the baseline, -1 after the last."""
    scores = OwnItemsAlone(data, part).catalogue_scores(users).numpy()
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    found: list[list[int]] = np.where(np.take_along_axis(scores, best, 1) > -np.inf, best, -1).tolist()
    return found


def repeating(repeats: str, k: int = 5, **train: Any) -> Config:
    return settings(
        split=BY_TIME.model_dump(), loss={"kind": "softmax"}, evaluation={"k": [k], "repeats": repeats},
        train={"monitor": f"validation.recall@{k}"} | train,
    )  # fmt: skip


@pytest.mark.parametrize("weighted", [False, True])
def test_own_counts_equal_a_loop(weighted: bool) -> None:
    actions, k = replayed(), 6
    weight = np.random.default_rng(5).integers(3, size=len(actions)) if weighted else np.ones(len(actions))
    schema = KEPT.model_copy(update={"weight": "w"}) if weighted else KEPT
    data = build_dataset(check(None, None, actions.with_columns(w=weight), schema), schema, BY_TIME)
    times = data.times
    users = np.arange(len(data.users))[::-1].copy()
    expected = []
    for user in users.tolist():
        mine = [n for n in range(len(data.parts)) if data.pairs.user[n] == user and data.parts[n] < TEST]
        counts = Counter[int]()
        for n in mine:
            counts[int(data.pairs.item[n])] += int(weight[n])
        counts = +counts  # an item of weight 0 is none
        mine = sorted((n for n in mine if weight[n]), key=lambda n: int(times[n]))
        latest = {int(data.pairs.item[n]): int(times[n]) for n in mine}
        order = sorted(counts, key=lambda i: (-counts[i], -latest[i], i))[:k]
        expected.append(order + [-1] * (k - len(order)))
    assert ranked(data, TEST, users, k) == expected
    assert ranked(data, 0, users, 3) == [[-1] * 3] * len(users)


def test_own_counts_of_prepared_data_are_those_of_memory(tmp_path: Path) -> None:
    replayed().write_parquet(tmp_path / "log.parquet")
    config = settings(data={"interactions": str(tmp_path / "log.parquet")}, split=BY_TIME.model_dump())
    disk, memory = api.prepare_folder(config, KEPT, tmp_path / "prepared"), kept()
    assert disk.items.ids.equals(memory.items.ids)
    rows = rows_of_ids(memory.users.ids, disk.users.ids).to_numpy().astype(np.int64)
    expected = ranked(memory, TEST, np.arange(len(memory.users)), 6)
    assert ranked(disk, TEST, rows, 6) == expected


@pytest.mark.parametrize("repeats", ["exclude", "allow", "only"])
def test_a_run_and_its_bundle_rank_repeats_as_the_setting_says(tmp_path: Path, repeats: str) -> None:
    config = repeating(repeats)
    run = api.fit((None, None, replayed()), KEPT, config, folder=tmp_path / "run")
    assert ("baseline.repeats.recall@5" in run.metrics) == (repeats != "exclude")
    assert api.evaluate(run)["test.recall@5"] == pytest.approx(run.metrics["test.recall@5"])
    api.publish(run, tmp_path / "store", Exact())
    served = api.evaluate_bundle(Retriever(Store(tmp_path / "store").current()))
    for way in ("exact", "index", "live"):
        assert served[way]["recall@5"] == pytest.approx(run.metrics["test.recall@5"], abs=1e-5)
    other = repeating("allow")
    if repeats == "only":
        again = api.fit((None, None, replayed()), KEPT, other, folder=tmp_path / "other")
        with pytest.raises(
            RunError, match="evaluation.repeats is 'only' in .* and 'allow' in .*; compare runs with the same setting"
        ):
            compare_runs(run, again)


@pytest.mark.parametrize("repeats", ["allow", "only"])
def test_repeats_need_a_log_that_keeps_them(repeats: str) -> None:
    last = KEPT.model_copy(update={"duplicates": "last"})
    config = repeating(repeats)
    words = (
        rf"^evaluation\.repeats = '{repeats}' ranks pairs that a user repeats, and schema\.duplicates = 'last' leaves "
        rf"none; set "
        r"schema\.duplicates = 'keep', or evaluation\.repeats = 'exclude' for a log without repeats$"
    )
    with pytest.raises(ConfigError, match=words):
        api.fit((None, None, replayed()), last, config)
    data = build_dataset(check(None, None, replayed(), last), last, BY_TIME)
    factors = popularity_baseline(data.train, len(data.users), len(data.items))
    assert not [m for m in evaluate_model(lambda _: factors, data, config.evaluation, alone=alone) if "repeats" in m], (
        "of an earlier run"
    )


def test_a_model_of_a_log_with_many_repeats_finds_more_than_own_counts() -> None:
    # Four other worlds gave 0.76 to 0.80 against 0.69 to 0.72: own counts know no product of a user's group that the
    # user has not taken.
    config = repeating("allow", 10, epochs=20)
    tower = {"layers": [16]}
    model = config.model.model_validate({"width": 16, "pairs": [{"user": tower, "item": tower}]})
    negatives = config.negatives.model_validate({"full": True})
    actions = replayed(n_users=120, n_items=75, n=2500)
    evaluation = config.evaluation.model_copy(update={"bootstrap": 200})
    changed = {"model": model, "negatives": negatives, "evaluation": evaluation}
    run = api.fit((None, None, actions), KEPT, config.model_copy(update=changed))
    assert run.metrics["test.recall@10.low"] > run.metrics["baseline.repeats.recall@10"] > 0.6
    assert run.metrics["test.recall@10"] > run.metrics["baseline.repeats.recall@10"] + 0.05
