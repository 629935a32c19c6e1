"""Measure ranking quality on MovieLens 1M (protocol P-AUC): test AUC and GAUC of the example, plain towers, baselines.

    TWOTOWER_DATA=path/to/ml-1m.zip .venv/bin/python benchmarks/rank_quality.py

Label = rating > 3 on all rows, random 80/20 then 90/10, seed 2022; epochs chosen on validation, test reported; no
feature, history or statistic sees validation or test rows. Every row of the table is trained with several seeds.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch
from measure import Numbers, options, result, save

from twotower import api
from twotower.config.experiment import Config
from twotower.config.toml import load_config, parse_config
from twotower.features.schema import Schema
from twotower.runs import Run

EXAMPLES = Path(__file__).parent.parent / "examples"
SENET = {s: {"layers": [64, 32], "senet": {"enabled": True}} for s in ("user", "item")}
FIELDS: dict[str, object] = {"kind": "identity"}
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
PLAIN: dict[str, Any] = {
    "data": {"dataset": "ml-1m"},
    "train": {"epochs": 10, "batch_size": 2048, "device": "cpu"},
    "evaluation": {"bootstrap": 0},
}


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=0, help="maximum number of epochs; default: that of the row")
    parser.add_argument("--only", default="", help="rows whose name contains this text")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    schema, rank = load_config(EXAMPLES / "movielens-rank.toml")
    models: dict[str, tuple[Schema | None, Config]] = {
        "DSSM, shown pairs only": (None, parse_config(PLAIN)[1]),
        "DSSM + SENet, shown pairs only": (None, parse_config(PLAIN | {"model": {"pairs": [SENET]}})[1]),
        "DSSM + SENet, 5 random negatives a positive": (
            None,
            parse_config(PLAIN | {"model": {"pairs": [SENET]}, "negatives": {"random": 5}})[1],
        ),
        **{
            f"DSSM + branch {name}, shown pairs only": (
                None,
                parse_config(PLAIN | {"model": {"pairs": [_pair(parts)]}})[1],
            )
            for name, parts in BRANCHES.items()
        },
        **{f"examples/{n}.toml": load_config(EXAMPLES / f"{n}.toml") for n in ("parallel", "dat")},
        "examples/movielens-rank.toml": (schema, rank),
    }
    done = 0
    print("| model | test AUC | test GAUC | validation AUC | seconds |\n|---|---|---|---|---|", flush=True)
    for name, (schema, config) in models.items():
        if chosen.only not in name:
            continue
        runs = [train(schema, config, seed, chosen.epochs) for seed in range(1, chosen.seeds + 1)]
        rows = {name: {metric: [run.metrics[metric] for run in runs] for metric in METRICS}}
        if not done:
            for baseline in ("popularity", "bias"):
                found = {
                    m: [runs[0].metrics[f"baseline.{baseline}.{m.removeprefix('test.')}"]]
                    for m in METRICS
                    if "test" in m
                }
                rows[f"baseline: {baseline}"] = found
        for row, values in rows.items():
            print(line(row, values), flush=True)
            save(chosen.out, results(row, values, chosen.threads), chosen.threads)
        done += 1


def _pair(branches: list[dict[str, object]]) -> dict[str, object]:
    return {side: {"layers": [64, 32], "branches": branches} for side in ("user", "item")}


METRICS = {
    "test.auc": "test AUC",
    "test.gauc": "test GAUC",
    "validation.auc": "validation AUC",
    "train.seconds": "seconds of training",
}


def train(schema: Schema | None, config: Config, seed: int, epochs: int) -> Run:
    changed = {"seed": seed} | ({"epochs": epochs} if epochs else {})
    config = config.model_copy(update={"train": config.train.model_copy(update=changed)})
    tables, schema = api.read(config, schema)
    return api.fit(tables, schema, config)


def results(row: str, values: dict[str, list[float]], threads: int) -> list[Numbers]:
    """Return a result for each metric; rounds are seeds."""
    return [
        result(
            f"rank_quality: {row}, {METRICS[metric]}",
            found,
            "s" if metric == "train.seconds" else "",
            more=metric != "train.seconds",
            threads=threads,
        )
        for metric, found in values.items()
    ]


def line(row: str, found: dict[str, list[float]]) -> str:
    cells = [row]
    for metric in METRICS:
        values = found.get(metric, [])
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
