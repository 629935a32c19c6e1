"""Suggestion of a config: tables are read, their columns get roles, their shape chooses a recipe that is written out."""
