"""The files of a bundle are verified once."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from worlds import EVERYTHING_SCHEMA, everything, settings

import twotower
from twotower import api, limited_process
from twotower.files import inspections
from twotower.index.faiss.ivf import Ivf
from twotower.retrieval.request import Request
from twotower.retrieval.retriever import Retriever
from twotower.store.store import Store


def test_an_index_file_that_has_passed_is_not_looked_at_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run = twotower.fit(everything(60, 300, 3000), EVERYTHING_SCHEMA, settings(), folder=tmp_path / "run")
    api.publish(run, tmp_path / "store", Ivf(min_recall=0.1))
    bundle, looked = Store(tmp_path / "store").current(), list[str]()
    look = limited_process.run_limited

    def counted(work: str, paths: list[Path], **limits: Any) -> Any:
        looked.extend(path.name for path in paths)
        return look(work, paths, **limits)

    monkeypatch.setattr(limited_process, "run_limited", counted)
    monkeypatch.setattr(inspections, "_here", set())
    answers = []
    for is_new, is_cached in ((True, False), (False, False), (True, False), (True, True)):
        if is_new:  # another process
            monkeypatch.setattr(inspections, "_here", set())
        if not is_cached:
            shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        answers.append(Retriever(bundle).recommend(Request("u1"), 5).items)
    assert looked == ["index.faiss"] * 2
    assert answers[0] == answers[1] == answers[2] == answers[3]
