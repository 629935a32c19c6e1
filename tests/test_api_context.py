"""A world whose right item depends on the hour, from the training to the service."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from context_worlds import HOUR, HOURS, USERS, flat, hourly, hourly_schema, hourly_settings, right_item
from service_client import Client, clients, ids

from twotower import api
from twotower.data.memmap import load_tables
from twotower.data.splits import TEST
from twotower.embedding.bulk import embed
from twotower.embedding.folder import EmbeddingsFolder
from twotower.errors import ConfigError, DataError, RunError
from twotower.evaluation.moments import ContextFactors
from twotower.evaluation.part_evaluation import evaluate_part
from twotower.features.categorical import Categorical
from twotower.features.hour_of_day import HourOfDay
from twotower.publishing.bundle_evaluation import evaluate_bundle
from twotower.reports.compare import compare_runs
from twotower.retrieval.batches import embed_batch, embed_users, recommend_batch
from twotower.retrieval.recommendation_job import recommend_users
from twotower.retrieval.request import Request
from twotower.retrieval.retriever import Retriever
from twotower.runs import Run


def in_context(run: Run) -> ContextFactors:
    found = run.factors_during(TEST)
    assert isinstance(found, ContextFactors)
    return found


EVERY = [(user, hour) for user in range(USERS) for hour in range(HOURS)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A model that reads the hour."""
    return api.fit(hourly(), hourly_schema(HOUR), hourly_settings(), folder=tmp_path_factory.mktemp("hour") / "run")


@pytest.fixture(scope="module")
def retriever(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Retriever:
    store = tmp_path_factory.mktemp("hour") / "store"
    api.publish(run, store)
    return api.retriever(store)


@pytest.fixture(scope="module")
def client(retriever: Retriever) -> Iterator[Client]:
    with clients(retriever.bundle.folder.parents[1]) as make:
        yield make()


@pytest.fixture(scope="module")
def with_defaults(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Retriever]:
    """A model that reads the hour of the log and that of the clock, both with defaults."""
    folder = tmp_path_factory.mktemp("defaults")
    features = Categorical(name="hour", side="context", default=3), HourOfDay(name="clock", default=23)
    run = api.fit(hourly(400), hourly_schema(*features), hourly_settings(train={"epochs": 2}), folder=folder / "run")
    api.publish(run, folder / "store", force=True)
    return run, api.retriever(folder / "store")


def test_the_world_is_solved_with_the_hour_and_not_without(run: Run) -> None:
    assert run.metrics["test.recall@1"] > 0.95
    blind = api.fit(hourly(), hourly_schema(), hourly_settings(train={"epochs": 3}))
    assert blind.metrics["test.recall@1"] < 0.4


@pytest.mark.parametrize(
    "sections",
    [
        {"negatives": {"random": 8, "full": False}},
        {"negatives": {"uniform": 32, "full": False}, "train": {"history_scope": "causal"}},
    ],
    ids=["per-positive", "causal"],
)
def test_every_way_of_drawing_negatives_solves_it(sections: dict[str, dict[str, object]]) -> None:
    solved = api.fit(hourly(800), hourly_schema(HOUR), hourly_settings(**sections))
    assert solved.metrics["test.recall@1"] > 0.95


def test_the_bundle_gives_the_right_item_at_every_hour(retriever: Retriever) -> None:
    for user, hour in EVERY:
        request = Request(str(user), context={"hour": hour})
        assert retriever.recommend(request, 1, 2, keep_seen=True).items[0].id == str(right_item(user, hour))


def test_the_service_answers_in_the_context_of_a_request(retriever: Retriever, client: Client) -> None:
    for user, hour in EVERY[::5]:
        body = {"user_id": user, "context": {"hour": hour}, "k": 1, "keep_seen": True}
        assert ids(client.post("/v1/recommend", body)) == [str(right_item(user, hour))]
        asked = {"user_id": user, "context": {"hour": hour}}
        vector = client.post("/v1/embed/user", asked).json()["vector"]
        expected = retriever.embed_request(Request(str(user), context={"hour": hour})).vector[0]
        np.testing.assert_allclose(vector, expected, rtol=1e-4, atol=1e-5)


def test_the_service_tells_what_the_context_is(client: Client) -> None:
    told = client.get("/v1/bundle").json()
    assert told["features"]["context"] == ["hour"]
    assert told["methods"] == [2]
    assert told["context"]["hour"] in range(HOURS)
    explained = client.post("/v1/console/explain", {"user_id": 1, "context": {"hour": 2}, "keep_seen": True, "k": 1})
    assert explained.json()["reply"]["items"][0]["id"] == str(right_item(1, 2))


def test_recent_events_do_not_save_the_vector_of_another_context(client: Client) -> None:
    client.post("/v1/events", {"user_id": 4, "events": ["1"]})
    found = [
        ids(client.post("/v1/recommend", {"user_id": 4, "context": {"hour": hour}, "k": 1, "keep_seen": True}))
        for hour in (2, 5)
    ]
    client.ask("DELETE", "/v1/events/4")
    assert found == [[str(right_item(4, hour))] for hour in (2, 5)]


@pytest.mark.parametrize(
    ("request_", "method", "told"),
    [
        (Request("1"), 2, r"request: context lacks 'hour' \(needed: hour\); give it"),
        (
            Request("1", context={"hours": 1}),
            2,
            r"request: no context 'hours'; did you mean 'hour'\? \(allowed: hour\)",
        ),
        (Request("1", context={"hour": "noon"}), 2, r"request: context 'hour' is 'noon', expected Int64"),
        (
            Request("1", context={"hour": 1}),
            1,
            r"request: method 1 .* takes no context, and user '1' has some; use method 2",
        ),
    ],
)
def test_a_wrong_context_is_refused_in_one_line(
    retriever: Retriever, request_: Request, method: Any, told: str
) -> None:
    with pytest.raises(DataError, match=told) as refused:
        retriever.recommend(request_, 1, method)
    assert "\n" not in str(refused.value)


def test_an_unknown_value_and_a_missing_one_are_told(retriever: Retriever) -> None:
    unknown, missing = (retriever.recommend(Request("1", context={"hour": h}), 1, 2) for h in (99, None))
    assert unknown.unknown == missing.unknown == ["hour"]
    assert unknown.items == missing.items


def test_a_new_user_has_the_context_and_an_empty_request_is_popular(retriever: Retriever) -> None:
    assert retriever.recommend(Request("new", context={"hour": 3}), 1, 2).source == "cold_start"
    assert retriever.recommend(Request("new"), 1, 2).source == "popular"


def test_evaluation_of_the_bundle_is_that_of_the_run(run: Run, retriever: Retriever) -> None:
    found = evaluate_bundle(retriever)
    assert set(found) == {"live", "live_exact", "intervals"}, "there are no precomputed vectors to measure"
    for way in ("live", "live_exact"):
        assert found[way]["recall@1"] == pytest.approx(run.metrics["test.recall@1"])


def test_method_1_is_measured_with_the_vectors_of_the_defaults(with_defaults: tuple[Run, Retriever]) -> None:
    run, retriever = with_defaults
    found = evaluate_bundle(retriever)
    assert found["live"]["recall@1"] == pytest.approx(run.metrics["test.recall@1"])
    factors, test = run.factors(), run.dataset.test
    queries = {(u, h): set[int]() for u, h in zip(test.user.tolist(), _hours(run, "hour", "clock"), strict=True)}
    for u, h, i in zip(test.user.tolist(), _hours(run, "hour", "clock"), test.item.tolist(), strict=True):
        queries[u, h].add(i)
    scores = (factors.users @ factors.items.T).cpu().numpy()
    for part in (0, 1):
        earlier = run.dataset.part(part)
        scores[earlier.user, earlier.item] = -np.inf
    hits = [int(scores[user].argmax()) in targets for (user, _), targets in queries.items()]
    assert found["exact"]["recall@1"] == pytest.approx(np.mean(hits))
    assert found["index"]["recall@1"] == found["exact"]["recall@1"] < found["live"]["recall@1"]


def _hours(run: Run, *names: str) -> list[tuple[int, ...]]:
    """Encoded values of some features in the test part, a tuple for each interaction."""
    rows = run.dataset.part_indices(TEST)
    return list(zip(*(flat(run.dataset, name)[rows].tolist() for name in names), strict=True))


def test_each_context_of_a_user_is_a_query_with_its_own_targets(run: Run) -> None:
    data = run.dataset
    found = evaluate_part(run.factors_during(TEST), data, TEST, run.config.evaluation)
    scorer, hours = in_context(run), flat(data, "hour")
    groups: dict[tuple[int, int], set[int]] = {}
    first: dict[tuple[int, int], int] = {}
    for row in data.part_indices(TEST).tolist():
        key = int(data.pairs.user[row]), int(hours[row])
        groups.setdefault(key, set()).add(int(data.pairs.item[row]))
        first.setdefault(key, row)
    hits = []
    for key, targets in groups.items():
        vector = scorer.of_users(np.array([key[0]]), np.array([first[key]]))
        hits.append(int((vector @ scorer.items.T).argmax()) in targets)
    assert found["recall@1"] == pytest.approx(np.mean(hits))


def test_batches_read_the_context_of_each_row(retriever: Retriever) -> None:
    users, hours = zip(*EVERY[::11], strict=True)
    frame = pl.DataFrame({"user_id": users, "hour": hours})
    found = recommend_batch(retriever, frame, 1, 2, keep_seen=True)
    assert found["item_id"].to_list() == [right_item(u, h) for u, h in EVERY[::11]]
    with pytest.raises(
        DataError, match=r"users: no column 'hour'; did you mean 'hours'\? .*the model reads it as context"
    ):
        recommend_batch(retriever, frame.rename({"hour": "hours"}), 1, 2)
    with pytest.raises(DataError, match=r"user '0': request: context lacks 'hour'"):
        recommend_batch(retriever, frame.with_columns(hour=pl.lit(None, pl.Int64)), 1, 2)
    for call in (recommend_batch, embed_batch):
        with pytest.raises(DataError, match="use method 2"):
            call(retriever, frame, method=1)
    vectors = embed_batch(retriever, frame, 2)["vector"].to_numpy()
    expected = [retriever.embed_request(Request(str(u), context={"hour": h})).vector[0] for u, h in EVERY[::11]]
    np.testing.assert_allclose(vectors, expected, rtol=1e-4, atol=1e-5)


def test_a_job_that_could_not_be_answered_writes_nothing(retriever: Retriever, tmp_path: Path) -> None:
    store = retriever.bundle.folder.parents[1]
    users = _users(tmp_path)
    for method, told in ((1, "use method 2"), (2, "users: no column 'hour'")):
        with pytest.raises(DataError, match=told):
            recommend_users(store, users, tmp_path / "out", 1, method=method)  # type: ignore[arg-type]
        assert not (tmp_path / "out").exists()
    hourly()[0].with_columns(hour=pl.lit(3)).write_parquet(users)
    assert recommend_users(store, users, tmp_path / "out", 1, method=2, keep_seen=True) == USERS
    found = pl.read_parquet(tmp_path / "out" / "part-*.parquet")
    assert found["item_id"].to_list() == [right_item(u, 3) for u in range(USERS)]


def test_what_needs_one_vector_a_user_is_refused_by_name(run: Run, tmp_path: Path) -> None:
    refused: list[tuple[type[Exception], str, Any]] = [
        (ConfigError, "feature 'hour' has no default", run.factors),
        (ConfigError, "feature 'hour' has no default", lambda: embed(run, "user", _users(tmp_path), tmp_path / "out")),
        (ConfigError, "the model reads the context", lambda: api.recommend(run, 1)),
        (RunError, "reads the context", lambda: compare_runs(run, run)),
        (
            ConfigError,
            r"negatives\.hard ranks the catalogue once",
            lambda: _fit(negatives={"hard": True, "uniform": 4, "full": False}),
        ),
        (
            ConfigError,
            "'torchrec' does not go with features of the context",
            lambda: _fit(train={"embedding_placement": "torchrec"}),
        ),
    ]
    for kind, told, call in refused:
        with pytest.raises(kind, match=told) as found:
            call()
        assert "\n" not in str(found.value)


def _users(folder: Path) -> Path:
    hourly()[0].write_parquet(folder / "users.parquet")
    return folder / "users.parquet"


def _fit(**sections: dict[str, object]) -> Run:
    return api.fit(hourly(200), hourly_schema(HOUR), hourly_settings(**sections))


def test_defaults_give_precomputed_vectors(with_defaults: tuple[Run, Retriever], tmp_path: Path) -> None:
    run, retriever = with_defaults
    stored = embed_users(retriever, np.arange(USERS), 1)
    np.testing.assert_allclose(stored, run.factors().users.cpu().numpy(), atol=1e-5)
    np.testing.assert_allclose(stored, embed_users(retriever, np.arange(USERS), 2), rtol=1e-3, atol=1e-4)
    assert retriever.recommend(Request("1"), 1, 1).method == 1
    embed(run, "user", _users(tmp_path), tmp_path / "out")
    (found,) = (vectors for _, vectors in EmbeddingsFolder(tmp_path / "out").blocks())
    np.testing.assert_allclose(found, stored, atol=1e-5)


def test_the_clock_tells_the_time_of_a_request_that_gives_none(
    with_defaults: tuple[Run, Retriever], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, retriever = with_defaults
    assert retriever.context_columns == ["hour", "at"]
    late = 1_700_002_800  # 2023-11-14 23:00 UTC
    monkeypatch.setattr("time.time", lambda: float(late))
    given = [
        retriever.embed_request(Request("1", context=context)).vector
        for context in ({}, {"at": late}, {"at": late + 3600}, {"at": late, "hour": 3}, {"at": late, "hour": 4})
    ]
    assert np.array_equal(given[0], given[1])
    assert np.array_equal(given[1], given[3])
    assert not np.allclose(given[1], given[2])
    assert not np.allclose(given[1], given[4])
    for wrong in ("noon", True, None, -5):
        with pytest.raises(DataError, match=r"request: context 'at' is .*, expected a time as in the log"):
            retriever.embed_request(Request("1", context={"at": wrong}))


def test_a_table_of_users_tells_the_moment_as_a_table_of_interactions_does(
    with_defaults: tuple[Run, Retriever],
) -> None:
    _, retriever = with_defaults
    moments = pl.Series("at", [1_700_002_800, 1_700_013_600])  # 2023-11-14 23:00 and 2023-11-15 02:00 UTC
    dates = pl.from_epoch(moments)
    zoned = dates.dt.replace_time_zone("UTC").dt.convert_time_zone("Europe/Zurich")
    expected = retriever.recommend_frame({"user_id": ["1", "2"], "at": moments}, 3, 2)
    assert not expected.equals(retriever.recommend_frame({"user_id": ["1", "2"], "at": moments + 6 * 3600}, 3, 2))
    for makes in (dates, dates.cast(pl.Datetime("ns")), zoned, dates.dt.to_string()):
        assert retriever.recommend_frame({"user_id": ["1", "2"], "at": makes}, 3, 2).equals(expected)
    days = retriever.recommend_frame({"user_id": ["1", "2"], "at": dates.dt.date()}, 3, 2)
    assert days.equals(retriever.recommend_frame({"user_id": ["1", "2"], "at": moments // 86_400 * 86_400}, 3, 2))


def test_damaged_files_of_the_context_are_refused(run: Run) -> None:
    assert run.folder is not None
    frame = pl.read_parquet(run.folder / "interactions.parquet")
    folder = run.folder.parent / "damaged"
    folder.mkdir()
    for path in run.folder.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    frame.with_columns(pl.Series("context.hour", [[1]] * frame.height)).write_parquet(folder / "interactions.parquet")
    with pytest.raises(RunError, match=re.escape(str(folder))):
        load_tables(folder, run.dataset.schema, run.config.split)


def test_prepared_data_train_and_serve_the_same(run: Run, tmp_path: Path) -> None:
    for name, frame in zip(("users", "items", "interactions"), hourly(), strict=True):
        frame.write_parquet(tmp_path / f"{name}.parquet")
    paths: dict[str, object] = {n: str(tmp_path / f"{n}.parquet") for n in ("users", "items", "interactions")}
    config = hourly_settings(data=paths)
    prepared = api.prepare_folder(config, run.dataset.schema, tmp_path / "prepared")
    found = api.fit(prepared, run.dataset.schema, config, folder=tmp_path / "run")
    assert found.metrics["test.recall@1"] > 0.95
    api.publish(found, tmp_path / "store")
    retriever = api.retriever(tmp_path / "store")
    for user, hour in EVERY[::13]:
        request = Request(str(user), context={"hour": hour})
        assert retriever.recommend(request, 1, 2, keep_seen=True).items[0].id == str(right_item(user, hour))
    assert retriever.user_inputs.context.examples()["hour"] in range(HOURS)
