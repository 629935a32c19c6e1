"""Pages of reports: the style, a section with figures, and the page around the sections. A page loads nothing from the network."""

from __future__ import annotations

import html
from collections.abc import Iterable

from twotower.reports.figure import Figure

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "Noto Sans", "Noto Sans CJK SC", sans-serif; color: #1f2933;
       background: #fff; max-width: 1080px; margin: 0 auto; padding: 24px 20px 60px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 40px 0 4px; } h3 { font-size: 16px; margin: 24px 0 4px; }
p { margin: 4px 0 12px; max-width: 76ch; color: #52606d; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 12px 0; display: block; overflow-x: auto;
        background: linear-gradient(-90deg, #fff 40%, transparent) right / 40px 100% no-repeat local,
                    linear-gradient(-90deg, #0003, transparent) right / 12px 100% no-repeat scroll; }
th, td { padding: 5px 14px; text-align: right; border-bottom: 1px solid #e4e7eb; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; white-space: normal; min-width: 8em;
                                 position: sticky; left: 0; background: #fff; }
th { color: #52606d; font-weight: 600; } .verdict { border-left: 4px solid #2f6fb0; padding-left: 12px; color: #1f2933; }
.best { font-weight: 700; }
.figures { display: grid; gap: 16px 32px; grid-template-columns: repeat(auto-fill, minmax(min(400px, 100%), 1fr)); }
figure { margin: 8px 0; max-width: 520px; min-width: 0; } figure svg { display: block; width: 100%; font-size: 12px; }
figure p { font-size: 14px; margin: 0; } figure p span { margin-right: 14px; }
.texts td { text-align: left; vertical-align: top; overflow-wrap: anywhere; white-space: normal; } .texts th { text-align: left; }
small { display: block; color: #52606d; white-space: nowrap; } .better { color: #1d7a46; } .worse { color: #b3261e; }
.key { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 7px; }
"""


def page(title: str, about: str, sections: Iterable[str]) -> str:
    """Return a page with a heading, a paragraph of text and sections of HTML."""
    named, body = html.escape(title), "\n".join(sections)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{named}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>'
        f"<body><h1>{named}</h1><p>{html.escape(about)}</p>{body}</body></html>"
    )


def section(title: str, text: str, figures: list[Figure]) -> str:
    """Return a heading, a paragraph of HTML and the figures, side by side if there are several."""
    return f'<h2>{title}</h2><p>{text}</p><div class="figures">{"".join(figure.html() for figure in figures)}</div>'
