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
