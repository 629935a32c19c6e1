"""Lines and answers on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from twotower.escaping import escape_controls

if TYPE_CHECKING:
    from twotower.retrieval.request import Answer


def print_line(line: str) -> None:
    """Print a line, with control characters in data escaped."""
    print(escape_controls(line), flush=True)


def print_answer(answer: Answer, as_json: bool) -> None:
    """Print an answer of a retriever: its items with their scores, or the whole answer as JSON."""
    if as_json:
        print_line(answer.to_json())
        return
    notes = {
        "model": "",
        "cold_start": ", an unknown user by the tower alone",
        "popular": ", no known word in the text: popular items"
        if answer.unknown
        else ", an unknown user: popular items",
        "fallback": ", the index does not answer: popular items",
    }
    print_line(f"bundle {answer.bundle_id}, method {answer.method}{notes[answer.source]}, {answer.milliseconds:.1f} ms")
    for place, item in enumerate(answer.items, 1):
        print_line(f"{place:>3}. {item.title}  (id {item.id}, {item.score:+.3f})")
    if answer.unknown:
        print_line(f"unknown to the model, left out: {', '.join(answer.unknown)}")
    if answer.truncated:
        print("no more items")
