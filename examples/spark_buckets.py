"""Write a log as buckets, by Spark: spark-submit examples/spark_buckets.py LOG OUT

LOG is a Parquet file, or a folder of them in the order of their names, with the columns user_id, item_id, rating
(positive above 3) and rated_at (seconds since 1970), without nulls. OUT is a folder that the driver and the executors
see.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from pyspark.sql import DataFrame, SparkSession

N_BUCKETS = 4
TABLES = {
    "files": """
        SELECT file_path, sum(n) OVER (ORDER BY file_path) - n AS before
        FROM (SELECT file_path, count(*) AS n FROM log GROUP BY file_path)""",
    "hashed": f"""
        SELECT *, CAST(floor(hash * {N_BUCKETS} / 4294967296) AS INT) AS bucket
        FROM (SELECT DISTINCT user_id, CAST(conv(substr(md5(CAST(user_id AS STRING)), 1, 8), 16, 10) AS BIGINT) AS hash
              FROM log)""",
    "sizes": "SELECT bucket, sum(n) OVER (ORDER BY bucket) - n AS first FROM (SELECT bucket, count(*) AS n FROM hashed "
    "GROUP BY bucket)",
    "users": """
        SELECT first + row_number() OVER (PARTITION BY bucket ORDER BY hash, user_id) - 1 AS user_row, user_id, bucket
        FROM hashed JOIN sizes USING (bucket)""",
    "items": "SELECT row_number() OVER (ORDER BY item_id) - 1 AS item_row, item_id FROM (SELECT DISTINCT item_id FROM "
    "log)",
    "kept": """
        SELECT user, item, row, positive, time, `value.rating`, bucket FROM (
            SELECT *, row_number() OVER (PARTITION BY user, item ORDER BY time DESC, row DESC) AS age FROM (
                SELECT user_row AS user, CAST(item_row AS BIGINT) AS item, before + row_index AS row,
                    rating > 3 AS positive, CAST(rated_at * 1000000 AS BIGINT) AS time,
                    CAST(rating AS DOUBLE) AS `value.rating`, bucket
                FROM log JOIN files USING (file_path) JOIN users USING (user_id) JOIN items USING (item_id)))
        WHERE age = 1""",
}


def write_buckets(spark: SparkSession, log: Path, out: Path) -> None:
    """Write the folder `out`, which must not exist. Of each pair of user and item the latest row is kept."""
    read = spark.read.parquet(str(log))  # with the place of each row: its file, and its number there
    read.select("*", "_metadata.file_path", "_metadata.row_index").createOrReplaceTempView("log")
    for name, query in TABLES.items():
        spark.sql(query).createOrReplaceTempView(name)
    spark.sql("CACHE TABLE kept")
    (out / "interactions").mkdir(parents=True)
    _write_file(spark.sql("SELECT user_id FROM users ORDER BY user_row"), out / "users.parquet")
    _write_file(spark.sql("SELECT item_id FROM items ORDER BY item_row"), out / "items.parquet")
    sizes = dict(spark.sql("SELECT bucket, first FROM sizes").collect())
    counts = {name: spark.sql(f"SELECT count(*) FROM {name}").first()[0] for name in ("users", "items", "log", "kept")}
    buckets, end = [], counts["users"]
    for bucket in reversed(range(N_BUCKETS)):
        file, first = f"{bucket:05d}.parquet", sizes.get(bucket, end)
        rows = spark.sql(f"SELECT * EXCEPT (bucket) FROM kept WHERE bucket = {bucket}")
        _write_file(rows.orderBy("user", "time", "row"), out / "interactions" / file)
        buckets.append({"users": [first, end], "files": [{"file": file, "segment": 0, "rows": rows.count()}]})
        end = first
    positives, first_time, last_time = spark.sql("SELECT count_if(positive), min(time), max(time) FROM kept").first()
    facts = {
        "format": 2, "maker": f"Spark {spark.version}", "hash": "md5-32", "duplicates": "last",
        "log": {"label": "rating", "positive_above": 3, "time": "rated_at", "time_unit": "s", "time_format": ""},
        "segments": [{"users": [0, counts["users"]], "items": [0, counts["items"]], "read": [0, counts["log"]]}],
        "rows": counts["kept"], "positives": positives, "first_time": first_time, "last_time": last_time,
        "buckets": buckets[::-1],
    }  # fmt: skip
    (out / "buckets.json").write_text(json.dumps(facts), encoding="utf-8")


def _write_file(rows: DataFrame, path: Path) -> None:
    """Write sorted rows as one Parquet file; Spark itself writes a folder of files."""
    folder = path.with_name(f"_{path.name}")
    rows.coalesce(1).write.parquet(str(folder))
    (part,) = folder.glob("part-*.parquet")
    part.rename(path)
    shutil.rmtree(folder)


if __name__ == "__main__":
    write_buckets(SparkSession.builder.getOrCreate(), Path(sys.argv[1]), Path(sys.argv[2]))
