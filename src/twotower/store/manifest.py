"""The manifest of a bundle: facts about the model, and path, size and SHA-256 of all other files.

The digest of a manifest ends the id of its bundle. A manifest is untrusted: size, depth and digits are limited, and all
fields are validated before one is used.
"""

from __future__ import annotations

import hashlib
import json
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
    field_validator,
)
from pydantic.types import Strict

from twotower import files
from twotower.data.split import SplitConfig
from twotower.errors import BundleError, ConfigError
from twotower.features.side import SideName
from twotower.files import layout
from twotower.files.object_stores import FileEntry
from twotower.files.readers import parse_json, read_regular
from twotower.files.urls import Url
from twotower.kinds import UntrustedKind, untrusted_kind
from twotower.section import Section, first_problem

if TYPE_CHECKING:
    from twotower.features.schema import Schema

SCHEMA_VERSION = 7
"""Version of the manifest that is written, and the only one that is read."""

MAX_MANIFEST_BYTES = 16 << 20

JsonObject = dict[str, JsonValue]
Verdict = Literal["better", "not worse", "worse", "cannot tell"]
Count = Annotated[StrictInt, Field(ge=0)]
Number = Annotated[float, Strict()]


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, allow_inf_nan=False, protected_namespaces=())


class Counts(_Facts):
    """Number of users and of items."""

    users: Count
    items: Count


class RecallCheck(_Facts):
    """Recall of the index against exact search: the share of the top `k` of held-out users that it finds."""

    recall: Number
    threshold: Number
    k: Count
    queries: Count

    @property
    def shortfall(self) -> str:
        """A sentence if the recall is below the threshold, else an empty string."""
        if self.recall >= self.threshold:
            return ""
        below = f"recall {self.recall:.6g} is below the threshold {self.threshold:.6g}"
        return f"{below}, k {self.k}, queries {self.queries}"


class IndexFacts(_Facts):
    """Kind and parameters of the index, the number of rejected vectors, and the collection of a remote index."""

    kind: StrictStr
    params: JsonObject
    search_params: dict[str, StrictInt]
    rejected: Count
    uri: StrictStr = ""
    collection: StrictStr = ""


class HistoryTermFacts(_Facts):
    """History whose items have a score of their own: its n-th latest interaction weighs rate^(n - 1) n^-exponent, and
    `factor` is that of the logarithm of the sums."""

    history: StrictStr
    rate: Annotated[Number, Field(ge=0, le=1)]
    exponent: Annotated[Number, Field(ge=0)]
    factor: Number


class KnownRows(_Facts):
    """Interactions that something is made of: their number, and the time of the newest, None of a log without times.

    The time is in microseconds since 1970, or in the log's own numbers that grow with time."""

    rows: Count
    until: StrictInt | None


class ChallengeFacts(_Facts):
    """Comparison of a bundle with the one that was current, the champion, on rows that neither had learned."""

    metric: StrictStr
    champion: StrictStr
    """Id of the bundle."""
    values: tuple[Number, Number]
    """The metric of the champion and of the new model."""
    interval: tuple[Number, Number]
    """95 % interval of the difference, the new less the old."""
    users: Count
    could_tell: Count
    """Number of users with which a difference of 2 % would be found four times of five."""
    verdict: Verdict
    strict: StrictBool = False
    """True if "cannot tell" is refused."""

    def __str__(self) -> str:
        (old, new), (low, high) = self.values, self.interval
        more = ""
        if self.verdict == "cannot tell" and self.could_tell:
            more = f"; {self.could_tell:,} users could tell a difference of 2 %"
        return (
            f"{self.verdict}: {self.metric} {new:.4f}, of {self.champion} {old:.4f} (difference {new - old:+.4f}, 95 % "
            f"{low:+.4f} to {high:+.4f}, {self.users:,} users){more}"
        )

    @property
    def shortfall(self) -> str:
        """A sentence if the new model is refused, else an empty string."""
        refused = ("worse", "cannot tell") if self.strict else ("worse",)
        return str(self) if self.verdict in refused else ""


class BundleFacts(_Facts):
    """Facts about a bundle from its publisher."""

    model: StrictStr
    """SHA-256 of model.safetensors."""
    dims: Count
    metric: Literal["cosine", "dot"]
    counts: Counts
    table_schema: JsonObject = Field(alias="schema")
    split: SplitConfig
    similarity: Literal["cosine", "dot"]
    bias: StrictBool
    keep_seen: StrictBool
    """True if answers hold items of the user's history, unless a request says otherwise."""
    history_term: HistoryTermFacts | None
    """None: the model has none."""
    moves: StrictBool
    """True if scores depend on the time, which is the end of the rows before the test part."""
    learned: KnownRows
    """Interactions that the model was trained on, or chosen by."""
    remembered: KnownRows
    """Interactions in the vectors and histories of users."""
    challenge: ChallengeFacts | None
    """None: it was not asked for, or no bundle was current."""
    recall_check: RecallCheck
    index: IndexFacts
    parity: dict[SideName, Number]
    """Largest difference between an exported tower and torch, by side."""
    schema_hash: StrictStr
    vocab_hash: StrictStr
    versions: dict[str, StrictStr]

    @field_validator("table_schema", mode="before")
    @classmethod
    def _dumped(cls, value: JsonValue | Section) -> JsonValue:
        return value.model_dump(mode="json") if isinstance(value, Section) else value

    @field_validator("table_schema")
    @classmethod
    def _check_schema(cls, value: JsonObject) -> JsonObject:
        from twotower.features.schema import Schema  # which imports polars

        try:
            Schema.model_validate(value)
        except ValidationError as e:
            if untrusted_kind(e) is None:
                raise
        return value


class Manifest(BundleFacts):
    """A validated manifest."""

    schema_version: Literal[7]
    bundle: StrictStr
    created: StrictStr
    forced: StrictBool
    """True for a recall below the threshold, or a model that is worse than the one before."""
    files: tuple[FileEntry, ...]

    @property
    def size(self) -> int:
        """Size of all files. Bytes."""
        return sum(entry.size for entry in self.files)

    @property
    def sha256(self) -> dict[str, str]:
        """SHA-256 of each file by path."""
        return {entry.path: entry.sha256 for entry in self.files}

    def read_sections(self) -> tuple[Schema, SplitConfig]:
        """Return the schema and the split.

        Raises BundleError if one of them, or the index, has a kind from outside twotower that is not imported: reading
        a bundle imports no code."""
        from twotower.features.schema import Schema  # which imports polars
        from twotower.index import INDEXES  # which imports numpy

        try:
            INDEXES.find(self.index.kind)
            return Schema.model_validate(self.table_schema), self.split
        except UntrustedKind as e:
            raise BundleError(f"bundle {self.bundle}: {e.in_data}", "kinds") from None
        except ConfigError as e:
            raise BundleError(f"bundle {self.bundle}: {e}", "manifest") from None
        except ValidationError as e:
            foreign = untrusted_kind(e)
            raise BundleError(
                f"bundle {self.bundle}: {foreign.in_data if foreign else first_problem(e)}", "kinds"
            ) from None


def manifest_digest(body: JsonObject) -> str:
    """Return the last part of the id of the bundle with the manifest `body`."""
    kept = {name: value for name, value in body.items() if name != "bundle"}
    return hashlib.sha256(json.dumps(kept).encode()).hexdigest()[:6]


def write_manifest(
    folder: Path, stamp: str, facts: BundleFacts, created: str, forced: bool, entries: list[FileEntry]
) -> str:
    """Write the manifest of a folder and return the id of the bundle: `stamp`, and the digest."""
    body: JsonObject = {
        "schema_version": SCHEMA_VERSION, "bundle": "", **facts.model_dump(mode="json", by_alias=True),
        "created": created, "forced": forced, "files": [entry.model_dump() for entry in entries],
    }  # fmt: skip
    body["bundle"] = name = f"{stamp}-{manifest_digest(body)}"
    files.write_json(folder / layout.MANIFEST, body, 0o644)
    return name


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a folder. Raises BundleError, OSError."""
    if folder.is_symlink():
        raise BundleError(f"{folder}: a symbolic link, not a bundle", "path")
    if not folder.is_dir():
        raise BundleError(f"{folder}: no such bundle", "missing")
    path = folder / layout.MANIFEST
    if not path.is_symlink() and not path.exists():
        raise BundleError(f"{folder}: {layout.MANIFEST} is missing: not a bundle, or an incomplete one", "manifest")
    info = path.lstat()
    if not stat.S_ISREG(info.st_mode):
        raise BundleError(f"{path}: not a regular file", "path")
    if info.st_size > MAX_MANIFEST_BYTES:
        raise BundleError(f"{path}: {info.st_size} bytes, expected at most {MAX_MANIFEST_BYTES}", "manifest")
    return parse_manifest(read_regular(path, MAX_MANIFEST_BYTES), path, folder.name)


def parse_manifest(data: bytes, path: Path | Url, name: str) -> Manifest:
    """Return the manifest of the bundle `name` from the content of the file at `path`. Raises BundleError."""
    try:
        body = parse_json(data)
        json.dumps(body, ensure_ascii=False).encode()  # a lone surrogate is no text
    except (ValueError, RecursionError) as e:
        raise BundleError(f"{path}: not JSON ({e})", "manifest") from None
    if not isinstance(body, dict):
        raise BundleError(f"{path}: not a JSON object", "manifest")
    version = body.get("schema_version")
    if type(version) is not int or version != SCHEMA_VERSION:
        raise BundleError(
            f"{path}: schema_version is {version!r:.80}, this version reads {SCHEMA_VERSION}; "
            "publish the run with this version",
            "schema_version",
        )
    try:
        manifest = Manifest.model_validate(body)
    except ValidationError as e:
        raise BundleError(f"{path}: {first_problem(e)}", "manifest") from None
    if manifest.bundle != name:
        raise BundleError(f"{path}: of another bundle ({manifest.bundle!r:.80})", "mismatch")
    if name[-6:] != manifest_digest(body):
        raise BundleError(f"{path}: damaged or edited (its digest is not that of the id)", "checksum")
    return manifest
