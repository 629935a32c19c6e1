"""The processes that work on one model together, as torchrun starts them: who this one is, and what they tell each other.

Alone, every method gives back what it was given. Together, all ranks must call the same ones in the same order.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from twotower.errors import ConfigError, Interrupted

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """`count` processes, of which this is `number` (0, 1, …), and the `local`-th on its machine."""

    number: int = 0
    count: int = 1
    local: int = 0

    @classmethod
    def here(cls) -> Ranks:
        """What torchrun says in RANK, WORLD_SIZE and LOCAL_RANK; one process without it. Raises ConfigError."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        said = [os.environ.get(name, default) for name, default in zip(names, ("0", "1", "0"), strict=True)]
        if not all(s.isdecimal() for s in said) or int(said[0]) >= int(said[1]):
            told = ", ".join(f"{n}={s}" for n, s in zip(names, said, strict=True))
            raise ConfigError(f"{told}: these are set by torchrun; unset them to run one process")
        return cls(*map(int, said))

    @property
    def first(self) -> bool:
        """Whether this one speaks, and writes, for all."""
        return self.number == 0

    def share(self, n: int, number: int | None = None) -> slice:
        """This rank's part of n things (or that of rank `number`); the parts follow one another and are as good as equal."""
        r = self.number if number is None else number
        return slice(r * n // self.count, (r + 1) * n // self.count)

    def sizes(self, n: int) -> list[int]:
        """How many of n things each rank has."""
        return [part.stop - part.start for part in (self.share(n, r) for r in range(self.count))]

    @contextmanager
    def together(self, device: str = "cpu", seconds: float = 600.0, alone: bool = False) -> Iterator[None]:
        """While the block runs, the ranks can tell each other things: by gloo, or by nccl where `device` is cuda.

        Whoever waits for another longer than `seconds` ends with an error, and so does whoever waits for a dead one.
        One process has a group of its own only if it asks to be `alone` in one.
        """
        if self.count == 1 and not alone:
            yield
            return
        from torch import distributed

        backend = "nccl" if device.startswith("cuda") else "gloo"
        if self.count == 1:
            store = distributed.HashStore()  # type: ignore[attr-defined]
            distributed.init_process_group(backend, store=store, rank=0, world_size=1)
            try:
                yield
            finally:
                gc.collect()
                distributed.destroy_process_group()
            return
        try:
            distributed.init_process_group(backend, timeout=timedelta(seconds=seconds))
        except (ValueError, RuntimeError) as e:  # torch's errors of the network are RuntimeErrors
            raise ConfigError(
                f"WORLD_SIZE={self.count}: the ranks do not find each other ({str(e).splitlines()[0]}); start them with "
                "torchrun, or unset RANK, WORLD_SIZE and LOCAL_RANK to run one process"
            ) from e
        # After an error nothing is said: whoever waits hears of it as the connection ends with this process.
        stopped: Interrupted | None = None
        try:
            yield
        except Interrupted as e:
            stopped = e  # as all ranks are, after the same step; they wait for the one that writes
        distributed.barrier()
        gc.collect()  # what still holds the group would keep its threads beyond the interpreter's end, which aborts
        distributed.destroy_process_group()
        if stopped is not None:
            raise stopped

    def gather(self, rows: Tensor, sizes: list[int]) -> Tensor:
        """The rows (n, …) of every rank, one after another; `sizes` says how many each has. Its gradient is the sum of
        what all ranks' gathered rows get."""
        if self.count == 1:
            return rows
        found: Tensor = _gather()(rows, sizes, self)
        return found

    def gather_array(self, rows: npt.NDArray[Any], sizes: list[int]) -> npt.NDArray[Any]:
        """As `gather`, of an array (n, …) of whole or floating numbers."""
        if self.count == 1:
            return rows
        import torch

        found = _all_rows(torch.from_numpy(np.ascontiguousarray(rows)).to(_device()), sizes)
        array: npt.NDArray[Any] = found.cpu().numpy()
        return array

    def sum(self, *numbers: float) -> list[float]:
        """Each of the numbers, added up over the ranks."""
        if self.count == 1:
            return list(numbers)
        import torch
        from torch import distributed

        total = torch.tensor(numbers, dtype=torch.float64, device=_device())
        distributed.all_reduce(total)
        found: list[float] = total.tolist()
        return found

    def told(self, value: Any) -> Any:
        """What the first rank gives, on every rank."""
        if self.count == 1:
            return value
        from torch import distributed

        box = [value]
        distributed.broadcast_object_list(box, src=0, device=_device())
        return box[0]


def _device() -> Any:
    """Where the group's tensors must lie."""
    import torch
    from torch import distributed

    return torch.device("cuda" if distributed.get_backend() == "nccl" else "cpu")


def _all_rows(rows: Tensor, sizes: list[int]) -> Tensor:
    import torch
    from torch import distributed

    longest = max(sizes)
    mine = rows.new_zeros((longest, *rows.shape[1:]))
    mine[: len(rows)] = rows
    everything = [torch.empty_like(mine) for _ in sizes]
    distributed.all_gather(everything, mine)
    return torch.cat([part[:n] for part, n in zip(everything, sizes, strict=True)])


def _gather() -> Any:
    import torch
    from torch import distributed

    class Gather(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, rows: Tensor, sizes: list[int], ranks: Ranks) -> Tensor:
            before = sum(sizes[: ranks.number])
            ctx.mine = slice(before, before + len(rows))
            return _all_rows(rows.detach(), sizes)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
            total = grads[0].contiguous()
            distributed.all_reduce(total)
            return total[ctx.mine], None, None

    return Gather.apply
