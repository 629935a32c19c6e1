"""Statistics of tables for people."""

from __future__ import annotations

import re

import numpy as np
import polars as pl

from twotower.features.values import missing_count


def describe(frame: pl.DataFrame) -> list[tuple[str, str, int, str, str]]:
    """Return for each column: name, type, missing values, distinct values (or '–' for lists), an example."""
    out = []
    for series in frame:
        distinct = "–" if series.dtype.is_nested() else f"{series.n_unique():,}"
        values = series.drop_nulls()
        example = _shown(values[:1]) if len(values) else ""
        out.append((series.name, str(series.dtype), missing_count(series), distinct, example[:40]))
    return out


def _shown(value: pl.Series) -> str:
    """Return a series of one value as text."""
    if value.dtype in (pl.Date, pl.Datetime):  # Python has no year 0, nor 10000
        return re.sub(r"\.0+(?=\D|$)", "", value.cast(pl.String)[0])
    return str(value.to_list()[0])


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
