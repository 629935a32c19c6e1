"""The log of a service."""

from __future__ import annotations

import json
import logging

import pytest

from twotower.reports.terminal import printed_messages
from twotower.serve.worker import log_as_json


def test_the_log_of_a_service_replaces_the_messages_of_the_command_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    levels = {logger: logger.level for logger in map(logging.getLogger, (None, "uvicorn.error", "faiss.loader"))}
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    try:
        with printed_messages():
            log_as_json()
            logging.getLogger("faiss.loader").info("Could not load library with AVX2 support")
            logging.getLogger("twotower.process").warning("a message")
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
    out, err = capsys.readouterr()
    assert (out, json.loads(err)["event"]) == ("", "a message")
