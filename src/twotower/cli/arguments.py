"""Arguments that several verbs take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RunFolder = Annotated[Path, typer.Argument(help="Run folder.")]
StoreFolder = Annotated[Path, typer.Option("--store", help="Folder of published bundles.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Setting of the config, such as train.epochs=3. Repeatable. Paths are relative to the config.",
    ),
]
ItemCount = Annotated[int, typer.Option("-k", help="Number of items.")]
Conditions = Annotated[
    list[str] | None,
    typer.Option("--where", metavar="COLUMN=VALUE", help="Condition on the items, such as genres=Comedy. Repeatable."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
