"""The body of a request: read within its limits before the request is admitted, its weight in the queue, and the memory
budget of the bodies and replies that a worker holds at the same time."""

from __future__ import annotations

import asyncio

from starlette.types import Message, Receive

from twotower.serve.access_policy import Headers
from twotower.serve.admission import BYTES_PER_WEIGHT
from twotower.serve.problems import Problem, overload_problem

UNCOUNTED_BYTES = 16 << 10
"""Bytes of each body and of each reply that are not counted, so that large requests never make an ordinary one refused.
The number of connections bounds their sum."""


class ClientDisconnected(Exception):
    """The client closed the connection before its body was complete."""


class BodyReader:
    """Reads bodies of JSON of at most `max_body` bytes, each within `timeout` seconds."""

    def __init__(self, max_body: int, timeout: float) -> None:
        self._max_body, self._timeout = max_body, timeout

    async def read(self, receive: Receive, headers: Headers, reservation: BodyReservation) -> tuple[Receive, int]:
        """Read the body within its limits; return a `receive` that yields it, and its size in bytes. Raises Problem."""
        max_body, length = self._max_body, headers.get(b"content-length", b"")
        if length and (not length.isdigit() or len(length) > 20 or int(length) > max_body):
            raise Problem("too-large", f"{length.decode('latin-1')[:20]} bytes, at most {max_body:,} are accepted")
        content_type, coding = headers.get(b"content-type", b""), headers.get(b"content-encoding", b"identity")
        # A missing type is refused too: a page of another site can send that, text/plain and forms without a preflight.
        if content_type.partition(b";")[0].strip().lower() != b"application/json":
            given = (
                f"Content-Type is {content_type.decode('latin-1')[:80]!r}"
                if content_type
                else "Content-Type is missing"
            )
            raise Problem("unsupported-media-type", f"{given}, expected application/json")
        if coding.lower() != b"identity":
            raise Problem(
                "unsupported-media-type",
                f"Content-Encoding is {coding.decode('latin-1')[:80]!r}; send the body without an encoding",
            )
        body, counted = bytearray(), UNCOUNTED_BYTES
        try:
            async with asyncio.timeout(self._timeout):
                more = True
                while more:
                    message = await receive()
                    if message["type"] != "http.request":
                        raise ClientDisconnected
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > max_body:
                        raise Problem("too-large", f"the body has more than {max_body:,} bytes")
                    if len(body) > counted:
                        reservation.reserve(len(body) - counted)
                        counted = len(body)
        except TimeoutError:
            raise Problem("body-timeout") from None
        body_message: Message | None = {"type": "http.request", "body": bytes(body), "more_body": False}

        async def receive_body() -> Message:
            nonlocal body_message
            if body_message is None:
                return await receive()
            message, body_message = body_message, None
            return message

        return receive_body, len(body)


def has_body(headers: Headers) -> bool:
    """Return True if a request announces a body."""
    return headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in headers


def body_weight(headers: Headers, size: int = 0) -> float:
    """Return the weight of a request in the queue, from the size of its body, read or announced."""
    length = headers.get(b"content-length", b"")
    return 1.0 + (size or (int(length) if length.isdigit() and len(length) < 16 else 0)) / BYTES_PER_WEIGHT


class BodyMemory:
    """A budget of `limit` bytes, exceeded by at most one reservation. Each request has a `BodyReservation`."""

    def __init__(self, limit: int) -> None:
        self.limit, self.reserved = limit, 0


class BodyReservation:
    """Bytes of the budget that one request has reserved; released when the request ends."""

    __slots__ = ("_memory", "_reserved")

    def __init__(self, memory: BodyMemory) -> None:
        self._memory, self._reserved = memory, 0

    def reserve(self, size: int) -> None:
        """Add `size` bytes to the reservation. Raises Problem "overload" if the budget is used up."""
        if self._memory.reserved >= self._memory.limit:
            raise overload_problem(f"bodies and replies in progress hold the allowed {self._memory.limit:,} bytes")
        self._memory.reserved += size
        self._reserved += size

    def release(self) -> None:
        self._memory.reserved -= self._reserved
        self._reserved = 0
