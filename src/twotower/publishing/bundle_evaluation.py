"""Evaluation of a bundle with the retriever that serves it."""

from __future__ import annotations

import logging

import numpy as np

from twotower import runs
from twotower.arrays.pieces import pieces
from twotower.arrays.types import Codes, Floats
from twotower.data.dataset import Dataset
from twotower.data.splits import TEST
from twotower.errors import RunError
from twotower.evaluation.added_scores import SparseScores
from twotower.evaluation.config import WIDTH, EvaluationConfig, Metrics
from twotower.evaluation.part_evaluation import PartEvaluation
from twotower.evaluation.ranking import evaluation_queries
from twotower.features.side import SideName
from twotower.retrieval.batches import RANKED_USERS, embed_users, rank_items
from twotower.retrieval.request import Method
from twotower.retrieval.retriever import Retriever

log = logging.getLogger(__name__)


def evaluate_bundle(retriever: Retriever, config: EvaluationConfig | None = None) -> dict[str, Metrics]:
    """Return the test metrics of a bundle, and the width of its vectors, measured with the retriever that serves it.

    `config` defaults to the settings of the bundle.
    "index" and "exact" are method 1 (precomputed user vectors, with the default context), "live" is method 2 (online
    user tower, in the context of the test pairs), and "intervals" has the bootstrap intervals of "index". Without
    precomputed vectors only "live" and "live_exact" are measured, with the intervals of "live". Of a bundle that knows
    all rows of its log nothing is measured, with a line in the log."""
    dataset, config = retriever.dataset, config or runs.read_evaluation(retriever.bundle.folder)
    if not len(dataset.test):
        log.info(f"{retriever.bundle.id} knows all {len(dataset.pairs):,} rows of its log: nothing is left to measure")
        return {}
    if dataset.schema.valid_from:
        log.warning(
            "a bundle serves the newest versions of users and items, which may be later than test rows, so that these "
            "metrics may be too high; the metrics of the run read the versions of each row's time"
        )
    if retriever.bundle.manifest.moves and not _follows(dataset):
        log.warning(
            "a bundle ranks by the popularity at the end of the rows before its test part, and test rows have earlier "
            "times, so that these metrics are, as a rule, lower than the metrics of the run, which reads the rows "
            "before each ranking"
        )
    named: dict[SideName, Codes] = {"user": dataset.pairs.user, "item": dataset.pairs.item}
    for side, rows in named.items():
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(retriever.dataset.side(side)):
            raise RunError(f"{retriever.bundle.folder}: damaged (interactions name a {side} that is not there)")
    seen = [] if config.repeats == "allow" else dataset.grouped_before(TEST)
    only_seen = config.repeats == "only"
    out: dict[str, Metrics] = {}
    searches: tuple[tuple[str, Method, bool], ...] = (("index", 1, False), ("exact", 1, True), ("live", 2, False))
    if not dataset.schema.precomputes:
        searches = (("live", 2, False), ("live_exact", 2, True))
    queries = evaluation_queries(dataset, TEST, config)
    k = min(max(config.k), queries.n_items)
    for name, method, exact in searches:
        best = rank_items(retriever, queries.users, k, method, seen, exact, only_seen, queries.interactions)
        report = PartEvaluation.of(queries, best, _scores(retriever, method), dataset, TEST, config)
        out[name] = report.metrics() | {WIDTH: retriever.index.width}
        if name == searches[0][0]:
            ends = ((m, *pair) for m, pair in report.intervals().items())
            out["intervals"] = {f"{m}.{end}": v for m, low, high in ends for end, v in (("low", low), ("high", high))}
    return out


def _follows(dataset: Dataset) -> bool:
    """Return True if no test row is earlier than a row of another part."""
    earlier = dataset.parts < TEST
    if not (dataset.schema.time and earlier.any()):
        return True
    return int(dataset.times_of(TEST).min()) >= int(dataset.times[earlier].max())


def _scores(retriever: Retriever, method: Method) -> Floats:
    """Return the scores (n,) of the test pairs by the served vectors, by method 2 in the context of each pair; -1e9 for
    rejected items."""
    pairs, items, in_context = retriever.dataset.test, _item_vectors(retriever), method == 2 and retriever.reads_context
    interactions, scores = retriever.dataset.part_indices(TEST), np.empty(len(pairs), np.float32)
    users = np.empty((0 if in_context else len(retriever.user_ids), retriever.index.width), np.float32)
    for part in pieces(len(users), RANKED_USERS):
        users[part] = embed_users(retriever, np.arange(part.start, part.stop), method)
    for part in pieces(len(pairs), RANKED_USERS):
        rows = pairs.user[part].astype(np.int64)
        vectors = embed_users(retriever, rows, 2, interactions[part]) if in_context else users[rows]
        scores[part] = np.nan_to_num((vectors * items[pairs.item[part]]).sum(1), nan=-1e9)
    for added in _added(retriever):
        scores += added.of_pairs(pairs.user, pairs.item)
    return scores


def _added(retriever: Retriever) -> tuple[SparseScores, ...]:
    """Return what the stored histories of the users add."""
    own = retriever.history_scores
    return (SparseScores.of(own.stored, own.rows, own.term, own.n_items),) if own else ()


def _item_vectors(retriever: Retriever) -> Floats:
    """Return the vectors (I, D) of all items; NaN for rejected ones."""
    items = np.full((len(retriever.item_ids), retriever.index.width), np.nan, np.float32)
    rows = retriever.index.rows
    items[rows] = retriever.index.vectors(rows)
    return items
