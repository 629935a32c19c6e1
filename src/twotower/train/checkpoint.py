"""Checkpoints: the complete state of a training, from which it resumes as if it had never stopped.

A checkpoint is a folder `step-<n>` with `state.json` and `tensors.safetensors`, renamed into place when complete. It
holds the progress of the training, the fingerprint of its settings, and the tensors of every part as "<part>/<name>".
No pickle is read or written. Rank 0 writes checkpoints; a rank with another disk receives them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import platform
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import numpy as np
import torch
from pydantic import JsonValue
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from twotower import files
from twotower.arrays.types import F32, Shaped
from twotower.distributed import DistributedContext
from twotower.errors import RunError
from twotower.files.readers import file_digest, read_json
from twotower.train.progress import TrainingProgress
from twotower.train.torchrec.embeddings import TorchRecEmbeddings
from twotower.train.torchrec.shard import EmbeddingShard

log = logging.getLogger(__name__)

STATE, TENSORS = "state.json", "tensors.safetensors"
"""Files of a checkpoint."""
CODES, DATA, EVALUATION = "codes", "data", "evaluation"
"""Keys of a fingerprint: digests of the values behind the codes, which weights depend on; of the data; and of the
settings of evaluation, which may change."""
FORMAT = 5
"""Format in `state.json`; a checkpoint of another format is refused."""
CHECKPOINTS_KEPT = 2
"""The newest, and the one before it in case the newest is damaged."""
SENT_BYTES = 16 << 20
"""Bytes of a file that are sent to other ranks at once."""


@dataclass(frozen=True)
class Checkpoint:
    """Content of a checkpoint."""

    path: Path
    step: int
    tensors: dict[str, Shaped[Tensor, "*_"]]
    fingerprint: dict[str, JsonValue]
    progress: dict[str, JsonValue]

    @classmethod
    def newest(cls, folder: Path) -> Checkpoint | None:
        """Return the newest intact checkpoint of a folder, or None. Raises RunError if one has another format."""
        for path in reversed(_checkpoint_folders(folder)):
            try:
                return cls.load(path)
            except _OtherFormatError as e:
                raise RunError(str(e)) from None
            except RunError as e:
                log.warning(f"{e}; falling back to the checkpoint before it")
        return None

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """Read a checkpoint. Raises RunError if it is damaged or has another format."""
        state = read_json(path / STATE)
        if isinstance(state, dict) and (written := state.get("format")) != FORMAT:
            raise _OtherFormatError(
                f"checkpoint {path} has format {written!r}, and this version reads format {FORMAT}; start a new run"
            )
        try:
            file = path / TENSORS
            if file_digest(file) != state["sha256"]:
                raise RunError(f"checkpoint {path} is damaged (checksum)")
            step, fingerprint, progress = state["step"], state["fingerprint"], state["progress"]
            if not (isinstance(step, int) and isinstance(fingerprint, dict) and isinstance(progress, dict)):
                raise TypeError("step, fingerprint or progress")
            return cls(path, step, load_file(file), fingerprint, progress)
        except (OSError, SafetensorError, KeyError, TypeError) as e:
            raise RunError(f"checkpoint {path} is damaged ({type(e).__name__}: {e})") from None


class _OtherFormatError(RunError):
    """A checkpoint of another version."""


def _checkpoint_folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step-*") if p.is_dir()) if folder.is_dir() else []


def remove_leftovers(folder: Path) -> None:
    """Remove incomplete checkpoints of killed processes. The caller holds the run's lock."""
    files.remove_leftovers(folder, lambda name: name.startswith("step-"))


class Checkpoints:
    """Checkpoints of one training, which rank 0 writes. With sharded tables all ranks call the same methods."""

    def __init__(
        self,
        folder: Path | None,
        parts: Mapping[str, Stateful],
        torchrec: TorchRecEmbeddings | None = None,
    ) -> None:
        """Save `parts` by name, one of them "model"."""
        self.folder, self.fingerprint = folder, dict[str, JsonValue]()
        """Folder, and values that must be equal at a resume."""
        self._parts, self._torchrec = parts, torchrec
        self.last: Path | None = None
        """Latest checkpoint that is written or loaded."""
        self.has_changed = False
        """True after a resume with another fingerprint or evaluation."""

    def save(self, progress: TrainingProgress) -> None:
        """Write a checkpoint on rank 0 and remove old ones; on other ranks send pieces. Raises RunError if it fails."""
        tensors: dict[str, Shaped[Tensor, "*_"] | TensorBlocks] = {**join_states(self._parts)}
        if self._torchrec:
            for name, value in tensors.items():
                if isinstance(value, Tensor) and (shard := self._shard(name, value)):
                    shape = (shard.num_embeddings, shard.embedding_dim)
                    tensors[name] = TensorBlocks(shape, self._torchrec.stream_rows(shard, value))
            if not self._torchrec.context.is_main:  # send the pieces that rank 0 writes, in its order
                for name in file_order(tensors):
                    if isinstance(value := tensors[name], TensorBlocks):
                        for _ in value.rows:
                            pass
                return
        assert self.folder is not None
        path = self.folder / f"step-{progress.step:09d}"
        with files.new_folder(path) as temporary:
            state = {
                "format": FORMAT,
                "step": progress.step,
                "sha256": write_tensors(temporary / TENSORS, tensors),
                "fingerprint": self.fingerprint,
                "progress": vars(progress),
            }
            (temporary / STATE).write_text(json.dumps(state), encoding="utf-8")
        for old in _checkpoint_folders(self.folder)[:-CHECKPOINTS_KEPT]:
            shutil.rmtree(old, ignore_errors=True)
        self.last = path

    def resume(self, override: bool = False, checkpoint: Checkpoint | None = None) -> TrainingProgress | None:
        """Load a checkpoint, by default the newest intact one, into the parts. Return its progress, or None without
        one.

        Raises RunError with the differences if the fingerprint has changed, unless `override`. Raises RunError in any
        case if the values of the data have other codes, which are the rows of tables of weights.
        """
        found = checkpoint or (Checkpoint.newest(self.folder) if self.folder else None)
        if found is None:
            return None
        self.last = found.path
        if found.fingerprint.get(CODES) != self.fingerprint.get(CODES):
            raise RunError(
                "cannot resume: the users, items or values of the data differ from those of the checkpoint, whose "
                "weights belong to them; undo the change, or start a new run"
            )
        changed = [
            f"{key}: {old!r} then, {new!r} now"
            for key in sorted({*found.fingerprint, *self.fingerprint} - {CODES, EVALUATION})
            if (old := found.fingerprint.get(key)) != (new := self.fingerprint.get(key))
        ]
        if changed:
            differences = "; ".join(changed[:5])
            if not override:
                raise RunError(
                    f"cannot resume: the run has changed ({differences}); undo the change, or pass `override=True`"
                )
            log.warning(f"resuming although the run has changed ({differences})")
            if any(line.startswith((f"{DATA}: ", "split.")) for line in changed):
                log.warning(
                    "rows of the present validation and test part may be training rows of the epochs before, so their "
                    "metrics may be too high; start a new run to measure"
                )
        self.has_changed = bool(changed) or found.fingerprint.get(EVALUATION) != self.fingerprint.get(EVALUATION)
        self._restore(found.tensors)
        return TrainingProgress.restore(found.progress, found.path)

    def _restore(self, tensors: dict[str, Shaped[Tensor, "*_"]]) -> None:
        shapes = {f"model/{name}": tuple(weight.shape) for name, weight in self._parts["model"].state().items()}
        for name in shapes:
            if self._torchrec and (shard := self._torchrec.shards_by_parameter.get(name.removeprefix("model/"))):
                shapes[name] = (shard.num_embeddings, shard.embedding_dim)
        if {n: tuple(weight.shape) for n, weight in tensors.items() if n.startswith("model/")} != shapes:
            raise RunError("the checkpoint's weights have other names or shapes than the model's; start a new run")
        if self._torchrec:
            tensors = {
                key: self._torchrec.local_piece(shard, value) if (shard := self._shard(key, value)) else value
                for key, value in tensors.items()
            }
        load_states(self._parts, tensors)

    def _shard(self, key: str, value: Shaped[Tensor, "*_"]) -> EmbeddingShard | None:
        """Return the sharded table of a tensor "<part>/…/<parameter>"; None if it is replicated."""
        return self._torchrec.shards_by_parameter.get(key.rpartition("/")[2]) if self._torchrec and value.ndim else None


class Stateful(Protocol):
    """Part of a training with a state for checkpoints."""

    def state(self) -> dict[str, Shaped[Tensor, "*_"]]:
        """Return the tensors that determine the further course of the part, by name."""

    def load_state(self, state: dict[str, Shaped[Tensor, "*_"]]) -> None:
        """Continue from a state, possibly of other settings."""


def join_states(parts: Mapping[str, Stateful]) -> dict[str, Shaped[Tensor, "*_"]]:
    """Return the states of all parts as "<part>/<name>"."""
    return {f"{part}/{name}": tensor for part, of in parts.items() for name, tensor in of.state().items()}


def load_states(parts: Mapping[str, Stateful], state: Mapping[str, Shaped[Tensor, "*_"]]) -> None:
    """Let each part continue from its tensors in a joined state; ignore tensors of other parts."""
    states: dict[str, dict[str, Shaped[Tensor, "*_"]]] = {part: {} for part in parts}
    for key, tensor in state.items():
        part, _, name = key.partition("/")
        if part in states:
            states[part][name] = tensor
    for part, of in parts.items():
        of.load_state(states[part])


_TYPES = {torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32"}
"""Names of types in a safetensors file, in its order."""


@dataclass(frozen=True)
class TensorBlocks:
    """A float32 tensor (rows, width) as a stream of blocks of rows, for tables that no rank holds whole."""

    shape: tuple[int, int]
    rows: Iterable[F32[Tensor, "_ _"]]


def file_order(tensors: Mapping[str, Shaped[Tensor, "*_"] | TensorBlocks]) -> list[str]:
    """Return the names in the order of a safetensors file: by type, then by name."""
    places = {kind: place for place, kind in enumerate(_TYPES)}
    return sorted(tensors, key=lambda name: (places[_dtype(tensors[name])], name))


def write_tensors(path: Path, tensors: Mapping[str, Shaped[Tensor, "*_"] | TensorBlocks]) -> str:
    """Write the bytes of `safetensors.torch.save`, one tensor after another, and return the file's SHA-256."""
    header, end = {}, 0
    for name in file_order(tensors):
        tensor = tensors[name]
        start, end = end, end + math.prod(tensor.shape) * _dtype(tensor).itemsize
        header[name] = {"dtype": _TYPES[_dtype(tensor)], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:

        def write(data: bytes | memoryview) -> None:
            file.write(data)
            digest.update(data)

        write(len(text).to_bytes(8, "little"))
        write(text)
        for name in header:
            tensor = tensors[name]
            for part in [tensor] if isinstance(tensor, Tensor) else tensor.rows:
                write(part.detach().cpu().contiguous().numpy().data.cast("B") if part.numel() else b"")
    return digest.hexdigest()


def _dtype(tensor: Shaped[Tensor, "*_"] | TensorBlocks) -> torch.dtype:
    return torch.float32 if isinstance(tensor, TensorBlocks) else tensor.dtype


@contextmanager
def shared_checkpoint(
    context: DistributedContext, folders: Sequence[Path], chunk_bytes: int = SENT_BYTES
) -> Iterator[Checkpoint | None]:
    """Yield the newest intact checkpoint of the first of rank 0's `folders` that has one, None if none has.

    All ranks call this. A rank without that checkpoint receives it in pieces of `chunk_bytes`, into a temporary folder
    that is removed after the block. Raises RunError if another rank has a checkpoint of a later step than rank 0.
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
            f"(this is rank {context.rank}, on {platform.node()}); start the ranks so that rank {rank} becomes rank 0, "
            "copy its run folder to the host of rank 0, or remove it"
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
