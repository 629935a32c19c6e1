"""Kinds of one's own, one module for each protocol: see docs/extending.md."""
