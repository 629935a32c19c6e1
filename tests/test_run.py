"""A run folder stands alone, and a damaged or mixed one is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from conftest import CHECKERBOARD_SCHEMA, EVERYTHING_SCHEMA, checkerboard, everything, settings

from twotower import config as toml
from twotower import pipeline, run
from twotower.data.dataset import Dataset, prepare
from twotower.data.tables import check
from twotower.errors import RunError

FILES = {
    "config.toml",
    "metrics.json",
    "history.jsonl",
    "model.safetensors",
    "model.json",
    "encoders.json",
    "users.parquet",
    "items.parquet",
    "interactions.parquet",
    "report.html",
    "checkpoints",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "everything"
    senet = [{s: {"layers": [8], "senet": {"enabled": True}} for s in ("user", "item")}]
    config = settings(model={"width": 8, "pairs": senet}, negatives={"random": 1}, evaluation={"bootstrap": 20})
    pipeline.fit(everything(), EVERYTHING_SCHEMA, config, folder=folder)
    return folder


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "copy"))


def test_a_run_folder_holds_what_it_promises_and_nothing_temporary(trained: Path) -> None:
    assert {p.name for p in trained.iterdir()} == FILES


def test_a_loaded_run_gives_the_same_vectors_and_metrics(copy: Path) -> None:
    loaded = run.load(copy)
    saved = json.loads((copy / "metrics.json").read_text())
    measured = pipeline.evaluate(loaded)
    assert {m: saved[m] for m in measured} == measured
    for key in ("test.auc", "test.gauc", "test.recall@5", "test.ndcg@5", "train.rows_per_second", "train.seconds",
                "baseline.popularity.recall@5", "baseline.bias.auc"):  # fmt: skip
        assert np.isfinite(saved[key]), key
    assert [json.loads(line)["epoch"] for line in (copy / "history.jsonl").read_text().splitlines()] == [1, 2]


def test_the_saved_config_gives_the_same_run(copy: Path, tmp_path: Path) -> None:
    schema, config = toml.load(copy / "config.toml")
    assert schema == EVERYTHING_SCHEMA
    assert schema is not None
    again = pipeline.fit(everything(), schema, config, folder=tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (copy / "model.safetensors").read_bytes()
    assert toml.dump(schema, config) == (copy / "config.toml").read_text(encoding="utf-8")
    assert again.metrics["test.auc"] == run.load(copy).metrics["test.auc"]


@pytest.mark.parametrize("name", sorted(FILES - {"checkpoints", "report.html", "metrics.json"}))
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(RunError, match=name):
        run.load(copy)


def test_an_unfinished_run_says_how_to_finish_it(copy: Path) -> None:
    (copy / "metrics.json").unlink()
    with pytest.raises(RunError, match="unfinished.*--resume"):
        run.load(copy)
    with pytest.raises(RunError, match="no run"):
        run.load(copy / "nowhere")
    (copy.parent / "store" / "bundles").mkdir(parents=True)
    with pytest.raises(RunError, match="a store of bundles, not a run"):
        run.load(copy.parent / "store")


def test_one_flipped_bit_in_the_weights_is_refused(copy: Path) -> None:
    path = copy / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(RunError, match="checksum"):
        run.load(copy)


def test_a_file_of_another_run_is_refused(copy: Path, tmp_path: Path) -> None:
    pipeline.fit(checkerboard(), CHECKERBOARD_SCHEMA, settings(), folder=tmp_path / "other")
    for name in ("model.safetensors", "encoders.json", "config.toml"):
        mixed = Path(shutil.copytree(copy, tmp_path / f"mixed-{name}"))
        shutil.copy(tmp_path / "other" / name, mixed / name)
        with pytest.raises(RunError):
            run.load(mixed)


def test_encoders_that_do_not_fit_the_weights_are_refused(copy: Path) -> None:
    path = copy / "encoders.json"
    state = json.loads(path.read_text())
    state["sides"]["user"]["uid"]["values"].append("u999")
    path.write_text(json.dumps(state))
    with pytest.raises(RunError, match="weights do not fit"):
        run.load(copy)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.toml", b"[]", "config.toml: damaged"),
        ("config.toml", b"\xff\xfe", "config.toml: damaged"),
        ("model.json", b"[]", "model.json: format None"),
        ("model.json", b'{"format": 1}', "model.json: format 1"),
        ("metrics.json", b"[" * 100_000, "metrics.json: not readable as JSON"),
        ("history.jsonl", b"{", "history.jsonl: not readable"),
    ],
)
def test_a_file_of_something_else_is_one_line(copy: Path, name: str, content: bytes, said: str) -> None:
    (copy / name).write_bytes(content)
    with pytest.raises(RunError, match=said):
        run.load(copy)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("users", lambda f: f.drop("city")),
        ("items", lambda f: f.drop("iid")),
        ("interactions", lambda f: f.drop("user")),
        ("interactions", lambda f: f.with_columns(f["user"].cast(pl.String))),
        ("interactions", lambda f: f.with_columns(user=pl.lit(None))),
    ],
)
def test_a_table_of_something_else_is_one_line(copy: Path, name: str, change: object) -> None:
    path = copy / f"{name}.parquet"
    change(pl.read_parquet(path)).write_parquet(path)  # type: ignore[operator]
    with pytest.raises(RunError, match="a table is not as it was written"):
        run.load(copy)


def test_a_run_is_utf_8_whatever_the_locale_says(tmp_path: Path) -> None:
    users, items, actions = checkerboard()
    items, actions = (t.with_columns(pl.format("ä{}☃", "item_id").alias("item_id")) for t in (items, actions))
    pipeline.fit((users, items, actions), CHECKERBOARD_SCHEMA, settings(), folder=tmp_path / "run")
    done = subprocess.run(
        [sys.executable, "-c", f"from twotower import run; run.load({str(tmp_path / 'run')!r})"],
        env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode(errors="replace")


def test_truncated_parquet_is_refused(copy: Path) -> None:
    path = copy / "items.parquet"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(RunError, match="items.parquet: damaged"):
        run.load(copy)


def test_the_report_is_one_offline_page_with_every_section(trained: Path) -> None:
    page = (trained / "report.html").read_text(encoding="utf-8")
    for title in ("Test metrics", "Learning curves", "Scores of test pairs", "SENet gates", "Slices"):
        assert f"<h2>{title}" in page
    body = page.split("</script>", 1)[1]  # plotly's own text names hosts it never calls here
    assert "http://" not in body.replace("http://www.w3.org", "")
    assert "<script src" not in page
    assert "<link" not in page


def test_loading_puts_the_model_in_evaluation_mode(copy: Path) -> None:
    model = run.load(copy).model
    assert not model.training
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


# ---- folders of other people


def test_a_folder_with_other_files_is_never_written_to_or_removed(copy: Path, tmp_path: Path) -> None:
    shop = tmp_path / "shop"
    shop.mkdir()
    checkerboard()[2].write_parquet(shop / "interactions.parquet")
    (shop / "config.toml").write_text("mine = true")
    before = {p.name: p.read_bytes() for p in shop.iterdir()}
    for resume in (False, True):
        with pytest.raises(RunError, match="not empty and not a run"):
            pipeline.fit(checkerboard(), CHECKERBOARD_SCHEMA, settings(), folder=shop, resume=resume)
    with pytest.raises(RunError, match="not empty and not a run"):
        run.clear(shop)
    assert {p.name: p.read_bytes() for p in shop.iterdir()} == before
    (copy / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match=r"it holds notes\.txt"):
        run.clear(copy)
    (copy / "notes.txt").unlink()
    run.clear(copy)
    assert not copy.exists()
    run.clear(copy)


def test_resuming_a_complete_run_without_checkpoints_keeps_it(copy: Path) -> None:
    shutil.rmtree(copy / "checkpoints")
    before = (copy / "model.safetensors").read_bytes()
    schema, config = run.read_config(copy)
    with pytest.raises(RunError, match="complete run without a checkpoint"):
        pipeline.fit(everything(), schema, config, folder=copy, resume=True)
    assert (copy / "model.safetensors").read_bytes() == before
    assert run.load(copy).metrics


def test_the_fingerprint_sees_every_feature_and_time(everything_data: Dataset) -> None:
    config = settings()
    first = run.fingerprint(everything_data, config)["data"]
    users, items, actions = everything()
    for changed in (
        (users.with_columns(pl.col("city").reverse()), items, actions),
        (users, items.with_columns(pl.col("picture").reverse()), actions),
        (users, items, actions.with_columns(pl.col("when").reverse())),
    ):
        data = prepare(check(*changed, EVERYTHING_SCHEMA), EVERYTHING_SCHEMA, config.split)
        assert run.fingerprint(data, config)["data"] != first


def test_a_run_without_a_test_part_says_so(tmp_path: Path) -> None:
    from dataclasses import replace

    done = pipeline.fit(checkerboard(), CHECKERBOARD_SCHEMA, settings(train={"epochs": 1}))
    bare = replace(done, dataset=replace(done.dataset, parts=np.minimum(done.dataset.parts, 1)))
    with pytest.raises(RunError, match="no test part"):
        pipeline.evaluate(bare)


def test_a_report_of_positives_alone_shows_no_auc_and_no_log_loss(tmp_path: Path) -> None:
    config = settings(
        loss={"kind": "softmax"}, train={"monitor": "validation.recall@5", "epochs": 1}, negatives={"full": True}
    )
    users, items, actions = checkerboard()
    actions = actions.filter(pl.col("liked") == 1).sample(300, seed=1)
    pipeline.fit((users, items, actions), CHECKERBOARD_SCHEMA, config, folder=tmp_path / "run")
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "all of them are positives" in page
    assert "AUC on validation" not in page
    assert "validation log loss" not in page
    assert "Ranking on validation" in page
