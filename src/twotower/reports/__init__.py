"""Reports of a run: pages (jinja2 templates, *.html), model card, comparison, and tables on a terminal."""
