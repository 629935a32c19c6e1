"""A bundle with the users as they are now: histories, seen items and vectors of all rows, by an earlier model."""

from __future__ import annotations

import signal
from pathlib import Path

import kill_points
import numpy as np
import polars as pl
import preloaded
import pytest
from worlds import CHECKERBOARD_SCHEMA, checkerboard, settings

from twotower import api
from twotower.cli.app import run_command
from twotower.config.toml import dump_config
from twotower.errors import ConfigError
from twotower.features.schema import Schema
from twotower.features.sequence import Sequence
from twotower.retrieval.request import Request
from twotower.retrieval.retriever import Retriever

SCHEMA = CHECKERBOARD_SCHEMA.model_copy(
    update={"features": (Sequence(name="taken", side="user"), CHECKERBOARD_SCHEMA.features[1])}
)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A trained run of a log, of which each user's last row tests."""
    log = checkerboard()[2].sort("at")
    log.write_parquet(tmp_path / "log.parquet")
    config = settings(data={"interactions": "log.parquet"}, split={"kind": "last"})
    (tmp_path / "config.toml").write_text(dump_config(SCHEMA, config), encoding="utf-8")
    assert run_command(["train", str(tmp_path / "config.toml"), "--run", str(tmp_path / "run")]) == 0
    return tmp_path


def publish(project: Path, *more: str) -> Retriever:
    store = str(project / "store")
    assert run_command(["publish", str(project / "run"), "--store", store, *more]) == 0
    return api.retriever(store)


def test_users_know_the_rows_of_the_test_part_and_those_that_came_later(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = publish(project)
    log = pl.read_parquet(project / "log.parquet")
    # An old user takes one more item, and a new user begins.
    later = pl.DataFrame(
        {"user_id": [0, *[77] * 6], "item_id": [2, 1, 3, 5, 7, 9, 11], "liked": [1] * 7, "at": range(5000, 5007)}
    )
    kept = log.filter(~((pl.col("user_id") == 0) & (pl.col("item_id") == 2)))
    pl.concat([kept, later]).write_parquet(project / "log.parquet")
    after = publish(project, "--latest")
    facts = after.bundle.manifest
    assert (facts.learned.rows, facts.learned.until) == (
        before.bundle.manifest.learned.rows,
        before.bundle.manifest.learned.until,
    )
    assert facts.remembered.rows == len(kept) + 7
    assert facts.remembered.until == 5006
    assert facts.model == before.bundle.manifest.model
    assert facts.counts.users == 41
    assert not before.has_user("77")
    # The vector of a user is that of the tower with the whole history.
    for user in ("0", "77"):
        history = pl.concat([kept, later]).filter(pl.col("user_id") == int(user)).sort("at")
        given = Request(user, history=[str(i) for i in history["item_id"]])
        live = after.embed_request(after.query(given), 2).vector
        assert after.embed_request(after.query(Request(user)), 1).vector == pytest.approx(live, abs=1e-5)
    answered = {item.id for item in after.recommend(Request("77"), 10).items}
    assert not answered & {"1", "3", "5", "7", "9", "11"}
    capsys.readouterr()
    assert run_command(["evaluate", str(project / "store")]) == 0
    said = capsys.readouterr()
    assert f"knows all {len(kept) + 7:,} rows of its log: nothing is left to measure" in said.out + said.err


def test_a_run_of_frames_and_one_of_prepared_data_know_their_own_rows(project: Path) -> None:
    log = checkerboard()[2]
    run = api.fit((None, None, log), SCHEMA, settings(split={"kind": "last"}), folder=project / "frames")
    api.publish(run, project / "one", latest=True)
    config = settings(split={"kind": "last"}, data={"interactions": str(project / "log.parquet")})
    prepared = api.prepare_folder(config, SCHEMA, project / "prepared")
    api.publish(api.fit(prepared, SCHEMA, config, folder=project / "mapped"), project / "two", latest=True)
    for store in ("one", "two"):
        retriever = api.retriever(project / store)
        assert retriever.bundle.manifest.remembered.rows == len(log)
        assert np.array_equal(retriever.dataset.interacted_items.lengths, np.full(40, 30))


def test_values_that_the_run_does_not_keep_are_asked_for(project: Path) -> None:
    averaged = {"name": "mean", "side": "item", "kind": "numeric", "statistic": "mean", "statistic_column": "rating"}
    schema = Schema.model_validate(SCHEMA.model_dump() | {"features": [*SCHEMA.model_dump()["features"], averaged]})
    log = checkerboard()[2].with_columns(rating=pl.col("liked") * 2.0)
    run = api.fit((None, None, log), schema, settings(split={"kind": "last"}), folder=project / "frames")
    with pytest.raises(ConfigError, match=r"latest reads rating of each interaction, which a dataset does not keep"):
        api.publish(run, project / "store", latest=True)


@pytest.mark.system
def test_a_publish_with_latest_that_is_killed_at_random_ends_by_the_same_command(project: Path) -> None:
    points = kill_points.random_points(lambda: publish(project, "--latest"))
    whole = api.retriever(project / "store").bundle.manifest
    for point in points:
        store = project / f"store-{point}"
        words = ["publish", project / "run", "--store", store, "--latest"]
        process = preloaded.start(*kill_points.program(str(point)), *words, stdout=preloaded.PIPE)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert run_command([*map(str, words)]) == 0
        found = api.retriever(store).bundle.manifest
        assert found.sha256 == whole.sha256, point
        assert found.remembered == whole.remembered
        assert [p for p in (store / "bundles").iterdir() if p.name.startswith(".")] == []
