"""Answers of the retriever to requests, with the recent events of their users."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from twotower.arrays.types import Floats
from twotower.errors import Unavailable
from twotower.retrieval.request import Answer, Method, Request
from twotower.retrieval.retriever import Retriever
from twotower.serve import schemas
from twotower.serve.admission import AdmissionController
from twotower.serve.bundles import BundleManager
from twotower.serve.metrics import ServeMetrics
from twotower.serve.problems import Problem, index_problem
from twotower.serve.search_executor import SEARCH_THREADS, RemoteSearchExecutor
from twotower.serve.settings import ServeSettings
from twotower.serve.user_events import EMPTY_STATE, EventStore, UserState

T = TypeVar("T")


@dataclass(frozen=True)
class ResolvedRequest:
    """A request for the retriever, with the user's recent events and the method that answers it."""

    request: Request
    method: Method
    known_user: bool
    """True if the user is one of the bundle's."""
    state: UserState
    cacheable: bool
    """True if the request adds nothing but recent events: its user vector may be saved for the next request."""


class Recommender:
    """Asks the retriever of a bundle, and answers with popular items while a remote index does not."""

    def __init__(
        self,
        settings: ServeSettings,
        metrics: ServeMetrics,
        bundles: BundleManager,
        event_store: EventStore,
        admission: AdmissionController,
        executor: RemoteSearchExecutor,
    ) -> None:
        self._settings, self._metrics, self._bundles, self.event_store = settings, metrics, bundles, event_store
        self._admission, self._executor = admission, executor
        self._concurrency = admission.concurrency

    async def resolve(self, body: schemas.UserRequest, retriever: Retriever) -> ResolvedRequest:
        """Fetch the user's recent events and choose the method.

        Method 1 uses precomputed user vectors, method 2 the online user tower. Raises Problem "unknown-user"."""
        state = EMPTY_STATE
        if body.use_recent_events and body.user_id is not None:
            started = time.perf_counter()
            state = await self.event_store.fetch(self._bundles.event_bundles(retriever), body.user_id)
            self._metrics.stages["events"].observe(time.perf_counter() - started)
        effective = retriever.effective_request(
            Request(
                body.user_id,
                body.features,
                None if body.history is None else schemas.item_events(body.history),
                schemas.item_events(body.events),
                body.context,
            )
        )
        recent = retriever.user_inputs.event_types.read(state.events, stored=True)
        if body.user_id is not None and effective.history is None:
            recent = retriever.unstored_events(body.user_id, recent)
        request = replace(effective, recent=recent)
        known = body.user_id is not None and retriever.has_user(body.user_id)
        if body.user_id is not None and not (known or request.has_details) and self._settings.unknown_user == "404":
            raise Problem("unknown-user", f"user '{body.user_id}' is not among the bundle's users")
        method: Method = body.method or retriever.usual_method(request)
        if not known and request.has_details:
            method = 2  # an unknown user has no precomputed vector
        adds = effective.features or effective.events or effective.history is not None or retriever.reads_context
        cacheable = bool(recent) and not adds
        return ResolvedRequest(request, method, known, state, cacheable)

    async def run_search(self, retriever: Retriever, work: Callable[[], T]) -> T:
        """Run a search at once, or in a thread if the index is remote. Raises Unavailable and the errors of `work`."""
        remote = retriever.index.remote
        self._admission.concurrency = max(self._concurrency, SEARCH_THREADS) if remote else self._concurrency
        return await self._executor.run(work) if remote else work()

    async def answer_or_fallback(
        self, body: schemas.RecommendRequest, resolved: ResolvedRequest, retriever: Retriever
    ) -> tuple[Answer, Floats | None]:
        """Return the answer and the new user vector, if one was computed; without the index as `without_index` does."""
        try:
            return await self.run_search(retriever, lambda: self.answer(body, resolved, retriever))
        except Unavailable as e:
            found = self.without_index(e, retriever, resolved.request, resolved.method, body, body.keep_seen)
            return found, None

    def without_index(
        self,
        error: Unavailable,
        retriever: Retriever,
        request: Request,
        method: Method,
        items: schemas.ItemFilter,
        keep_seen: bool | None = None,
    ) -> Answer:
        """Return popular items; or raise Problem "index-unavailable", if the settings say so."""
        if self._settings.index_down == "503":
            raise index_problem() from error
        return retriever.recommend(
            request, items.k, method, allow=items.allow, ban=items.ban, where=items.where or None, keep_seen=keep_seen,
            fallback=True,
        )  # fmt: skip

    def answer(
        self, body: schemas.RecommendRequest, resolved: ResolvedRequest, retriever: Retriever
    ) -> tuple[Answer, Floats | None]:
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
            self._metrics.stages["tower"].observe(time.perf_counter() - started)
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
        self._metrics.stages["search"].observe(ended - searching)
        if vector is not None:  # the search saw a vector, not the features and items it was computed from
            unknown = (
                unknown
                if computed is not None
                else retriever.unknown_items(e.item for e in resolved.request.all_events)
            )
            answer = replace(answer, unknown=unknown)
        return replace(answer, milliseconds=round((ended - started) * 1e3, 3)), computed
