"""Answers to requests: fetch the user's recent events, ask the retriever, count, reply."""

from __future__ import annotations

import asyncio
import time
from collections import abc
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from twotower.errors import DataError, Unavailable
from twotower.features.schema import Sequence
from twotower.retrieval.request import Answer, Method, Request
from twotower.retrieval.retriever import Retriever
from twotower.serve import schemas
from twotower.serve.admission import ENTRIES_PER_WEIGHT, AdmissionController, release_current_permit
from twotower.serve.bundles import BundleLimits, BundleManager
from twotower.serve.client_slots import ClientSlots
from twotower.serve.metrics import ServeMetrics
from twotower.serve.problems import Problem, index_problem, problem_of
from twotower.serve.redis_events import RedisEvents
from twotower.serve.search_executor import SEARCH_THREADS, RemoteSearchExecutor
from twotower.serve.settings import ServeSettings
from twotower.serve.user_events import EMPTY_STATE, EventStore, InProcessEvents, UserState

MAX_BATCHES, MAX_BATCHES_PER_CLIENT = 8, 4
"""Batches under way at once: of all clients, and of one."""
T = TypeVar("T")


@dataclass(frozen=True)
class ResolvedRequest:
    """A request for the retriever, with the user's recent events and the method that answers it."""

    request: Request
    method: Method
    known_user: bool
    """True if the user is one of the bundle's."""
    state: UserState
    recent_events: int
    """Number of recent events in the request."""
    cacheable: bool
    """True if the request adds nothing but recent events: its user vector may be saved for the next request."""


class Service:
    """The service of one process: the current bundle, the event store, admission and metrics."""

    def __init__(
        self,
        settings: ServeSettings,
        metrics: ServeMetrics | None = None,
        bundle_limits: BundleLimits = BundleLimits(),
    ) -> None:
        """Open the store and the event store. Raises ConfigError or BundleError for settings that cannot be used."""
        self.settings = s = settings
        self.metrics = metrics or ServeMetrics()
        self.bundles = BundleManager(s.store, self.metrics, s.threads, s.memory_limit, s.workers, bundle_limits)
        failed, dropped = self.metrics.event_store_errors, self.metrics.events_dropped
        self._in_process = InProcessEvents(
            s.events_per_user, s.event_ttl, s.event_memory, lambda what, n: dropped.labels(what).inc(n)
        )
        self.event_store: EventStore = self._in_process
        if s.event_store != "memory":
            timeout, count = s.event_timeout / 1e3, lambda what: failed.labels(what).inc()
            self.event_store = RedisEvents(
                s.event_store, s.events_per_user, s.event_ttl, timeout, count, self._in_process
            )
        # A request that waits for Redis lets others run. Only a few: the work of the others delays its answer, which looks
        # like a slow event store.
        self._concurrency = 4 if self.event_store.shared else 1
        self.admission = AdmissionController(s.max_wait / 1e3, s.target_wait / 1e3, self._concurrency)
        self.search_executor = RemoteSearchExecutor(s.index_timeout / 1e3, self.metrics.index_errors.inc)
        self.draining = False
        self._batches = ClientSlots(MAX_BATCHES, MAX_BATCHES_PER_CLIENT, "batches")
        self._tasks: set[asyncio.Task[Any]] = set()

    async def start(self) -> None:
        """Begin to poll the store for new bundles."""
        self._start(self.bundles.watch(self.settings.poll))

    async def stop(self) -> None:
        """Stop background work and close connections."""
        for task in self._tasks:
            task.cancel()
        self.bundles.close()
        self.search_executor.close()
        await self.event_store.close()

    def drain(self) -> None:
        """Answer /readyz with 503; other requests are still answered."""
        self.draining = True
        self.metrics.ready.set(0)

    # ---- requests

    async def recommend(self, body: schemas.RecommendRequest, retriever: Retriever | None = None) -> dict[str, Any]:
        """Recommend items to a user, from the current bundle unless `retriever` is given. Raises Problem, DataError."""
        self.check(body)
        retriever = retriever or self.bundles.current
        resolved = await self.resolve(body, retriever)
        answer, vector = await self.answer_or_fallback(body, resolved, retriever)
        if vector is not None and resolved.cacheable and resolved.state.vector is None:
            assert body.user_id is not None
            await self._save(
                self.event_store.save_vector(retriever.bundle.id, body.user_id, resolved.state.events, vector)
            )
        return self.reply(answer, resolved, retriever)

    async def batch(self, body: schemas.BatchRequest, disconnected: Callable[[], Awaitable[bool]]) -> dict[str, Any]:
        """Answer the requests one by one, each with its own permit between other clients' requests.

        Stops early if the client has `disconnected`."""
        if len(body.requests) > self.settings.max_batch:
            raise _too_many("body.requests", len(body.requests), self.settings.max_batch)
        client, replies = release_current_permit(), list[dict[str, Any]]()
        with self._batches.hold(client):
            for place, one in enumerate(body.requests):
                if place % 8 == 7 and await disconnected():
                    break
                async with self.admission.permit(client, request_weight(one)):
                    try:
                        replies.append(await self.recommend(one))
                    except Problem as e:
                        replies.append(e.as_dict())
                    except DataError as e:
                        replies.append(problem_of(e).as_dict())
        return {"replies": replies}

    async def embed(self, body: schemas.UserRequest) -> dict[str, Any]:
        """Return the user vector."""
        self.check(body)
        retriever = self.bundles.current
        resolved = await self.resolve(body, retriever)
        started = time.perf_counter()
        vector, source, unknown = retriever.embed_request(resolved.request, resolved.method)
        spent = (time.perf_counter() - started) * 1e3
        return {
            "vector": vector[0].tolist(),
            "metric": retriever.index.metric,
            "bundle_id": retriever.bundle.id,
            "method": resolved.method,
            "source": source,
            "milliseconds": round(spent, 3),
            "unknown": unknown,
            "recent_events": resolved.recent_events,
        }

    async def search(self, body: schemas.SearchRequest) -> dict[str, Any]:
        """Recommend items for a text."""
        retriever = self.bundles.current
        if not retriever.schema.texts("user"):
            raise Problem("no-text-feature")
        self.check(body)
        filters: dict[str, Any] = {"allow": body.allow, "ban": body.ban, "where": body.where or None}
        try:
            answer = await self.run_search(
                retriever, lambda: retriever.search(body.text, body.k, body.feature, **filters)
            )
        except Unavailable as e:
            answer = self._without_index(e, retriever, Request(), body.k, 2, **filters)
        return self.reply(answer, None, retriever)

    async def similar(self, item_id: str, k: int) -> dict[str, Any]:
        """Return the items nearest to an item. Raises Unavailable: popular items are no substitute here."""
        retriever = self.bundles.current
        self._check_k(k, "query.k")
        return self.reply(await self.run_search(retriever, lambda: retriever.similar(item_id, k)), None, retriever)

    async def add_events(self, body: schemas.EventsRequest) -> dict[str, Any]:
        """Append to a user's recent events. Raises Problem "conflict" if other workers would not see them."""
        self._check_list("events", body.events)
        if self.settings.workers > 1 and not self.event_store.shared:
            raise Problem(
                "conflict",
                f"{self.settings.workers} workers do not share events kept in memory; set "
                "event_store = redis://HOST:PORT/DB, or workers = 1",
            )
        retriever, events = self.bundles.current, schemas.item_events(list(body.events))
        unknown = set(retriever.unknown_items(item for item, _ in events))
        count, shared = await self.event_store.add(self.bundles.event_bundles(retriever), body.user_id, events, unknown)
        self.metrics.event_memory.set(self._in_process.size)
        return {"recent_events": count, "shared": shared and self.event_store.shared}

    async def forget(self, user_id: str) -> None:
        """Delete a user's recent events. Raises Problem "event-store" if they may still be there."""
        if not await self.event_store.forget(self.bundles.event_bundles(self.bundles.current), user_id):
            raise Problem("event-store", headers={"Retry-After": "5"})

    def describe(self) -> dict[str, Any]:
        """Describe the current bundle and the limits of requests."""
        retriever = self.bundles.current
        manifest, s = retriever.bundle.manifest, self.settings
        return {
            "bundle_id": retriever.bundle.id,
            "created": manifest.created,
            "dims": manifest.dims,
            "metric": manifest.metric,
            "counts": manifest.counts.model_dump(),
            "recall_check": manifest.recall_check.model_dump(),
            "index": manifest.index.model_dump(include={"kind", "params", "search_params"}),
            "features": {"user": list(retriever.user_columns), "item": list(retriever.item_columns)},
            "history": any(isinstance(f, Sequence) for f in retriever.schema.side("user")),
            "search": [f.name for f in retriever.schema.texts("user")],
            "limits": {"k": s.max_k, "list": s.max_list, "batch": s.max_batch, "body": s.max_body},
        }

    # ---- parts of an answer

    def check(self, body: schemas.UserRequest | schemas.SearchRequest) -> None:
        """Raise Problem "invalid" for a k or a list above the limits."""
        if isinstance(body, schemas.ItemFilter):
            self._check_k(body.k)
        for name in ("history", "events", "allow", "ban"):
            self._check_list(name, getattr(body, name, None))

    async def resolve(self, body: schemas.UserRequest, retriever: Retriever) -> ResolvedRequest:
        """Fetch the user's recent events and choose the method.

        Method 1 uses precomputed user vectors, method 2 the online user tower. Raises Problem "unknown-user"."""
        state = EMPTY_STATE
        if body.use_recent_events and body.user_id is not None:
            started = time.perf_counter()
            state = await self.event_store.fetch(self.bundles.event_bundles(retriever), body.user_id)
            self.metrics.stages["events"].observe(time.perf_counter() - started)
        request = Request(
            body.user_id,
            body.features,
            None if body.history is None else schemas.item_events(body.history),
            [*state.events, *schemas.item_events(body.events)],
        )
        known = body.user_id is not None and retriever.has_user(body.user_id)
        if body.user_id is not None and not (known or request.has_details) and self.settings.unknown_user == "404":
            raise Problem("unknown-user", f"user '{body.user_id}' is not among the bundle's users")
        method: Method = body.method or (2 if request.has_details else 1)
        if not known and request.has_details:
            method = 2  # an unknown user has no precomputed vector
        cacheable = bool(state.events) and not (body.features or body.events or body.history is not None)
        return ResolvedRequest(request, method, known, state, len(state.events), cacheable)

    async def run_search(self, retriever: Retriever, work: Callable[[], T]) -> T:
        """Run a search at once, or in a thread if the index is remote. Raises Unavailable and the errors of `work`."""
        remote = retriever.index.remote
        self.admission.concurrency = max(self._concurrency, SEARCH_THREADS) if remote else self._concurrency
        return await self.search_executor.run(work) if remote else work()

    async def answer_or_fallback(
        self, body: schemas.RecommendRequest, resolved: ResolvedRequest, retriever: Retriever
    ) -> tuple[Answer, Any]:
        """Return the answer and the new user vector, if one was computed.

        If a remote index does not answer, these are popular items; or Problem "index-unavailable" is raised, if the settings say so."""
        try:
            return await self.run_search(retriever, lambda: self.answer(body, resolved, retriever))
        except Unavailable as e:
            answer = self._without_index(
                e, retriever, resolved.request, body.k, resolved.method, allow=body.allow, ban=body.ban,
                where=body.where or None, keep_seen=body.keep_seen,
            )  # fmt: skip
            return answer, None

    def _without_index(
        self, error: Unavailable, retriever: Retriever, request: Request, k: int, method: Method, **filters: Any
    ) -> Answer:
        if self.settings.index_down == "503":
            raise index_problem() from error
        return retriever.recommend(request, k, method, fallback=True, **filters)

    def answer(
        self, body: schemas.RecommendRequest, resolved: ResolvedRequest, retriever: Retriever
    ) -> tuple[Answer, Any]:
        """Search, and return the answer and the vector (1, D) that the user tower computed; None if it was not run."""
        vector = resolved.state.vector if resolved.cacheable and resolved.method == 2 else None
        if vector is not None and vector.shape != (1, retriever.index.width):
            vector = None  # written by another program
        computed = None
        unknown: list[str] = []
        started = time.perf_counter()
        if resolved.method == 2 and vector is None and (resolved.known_user or resolved.request.has_details):
            vector, _, unknown = retriever.embed_request(resolved.request, 2)
            computed = vector
            self.metrics.stages["tower"].observe(time.perf_counter() - started)
        searching = time.perf_counter()
        answer = retriever.recommend(
            resolved.request,
            body.k,
            resolved.method,
            allow=body.allow,
            ban=body.ban,
            where=body.where or None,
            keep_seen=body.keep_seen,
            vector=vector,
        )
        ended = time.perf_counter()
        self.metrics.stages["search"].observe(ended - searching)
        if vector is not None:  # the search saw a vector, not the features and items it was computed from
            unknown = (
                unknown if computed is not None else retriever.unknown_items(i for i, _ in resolved.request.events)
            )
            answer = replace(answer, unknown=unknown)
        return replace(answer, milliseconds=round((ended - started) * 1e3, 3)), computed

    def reply(
        self, answer: Answer, resolved: ResolvedRequest | None, retriever: Retriever, count: bool = True
    ) -> dict[str, Any]:
        """Return the body of a reply. `count` adds it to the metrics; the console's requests are not counted."""
        if count:
            self.metrics.count_answer(
                answer.bundle_id, answer.method, answer.source, answer.unknown, retriever.user_columns, answer.truncated
            )
        return {
            "items": answer.items,
            "bundle_id": answer.bundle_id,
            "method": answer.method,
            "source": answer.source,
            "milliseconds": answer.milliseconds,
            "truncated": answer.truncated,
            "unknown": answer.unknown,
            "recent_events": resolved.recent_events if resolved else 0,
        }

    def _check_k(self, k: int, at: str = "body.k") -> None:
        if not 1 <= k <= self.settings.max_k:
            detail = f"k is {k}, expected 1 to {self.settings.max_k:,}"
            raise Problem("invalid", detail, errors=[{"at": at, "detail": detail}])

    def _check_list(self, name: str, value: abc.Sequence[Any] | None) -> None:
        if value is not None and len(value) > self.settings.max_list:
            raise _too_many(f"body.{name}", len(value), self.settings.max_list)

    async def _save(self, work: Coroutine[Any, Any, None]) -> None:
        """Wait for `work` if it stays in this process; otherwise run it beside the reply."""
        if self.event_store.shared:
            self._start(work)
        else:
            await work
            self.metrics.event_memory.set(self._in_process.size)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def request_weight(body: schemas.RecommendRequest) -> float:
    """Return the weight of a batch's request in the queue, by the entries of its lists. 1: an empty request."""
    return (
        1.0
        + sum(len(entries or ()) for entries in (body.history, body.events, body.allow, body.ban)) / ENTRIES_PER_WEIGHT
    )


def _too_many(at: str, found: int, limit: int) -> Problem:
    detail = f"{at.removeprefix('body.')} has {found:,} entries, at most {limit:,} are allowed"
    return Problem("invalid", detail, errors=[{"at": at, "detail": detail}])
