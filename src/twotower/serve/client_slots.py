"""Bounds on work that runs beside the permits of admission."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from twotower.serve.problems import overload_problem


class ClientSlots:
    """Bounds on work that runs beside the permits: `total` at once, `per_client` of one client. `what` names it in messages."""

    def __init__(self, total: int, per_client: int, what: str) -> None:
        self.total, self.per_client, self.what = total, per_client, what
        self._taken: dict[str, int] = {}

    @contextmanager
    def hold(self, client: str) -> Iterator[None]:
        """Hold a slot during the block. Raises Problem "overload" if none is free."""
        held = self._taken.get(client, 0)
        if held >= self.per_client or sum(self._taken.values()) >= self.total:
            raise overload_problem(
                f"{self.per_client if held >= self.per_client else self.total} {self.what} are in progress"
            )
        self._taken[client] = held + 1
        try:
            yield
        finally:
            self._taken[client] -= 1
            if not self._taken[client]:
                del self._taken[client]
