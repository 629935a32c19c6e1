"""Command line: a module for each group of verbs, and the translation of arguments into flags."""
