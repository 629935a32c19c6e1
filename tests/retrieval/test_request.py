"""A request is parsed from JSON, and an answer written as JSON."""

from __future__ import annotations

import json

import pytest

from twotower.errors import DataError
from twotower.retrieval.request import Json, Request
from twotower.retrieval.retriever import Retriever


def test_json_has_ids_as_text(retriever: Retriever) -> None:
    body = json.loads(retriever.recommend(Request("u1"), 3).to_json())
    assert set(body) == {"items", "bundle_id", "method", "source", "milliseconds", "truncated", "unknown"}
    assert len(body["items"]) == 3
    assert all(isinstance(i["id"], str) and isinstance(i["score"], float) for i in body["items"])


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ([], "JSON object"),
        ({"user": 1}, "unknown key 'user'; did you mean 'user_id'"),
        ({"user_id": True}, "user_id is True"),
        ({"features": [1]}, "features is .*, expected an object"),
        ({"features": 0}, "features is .*, expected an object"),
        ({"features": ""}, "features is .*, expected an object"),
        ({"history": [{"id": True}]}, "a history holds"),
        ({"history": "i1"}, "history is .*, expected a list"),
        ({"history": [{"item": 1}]}, "a history holds"),
        ({"events": {}}, "events is .*, expected a list"),
        ({"events": [2.5]}, "a history holds"),
        ({"history": [None]}, "a history holds"),
    ],
)
def test_a_request_that_is_none_is_refused(body: Json, said: str) -> None:
    with pytest.raises(DataError, match=said.replace("(", r"\(")):
        Request.parse(body)
