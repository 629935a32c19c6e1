"""What a person sees in a terminal: how far a training is, and the tables of what was found."""

from __future__ import annotations

import sys
import time
from typing import Any

from twotower.shown import harmless
from twotower.watcher import Watcher


def show(line: str) -> None:
    """Print a line that may hold data: what would steer the terminal is spelled out."""
    print(harmless(line), flush=True)


class Terminal(Watcher):
    """Tells a run's progress: a bar on a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None
        self._live = sys.stdout.isatty()
        self._last = 0.0

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def say(self, line: str) -> None:
        self.close()
        show(line)

    def step(self, done: int, total: int, loss: float) -> None:
        if not self._live:
            return
        now = time.monotonic()
        if done < total and now - self._last < 0.1:
            return
        self._last = now
        if self._bar is None:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"),
                TimeRemainingColumn(), transient=True,
            )  # fmt: skip
            self._bar.start()
            self._task = self._bar.add_task("epoch", total=total, loss="")
        self._bar.update(self._task, completed=done, loss=f"loss {loss:.4f}")
        if done == total:
            self.close()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def epoch(self, history: list[dict[str, Any]]) -> None:
        self.close()
        entry = history[-1]
        shown = "  ".join(
            f"{name.removeprefix('validation.')} {value:.4f}"
            for name, value in entry.items()
            if name in ("validation.auc", "validation.gauc")
            or name.startswith(("validation.recall", "validation.ndcg"))
        )
        print(
            f"epoch {entry['epoch']:>3}  loss {entry['train.loss']:.4f}  {shown}  {entry['train.seconds']:.1f} s",
            flush=True,
        )


def print_metrics(metrics: dict[str, float], k: int) -> None:
    """The model's test metrics beside the baselines', one row each."""
    columns = ["auc", "gauc", f"recall@{k}", f"ndcg@{k}", f"mrr@{k}", f"hit_rate@{k}", f"coverage@{k}"]
    print(f"{'test':<18}" + "".join(f"{c:>13}" for c in columns))
    for name, prefix in (
        ("model", "test"),
        ("popularity", "baseline.popularity"),
        ("user+item bias", "baseline.bias"),
    ):
        cells = (metrics.get(f"{prefix}.{c}") for c in columns)
        print(f"{name:<18}" + "".join(f"{'–' if v is None else f'{v:.4f}':>13}" for v in cells))
    if "train.seconds" in metrics:
        print(
            f"trained in {metrics['train.seconds']:.1f} s at {metrics['train.rows_per_second']:,.0f} rows/s, "
            f"best epoch {metrics['train.best_epoch']:.0f}, peak memory {metrics['train.peak_memory_mb']:,.0f} MB"
        )


def print_served(found: dict[str, dict[str, float]], cut_offs: tuple[int, ...]) -> None:
    """A bundle's test metrics, exact search and index side by side."""
    columns = ["auc", "gauc", *(f"{m}@{k}" for k in cut_offs for m in ("recall", "ndcg", "hit_rate"))]
    print(f"{'test':<24}" + "".join(f"{c:>13}" for c in columns))
    for name, key in (("method 1, exact search", "exact"), ("method 1, index", "index"), ("method 2, index", "live")):
        cells = (found[key].get(c) for c in columns)
        print(f"{name:<24}" + "".join(f"{'–' if v is None or v != v else f'{v:.4f}':>13}" for v in cells))


def print_answer(answer: Any, as_json: bool) -> None:
    if as_json:
        show(answer.to_json())
        return
    what = {
        "model": "",
        "cold_start": ", an unknown user by the tower alone",
        "popular": ", nothing known of the text: popular items"
        if answer.unknown
        else ", an unknown user: popular items",
        "fallback": ", the index does not answer: popular items",
    }
    show(f"bundle {answer.bundle_id}, method {answer.method}{what[answer.source]}, {answer.milliseconds:.1f} ms")
    for place, item in enumerate(answer.items, 1):
        show(f"{place:>3}. {item.title}  (id {item.id}, {item.score:+.3f})")
    if answer.unknown:
        show(f"never met by the model, left out: {', '.join(answer.unknown)}")
    if answer.truncated:
        print("no more items are left")
