"""Recent popularity ranks by what is popular when a user is asked, by the half-life and the weights of the mix."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from trainers import weights
from waves import N_ITEMS, SCHEMA, trending, waves, world
from worlds import settings

from twotower import api, runs
from twotower.arrays.pieces import ones
from twotower.config.experiment import Config
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.split import SplitConfig
from twotower.data.splits import TEST, VALIDATION
from twotower.data.tables import check
from twotower.errors import ConfigError, Interrupted, RunError
from twotower.evaluation.factors import Factors
from twotower.evaluation.moments import ContextFactors
from twotower.features.categorical import Categorical
from twotower.features.day_of_week import DayOfWeek
from twotower.features.values import UNKNOWN
from twotower.files import layout
from twotower.index.exact import Exact
from twotower.publishing.bundle_evaluation import evaluate_bundle
from twotower.reports.compare import compare_runs
from twotower.retrieval.request import Method, Request
from twotower.retrieval.retriever import Retriever
from twotower.runs.evaluation import QueryShard, _Rankings
from twotower.scorers.recent_popularity import PopularityTerms, RecentPopularity
from twotower.scorers.trending import RecentScores, half_lives_of
from twotower.train.mix import Mix
from twotower.train.trainer import Trainer


def config(recent: bool = True, **sections: Any) -> Config:
    base: dict[str, Any] = {
        "scorers": ["trending"] if recent else [],
        "model": {
            "similarity": "dot", "temperature": 1.0, "unknown_rate": 0.0, "width": 8,
            "pairs": [{"user": {"layers": []}, "item": {"layers": []}}],
        },
        "loss": {"kind": "softmax"},
        "negatives": {"full": True},
        "train": {"epochs": 2, "batch_size": 256, "lr": 0.02, "monitor": "validation.ndcg@5", "device": "cpu"},
        "evaluation": {"k": [5], "bootstrap": 0},
    }  # fmt: skip
    return settings(**base | sections)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recent") / "run"
    api.fit(world(), SCHEMA, config(split={"kind": "last"}), folder=path)
    return path


def test_a_run_finds_what_is_popular_at_the_time_and_keeps_it(folder: Path) -> None:
    """Three items of ninety have seven tenths of the rows of a day, and a user has some of them."""
    run, plain = runs.load(folder), api.fit(world(), SCHEMA, config(recent=False, split={"kind": "last"}))
    for part in ("validation", "test"):
        assert plain.metrics[f"{part}.recall@5"] < 0.2
        assert run.metrics[f"{part}.recall@5"] > 0.4
    assert run.metrics["baseline.trending.recall@5"] > run.metrics["baseline.popularity.recall@5"] + 0.2
    assert "baseline.trending.recall@5" not in plain.metrics
    assert api.evaluate(run)["test.recall@5"] == pytest.approx(run.metrics["test.recall@5"])
    compared = {c.metric: c for c in compare_runs(plain, run, resamples=100)}["recall@5"]
    assert (compared.a, compared.b) == pytest.approx((plain.metrics["test.recall@5"], run.metrics["test.recall@5"]))


def test_the_towers_are_those_without() -> None:
    plain, fitted = (Trainer(world(), config(recent)) for recent in (False, True))
    for trainer in (plain, fitted):
        trainer.run()
    found = weights(fitted)
    for name, weight in weights(plain).items():
        assert torch.equal(found.pop(name), weight)
    assert sorted(found) == [f"terms.trending.{name}" for name in ("ids.values", "numbers")]


def test_items_have_what_is_popular_before_the_test_part(folder: Path) -> None:
    """Method 1, recommendations and bundles serve that; the evaluation of a time takes it off."""
    run = runs.load(folder)
    bias, known = trending(run.model), RecentPopularity.before(run.dataset, TEST)
    wanted = known.scores_at_end(bias.terms)
    factors = run.factors()
    assert not factors.moves
    plain = run.factors().items[:, -1].clone()
    codes = np.asarray(run.dataset.items.columns["item_id"])
    np.testing.assert_allclose(bias.ids.values.numpy()[codes], wanted, rtol=1e-5)
    known = RecentPopularity.before(run.dataset, TEST)
    of_new = float(bias.terms.new * np.log1p(len(known.items)))
    assert float(bias.ids.values[UNKNOWN]) == pytest.approx(of_new, rel=1e-5)
    with torch.no_grad():
        bias.ids.values.zero_()
    np.testing.assert_allclose(plain - run.factors().items[:, -1], wanted, atol=1e-5)
    during = runs.load(folder).factors_during(TEST)
    assert during.moves
    zeroed = run.factors_during(TEST)
    users = np.arange(len(run.dataset.users))
    np.testing.assert_allclose(during.catalogue_scores(users), zeroed.catalogue_scores(users), atol=1e-4)


def test_a_bundle_serves_the_end_of_the_log_and_says_so(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = runs.load(folder)
    api.publish(run, tmp_path / "store", Exact())
    retriever = api.retriever(tmp_path / "store")
    user = str(run.dataset.users.ids[5])
    methods: tuple[Method, ...] = (1, 2)
    for method in methods:
        found = retriever.recommend(Request(user), 5, method)
        assert [i.id for i in found.items] == [i.id for i in api.recommend(run, user, 5).items]
    with caplog.at_level(logging.WARNING):
        measured = evaluate_bundle(retriever)["index"]
    assert "ranks by the popularity at the end of the rows before its test part" in caplog.text
    assert measured["recall@5"] < run.metrics["test.recall@5"] - 0.1


def test_a_user_of_whom_nothing_is_known_gets_what_is_popular_now(folder: Path, tmp_path: Path) -> None:
    run = runs.load(folder)
    bundle = api.publish(run, tmp_path / "store", Exact())
    retriever = api.retriever(tmp_path / "store")
    positives = run.dataset.item_positive_counts
    known = RecentPopularity.before(run.dataset, TEST)
    end = np.array([known.times[-1] + 1])
    now = known.at(end, trending(run.model).terms.half_life)[0]
    wanted = sorted(range(N_ITEMS), key=lambda row: (-now[row], -positives[row], row))[:5]
    assert wanted != np.argsort(-positives, kind="stable")[:5].tolist(), "the wave has gone on"
    found = retriever.recommend(Request("nobody"), 5)
    assert found.source == "popular"
    assert [i.id for i in found.items] == run.dataset.items.ids.gather(wanted).cast(pl.String).to_list()
    batch = retriever.recommend_frame(pl.DataFrame({"user_id": ["nobody"]}), 5)
    assert batch["item_id"].cast(pl.String).to_list() == [i.id for i in found.items]
    assert api.recommend(run, "nobody", 5).items == found.items
    path = bundle.folder / layout.POPULARITY
    for numbers in (np.full(N_ITEMS, np.nan, np.float32), np.zeros(N_ITEMS), np.zeros(N_ITEMS - 1, np.float32)):
        np.save(path, numbers)
        with pytest.raises(RunError, match="popularity"):
            Retriever(bundle)


def test_of_a_split_by_time_a_bundle_has_the_numbers_of_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """All test rows are later than what is counted."""
    run = api.fit(world(kind="time"), SCHEMA, config(split={"kind": "time"}), folder=tmp_path / "run")
    assert trending(run.model).is_fitted
    api.publish(run, tmp_path / "store", Exact())
    with caplog.at_level(logging.WARNING):
        evaluate_bundle(api.retriever(tmp_path / "store"))
    assert "what is popular" not in caplog.text, "no test row is earlier than what is counted"
    users = np.arange(len(run.dataset.users))
    scores = [found.catalogue_scores(users) for found in (run.factors(), run.factors_during(TEST))]
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=1e-4)


RARE = SCHEMA.model_copy(
    update={"features": (SCHEMA.features[0], Categorical(name="item_id", side="item", min_count=20))}
)


@pytest.mark.parametrize("context", [(), (DayOfWeek(name="day", default=3),)])
def test_an_item_of_an_unknown_id_is_served_as_it_is_evaluated(context: tuple[DayOfWeek, ...], tmp_path: Path) -> None:
    """Its code is not its own, so the vectors of the bundle have what the tower cannot. Nobody takes the last item."""
    schema = RARE.model_copy(update={"features": (*RARE.features, *context)})
    model = config().model.model_dump() | {"pairs": [{"user": {"layers": [8]}, "item": {"layers": [8]}}]}
    tables = check(None, pl.DataFrame({"item_id": range(N_ITEMS + 1)}), waves(), schema)
    run = api.fit(tables, schema, config(split={"kind": "time"}, model=model), folder=tmp_path / "run")
    codes = np.asarray(run.dataset.items.columns["item_id"])
    unknown, bias = codes == UNKNOWN, trending(run.model)
    assert unknown.sum() > 5
    at_end = RecentPopularity.before(run.dataset, TEST).scores_at_end(bias.terms)
    assert np.abs(at_end[unknown]).max() > 0.1
    known = RecentPopularity.before(run.dataset, TEST)
    of_new = float(bias.terms.new * np.log1p(len(known.items)))
    assert float(bias.ids.values[UNKNOWN]) == pytest.approx(of_new, rel=1e-5)
    assert at_end[-1] == pytest.approx(of_new, rel=1e-5)
    assert unknown[-1]
    rows = run.dataset.part_indices(TEST)
    users = run.dataset.pairs.user[rows].astype(np.int64)
    during = run.factors_during(TEST).catalogue_scores(users, rows)
    api.publish(run, tmp_path / "store", Exact())
    retriever = api.retriever(tmp_path / "store")
    served = torch.from_numpy(retriever.index.vectors(np.arange(len(codes))))
    torch.testing.assert_close(served, run.factors().items, rtol=0, atol=1e-5)
    if not context:
        torch.testing.assert_close(run.factors().catalogue_scores(users), during, rtol=0, atol=1e-4)
    found = evaluate_bundle(retriever)["live"]
    assert found["recall@5"] == pytest.approx(run.metrics["test.recall@5"], abs=2e-3)


@pytest.mark.parametrize("kind", ["last", "random"])
def test_each_part_has_its_own_times(kind: str) -> None:
    """Of a random split both parts have the same vectors, and other times."""
    run = api.fit(world(kind=kind), SCHEMA, config(split={"kind": kind}))
    own = [run.factors_during(part).added[0] for part in (VALIDATION, TEST)]
    assert isinstance(own[0], RecentScores)
    assert isinstance(own[1], RecentScores)
    assert len(own[0].popularity.items) < len(own[1].popularity.items)
    assert not np.array_equal(own[0].asked, own[1].asked)
    rankings = _Rankings(run, run.config.evaluation)
    for part, name in ((VALIDATION, "validation"), (TEST, "test")):
        found = rankings.best_items(QueryShard("model", part, 0, 100_000))[1]
        queries = rankings._queries[part]
        assert queries.hits(found).any(1).mean() == pytest.approx(run.metrics[f"{name}.hit_rate@5"], abs=1e-6)


def test_with_features_of_the_context_a_pair_has_its_own_time() -> None:
    schema = SCHEMA.model_copy(update={"features": (*SCHEMA.features, DayOfWeek(name="day", default=3))})
    model = config().model.model_dump() | {"pairs": [{"user": {"layers": [8]}, "item": {"layers": [8]}}]}
    run = api.fit(world(schema=schema), schema, config(model=model, split={"kind": "last"}))
    scorer = run.factors_during(TEST)
    assert isinstance(scorer, ContextFactors)
    rows = run.dataset.part_indices(TEST)
    users, items = (a[rows].astype(np.int64) for a in (run.dataset.pairs.user, run.dataset.pairs.item))
    of_catalogue = scorer.catalogue_scores(users, rows).numpy()[np.arange(len(rows)), items]
    np.testing.assert_allclose(scorer.part_scores(run.dataset, TEST), of_catalogue, atol=1e-4)
    assert run.metrics["test.recall@5"] > 0.5


def test_it_has_the_weight_of_new_items_in_place_of_a_bias_of_cold_ones() -> None:
    model = config().model.model_dump() | {"cold_item_bias": True}
    with pytest.raises(ConfigError, match="has a weight for items without a row, as model.cold_item_bias has"):
        Trainer(world(), config(model=model))


def test_own_counts_and_recent_popularity_add_up() -> None:
    schema = SCHEMA.model_copy(update={"duplicates": "keep"})
    log = pl.concat([waves(), waves().sample(fraction=0.3, seed=0).with_columns(at=pl.col("at") + 7 * 86_400)])
    data = build_dataset(check(None, None, log, schema), schema, SplitConfig(kind="last"))
    found = []
    for recent in (False, True):
        scorers = [{"kind": "repeats", "history": "taken"}, *["trending"] * recent]
        trainer = Trainer(data, config(scorers=scorers, evaluation={"k": [5], "repeats": "allow"}))
        trainer.run()
        assert trainer.model.terms["repeats"].is_fitted
        found.append(trainer._score(trainer._scorer()))
    assert found[1] > found[0] + 0.1


def drawn(terms: PopularityTerms, n: int = 4000, rows: int = 2000) -> tuple[Dataset, Factors]:
    """A log of items that come and go, and rows of validation drawn by the softmax of random products and of what is
    popular by `terms`. Without a weight of new items nobody takes one."""
    rng, item = np.random.default_rng(1), np.arange(N_ITEMS)
    odds = 2 * np.sin(np.arange(n)[:, None] * 2 * np.pi / rng.integers(200, 2 * n, N_ITEMS) + rng.random(N_ITEMS) * 7)
    odds[np.arange(n)[:, None] < np.where(item % 2, rng.integers(0, n, N_ITEMS), 0)] = -np.inf
    taken = (odds + rng.gumbel(size=odds.shape)).argmax(1)
    times, asked = 1_500_000_000 + 2 * np.arange(n), 1_500_000_001 + 2 * rng.integers(100, n, rows)
    known = RecentPopularity(taken, times, ones(n), N_ITEMS)
    users, items = (rng.normal(size=(k, 3)).astype(np.float32) for k in (n + rows, N_ITEMS))
    logits = users[n:] @ items.T + known.scores(asked, terms)
    if not terms.new:
        first = np.full(N_ITEMS, n)
        np.minimum.at(first, taken, np.arange(n))
        logits[np.searchsorted(times, asked)[:, None] <= first] = -np.inf
    chosen = (logits + rng.gumbel(size=logits.shape)).argmax(1)
    frame = pl.DataFrame(
        {
            "user_id": np.append(np.arange(n + rows), 0),
            "item_id": np.concatenate([taken, chosen, [0]]),
            "at": np.concatenate([times, asked, [times[-1] + 9]]),
            "part": ["train"] * n + ["validation"] * rows + ["test"],
        }
    )
    tables = check(None, pl.DataFrame({"item_id": item}), frame, SCHEMA)
    data = build_dataset(tables, SCHEMA, SplitConfig(kind="column", column="part"))
    ids = (table.ids.cast(pl.Int64).to_numpy() for table in (data.users, data.items))
    return data, Factors(*(torch.from_numpy(vectors[at]) for vectors, at in zip((users, items), ids, strict=True)))


@pytest.mark.parametrize(
    "terms",
    [
        PopularityTerms(120.0, 1.5, -0.8, 0.4),
        PopularityTerms(12.0, 1.0, 0.7, -0.5),
        PopularityTerms(40.0, 1.0, -0.7, -0.3, -0.4),
        PopularityTerms(400.0, -1.0, 0.5, 0.4, 0.3),
    ],
)
def test_the_half_life_and_the_weights_by_which_items_are_taken_are_found(terms: PopularityTerms) -> None:
    data, first = drawn(terms)
    trainer = Trainer(data, config())
    found = Mix(trainer.model, data, trainer.recipe, trainer.context).fit(first, [])
    assert found
    ((half_life, of_columns),) = found.terms
    trending(trainer.model).write(data, half_life, of_columns)
    wrote = trending(trainer.model).terms
    assert wrote.half_life == terms.half_life
    wanted = terms if terms.new else terms._replace(new=min(wrote.age, 0.0) + min(wrote.total, 0.0))
    assert wrote[1:] == pytest.approx(wanted[1:], abs=0.15)


def test_fault_B2_a_signal_ends_the_fit_of_what_is_popular(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(world(), config())

    def press(rows: int) -> list[float]:
        os.kill(os.getpid(), signal.SIGTERM)
        return half_lives_of(rows)

    monkeypatch.setattr("twotower.scorers.trending.half_lives_of", press)
    with pytest.raises(Interrupted, match="after the last step"):
        trainer.run()
    assert not trending(trainer.model).is_fitted


@pytest.mark.parametrize(
    ("update", "sections", "split", "says"),
    [
        ({"time": ""}, {}, {"kind": "random"}, "the latest rows of the log, and they have no time; name its column in "
            "schema.time, or leave"),
        ({}, {"train": {"epochs": 1}}, {"kind": "random", "validation": 0.0}, "fitted to the validation part, and the "
            "split has none; leave"),
        ({"features": (SCHEMA.features[0], Categorical(name="item_id", side="item", hash_buckets=8))}, {}, {},
            "without hash_buckets; add one"),
    ],
)  # fmt: skip
def test_what_it_needs_is_said(
    update: dict[str, Any], sections: dict[str, Any], split: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        Trainer(world(schema=SCHEMA.model_copy(update=update), **split), config(**sections))


def test_stacking_does_not_go_with_it() -> None:
    schema = SCHEMA.model_copy(update={"label": "liked"})
    log = waves().with_columns(liked=pl.int_range(pl.len()) % 2)
    model = config().model.model_dump() | {"stacking": True}
    pointwise = config(model=model, loss={"kind": "bce"}, negatives={}, train={"epochs": 1})
    with pytest.raises(ConfigError, match="weighs the terms of a logit, and the scorer 'trending' would be added"):
        api.fit((None, None, log), schema, pointwise)
