"""Write a log as buckets, with SQL alone: python examples/duckdb_buckets.py LOG.parquet OUT

The log has the columns user_id, item_id, rating (positive above 3) and rated_at (seconds since 1970), without nulls.
"""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path

import duckdb

N_BUCKETS = 4
TABLES = """
CREATE TABLE users AS SELECT row_number() OVER (ORDER BY hash, user_id) - 1 AS user_row, * FROM (
    SELECT DISTINCT user_id, ('0x' || substr(md5(user_id::VARCHAR), 1, 8))::BIGINT AS hash FROM log);
CREATE TABLE items AS SELECT row_number() OVER (ORDER BY item_id) - 1 AS item_row, item_id FROM (
    SELECT DISTINCT item_id FROM log);
CREATE TABLE kept AS SELECT user_row AS "user", item_row AS item, file_row_number AS row, rating > 3 AS positive,
    (rated_at * 1000000)::BIGINT AS time, rating::DOUBLE AS "value.rating"
    FROM log JOIN users USING (user_id) JOIN items USING (item_id)
    QUALIFY row_number() OVER (PARTITION BY user_row, item_row ORDER BY time DESC, row DESC) = 1;
"""


def write_buckets(log: Path, out: Path) -> None:
    """Write the folder `out`, which must not exist. Of each pair of user and item the latest row is kept."""
    db = duckdb.connect()
    db.read_parquet(str(log), file_row_number=True).create_view("log")
    db.execute(TABLES)

    def numbers(sql: str) -> tuple[int, ...]:
        return db.sql(sql).fetchall()[0]

    (out / "interactions").mkdir(parents=True)
    db.sql("SELECT user_id FROM users ORDER BY user_row").write_parquet(str(out / "users.parquet"))
    db.sql("SELECT item_id FROM items ORDER BY item_row").write_parquet(str(out / "items.parquet"))
    starts = [
        numbers(f"SELECT count(*) FROM users WHERE hash < {(b << 32) // N_BUCKETS}")[0] for b in range(N_BUCKETS + 1)
    ]
    buckets = []
    for b, users in enumerate(pairwise(starts)):
        file = f"{b:05d}.parquet"
        of_bucket = f'FROM kept WHERE "user" >= {users[0]} AND "user" < {users[1]}'
        db.sql(f'SELECT * {of_bucket} ORDER BY "user", time, row').write_parquet(str(out / "interactions" / file))
        rows = numbers(f"SELECT count(*) {of_bucket}")[0]
        buckets.append({"users": users, "files": [{"file": file, "segment": 0, "rows": rows}]})

    counts = {name: numbers(f"SELECT count(*) FROM {name}")[0] for name in ("users", "items", "log", "kept")}
    positives, first, last = numbers("SELECT count(*) FILTER (positive), min(time), max(time) FROM kept")
    facts: dict[str, object] = {
        "format": 2,
        "maker": f"DuckDB {duckdb.__version__}",
        "hash": "md5-32",
        "duplicates": "last",
    }
    facts["log"] = {"label": "rating", "positive_above": 3, "time": "rated_at", "time_unit": "s", "time_format": ""}
    ends = {"users": counts["users"], "items": counts["items"], "read": counts["log"]}
    facts |= {"segments": [{name: [0, end] for name, end in ends.items()}], "rows": counts["kept"]}
    facts |= {"positives": positives, "first_time": first, "last_time": last, "buckets": buckets}
    (out / "buckets.json").write_text(json.dumps(facts), encoding="utf-8")


if __name__ == "__main__":
    write_buckets(Path(sys.argv[1]), Path(sys.argv[2]))
