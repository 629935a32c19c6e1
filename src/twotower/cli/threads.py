"""Threads of a verb that computes: its option, and their number."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from twotower.machine import available_cores

Threads = Annotated[
    int,
    typer.Option(
        "--threads",
        min=0,
        max=1024,
        help="Threads of a process. 0: those of torch and polars, for each rank of torchrun an equal share of the machine's cores.",
    ),
]


def set_threads(threads: int, ranks: int) -> int:
    """Let torch and polars use `threads` threads, or an equal share of the cores if it is 0 and there are several ranks.

    Return the number that is set, 0 for none. Call before polars is loaded, which reads its number once."""
    if ranks > 1:
        threads = threads or available_cores() // _local_ranks(ranks) or 1
    if threads:
        os.environ.setdefault("POLARS_MAX_THREADS", str(threads))
        import torch

        torch.set_num_threads(threads)
    return threads


def _local_ranks(ranks: int) -> int:
    """Return the number of ranks on this machine: LOCAL_WORLD_SIZE of torchrun, else all ranks."""
    given = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(given) if given.isdecimal() and int(given) else ranks
