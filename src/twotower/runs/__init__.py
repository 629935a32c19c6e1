"""A run folder: all files of a trained model, without references to other files.

config.toml             the resolved settings and schema; the same tables trained with it give the same run
model.safetensors       weights
model.json              fields and settings of the model
encoders.json           statistics of the train part, and vocabularies.arrow, its vocabularies
users|items|interactions.parquet   the tables as numbered and split; or prepared/, the same on a disk
metrics.json            flat metrics
history.jsonl           metrics of each epoch
report.html             curves, distributions, gates and slices in one offline page
checkpoints/            state from which training resumes
refit/                  with train.refit: the run of all rows, which is published in place of this one
.next/                  the run that replaces this complete one; once complete, it is read while its files move
.lock                   held by the process that writes the run
"""

from __future__ import annotations

import hashlib
import json
import logging
import tomllib
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeGuard

import torch
from pydantic import JsonValue, ValidationError
from pydantic_core import to_jsonable_python
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from twotower import files
from twotower.arrays.types import Floats, Shaped
from twotower.config.experiment import Config
from twotower.config.toml import CONFIG_FORMAT, TomlValue, dump_config, parse_config
from twotower.data import memmap
from twotower.data.dataset import Dataset
from twotower.data.splits import TEST
from twotower.errors import ConfigError, DataError, RunError, first_line
from twotower.escaping import python_literal, representation
from twotower.evaluation.config import EvaluationConfig, Metrics
from twotower.evaluation.factors import Factors, Scorer
from twotower.evaluation.moments import VersionFactors
from twotower.features.encoders import Encoders
from twotower.features.schema import Schema
from twotower.features.side import SIDES, SideName
from twotower.files import layout, locks
from twotower.files.readers import read_checked, read_json, read_text
from twotower.kinds import CODE, CODE_OF, code_digests, untrusted_kind, warn_of_changes
from twotower.model.narrow import Narrow
from twotower.model.tables import blank_tables
from twotower.model.two_tower import TwoTower
from twotower.runs.folder import is_complete, reading_folder, run_stamp
from twotower.scorers.scorer import terms_of
from twotower.section import first_problem
from twotower.train.checkpoint import CODES, DATA, EVALUATION, STATE, Checkpoint, load_states
from twotower.train.factors import factors_before, factors_during
from twotower.train.progress import TrainingProgress
from twotower.train.weights import BestWeights
from twotower.version import __version__

log = logging.getLogger(__name__)

RUN_FORMAT = 7
"""Format of a run folder, in model.json."""


@dataclass(frozen=True)
class Run:
    """A loaded run: dataset, settings, model with the best weights, metrics, and one entry of history per epoch."""

    folder: Path | None
    config: Config
    dataset: Dataset
    model: TwoTower
    metrics: Metrics
    history: list[Metrics]
    sha256: str = field(default="", kw_only=True)
    """SHA-256 of model.safetensors; empty without a folder."""
    unfinished: str = field(default="", kw_only=True)
    """State of a training that has not ended: the run is its best epoch so far. Empty for a complete run."""

    def __repr__(self) -> str:
        name = self.config.train.monitor.replace("validation.", "test.")
        quality = f"; {name} {self.metrics[name]:.4f}" if name in self.metrics else ""
        return representation(type(self), f"{self.folder or 'in memory'}: {self.dataset.describe()}{quality}")

    def factors(self, part: int = TEST) -> Factors:
        """Return the vectors of all users and items that method 1 serves.

        They read the histories before `part`, the newest versions, the popularity before the test part, and the default
        context. `factors().users @ factors().items.T` are the logits (users, items) of a model without own counts;
        `factors().catalogue_scores(rows)` are the logits of any model. Raises ConfigError if a feature of the context
        has no default."""
        return factors_before(self.model, self.dataset, part)

    def factors_during(self, part: int = TEST) -> Scorer:
        """Return the scorer of the evaluation of `part`.

        It differs from `factors` in three things, all at the time of each interaction of the part: the versions of
        users and items, the popularity, and the context."""
        own_moments = self.dataset.has_versions or self.dataset.schema.side("context") or self.moves
        return factors_during(self.model, self.dataset, part) if own_moments else self.factors(part)

    @property
    def moves(self) -> bool:
        """True if scores depend on the time of a ranking, as recent popularity does."""
        return any(term.is_fitted and term.moves for term in terms_of(self.model))

    def latest_popularity(self) -> Floats | None:
        """Return the popularity (items,) before the test part, which ranks the items for unknown users.

        None if the model's scores do not depend on it."""
        orders = (term.order_of_items(self.dataset) for term in terms_of(self.model))
        return next((order for order in orders if order is not None), None)

    def vector_gaps(self, side: SideName, columns: Collection[str]) -> list[str]:
        """Return what an index of other software lacks if it has the vectors of a side, from a table with `columns`."""
        missed = [line for term in terms_of(self.model) if (line := term.missed_in(side))]
        if (version := self.dataset.schema.valid_from) in columns:
            missed.append(
                f"{side}s: '{version}' begins versions of an id, and each row gets a vector: give a table of the "
                "newest row of each id for an index"
            )
        return missed

    def factors_at_once(self, part: int = TEST) -> Factors:
        """Return `factors`, but with versions and popularity at the times of the interactions of `part`.

        A user is as at its first interaction of the part, an item as at the first of all. With a context: `factors`."""
        if self.dataset.schema.side("context"):
            return self.factors(part)
        found = self.factors_during(part)
        assert isinstance(found, Factors)
        return found.at_once() if isinstance(found, VersionFactors) else found


def fingerprint(dataset: Dataset, config: Config) -> dict[str, JsonValue]:
    """Return the facts that a resumed training compares.

    These are settings by key, digests of the data and of the codes of its values, and library versions, which must be
    equal, and a digest of the evaluation, which may differ."""
    flat = _flattened("", config.model_dump(mode="json", exclude={"data", "evaluation", "index"}))
    # The times of checkpoints, the timeout and the placement of tables do not change the result.
    for key in ("checkpoint_seconds", "checkpoint_steps", "timeout", "embedding_placement", "embedding_sharding"):
        del flat[f"train.{key}"]
    measured = hashlib.sha256(config.evaluation.model_dump_json().encode()).hexdigest()
    digests = {DATA: dataset.digest, CODES: dataset.encoders.digest_of_codes, EVALUATION: measured}
    code = {f"{CODE_OF}{module}": digest for module, digest in _code(dataset, config).items()}
    return flat | digests | code | {"torch": torch.__version__, "twotower": __version__}


def _code(dataset: Dataset, config: Config) -> dict[str, JsonValue]:
    """Return the digests of the code of kinds defined outside the package."""
    return code_digests(dataset.schema.model_dump(mode="json"), config.model_dump(mode="json"))


def _flattened(prefix: str, section: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """Return the values of a section by dotted key."""
    flat: dict[str, JsonValue] = {}
    for key, value in section.items():
        flat |= _flattened(f"{prefix}{key}.", value) if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def start_run(
    folder: Path, dataset: Dataset, config: Config, checkpoints: Path | None = None, resume: bool = False
) -> None:
    """Check that the folder can be written, and write settings and data before training starts. Call under the lock.

    `checkpoints` is the folder of the checkpoint that training resumes from. A training that resumes without a
    checkpoint keeps the scores of starts. Raises RunError."""
    files.check_writable(folder)
    for stale in (layout.METRICS, layout.MODEL, layout.WEIGHTS, layout.REPORT):
        (folder / stale).unlink(missing_ok=True)
    kept = folder / layout.CHECKPOINTS
    try:
        if not resume:
            files.remove(folder / layout.REFIT)
        if checkpoints is None:  # those of an earlier training may have later steps
            for old in kept.glob("step-*") if resume else [kept]:
                files.remove(old)
        elif checkpoints != kept:
            files.link_tree(checkpoints, kept)
    except OSError as e:
        raise RunError(f"{kept}: cannot be written ({e.strerror or e})") from e
    memmap.save(dataset, folder)
    if isinstance(dataset, memmap.MemmapDataset):  # the run has its own files; a path is relative to the config
        config = config.model_copy(update={"data": config.data.model_copy(update={"prepared": layout.PREPARED})})
    files.write(folder / layout.CONFIG, dump_config(dataset.schema, config))


def save_history(folder: Path, history: list[Metrics]) -> None:
    files.write(folder / layout.EPOCHS, "".join(json.dumps(entry) + "\n" for entry in history))


def save_run(folder: Path, run: Run) -> str:
    """Write model, history and metrics; metrics.json last, so that its presence marks a complete run.

    Returns the SHA-256 of the weights."""
    digest = save_model(folder, run)
    save_history(folder, run.history)
    files.write_json(folder / layout.METRICS, run.metrics)
    return digest


def save_model(folder: Path, run: Run) -> str:
    """Write the weights, and the fields and settings of the model. Returns the SHA-256 of the weights."""
    data = _weights_file(run.model)
    digest = hashlib.sha256(data).hexdigest()
    files.write(folder / layout.WEIGHTS, data)
    about: files.JsonData = {
        "format": RUN_FORMAT, "twotower": __version__, "torch": torch.__version__, "sha256": digest,
        "metric": run.model.metric, "model": run.config.model.model_dump(mode="json"),
        "fields": {s: to_jsonable_python(run.dataset.encoders.fields(s)) for s in SIDES},
        CODE: _code(run.dataset, run.config),
    }  # fmt: skip
    files.write_json(folder / layout.MODEL, about)
    return digest


def _weights_file(model: TwoTower) -> bytes:
    return save_tensors({n: p.detach().cpu().contiguous() for n, p in model.named_parameters()})


def load(folder: Path | str, trust: bool = False) -> Run:
    """Read a run folder. If its training has not ended, the run is the best epoch so far, and a message says so.

    `trust` imports the modules of kinds that the config names by import path: pass it for a folder that you trust as
    code. Raises RunError if a file is missing, damaged or of another run, or no epoch is validated yet, ConfigError for
    a kind that is neither imported nor trusted."""
    folder = Path(folder)
    while True:
        before = run_stamp(folder)
        try:
            found = _load(folder, trust)
        except RunError:
            if run_stamp(folder) == before:
                raise
        else:
            if run_stamp(folder) == before:
                if found.unfinished:
                    log.info(f"{folder}: {found.unfinished}")
                return found


def _load(folder: Path, trust: bool) -> Run:
    if not (complete := is_complete(folder)) and not (folder / layout.CONFIG).exists():
        what = "a store of bundles, not a run" if (folder / layout.BUNDLES).is_dir() else "holds no run"
        raise RunError(f"{folder}: {what} (config.toml is missing); name the folder of a trained run")
    place = reading_folder(folder)
    schema, config = read_config(place, trust)
    stopped = None if complete else _stopped(folder, config)
    digest, code = ("", None) if stopped else _digests(place)  # first: files of another format would be called damaged
    try:
        dataset = memmap.load(place, schema, config.split)
    except (ArithmeticError, AttributeError, ConfigError, DataError, LookupError) as e:
        raise RunError(f"{place}: encoders.json and the tables do not go together ({first_line(e)})") from e
    if stopped:
        return _best_so_far(folder, config, dataset, *stopped)
    model = load_model(place, digest, config, dataset.encoders)
    warn_of_changes(code, folder)
    metrics = read_json(place / layout.METRICS)
    if not _is_metrics(metrics):
        raise RunError(f"{place / layout.METRICS}: damaged (expected numbers by name)")
    history = _history(place / layout.EPOCHS, not config.train.epochs)
    if len(history) != metrics.get("train.epochs", len(history)):
        what = "damaged, or of another run (the epochs are not those of metrics.json)"
        raise RunError(f"{place / layout.EPOCHS}: {what}")
    return Run(folder, config, dataset, model, metrics, history, sha256=digest)


def _stopped(folder: Path, config: Config) -> tuple[Checkpoint, BestWeights]:
    """Return the newest intact checkpoint of a training that has not ended, and the weights of its best epoch.

    Raises RunError if no epoch is validated."""
    found = Checkpoint.newest(folder / layout.CHECKPOINTS)
    best = BestWeights(config.train.monitor, config.train.patience)
    if found:
        load_states({"best": best}, found.tensors)
    if not found or not best.weights:
        raise RunError(
            f"{folder}: an unfinished run (metrics.json is missing) without a validated epoch; "
            f"train it with `fit(config, folder={python_literal(folder)}, resume=True)`"
        )
    return found, best


def _best_so_far(folder: Path, config: Config, dataset: Dataset, found: Checkpoint, best: BestWeights) -> Run:
    """Return the best epoch of a training that has not ended."""
    if found.fingerprint.get(DATA) != dataset.digest:
        raise RunError(f"{found.path}: of other data than the tables of {folder}; train the run again")
    of_kinds = {key.removeprefix(CODE_OF): v for key, v in found.fingerprint.items() if key.startswith(CODE_OF)}
    warn_of_changes(of_kinds, folder)
    model = _model_of(best.weights, config, dataset.encoders, found.path)
    progress = TrainingProgress.restore(found.progress, found.path)
    history = _checked_history(progress.history, found.path / STATE, may_be_empty=False)
    running = False
    with suppress(OSError):  # of a folder that may not be written
        running = locks.is_locked(folder / layout.RUN_LOCK)
    state = [
        f"{'in training' if running else 'stopped'} after epoch {progress.epoch} of {config.train.epochs}",
        f"the best is epoch {best.epoch}",
        *(f"the mix weights pair {pair} after the last" for pair in config.last_starts),
        *["model.stacking weighs its terms after the last"] * bool(config.model.stacking),
        *["model.cold_item_bias is fitted after the last"] * bool(config.model.cold_item_bias),
        *(f"the mix weights the scorer '{term.kind}' after the last" for term in config.terms),
        *["narrow vectors are fitted after the last"] * bool(config.narrow.width),
    ]
    digest, metrics = hashlib.sha256(_weights_file(model)).hexdigest(), progress.metrics(best.epoch)
    return Run(folder, config, dataset, model, metrics, history, sha256=digest, unfinished="; ".join(state))


def _history(path: Path, may_be_empty: bool) -> list[Metrics]:
    try:
        entries = [json.loads(line) for line in read_checked(path, read_text).splitlines()]
    except (RecursionError, ValueError) as e:
        raise RunError(f"{path}: not readable as lines of JSON ({e})") from None
    return _checked_history(entries, path, may_be_empty)


def _checked_history(entries: Sequence[object], path: Path, may_be_empty: bool) -> list[Metrics]:
    """Return the entries of epochs 1, 2, … of the file `path`. Raises RunError for any other entries."""
    history = []
    for number, entry in enumerate(entries or ([] if may_be_empty else [None]), 1):
        if not (_is_metrics(entry) and {"epoch", "step", "train.loss"} <= entry.keys() and entry["epoch"] == number):
            raise RunError(f"{path}: damaged (line {number} is not that of epoch {number})")
        history.append(entry)
    return history


def _is_metrics(value: object) -> TypeGuard[Metrics]:
    return isinstance(value, dict) and all(type(v) in (int, float) for v in value.values())


def read_config(folder: Path, trust: bool = False) -> tuple[Schema, Config]:
    """Read schema and settings of a run folder. Raises RunError, ConfigError."""
    schema, config = parse_config(_read_settings(folder), str(folder / layout.CONFIG), trust)
    if schema is None:
        raise RunError(f"{folder / layout.CONFIG}: the schema is missing")
    return schema, config


def read_evaluation(folder: Path) -> EvaluationConfig:
    """Read the settings of the evaluation of a bundle, without the kinds of other sections. Raises RunError."""
    try:
        return EvaluationConfig.model_validate(_read_settings(folder).get("evaluation", {}))
    except ValidationError as e:
        foreign = untrusted_kind(e)
        problem = foreign.in_data if foreign else f"evaluation.{first_problem(e)}"
        raise RunError(f"{folder / layout.CONFIG}: {problem}") from None


def _read_settings(folder: Path) -> dict[str, TomlValue]:
    """Return the content of config.toml. Raises RunError."""
    path = folder / layout.CONFIG
    if not path.exists():
        raise RunError(f"{folder}: holds no run (config.toml is missing)")
    try:
        data: dict[str, TomlValue] = tomllib.loads(read_checked(path, read_text))
    except (tomllib.TOMLDecodeError, RecursionError) as e:
        raise RunError(f"{path}: damaged ({e})") from None
    if (form := data.get("format")) != CONFIG_FORMAT:
        raise RunError(f"{path}: format {form!r}, this version reads {CONFIG_FORMAT}; train the run again")
    return data


def published(run: Run) -> Run:
    """Return the run that is published in place of a complete one: that of all rows, if it has been trained again on
    them. Raises the errors of `load`."""
    if run.folder is None or run.unfinished or not run.config.train.refit:
        return run
    return load(reading_folder(run.folder) / layout.REFIT)


def weights_digest(folder: Path) -> str:
    """Return the SHA-256 of the weights in model.json. Raises RunError if the file is damaged or of another format."""
    return _digests(folder)[0]


def _digests(folder: Path) -> tuple[str, JsonValue]:
    """Return the SHA-256 of the weights, and the digests of code, in model.json. Raises RunError."""
    about = read_json(folder / layout.MODEL)
    form = about.get("format") if isinstance(about, dict) else None
    if form != RUN_FORMAT or not isinstance(digest := about.get("sha256"), str):
        path = folder / layout.MODEL
        raise RunError(f"{path}: format {form!r}, this version reads {RUN_FORMAT}; train the run again")
    return digest, about.get(CODE)


def load_model(folder: Path, digest: str, config: Config, encoders: Encoders) -> TwoTower:
    """Load the model from `folder`. Raises RunError if the weights do not fit the config or have another SHA-256."""
    return _model_of(_weights(folder, digest), config, encoders, folder / layout.WEIGHTS)


def holds_weights(folder: Path, digest: str, model: TwoTower) -> bool:
    """Return True if the weights in `folder` are those of a model, bit by bit. Raises RunError if they have another
    SHA-256."""
    stored = {name: _bits(weights) for name, weights in load_tensors(_weights(folder, digest)).items()}
    return stored == {name: _bits(weights) for name, weights in model.named_parameters()}


def _weights(folder: Path, digest: str) -> bytes:
    data = read_checked(folder / layout.WEIGHTS, Path.read_bytes)
    if hashlib.sha256(data).hexdigest() != digest:
        raise RunError(f"{folder / layout.WEIGHTS}: damaged, or of another run (checksum)")
    return data


def _bits(weights: Shaped[Tensor, "*_"]) -> tuple[tuple[int, ...], bytes]:
    """Return the shape and the SHA-256 of some weights."""
    array = weights.detach().cpu().contiguous().numpy()
    return array.shape, hashlib.sha256(array.data).digest()


def _model_of(
    weights: bytes | dict[str, Shaped[Tensor, "*_"]], config: Config, encoders: Encoders, path: Path
) -> TwoTower:
    """Return the model with weights by name, or with the content of the file `path`. Raises RunError."""
    try:
        with blank_tables():
            users, items = (encoders.fields(side) for side in SIDES)
            model = TwoTower(config.model, users, items, config.terms_for(users, items))
        tensors = load_tensors(weights) if isinstance(weights, bytes) else weights
        model.narrow = Narrow.of(tensors, items)
        if lacking := [name for name, _ in model.named_parameters() if name not in tensors]:
            what = f"lacks {lacking[0]}, which the model of config.toml has in this version"
            raise RunError(f"{path}: {what}; train the run again")
        model.load_state_dict(tensors, strict=True)
    except (ConfigError, LookupError, RuntimeError, SafetensorError, TypeError, ValueError) as e:
        raise RunError(
            f"{path}: the weights do not fit config.toml and encoders.json ({first_line(e)}); train the run again"
        ) from None
    return model.eval()
