"""Findings: severity, text, and the numbers as evidence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

Severity = Literal["error", "warning", "ok"]


@dataclass(frozen=True)
class Finding:
    """Finding of one diagnosis: `text` names the problem and the remedy, `evidence` the numbers behind it."""

    severity: Severity
    name: str
    text: str
    evidence: dict[str, float] = field(default_factory=dict)


def or_ok(found: Iterable[Finding], name: str, text: str) -> Iterator[Finding]:
    """Yield the findings, or one of severity "ok" if there are none."""
    empty = True
    for finding in found:
        empty = False
        yield finding
    if empty:
        yield Finding("ok", name, text)


def describe_findings(findings: list[Finding]) -> Iterator[str]:
    """Yield printable lines: each finding with its evidence, then the count of each severity."""
    for f in findings:
        yield f"{f.severity:<8} {f.name}: {f.text}"
        if f.evidence and f.severity != "ok":
            yield f"{'':<9}({', '.join(f'{k} {v:.4g}' for k, v in f.evidence.items())})"
    n = {s: sum(f.severity == s for f in findings) for s in ("error", "warning", "ok")}
    errors, warnings = (f"{n[s]} {s}{'s' * (n[s] != 1)}" for s in ("error", "warning"))
    yield f"{errors}, {warnings}, {n['ok']} ok"
