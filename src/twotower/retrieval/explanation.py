"""Explanation of an answer, for the console: the user's vector, and the weights of the gates that shaped it."""

from __future__ import annotations

from dataclasses import dataclass

from twotower.arrays.types import Floats
from twotower.onnx.tower import GateInfo
from twotower.retrieval.request import Method, Request, check_method
from twotower.retrieval.retriever import Retriever, check_vector


@dataclass(frozen=True)
class Explanation:
    """The vector that an answer was searched with, and the SENet gates of the user tower."""

    vector: Floats  # (1, D)
    gates: list[tuple[GateInfo, Floats]]
    """Each gate with its weights (fields,)."""


def explain(retriever: Retriever, request: Request, method: Method = 2) -> Explanation:
    """Explain the answer that `recommend` gives to a request. Raises DataError as `recommend` does."""
    check_method(method)
    rows = retriever.rows_of(request)
    tower = retriever.loaded.tower
    vector, weights = tower.explain(retriever.user_inputs.read(request, rows).feed)
    if method == 1 and rows.user is not None:
        vector = retriever.embed_request(request, 1).vector
    check_vector(vector)
    return Explanation(vector, [(gate, w[0]) for gate, w in zip(tower.gates, weights, strict=True)])
