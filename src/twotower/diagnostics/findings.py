"""What was found: how bad it is, in words, and the numbers behind it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

Severity = Literal["error", "warning", "ok"]


@dataclass(frozen=True)
class Finding:
    """One diagnosis. `text` says what was found and what to do; `evidence` holds the numbers behind it."""

    severity: Severity
    name: str
    text: str
    evidence: dict[str, float] = field(default_factory=dict)


def or_ok(found: Iterable[Finding], name: str, text: str) -> Iterator[Finding]:
    """What was found, or that nothing was."""
    empty = True
    for finding in found:
        empty = False
        yield finding
    if empty:
        yield Finding("ok", name, text)


def describe_findings(findings: list[Finding]) -> Iterator[str]:
    """Printable lines: a finding and the numbers behind it, then the count of each severity."""
    for f in findings:
        yield f"{f.severity:<8} {f.name}: {f.text}"
        if f.evidence and f.severity != "ok":
            yield f"{'':<9}({', '.join(f'{k} {v:.4g}' for k, v in f.evidence.items())})"
    n = {s: sum(f.severity == s for f in findings) for s in ("error", "warning", "ok")}
    yield f"{n['error']} error{'s' * (n['error'] != 1)}, {n['warning']} warning{'s' * (n['warning'] != 1)}, {n['ok']} ok"
