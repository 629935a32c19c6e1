"""Folders named `name=value` are columns of the files in them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from twotower.cli.app import run_command
from twotower.data.reading.readers import read_file
from twotower.data.reading.text_files import Reading
from twotower.errors import DataError

FRAME = pl.DataFrame({"user": ["a", "b"], "item": ["01", "2"]})


def write(frame: pl.DataFrame, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (frame.write_parquet if path.suffix == ".parquet" else frame.write_csv)(path)
    return path


@pytest.fixture(params=["parquet", "csv"])
def log(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., pl.DataFrame]:
    """A function that writes a table in folders and reads it with a reading."""

    def read(*folders: str, reading: Reading | None = None, at: str = "") -> pl.DataFrame:
        for folder in folders:
            write(FRAME, tmp_path / "log" / folder / f"part.{request.param}")
            (tmp_path / "log" / folder / "_SUCCESS").touch()
        return read_file(tmp_path / "log" / at, reading)

    return read


def test_the_columns_have_the_type_of_all_their_values(log: Callable[..., pl.DataFrame]) -> None:
    found = log(
        "day=2026-11-01/hour=7/shop=07/a%20b=x%3Dy/n=1",
        "day=2026-11-02/hour=-3/shop=8/a%20b=ü/n=__HIVE_DEFAULT_PARTITION__",
    )
    assert found.columns == ["user", "item", "day", "hour", "shop", "a b", "n"]
    assert found["day"].cast(pl.String).to_list() == ["2026-11-01"] * 2 + ["2026-11-02"] * 2
    assert found["hour"].to_list() == [7, 7, -3, -3]
    assert found["shop"].to_list() == ["07", "07", "8", "8"], "as in a text file: 07 is no number"
    assert found["a b"].to_list() == ["x=y", "x=y", "ü", "ü"]
    assert found["n"].to_list() == [1, 1, None, None]
    assert found["item"].to_list() == ["01", "2"] * 2


@pytest.mark.parametrize("at", ["dt=2026-11-02", "*/*[tv]", "**/part.*"])
def test_a_folder_a_pattern_and_a_file_give_the_folders_around_them(at: str, log: Callable[..., pl.DataFrame]) -> None:
    found = log("dt=2026-11-01", "dt=2026-11-02", at=at)
    days = ["2026-11-02"] if "2" in at else ["2026-11-01", "2026-11-02"]
    assert found["dt"].cast(pl.String).to_list() == [day for day in days for _ in range(2)]


def test_a_column_in_the_files_themselves_is_kept(tmp_path: Path) -> None:
    write(FRAME.with_columns(dt=pl.lit("theirs")), tmp_path / "log" / "dt=2026-11-01" / "a.csv")
    write(FRAME.with_columns(dt=pl.lit("theirs")), tmp_path / "log2" / "dt=2026-11-01" / "a.parquet")
    for name in ("log", "log2"):
        assert read_file(tmp_path / name)["dt"].to_list() == ["theirs"] * 2


def test_files_in_other_folders_are_refused(log: Callable[..., pl.DataFrame]) -> None:
    with pytest.raises(DataError, match=r"lies in no such folder, and .*dt=1.* in dt=…; the folders of all files"):
        log("dt=1", "", at="**/part.*")
    with pytest.raises(DataError, match="found the folder other in it"):
        log("dt=1", "other")


CONFIG = """
data.interactions = "log"
data.users = "users"
schema = {{ user_id = "user", item_id = "item", time = "dt", features = [
  {{ side = "user", kind = "categorical", name = "region" }},
  {{ side = "item", kind = "categorical", name = "item" }} ] }}
loss.kind = "softmax"
negatives.full = true
split.kind = "time"
train = {{ epochs = 1, batch_size = 8 }}
"""


@pytest.mark.parametrize("form", ["parquet", "csv"])
def test_a_log_by_day_is_trained_and_prepared_as_a_log_with_a_column_of_days(form: str, tmp_path: Path) -> None:
    clicks = pl.DataFrame({"user": [f"u{n % 5}" for n in range(60)], "item": [f"i{n % 7}" for n in range(60)]})
    days = pl.Series("dt", [f"2026-11-{1 + n // 10:02d}" for n in range(60)])
    users = pl.DataFrame({"user": [f"u{n}" for n in range(5)]})
    regions = pl.Series("region", [n % 2 for n in range(5)])
    (flat, folders) = (tmp_path / name for name in ("flat", "folders"))
    as_written = days.str.to_date() if form == "parquet" else days
    write(clicks.with_columns(as_written), flat / "log" / f"a.{form}")
    write(users.with_columns(regions).sort("region"), flat / "users" / f"a.{form}")
    for day in days.unique():
        write(clicks.filter(days == day), folders / "log" / f"dt={day}" / f"a.{form}")
    for region in (0, 1):
        write(users.filter(regions == region), folders / "users" / f"region={region}" / f"a.{form}")
    for folder in (flat, folders):
        (folder / "c.toml").write_text(CONFIG.format(), encoding="utf-8")
        assert run_command(["train", str(folder / "c.toml"), "--run", str(folder / "run")]) == 0
        assert run_command(["prepare", str(folder / "c.toml"), "--out", str(folder / "prepared")]) == 0
    for file in ("run/model.safetensors", "run/encoders.json", "prepared/encoders.json"):
        assert (folders / file).read_bytes() == (flat / file).read_bytes(), file
    digests = {(f / "prepared" / "prepared.json").read_text().partition('"digest"')[2] for f in (flat, folders)}
    assert len(digests) == 1
