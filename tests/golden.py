"""Golden digests: what a fixed list of trainings, exports, searches and requests gives, as hashes and as numbers.

    python tests/golden.py record FILE [--ranks]    write the digests of this source tree; --ranks: of two ranks too
    python tests/golden.py compare OLD NEW          list every array whose bits differ; exit code 1 if one does
    python tests/golden.py numbers                  write tests/golden.json

`make golden BASE=commit` records a commit in a worktree and this tree on the same machine, and compares: a change that
keeps behaviour keeps every bit. Bits differ between processors, so tests/test_golden.py compares the numbers of
tests/golden.json, within 1e-5 of an array's largest.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import ranked
from worlds import CHECKERBOARD_SCHEMA, EVERYTHING_SCHEMA, checkerboard, everything, settings

import twotower
from twotower.config.experiment import Config
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.split import SplitConfig
from twotower.data.tables import check
from twotower.features.date import Date
from twotower.features.day_of_week import DayOfWeek
from twotower.features.days_since_previous import DaysSincePrevious
from twotower.features.event_sequence import EventSequence
from twotower.features.gap_sequence import GapSequence
from twotower.features.hour_of_day import HourOfDay
from twotower.features.schema import EventRule, Schema
from twotower.features.sequence import Sequence
from twotower.features.side import SIDES
from twotower.index import build_index
from twotower.model.inputs.gather import feed
from twotower.onnx.export import export_tower
from twotower.onnx.tower import OnnxTower
from twotower.serve.routes import create_app
from twotower.serve.service import Service
from twotower.serve.settings import ServeSettings
from twotower.train.factors import factors_before
from twotower.train.trainer import Trainer

Arrays = dict[str, np.ndarray[Any, Any]]
Digests = dict[str, dict[str, dict[str, Any]]]

FILE = Path(__file__).with_suffix(".json")
NUMBERS = 6
"""Values of an array that are kept beside its hash."""

EVEN: Schema = EVERYTHING_SCHEMA.model_copy(
    update={"features": tuple(f.model_copy(update={"width": 8}) for f in EVERYTHING_SCHEMA.features)}
)
"""Fields of one width, which products of fields need."""
SOFTMAX: dict[str, Any] = {"kind": "softmax"}
EARLIER: dict[str, Any] = {"history_scope": "causal"}
SENET: dict[str, Any] = {"enabled": True}


MOMENTS = (
    HourOfDay(name="hour", default=23),
    DayOfWeek(name="day", default=7),
    DaysSincePrevious(name="gap", default=0.5),
)
IN_CONTEXT: Schema = EVERYTHING_SCHEMA.model_copy(update={"features": (*EVERYTHING_SCHEMA.features, *MOMENTS)})

DATED: Schema = EVERYTHING_SCHEMA.model_copy(
    update={"features": (*EVERYTHING_SCHEMA.features, Date(name="released", side="item", buckets=4))}
)

BESIDE: Schema = EVERYTHING_SCHEMA.model_copy(
    update={
        "label": "",
        "event": "stars",
        "events": {"5": EventRule(), "*": EventRule(target="negative")},
        "features": (
            EVERYTHING_SCHEMA.features[0],
            EVERYTHING_SCHEMA.side("item")[0],
            EventSequence(name="how", side="user"),
            GapSequence(name="gaps", side="user"),
            Sequence(name="met", side="user", pooling="decay", beside=("how", "gaps")),
        ),
    }
)


def pair(**tower: Any) -> dict[str, Any]:
    """One pair of towers with the same options on both sides."""
    return {"pairs": [{"user": {"layers": [8]} | tower, "item": {"layers": [8]} | tower}]}


POOLINGS: dict[str, dict[str, Any]] = {
    "attention": {"window": 128, "heads": 2},
    "transformer": {"window": 128, "heads": 2},
    "transformer, plain blocks": {"window": 128, "heads": 2, "block": "plain", "blocks": 1},
}
READING = pair(layers=[8])


def branch(kind: str, **options: Any) -> dict[str, Any]:
    return {"model": {"width": 8} | pair(branches=[{"kind": kind} | options], layers=[12, 8])}


TRAININGS: dict[str, tuple[str, dict[str, Any]]] = {
    "loss bce": ("everything", {}),
    "loss softmax": ("everything", {"loss": SOFTMAX}),
    "sequences beside one": (
        "beside",
        {"loss": SOFTMAX, "negatives": {"uniform": 9}, "train": {"history_scope": "causal"}},
    ),
    "loss softmax, no log-q": ("everything", {"loss": SOFTMAX | {"log_q": False}, "negatives": {"popularity": 9}}),
    "loss gbce": ("everything", {"loss": {"kind": "gbce"}, "negatives": {"uniform": 9}}),
    "loss bpr": ("everything", {"loss": {"kind": "bpr"}, "negatives": {"random": 2}}),
    "loss mimic": ("board", {"loss": SOFTMAX | {"mimic": 0.5}, "model": pair(augment=True)}),
    "negatives random": ("everything", {"negatives": {"random": 2}}),
    "negatives uniform": ("everything", {"loss": SOFTMAX, "negatives": {"uniform": 9, "in_batch": False}}),
    "negatives popularity": ("everything", {"loss": SOFTMAX, "negatives": {"popularity": 9}}),
    "negatives cross_batch_memory": ("everything", {"loss": SOFTMAX, "negatives": {"cross_batch_memory": 200}}),
    "negatives disliked": ("everything", {"loss": SOFTMAX, "negatives": {"disliked": 2}}),
    "negatives hard": (
        "everything",
        {"loss": SOFTMAX, "negatives": {"hard": {"n": 1, "ranks": [1, 9], "ratio": 5}}, "train": {"epochs": 2}},
    ),
    "negatives attribute": ("everything", {"loss": SOFTMAX, "negatives": {"attribute": {"feature": "brand", "n": 2}}}),
    "negatives full": ("everything", {"loss": SOFTMAX, "negatives": {"full": True}}),
    "negatives unmasked": ("everything", {"loss": SOFTMAX, "negatives": {"mask_positives": False}}),
    **{f"pooling {p}": (f"pooling {p}", {"loss": SOFTMAX}) for p in ("mean", "sqrt", "sum", "power", "ridge")},
    **{f"pooling {p}": (f"pooling {p}", {"loss": SOFTMAX, "train": EARLIER, "model": READING}) for p in POOLINGS},
    "pooling decay": ("pooling decay", {"loss": SOFTMAX, "train": EARLIER}),
    "branch mlp": ("even", branch("mlp", layers=[9, 7], layer_norm=True)),
    "branch cross": ("even", branch("cross")),
    "branch cross, low rank": ("even", branch("cross", rank=2)),
    "branch fm": ("even", branch("fm", senet=SENET)),
    "branch cin": ("even", branch("cin", widths=[5, 4])),
    **{f"branch bilinear {m}": ("even", branch("bilinear", matrices=m)) for m in ("all", "each", "interaction")},
    "branch identity": ("even", branch("identity", senet=SENET | {"squeeze": "max"})),
    **{f"senet {s}": ("everything", {"model": pair(senet=SENET | {"squeeze": s})}) for s in ("mean", "sum", "max")},
    "tower, every option": (
        "everything",
        {
            "model": pair(
                senet=SENET, field_norm=True, layer_norm=True, residual=True, output_norm=True, layers=[16, 8],
                activation="SiLU", augment=True, dropout=0.2, field_dropout=0.1,
            )
        },
    ),
    "tower, fields summed": ("board", {"model": pair(join="sum", layers=[8, 8], activate_last=True)}),
    "two pairs": ("board", {"model": {"pairs": [{"user": {"layers": [8]}, "item": {"layers": [8]}}] * 2}}),
    "similarity dot": ("everything", {"model": {"similarity": "dot"}}),
    "similarity cosine, no bias": ("everything", {"model": {"bias": False, "learn_temperature": False}}),
    **{f"split {kind}": (f"split {kind}", {"loss": SOFTMAX}) for kind in ("random", "user_random", "last", "time",
        "user_ratio")},
    **{f"optimizer {o}": ("board", {"train": {"optimizer": o, "lr": 0.02}}) for o in ("Adam", "AdamW", "SGD",
        "Adagrad")},
    "schedules, decay, average": (
        "board",
        {
            "train": {
                "epochs": 2, "optimizer": "Adam", "lr": 0.02, "schedule": "cosine", "warmup_steps": 3,
                "weight_decay": 0.01, "clip_norm": 0.5,
                "embedding_weight_decay": 0.02, "bias_weight_decay": 0.01, "ema_decay": 0.9,
            }
        },
    ),
    "features of the context": ("context", {"loss": SOFTMAX, "negatives": {"uniform": 16}}),
    "features of the context, pairs": ("context", {"negatives": {"random": 2}}),
    "features of dates": ("dates", {"loss": SOFTMAX, "negatives": {"uniform": 9}}),
    "in shards": ("everything", {"negatives": {"random": 2}, "train": {"data_shards": 6}}),
}  # fmt: skip
"""Name -> the world, and the sections of the config that differ."""


def world(name: str) -> Dataset:
    """A made data set."""
    kind, _, what = name.partition(" ")
    if kind == "board":
        return build_dataset(check(*checkerboard(), CHECKERBOARD_SCHEMA), CHECKERBOARD_SCHEMA, Config().split)
    if kind == "split":
        split = SplitConfig(kind=what)
        return build_dataset(check(*everything(), EVERYTHING_SCHEMA), EVERYTHING_SCHEMA, split)
    if kind == "dates":
        users, items, actions = everything()
        released = pl.Series([f"20{10 + n % 9}-0{1 + n % 7}-1{n % 10}" for n in range(items.height)])
        tables = check(users, items.with_columns(released=released), actions, DATED)
        return build_dataset(tables, DATED, Config().split)
    if kind == "pooling":
        met = Sequence(name="met", side="user", width=8, pooling={"kind": what.split(",")[0]} | POOLINGS.get(what, {}))
        schema: Schema = CHECKERBOARD_SCHEMA.model_copy(update={"features": (*CHECKERBOARD_SCHEMA.features, met)})
        return build_dataset(check(*checkerboard(), schema), schema, Config().split)
    schema = {"even": EVEN, "context": IN_CONTEXT, "beside": BESIDE}.get(kind, EVERYTHING_SCHEMA)
    return build_dataset(check(*everything(), schema), schema, Config().split)


def training(name: str) -> Arrays:
    """Weights, history of metrics, vectors of both sides, and what their exported towers give."""
    where, sections = TRAININGS[name]
    data = world(where)
    sections = {k: dict(v) for k, v in sections.items()}
    # Plain steps keep rounding as small as it is; those of Adam make a small gradient as large as any.
    sections["train"] = {"epochs": 1, "batch_size": 128, "optimizer": "SGD", "lr": 0.1} | sections.get("train", {})
    trained = Trainer(data, settings(**sections)).run()
    model = trained.model.eval()
    found: Arrays = {f"weights {n}": p.detach().numpy() for n, p in model.named_parameters()}
    measured = ("train.loss", "validation.auc", "validation.recall@5")
    found["history"] = np.array([[entry[n] for n in measured] for entry in trained.history])
    factors = factors_before(model, data, 2)
    for side, vectors in zip(SIDES, (factors.users, factors.items), strict=True):
        found[f"vectors {side}"] = vectors.numpy()
        fields = data.encoders.fields(side)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "tower.onnx")
            export_tower(model, side, fields, path)
            columns = data.side_before(side, 2).columns
            rows = np.arange(min(len(vectors), 32))
            if data.context and side == "user":  # of the first interactions
                inputs = feed(fields, columns, rows, data.context, rows)
            else:
                inputs = feed(fields, columns, rows)
            found[f"onnx {side}"] = OnnxTower(path)(inputs)
    return found


def searches(kind: str, metric: Any) -> Arrays:
    """The best items for a few queries: of all, of some, and without some."""
    rng = np.random.default_rng(3)
    vectors, queries = (rng.standard_normal((n, 16)).astype(np.float32) for n in (600, 5))
    if metric == "cosine":
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    index = build_index(kind, vectors, np.arange(600, dtype=np.int64), metric)
    few = np.arange(0, 600, 7)
    banned = [np.arange(i, 600, 3) for i in range(5)]
    asked: dict[str, Any] = {"all": {}, "allowed": {"allowed": few}, "banned": {"banned": banned}}
    found: Arrays = {}
    for name, filters in asked.items():
        rows, scores = index.search(queries, 10, **filters)
        found |= {f"{name}, rows": rows, f"{name}, scores": scores}
    return found


REQUESTS: dict[str, tuple[str, str, Any]] = {
    "known user": ("POST", "/v1/recommend", {"user_id": "u3", "k": 5}),
    "method 2": ("POST", "/v1/recommend", {"user_id": "u3", "k": 5, "method": 2}),
    "features and history": (
        "POST", "/v1/recommend",
        {"features": {"city": "city1", "age": 30}, "history": ["i1", {"id": "i2", "liked": False}], "k": 5},
    ),
    "filters": (
        "POST", "/v1/recommend",
        {"user_id": "u4", "k": 5, "where": {"brand": "brand1"}, "ban": ["i1"], "keep_seen": True},
    ),
    "unknown user": ("POST", "/v1/recommend", {"user_id": "nobody", "k": 5}),
    "batch": ("POST", "/v1/recommend:batch", {"requests": [{"user_id": "u1"}, {"user_id": "u2", "method": 2}]}),
    "vector": ("POST", "/v1/embed/user", {"user_id": "u3", "method": 2}),
    "similar": ("GET", "/v1/items/i7/similar?k=5", None),
    "search": ("POST", "/v1/search", {"text": "more is more", "k": 5}),
    "event": ("POST", "/v1/events", {"user_id": "u5", "events": ["i1", "i9"]}),
    "after the event": ("POST", "/v1/recommend", {"user_id": "u5", "k": 5}),
}  # fmt: skip


def replies() -> Arrays:
    """Ids, scores and facts of the replies of a service, one request after another."""
    import httpx

    found: Arrays = {}
    with tempfile.TemporaryDirectory() as folder:
        tables = check(*everything(), EVERYTHING_SCHEMA)
        run = twotower.fit(tables, EVERYTHING_SCHEMA, settings(model=pair(senet=SENET)), folder=Path(folder, "run"))
        twotower.publish(run, Path(folder, "store"))

        async def ask() -> None:
            service = Service(ServeSettings(store=Path(folder, "store")))
            await service.bundles.refresh()
            transport = httpx.ASGITransport(create_app(service))
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                for name, (method, path, body) in REQUESTS.items():
                    reply = await client.request(method, path, json=body)
                    if not reply.is_success:
                        raise AssertionError(f"{name}: {reply.text}")
                    numbers, texts = _flat(reply.json())
                    found[f"{name}, numbers"] = np.array(numbers)
                    found[f"{name}, texts"] = np.array(texts, dtype=np.bytes_)
            await service.stop()

        asyncio.run(ask())
    return found


FORMER_FIELDS = {"recent_events": "live"}
"""Present name of a field of a reply -> the one it had when the numbers were kept, which is its place among the
others."""


def _former(item: tuple[str, Any]) -> str:
    return FORMER_FIELDS.get(item[0], item[0])


def _flat(value: Any, name: str = "") -> tuple[list[float], list[bytes]]:
    """Numbers and texts of a reply, in the order of its keys; times and ids of bundles differ and are left out."""
    if name in ("milliseconds", "bundle_id"):
        return [], []
    if isinstance(value, Mapping | list):
        inner = sorted(value.items(), key=_former) if isinstance(value, Mapping) else [("", v) for v in value]
        parts = [_flat(v, k) for k, v in inner]
        return [n for p in parts for n in p[0]], [t for p in parts for t in p[1]]
    if isinstance(value, str):
        return [], [value.encode()]
    return [float(value if value is not None else -1)], []


def _training(name: str) -> Callable[[], Arrays]:
    return lambda: training(name)


def _searches(kind: str, metric: str) -> Callable[[], Arrays]:
    return lambda: searches(kind, metric)


CASES: dict[str, Callable[[], Arrays]] = {
    **{name: _training(name) for name in TRAININGS},
    **{
        f"index {kind} {metric}": _searches(kind, metric)
        for kind in ("exact", "ivf", "hnsw", "ivfpq") for metric in ("cosine", "dot")
    },
    "replies": replies,
}  # fmt: skip


PORTABLE = [case for case in CASES if not case.startswith(("index ivf", "index hnsw"))]
"""Cases whose numbers are those of every processor: where an approximate index cuts is decided by rounding."""


def digest(array: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Shape, hash of the bits, and a few numbers: sums of values and of their sizes, and values spread over the
    array."""
    made: dict[str, Any] = {
        "shape": list(array.shape),
        "sha256": hashlib.sha256(f"{array.dtype}".encode() + np.ascontiguousarray(array).tobytes()).hexdigest()[:24],
    }
    if array.dtype.kind in "fiu":
        flat = array.astype(np.float64).ravel()
        flat = flat[np.isfinite(flat)]
        spread = flat[np.linspace(0, len(flat) - 1, min(NUMBERS - 2, len(flat))).astype(int)] if len(flat) else flat
        made["numbers"] = [float(f"{v:.9g}") for v in (flat.sum(), np.abs(flat).sum(), *spread)]
    return made


def numbers(arrays: Arrays) -> dict[str, list[float]]:
    """What is compared on any machine: of the weights one number each, of other arrays a few."""
    found = {name: digest(a)["numbers"] for name, a in arrays.items() if a.dtype.kind == "f" and "weights" not in name}
    if sizes := [float(np.abs(a.astype(np.float64)).sum()) for name, a in arrays.items() if "weights" in name]:
        found["weights"] = [float(f"{v:.9g}") for v in sizes]
    return found


def record(case: str) -> dict[str, dict[str, Any]]:
    """The digests of one case."""
    torch.set_num_threads(1)
    return {name: digest(array) for name, array in CASES[case]().items()}


def ranks() -> Digests:
    """The digests of what two ranks train, with whole tables and with tables in pieces."""
    with tempfile.TemporaryDirectory() as folder:
        cases = [*ranked.CASES, *ranked.TORCHREC]
        subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
             str(Path(ranked.__file__)), folder, *cases],
            check=True,
        )  # fmt: skip
        return {
            f"two ranks, {case}": {n: digest(a) for n, a in np.load(Path(folder, f"{number}-0.npz")).items()}
            for number, case in enumerate(cases)
        }


def differences(old: Digests, new: Digests) -> list[str]:
    """A line for each array that is another, is gone, or is new."""
    before, after = (
        {f"{case}: {name}": found for case, arrays in of.items() for name, found in arrays.items()} for of in (old, new)
    )
    lines = [f"{name}: gone" for name in before if name not in after]
    lines += [f"{name}: new" for name in after if name not in before]
    for name in sorted(before.keys() & after.keys()):
        if before[name] != after[name]:
            lines.append(f"{name}: {before[name]} is now {after[name]}")
    return lines


def main(arguments: list[str]) -> int:
    match arguments:
        case ["record", file, *rest]:
            found = {case: record(case) for case in CASES} | (ranks() if "--ranks" in rest else {})
            Path(file).write_text(json.dumps(found, indent=0) + "\n", encoding="utf-8")
            return 0
        case ["numbers"]:
            torch.set_num_threads(1)
            lines = [f"{json.dumps(case)}: {json.dumps(numbers(CASES[case]()))}" for case in PORTABLE]
            FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
            return 0
        case ["compare", old, new]:
            lines = differences(*(json.loads(Path(p).read_text(encoding="utf-8")) for p in (old, new)))
            print("\n".join(lines) or "every bit is the same")
            return min(len(lines), 1)
    print(__doc__)
    return 2


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
