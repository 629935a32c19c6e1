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

CALM = 1.0
"""Seconds without a refusal after which a burst may come again."""
LATELY = 0.02
"""The share of the latest turn in a pace."""
CLIENTS = 4_096
"""Clients whose pace is remembered, beside those who have or wait for a turn."""
BYTES = 2_048
"""Bytes of a body that weigh as much as a request: about what it costs to read and use them."""
ENTRIES = 300
"""Entries of lists that do."""


class _Client:
    """The waiting requests of a client, and the time it has used."""

    __slots__ = ("measured", "pace", "queue", "turns", "used", "waits")

    def __init__(self, pace: float) -> None:
        self.pace = pace
        """Seconds between the end of the turn before and that of its own, lately, by weight, while somebody waits: what
        else the process does counts too."""
        self.measured = 1
        """Turns that this is the mean of, the guess included."""
        self.used = 0.0
        """Seconds that it has had, on the gate's virtual clock; of turns it has now, what they are expected to take."""
        self.queue: list[tuple[float, int, Turn]] = []
        """By what the client would have used after the turn when it came: the small go before the large, but for a while."""
        self.waits = 0.0
        """Weight of the queue."""
        self.turns = 0
        """Turns it has now."""

    @property
    def after(self) -> float:
        """The time it will have used after its next turn."""
        return self.used + self.pace * self.queue[0][2].weight


class Gate:
    """`async with gate.turn(client, weight):` is a turn. `width` turns may be taken at once: 1 where a turn does not wait
    for others. A request of the weight 1 is an ordinary one."""

    def __init__(
        self,
        burst: float = 0.05,
        target: float = 0.005,
        width: int = 1,
        pace: float = 0.001,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`burst` and `target` in seconds; `pace`, too, is what an ordinary request is believed to take before one was
        measured."""
        self.burst, self.target, self.width = burst, target, width
        self._clock = clock
        self._usual = pace
        """Pace of first turns lately. A client counts once, however much it asks."""
        self._clients: OrderedDict[str, _Client] = OrderedDict()
        self._active: dict[str, _Client] = {}
        """The clients that have or wait for a turn."""
        self._waiting: dict[str, _Client] = {}
        """The requests that wait for one, in the order of coming."""
        self._taken = self._came = 0
        self._now = 0.0
        """The virtual clock: what a client that is always there would have used. Who comes begins with that."""
        self._ended = self._empty = clock()
        self._refused = self._ended - CALM

    def turn(self, client: str = "", weight: float = 1.0) -> Turn:
        return Turn(self, client, weight)

    @property
    def wait(self) -> float:
        """Seconds that an ordinary request of a client without a name must expect to wait."""
        return self._ahead("", 1.0, float("inf")) if self._taken >= self.width else 0.0

    def full(self, client: str = "", weight: float = 1.0) -> bool:
        """True if a request that comes now would wait too long. Called for every request: it also notes when
        the queue was empty."""
        now = self._clock()
        if self._taken < self.width:
            self._empty = now
            return False
        calm = now - self._empty <= self.burst and now - self._refused >= CALM
        limit = self.burst if calm else self.target
        if self._ahead(client, weight, limit) <= limit:
            return False
        self._refused = now
        return True

    def _ahead(self, name: str, weight: float, enough: float) -> float:
        """Seconds of what waits and would come before a request, of its own client's and of others'. Turns that have
        begun are not counted: they cannot be taken back, and refusing who waits for them helps nobody. Counts no further
        than `enough`."""
        client = self._clients.get(name)
        if client is None:
            client = _Client(self._usual)
        used = client.used if name in self._active else max(self._now, client.used)
        mine = used + client.pace * weight
        before = 0.0
        for place, _, turn in client.queue:
            if place > mine or before > enough:
                break
            before += client.pace * turn.weight
        ahead, after = before, mine + before
        for other in self._waiting.values():
            if ahead > enough:
                break
            if other is not client and other.after <= after:
                ahead += min(other.pace * other.waits, after - other.used)
        return ahead

    # ---- what turns do

    def _come(self, name: str) -> _Client:
        """The client, who is here from now on."""
        client = self._active.get(name)
        if client is None:
            client = self._clients.pop(name, None) or _Client(self._usual)
            client.used = max(client.used, self._now)
            self._clients[name] = self._active[name] = client
            while len(self._clients) >= CLIENTS + len(self._active):
                oldest = next(iter(self._clients))
                if oldest in self._active:  # it came long ago, and is still here
                    self._clients.move_to_end(oldest)
                else:
                    del self._clients[oldest]
        return client

    def _give(self, turn: Turn, client: _Client) -> None:
        self._taken += 1
        client.turns += 1
        self._now = max(self._now, client.used)
        turn.expected = client.pace * turn.weight
        client.used += turn.expected

    def _end(self, turn: Turn, used: bool) -> None:
        """Take a turn back; one that was not `used` counts for nothing."""
        client, spent = self._active[turn.client], 0.0
        if used:
            now = self._clock()
            spent, self._ended = now - self._ended, now
            pace = spent / turn.weight
            if client.measured == 1:
                self._usual += LATELY * (pace - self._usual)
            client.measured += 1
            client.pace += max(LATELY, 1 / client.measured) * (pace - client.pace)
        client.used += spent - turn.expected
        self._now += spent / len(self._active)
        self._taken -= 1
        client.turns -= 1
        self._leave(turn.client, client)
        self._next()

    def _next(self) -> None:
        while self._waiting and self._taken < self.width:
            name, client = min(self._waiting.items(), key=lambda item: item[1].after)
            _, _, turn = client.queue.pop(0)
            self._gone(name, client, turn)
            if turn.given is not None and not turn.given.done():
                self._give(turn, client)
                turn.given.set_result(None)
            else:
                self._leave(name, client)

    def _wait(self, turn: Turn, client: _Client) -> None:
        self._came += 1
        insort(client.queue, (client.used + client.pace * turn.weight, self._came, turn))
        client.waits += turn.weight
        self._waiting[turn.client] = client

    def _gone(self, name: str, client: _Client, turn: Turn) -> None:
        """A turn is in the queue no more."""
        client.waits = client.waits - turn.weight if client.queue else 0.0
        if not client.queue:
            del self._waiting[name]

    def _leave(self, name: str, client: _Client) -> None:
        if not client.turns and not client.queue:
            del self._active[name]


class Turn:
    """A place in the queue, and then a turn, which may be ended before its block is."""

    __slots__ = ("_gate", "_has", "client", "expected", "given", "weight")

    def __init__(self, gate: Gate, client: str, weight: float) -> None:
        self._gate, self.client, self.weight = gate, client, weight
        self.given: asyncio.Future[None] | None = None
        self.expected = 0.0
        self._has = False

    async def __aenter__(self) -> Turn:
        gate = self._gate
        client = gate._come(self.client)
        if gate._taken < gate.width and not gate._waiting:
            gate._give(self, client)
            self._has = True
            gate._ended = gate._clock()  # nobody has waited for this turn
            try:
                await asyncio.sleep(0)  # let those who came at the same time be queued, or refused
            except BaseException:
                self._drop()
                raise
        else:
            self.given = asyncio.get_running_loop().create_future()
            gate._wait(self, client)
            try:
                await self.given
                self._has = True
            except BaseException:
                if self.given.done() and not self.given.cancelled():
                    self._has = True
                    self._drop()  # it was given the turn and does not take it
                raise
        _TURN.set(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def end(self) -> None:
        """The next may begin; what this one still does is done beside the turns."""
        if self._has:
            self._has = False
            self._gate._end(self, used=True)

    def _drop(self) -> None:
        self._has = False
        self._gate._end(self, used=False)


_TURN: ContextVar[Turn] = ContextVar("turn")
"""The latest turn of the present request."""


def give_back() -> str:
    """End the turn of the present request, if it has one: for what takes turns of its own, or is done beside them. Gives
    the client's name."""
    turn = _TURN.get(None)
    if turn is None:
        return ""
    turn.end()
    return turn.client


class Places:
    """For work beside the turns: so many at once, and so many of one client."""

    def __init__(self, every: int, each: int, what: str) -> None:
        self.every, self.each, self.what = every, each, what
        self._taken: dict[str, int] = {}

    @contextmanager
    def one(self, client: str) -> Iterator[None]:
        """Raises Problem "overload" if there is none."""
        mine = self._taken.get(client, 0)
        if mine >= self.each or sum(self._taken.values()) >= self.every:
            raise overload(f"{self.each if mine >= self.each else self.every} {self.what} are under way")
        self._taken[client] = mine + 1
        try:
            yield
        finally:
            self._taken[client] -= 1
            if not self._taken[client]:
                del self._taken[client]


def overload(detail: str = "") -> Problem:
    """What somebody who would wait too long is told."""
    return Problem("overload", detail, headers={"Retry-After": "1"})
