"""Statistics of tables for people."""

from __future__ import annotations

import numpy as np
import polars as pl

from twotower.features.values import missing_count


def describe(frame: pl.DataFrame) -> list[tuple[str, str, int, str, str]]:
    """Return for each column: name, type, missing values, distinct values (or '–' for lists), an example."""
    out = []
    for series in frame:
        distinct = "–" if series.dtype.is_nested() else f"{series.n_unique():,}"
        values = series.drop_nulls()
        example = "" if not len(values) else str(values[0] if not series.dtype.is_nested() else values[0].to_list())
        out.append((series.name, str(series.dtype), missing_count(series), distinct, example[:40]))
    return out


def activity(found: dict[str, pl.DataFrame]) -> list[str]:
    """Return lines about the interactions per user and per item, for id columns that two tables share."""
    lines = []
    for name in ("users", "items"):
        shared = [c for c in found[name].columns if c in found["interactions"].columns] if name in found else []
        for key in shared:
            known, used = found[name][key].unique(), found["interactions"][key].alias("id")
            if known.dtype != used.dtype:
                continue
            n = used.filter(used.is_in(known.implode())).value_counts(name="n")["n"].to_numpy()
            if not len(n):
                lines.append(f"interactions per {key}: none, no id of {name} has any")
                continue
            lines.append(
                f"interactions per {key}: median {np.median(n):.0f}, largest {n.max():,}, "
                f"{found[name][key].n_unique() - len(n):,} of {found[name][key].n_unique():,} without any"
            )
    return lines
