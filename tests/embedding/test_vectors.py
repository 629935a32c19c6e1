"""Vectors of blocks of a table: any Arrow producer, any cut into blocks, what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import torch
from worlds import checkerboard, settings

from twotower import api
from twotower.data.tables import check
from twotower.embedding.folder import EmbeddingsFolder
from twotower.embedding.vectors import TableVectors
from twotower.errors import ConfigError, DataError, RunError
from twotower.features.categorical import Categorical
from twotower.features.numeric import Numeric
from twotower.features.schema import Schema
from twotower.model.inputs.code_layout import Inputs
from twotower.runs import Run

SCHEMA = Schema(
    label="liked",
    time="at",
    time_unit="order",
    features=(
        Categorical(name="user_id", side="user"),
        Categorical(name="item_id", side="item"),
        Numeric(name="weight", side="item"),
    ),
)


def items(n: int) -> pl.DataFrame:
    return pl.DataFrame({"item_id": range(n)}).with_columns(weight=(pl.col("item_id") * 0.37).sin())


@pytest.fixture(scope="module")
def run() -> Run:
    users, _, actions = checkerboard()
    return api.fit(check(users, items(30), actions, SCHEMA), SCHEMA, settings(train={"epochs": 1}, model={"width": 8}))


def test_record_batches_have_the_vectors_of_a_bulk_embedding(run: Run, tmp_path: Path) -> None:
    table = items(90).select("weight", "item_id", other=pl.lit("x"))
    table.write_parquet(tmp_path / "items.parquet")
    api.embed(run, "item", tmp_path / "items.parquet", tmp_path / "out")
    ((ids, expected),) = EmbeddingsFolder(tmp_path / "out").blocks()
    vectors = TableVectors(run, "item")
    assert vectors.columns == ["item_id", "weight"]
    for producer in (table, table.to_arrow(), table.to_arrow().combine_chunks().to_batches()[0]):
        found = vectors(producer)
        assert found["id"].equals(ids)
        assert np.array_equal(found["vector"].to_numpy(), expected)
    batches = table.to_arrow().to_batches(max_chunksize=40)
    parts = [vectors(batch) for batch in batches]
    assert [len(part) for part in parts] == [40, 40, 10]
    np.testing.assert_allclose(pl.concat(parts)["vector"].to_numpy(), expected, rtol=1e-5, atol=1e-6)


def test_a_block_without_rows_has_none(run: Run) -> None:
    found = TableVectors(run, "item")(items(0))
    assert len(found) == 0
    assert found.schema == TableVectors(run, "item")(items(1)).schema


def test_a_tower_takes_a_large_block_in_several(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays of more rows would each be new memory of the system, a fourth more time for a layer of 128."""
    rows, tower = list[int](), run.model.item_vectors

    def counted(inputs: Inputs) -> torch.Tensor:
        rows.append(len(inputs.lookup))
        return tower(inputs)

    monkeypatch.setattr(run.model, "item_vectors", counted)
    vectors, table = TableVectors(run, "item"), items(65_537)
    found = vectors(table)
    assert rows == [32_768, 32_768, 1]
    assert found["id"].equals(table["item_id"].rename("id"))
    parts = [vectors(some)["vector"].to_numpy() for some in table.iter_slices(32_768)]
    assert np.array_equal(found["vector"].to_numpy(), np.concatenate(parts))


def test_what_cannot_be_embedded_is_refused(run: Run) -> None:
    with pytest.raises(ConfigError, match="precision 'fp8': allowed are fp32, fp16"):
        TableVectors(run, "item", "fp8")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="items: no column 'weight'"):
        TableVectors(run, "item")(items(3).drop("weight"))
    with pytest.raises(DataError, match="item_id"):
        TableVectors(run, "item")(pa.table({"item_id": pa.array([1, None]), "weight": [0.1, 0.2]}))
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(RunError, match="a vector is not finite; the model is broken, train it again"):
        TableVectors(run, "item")(items(2))
