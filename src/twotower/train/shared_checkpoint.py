"""The checkpoint that all ranks of a job resume from: rank 0's.

Rank 0 writes checkpoints. Where the ranks share its disk each reads the same files; a rank on a host with another disk receives
them.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from twotower.distributed import DistributedContext
from twotower.errors import RunError
from twotower.files.readers import file_digest
from twotower.train.checkpoint import STATE, TENSORS, Checkpoint

log = logging.getLogger(__name__)

CHUNK_BYTES = 16 << 20
"""Bytes of a file that travel at once."""


@contextmanager
def shared_checkpoint(
    context: DistributedContext, folders: Sequence[Path], chunk_bytes: int = CHUNK_BYTES
) -> Iterator[Checkpoint | None]:
    """Yield the newest intact checkpoint of the first of rank 0's `folders` that has one, None if none has.

    All ranks call this. One whose own folders do not hold that checkpoint receives it in pieces of `chunk_bytes`, into a
    temporary folder that is removed after the block. Raises RunError if another rank has a checkpoint of a later step, or if
    rank 0 alone has none.
    """
    own = next((found for folder in folders if (found := Checkpoint.newest(folder))), None)
    if context.world_size == 1:
        yield own
        return
    steps = context.all_gather_array(np.array([own.step if own else -1]), [1] * context.world_size)
    if steps.max() > steps[0]:
        rank = int(steps.argmax())
        has = f"has one of step {steps[0]}" if steps[0] >= 0 else "has none"
        raise RunError(
            f"{folders[-1]}: rank {rank} has a checkpoint of step {steps[rank]}, and rank 0, which writes them, {has} "
            f"(this is rank {context.rank}, on {platform.node()}); start the ranks so that rank {rank} becomes rank 0, copy its "
            "run folder to the host of rank 0, or remove it"
        )
    if steps[0] < 0:
        yield None
        return
    stamp = file_digest(own.path / STATE) if own else ""
    lacks = stamp != context.broadcast(stamp)
    lacking = int(context.all_reduce_sum(float(lacks))[0])
    if not lacking:
        yield own
        return
    if context.is_main:
        log.info(f"sending the checkpoint of step {steps[0]} to {lacking} of {context.world_size} ranks, which lack it")
    with TemporaryDirectory(prefix="twotower-checkpoint-", ignore_cleanup_errors=True) as temporary:
        name = context.broadcast(own.path.name if own else "")
        received = Path(temporary) / name
        received.mkdir()
        for file in (STATE, TENSORS):
            _send(context, own.path / file if own else received / file, received / file if lacks else None, chunk_bytes)
        yield Checkpoint.load(received) if lacks else own


def _send(context: DistributedContext, source: Path, target: Path | None, chunk_bytes: int) -> None:
    """Write rank 0's file `source` to `target`, on the ranks that have a target. Raises RunError if a disk fails."""
    try:
        with ExitStack() as opened:
            read = opened.enter_context(source.open("rb")) if context.is_main else None
            write = opened.enter_context(target.open("wb")) if target else None
            while chunk := context.broadcast(read.read(chunk_bytes) if read else b""):
                if write:
                    write.write(chunk)
    except OSError as e:
        raise RunError(f"{e.filename or target}: the checkpoint of rank 0 cannot be kept here ({e.strerror})") from e
