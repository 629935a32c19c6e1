"""The configs that the benchmarks declare."""

from __future__ import annotations

import pytest

import twotower
from benchmarks.lib.processes import ROOT
from benchmarks.lib.report import declared
from benchmarks.quality.models import TABLES, configured
from twotower.config.toml import load_config, parse_config


@pytest.mark.parametrize("name", TABLES)
def test_every_row_has_a_valid_config(name: str) -> None:
    table = TABLES[name]
    for row in table["rows"].values():
        configured(table, row, [*row.get("set", []), *table["settings"]])


def test_a_row_of_another_model_than_its_file_has_no_scorer_of_the_file() -> None:
    rows = TABLES["short"]["rows"]
    pairs = {
        name: len(configured(TABLES["short"], row, row.get("set", []))[1].model.pairs) for name, row in rows.items()
    }
    assert (pairs.pop("SASRec, one negative, BCE"), pairs.pop("SASRec, sampled softmax")) == (1, 1)
    assert min(pairs.values()) > 1


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
