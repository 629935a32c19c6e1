"""Copies of a run's folder, from which other processes load it: on this host, or at the same path of another."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from twotower.errors import ConfigError, RunError
from twotower.runs import Run, load


def run_digests(run: Run) -> tuple[str, str]:
    """Return the digest of the run's model.safetensors, or of the weights of a model without a folder, and that of the schema."""
    schema = hashlib.sha256(run.dataset.schema.model_dump_json().encode()).hexdigest()
    if run.sha256:  # of the loaded model; the folder may hold another run by now
        return run.sha256, schema
    digest = hashlib.sha256()
    for name, weights in run.model.named_parameters():
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(weights.detach().cpu().numpy()).data)
    return digest.hexdigest(), schema


@dataclass(frozen=True)
class RunCopy:
    """The folder of a run, and what a process that loads it compares."""

    folder: Path
    digests: tuple[str, str]

    @classmethod
    def of(cls, run: Run) -> RunCopy:
        """Raises ConfigError for a run without a folder."""
        if run.folder is None:
            raise ConfigError(
                "the run has no folder from which other processes load it; save it, or choose `engine='local'`"
            )
        return cls(run.folder.absolute(), run_digests(run))

    def load(self) -> Run:
        """Load the run. Raises RunError if the folder holds another one."""
        run = load(self.folder)
        if run_digests(run) != self.digests:
            raise RunError(
                f"{self.folder}: holds another model than when the call began; call again when it is complete"
            )
        return run
