"""Names and sizes of the files of a folder of recommendations, which the command line reads without loading a table."""

from __future__ import annotations

RECOMMENDATIONS_FORMAT = 2
LIST_FILE = "_recommendations.json"
SHARD_USERS = 32_768
"""Default number of users of a shard."""
