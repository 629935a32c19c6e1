"""Suggestion of a config: tables are read, their columns get roles, and their shape chooses a recipe."""
