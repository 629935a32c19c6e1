"""Settings and schema: TOML out and in, overrides, and every mistake named with what is allowed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from mykinds.negatives import Recent
from worlds import CHECKERBOARD_SCHEMA, EVERYTHING_SCHEMA, ID_FEATURES, settings

from twotower.config.experiment import Config, differing_options
from twotower.config.toml import dump_config, load_config, override_config, parse_config
from twotower.data.datasets import movielens
from twotower.data.datasets.ml_1m import MovieLens1M
from twotower.errors import ConfigError, did_you_mean
from twotower.features.categorical import Categorical
from twotower.features.multi_hot import MultiHot
from twotower.features.numeric import Numeric
from twotower.features.schema import Schema
from twotower.features.sequence import Sequence
from twotower.features.text import Text
from twotower.features.vector import Vector
from twotower.index.faiss.ivf import Ivf
from twotower.model.pooling.decay import Decay
from twotower.train.losses.bce import Bce
from twotower.train.losses.softmax import Softmax
from twotower.train.negatives.full import FullCatalogue
from twotower.train.negatives.hard import HardNegatives
from twotower.train.negatives.in_batch import InBatchNegatives
from twotower.train.optimizers.adamw import AdamW

IDS_TOML = """
[schema]
[[schema.features]]
name = "user_id"
side = "user"
kind = "categorical"
[[schema.features]]
name = "item_id"
side = "item"
kind = "categorical"
"""

EVERY_OPTION = Schema(
    user_id="käufer", item_id="ware", label="y", positive_above=-0.5, time="t", time_unit="us", title="名前",
    duplicates="error",
    features=(
        Categorical(name="u", side="user", column="käufer", width=8, missing="error", min_count=3, min_rate=0.25),
        Categorical(name="h", side="user", hash_buckets=1000),
        Numeric(name="n", side="user", buckets=7),
        Numeric(name="m", side="item", statistic="mean", statistic_column="price"),
        Numeric(name="c", side="item", statistic="count"),
        MultiHot(name="g", side="item", separator="\\n|\"'", min_count=2, min_rate=0.5),
        Vector(name="v", side="item", length=4),
        Sequence(name="s", side="item", interactions="negative", max_length=9, pooling="sum", share_embedding=True),
        Sequence(name="d", side="user", pooling=Decay(rates=(0.0, 0.25, 1.0)), share_embedding=False),
        Text(name="x", side="item", n=4, max_grams=70, min_count=2, hash_buckets=5, pooling="sqrt", max_length=0),
        Text(name="y", side="user", column="z", share_with="x"),
    ),
)  # fmt: skip

EVERY_SETTING = parse_config(
    {
        "data": {"users": "/u.csv", "items": "/i.csv", "interactions": "/a.parquet"},
        "split": {"kind": "time", "test": 1 / 3, "validation": 1e-9, "seed": 2**32 - 1},
        "model": {
            "width": 3, "similarity": "dot", "temperature": 1e-5, "learn_temperature": False, "bias": False,
            "unknown_rate": 0.0, "embedding_std": 1e22,
            "pairs": [
                {"user": {"fields": ["a", 'b"c'], "layers": [], "senet": {"enabled": True, "reduction": 3}}},
                {"item": {"join": "sum", "activation": "GELU", "dropout": 0.25, "layer_norm": True, "layers": [5]}},
                {},
            ],
        },
        "loss": {"kind": "gbce", "calibration": 0.5},
        "negatives": {
            "in_batch": False, "uniform": 4, "popularity": {"n": 3, "alpha": 0.5}, "cross_batch_memory": 9,
            "disliked": 1,
            "hard": {"n": 2, "ranks": [7, 9], "ratio": 8.5, "every": 3, "margin": 0.5},
            "attribute": {"feature": "g", "n": 2}, "mask_positives": False, "random": {"n": 2, "share": 0.75},
        },
        "train": {
            "history_scope": "causal", "monitor": "validation.ndcg@7", "clip_norm": 0.1, "precision": "bf16",
            "device": "cuda",
        },
        "evaluation": {"k": [7, 3], "bootstrap": 0},
    }
)[1]  # fmt: skip


def written(folder: Path, text: str) -> Path:
    path = folder / "config.toml"
    path.write_text(text, encoding="utf-8")
    return path


def refused(path: Path, overrides: list[str], *words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


# --- round trips --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [Config(), EVERY_SETTING], ids=["defaults", "every setting"])
@pytest.mark.parametrize(
    "schema",
    [CHECKERBOARD_SCHEMA, EVERYTHING_SCHEMA, movielens.SCHEMA, EVERY_OPTION],
    ids=["ids", "everything", "movielens", "every option"],
)
def test_dumped_settings_load_as_equal_ones(tmp_path: Path, schema: Schema, config: Config) -> None:
    assert load_config(written(tmp_path, dump_config(schema, config))) == (schema, config)


def test_a_file_may_be_empty_or_leave_out_the_schema(tmp_path: Path) -> None:
    assert load_config(written(tmp_path, "")) == (None, Config())
    assert load_config(written(tmp_path, "[train]\nepochs = 3"))[1].train.epochs == 3


def test_a_written_config_carries_its_format_and_one_of_another_format_is_refused(tmp_path: Path) -> None:
    text = dump_config(CHECKERBOARD_SCHEMA, Config())
    assert text.startswith("format = 4\n")
    assert load_config(written(tmp_path, "format = 4"))[1] == Config()
    for form in ("2", "99", "'2'", "true", "[]"):
        path = written(tmp_path, text.replace("format = 4", f"format = {form}"))
        refused(
            path,
            [],
            f"{path}: format ",
            "this version reads 4; begin with the keys of `config_template(everything=True)`",
        )
    refused(written(tmp_path, ""), ["format=1"], "format 1, this version reads 4")


def test_paths_in_data_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    path = written(Path("here"), '[data]\nusers = "u.csv"\ninteractions = "../a.csv"\nitems = "/i.csv"')
    data = load_config(path)[1].data
    assert (data.users, data.items, data.interactions) == (f"{tmp_path}/here/u.csv", "/i.csv", f"{tmp_path}/a.csv")
    named = written(Path("here"), '[data]\ndataset = { kind = "ml-1m", archive = "m.zip" }')
    assert load_config(named)[1].data.dataset == MovieLens1M(archive=f"{tmp_path}/here/m.zip")
    assert load_config(written(Path("here"), ""))[1].data.users == ""


# --- overrides ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("train.lr=1e-2", 0.01),
        ("evaluation.k=[5, 10]", (5, 10)),
        ("data.interactions=/data/a=b.csv", "/data/a=b.csv"),
        ("data.users=", ""),
        ("model.pairs.0.user.dropout=0.5", 0.5),
        (" split.seed = 7", 7),
    ],
)
def test_an_override_sets_one_option(tmp_path: Path, text: str, value: Any) -> None:
    config: Any = load_config(written(tmp_path, ""), [text])[1]
    changed = Config().model_dump()
    node: Any = changed
    found = config
    *steps, last = text.split("=", 1)[0].strip().split(".")
    for step in steps:
        node = node[int(step)] if step.isdigit() else node[step]
        found = found[int(step)] if step.isdigit() else getattr(found, step)
    assert getattr(found, last) == value
    node[last] = value
    if last != "k":  # the monitor must be one of the cut-offs, so all else is the default
        assert config.model_dump() == changed


def test_an_override_names_another_kind_of_a_section() -> None:
    hnsw = parse_config({"index": {"kind": "hnsw", "k": 7}})[1]
    changed = override_config(hnsw, ["index.kind=ivf", "index.nlist=5"]).index
    assert changed.model_dump() == {"kind": "ivf", "min_recall": 0.95, "k": 7, "queries": 1000, "nlist": 5}
    assert override_config(hnsw, ["index.m=4"]).index.params == {"m": 4, "ef_construction": 100}


def test_another_kind_meets_no_defaults_of_the_former_one_in_a_written_config(tmp_path: Path) -> None:
    config = Config(loss=Softmax(mimic=0.0), index=Ivf(nlist=8))
    path = written(tmp_path, dump_config(EVERYTHING_SCHEMA, config))
    assert load_config(path, ["loss.kind=bce", "train.optimizer.kind=SGD"])[1].loss == Bce()
    refused(path, ["index.kind=hnsw"], "unknown key 'index.nlist'")
    assert override_config(config, ["evaluation.k.0=5"]).evaluation.k == (5, 50)


def test_an_override_reaches_into_a_kind_that_is_named_alone_and_into_a_quoted_key(tmp_path: Path) -> None:
    path = written(tmp_path, 'loss = "softmax"\n[train]\noptimizer = "AdamW"\n')
    changed = load_config(path, ["train.optimizer.beta2=0.5", 'negatives."mykinds.negatives:Recent".n=3'], trust=True)[
        1
    ]
    assert changed.train.optimizer == AdamW(beta2=0.5)
    assert changed.negatives.sources[-1] == Recent(n=3)


def test_overrides_apply_in_order_to_pairs_features_and_schema(tmp_path: Path) -> None:
    two = "[[model.pairs]]\nuser.dropout = 0.1\n[[model.pairs]]\n" + IDS_TOML
    schema, config = load_config(
        written(tmp_path, two),
        ["model.pairs.1.user.dropout=0.2", "model.pairs.1.user.dropout=0.3", "schema.time=at",
         "schema.features.1.min_count=4"],
    )  # fmt: skip
    assert [b.user.dropout for b in config.model.pairs] == [0.1, 0.3]
    assert schema is not None
    assert schema.time == "at"
    assert schema.features[1] == Categorical(name="item_id", side="item", min_count=4)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train.epochs", "`overrides` train.epochs: expected key=value, such as train.epochs=3"),
        ("train.epochs.x=1", "'train.epochs' is a value, not a section"),
        ("model.pairs.1.user.dropout=0.5", "expected an index 0..0 instead of '1'"),
        ("model.pairs.user.dropout=0.5", "expected an index 0..0 instead of 'user'"),
        ("trian.epochs=1", "unknown section 'trian'; did you mean 'train'?"),
        ("train.epoch=1", "unknown key 'train.epoch'; did you mean 'epochs'?"),
    ],
)
def test_a_bad_override_is_refused(tmp_path: Path, text: str, words: str) -> None:
    refused(written(tmp_path, "[train]\nepochs = 2\n[[model.pairs]]"), [text], words)


# --- mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[modle]", ["unknown section 'modle'; did you mean 'model'? (allowed: data, split, model"]),
        ("epochs = 3", ["unknown section 'epochs'"]),
        (
            "[[model.pairs]]\n[[model.pairs]]\n[model.pairs.item.senet]\nreductoin = 1",
            ["unknown key 'model.pairs.1.item.senet.reductoin'; did you mean 'reduction'? (allowed: enabled, squ"],
        ),
        ("[schema]\nuserid = 'u'\nfeatures = []", ["unknown key 'schema.userid'; did you mean 'user_id'?"]),
    ],
)
def test_an_unknown_section_or_key_is_named_with_the_nearest(tmp_path: Path, text: str, words: list[str]) -> None:
    refused(written(tmp_path, text), [], str(tmp_path), *words)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.epochs=-1", ["train.epochs: input should be greater than or equal to 0, got -1"]),
        ("train.lr=nan", ["train.lr: input should be a finite number"]),
        ("train.device=gpu", ["train.device: input should be 'auto', 'cpu', 'cuda' or 'mps', got 'gpu'"]),
        ("model.pairs.0.user.layers=[8, 0]", ["pairs.0.user.layers.1: input should be greater than or equal to"]),
        ("train.monitor=validation.acu", ["'validation.acu' is not measured; did you mean 'auc'?", "recall@50"]),
        (
            "train.pairs=apart",
            ["train.pairs = 'apart' trains each pair alone, and model.pairs has one pair; add another"],
        ),
        ("train.monitor=test.auc", ["train.monitor 'test.auc' is not measured", "allowed: validation. followed by"]),
        ("schema=3", ["schema: input should be a valid dictionary", "got 3"]),
        (
            "schema.features.0.kind=numerc",
            ["schema.features.0.kind: no feature of kind 'numerc'; did you mean 'numeric'? (allowed: categorical"],
        ),
    ],
)
def test_a_value_of_another_type_or_range_is_named_with_what_is_allowed(
    tmp_path: Path, override: str, words: list[str]
) -> None:
    path = written(tmp_path, IDS_TOML)
    refused(path, [override], str(path), *words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[schema]\nfeatures = [{name = 'a', side = 'user'}]", "schema.features.0.kind: missing (allowed: categorical"),
        ("[data]\ndataset = 'ml-1m'\nusers = 'u'", "give either data.dataset or data.interactions"),
        ("[[model.pairs]]\nuser = {join = 'sum', senet = {enabled = true}}", "pairs.0.user: senet needs join"),
        (
            "[[model.pairs]]\nitem = {residual = true, layers = []}",
            "pairs.0.item: residual needs layers, and layers is empty",
        ),
        pytest.param("data.users = " + "[" * 20_000, "not valid TOML: lists or tables nested too deep", id="deep"),
        ('data.interactions = "C:\\Users\\clicks.csv"', "a backslash begins an escape: write a path with /"),
    ],
)
def test_a_setting_that_is_missing_or_does_not_go_with_another_is_refused(
    tmp_path: Path, text: str, words: str
) -> None:
    refused(written(tmp_path, text), [], words)


def test_a_byte_order_mark_and_line_ends_of_windows_change_nothing(tmp_path: Path) -> None:
    text = "\ufeff[train]\r\nepochs = 7\r\n"
    (path := tmp_path / "c.toml").write_bytes(text.encode())
    assert load_config(path)[1].train.epochs == 7
    assert load_config(path, [f"data.users={'[' * 20_000}"])[1].data.users.endswith("[[")


CANDIDATES = {"uniform": 5, "popularity": 5, "cross_batch_memory": 5, "disliked": 1, "hard": 1, "attribute": "genre"}


@pytest.mark.parametrize("source", CANDIDATES)
def test_a_source_of_candidates_goes_with_a_contrastive_loss_and_not_with_the_whole_catalogue(
    tmp_path: Path, source: str
) -> None:
    path, one = written(tmp_path, ""), f"negatives.{source}={CANDIDATES[source]}"
    contrastive = "loss.kind=gbce"
    assert [s.kind for s in load_config(path, [contrastive, one])[1].negatives.sources] == ["in_batch", source]
    refused(path, [one], f"negatives.{source} gives candidates, and loss.kind = 'bce' takes pairs")
    refused(path, [contrastive, one, "negatives.full=true"], f"negatives.{source} adds none")
    # One that draws for all is enough; the others need something beside them.
    alone = [contrastive, one, "negatives.in_batch=false"]
    if source in ("uniform", "popularity"):
        load_config(path, alone)
    else:
        refused(path, alone, "loss.kind = 'gbce' has no candidates; switch on one of the sources negatives.in_batch, ")
        load_config(path, [*alone, "negatives.uniform=1"])


def test_an_override_of_an_option_switches_its_source_on(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    contrastive = parse_config({"loss": {"kind": "softmax"}})[1]
    path.write_text(
        dump_config(Schema(features=ID_FEATURES), contrastive), encoding="utf-8"
    )  # every source that is off: false
    negatives = load_config(path, ["negatives.hard.n=2", "negatives.hard.every=3"])[1].negatives
    assert negatives.sources == (InBatchNegatives(), HardNegatives(n=2, every=3))
    assert load_config(path, ["negatives.full=true", "negatives.in_batch=false"])[1].negatives.sources == (
        FullCatalogue(),
    )


@pytest.mark.parametrize("kind", ["softmax", "gbce", "bpr"])
def test_pairs_and_candidates_do_not_mix(tmp_path: Path, kind: str) -> None:
    path, contrastive = written(tmp_path, ""), [f"loss.kind={kind}", "negatives.in_batch=false"]
    load_config(path, [contrastive[0], "train.history_scope=causal"])
    load_config(path, [*contrastive, "negatives.full=true"])
    load_config(path, [*contrastive, "negatives.random=2"])
    load_config(path, ["negatives.in_batch=false", "negatives.random=2"])
    refused(path, [*contrastive, "negatives.random=2", "negatives.full=true"], "so negatives.random adds none")
    refused(path, contrastive, f"loss.kind = '{kind}' has no candidates")
    refused(path, ["train.history_scope=causal"], "train.history_scope = 'causal' needs candidates and times")
    refused(path, ["negatives.full=true"], "negatives.full gives candidates, and loss.kind = 'bce' takes pairs")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("loss.kind=hinge", "loss.kind: no loss of kind 'hinge' (allowed: bce, softmax, gbce, bpr)"),
        ("loss.calibration=0.5", "unknown key 'loss.calibration' (allowed: mimic, log_q)"),
        ("negatives.hard.ranks=[9, 3]", "negatives.hard: ranks [9, 3] ends before it begins"),
        ("negatives.unifrom=3", "unknown key 'negatives.unifrom'; did you mean 'uniform'?"),
        ("negatives.in_batch=3", "negatives.in_batch: 3 is no option; set true or false"),
        ("negatives.attribute=true", "'negatives.attribute.feature' is missing"),
        (
            "schema.features.2.pooling=max",
            "schema.features.2.pooling.kind: no pooling of kind 'max' (allowed: mean, sqrt, sum, power, ridge, decay, "
            "attention, transformer)",
        ),
        (
            "schema.features.2.pooling.rates=[0.5, 1.5]",
            "features.2.pooling.rates.1: Input should be less than or equal to 1",
        ),
    ],
)
def test_a_setting_of_candidates_and_histories_out_of_range_is_refused(
    tmp_path: Path, override: str, words: str
) -> None:
    feature = '[[schema.features]]\nname = "f"\nside = "user"\nkind = "sequence"\npooling = { kind = "decay" }\n'
    path = written(tmp_path, IDS_TOML + feature + '[loss]\nkind = "softmax"\n')
    assert (
        load_config(path, ["negatives.hard.ranks=[3, 3]", "schema.features.2.pooling.rates=[0.0, 1.0]"])[0] is not None
    )
    refused(path, [override], words)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "none.toml", [], "none.toml: no such file; `config_template()` gives a template")
    refused(tmp_path, [], "Is a directory")
    path = tmp_path / "latin.toml"
    path.write_bytes("# é".encode("latin-1"))
    refused(path, [], "not UTF-8 at byte 2; save it as UTF-8")


# --- sizes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("schema.features.0.hash_buckets=1000000000000", "hash_buckets: input should be less than 2147483648"),
        ("schema.features.0.width=1000000000000", "width: at most 4,294,967,295 is allowed, got 1,000,000,000,000"),
        ("model.pairs=[{user={layers=[8, 1000000000000]}}]", "layers: at most 4,294,967,295"),
        ("negatives.random=1000000000", "negatives.random.n: input should be less than or equal to 100000"),
    ],
)
def test_fault_G19_an_absurd_size_is_refused_with_what_is_allowed(tmp_path: Path, override: str, words: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(dump_config(Schema(features=ID_FEATURES), Config()), encoding="utf-8")
    with pytest.raises(ConfigError, match=re.escape(words)):
        load_config(path, [override])


@pytest.mark.parametrize(("name", "hint"), [("epoch", "; did you mean 'epochs'?"), ("zzz", ""), ("", "")])
def test_the_nearest_name_is_hinted_only_where_one_is_near(name: str, hint: str) -> None:
    assert did_you_mean(name, ["epochs", "lr"]) == hint


def test_options_are_listed_where_their_values_differ_and_no_others() -> None:
    a = settings()
    b = settings(
        train={"lr": 0.5},
        model={"width": 8, "pairs": [{"user": {"layers": [8, 4]}, "item": {"layers": [8]}}] * 2},
        loss={"kind": "softmax"},
        negatives={"uniform": 7},
    )
    found = differing_options([(CHECKERBOARD_SCHEMA, a), (CHECKERBOARD_SCHEMA, b), (CHECKERBOARD_SCHEMA, a)])
    assert found["train.lr"] == ["0.02", "0.5", "0.02"]
    assert found["model.pairs.0.user.layers"] == ["[8]", "[8, 4]", "[8]"]
    assert found["model.pairs.1.user.layers"] == ["", "[8, 4]", ""]
    assert found["loss.kind"] == ['"bce"', '"softmax"', '"bce"']
    assert found["negatives.uniform.n"] == ["", "7", ""]
    assert "train.epochs" not in found
    assert not [key for key in found if key.startswith(("schema", "model.pairs.0.item"))]
    assert differing_options([(CHECKERBOARD_SCHEMA, a)] * 2) == {}


def test_features_are_matched_by_side_and_name_not_by_place() -> None:
    age, city = Numeric(name="age", side="user"), Categorical(name="city", side="user")
    item, rare = Categorical(name="item_id", side="item"), city.model_copy(update={"min_count": 9})
    schemas = Schema(features=(age, city, item)), Schema(features=(rare, age, item))
    found = differing_options([(schema, settings()) for schema in schemas])
    assert found == {"schema.features.user.city.min_count": [str(city.min_count), "9"]}
