"""Copies of a run's folder, from which other processes load it: on this host, at the same path of another, or through a bucket."""

from __future__ import annotations

import hashlib
import platform
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from twotower.engines.engine import JobEngine
from twotower.errors import ConfigError, RunError
from twotower.runs import Run, load
from twotower.runs.shared import SharedRun, share_url


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


def check_share(share: Path | str, engine: JobEngine) -> None:
    """Raise ConfigError for a place of shared runs that an engine does not use, or that is none."""
    if share and not engine.is_remote:
        raise ConfigError(
            f"`share` is '{share}', and engine '{engine.name}' loads the run in no other process; leave it out"
        )
    if share:
        share_url(share)


@dataclass(frozen=True)
class RunCopy:
    """The folder of a run, and what a process that loads it compares."""

    folder: Path
    digests: tuple[str, str]
    shared: SharedRun | None = None

    @classmethod
    def of(cls, run: Run, share: Path | str = "") -> RunCopy:
        """Take the folder of a run, or put its files below the URL `share`. Raises ConfigError for a run without a folder."""
        if run.folder is None:
            raise ConfigError(
                "the run has no folder from which other processes load it; save it, or choose `engine='local'`"
            )
        folder = run.folder.absolute()
        return cls(folder, run_digests(run), SharedRun.put(folder, share, bool(run.unfinished)) if share else None)

    def load(self) -> Run:
        """Load the run. Raises RunError if the folder is missing or holds another one."""
        folder = self.shared.fetch() if self.shared else self.folder
        if not folder.exists():
            raise RunError(
                f"{folder}: is not there on {platform.node()}; have the run at this path on every host, or name a prefix in a bucket through "
                "which they get it (`share`)"
            )
        run = load(folder)
        if run_digests(run) != self.digests:
            raise RunError(f"{folder}: holds another model than when the call began; call again when it is complete")
        return run
