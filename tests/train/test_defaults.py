"""A table of clicks alone is loaded, split and trained by three lines, and the way out of an error is no other
error."""

from __future__ import annotations

import logging
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from trainers import StopAt
from worlds import CHECKERBOARD_SCHEMA, checkerboard, settings

from twotower import api, runs
from twotower.cli.app import run_command
from twotower.config.experiment import Config
from twotower.config.reference import config_template
from twotower.config.toml import load_config
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.memmap import MemmapDataset
from twotower.data.split import SplitConfig
from twotower.data.splits import TEST
from twotower.data.tables import check
from twotower.distributed import DistributedContext
from twotower.errors import TwoTowerError
from twotower.evaluation.baselines import popularity_baseline
from twotower.evaluation.part_evaluation import evaluate_part
from twotower.features.categorical import Categorical
from twotower.features.schema import Schema
from twotower.features.sequence import Sequence
from twotower.runs import Run
from twotower.train import defaults, trainer
from twotower.train.defaults import MIN_MULTIPLICATIONS, has_bf16, multiplications, with_defaults, with_precision
from twotower.train.negatives.config import NegativesConfig
from twotower.train.trainer import Trainer

THREE_LINES = """\
data.interactions = "clicks.parquet"
schema.user_id = "customer"
schema.item_id = "product"
"""
SMALL = ("train.epochs=1", "train.device=cpu", "evaluation.bootstrap=0", "model.width=8")
SETTING = r"([a-z_]+(?:\.[a-z_0-9]+)*) = ('[^']*'|[\d.]+|true|false)"


def clicks(n: int = 400) -> pl.DataFrame:
    """Clicks of 40 customers on 30 products, some repeated."""
    rng = np.random.default_rng(3)
    return pl.DataFrame({"customer": rng.integers(40, size=n), "product": [f"p{i}" for i in rng.integers(30, size=n)]})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clicks")
    clicks().write_parquet(folder / "clicks.parquet")
    (folder / "shop.toml").write_text(THREE_LINES, encoding="utf-8")
    return folder


def trained(folder: Path, *settings: str) -> Run:
    schema, config = load_config(folder / "shop.toml", (*SMALL, *settings))
    return api.fit(*api.read(config, schema), config)


def test_three_lines_train(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(THREE_LINES.splitlines()) == 3
    run = tmp_path / "run"
    assert run_command(["train", str(folder / "shop.toml"), "--run", str(run), "--set", "train.device=cpu"]) == 0
    said = "".join(capsys.readouterr())
    assert "every interaction is a positive: loss.kind = 'softmax' against all items" in said
    done = api.load(run)
    assert done.dataset.schema.features == (
        Sequence(name="history", side="user"), Categorical(name="product", side="item"),
    )  # fmt: skip
    sizes = [len(part) for part in (done.dataset.train, done.dataset.validation, done.dataset.test)]
    assert min(sizes) > 0
    assert sum(sizes) == clicks().n_unique()
    written = tomllib.loads((run / "config.toml").read_text())
    assert written["train"]["monitor"] == "validation.recall@10"
    assert written["negatives"]["full"] == {"cold": True}
    assert written["loss"]["kind"] == "softmax"
    assert written["model"]["pairs"][0]["user"]["layers"] == []
    assert done.metrics["test.recall@10"] > 0


def test_three_lines_prepare(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "prepared"
    assert run_command(["prepare", str(folder / "shop.toml"), "--out", str(out)]) == 0
    config = tmp_path / "prepared.toml"
    config.write_text('data.prepared = "prepared"\n', encoding="utf-8")
    schema, settings = load_config(config, SMALL)
    run = api.fit(*api.read(settings, schema), settings)
    assert isinstance(run.dataset, MemmapDataset)
    assert run.config.train.monitor == "validation.recall@10"
    assert run.metrics["test.recall@10"] > 0


def test_ids_of_the_names_that_are_the_defaults_need_one_line(tmp_path: Path) -> None:
    clicks().rename({"customer": "user_id", "product": "item_id"}).write_csv(tmp_path / "clicks.csv")
    (tmp_path / "shop.toml").write_text('data.interactions = "clicks.csv"', encoding="utf-8")
    assert [f.name for f in trained(tmp_path).dataset.schema.features] == ["history", "item_id"]


def test_a_recipe_that_leaves_nothing_to_the_data_is_unchanged(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "twotower"):
        run = trained(folder, "loss.kind=softmax", "train.monitor=validation.ndcg@50")
    assert run.config.negatives.pairs == ()
    assert run.config.train.monitor == "validation.ndcg@50"
    assert "negatives.random" not in caplog.text


@pytest.mark.parametrize(
    ("skip", "kinds"),
    [
        ("negative", ["in_batch"]),
        ({"target": "negative", "weight": 0.5}, ["in_batch"]),
        ("input", ["in_batch", "full"]),
        ({"target": "negative", "weight": 0}, ["in_batch", "full"]),
    ],
)
def test_a_log_of_events_has_negatives_if_a_type_is_negative(skip: Any, kinds: list[str]) -> None:
    events = {"buy": 3, "skip": skip}
    schema = Schema.model_validate({"user_id": "customer", "item_id": "product", "event": "type", "events": events})
    log = clicks().unique(maintain_order=True).with_columns(type=pl.lit("buy"))
    log = log.with_columns(
        pl.when(pl.int_range(len(log)) % 3 == 0).then(pl.lit("skip")).otherwise("type").alias("type")
    )
    dataset = build_dataset(check(None, None, log, schema), schema, SplitConfig())
    found = with_defaults(Config(), dataset)
    assert [source.kind for source in found.negatives.sources] == kinds
    assert found.train.monitor == ("validation.recall@10" if "full" in kinds else "validation.auc")
    assert with_defaults(found, dataset) is found
    ranked = Config.model_validate({"loss": {"kind": "softmax"}})
    assert with_defaults(ranked, dataset).train.monitor == "validation.recall@10"


@pytest.mark.parametrize("off", [False, 0])
def test_random_negatives_that_are_switched_off_stay_off(folder: Path, tmp_path: Path, off: bool | int) -> None:
    """In Python, in a file, and by a flag over it."""
    (tmp_path / "off.toml").write_text(
        f"{THREE_LINES}negatives.random = {off!r}\n".replace("False", "false"), encoding="utf-8"
    )
    (tmp_path / "clicks.parquet").write_bytes((folder / "clicks.parquet").read_bytes())
    given = [
        Config(negatives=NegativesConfig(random=off)),
        load_config(tmp_path / "off.toml")[1],
        load_config(folder / "shop.toml", [f"negatives.random={off!r}".lower()])[1],
        load_config(tmp_path / "off.toml", ["negatives.mask_positives=false"])[1],
    ]
    schema = Schema(user_id="customer", item_id="product")
    dataset = build_dataset(check(None, None, clicks(), schema), schema, SplitConfig())
    for config in given:
        assert not with_defaults(config, dataset).negatives.pairs
    assert load_config(tmp_path / "off.toml")[1].negatives == load_config(folder / "shop.toml")[1].negatives
    with pytest.raises(TwoTowerError, match=r"no source of negatives gives pairs; set negatives\.random = 5, or"):
        trained(folder, f"negatives.random={off!r}".lower())
    template = config_template().replace('interactions = ""', 'interactions = "clicks.parquet"')
    template = template.replace('user_id = "user_id"', 'user_id = "customer"').replace(
        'item_id = "item_id"', 'item_id = "product"'
    )
    (tmp_path / "template.toml").write_text(template, encoding="utf-8")
    assert with_defaults(load_config(tmp_path / "template.toml")[1], dataset).negatives.pairs


def of_tastes(users: int, items: int, each: int, groups: int = 8) -> pl.DataFrame:
    """Clicks of users who take about `each` items, mostly of their own group, popular items more often; in no order."""
    rng = np.random.default_rng(users)
    popular, group = 1 / np.arange(1, items + 1) ** 0.5, np.arange(items) % groups
    rows = []
    for user in range(users):
        p = popular * np.where(group == user % groups, 20, 1)
        chosen = rng.choice(items, max(3, int(rng.poisson(each))), replace=False, p=p / p.sum())
        rows += [(user, f"p{i}") for i in chosen]
    return pl.DataFrame(rows, schema=["customer", "product"], orient="row").sample(fraction=1.0, shuffle=True, seed=1)


@pytest.mark.parametrize(("users", "items", "each"), [(600, 80, 20), (1500, 400, 6)], ids=["dense", "sparse"])
def test_three_lines_learn_more_than_popularity(tmp_path: Path, users: int, items: int, each: int) -> None:
    of_tastes(users, items, each).write_parquet(tmp_path / "clicks.parquet")
    (tmp_path / "shop.toml").write_text(THREE_LINES, encoding="utf-8")
    schema, config = load_config(tmp_path / "shop.toml", ("train.device=cpu", "evaluation.bootstrap=0"))
    run = api.fit(*api.read(config, schema), config)
    data = run.dataset
    counts = popularity_baseline(data.train, len(data.users), len(data.items))
    popular = evaluate_part(counts, data, TEST, run.config.evaluation)
    assert run.metrics["test.recall@10"] > 1.3 * popular["recall@10"]
    assert run.metrics["test.ndcg@10"] > 1.3 * popular["ndcg@10"]


def test_what_is_given_stays_beside_the_model_of_clicks(folder: Path) -> None:
    schema = Schema(user_id="customer", item_id="product")
    dataset = build_dataset(check(None, None, clicks(), schema), schema, SplitConfig())
    left = with_defaults(Config(), dataset)
    assert (left.model.width, left.model.similarity, left.train.epochs, left.train.patience) == (64, "dot", 30, 3)
    given = load_config(
        folder / "shop.toml", ["model.width=12", "model.pairs=[{item={layers=[12]}, user={layers=[12]}}]",
            "train.epochs=4"]
    )[1]  # fmt: skip
    found = with_defaults(given, dataset)
    assert (found.loss.kind, found.model.width, found.model.pairs[0].user.layers) == ("softmax", 12, (12,))
    assert (found.model.similarity, found.train.lr) == ("dot", 3e-3)
    assert (found.train.epochs, found.train.patience) == (4, 0), "all of the epochs that are given"
    assert with_defaults(load_config(folder / "shop.toml", ["loss.kind=bce"])[1], dataset).loss.kind == "bce"
    whole = build_dataset(check(None, None, clicks(), schema), schema, SplitConfig(validation=0))
    assert with_defaults(Config(), whole).train.patience == 0


def test_features_that_are_given_keep_the_loss_of_pairs() -> None:
    ids = (Categorical(name="customer", side="user"), Categorical(name="product", side="item"))
    schema = Schema(user_id="customer", item_id="product", features=ids)
    assert not schema.has_default_features
    dataset = build_dataset(check(None, None, clicks(), schema), schema, SplitConfig())
    found = with_defaults(Config(), dataset)
    assert (found.loss.kind, [s.kind for s in found.negatives.pairs]) == ("bce", ["random"])
    labelled = Schema(user_id="customer", item_id="product", label="liked")
    assert labelled.features == ids


@pytest.mark.parametrize(("items", "sources"), [(20_000, ["in_batch", "full"]), (20_001, ["in_batch", "uniform"])])
def test_a_large_catalogue_is_sampled(items: int, sources: list[str]) -> None:
    schema = Schema(user_id="customer", item_id="product")
    log = pl.DataFrame({"customer": np.arange(items) % 50, "product": np.arange(items)})
    dataset = build_dataset(check(None, None, log, schema), schema, SplitConfig())
    assert sorted(s.kind for s in with_defaults(Config(), dataset).negatives.sources) == sorted(sources)


STARTS: list[tuple[str, ...]] = [
    *((f"loss.kind={kind}",) for kind in ("bce", "softmax", "gbce", "bpr")),
    *((f"split.kind={kind}",) for kind in ("random", "user_random", "last", "time", "user_ratio")),
    ("train.history_scope=causal",), ("train.history_scope=causal", "loss.kind=softmax"),
    *((f"train.monitor=validation.{name}",) for name in ("auc", "gauc", "log_loss", "recall@10", "mrr@50")),
    ("negatives.random=false",), ("negatives.random=0",),
    ("negatives.random=2", "train.monitor=validation.auc"),
    *((f"negatives.{source}",) for source in ("random=3", "uniform=16", "popularity=16", "hard={n=2,ranks=[3,9]}",
        "full=true", "disliked=1")),
    *((f"negatives.{source}", "loss.kind=softmax") for source in (
        "random=3", "uniform=16", "popularity=16", "full=true", "disliked=1", "in_batch=false", "cross_batch_memory=64",
    )),
    ("split.validation=0",), ("split.validation=0", "train.patience=3"), ("train.patience=2",), ("split.gap=3600",),
    *((f"schema.duplicates={treatment}",) for treatment in ("last", "keep", "error")),
    *((f"evaluation.repeats={repeats}",) for repeats in ("allow", "only")),
    ("evaluation.repeats=only", "schema.duplicates=keep"),
    ("schema.time_format=%Y",), ("train.embedding_sharding=row_wise",),
]  # fmt: skip
HISTORY = ['schema.features=[{kind="categorical",name="customer",side="user"},'
           '{kind="categorical",name="product",side="item"},'
           '{kind="sequence",name="before",side="user",pooling={kind="POOLING"}}]']  # fmt: skip
STARTS += [(HISTORY[0].replace('"POOLING"', p), *loss)
           for p in ('"mean"', '"decay"', '"attention",window=9', '"transformer",window=9')
           for loss in ((), ("loss.kind=softmax",))]  # fmt: skip


DECAY = HISTORY[0].replace('"POOLING"', '"decay"')
ORDER = ("loss.kind=softmax", "negatives.full=true", "train.history_scope=causal")


@pytest.mark.parametrize(
    ("start", "way"),
    [
        (("split.kind=last", DECAY, *ORDER), ["split.kind='random'", "train.history_scope='leave_batch_out'",
            "schema.features.2.pooling='mean'"]),
        ((DECAY, *ORDER), ["train.history_scope='leave_batch_out'", "schema.features.2.pooling='mean'"]),
        ((DECAY,), ["schema.features.2.pooling='mean'"]),
        (("split.kind=time",), ["split.kind='random'"]),
        (("split.kind=user_ratio", *ORDER), ["split.kind='random'", "train.history_scope='leave_batch_out'"]),
    ],
)  # fmt: skip
def test_without_a_time_one_error_names_all_that_needs_it(folder: Path, start: tuple[str, ...], way: list[str]) -> None:
    with pytest.raises(TwoTowerError, match=r"schema\.time is empty; name its column in schema\.time, or set") as found:
        trained(folder, *start)
    assert [*ways_out(str(found.value))] == [way]
    assert trained(folder, *start, *way).metrics["test.recall@10"] > 0


def ways_out(message: str) -> Iterator[list[str]]:
    """Yield the settings of each way out that an error names and that clicks alone can go."""
    advice = message.rpartition("; ")[2]
    advice = re.sub(r"set ([a-z_.]+) to one of ([a-z_]+)(?:, [a-z_]+)*", r"set \1 = '\2'", advice)
    advice = re.sub(r"switch on one of the sources (negatives\.[a-z_]+).*", r"\1 = true", advice)
    advice = re.sub(rf"{SETTING} or ('[^']*')", r"\1 = \2, or \1 = \3", advice)
    for way in re.split(r",? or ", advice):
        settings = [f"{key}={value}" for key, value in re.findall(SETTING, way)]
        if settings and "schema.time" not in way:
            yield [re.sub(r"^pooling=", "schema.features.2.pooling=", s) for s in settings]


@pytest.mark.parametrize("start", STARTS, ids=[" ".join(s)[-60:] for s in STARTS])
def test_the_way_out_of_an_error_trains(folder: Path, start: tuple[str, ...]) -> None:
    try:
        trained(folder, *start)
    except TwoTowerError as e:
        message = str(e)
    else:
        return
    left_out = re.search(r"(leave it out|drop it)(,|$)", message)
    if left_out:  # the first setting
        trained(folder, *start[1:])
    # No loss finds dislikes among clicks, so leaving them out is the one way.
    ways = [] if left_out and "disliked" in message else [*ways_out(message)]
    assert ways or left_out, message
    for way in ways:
        changed = {s.partition("=")[0]: s for s in (*start, *way)}
        trained(folder, *changed.values())


def settings_of(advice: str) -> list[Any]:
    return [*ways_out(advice)]


def test_ways_out_are_read_from_messages() -> None:
    assert settings_of("a; set x.y = 'b', or z.w = 3 and q.r = true") == [["x.y='b'"], ["z.w=3", "q.r=true"]]
    assert settings_of("a; set x.y = 'b' or 'c'") == [["x.y='b'"], ["x.y='c'"]]
    assert settings_of("a; set loss.kind to one of softmax, gbce and schema.time to a column, or set a.b = 1") == [
        ["a.b=1"]
    ]


@pytest.mark.parametrize(
    ("rows", "given", "batch"),
    [(1_000, 0, 64), (10_000, 0, 256), (40_959, 0, 1024), (40_960, 0, 2048), (1_000, 500, 500)],
)
def test_the_batch_follows_the_training_rows_unless_it_is_given(rows: int, given: int, batch: int) -> None:
    """Of the rows all but two train."""
    frame = pl.DataFrame({"user_id": np.arange(rows + 2) // 40, "item_id": np.arange(rows + 2) % 40})
    parts = frame.with_columns(part=pl.Series(["train"] * rows + ["validation", "test"]))
    schema = Schema(features=(Categorical(name="item_id", side="item"), Sequence(name="history", side="user")))
    data = build_dataset(check(None, None, parts, schema), schema, SplitConfig(kind="column", column="part"))
    config = Config.model_validate({"train": {"batch_size": given}} if given else {})
    assert with_defaults(config, data).train.batch_size == batch
    assert given or rows < 1280 or rows // batch >= 20


def test_a_labelled_log_counts_the_rows_of_both_classes() -> None:
    frame = pl.DataFrame({"user_id": np.arange(8_000) // 40, "item_id": np.arange(8_000) % 40})
    frame = frame.with_columns(liked=pl.int_range(pl.len()) % 4 == 0)
    schema = Schema(label="liked")
    data = build_dataset(check(None, None, frame, schema), schema, SplitConfig())
    assert with_defaults(Config(), data).train.batch_size == 256  # 5,760 rows; a quarter of them are positives
    softmax = Config.model_validate({"loss": {"kind": "softmax"}, "negatives": {"full": True}})
    assert with_defaults(softmax, data).train.batch_size == 64


CPU = torch.device("cpu")
WIDE: dict[str, Any] = {"train": {"batch_size": 2**13}, "loss": {"kind": "softmax"}}
"""A step with large products, if the data had as many rows."""


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("fpu avx512f avx512_bf16 amx_tile", True), ("amx_bf16", True), ("fpu avx512f amx_int8", False), ("", False)],
)
def test_a_processor_has_bf16_by_its_flags(flags: str, expected: bool, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\nbugs\t\t:\n")
    assert has_bf16(CPU, tmp_path / "cpuinfo") is expected


def test_other_devices_and_systems_have_no_bf16(tmp_path: Path) -> None:
    assert not has_bf16(CPU, tmp_path / "none")
    (tmp_path / "cpuinfo").write_text("amx_bf16")
    assert not has_bf16(torch.device("mps"), tmp_path / "cpuinfo")


def test_the_work_of_a_step_is_that_of_its_largest_product() -> None:
    layers = {"pairs": [{"user": {"layers": [64, 8]}, "item": {"layers": [8]}}]}
    softmax = {"loss": {"kind": "softmax"}}
    assert multiplications(settings(model=layers), 10**6) == 256 * 64 * 64
    assert multiplications(settings(model=layers, **softmax), 10**6) == 256 * 64 * 64
    assert multiplications(settings(model=layers, train={"batch_size": 1024}, **softmax), 10**6) == 1024 * 1024 * 8
    assert multiplications(settings(model=layers, negatives={"full": True}, **softmax), 10**6) == 256 * 8 * 10**6
    plain = {"width": 32, "pairs": [{"user": {"layers": []}, "item": {"layers": []}}]}
    assert multiplications(settings(model=plain, **softmax), 10**6) == 256 * 32 * 256


def test_a_pair_that_a_step_leaves_out_has_no_products() -> None:
    narrow, wide = ({side: {"layers": [width]} for side in ("user", "item")} for width in (8, 32))
    kept = {"pairs": "apart", "solved": ["transitions"]}
    both = {"bias": False, "similarity": "dot", "pairs": [narrow, wide]}
    softmax = {"loss": {"kind": "softmax"}}
    assert multiplications(settings(model=both, train=kept, **softmax), 30) == 256 * 256 * 8
    assert multiplications(settings(model=both, **softmax), 30) == 256 * 256 * 32


@pytest.mark.parametrize(("has", "expected"), [(True, "bf16"), (False, "fp32")])
def test_large_products_are_in_bf16_where_the_device_has_it(
    has: bool, expected: str, board: Dataset, messages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(defaults, "has_bf16", lambda device: has)
    assert Config().train.precision == "auto"
    assert multiplications(settings(**WIDE), len(board.items)) >= MIN_MULTIPLICATIONS
    assert Trainer(board, settings(**WIDE)).recipe.train.precision == expected
    given = settings(train={"precision": "fp32"})
    assert with_precision(given, board, CPU, DistributedContext()) is given
    said = [m for m in messages if m.startswith("train.precision")]
    instructions = f"{'' if has else 'no '}instructions for matrix products in bf16"
    assert said == [f"train.precision = '{expected}': this cpu has {instructions}"]


def test_a_recipe_is_settled_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = list[str]()

    def counted(name: str) -> None:
        made = getattr(defaults, name)

        def call(*arguments: Any) -> Config:
            calls.append(name)
            found: Config = made(*arguments)
            return found

        for module in (trainer, defaults):
            monkeypatch.setattr(module, name, call)

    for name in ("with_defaults", "with_precision"):
        counted(name)
    run = trained(folder)
    assert calls == ["with_defaults", "with_precision"]
    assert (run.config.loss.kind, run.config.train.precision) == ("softmax", "fp32"), "the run has the settled one"


def test_small_models_train_in_fp32(board: Dataset, messages: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the machine, so that a fixed seed gives the bits of fp32."""
    monkeypatch.setattr(defaults, "has_bf16", lambda device: True)
    assert Trainer(board, settings()).recipe.train.precision == "fp32"
    told = "train.precision = 'fp32': the matrix products of a step are small (0.0 million multiplications)"
    assert told in messages


def test_a_resumed_training_keeps_the_choice_of_its_start(
    tmp_path: Path, messages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(
        model={"pairs": [{"user": {"layers": [768, 8]}, "item": {"layers": [8]}}]}, train={"checkpoint_steps": 1}
    )
    assert multiplications(config, 30) >= MIN_MULTIPLICATIONS
    monkeypatch.setattr(defaults, "has_bf16", lambda device: True)
    with pytest.raises(KeyboardInterrupt):
        api.fit(checkerboard(), CHECKERBOARD_SCHEMA, config, folder=tmp_path / "run", callback=StopAt(3))
    monkeypatch.setattr(defaults, "has_bf16", lambda device: False)
    done = api.fit(checkerboard(), CHECKERBOARD_SCHEMA, config, folder=tmp_path / "run", resume=True)
    assert done.config.train.precision == runs.load(tmp_path / "run").config.train.precision == "bf16"
    assert "resuming after step 2" in messages
    assert "train.precision = 'bf16': the training that is resumed has it" in messages
    again = api.fit(checkerboard(), CHECKERBOARD_SCHEMA, config, folder=tmp_path / "other")
    assert again.config.train.precision == "fp32"


def test_all_ranks_take_the_choice_of_the_first(board: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DistributedContext, "broadcast", lambda self, value: "bf16")
    monkeypatch.setattr(defaults, "multiplications", None)  # another rank decides nothing
    found = with_precision(settings(), board, CPU, DistributedContext(rank=1, world_size=2))
    assert found.train.precision == "bf16"
