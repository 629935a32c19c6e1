"""Paired comparison of two runs: known answers, honest intervals, and refusals."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from compared import comparison_data
from worlds import CHECKERBOARD_SCHEMA, checkerboard, settings

from twotower.arrays.pieces import ones
from twotower.config.experiment import Config
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.splits import TEST
from twotower.data.tables import check
from twotower.errors import RunError
from twotower.evaluation.bootstrap import bootstrap_counts, paired_bootstrap
from twotower.evaluation.comparison import Comparison
from twotower.evaluation.factors import Factors
from twotower.evaluation.metrics.auc import Auc, auc
from twotower.evaluation.metrics.measured import ScoredPairs
from twotower.evaluation.part_evaluation import PartEvaluation
from twotower.model.two_tower import TwoTower
from twotower.reports.compare import compare_runs, summarize
from twotower.runs import Run


@dataclass(frozen=True)
class Scored(Run):
    """A run whose vectors are given."""

    vectors: Factors | None = None

    def factors(self, part: int = TEST) -> Factors:
        assert self.vectors is not None
        return self.vectors


def scored(data: Dataset, vectors: Factors, **sections: dict[str, object]) -> Scored:
    config = settings(**sections)
    model = TwoTower(config.model, data.encoders.fields("user"), data.encoders.fields("item"))
    return Scored(None, config, data, model, {}, [], vectors)


def oracle(data: Dataset) -> Factors:
    """Likes what has the id's parity, whatever the rows."""
    return Factors(*(torch.from_numpy(s.ids.to_numpy() % 2 * 2 - 1).float()[:, None] for s in (data.users, data.items)))


def untied(vectors: Factors, data: Dataset) -> Factors:
    """The vectors with more numbers, which tell items of equal scores apart."""
    more = noise(data)
    both = (vectors.users, more.users / 1000), (vectors.items, more.items)
    return Factors(*(torch.cat(parts, 1) for parts in both))


def noise(data: Dataset, seed: int = 0) -> Factors:
    rng = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(len(data.users), 4, generator=rng), torch.randn(len(data.items), 4, generator=rng))


def by_metric(comparisons: list[Comparison]) -> dict[str, Comparison]:
    return {c.metric: c for c in comparisons}


def prepared(users: pl.DataFrame, items: pl.DataFrame, actions: pl.DataFrame, **split: Any) -> Dataset:
    config = Config().split.model_copy(update=split)
    return build_dataset(check(users, items, actions, CHECKERBOARD_SCHEMA), CHECKERBOARD_SCHEMA, config)


def test_a_run_against_itself_has_no_difference(board: Dataset) -> None:
    one = scored(board, noise(board))
    found = compare_runs(one, one, resamples=50)
    assert [c.metric for c in found] == ["auc", "gauc", "recall@5", "ndcg@5", "mrr@5", "hit_rate@5"]
    for c in found:
        assert (c.difference, c.low, c.high, c.p) == (0, 0, 0, 1)
        assert c.verdict == "no significant difference"
    assert summarize(found) == "Overall: no significant difference in any of 6 metrics."


def test_an_oracle_is_better_than_noise_and_the_comparison_is_symmetric(board: Dataset) -> None:
    # At k = 2 the three liked items of six that are left can still be missed.
    bad, good = (scored(board, f, evaluation={"k": [2]}) for f in (noise(board), oracle(board)))
    there, back = compare_runs(bad, good, resamples=200), compare_runs(good, bad, resamples=200)
    for c in there:
        assert c.b == 1 or c.metric == "recall@2"
        assert c.verdict == "B is better", c
        assert c.p < 0.05
    for c, d in zip(there, back, strict=True):
        assert d.verdict == "A is better"
        assert (d.a, d.b, d.difference) == (c.b, c.a, -c.difference)
        assert [d.low, d.high] == pytest.approx([-c.high, -c.low])
    assert summarize(there) == "Overall: B is better in all 6 metrics."
    assert summarize(back) == "Overall: A is better in all 6 metrics."


def test_the_values_are_those_of_the_runs_own_reports(board: Dataset) -> None:
    a, b = scored(board, noise(board), evaluation={"k": [5, 3]}), scored(board, noise(board, 1))
    found = by_metric(compare_runs(a, b, resamples=5))
    for name, r in (("a", a), ("b", b)):
        own = PartEvaluation.from_factors(r.factors(), board, TEST, r.config.evaluation).metrics()
        assert {m: getattr(c, name) for m, c in found.items()} == pytest.approx({m: own[m] for m in found})
    assert "recall@3" not in found  # only A reports it


SLICES = {"k": [5, 3], "slices": ["user_id"], "slice_min_users": 8, "new_user_below": 24, "new_item_below": 32}


def test_slices_have_the_values_of_the_runs_own_reports_and_paired_intervals(board: Dataset) -> None:
    users, items, actions = checkerboard()
    other = prepared(users.reverse(), items, actions)  # its users have other rows
    a, b = (scored(d, f, evaluation=SLICES) for d, f in ((board, noise(board)), (other, untied(oracle(other), other))))
    found = {f"{c.metric}.{c.of}": c for c in compare_runs(a, b, resamples=200, sliced=True) if c.of}
    for name, r in (("a", a), ("b", b)):
        own = PartEvaluation.from_factors(r.factors(), r.dataset, TEST, r.config.evaluation).slices()
        assert {m: getattr(c, name) for m, c in found.items()} == pytest.approx({m: own[m] for m in found})
        assert {m for m in own if not m.startswith(("rows.", "users.")) and not m.endswith(".gap")} == set(found)
    assert {c.of for c in found.values()} > {"new_user", "new_item", "head", "tail"}
    assert len({c.of for c in found.values() if c.of.startswith("user_id=")}) == 4
    for c in found.values():
        assert c.difference == c.b - c.a > 0
        assert c.low <= c.difference <= c.high
        assert c.verdict == "B is better" or c.users < 20, c
    # Items of A alone move its rows, and are ranked for neither.
    more = prepared(users, pl.concat([pl.DataFrame({"item_id": [98]}), items]), actions)
    again = [c for c in compare_runs(scored(more, noise(more), evaluation=SLICES), b, resamples=5, sliced=True) if c.of]
    assert {f"{c.metric}.{c.of}": c.b for c in again} == pytest.approx({m: c.b for m, c in found.items()})
    new = board.user_counts < 24
    c = found["auc.new_user"]
    assert c.users == new[np.unique(board.test.user)].sum()
    assert c.users < len(new)
    assert [c for c in compare_runs(a, b, resamples=5) if c.of] == []


def test_rows_are_matched_by_id(board: Dataset) -> None:
    users, items, actions = checkerboard()
    other = prepared(users.reverse(), items.sample(fraction=1.0, shuffle=True, seed=3), actions)
    assert other.items.ids.to_list() != board.items.ids.to_list()
    found = compare_runs(scored(board, oracle(board)), scored(other, oracle(other)), resamples=20)
    assert all(c.a == c.b and c.difference == 0 for c in found)
    # Ids as text are the same ids.
    text = prepared(*(t.with_columns(pl.col("^.*_id$").cast(pl.String)) for t in (users, items, actions)))
    same = compare_runs(scored(board, noise(board)), scored(text, reordered(noise(board), board, text)), resamples=20)
    assert all(c.difference == 0 for c in same)


def reordered(vectors: Factors, one: Dataset, other: Dataset) -> Factors:
    """The vectors of `one` in the rows of `other`, whose ids are text."""
    rows = [
        [mine.ids.cast(pl.String).to_list().index(i) for i in theirs.ids.to_list()]
        for mine, theirs in ((one.users, other.users), (one.items, other.items))
    ]
    return Factors(vectors.users[rows[0]], vectors.items[rows[1]])


def test_items_that_one_run_lacks_or_has_seen_are_left_out_for_both(
    board: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    users, items, actions = checkerboard()
    more = prepared(users, pl.concat([items, pl.DataFrame({"item_id": [98, 99]})]), actions)
    found = compare_runs(scored(board, oracle(board)), scored(more, oracle(more)), resamples=20)
    assert all(c.difference == 0 for c in found)
    n = len(board.items)
    assert f"compared over the {n} items that both have: A has 0 more and B 2, among which" in caplog.text
    caplog.clear()
    # B's train part lacks most rows; what A has seen is still no answer.
    few = replace(board, parts=np.where((board.parts == 0) & (np.arange(len(board.parts)) % 3 > 0), 3, board.parts))
    found = compare_runs(scored(board, oracle(board)), scored(few, oracle(few)), resamples=20)
    assert all(c.difference == 0 for c in found)
    assert "items that both have" not in caplog.text


def test_what_cannot_be_compared_is_refused(board: Dataset) -> None:
    one = scored(board, oracle(board))
    with pytest.raises(RunError, match="resamples = 0"):
        compare_runs(one, one, resamples=0)
    untested = replace(board, parts=np.zeros_like(board.parts))
    with pytest.raises(RunError, match="B: the run has no test part"):
        compare_runs(one, scored(untested, oracle(board)))
    broken = scored(board, Factors(torch.full((40, 1), torch.nan), torch.ones(30, 1)))
    with pytest.raises(RunError, match="B: its vectors are not finite"):
        compare_runs(one, broken)
    liked = replace(board, pairs=replace(board.pairs, positive=np.ones_like(board.pairs.positive)))
    two = scored(liked, oracle(board), evaluation={"k": [3]})
    with pytest.raises(RunError, match="nothing to compare"):
        compare_runs(scored(liked, oracle(board)), two)
    assert "auc" not in by_metric(compare_runs(two, two, resamples=5))  # one class only


def test_the_interval_covers_the_true_difference_about_95_times_in_100() -> None:
    rng = np.random.default_rng(0)
    worlds, users, truth = 400, 60, 0.05
    a = rng.random((users, worlds))
    b = np.clip(a + truth + 0.2 * rng.standard_normal(a.shape), -5, 5)
    low, high, _ = paired_bootstrap(a, b, np.ones_like(a), 300)
    assert 0.91 <= ((low <= truth) & (truth <= high)).mean() <= 0.975


def test_without_a_difference_the_verdict_is_wrong_about_5_times_in_100() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.random((2, 80, 400))
    low, high, p = paired_bootstrap(a, b, np.ones_like(a), 300)
    wrong = (low > 0) | (high < 0)
    assert 0.02 <= wrong.mean() <= 0.09
    # The share tells what the interval tells.
    assert (p[wrong] <= 0.07).all()
    assert (p[~wrong] >= 0.045).all()


def test_the_resampled_auc_is_the_auc_of_the_drawn_users(board: Dataset) -> None:
    """Against a loop that copies the rows of each drawn user."""
    q = comparison_data(board, np.unique(board.test.user).astype(np.int64))
    scores = np.round(noise(board).scores(board.test), 1)  # with ties
    counts = next(iter(bootstrap_counts(q.n_users, 20, 4)))
    resampled = Auc().resampled(
        ScoredPairs(scores, q.pairs.positive, q.pairs.user, ones(len(scores))), [counts[:7], counts[7:]]
    )
    assert resampled is not None
    for found, drawn in zip(resampled, counts, strict=True):
        rows = np.repeat(np.arange(len(scores)), drawn[q.pairs.user].astype(int))
        assert found == pytest.approx(auc(scores[rows], q.pairs.positive[rows]))


def comparison(metric: str, low: float, high: float) -> Comparison:
    return Comparison(metric, 0.5, 0.5 + (low + high) / 2, (low + high) / 2, low, high, 0.5, 10)


def test_the_overall_sentence() -> None:
    up, down, same = comparison("auc", 0.1, 0.2), comparison("ndcg@5", -0.2, -0.1), comparison("gauc", -0.1, 0.1)
    assert summarize([up, same]) == "Overall: B is better in auc; no significant difference in the others."
    assert summarize([down, same]) == "Overall: A is better in ndcg@5; no significant difference in the others."
    assert summarize([up, down]) == "Overall: mixed; A is better in ndcg@5; B is better in auc."
    assert comparison("auc", 0.0, 0.2).verdict == "no significant difference"  # zero is inside
