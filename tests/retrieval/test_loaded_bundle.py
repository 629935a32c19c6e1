"""The files of a bundle are verified once."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from worlds import EVERYTHING_SCHEMA, everything, settings

import twotower
from twotower import api
from twotower.index.faiss.ivf import Ivf
from twotower.retrieval.request import Request
from twotower.retrieval.retriever import Retriever
from twotower.store.store import Store


def test_an_index_file_that_is_known_to_be_sound_is_not_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from twotower.index.faiss import faiss_index

    run = twotower.fit(everything(60, 300, 3000), EVERYTHING_SCHEMA, settings(), folder=tmp_path / "run")
    api.publish(run, tmp_path / "store", Ivf(min_recall=0.1))
    bundle = Store(tmp_path / "store").current()
    looked: list[Path] = []
    monkeypatch.setattr(faiss_index, "verify_file", looked.append)
    first = Retriever(bundle)
    assert [p.name for p in looked] == ["index.faiss"]
    assert first.loaded.index_digest == hashlib.sha256(looked[0].read_bytes()).hexdigest()
    again = Retriever(bundle, verified_indexes={first.loaded.index_digest})
    other = Retriever(bundle, verified_indexes={"0" * 64})
    assert len(looked) == 2
    answers = [r.recommend(Request("u1"), 5).items for r in (first, again, other)]
    assert answers[0] == answers[1] == answers[2]
