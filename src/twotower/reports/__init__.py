"""Reports of a run: page, model card, comparison, and tables on a terminal."""
