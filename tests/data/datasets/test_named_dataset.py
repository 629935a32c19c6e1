"""Every data set gives tables that fit its schema; a config names one, with its options, and trains on it."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from movielens_archives import ML_1M, ML_100K, zipped
from mykinds.datasets import Shop
from worlds import settings

import twotower
from twotower.cli.app import run_command
from twotower.config.toml import dump_config, load_config, parse_config
from twotower.data import source
from twotower.data.datasets import DATASETS
from twotower.data.datasets.named_dataset import NamedDataset
from twotower.data.reading.readers import read_file
from twotower.data.tables import check
from twotower.errors import ConfigError

ARCHIVES = {"ml-1m": ML_1M, "ml-100k": ML_100K, "ml-1m-titles": ML_1M, "ml-100k-titles": ML_100K}
"""Members of the local archive of each data set that is read from one."""


@pytest.fixture(params=[*DATASETS, Shop], ids=lambda kind: kind.kind)
def kind(request: pytest.FixtureRequest) -> type[NamedDataset]:
    found: type[NamedDataset] = request.param
    return found


@pytest.fixture
def options(kind: type[NamedDataset], tmp_path: Path) -> dict[str, str]:
    """The local copy of a data set that is read from one."""
    if "archive" not in kind.model_fields:
        return {}
    (tmp_path / "archive.zip").write_bytes(zipped(ARCHIVES[kind.kind]))
    return {"archive": str(tmp_path / "archive.zip")}


def test_the_tables_fit_the_schema_and_are_the_same_each_time(
    kind: type[NamedDataset], options: dict[str, str]
) -> None:
    first, again = (kind.model_validate(options).load() for _ in range(2))
    checked = check(first.users, first.items, first.interactions, kind.table_schema)
    assert checked.users.height > 1
    assert checked.items.height > 1
    assert checked.interactions.height
    for name in ("users", "items", "interactions"):
        assert getattr(first, name).equals(getattr(again, name))
    assert kind.__doc__


def test_a_config_names_it_and_is_read_back(kind: type[NamedDataset], options: dict[str, str]) -> None:
    config = parse_config({"data": {"dataset": {"kind": kind.kind, **options}}})[1]
    assert config.data.dataset == kind.model_validate(options)
    tables, schema = source.read(config, None)
    assert schema == kind.table_schema
    assert tables.interactions.height  # type: ignore[union-attr]
    written = tomllib.loads(dump_config(schema, config))
    assert parse_config(written)[1] == config


def test_fetch_writes_the_tables(kind: type[NamedDataset], options: dict[str, str], tmp_path: Path) -> None:
    source = ["--source", *options.values()] if options else []
    assert run_command(["data", "fetch", kind.kind, *source, "--out", str(tmp_path / "out")]) == 0
    for name in ("users", "items", "interactions"):
        assert read_file(tmp_path / "out" / f"{name}.parquet").height


def test_one_of_elsewhere_trains_with_its_options(tmp_path: Path) -> None:
    path = tmp_path / "shop.toml"
    path.write_text(
        '[data]\ndataset = { kind = "mykinds.datasets:Shop", customers = 40, brands = 3 }\n', encoding="utf-8"
    )
    schema, config = load_config(path, trust=True)
    assert config.data.dataset == Shop(customers=40, brands=3)
    tables, schema = source.read(config, schema)
    run = twotower.fit(
        tables,
        schema,
        settings(negatives={"random": 3}, train={"epochs": 3, "monitor": "validation.recall@5"}),
        folder=tmp_path / "run",
    )
    assert run.metrics["test.recall@5"] > 0


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("ml-1k", "no data set of kind 'ml-1k'; did you mean 'ml-100k'? (allowed: ml-1m, ml-100k, ml-1m-titles"),
        ({"kind": "ml-1m", "size": 3}, "unknown key 'data.dataset.size'"),
        ({"kind": "mykinds.datasets:Shop", "customers": 1}, "data.dataset.customers: "),
        ("os:system", "is no data set; make it a subclass of twotower.data.datasets.named_dataset.NamedDataset"),
    ],
)
def test_a_wrong_one_is_refused(value: str | dict[str, str | int], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_config({"data": {"dataset": value}})
    assert words in str(refused.value)
