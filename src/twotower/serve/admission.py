"""Turns: requests are answered one after the other, in an order that is fair to clients, and who would wait too long is
refused at once.

One process answers on one core, so answering two requests at the same time makes both late. While the queue is empty
now and then, a request may wait `burst` seconds; once it has not been empty for so long, only `target` ("controlled
delay", Maurer 2015, "Fail at Scale", ACM Queue 13(8), after Nichols and Jacobson's CoDel). So a burst is answered, and an
overload does not make everyone wait. Within a second of a refusal it is `target` too: an overload that leaves the queue
empty for a moment is no burst.

Whose turn is next is decided by what clients have used: seconds of the process, measured at the end of each turn. The next
is whoever would have used the least after it (fair queueing by virtual time; Demers, Keshav and Shenker 1989, Parekh and
Gallager 1993). A client alone has everything; of several that wait, none gets more than its share, however many requests
it sends and however much one of them costs. How long somebody would wait is counted in the same order, so it is the
client with much in the queue that is refused, and not who asks for little. Of one client's requests the small go before the
large, until what came later has had as much time: who cannot be told apart is helped too.
"""

from __future__ import annotations

import asyncio
import time
from bisect import insort
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType

from twotower.serve.problems import Problem

REFUSAL_COOLDOWN = 1.0
"""Seconds without a refusal after which a burst may come again."""
SMOOTHING = 0.02
"""The share of the latest turn in a pace."""
REMEMBERED_CLIENTS = 4_096
"""Clients whose pace is remembered, beside those who have or wait for a turn."""
BYTES_PER_WEIGHT = 2_048
"""Bytes of a body that weigh as much as a request: about what it costs to read and use them."""
ENTRIES_PER_WEIGHT = 300
"""Entries of lists that do."""


class _ClientQueue:
    """The waiting requests of a client, and the time it has used."""

    __slots__ = ("permits", "queue", "queued_weight", "samples", "service_time", "used")

    def __init__(self, service_time: float) -> None:
        self.service_time = service_time
        """Seconds between the end of the turn before and that of its own, lately, by weight, while somebody waits: what
        else the process does counts too."""
        self.samples = 1
        """Turns that this is the mean of, the guess included."""
        self.used = 0.0
        """Seconds that it has had, on the gate's virtual clock; of turns it has now, what they are expected to take."""
        self.queue: list[tuple[float, int, Permit]] = []
        """By what the client would have used after the turn when it came: the small go before the large, but for a while."""
        self.queued_weight = 0.0
        """Weight of the queue."""
        self.permits = 0
        """Turns it has now."""

    @property
    def next_finish(self) -> float:
        """The time it will have used after its next turn."""
        return self.used + self.service_time * self.queue[0][2].weight


class AdmissionController:
    """`async with gate.turn(client, weight):` is a turn. `width` turns may be taken at once: 1 where a turn does not wait
    for others. A request of the weight 1 is an ordinary one."""

    def __init__(
        self,
        max_wait: float = 0.05,
        target_wait: float = 0.005,
        concurrency: int = 1,
        service_time: float = 0.001,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`burst` and `target` in seconds; `pace`, too, is what an ordinary request is believed to take before one was
        measured."""
        self.max_wait, self.target_wait, self.concurrency = max_wait, target_wait, concurrency
        self._clock = clock
        self._first_service_time = service_time
        """Pace of first turns lately. A client counts once, however much it asks."""
        self._clients: OrderedDict[str, _ClientQueue] = OrderedDict()
        self._active_clients: dict[str, _ClientQueue] = {}
        """The clients that have or wait for a turn."""
        self._queued_clients: dict[str, _ClientQueue] = {}
        """The requests that wait for one, in the order of coming."""
        self._active_permits = self._arrivals = 0
        self._virtual_clock = 0.0
        """The virtual clock: what a client that is always there would have used. Who comes begins with that."""
        self._last_release = self._last_idle = clock()
        self._last_refusal = self._last_release - REFUSAL_COOLDOWN

    def permit(self, client: str = "", weight: float = 1.0) -> Permit:
        return Permit(self, client, weight)

    @property
    def expected_wait(self) -> float:
        """Seconds that an ordinary request of a client without a name must expect to wait."""
        return self._wait_ahead("", 1.0, float("inf")) if self._active_permits >= self.concurrency else 0.0

    def overloaded(self, client: str = "", weight: float = 1.0) -> bool:
        """True if a request that comes now would wait too long. Called for every request: it also notes when
        the queue was empty."""
        now = self._clock()
        if self._active_permits < self.concurrency:
            self._last_idle = now
            return False
        calm = now - self._last_idle <= self.max_wait and now - self._last_refusal >= REFUSAL_COOLDOWN
        limit = self.max_wait if calm else self.target_wait
        if self._wait_ahead(client, weight, limit) <= limit:
            return False
        self._last_refusal = now
        return True

    def _wait_ahead(self, name: str, weight: float, enough: float) -> float:
        """Seconds of what waits and would come before a request, of its own client's and of others'. Turns that have
        begun are not counted: they cannot be taken back, and refusing who waits for them helps nobody. Counts no further
        than `enough`."""
        client = self._clients.get(name)
        if client is None:
            client = _ClientQueue(self._first_service_time)
        used = client.used if name in self._active_clients else max(self._virtual_clock, client.used)
        mine = used + client.service_time * weight
        before = 0.0
        for finish, _, permit in client.queue:
            if finish > mine or before > enough:
                break
            before += client.service_time * permit.weight
        ahead, after = before, mine + before
        for other in self._queued_clients.values():
            if ahead > enough:
                break
            if other is not client and other.next_finish <= after:
                ahead += min(other.service_time * other.queued_weight, after - other.used)
        return ahead

    # ---- what turns do

    def _arrive(self, name: str) -> _ClientQueue:
        """The client, who is here from now on."""
        client = self._active_clients.get(name)
        if client is None:
            client = self._clients.pop(name, None) or _ClientQueue(self._first_service_time)
            client.used = max(client.used, self._virtual_clock)
            self._clients[name] = self._active_clients[name] = client
            while len(self._clients) >= REMEMBERED_CLIENTS + len(self._active_clients):
                oldest = next(iter(self._clients))
                if oldest in self._active_clients:  # it came long ago, and is still here
                    self._clients.move_to_end(oldest)
                else:
                    del self._clients[oldest]
        return client

    def _grant(self, permit: Permit, client: _ClientQueue) -> None:
        self._active_permits += 1
        client.permits += 1
        self._virtual_clock = max(self._virtual_clock, client.used)
        permit.expected_seconds = client.service_time * permit.weight
        client.used += permit.expected_seconds

    def _release(self, permit: Permit, used: bool) -> None:
        """Take a turn back; one that was not `used` counts for nothing."""
        client, spent = self._active_clients[permit.client], 0.0
        if used:
            now = self._clock()
            spent, self._last_release = now - self._last_release, now
            pace = spent / permit.weight
            if client.samples == 1:
                self._first_service_time += SMOOTHING * (pace - self._first_service_time)
            client.samples += 1
            client.service_time += max(SMOOTHING, 1 / client.samples) * (pace - client.service_time)
        client.used += spent - permit.expected_seconds
        self._virtual_clock += spent / len(self._active_clients)
        self._active_permits -= 1
        client.permits -= 1
        self._forget_if_idle(permit.client, client)
        self._grant_next()

    def _grant_next(self) -> None:
        while self._queued_clients and self._active_permits < self.concurrency:
            name, client = min(self._queued_clients.items(), key=lambda item: item[1].next_finish)
            _, _, permit = client.queue.pop(0)
            self._dequeue(name, client, permit)
            if permit.granted is not None and not permit.granted.done():
                self._grant(permit, client)
                permit.granted.set_result(None)
            else:
                self._forget_if_idle(name, client)

    def _enqueue(self, permit: Permit, client: _ClientQueue) -> None:
        self._arrivals += 1
        insort(client.queue, (client.used + client.service_time * permit.weight, self._arrivals, permit))
        client.queued_weight += permit.weight
        self._queued_clients[permit.client] = client

    def _dequeue(self, name: str, client: _ClientQueue, permit: Permit) -> None:
        """A turn is in the queue no more."""
        client.queued_weight = client.queued_weight - permit.weight if client.queue else 0.0
        if not client.queue:
            del self._queued_clients[name]

    def _forget_if_idle(self, name: str, client: _ClientQueue) -> None:
        if not client.permits and not client.queue:
            del self._active_clients[name]


class Permit:
    """A place in the queue, and then a turn, which may be ended before its block is."""

    __slots__ = ("_controller", "_held", "client", "expected_seconds", "granted", "weight")

    def __init__(self, controller: AdmissionController, client: str, weight: float) -> None:
        self._controller, self.client, self.weight = controller, client, weight
        self.granted: asyncio.Future[None] | None = None
        self.expected_seconds = 0.0
        self._held = False

    async def __aenter__(self) -> Permit:
        controller = self._controller
        client = controller._arrive(self.client)
        if controller._active_permits < controller.concurrency and not controller._queued_clients:
            controller._grant(self, client)
            self._held = True
            controller._last_release = controller._clock()  # nobody has waited for this turn
            try:
                await asyncio.sleep(0)  # let those who came at the same time be queued, or refused
            except BaseException:
                self._return_unused()
                raise
        else:
            self.granted = asyncio.get_running_loop().create_future()
            controller._enqueue(self, client)
            try:
                await self.granted
                self._held = True
            except BaseException:
                if self.granted.done() and not self.granted.cancelled():
                    self._held = True
                    self._return_unused()  # it was given the turn and does not take it
                raise
        _CURRENT_PERMIT.set(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """The next may begin; what this one still does is done beside the turns."""
        if self._held:
            self._held = False
            self._controller._release(self, used=True)

    def _return_unused(self) -> None:
        self._held = False
        self._controller._release(self, used=False)


_CURRENT_PERMIT: ContextVar[Permit] = ContextVar("permit")
"""The latest turn of the present request."""


def release_current_permit() -> str:
    """End the turn of the present request, if it has one: for what takes turns of its own, or is done beside them. Gives
    the client's name."""
    permit = _CURRENT_PERMIT.get(None)
    if permit is None:
        return ""
    permit.release()
    return permit.client


class ClientSlots:
    """For work beside the turns: so many at once, and so many of one client."""

    def __init__(self, total: int, per_client: int, what: str) -> None:
        self.total, self.per_client, self.what = total, per_client, what
        self._taken: dict[str, int] = {}

    @contextmanager
    def hold(self, client: str) -> Iterator[None]:
        """Raises Problem "overload" if there is none."""
        mine = self._taken.get(client, 0)
        if mine >= self.per_client or sum(self._taken.values()) >= self.total:
            raise overload_problem(
                f"{self.per_client if mine >= self.per_client else self.total} {self.what} are under way"
            )
        self._taken[client] = mine + 1
        try:
            yield
        finally:
            self._taken[client] -= 1
            if not self._taken[client]:
                del self._taken[client]


def overload_problem(detail: str = "") -> Problem:
    """What somebody who would wait too long is told."""
    return Problem("overload", detail, headers={"Retry-After": "1"})
