"""The ranks of one job, as torchrun starts them, and the device of a rank.

With one rank every collective returns its argument. Several ranks call the same collectives in the same order.
"""

from __future__ import annotations

import gc
import logging
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from twotower.errors import ConfigError, Interrupted, TrainingError, first_line

if TYPE_CHECKING:
    import torch
    from torch import Tensor

log = logging.getLogger(__name__)
Value = TypeVar("Value")
Number = TypeVar("Number", bound=np.generic)
_OF_GLOO = "/gloo/transport/"
"""Part of the errors of gloo's connections, which have no class of their own."""


@dataclass(frozen=True)
class DistributedContext:
    """One rank of a job: `rank` in [0, `world_size`), and `local_rank`, its number on this machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls) -> DistributedContext:
        """Read RANK, WORLD_SIZE and LOCAL_RANK of torchrun, or a running process group. Default: one process.

        Raises ConfigError if they are not whole numbers with RANK < WORLD_SIZE."""
        if _has_begun():
            return cls._of_group()
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        values = [os.environ.get(name, default) for name, default in zip(names, ("0", "1", "0"), strict=True)]
        if not all(v.isdecimal() for v in values) or int(values[0]) >= int(values[1]):
            given = ", ".join(f"{n}={v}" for n, v in zip(names, values, strict=True))
            raise ConfigError(f"{given}: torchrun sets these variables; unset them to run one process")
        return cls(*map(int, values))

    @classmethod
    def _of_group(cls) -> DistributedContext:
        """Return this rank of the running group. Without LOCAL_RANK the ranks of a machine take its GPUs in turn."""
        import torch
        from torch import distributed

        rank, local = distributed.get_rank(), os.environ.get("LOCAL_RANK", "")
        local_rank = int(local) if local.isdecimal() else rank % max(torch.cuda.device_count(), 1)
        return cls(rank, distributed.get_world_size(), local_rank)

    @property
    def is_main(self) -> bool:
        """True on rank 0, which prints and writes files for all."""
        return self.rank == 0

    def partition(self, n: int, rank: int | None = None) -> slice:
        """Return the part of n things of this rank, or of `rank`: consecutive, with sizes that differ by at most 1."""
        r = self.rank if rank is None else rank
        return slice(r * n // self.world_size, (r + 1) * n // self.world_size)

    def partition_sizes(self, n: int) -> list[int]:
        """Return the size of every rank's part of n things."""
        return [part.stop - part.start for part in (self.partition(n, r) for r in range(self.world_size))]

    @contextmanager
    def process_group(self, device: str = "cpu", timeout: float = 600.0, always: bool = False) -> Iterator[None]:
        """Connect the ranks within the block: by nccl if `device` is cuda, else by gloo.

        A running group, of Ray Train or of the caller, is joined and stays, with its backend and timeout. One process
        gets a group (of one) only with `always`. Raises ConfigError if the ranks do not connect or their group does not
        fit, TrainingError if another rank has died, or does not answer for `timeout` seconds."""
        joined = _has_begun()
        if joined:
            self._check_group(device)
        if self.world_size == 1 and (joined or not always):
            yield
            return
        from torch import distributed

        backend = "nccl" if device.startswith("cuda") else "gloo"
        if self.world_size == 1:
            store = distributed.HashStore()  # type: ignore[attr-defined]
            distributed.init_process_group(backend, store=store, rank=0, world_size=1)
            try:
                yield
            finally:
                gc.collect()
                distributed.destroy_process_group()
            return
        try:
            if not joined:
                distributed.init_process_group(backend, timeout=timedelta(seconds=timeout))
        except (ValueError, RuntimeError) as e:  # torch's network errors are RuntimeErrors
            raise ConfigError(
                f"WORLD_SIZE={self.world_size}: the ranks do not connect ({str(e).splitlines()[0]}); start them with "
                "torchrun, or unset RANK, WORLD_SIZE and LOCAL_RANK to run one process"
            ) from e
        # After any other error the waiting ranks fail, as the connection ends with this process.
        interrupted: Interrupted | None = None
        try:
            try:
                yield
            except Interrupted as e:
                interrupted = e  # every rank stops after the same step, and waits for rank 0 to write the checkpoint
            distributed.barrier()
        except RuntimeError as e:
            lost = isinstance(e, distributed.DistNetworkError | distributed.DistStoreError) or _OF_GLOO in str(e)
            if not lost:
                raise
            silence = "too long" if joined else f"for {timeout:g} seconds"
            raise TrainingError(
                f"rank {self.rank} of {self.world_size}, on {platform.node()}: another rank has ended, or was silent "
                f"{silence} ({first_line(e).rpartition('] ')[2]}); the output of the rank that failed first has the "
                "cause; if none has one, its host or the network failed. Start the same command on all hosts with "
                "`resume=True`"
            ) from e
        gc.collect()  # a remaining reference would keep the group's threads alive, and the interpreter would abort
        if not joined:
            distributed.destroy_process_group()
        if interrupted is not None:
            raise interrupted

    def _check_group(self, device: str) -> None:
        """Raise ConfigError if the running group has other ranks, or cannot send tensors of `device`."""
        from torch import distributed

        given, found = (self.rank, self.world_size), (distributed.get_rank(), distributed.get_world_size())
        if given != found:
            raise ConfigError(
                f"rank {given[0]} of {given[1]}: the process group that has begun has this process as rank {found[0]} "
                f"of {found[1]}; give its numbers, or end it with torch.distributed.destroy_process_group()"
            )
        if distributed.get_backend() == "nccl" and not device.startswith("cuda"):
            raise ConfigError(
                f"the process group that has begun sends by nccl alone, and train.device is '{device}'; begin it with "
                "backend = 'gloo', or set train.device = 'cuda'"
            )

    def seed_torch(self, seed: int, device: torch.device) -> None:
        """Seed torch's draws on `device`, differently on each rank."""
        import torch

        if not self.is_main:
            seed = int(np.random.SeedSequence([seed, self.rank]).generate_state(1, np.uint64)[0] >> 1)
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.manual_seed(seed)
        elif device.type == "mps":
            torch.mps.manual_seed(seed)

    def all_gather(self, rows: Tensor, sizes: list[int]) -> Tensor:
        """Concatenate the rows (sizes[r], …) of every rank r. A row's gradient is the sum over the ranks."""
        if self.world_size == 1:
            return rows
        return _all_gather_function()(rows, sizes, self)

    def all_gather_array(self, rows: npt.NDArray[Number], sizes: list[int]) -> npt.NDArray[Number]:
        """Concatenate the numeric arrays (sizes[r], …) of every rank r."""
        if self.world_size == 1:
            return rows
        import torch

        gathered = _all_gather_rows(torch.from_numpy(np.ascontiguousarray(rows)).to(_group_device()), sizes)
        array: npt.NDArray[Number] = gathered.cpu().numpy()
        return array

    def all_reduce_sum(self, *numbers: float) -> list[float]:
        """Sum each number over the ranks, in float64."""
        if self.world_size == 1:
            return list(numbers)
        import torch
        from torch import distributed

        total = torch.tensor(numbers, dtype=torch.float64, device=_group_device())
        distributed.all_reduce(total)
        sums: list[float] = total.tolist()
        return sums

    def broadcast(self, value: Value) -> Value:
        """Return rank 0's `value`, any picklable object, on every rank; raise it on every rank if it is Interrupted."""
        if self.world_size == 1:
            return value
        from torch import distributed

        box = [value]
        distributed.broadcast_object_list(box, src=0, device=_group_device())
        if isinstance(box[0], Interrupted):
            raise box[0]
        return box[0]


def _has_begun() -> bool:
    """Return True if this process has loaded torch and is in a process group."""
    if "torch" not in sys.modules:
        return False
    from torch import distributed

    return distributed.is_available() and distributed.is_initialized()


def _group_device() -> torch.device:
    """Return the device on which the group's backend reads tensors."""
    import torch
    from torch import distributed

    return torch.device("cuda" if distributed.get_backend() == "nccl" else "cpu")


def _all_gather_rows(rows: Tensor, sizes: list[int]) -> Tensor:
    """Concatenate the rows of every rank, without gradient. Shorter parts are sent padded to the longest."""
    import torch
    from torch import distributed

    longest = max(sizes)
    padded = rows.new_zeros((longest, *rows.shape[1:]))
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in sizes]
    distributed.all_gather(parts, padded)
    return torch.cat([part[:n] for part, n in zip(parts, sizes, strict=True)])


class GatherContext(Protocol):
    """Part of the backward pass's context that the all-gather uses."""

    own: slice  # of this rank in the gathered rows


def _all_gather_function() -> Callable[[Tensor, list[int], DistributedContext], Tensor]:
    """Return the differentiable all-gather (rows, sizes, context); a function, so that torch is imported late."""
    import torch
    from torch import distributed

    class AllGather(torch.autograd.Function):
        @staticmethod
        def forward(ctx: GatherContext, rows: Tensor, sizes: list[int], context: DistributedContext) -> Tensor:
            first = sum(sizes[: context.rank])
            ctx.own = slice(first, first + len(rows))
            return _all_gather_rows(rows.detach(), sizes)

        @staticmethod
        def backward(ctx: GatherContext, *grads: Tensor) -> tuple[Tensor, None, None]:
            total = grads[0].contiguous()
            distributed.all_reduce(total)
            return total[ctx.own], None, None

    apply: Callable[[Tensor, list[int], DistributedContext], Tensor] = AllGather.apply
    return apply


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the device of `train.device`; of several GPUs, GPU `local_rank`.

    `auto` takes cuda, then mps, then cpu, and logs the choice. Raises ConfigError if the machine lacks the device."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        log.info(f"device: {name} ({'accelerator found' if name != 'cpu' else 'no accelerator found'})")
    if (name == "cuda" and torch.cuda.device_count() <= local_rank) or (
        name == "mps" and not torch.backends.mps.is_available()
    ):
        missing = f"GPU {local_rank}, which this rank needs" if local_rank else "such device"
        raise ConfigError(f"train.device = '{name}': this machine has no {missing}; use 'auto' or 'cpu'")
    if name == "cuda":
        torch.cuda.set_device(local_rank)
    return torch.device(name)
