"""Evaluation of a run whose rankings an engine shares: the numbers of one process."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from context_worlds import HOUR, hourly, hourly_schema, hourly_settings
from ray_worlds import running_ray
from worlds import CHECKERBOARD_SCHEMA, checkerboard, settings

from twotower import api
from twotower.arrays.types import Ints, Shaped
from twotower.cli.app import run_command
from twotower.data.splits import TEST, VALIDATION
from twotower.engines.engine import Job, JobEngine, Made, Shard
from twotower.errors import ConfigError, RunError
from twotower.evaluation.config import Metrics
from twotower.evaluation.factors import CatalogueScorer
from twotower.evaluation.part_evaluation import evaluate_model
from twotower.evaluation.ranking import EvaluationQueries, evaluation_queries
from twotower.runs import Run
from twotower.runs.evaluation import QueryShard, _rank, evaluate
from twotower.scorers import alone
from twotower.scorers.transitions import Transitions

USERS = 1_300
"""Three blocks of at most 512."""


class PickledEngine(JobEngine):
    """Makes the shards here, last ones first, by what another process would get."""

    name = "pickled"
    is_remote = True

    def __init__(self, address: str = "", threads: int = 0) -> None:
        self.shards: list[object] = []

    def run(
        self, job: Job[Shard, Made], shards: Sequence[Shard], done: Callable[[Made], None], modules: Sequence[str] = ()
    ) -> None:
        make: Callable[[Shard], Made] = pickle.loads(pickle.dumps(job))()
        for shard in reversed(shards):
            self.shards.append(shard)
            done(pickle.loads(pickle.dumps(make(shard))))


def trained(folder: Path, split: str) -> Run:
    _, items, actions = checkerboard(USERS, 8)
    config = settings(
        split={"kind": split}, train={"epochs": 1}, model={"width": 8}, evaluation={"k": [2, 5], "bootstrap": 20}
    )
    return api.fit((None, items, actions), CHECKERBOARD_SCHEMA, config, folder=folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose validation and test parts follow its training."""
    return trained(tmp_path_factory.mktemp("run") / "run", "last")


def ranked_by(engine: JobEngine, run: Run) -> Metrics:
    ranked, monitor = _rank(run, engine, 1), run.config.train.monitor
    return evaluate_model(
        run.factors_during, run.dataset, run.config.evaluation, ranked=ranked, monitor=monitor, alone=alone
    )


@pytest.mark.parametrize("split", ["last", "random"])
def test_the_numbers_are_those_of_one_process(split: str, run: Run, tmp_path: Path) -> None:
    """Intervals and baselines too; a random split has the vectors of validation for both parts."""
    found = run if split == "last" else trained(tmp_path / "run", split)
    engine = PickledEngine()
    expected = api.evaluate(found)
    assert {"test.recall@5.low", "baseline.popularity.recall@5", "validation.ndcg@2"} <= expected.keys()
    assert ranked_by(engine, found) == expected
    n_queries = {(s.by, s.part): s.stop for s in engine.shards[::-1] if isinstance(s, QueryShard)}
    assert n_queries.keys() == {("model", VALIDATION), *((by, TEST) for by in ("model", "popularity", "bias"))}
    assert len(engine.shards) == sum(-(-n // 512) for n in n_queries.values()) > 4


def test_the_calling_process_ranks_no_shared_user_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for transition counts, whose table other processes do not make."""
    expected, ranked = api.evaluate(run), _rank(run, PickledEngine(), 1)
    by = list[type]()
    top_k = EvaluationQueries.top_k

    def counted(queries: EvaluationQueries, factors: CatalogueScorer, k: int) -> Shaped[Ints, "Q K"]:
        by.append(type(factors))
        return top_k(queries, factors, k)

    monkeypatch.setattr(EvaluationQueries, "top_k", counted)
    monitor, evaluation = run.config.train.monitor, run.config.evaluation
    found = evaluate_model(run.factors_during, run.dataset, evaluation, ranked=ranked, monitor=monitor, alone=alone)
    assert found == expected
    assert by == [Transitions]


def test_some_queries_in_contexts_are_ranked_as_among_all(tmp_path: Path) -> None:
    config = hourly_settings(train={"epochs": 1})
    run = api.fit(hourly(), hourly_schema(HOUR), config, folder=tmp_path / "run")
    queries = replace(evaluation_queries(run.dataset, TEST, run.config.evaluation), block=8)
    best = queries.top_k(run.factors_during(), 5)
    assert len(best) > 16
    for rows in (slice(0, 8), slice(8, 16), slice(16, len(best))):
        assert np.array_equal(queries.take(rows).top_k(run.factors_during(), 5), best[rows])
    assert ranked_by(PickledEngine(), run) == api.evaluate(run)


def test_the_settings_are_those_of_the_call(run: Run) -> None:
    """Not those that the folder has."""
    evaluation = run.config.evaluation.model_copy(update={"k": (1, 7), "max_users": 600, "repeats": "allow"})
    changed = replace(run, config=run.config.model_copy(update={"evaluation": evaluation}))
    expected = api.evaluate(changed)
    assert ranked_by(PickledEngine(), changed) == expected != api.evaluate(run)


def test_a_copy_of_another_run_is_refused(run: Run) -> None:
    with pytest.raises(RunError, match="holds another model than when the call began"):
        ranked_by(PickledEngine(), replace(run, sha256="0" * 64))
    fewer = replace(run.dataset, pairs=run.dataset.pairs.take(slice(0, -1)), parts=run.dataset.parts[:-1])
    with pytest.raises(RunError, match="holds other data than the run of the call"):
        ranked_by(PickledEngine(), replace(run, dataset=fewer))
    with pytest.raises(ConfigError, match="the run has no folder from which other processes load it"):
        ranked_by(PickledEngine(), replace(run, folder=None))


@pytest.mark.system  # Ray starts
def test_ray_measures_what_one_process_measures(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    expected = api.evaluate(run)
    with running_ray():
        found = evaluate(run, engine="ray", threads=2, shard_users=1)
        assert found == pytest.approx(expected, rel=1e-12)
        baselines = {name for name in expected if name.startswith("baseline.")}
        assert {name: found[name] for name in baselines} == {name: expected[name] for name in baselines}
        assert run_command(["evaluate", str(run.folder), "--engine", "ray", "--threads", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == pytest.approx(expected, rel=1e-12)
