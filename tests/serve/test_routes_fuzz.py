"""Requests made of the OpenAPI document, right ones and wrong ones: no 5xx, every reply as the document says."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed
from hypothesis import settings as examples
from schemathesis.config import SchemathesisConfig
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from server_process import Served

OPENAPI = Path(__file__).resolve().parents[2] / "docs" / "openapi.json"
DOCUMENT = json.loads(OPENAPI.read_text(encoding="utf-8"))
OPERATIONS = [(verb.upper(), path) for path, verbs in DOCUMENT["paths"].items() for verb in verbs]
CHECKS = [status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def service(two_bundles: Path) -> Iterator[Served]:
    served = Served(two_bundles, "--no-access-log", "--max-list", "50", "--max-k", "100").wait()
    yield served
    code, log = served.end()
    assert code == 0
    assert "request failed" not in log, log


@pytest.fixture(scope="module")
def session() -> Iterator[requests.Session]:
    with requests.Session() as one:
        yield one


def fuzz(
    service: Served, session: requests.Session, verb: str, path: str, mode: GenerationMode, n: int
) -> Counter[int]:
    """Ask `n` times; how often each status came."""
    config = SchemathesisConfig.from_dict({"generation": {"mode": mode.value}})
    document = DOCUMENT | {"paths": {path: {verb.lower(): DOCUMENT["paths"][path][verb.lower()]}}}
    schema = schemathesis.openapi.from_dict(document, config=config)
    statuses: Counter[int] = Counter()

    @seed(0)
    @examples(
        max_examples=n, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(schema[path][verb].as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        reply = case.call(base_url=service.url, session=session, timeout=20)
        statuses[reply.status_code] += 1
        assert reply.status_code < 500, reply.text
        case.validate_response(reply, checks=CHECKS)
        if reply.status_code >= 400:
            told = reply.json()
            assert told["type"].startswith("/problems/")
            assert told["status"] == reply.status_code
            assert told["instance"] == reply.headers["x-request-id"][0]

    ask()
    return statuses


MODES = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE]


def wrong_ones(verb: str, path: str) -> bool:
    """Whether a request can be wrong at all: some pages take nothing."""
    operation = DOCUMENT["paths"][path][verb.lower()]
    return bool(operation.get("parameters") or operation.get("requestBody"))


CASES = [(v, p, m) for v, p in OPERATIONS for m in MODES if m is GenerationMode.POSITIVE or wrong_ones(v, p)]


@pytest.mark.parametrize(("verb", "path", "mode"), CASES, ids=lambda v: str(getattr(v, "value", v)))
def test_fault_D1_requests_of_every_kind_are_never_a_5xx(
    service: Served, session: requests.Session, verb: str, path: str, mode: GenerationMode
) -> None:
    assert fuzz(service, session, verb, path, mode, 6).total() > 0


@pytest.mark.system
def test_fault_D1_ten_thousand_requests_are_never_a_5xx(service: Served, session: requests.Session) -> None:
    asked: Counter[int] = Counter()
    for verb, path, mode in CASES:
        asked += fuzz(service, session, verb, path, mode, 450)
    print(f"\n{asked.total():,} requests: {dict(sorted(asked.items()))}")
    assert asked.total() >= 10_000
    assert asked[200] > 1_000
    assert asked[422] > 1_000
