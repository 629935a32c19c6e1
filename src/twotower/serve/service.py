"""Replies to requests, from the current bundle and the recent events of users; popular items while a remote index does
not answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import NamedTuple, TypeVar

from fastapi import Request as HttpRequest

from twotower.arrays.types import Floats
from twotower.errors import DataError, Unavailable
from twotower.retrieval.query import Query
from twotower.retrieval.request import Answer, Method, Request
from twotower.retrieval.request_body import RequestModel, item_events
from twotower.retrieval.retriever import Retriever
from twotower.serve import replies, schemas
from twotower.serve.admission import ENTRIES_PER_WEIGHT, AdmissionController, ClientSlots, release_current_permit
from twotower.serve.bundles import BundleLimits, BundleManager
from twotower.serve.metrics import ServeMetrics
from twotower.serve.problems import Problem, ProblemObject, problem_of
from twotower.serve.redis_events import RedisEvents
from twotower.serve.search_executor import SEARCH_THREADS, RemoteSearchExecutor
from twotower.serve.settings import ServeSettings
from twotower.serve.user_events import EMPTY_STATE, EventStore, InProcessEvents, UserState

MAX_BATCHES, MAX_BATCHES_PER_CLIENT = 8, 4
"""Batches under way at once: of all clients, and of one."""
T = TypeVar("T")


class ResolvedRequest(NamedTuple):
    """A request as the retriever reads it, with the user's recent events and the method that answers it."""

    query: Query
    method: Method
    state: UserState
    cacheable: bool
    """True if the request adds nothing but recent events: its user vector may be saved for the next request."""


class Service:
    """The service of one process: the current bundle, the event store, admission and metrics."""

    def __init__(
        self, settings: ServeSettings, metrics: ServeMetrics | None = None, bundle_limits: BundleLimits = BundleLimits()
    ) -> None:
        """Open the store and the event store. Raises ConfigError or BundleError for settings that cannot be used."""
        self.settings = s = settings
        self.metrics = metrics or ServeMetrics()
        self.bundles = BundleManager(s, self.metrics, bundle_limits)
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
        # A request that waits for Redis lets a few others run. More would delay its answer, as a slow event store does.
        waits = self.event_store.shared
        self.admission = AdmissionController(
            s.max_wait / 1e3, s.target_wait / 1e3, concurrency=4 if waits else 1,
            work_clock=None if waits else time.process_time,
        )  # fmt: skip
        self.search_executor = RemoteSearchExecutor(s.index_timeout / 1e3, self.metrics.index_errors.inc)
        self._concurrency = self.admission.concurrency
        self.draining = False
        self._batches = ClientSlots(MAX_BATCHES, MAX_BATCHES_PER_CLIENT, "batches")
        self._tasks: set[asyncio.Task[None]] = set()

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

    async def recommend(self, body: schemas.RecommendRequest) -> replies.ItemsReply:
        """Recommend items to a user, known or described by the request.

        Raises Problem and DataError."""
        self.check_limits(body)
        retriever = self.bundles.current
        resolved = await self.resolve(body, retriever)
        answer, vector = await self.answer_or_fallback(body, resolved, retriever)
        if vector is not None and resolved.cacheable and resolved.state.vector is None:
            assert body.user_id is not None
            bundles = self.bundles.event_bundles(retriever)
            await self._save(self.event_store.save_vector(bundles, body.user_id, resolved.state.events, vector))
        return self._counted(answer, retriever, resolved.query.n_recent)

    async def recommend_batch(self, body: schemas.BatchRequest, request: HttpRequest) -> replies.BatchReply:
        """Answer several requests.

        One that cannot be answered gets a problem in its place; a field of another type or range fails them all.

        Raises Problem. Each request has its own permit, between other clients' requests; the answer ends early if the
        client disconnects."""
        self.check_limits(body)
        client, answers = release_current_permit(), list[replies.ItemsReply | ProblemObject]()
        with self._batches.hold(client):
            for place, one in enumerate(body.requests):
                if place % 8 == 7 and await request.is_disconnected():
                    break
                async with self.admission.permit(client, request_weight(one)):
                    try:
                        answers.append(await self.recommend(one))
                    except Problem as e:
                        answers.append(e.as_dict())
                    except DataError as e:
                        answers.append(problem_of(e).as_dict())
        return replies.BatchReply(answers)

    async def embed_user(self, body: schemas.UserRequest) -> replies.VectorReply:
        """Return the vector of a user."""
        self.check_limits(body)
        retriever = self.bundles.current
        resolved = await self.resolve(body, retriever)
        started = time.perf_counter()
        vector, source, unknown = retriever.embed_request(resolved.query, resolved.method)
        spent = (time.perf_counter() - started) * 1e3
        return replies.VectorReply(
            vector=vector[0].tolist(),
            metric=retriever.index.metric,
            bundle_id=retriever.bundle.id,
            method=resolved.method,
            source=source,
            milliseconds=round(spent, 3),
            unknown=unknown,
            recent_events=resolved.query.n_recent,
        )

    async def search(self, body: schemas.SearchRequest) -> replies.ItemsReply:
        """Recommend items for a text."""
        retriever = self.bundles.current
        if not retriever.schema.searchable():
            raise Problem("no-text-feature")
        self.check_limits(body)

        def search() -> Answer:
            return retriever.search(
                body.text, body.k, body.feature, context=body.context, allow=body.allow, ban=body.ban,
                where=body.where or None,
            )  # fmt: skip

        try:
            answer = await self.run_search(retriever, search)
        except Unavailable as e:
            answer = self.without_index(e, retriever, Query(Request()), 2, body)
        return self._counted(answer, retriever)

    async def similar(self, item_id: schemas.PathOrQueryId, k: schemas.ItemCount = 10) -> replies.ItemsReply:
        """Return the items with the most similar vectors. Scores are cosines.

        Raises Unavailable: popular items are no substitute here."""
        retriever = self.bundles.current
        self._check_k(k, "query.k")
        answer = await self.run_search(retriever, lambda: retriever.similar(item_id, k))
        return self._counted(answer, retriever)

    async def add_events(self, body: schemas.EventsRequest) -> replies.EventsReply:
        """Append to a user's recent events, which the next answer uses.

        Raises Problem "conflict" if other workers would not see them, DataError for an unknown type."""
        self.check_limits(body)
        if self.settings.workers > 1 and not self.event_store.shared:
            raise Problem(
                "conflict",
                f"{self.settings.workers} workers do not share events kept in memory; set "
                "event_store = redis://HOST:PORT/DB, or workers = 1",
            )
        retriever = self.bundles.current
        read = retriever.queries.event_types.read(item_events(body.events))
        events = [event for event in read if event is not None]
        count, shared = await self.event_store.add(self.bundles.event_bundles(retriever), body.user_id, events)
        self.metrics.event_memory.set(self._in_process.size)
        return replies.EventsReply(count, shared and self.event_store.shared)

    async def forget(self, user_id: schemas.PathOrQueryId) -> None:
        """Delete a user's recent events.

        Raises Problem "event-store" if they may still be there."""
        if not await self.event_store.forget(self.bundles.event_bundles(self.bundles.current), user_id):
            raise Problem("event-store")

    async def bundle(self) -> replies.BundleReply:
        """Describe the current bundle and the limits of requests."""
        retriever = self.bundles.current
        manifest, s = retriever.bundle.manifest, self.settings
        return replies.BundleReply(
            bundle_id=retriever.bundle.id,
            created=manifest.created,
            dims=manifest.dims,
            metric=manifest.metric,
            counts=manifest.counts.model_dump(),
            recall_check=manifest.recall_check.model_dump(),
            index=manifest.index.model_dump(include={"kind", "params", "search_params"}),
            features={
                "user": list(retriever.user_columns),
                "item": list(retriever.item_columns),
                "context": list(retriever.context_columns),
            },
            context=dict(retriever.user_inputs.context.examples()),
            methods=[1, 2] if retriever.schema.precomputes else [2],
            history=bool(retriever.schema.histories("user")),
            events=retriever.queries.event_types.names,
            keep_seen=manifest.keep_seen,
            search=[f.name for f in retriever.schema.searchable()],
            limits={"k": s.max_k, "list": s.max_list, "batch": s.max_batch, "body": s.max_body},
        )

    def check_limits(self, body: RequestModel) -> None:
        """Check the numbers and lists of a request against the settings. Raises Problem "invalid"."""
        s = self.settings
        if isinstance(body, schemas.ItemFilter):
            self._check_k(body.k, "body.k")
        for name in ("history", "events", "allow", "ban", "requests"):
            most = s.max_batch if name == "requests" else s.max_list
            if len(entries := getattr(body, name, None) or ()) > most:
                detail = f"{name} has {len(entries):,} entries, at most {most:,} are allowed"
                raise Problem("invalid", detail, errors=[{"at": f"body.{name}", "detail": detail}])

    def _check_k(self, k: int, at: str) -> None:
        """Check the number of items, a field `at` a place of the request."""
        if not 1 <= k <= self.settings.max_k:
            detail = f"k is {k}, expected 1 to {self.settings.max_k:,}"
            raise Problem("invalid", detail, errors=[{"at": at, "detail": detail}])

    def _counted(self, answer: Answer, retriever: Retriever, recent_events: int = 0) -> replies.ItemsReply:
        """Return the reply of an answer, and add it to the metrics."""
        columns = [*retriever.user_columns, *retriever.context_columns] if answer.unknown else ()
        self.metrics.count_answer(
            answer.bundle_id, answer.method, answer.source, answer.unknown, columns, answer.truncated
        )
        return replies.ItemsReply(**vars(answer), recent_events=recent_events)

    # ---- parts of an answer

    async def resolve(self, body: schemas.UserRequest, retriever: Retriever) -> ResolvedRequest:
        """Fetch the user's recent events and choose the method.

        Method 1 uses precomputed user vectors, method 2 the online user tower. Raises Problem "unknown-user"."""
        state = EMPTY_STATE
        if body.use_recent_events and body.user_id is not None:
            started = time.perf_counter()
            state = await self.event_store.fetch(self.bundles.event_bundles(retriever), body.user_id)
            self.metrics.stages["events"].observe(time.perf_counter() - started)
        query = retriever.query(Request.of(body), state.events)
        if query.source == "popular" and body.user_id is not None and self.settings.unknown_user == "404":
            raise Problem("unknown-user", f"user '{body.user_id}' is not among the bundle's users")
        method: Method = body.method or retriever.usual_method(query)
        if query.source == "cold_start":
            method = 2  # an unknown user has no precomputed vector
        adds = body.features or query.history is not None or retriever.reads_context
        cacheable = query.n_recent > 0 and not adds and all(event.is_recent for event in query.added)
        return ResolvedRequest(query, method, state, cacheable)

    async def run_search(self, retriever: Retriever, work: Callable[[], T]) -> T:
        """Run a search at once, or in a thread if the index is remote. Raises Unavailable and the errors of `work`."""
        remote = retriever.index.remote
        self.admission.concurrency = max(self._concurrency, SEARCH_THREADS) if remote else self._concurrency
        return await self.search_executor.run(work) if remote else work()

    async def answer_or_fallback(
        self, body: schemas.RecommendRequest, resolved: ResolvedRequest, retriever: Retriever
    ) -> tuple[Answer, Floats | None]:
        """Return the answer and the new user vector, if one was computed; without the index as `without_index` does."""
        try:
            return await self.run_search(retriever, lambda: self.answer(body, resolved, retriever))
        except Unavailable as e:
            return self.without_index(e, retriever, resolved.query, resolved.method, body, body.keep_seen), None

    def without_index(
        self, error: Unavailable, retriever: Retriever, query: Query, method: Method, items: schemas.ItemFilter,
        keep_seen: bool | None = None,
    ) -> Answer:  # fmt: skip
        """Return popular items; or raise Problem "index-unavailable", if the settings say so."""
        if self.settings.index_down == "503":
            raise Problem("index-unavailable") from error
        return retriever.recommend(
            query, items.k, method, allow=items.allow, ban=items.ban, where=items.where or None, keep_seen=keep_seen,
            fallback=True,
        )  # fmt: skip

    def answer(
        self, body: schemas.RecommendRequest, resolved: ResolvedRequest, retriever: Retriever
    ) -> tuple[Answer, Floats | None]:
        """Search, and return the answer and the vector (1, D) that the user tower computed; None if it was not run."""
        query, method, state, cacheable = resolved
        vector = state.vector if cacheable and method == 2 else None
        if vector is not None and vector.shape != (1, retriever.index.width):
            vector = None  # written by another program
        computed, unknown = None, retriever.user_inputs.unknown_items(query) if vector is not None else []
        started = time.perf_counter()
        if method == 2 and vector is None and query.source != "popular":
            vector, _, unknown = retriever.embed_request(query, 2)
            computed = vector
            self.metrics.stages["tower"].observe(time.perf_counter() - started)
        searching = time.perf_counter()
        answer = retriever.recommend(
            query, body.k, method, allow=body.allow, ban=body.ban, where=body.where or None, keep_seen=body.keep_seen,
            vector=vector,
        )  # fmt: skip
        ended = time.perf_counter()
        self.metrics.stages["search"].observe(ended - searching)
        # The search saw a vector, not the features and items it was computed from.
        answer = replace(answer, unknown=unknown, milliseconds=round((ended - started) * 1e3, 3))
        return answer, computed

    async def _save(self, work: Coroutine[None, None, None]) -> None:
        """Wait for `work` if it stays in this process; otherwise run it while the reply is sent."""
        if self.event_store.shared:
            self._start(work)
        else:
            await work
            self.metrics.event_memory.set(self._in_process.size)

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def request_weight(body: schemas.RecommendRequest) -> float:
    """Return the weight of a batch's request in the queue, by the entries of its lists. 1: an empty request."""
    return (
        1.0
        + sum(len(entries or ()) for entries in (body.history, body.events, body.allow, body.ban)) / ENTRIES_PER_WEIGHT
    )
