import tempfile
from argparse import Namespace
from pathlib import Path

from benchmarks.lib.processes import call
from benchmarks.lib.report import Report, options
from benchmarks.quality import models
from benchmarks.quality.films import Films
from benchmarks.serving import catalogue, load
from twotower import api

ROW = "recipes/sequence-long.toml"
"""The row of quality/models.toml, table retrieval, whose quality README.md quotes."""


def main(chosen: Namespace, report: Report) -> None:
    small = ["--quick"] if chosen.quick else []
    with tempfile.TemporaryDirectory() as temporary:
        store, made = chosen.bundle or f"{temporary}/store", f"{temporary}/made"
        if not chosen.bundle:
            call(publish, chosen.sequences, chosen.epochs, temporary, store)
        copied = ["--store", store, "--to", made, "--items", str(chosen.items), *small]
        catalogue.main(options(catalogue.__file__, copied), report)
        asked = ["--store", made, "--only", "method1,method2", *small]
        for name in ("seconds", "rate", "server_core", "generator_core"):
            value = getattr(chosen, name)
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            asked += [f"--{name.replace('_', '-')}", text]
        load.main(options(load.__file__, asked), report)


def publish(sequences: str, epochs: int, folder: str, store: str) -> None:
    """Train the row of the quoted quality for some epochs, and publish it."""
    table = models.TABLES["retrieval"]
    row = table["rows"][ROW]
    schema, config = models.configured(table, row, [*table["settings"], f"train.epochs={epochs}"])
    tables = Films.read(sequences).tables(row["ids"])
    api.publish(models.train(tables, schema, config, 1, Path(folder, "run")), store)
