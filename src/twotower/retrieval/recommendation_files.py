"""Names and sizes of the files of a folder of recommendations, which the command line reads without loading a table."""

from __future__ import annotations

RECOMMENDATIONS_FORMAT = 1
LIST_FILE, WORK_FOLDER = "_recommendations.json", "_work"
SHARD_USERS = 32_768
"""Default number of users of a shard."""


def shard_file(number: int) -> str:
    """Return the name of the file of a shard."""
    return f"part-{number:05d}.parquet"
