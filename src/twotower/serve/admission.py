"""Admission control: requests are answered one after the other, in an order that is fair to clients; a request that
would wait too long is refused at once.

One process answers on one core, so answering two requests at the same time delays both. While the queue empties now and
then, a request may wait `max_wait` seconds; once the queue has not been empty for `max_wait`, only `target_wait`
("controlled delay": Maurer 2015, "Fail at Scale", ACM Queue 13(8), after Nichols and Jacobson's CoDel). A burst is
answered, and an overload does not delay every request. Within a second of a refusal the limit stays `target_wait`: an
overload that empties the queue briefly is no burst.

The queue is a fair queue by virtual time (weighted fair queueing: Demers, Keshav and Shenker 1989; Parekh and Gallager
1993). Each client accumulates the seconds of the process that its requests took, measured when a permit is released.
The next permit goes to the client with the smallest virtual finish time. A client alone has the whole process; of
several waiting clients none gets more than its share, however many requests it sends and however much one of them
costs. The expected wait is computed in the same order, so the client with a long queue is refused, not the one with a
small request.
Requests of one client are ordered by their virtual finish time on arrival: small requests pass large ones until later
arrivals have taken as much time as the large one, which also helps clients that share one address.
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
"""Seconds without a refusal before `max_wait` applies again."""
SMOOTHING = 0.02
"""Weight of the latest request in the moving averages of service times."""
REMEMBERED_CLIENTS = 4_096
"""Number of clients whose service time is kept, in addition to those with a permit or a waiting request."""
BYTES_PER_WEIGHT = 2_048
"""Bytes of a body that cost about as much to parse and use as an ordinary request; they add 1 to its weight."""
ENTRIES_PER_WEIGHT = 300
"""Entries of lists (history, events, allow, ban) that add 1 to a request's weight."""
WORK_BETWEEN_ARRIVALS = 0.004
"""Seconds of work after which arrivals are queued before the next permit is granted. An event loop accepts and reads
only between two pieces of work, uvloop a single connection each time."""


class _ClientQueue:
    """Waiting requests of one client, and its virtual time."""

    __slots__ = ("permits", "queue", "queued_weight", "samples", "service_time", "used")

    def __init__(self, service_time: float) -> None:
        self.service_time = service_time
        """Moving average of seconds per unit of weight, from the previous release to the client's own while requests
        wait; it includes other work of the process."""
        self.samples = 1
        """Number of samples in `service_time`, the initial guess included."""
        self.used = 0.0
        """Virtual time of the client in seconds: measured for released permits, expected for permits it holds."""
        self.queue: list[tuple[float, int, Permit]] = []
        """Waiting permits, ordered by virtual finish time on arrival, then by arrival."""
        self.queued_weight = 0.0
        """Total weight of the queue."""
        self.permits = 0
        """Number of permits held."""

    @property
    def next_finish(self) -> float:
        """Virtual finish time of the first waiting request."""
        return self.used + self.service_time * self.queue[0][2].weight


class AdmissionController:
    """Fair queue of permits: `async with controller.permit(client, weight):` runs its block with a permit.

    Up to `concurrency` permits are held at once: 1 where a request does not wait for other processes. Weight 1 is an
    ordinary request."""

    accept: Callable[[], int] = staticmethod(lambda: 0)
    """Accepts waiting connections. Returns the turns of the event loop until all received requests are queued."""

    def __init__(
        self,
        max_wait: float = 0.05,
        target_wait: float = 0.005,
        concurrency: int = 1,
        service_time: float = 0.001,
        remembered_clients: int = REMEMBERED_CLIENTS,
        clock: Callable[[], float] = time.monotonic,
        work_clock: Callable[[], float] | None = None,
    ) -> None:
        """Create an empty queue. Times are in seconds; `service_time` is the guess for an ordinary request before one
        is measured.

        `work_clock` measures the work of requests; default: `clock`. By the processor time of the process, no client is
        charged for the work of other processes."""
        self.max_wait, self.target_wait, self.concurrency = max_wait, target_wait, concurrency
        self._remembered_clients = remembered_clients
        self._clock, self._work_clock = clock, work_clock or clock
        self._first_service_time = service_time
        """Moving average of the service time of clients' first requests: the guess for an unknown client."""
        self._clients: OrderedDict[str, _ClientQueue] = OrderedDict()
        self._active_clients: dict[str, _ClientQueue] = {}
        """Clients that hold or wait for a permit."""
        self._queued_clients: dict[str, _ClientQueue] = {}
        """Clients with waiting requests, in order of arrival."""
        self._active_permits = self._arrivals = 0
        self._unaccepted_work = 0.0
        """Seconds of work since arrivals were last queued."""
        self._accepting = False
        """True while arrivals are queued; no permit is granted meanwhile."""
        self._virtual_clock = 0.0
        """Virtual time of a client that is always active; an arriving client starts at it."""
        self._last_release, self._last_idle = self._work_clock(), clock()
        self._last_refusal = self._last_idle - REFUSAL_COOLDOWN

    def permit(self, client: str = "", weight: float = 1.0) -> Permit:
        return Permit(self, client, weight)

    @property
    def _empty(self) -> bool:
        """True if a request that arrives now waits for no other."""
        return self._active_permits < self.concurrency and not self._queued_clients

    def overloaded(self, client: str = "", weight: float = 1.0) -> bool:
        """Return True if a request that arrives now would wait longer than the limit.

        Call it for every request: it also records when the queue was empty."""
        now = self._clock()
        if self._empty:
            self._last_idle = now
            return False
        burst_allowed = now - self._last_idle <= self.max_wait and now - self._last_refusal >= REFUSAL_COOLDOWN
        limit = self.max_wait if burst_allowed else self.target_wait
        if self._wait_ahead(client, weight, limit) <= limit:
            return False
        self._last_refusal = now
        return True

    def _wait_ahead(self, name: str, weight: float, enough: float) -> float:
        """Return the seconds of waiting requests that would run before a request, of its own client and of others; stop
        counting above `enough`. Permits that are held do not count: they cannot be revoked, so refusing would not help.
        The one that is granted as soon as arrivals are queued counts as held."""
        granted_next = None
        if self._accepting:
            granted_next = min(self._queued_clients.values(), key=lambda other: other.next_finish, default=None)
        client = self._clients.get(name)
        if client is None:
            client = _ClientQueue(self._first_service_time)
        used = client.used if name in self._active_clients else max(self._virtual_clock, client.used)
        finish_on_arrival = used + client.service_time * weight
        own_wait = 0.0
        for finish, _, permit in client.queue:
            if finish > finish_on_arrival or own_wait > enough:
                break
            own_wait += client.service_time * permit.weight
        wait, virtual_finish = own_wait, finish_on_arrival + own_wait
        if client is granted_next and own_wait:
            wait -= client.service_time * client.queue[0][2].weight
        for other in self._queued_clients.values():
            if wait > enough:
                break
            if other is not client and other.next_finish <= virtual_finish:
                queued, ahead = other.service_time * other.queued_weight, virtual_finish - other.used
                if other is granted_next:
                    first, *second = (other.service_time * permit.weight for _, _, permit in other.queue[:2])
                    queued, ahead = queued - first, ahead - first
                    if not second or second[0] > ahead:
                        continue
                wait += min(queued, ahead)
        return wait

    # ---- called by Permit

    def _arrive(self, name: str) -> _ClientQueue:
        """Return the client's queue, and mark the client active."""
        client = self._active_clients.get(name)
        if client is None:
            client = self._clients.pop(name, None) or _ClientQueue(self._first_service_time)
            client.used = max(client.used, self._virtual_clock)
            self._clients[name] = self._active_clients[name] = client
            while len(self._clients) >= self._remembered_clients + len(self._active_clients):
                oldest = next(iter(self._clients))
                if oldest in self._active_clients:  # seen first long ago, and still active
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
        """Take a permit back; the time of one that was not `used` is not counted."""
        client, spent = self._active_clients[permit.client], 0.0
        if used:
            now = self._work_clock()
            spent, self._last_release = now - self._last_release, now
            measured = spent / permit.weight
            if client.samples == 1:
                self._first_service_time += SMOOTHING * (measured - self._first_service_time)
            client.samples += 1
            client.service_time += max(SMOOTHING, 1 / client.samples) * (measured - client.service_time)
        client.used += spent - permit.expected_seconds
        self._virtual_clock += spent / len(self._active_clients)
        self._active_permits -= 1
        client.permits -= 1
        self._forget_if_idle(permit.client, client)
        self._unaccepted_work += spent
        if self._unaccepted_work >= WORK_BETWEEN_ARRIVALS and not self._accepting:
            self._accepting = True
            self._grant_after(self.accept())
        else:
            self._grant_next()

    def _grant_after(self, turns: int) -> None:
        """Grant the next permit after some turns of the event loop."""
        if turns:
            asyncio.get_running_loop().call_soon(self._grant_after, turns - 1)
        else:
            self._accepting, self._unaccepted_work = False, 0.0
            self._last_release = self._work_clock()  # no client pays for the arrivals
            self._grant_next()

    def _grant_next(self) -> None:
        while self._queued_clients and self._active_permits < self.concurrency and not self._accepting:
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
        """Account for a permit that has left the queue."""
        client.queued_weight = client.queued_weight - permit.weight if client.queue else 0.0
        if not client.queue:
            del self._queued_clients[name]

    def _forget_if_idle(self, name: str, client: _ClientQueue) -> None:
        if not client.permits and not client.queue:
            del self._active_clients[name]


class Permit:
    """A waiting request, then the right to run; may be released before its block ends."""

    __slots__ = ("_controller", "_held", "client", "expected_seconds", "granted", "weight")

    def __init__(self, controller: AdmissionController, client: str, weight: float) -> None:
        self._controller, self.client, self.weight = controller, client, weight
        self.granted: asyncio.Future[None] | None = None
        self.expected_seconds = 0.0
        self._held = False

    async def __aenter__(self) -> Permit:
        controller = self._controller
        client = controller._arrive(self.client)
        if controller._empty and not controller._accepting:
            controller._grant(self, client)
            self._held = True
            controller._last_release = controller._work_clock()  # no request waited for this permit
            try:
                await asyncio.sleep(0)  # let requests that arrived at the same time be queued or refused
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
                    self._return_unused()  # granted and cancelled at the same time
                raise
        _CURRENT_PERMIT.set(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Let the next request run; the rest of the block runs without a permit."""
        if self._held:
            self._held = False
            self._controller._release(self, used=True)

    def _return_unused(self) -> None:
        self._held = False
        self._controller._release(self, used=False)


_CURRENT_PERMIT: ContextVar[Permit] = ContextVar("permit")
"""Latest permit of the current request."""


def release_current_permit() -> str:
    """Release the permit of the current request, if it holds one, and return the client's name ("" without a permit).

    For work that takes its own permits, or runs without one."""
    permit = _CURRENT_PERMIT.get(None)
    if permit is None:
        return ""
    permit.release()
    return permit.client


class ClientSlots:
    """Bounds on work without a permit: `total` at once, `per_client` of one client. `what` names it in messages."""

    def __init__(self, total: int, per_client: int, what: str) -> None:
        self.total, self.per_client, self.what = total, per_client, what
        self._taken: dict[str, int] = {}

    @contextmanager
    def hold(self, client: str) -> Iterator[None]:
        """Hold a slot during the block. Raises Problem "overload" if none is free."""
        held = self._taken.get(client, 0)
        if held >= self.per_client or sum(self._taken.values()) >= self.total:
            raise Problem(
                "overload", f"{self.per_client if held >= self.per_client else self.total} {self.what} are in progress"
            )
        self._taken[client] = held + 1
        try:
            yield
        finally:
            self._taken[client] -= 1
            if not self._taken[client]:
                del self._taken[client]
