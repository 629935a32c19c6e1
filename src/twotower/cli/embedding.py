"""The verb embed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from twotower.cli.flags import ColumnNames, Decimal, EngineName, RunFolder, Separator, Share, Trust, split_names
from twotower.cli.threads import Threads, set_threads
from twotower.errors import ConfigError


def embed(
    run: RunFolder,
    table: Annotated[
        str,
        typer.Argument(
            help="Items or users of any number, in Parquet or text: a file, a folder, or a pattern such as '*.parquet', or its URL."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for the vectors and their ids, or its URL in a bucket.")],
    side: Annotated[str, typer.Option("--side", help="Side of the table: item or user.")] = "item",
    shard_rows: Annotated[
        int,
        typer.Option("--shard-rows", min=1, help="Greatest number of rows of a shard, a file, in memory together."),
    ] = 131_072,
    precision: Annotated[str, typer.Option("--precision", help="Precision of the vectors: fp32 or fp16.")] = "fp32",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Discard vectors of another table or model in the folder first.")
    ] = False,
    engine: EngineName = "local",
    share: Share = "",
    separator: Separator = "",
    decimal: Decimal = ".",
    columns: ColumnNames = "",
    threads: Threads = 0,
    trust: Trust = False,
) -> None:
    """Write the vectors of all rows of a table, in bounded memory. A second call resumes it."""
    from twotower.distributed import DistributedContext

    if side not in ("user", "item"):
        raise ConfigError(f"--side {side}: allowed are user and item")
    if (ranks := DistributedContext.from_environment().world_size) > 1:
        raise ConfigError(
            f"WORLD_SIZE={ranks}: embed is one process, whose shards an engine shares; call it without torchrun, and with --engine ray "
            "for several processes or hosts"
        )
    set_threads(threads, 1)
    from twotower import api

    api.embed(
        api.load(run, trust), side, table, out, shard_rows=shard_rows, precision=precision,  # type: ignore[arg-type]
        overwrite=overwrite, engine=engine, threads=threads, separator=separator, columns=split_names(columns), decimal=decimal, share=share,
    )  # fmt: skip
