"""Names of the files and folders of a store, a bundle, a run, a prepared dataset, a folder of buckets and an index.

A store holds bundles, a bundle copies most files of its run, and a run or bundle holds tables or a prepared dataset.
"""

from __future__ import annotations

# Store: a bundle for each version, the id of the served one, a line for each change, the lock of a change, and the
# collections of remote indexes.
BUNDLES, CURRENT, HISTORY, STORE_LOCK, COLLECTIONS = "bundles", "CURRENT", "HISTORY.jsonl", "LOCK", "COLLECTIONS.json"
STORE_FILES = frozenset({BUNDLES, CURRENT, HISTORY, STORE_LOCK})
"""Files of a store; at least one exists from its creation."""

# Bundle: the manifest, the vectors of all users, the index of the items, and the model card.
MANIFEST, USER_VECTORS, INDEX, MODEL_CARD = "MANIFEST.json", "user_vectors.npy", "index", "README.md"

# Bundle of a model with own counts: the weight of each code of a history.
HISTORY_TERM = "history_term.npy"

# Bundle of a model with recent popularity: the popularity of each item at the end of the rows before the test part.
POPULARITY = "popularity.npy"


def tower(side: str) -> str:
    return f"{side}_tower.onnx"


# Cache of bundles or runs: the lock of the process that makes a copy, after the id of a bundle.
CACHE_LOCK = ".copying"

# Run and bundle: resolved settings, weights, the fields and settings they belong to, statistics, vocabularies, metrics.
CONFIG, WEIGHTS, MODEL = "config.toml", "model.safetensors", "model.json"
ENCODERS, VOCABULARIES, METRICS = "encoders.json", "vocabularies.arrow", "metrics.json"

# Run: a line for each epoch, a page of curves, the state from which training resumes, the run of all rows that is
# published in its place, the next run, and the lock of the writing process.
EPOCHS, REPORT, CHECKPOINTS, REFIT = "history.jsonl", "report.html", "checkpoints", "refit"
NEXT_RUN, RUN_LOCK = ".next", ".lock"

# Tables of a run or bundle, as numbered and split; or the same as a prepared dataset.
INTERACTIONS, PREPARED = "interactions.parquet", "prepared"


def table(side: str) -> str:
    return f"{side}s.parquet"


def versions(side: str) -> str:
    """Return the name of the table of all versions of a side; its other table has the newest version of each id."""
    return f"{side}_versions.parquet"


TABLES = (table("user"), table("item"), INTERACTIONS)

# Prepared dataset: format, counts, split, schema and digest; arrays that are mapped into memory; and an interaction,
# with the types of the context's columns in the log.
PREPARED_FACTS, ARRAYS, CONTEXT = "prepared.json", "arrays", "context.parquet"

# Buckets: facts, and the folder of the files of interactions.
BUCKET_FACTS, BUCKET_FOLDER = "buckets.json", "interactions"

# Index: kind and parameters, and the file of FAISS.
INDEX_FACTS, INDEX_FAISS = "index.json", "index.faiss"

RUN_FILES = frozenset(
    {
        CONFIG, WEIGHTS, MODEL, ENCODERS, VOCABULARIES, *TABLES, versions("user"), versions("item"), PREPARED, METRICS,
        EPOCHS, REPORT, CHECKPOINTS, REFIT,
    }
)  # fmt: skip
"""All files and folders of a run, other than hidden ones."""
