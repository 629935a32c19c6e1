"""Every option has an effect: changing it changes an output."""

from __future__ import annotations

import copy
from typing import Any

import mykinds.metrics  # noqa: F401
import numpy as np
import pytest
from worlds import EVERYTHING_SCHEMA, everything

import twotower
from twotower.config.experiment import Config
from twotower.config.reference import config_tables, schema_tables
from twotower.config.toml import parse_config
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.datasets import DATASETS
from twotower.data.split import SplitConfig
from twotower.data.tables import check
from twotower.features.feature import Feature
from twotower.features.schema import Schema
from twotower.features.sequence import Sequence
from twotower.features.text import Text
from twotower.index import build_index
from twotower.model import branches
from twotower.model.pooling import POOLINGS
from twotower.model.pooling.attention import Attention
from twotower.model.pooling.transformer import Transformer

TABLES = everything()
SIDES_OF_PAIR: dict[str, Any] = {name: {"layers": [8, 8], "senet": {"enabled": True}} for name in ("user", "item")}
BASE: dict[str, Any] = {
    "model": {"width": 8, "pairs": [SIDES_OF_PAIR]},
    "negatives": {"random": {"n": 2}},
    "train": {
        "epochs": 2, "batch_size": 400, "lr": 0.02, "device": "cpu", "precision": "fp32",
        "optimizer": {"kind": "AdamW"},
    },
    "evaluation": {"k": [5], "bootstrap": 10},
}  # fmt: skip
SMALL: dict[str, Any] = {"train.batch_size": 200}
"""More steps."""
CANDIDATES: dict[str, Any] = {"loss.kind": "softmax", "negatives.random": 0}
FEW = CANDIDATES | {"negatives.in_batch": False, "negatives.uniform": 10}
TWO_PAIRS = {
    "model.pairs": [{"user": {"layers": [4]}, "item": {"layers": [4]}}] * 2, "model.bias": False,
    "model.similarity": "dot",
}  # fmt: skip
HARD = CANDIDATES | {
    "negatives.hard.n": 2, "negatives.hard.ranks": [1, 10], "negatives.hard.ratio": 10, "train.epochs": 5,
}  # fmt: skip

# Option -> a value that is not the base's, and what else must be set for it to matter.
CHANGES: dict[str, tuple[Any, dict[str, Any]]] = {
    "split.kind": ("time", {}),
    "split.test": (0.3, {}),
    "split.validation": (0.2, {}),
    "split.seed": (5, {}),
    "split.gap": (5_000.0, {"split.kind": "time"}),
    "split.users": (0.5, {"split.kind": "last"}),
    "model.width": (12, {}),
    "model.similarity": ("dot", {}),
    "model.temperature": (0.5, {}),
    "model.learn_temperature": (False, {}),
    "model.bias": (False, {}),
    "model.unknown_rate": (0.3, {}),
    "model.user_id_dropout": (0.4, {}),
    "model.item_id_dropout": (0.4, {}),
    "model.embedding_std": (0.2, {}),
    "model.stacking": (True, {}),
    "model.cold_item_bias": (True, {}),
    "evaluation.metrics": (["mykinds.metrics:TailShare"], {}),
    "narrow.width": (4, {}),
    "model.pairs.user.branches": ([{"kind": "identity"}, {"kind": "cross"}], {}),
    "model.pairs.user.augment": (True, {}),
    "model.pairs.user.fields": (["uid", "city"], {}),
    "model.pairs.user.width": (4, {"schema_width": True}),
    "model.pairs.user.join": ("sum", {"model.pairs.user.senet.enabled": False}),
    "model.pairs.user.layers": ([16, 8], {}),
    "model.pairs.user.activation": ("Tanh", {}),
    "model.pairs.user.activate_last": (True, {}),
    "model.pairs.user.dropout": (0.4, {}),
    "model.pairs.user.field_dropout": (0.4, {}),
    "model.pairs.user.weight_decay_scale": (5.0, {"train.embedding_weight_decay": 0.5}),
    "model.pairs.user.layer_norm": (True, {}),
    "model.pairs.user.output_norm": (True, {}),
    "model.pairs.user.field_norm": (True, {}),
    "model.pairs.user.residual": (True, {}),
    "model.pairs.user.senet.enabled": (False, {}),
    "model.pairs.user.senet.squeeze": ("max", {}),
    "model.pairs.user.senet.reduction": (1.0, {}),
    "loss.kind": ("softmax", {"negatives.random": 0}),
    "loss.mimic": (0.1, {"model.pairs.user.augment": True}),
    "negatives.full": (True, CANDIDATES),
    "negatives.in_batch": (True, FEW),
    "negatives.uniform": (20, CANDIDATES),
    "negatives.uniform.n": (20, CANDIDATES | {"negatives.uniform": {}}),
    "negatives.popularity": (20, CANDIDATES),
    "negatives.popularity.n": (20, CANDIDATES | {"negatives.popularity.alpha": 0.5}),
    "negatives.popularity.alpha": (0.0, CANDIDATES | {"negatives.popularity.n": 20}),
    "negatives.cross_batch_memory": (100, CANDIDATES | SMALL),
    "negatives.cross_batch_memory.n": (100, CANDIDATES | SMALL | {"negatives.cross_batch_memory": {}}),
    "negatives.disliked": (2, CANDIDATES),
    "negatives.disliked.n": (2, CANDIDATES | {"negatives.disliked": {}}),
    "negatives.hard": ({"n": 1, "ranks": [1, 10], "ratio": 10}, CANDIDATES | {"train.epochs": 5}),
    "negatives.hard.n": (1, HARD),
    "negatives.hard.ranks": ([5, 20], HARD),
    "negatives.hard.ratio": (200.0, HARD),
    "negatives.hard.every": (2, HARD | SMALL | {"train.lr": 0.05}),
    "negatives.hard.margin": (2.0, HARD),
    "negatives.attribute": ("brand", CANDIDATES),
    "negatives.attribute.feature": ("tags", CANDIDATES | {"negatives.attribute.feature": "brand"}),
    "negatives.attribute.n": (4, CANDIDATES | {"negatives.attribute.feature": "brand"}),
    "negatives.mask_positives": (False, CANDIDATES),
    "negatives.random": (3, {}),
    "negatives.random.n": (3, {}),
    "negatives.random.share": (0.6, {}),
    "train.epochs": (4, {}),
    "train.batch_size": (100, {}),
    "train.data_shards": (4, {}),
    "train.history_scope": ("causal", CANDIDATES | {"causal_schema": True}),
    "train.pairs": ("apart", CANDIDATES | TWO_PAIRS),
    "train.shuffle": (False, {}),
    "train.optimizer.kind": ("SGD", {}),
    "train.lr": (0.1, {}),
    "train.weight_decay": (1.0, {}),
    "train.embedding_weight_decay": (1.0, {}),
    "train.bias_weight_decay": (1.0, {}),
    "train.schedule": ("cosine", {}),
    "train.warmup_steps": (4, {}),
    "train.lr_decay_rate": (0.1, SMALL | {"train.schedule": "step"}),
    "train.lr_decay_epochs": (2, SMALL | {"train.schedule": "step"}),
    "train.clip_norm": (0.01, {}),
    "train.ema_decay": (0.9, {}),
    "train.monitor": ("validation.mrr@5", {"train.lr": 0.2, "train.epochs": 6}),
    "train.patience": (1, {"train.lr": 0.3, "train.epochs": 12}),
    "train.validate_every": (2, {}),
    "train.precision": ("bf16", {}),
    "train.seed": (9, {}),
    "evaluation.k": ([3], {}),
    "evaluation.max_users": (9, {}),
    "evaluation.bootstrap": (20, {}),
    "evaluation.slices": (["city"], {"evaluation.slice_min_users": 2}),
    "evaluation.slice_min_users": (2, {"evaluation.slices": ["city"]}),
    "evaluation.head_share": (0.5, {}),
    "evaluation.new_user_below": (15, {}),
    "evaluation.new_item_below": (25, {}),
}
# Section, kind and option -> a value that is not the default, and what else must be set for it to matter.
OF_KINDS: dict[tuple[str, str, str], tuple[Any, dict[str, Any]]] = {
    ("loss", "softmax", "log_q"): (False, {"negatives.random": 0}),
    ("loss", "gbce", "calibration"): (0.1, FEW),
    ("train.optimizer", "Adam", "beta2"): (0.9, {}),
    ("train.optimizer", "AdamW", "beta2"): (0.9, {}),
}
# Kind of a branch and option -> a value that is not the default.
BRANCHES: dict[tuple[str, str], Any] = {
    ("mlp", "layers"): [8, 8], ("mlp", "activation"): "Tanh", ("mlp", "dropout"): 0.4, ("mlp", "layer_norm"): True,
    ("cross", "depth"): 3, ("cross", "rank"): 2, ("cin", "widths"): [4], ("bilinear", "matrices"): "each",
}  # fmt: skip
# Kind of an index and option -> a value that is not the default.
INDEXES = {("ivf", "nlist"): 3, ("ivfpq", "nlist"): 3, ("hnsw", "m"): 2, ("hnsw", "ef_construction"): 1}
# Tested elsewhere: the source of the data in test_api and test_cli, a prepared dataset in data/test_prepare, devices
# and checkpoints in train/test_trainer, the timeout of ranks in test_distributed, the placement of tables in
# train/torchrec, the index of a published model in test_publishing, all of Milvus in index/test_milvus, given parts in
# data/test_parts, weights in evaluation/test_metrics_weighted, cold candidates in train/negatives/test_mixture, forms
# of text in data/test_text_format, repeats in scorers, and scorers in config/test_scorers.
ELSEWHERE = {
    "data.dataset.kind", "data.users", "data.items", "data.interactions", "data.train", "data.validation", "data.test",
    "data.format.separator", "data.format.separators", "data.format.decimal", "data.format.encoding",
    "data.format.columns", "data.format.layout", "data.buckets", "data.prepared", "split.column", "split.ordered",
    "split.from_train", "evaluation.weighted", "evaluation.repeats", "negatives.full.cold", "negatives.uniform.cold",
    "scorers.kind", "train.device", "train.refit",
    "train.timeout", "train.embedding_placement", "train.embedding_sharding", "train.checkpoint_seconds",
    "train.checkpoint_steps", "index.kind", "index.min_recall", "index.k", "index.queries",
}  # fmt: skip


def put(body: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    node: Any = body
    for step in path:
        node = node.setdefault(step, {})
        if isinstance(node, list):
            node = node[0]
    node[last] = value


OUTCOMES: dict[str, dict[str, Any]] = {}
MADE: dict[str, Dataset] = {}


def outcome(changes: dict[str, Any]) -> dict[str, Any]:
    """Metrics and weights of a training with changed options; each is trained once."""
    key = repr(sorted(changes.items()))
    if key not in OUTCOMES:
        OUTCOMES[key] = trained(changes)
    return OUTCOMES[key]


def dataset(schema: Schema, split: SplitConfig) -> Dataset:
    """The tables by a schema and a split; of each they are read once."""
    key = schema.model_dump_json() + split.model_dump_json()
    if key not in MADE:
        MADE[key] = build_dataset(check(*TABLES, schema), schema, split)
    return copy.deepcopy(MADE[key])


def trained(changes: dict[str, Any]) -> dict[str, Any]:
    changes, body = copy.deepcopy(changes), copy.deepcopy(BASE)
    features: tuple[Feature, ...] = tuple(f for f in EVERYTHING_SCHEMA.features if not isinstance(f, Text))
    schema = EVERYTHING_SCHEMA.model_copy(update={"features": features})
    if changes.pop("schema_width", False):  # a shared sequence takes its width from the item side
        body["model"]["pairs"][0]["user"]["fields"] = ["uid", "city"]
    if changes.pop("causal_schema", False):  # without the sequences that a causal history does not allow
        schema = schema.model_copy(
            update={"features": tuple(f for f in schema.features if f.name not in ("disliked", "fans"))}
        )
    if text := changes.pop("text", None):
        label = text.pop("label")
        made: dict[str, Feature] = {"motto": Text(name="motto", side="user", **text), "label": label}
        features = tuple(made.get(f.name, f) for f in EVERYTHING_SCHEMA.features)
        schema = schema.model_copy(update={"features": features})
    if feature := changes.pop("history", None):
        features = tuple(f for f in schema.features if not isinstance(f, Sequence))
        features = (*features, Sequence(name="history", side="user", **feature))
        schema = schema.model_copy(update={"features": features})
    for key, value in changes.items():
        put(body, key, value)
    _, config = parse_config(body)
    done = twotower.fit(dataset(schema, config.split), schema, config)
    drop = {"train.seconds", "train.rows_per_second", "train.peak_memory_mb"}
    weights = {n: round(float(p.detach().double().abs().sum()), 9) for n, p in done.model.named_parameters()}
    validations = {"validations": sum("validation.auc" in h for h in done.history)}
    return {m: v for m, v in done.metrics.items() if m not in drop} | weights | validations


def test_every_option_is_covered() -> None:
    known = {
        f"{table.name}.{option.key}".replace("branches.kind", "branches").replace("metrics.kind", "metrics")
        for table in config_tables()
        if not table.kind
        for option in table.options
    }
    assert known == CHANGES.keys() | ELSEWHERE


@pytest.mark.parametrize("key", sorted(CHANGES))
def test_changing_an_option_changes_an_output(key: str) -> None:
    value, also = CHANGES[key]
    before = outcome(dict(also))
    after = outcome({**also, key: value})
    assert before != after
    if key.startswith("model.pairs.user") and key != "model.pairs.user.width":
        assert outcome({**_mirrored(also), key.replace("user", "item"): _mirror(value)}) != before


@pytest.mark.parametrize("of", sorted(OF_KINDS), ids=".".join)
def test_changing_an_option_of_a_kind_changes_an_output(of: tuple[str, str, str]) -> None:
    (section, kind, option), (value, also) = of, OF_KINDS[of]
    base = also | {f"{section}.kind": kind}
    assert outcome(base) != outcome(base | {f"{section}.{option}": value})


def test_every_option_of_a_kind_is_covered() -> None:
    known = {(t.name, t.kind, option.key) for t in config_tables() if t.kind for option in t.options}
    of_milvus = {of for of in known if of[:2] == ("index", "milvus")}
    of_branches = {("model.pairs.user.branches", *of) for of in BRANCHES}
    known -= {("data.dataset", kind, "archive") for kind in DATASETS.names}  # in data/datasets
    known -= {of for of in known if of[0] == "scorers"}  # in scorers
    known -= {("index", "exact", "store")}  # in index/test_exact: no answer changes
    known -= {("evaluation.metrics", "diversity", "column")}  # in evaluation/test_metrics_beyond_accuracy
    assert known == OF_KINDS.keys() | of_branches | {("index", *of) for of in INDEXES} | of_milvus


@pytest.mark.parametrize(("kind", "option"), INDEXES)
def test_changing_an_option_of_an_index_changes_what_it_finds(kind: str, option: str) -> None:
    vectors = np.random.default_rng(0).standard_normal((900, 8)).astype(np.float32)

    def found(**options: int) -> Any:
        index = build_index(kind, vectors, np.arange(900), "dot", options)
        index.search_params.update(dict.fromkeys(index.search_params, 1))
        return index.search(vectors[:50], 10)[0]

    assert (found() == found()).all()
    assert (found() != found(**{option: INDEXES[kind, option]})).any()


@pytest.mark.parametrize(
    ("kind", "option", "value"),
    [(*of, value) for of, value in BRANCHES.items()]
    + [(kind, "senet", {"enabled": True}) for kind in branches.BRANCHES.names],
)
def test_changing_an_option_of_a_branch_changes_an_output(kind: str, option: str, value: Any) -> None:
    key = "model.pairs.user.branches"
    assert outcome({key: [{"kind": kind}]}) != outcome({key: [{"kind": kind, option: value}]})


@pytest.mark.parametrize(
    ("options", "other"),
    [
        ({}, {"interactions": "positive"}),
        ({}, {"pooling": "decay"}),
        ({}, {"share_embedding": False}),
        ({"pooling": Attention(window=9)}, {"pooling": Transformer(window=9)}),
        ({"pooling": "decay", "interactions": "positive"}, {"pooling": "decay", "interactions": "negative"}),
    ],
)
def test_changing_an_option_of_a_sequence_that_is_had_at_every_moment_changes_an_output(
    options: dict[str, Any], other: dict[str, Any]
) -> None:
    base = CANDIDATES | {"train.history_scope": "causal"}
    assert outcome(base | {"history": {"interactions": "all"} | options}) != outcome(
        base | {"history": {"interactions": "all"} | other}
    )


# Option of a pooling -> a value that is not the default.
POOLED: dict[tuple[str, str], Any] = {
    ("power", "exponent"): 0.8, ("ridge", "steps"): 1, ("ridge", "penalty"): 4.0, ("ridge", "rate"): 0.5,
    ("decay", "rates"): [0.0, 0.5, 0.8, 0.93, 0.98, 0.99], ("attention", "window"): 2, ("attention", "heads"): 2,
    ("attention", "input_dropout"): 0.5, ("transformer", "window"): 2, ("transformer", "block"): "plain",
    ("transformer", "blocks"): 1, ("transformer", "heads"): 2, ("transformer", "feed_forward"): 1,
    ("transformer", "dropout"): 0.5, ("transformer", "input_dropout"): 0.5,
}  # fmt: skip


def test_every_option_of_a_pooling_is_covered() -> None:
    assert {
        (table.kind, option.key)
        for table in schema_tables()
        if table.name == "schema.features.pooling" and table.kind
        for option in table.options
    } | {(kind.kind, "window") for kind in POOLINGS if kind.reads_windows} == POOLED.keys()


@pytest.mark.parametrize(("kind", "option", "value"), [(*of, value) for of, value in POOLED.items()])
def test_changing_an_option_of_a_pooling_changes_an_output(kind: str, option: str, value: Any) -> None:
    options = {"kind": kind} | ({"window": 9} if POOLINGS.find(kind).reads_windows else {})
    base = CANDIDATES | {"train.history_scope": "causal"}
    assert outcome(base | {"history": {"pooling": options}}) != outcome(
        base | {"history": {"pooling": options | {option: value}}}
    )


@pytest.mark.parametrize(
    "other",
    [
        {"n": 2}, {"max_grams": 5}, {"min_count": 200}, {"hash_buckets": 9}, {"pooling": "mean"}, {"pooling": "sqrt"},
        {"max_length": 3}, {"distinct": True}, {"width": 4}, {"column": "city"}, {"share_with": "label"},
    ],
)  # fmt: skip
def test_changing_an_option_of_a_text_changes_an_output(other: dict[str, Any]) -> None:
    def told(**options: Any) -> dict[str, Any]:
        return outcome({"train.epochs": 1, "text": options})

    label = Text(name="label", side="item", column="name", width=other.get("width", 0))
    assert told(label=label) != told(label=label, **other)


def _mirror(value: Any) -> Any:
    return ["iid", "brand"] if value == ["uid", "city"] else value


def _mirrored(also: dict[str, Any]) -> dict[str, Any]:
    return {k.replace("pairs.user", "pairs.item"): v for k, v in also.items()}


def test_the_same_settings_give_the_same_outputs() -> None:
    assert outcome({}) == trained({})


def test_defaults_are_in_range() -> None:
    assert Config() == parse_config({})[1]
