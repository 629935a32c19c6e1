"""Scores of the values of starts that a training has tried, kept in the folder of its checkpoints: a training that
is stopped and resumed tries none again."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from functools import cached_property
from pathlib import Path

from pydantic import JsonValue

from twotower import files
from twotower.errors import RunError
from twotower.files.readers import read_json
from twotower.scorers.start import Start

log = logging.getLogger(__name__)

TRIED = "starts.json"
"""The file, in the folder of the checkpoints: a digest of what the training depends on, and the score of each start."""


class TriedStarts:
    """Scores by start, of one training. Rank 0 calls the methods."""

    def __init__(self, folder: Path | None, fingerprint: dict[str, JsonValue]) -> None:
        """Keep scores in the folder of the checkpoints. Those of a training of another fingerprint are not read. None,
        or an empty fingerprint: no file is read or written."""
        self._file = folder / TRIED if folder and fingerprint else None
        self._fingerprint = fingerprint

    def score(self, pair: int, start: Start) -> float | None:
        """Return the score of a pair's values that have been tried, minus infinity if they could not be solved; None if
        they have not been tried."""
        if (key := _key(pair, start)) not in self._scores:
            return None
        score = self._scores[key]
        return -math.inf if score is None else score

    def add(self, pair: int, start: Start, score: float) -> None:
        """Keep the score of a pair's values. Raises RunError if the file cannot be written."""
        if math.isnan(score):
            return
        self._scores[_key(pair, start)] = score if math.isfinite(score) else None
        if self._file is not None:
            try:
                self._file.parent.mkdir(parents=True, exist_ok=True)
            except OSError as e:
                raise RunError(f"{self._file.parent}: cannot be made ({e.strerror or e})") from e
            files.write_json(self._file, {"of": self._digest, "scores": self._scores})

    @cached_property
    def _scores(self) -> dict[str, float | None]:
        if self._file is None or not self._file.is_file():
            return {}
        try:
            found = read_json(self._file)
            scores = {str(key): None if score is None else float(score) for key, score in found["scores"].items()}
            is_same = found["of"] == self._digest
        except (RunError, KeyError, TypeError, ValueError, AttributeError) as e:
            log.warning(f"{self._file} is damaged ({type(e).__name__}); the values of the starts are tried anew")
            return {}
        if scores and is_same:
            log.info(f"{len(scores)} values of starts, which were tried before, are not tried again")
        return scores if is_same else {}

    @cached_property
    def _digest(self) -> str:
        return hashlib.sha256(json.dumps(self._fingerprint, sort_keys=True).encode()).hexdigest()


def _key(pair: int, start: Start) -> str:
    return f"{pair} {start.model_dump_json()}"
