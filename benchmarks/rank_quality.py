"""Ranking quality on MovieLens 1M (protocol P-AUC): test AUC and GAUC of the example, the plain towers, the baselines.

    TWOTOWER_DATA=path/to/ml-1m.zip .venv/bin/python benchmarks/rank_quality.py

Label = rating > 3 on all rows, random 80/20 then 90/10, seed 2022; epochs chosen on validation, test reported; no
feature, history or statistic sees validation or test rows. Every row of the table is trained with several seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from twotower import pipeline
from twotower.config import Config, parse
from twotower.config import load as load_config
from twotower.run import Run
from twotower.schema import Schema

EXAMPLES = Path(__file__).parent.parent / "examples"
SENET = {s: {"layers": [64, 32], "senet": {"enabled": True}} for s in ("user", "item")}
FIELDS: dict[str, object] = {"kind": "plain"}
GATED: dict[str, object] = {"senet": {"enabled": True}}
BRANCHES: dict[str, list[dict[str, object]]] = {
    "mlp": [FIELDS, {"kind": "mlp"}],
    "cross": [{"kind": "cross"}],
    "fm": [FIELDS, {"kind": "fm"}],
    "cin": [FIELDS, {"kind": "cin"}],
    "bilinear": [FIELDS, {"kind": "bilinear"}],
    "bilinear, with a gated one": [FIELDS, {"kind": "bilinear"}, {"kind": "bilinear"} | GATED],
}
"""Beside the fields themselves, which a cross holds."""
PLAIN = {
    "data": {"dataset": "ml-1m"},
    "train": {"epochs": 10, "batch_size": 2048, "device": "cpu"},
    "evaluation": {"bootstrap": 0},
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--only", default="", help="rows whose name holds this text")
    options.add_argument("--json", action="store_true")
    chosen = options.parse_args()
    schema, rank = load_config(EXAMPLES / "movielens-rank.toml")
    models: dict[str, tuple[Schema | None, Config]] = {
        "DSSM, observed pairs only": (None, parse(PLAIN)[1]),
        "DSSM + SENet, observed pairs only": (None, parse(PLAIN | {"model": {"pairs": [SENET]}})[1]),
        "DSSM + SENet, 5 random negatives a positive": (
            None,
            parse(PLAIN | {"model": {"pairs": [SENET]}, "negatives": {"random": 5}})[1],
        ),
        **{
            f"DSSM + branch {name}, observed pairs only": (None, parse(PLAIN | {"model": {"pairs": [_pair(parts)]}})[1])
            for name, parts in BRANCHES.items()
        },
        **{f"examples/{n}.toml": load_config(EXAMPLES / f"{n}.toml") for n in ("parallel", "dat")},
        "examples/movielens-rank.toml": (schema, rank),
    }
    rows = []
    for name, (schema, config) in models.items():
        if chosen.only not in name:
            continue
        runs = [train(schema, config, seed) for seed in range(1, chosen.seeds + 1)]
        rows.append({"model": name, "seeds": chosen.seeds} | {m: spread(runs, m) for m in METRICS})
        if len(rows) == 1:
            for baseline in ("popularity", "bias"):
                found = {m: [runs[0].metrics[f"baseline.{baseline}.{m.removeprefix('test.')}"]] for m in METRICS[:2]}
                rows.append({"model": f"baseline: {baseline}", "seeds": 1} | found)
        if not chosen.json:
            print(line(rows[-1] if len(rows) != 3 else rows[0]), flush=True)
    if chosen.json:
        print(json.dumps(rows, indent=1))
    else:
        print("\n| model | test AUC | test GAUC | validation AUC | seconds |\n|---|---|---|---|---|")
        print("\n".join(line(row) for row in rows))


def _pair(branches: list[dict[str, object]]) -> dict[str, object]:
    return {side: {"layers": [64, 32], "branches": branches} for side in ("user", "item")}


METRICS = ("test.auc", "test.gauc", "validation.auc", "train.seconds")


def train(schema: Schema | None, config: Config, seed: int) -> Run:
    config = config.model_copy(update={"train": config.train.model_copy(update={"seed": seed})})
    tables, schema = pipeline.read(config, schema)
    return pipeline.fit(tables, schema, config)


def spread(runs: list[Run], metric: str) -> list[float]:
    return [run.metrics[metric] for run in runs]


def line(row: dict[str, object]) -> str:
    cells = [str(row["model"])]
    for metric in METRICS:
        values: list[float] = row.get(metric, [])  # type: ignore[assignment]
        if not values:
            cells.append("")
        elif metric == "train.seconds":
            cells.append(f"{statistics.mean(values):.0f}")
        else:
            half = (max(values) - min(values)) / 2
            cells.append(f"{statistics.mean(values):.4f}" + (f" ± {half:.4f}" if len(values) > 1 else ""))
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
