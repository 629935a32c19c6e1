"""Suggestion of a config: tables are found and read, their shape is measured, a recipe is chosen by rules and written out."""
