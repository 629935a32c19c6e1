"""From a request to an answer, by a published bundle."""

SHARD_USERS = 32_768
"""Default number of users in a shard of `recommend_users`. Here, so that the command line reads it without polars."""
