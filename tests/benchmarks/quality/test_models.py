"""The configs that the benchmarks declare."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

import twotower
from benchmarks.lib.processes import ROOT
from benchmarks.lib.report import Report, declared, options
from benchmarks.quality.models import TABLES, configured, main
from twotower.config.toml import load_config, parse_config


@pytest.mark.parametrize("name", TABLES)
def test_every_row_has_a_valid_config(name: str) -> None:
    table = TABLES[name]
    for row in table["rows"].values():
        configured(table, row, [*row.get("set", []), *table["settings"]])


def test_the_configs_of_speed_and_scale_are_valid() -> None:
    speed, scale = ROOT / "benchmarks" / "speed", ROOT / "benchmarks" / "scale"
    load_config(scale / "config.toml")
    parse_config(declared(str(scale / "tables.py"))["config"])
    parse_config(declared(str(speed / "peers.py"))["goal"])
    parse_config(declared(str(speed / "embedding.py"))["tower"]["config"])
    versus = declared(str(speed / "versus.py"))
    twotower.Schema.model_validate(versus["schema"])
    twotower.Config.model_validate(versus["config"])
    twotower.Config.model_validate(versus["config"] | versus["contrastive"])


def test_short_histories_are_of_an_archive_whose_items_have_ids_alone(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    lines = [" ".join(map(str, [user, *(rng.permutation(30)[: 4 + user % 6] + 100)])) for user in range(1, 41)]
    with zipfile.ZipFile(tmp_path / "short.zip", "w") as archive:
        archive.writestr("sequences.txt", "\n".join(lines))
    words = ["--table", "short", "--only", "recipes", "--quick", "--out", str(tmp_path / "rows.json")]
    script = str(ROOT / "benchmarks" / "quality" / "models.py")
    chosen = options(script, words)
    with Report(chosen) as nothing, pytest.raises(SystemExit, match="needs the archive"):
        main(chosen, nothing)
    chosen = options(script, [*words, "--sequences", str(tmp_path / "short.zip")])
    with Report(chosen) as written:
        main(chosen, written)
    found = {r["name"]: r["mean"] for r in json.loads((tmp_path / "rows.json").read_text())["results"]}
    assert 0 < found["short_quality: transition counts, HR@100"] <= 1
    assert found["short_quality: recipes/sequence-short.toml, HR@100"] == 1, "only 30 items"
    assert "short_quality: recipes/sequence-short.toml, NDCG@10" in found
