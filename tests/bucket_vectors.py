"""Test vectors of docs/prepared-format.md: hashes of ids, and a writer of buckets in plain Python that imports nothing
of the package."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

HASHES: dict[str | int, int] = {
    7: 2400511071,
    "7": 2400511071,
    "007": 2660544862,
    0: 3486326916,
    -1: 1807097403,
    -(2**63): 3777766075,
    2**63 - 1: 360086309,
    2**63: 2378012228,
    2**64 - 1: 2121803171,
    "": 3558706393,
    "u1": 3833023709,
    "u 1": 824840757,
    "a'b": 19264434,
    "a\nb": 2363405380,
    "用户": 533736080,
    "🙂": 1552772400,
    "\u00e9": 1725812119,  # é as one character
    "e\u0301": 0x5526861F,  # é as two
}
"""Ids, and their hashes by md5sum of GNU coreutils."""
SAME_HASH: dict[int, tuple[str | int, str | int]] = {
    773530790: (3447, 102617),
    146911745: ("u101995", "u30679"),
    517284669: ("用户1849", "用户26722"),
}
"""Hashes, and two ids of each in the order of their rows: numbers by value, text by its bytes."""


@dataclass(frozen=True)
class Event:
    """An interaction of a log."""

    user: str | int
    item: str | int
    time: int
    label: float


Log = Sequence[Event]
PAIRS = (
    "a:1 b:2 c:3 用户:1 🙂:2 :3 a:2 b:3 c:1 a:1 a:3 u101995:1 u30679:2 d:4 d:1 d:2 d:3 u30679:4 d:4 e:1"  # user:item
)
LOG: Log = [
    Event(pair.partition(":")[0], int(pair[-1]), 1_700_000_000_000_000 + 1_000_000 * (7 * n % 11), float(n % 6))
    for n, pair in enumerate(PAIRS.split(" "))
]
"""Twenty interactions of ten users and four items; two pairs stand in it twice."""


def hash_of(user: str | int) -> int:
    return int(hashlib.md5(str(user).encode(), usedforsecurity=False).hexdigest()[:8], 16)


def user_order(user: str | int) -> tuple[int, bytes | int]:
    return hash_of(user), user.encode() if isinstance(user, str) else user


def write_buckets(
    folder: Path,
    log: Log,
    n_buckets: int = 4,
    timed: bool = True,
    rich: bool = True,
    later: Sequence[int] = (),
) -> None:
    """Write a folder of buckets of a log. `rich` adds value.label, weight, event and context.device; `later` are the
    rows of the log at which further segments begin, each with `n_buckets` of its users."""
    (folder / "interactions").mkdir(parents=True)
    users, items = list[str | int](), list[str | int]()
    segments, kept = list[dict[str, list[int]]](), list[list[tuple[int, int, int]]]()
    for first, end in pairwise([0, *later, len(log)]):
        before = len(users), len(items)
        users += sorted({e.user for e in log[first:end]} - {*users}, key=user_order)
        items += sorted({e.item for e in log[first:end]} - {*items})
        segments.append({"users": [before[0], len(users)], "items": [before[1], len(items)], "read": [first, end]})
        latest: dict[tuple[str | int, str | int], tuple[int, int]] = {}
        for row, e in enumerate(log[first:end], first):
            key = (e.time if timed else 0, row)
            latest[e.user, e.item] = max(key, latest.get((e.user, e.item), key))
        kept.append(sorted((users.index(log[row].user), time, row) for time, row in latest.values()))
    pq.write_table(pa.table({"user_id": users, "age": [float(len(str(u))) for u in users]}), folder / "users.parquet")
    pq.write_table(pa.table({"item_id": items, "title": [f"film {i}" for i in items]}), folder / "items.parquet")

    listed: list[dict[str, Any]] = []
    for s, (start, stop) in enumerate(segment["users"] for segment in segments):
        own = [hash_of(u) * n_buckets >> 32 for u in users[start:stop]]
        starts = [start + sum(b < number for b in own) for number in range(n_buckets + 1)]
        for first, end in pairwise(starts):
            listed.append({"users": [first, end], "files": []})
            for t, of_segment in enumerate(kept):
                part = [(user, row, log[row]) for user, _, row in of_segment if first <= user < end]
                if t != s and not part:
                    continue
                name = f"{len(listed) - 1:05d}{f'-{t}' if t else ''}.parquet"
                pq.write_table(_interactions(part, items, timed, rich), folder / "interactions" / name)
                listed[-1]["files"].append({"file": name, "segment": t, "rows": len(part)})
    every = [record for of_segment in kept for record in of_segment]
    times = [time for _, time, _ in every] if timed else []
    facts = {
        "format": 2,
        "maker": "bucket_vectors 1",
        "hash": "md5-32",
        "duplicates": "last",
        "log": {
            "label": "label",
            "positive_above": 2,
            "time": "at" if timed else "",
            "time_unit": "s",
            "time_format": "",
        },
        "segments": segments,
        "rows": len(every),
        "positives": sum(log[row].label > 2 for _, _, row in every),
        "first_time": min(times, default=None),
        "last_time": max(times, default=None),
        "buckets": listed,
    }
    (folder / "buckets.json").write_text(json.dumps(facts), encoding="utf-8")


def _interactions(part: list[tuple[int, int, Event]], items: list[str | int], timed: bool, rich: bool) -> pa.Table:
    """Records of users' rows, rows of the log and events as a table of a bucket."""
    columns = {
        "user": pa.array([user for user, _, _ in part], pa.int32()),
        "item": pa.array([items.index(e.item) for _, _, e in part], pa.int32()),
        "row": pa.array([row for _, row, _ in part], pa.int64()),
        "positive": pa.array([e.label > 2 for _, _, e in part], pa.bool_()),
    }
    if timed:
        columns["time"] = pa.array([e.time for _, _, e in part], pa.int64())
    if rich:
        columns["value.label"] = pa.array([e.label or None for _, _, e in part], pa.float64())
        columns["weight"] = pa.array([1 + row / 4 for _, row, _ in part], pa.float32())
        columns["event"] = pa.array(["view" if row % 2 else "buy" for _, row, _ in part], pa.string())
        columns["context.device"] = pa.array([None if row % 3 else "tv" for _, row, _ in part], pa.string())
    return pa.table(columns)
