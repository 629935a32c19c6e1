"""A backtest trains on the past of each cut and asks what is served then."""

from __future__ import annotations

import signal
from datetime import UTC, datetime
from pathlib import Path

import kill_points
import numpy as np
import polars as pl
import preloaded
import pytest
from worlds import ID_FEATURES, checkerboard, settings

from twotower import api
from twotower.api import backtest
from twotower.cli.app import run_command
from twotower.config.experiment import Config
from twotower.config.toml import dump_config
from twotower.data.config import DataConfig
from twotower.data.tables import Tables, check
from twotower.errors import ConfigError, DataError, RunError, TwoTowerError
from twotower.features.schema import Schema
from twotower.publishing.backtest import PAGE, VALUES, Schedule
from twotower.reports.backtest import KNOWN, Backtest, Fold, interval
from twotower.retrieval.request import Request

SCHEMA = Schema(label="liked", time="at", features=ID_FEATURES)
SUNDAY = int(datetime(2024, 6, 2, tzinfo=UTC).timestamp())
DAY = 86_400
DAYS = 28
CONFIG = settings(train={"epochs": 8}, split={"kind": "time", "test": 0.1, "validation": 0.1}, evaluation={"k": [5]})
TWO = Schedule(folds=2)


def four_weeks(n_users: int = 60) -> pl.DataFrame:
    """Return a checkerboard whose rows are spread evenly over the four weeks from Sunday 2024-06-02."""
    log = checkerboard(n_users)[2]
    return log.with_columns(at=SUNDAY + pl.col("at") * DAYS * DAY // log.height)


def read(log: pl.DataFrame) -> Tables:
    return check(None, None, log, SCHEMA)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("backtest") / "out"
    backtest(read(four_weeks()), SCHEMA, CONFIG, out, TWO)
    return out


def test_a_model_that_learns_beats_what_is_popular_and_the_page_says_so(folder: Path) -> None:
    found = backtest(read(four_weeks()), SCHEMA, CONFIG, folder, TWO)
    assert [fold.date for fold in found.folds] == ["2024-06-16", "2024-06-23"]
    assert {fold.rows for fold in found.folds} == {four_weeks().height // 4}
    model, popular = found.total("model"), found.total("popularity of 7 days")
    assert model.low > popular.high
    assert found.conclusion.startswith("ndcg@5: the model is ")
    page = (folder / PAGE).read_text()
    assert all(text in page for text in ("2024-06-16", "popularity of 28 days", found.conclusion))
    assert any("all periods" in line for line in found.lines())
    assert not (folder / "2024-06-16" / "run").exists()


def test_answers_are_those_of_a_model_that_was_trained_and_published_on_the_past(folder: Path, tmp_path: Path) -> None:
    log, cut = four_weeks(), SUNDAY + 14 * DAY
    past, week = log.filter(pl.col("at") < cut), log.filter(pl.col("at").is_between(cut, cut + 7 * DAY, closed="left"))
    api.publish(api.fit((None, None, past), SCHEMA, CONFIG, folder=tmp_path / "run"), tmp_path / "store", force=True)
    retriever, wanted = api.retriever(tmp_path / "store"), week.filter(pl.col("liked") == 1)
    recalls = {}
    seen = past.group_by("user_id").agg("item_id")
    known = dict(zip(seen["user_id"], seen["item_id"].to_list(), strict=True))
    for user, items in wanted.group_by("user_id").agg("item_id").iter_rows():
        banned = [str(item) for item in known.get(user, [])]
        answer = retriever.recommend(Request(str(user)), k=5, ban=banned)
        recalls[str(user)] = len({item.id for item in answer.items} & {str(i) for i in items}) / len(items)
    values = pl.read_parquet(folder / "2024-06-16" / VALUES)
    assert dict(zip(values["user"], values["model recall@5"], strict=True)) == pytest.approx(recalls)


def test_new_users_are_asked_and_new_items_are_counted(tmp_path: Path) -> None:
    log = four_weeks()
    last = pl.col("at") >= SUNDAY + 21 * DAY
    log = log.with_columns(
        user_id=pl.when(last & (pl.col("user_id") == 1)).then(999).otherwise("user_id"),
        item_id=pl.when(last & (pl.col("item_id") == 2)).then(888).otherwise("item_id"),
    )
    found = backtest(read(log), SCHEMA, CONFIG, tmp_path / "out", Schedule(folds=1))
    fold = found.folds[0]
    assert fold.new == log.filter(pl.col("item_id") == 888).height > 0
    assert fold.values.filter(~pl.col(KNOWN))["user"].to_list() == ["999"]
    assert [row.users for row in found.rows("ndcg@5")][-2:] == [fold.values.height - 1, 1]
    new = fold.values.filter(~pl.col(KNOWN))
    assert {"transitions ndcg@5", "ease ndcg@5"} & {*new.columns}
    for name in ("transitions", "ease"):  # which know nothing of this user
        if f"{name} ndcg@5" in new.columns:
            assert new[f"{name} ndcg@5"][0] == new["popularity of 28 days ndcg@5"][0]


def test_of_a_metric_that_is_to_be_low_the_lowest_scorer_is_the_strongest() -> None:
    values = {"model": 3.0, "a": 1.0, "b": 5.0}
    frame = pl.DataFrame({f"{name} rank@10": [value] * 50 for name, value in values.items()} | {KNOWN: [True] * 50})
    fold = Fold("2024-06-16", "2024-06-23", 0, 0, 0, 50, 0, frame)
    low, high = (Backtest([fold], "rank@10", rising) for rising in (False, True))
    assert (low.simple, high.simple) == (["a", "b"], ["b", "a"])
    assert all(
        found.conclusion.startswith(f"rank@10: the model is worse than {found.simple[0]}") for found in (low, high)
    )


def test_rows_of_a_gap_are_known_neither_to_the_model_nor_to_what_is_popular(tmp_path: Path) -> None:
    log = four_weeks()
    in_gap = pl.col("at").is_between(SUNDAY + 18 * DAY, SUNDAY + 21 * DAY, closed="left")
    schedule = Schedule(folds=1, gap=3)
    whole = backtest(read(log), SCHEMA, CONFIG, tmp_path / "whole", schedule).folds[0]
    without = backtest(read(log.filter(~in_gap)), SCHEMA, CONFIG, tmp_path / "without", schedule).folds[0]
    assert whole.values.equals(without.values)
    assert not whole.values.equals(
        backtest(read(log), SCHEMA, CONFIG, tmp_path / "none", Schedule(folds=1)).folds[0].values
    )


def test_a_backtest_goes_on_after_a_kill_to_the_same_table(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, tables, asked = tmp_path / "out", read(four_weeks()), 0
    publish = api.publish

    def killed(*given: object, **named: object) -> object:
        nonlocal asked
        asked += 1
        if asked in (1, 3):
            raise KeyboardInterrupt
        return publish(*given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr("twotower.publishing.backtest.publish", killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            backtest(tables, SCHEMA, CONFIG, out, TWO)
    done = backtest(tables, SCHEMA, CONFIG, out, TWO)
    assert asked == 4  # what is measured is not done again
    assert [*done.lines()] == [*backtest(tables, SCHEMA, CONFIG, folder, TWO).lines()]


def test_periods_begin_at_midnight_of_a_time_zone() -> None:
    newest = (SUNDAY + 8 * DAY - 3_600 * 3) * 1_000_000  # Sunday 2024-06-09, 21:00 in UTC
    assert [day for day, _ in Schedule(folds=1).boundaries(newest)] == ["2024-06-02", "2024-06-09"]
    days = Schedule(every=1, folds=2, zone="Asia/Shanghai").boundaries(newest)  # there it is Monday
    assert [day for day, _ in days] == ["2024-06-09", "2024-06-10", "2024-06-11"]
    assert days[0][1] == (SUNDAY + 7 * DAY - 8 * 3_600) * 1_000_000


def test_an_interval_is_that_of_users_resampled_within_their_folds() -> None:
    rng = np.random.default_rng(0)
    folds = [rng.normal(mean, 0.1, 400) for mean in (0.0, 10.0)]  # folds that differ do not widen it
    found = interval(folds)
    assert found.mean == pytest.approx(np.concatenate(folds).mean())
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * 0.1 / np.sqrt(800), rel=0.15)


@pytest.mark.parametrize(
    ("schedule", "config", "said"),
    [
        (Schedule(folds=5), CONFIG, "no rows before 2024-05-26 less the gap: the log begins on 2024-06-02"),
        (Schedule(folds=1, gap=28), CONFIG, "a gap of 28 days is longer than the log, which has 28 days"),
        (Schedule(folds=1, zone="Nowhere/At-all"), CONFIG, "no time zone 'Nowhere/At-all'"),
        (TWO, settings(split={"kind": "column", "column": "part"}), r"split.kind = 'column' gives parts of the whole"),
        (TWO, settings(train={"refit": True}, split={"validation": 0}), "has no validation part"),
    ],
)
def test_what_cannot_be_cut_is_refused(schedule: Schedule, config: Config, said: str, tmp_path: Path) -> None:
    with pytest.raises(TwoTowerError, match=said):
        backtest(read(four_weeks()), SCHEMA, config, tmp_path / "out", schedule)


def test_a_fold_without_events_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    log = four_weeks().filter(~pl.col("at").is_between(SUNDAY + 14 * DAY, SUNDAY + 21 * DAY - 1))
    with pytest.raises(DataError, match="no rows from 2024-06-16 to 2024-06-23, the period of a fold"):
        backtest(read(log), SCHEMA, CONFIG, tmp_path / "out", TWO)
    assert not (tmp_path / "out").exists()
    ordered = SCHEMA.model_copy(update={"time_unit": "order"})
    with pytest.raises(ConfigError, match="cuts the log at dates"):
        backtest(check(None, None, four_weeks(), ordered), ordered, CONFIG, tmp_path / "out", TWO)


def test_a_folder_of_something_else_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds a backtest of another schedule, latest"):
        backtest(read(four_weeks()), SCHEMA, CONFIG, folder, Schedule(folds=1), latest=True)
    with pytest.raises(RunError, match="holds a backtest of another log"):
        backtest(read(four_weeks().head(1_700)), SCHEMA, CONFIG, folder, TWO)
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(RunError, match="holds something else than a backtest"):
        backtest(read(four_weeks()), SCHEMA, CONFIG, tmp_path, TWO)


def test_the_command_prints_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    four_weeks().write_parquet(tmp_path / "log.parquet")
    (tmp_path / "day.toml").write_text(
        '[data]\ninteractions = "log.parquet"\n[schema]\nlabel = "liked"\ntime = "at"\n'
        "[evaluation]\nk = [5]\n[train]\nepochs = 1\n"
    )
    words = ["backtest", str(tmp_path / "day.toml"), "--out", str(tmp_path / "out"), "--folds", "1", "--latest"]
    for more, said in ((["--every", "7"], "--every 7: expected whole days"), (["--gap", "x"], "--gap x: expected")):
        assert run_command([*words, *more]) == 2
        assert said in capsys.readouterr().err
    assert run_command(words) == 0
    out = capsys.readouterr().out
    assert "2024-06-23" in out
    assert f"report: {tmp_path / 'out' / PAGE}" in out


@pytest.mark.system
def test_a_backtest_that_is_killed_at_any_point_ends_with_the_same_table(folder: Path, tmp_path: Path) -> None:
    """Of all points at which files change, in steps to the end."""
    four_weeks().write_parquet(tmp_path / "log.parquet")
    config = CONFIG.model_copy(update={"data": DataConfig(interactions="log.parquet")})
    (tmp_path / "day.toml").write_text(dump_config(SCHEMA, config), encoding="utf-8")
    words = ("backtest", tmp_path / "day.toml", "--folds", "2", "--out")
    kills = 0
    for point in range(1, 1_000, 40):
        out = tmp_path / f"out-{point}"
        process = preloaded.start(*kill_points.program(str(point)), *words, out, stdout=preloaded.PIPE)
        process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL
        kills += 1
        assert run_command([*map(str, words), str(out)]) == 0
        for day in ("2024-06-16", "2024-06-23"):
            assert pl.read_parquet(out / day / VALUES).equals(pl.read_parquet(folder / day / VALUES))
        assert {path.name for path in out.iterdir()} == {"2024-06-16", "2024-06-23", "backtest.json", PAGE}
    assert kills >= 8
