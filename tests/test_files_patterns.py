"""Folders may have any name, also what a shell would take for a pattern."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from twotower.cli.app import run_command
from twotower.data.reading.readers import read_file
from twotower.embedding.folder import EmbeddingsFolder

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_the_whole_way_through_folders_of_any_name(
    ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "a [1-2] wh?t* été 数据"
    here = tmp_path / name
    here.mkdir()
    data = here / name
    shutil.copytree(ROOT / "examples" / "own-data", data)
    config = (ROOT / "examples" / "own-data.toml").read_text(encoding="utf-8")
    if ending == "parquet":
        for path in sorted(data.glob("*.csv")):
            read_file(path).write_parquet(path.with_suffix(".parquet"))
        config = config.replace(".csv", ".parquet")
    config = re.sub(r"own-data/", f"{name}/", config)
    (here / "c.toml").write_text(config, encoding="utf-8")

    def run(*words: object) -> str:
        code = run_command([str(w) for w in words])
        told = capsys.readouterr()
        assert code == 0, told.err
        return told.out

    made, store = here / name / "run", here / name / "store"
    run("train", here / "c.toml", "--run", made, "--set", "train.epochs=1")
    if ending == "parquet":
        run("prepare", here / "c.toml", "--out", here / "prepared [x]")
        prepared = f"data.prepared={str(here / 'prepared [x]')!r}"
        run("train", here / "c.toml", "--run", here / "again [y]", "--set", "train.epochs=1", "--set", prepared)
    run("evaluate", made)
    run("publish", made, "--store", store)
    assert "(id p" in run("recommend", "--store", store, "--user", "c000", "-k", "3")
    run("embed", made, data / f"products.{ending}", "--out", here / "vectors [z]")
    assert len(EmbeddingsFolder(here / "vectors [z]")) > 0
