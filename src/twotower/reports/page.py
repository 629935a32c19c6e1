"""Pages of reports: the style, a section with figures, and the page around the sections. A page loads nothing from the network."""

from __future__ import annotations

import html
from collections.abc import Iterable
from functools import cache

import plotly.graph_objects as go
import plotly.io
from pydantic import JsonValue

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "Noto Sans", "Noto Sans CJK SC", sans-serif; color: #1f2933;
       background: #fff; max-width: 1080px; margin: 0 auto; padding: 24px 20px 60px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 40px 0 4px; } h3 { font-size: 16px; margin: 24px 0 4px; }
p { margin: 4px 0 12px; max-width: 76ch; color: #52606d; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 12px 0; display: block; overflow-x: auto; }
th, td { padding: 5px 14px; text-align: right; border-bottom: 1px solid #e4e7eb; }
th:first-child, td:first-child { text-align: left; padding-left: 0; } th { color: #52606d; font-weight: 600; }
.best { font-weight: 700; } .row { display: grid; gap: 16px; }
.many { grid-template-columns: repeat(auto-fill, minmax(min(440px, 100%), 1fr)); }
.row > div { min-width: 0; overflow: hidden; } .wide { overflow-x: auto; }
.wide svg { max-width: 100%; min-width: 700px; height: auto; }
.texts td { text-align: left; vertical-align: top; overflow-wrap: anywhere; } .texts th { text-align: left; }
small { display: block; color: #52606d; white-space: nowrap; } .better { color: #1d7a46; } .worse { color: #b3261e; }
.key { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 7px; }
"""


def page(title: str, about: str, sections: Iterable[str]) -> str:
    """Return a page with a heading, a paragraph of text and sections of HTML."""
    named, body = html.escape(title), "\n".join(sections)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{named}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style><script>{_plotly()}</script></head>'
        f"<body><h1>{named}</h1><p>{html.escape(about)}</p>{body}</body></html>"
    )


def section(title: str, text: str, figures: list[go.Figure]) -> str:
    """Return a heading, a paragraph of HTML and the figures, side by side if there are several."""
    plots = "".join(f"<div>{_plot(figure)}</div>" for figure in figures)
    # Plotly measures a figure before its neighbours exist, so the grid must fix the column width.
    grid = " many" if len(figures) > 1 else ""
    return f'<h2>{title}</h2><p>{text}</p><div class="row{grid}">{plots}</div>'


def _plot(figure: go.Figure) -> str:
    """Return the HTML of a figure, with the default template."""
    drawn = figure.to_dict()
    drawn["layout"]["template"] = _template()
    settings = {"displayModeBar": False}
    # The figure is valid, and so is its template.
    return str(plotly.io.to_html(drawn, full_html=False, include_plotlyjs=False, config=settings, validate=False))


@cache
def _plotly() -> str:
    """Return the code of plotly, 5 MB, which every page holds."""
    return str(plotly.offline.get_plotlyjs())


@cache
def _template() -> dict[str, JsonValue]:
    """Return the default template of plotly, which takes as long to copy as the rest of a figure."""
    found: dict[str, JsonValue] = plotly.io.templates[plotly.io.templates.default].to_plotly_json()
    return found
