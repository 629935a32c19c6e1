import shutil
from argparse import Namespace
from pathlib import Path
from statistics import median

import polars as pl

from benchmarks.lib.processes import COMPILED, TWOTOWER, run
from benchmarks.lib.report import Report
from benchmarks.scale.world import write_world


def main(chosen: Namespace, report: Report) -> None:
    folder = Path(chosen.folder).resolve() / "append"
    total = chosen.rows + chosen.day
    config = write_world(folder, max(1_000, total // 40), 100_000, total)
    log = pl.scan_parquet(folder / "interactions")
    day, days, buckets, prepared = (folder / name for name in ("day.parquet", "days.parquet", "buckets", "prepared"))
    log.slice(chosen.rows).collect().write_parquet(day)
    log.slice(0, chosen.rows).sink_parquet(days)
    of_buckets, seconds = ["--set", f"data.buckets={buckets}"], dict[str, list[float]]()
    for _ in range(chosen.turns):
        for out in (buckets, prepared):
            shutil.rmtree(out, ignore_errors=True)
        run([*TWOTOWER, "bucket", config, "--set", f"data.interactions={days}", "--out", buckets], environment=COMPILED)
        ways: dict[str, list[str | Path]] = {
            "the whole log": [config, "--out", prepared],
            "append": [config, *of_buckets, "--append", day],
            "arrays of the buckets": [config, *of_buckets, "--out", prepared],
        }
        for way, words in ways.items():
            seconds.setdefault(way, []).append(run([*TWOTOWER, "prepare", *words], environment=COMPILED).seconds)
            shutil.rmtree(prepared, ignore_errors=True)
    for way, found in seconds.items():
        report.add(f"{total:,} interactions, {way}", median(found), "s", more=False)
    whole, append, arrays = (median(found) for found in seconds.values())
    report.add("append / the whole log", append / whole, "", more=False)
    report.add("append and arrays / the whole log", (append + arrays) / whole, "", more=False)
    shutil.rmtree(folder)
