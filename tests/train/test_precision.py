"""A training with `train.precision = "auto"` takes bf16 for large products where a device has it, says why, and keeps it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trainers import StopAt
from worlds import CHECKERBOARD_SCHEMA, checkerboard, settings

from twotower import api, runs
from twotower.config.experiment import Config
from twotower.data.dataset import Dataset
from twotower.distributed import DistributedContext
from twotower.train import precision
from twotower.train.precision import MIN_WORK, has_bf16, with_precision, work
from twotower.train.trainer import Trainer

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
    assert work(settings(model=layers), 10**6) == 256 * 64 * 64
    assert work(settings(model=layers, **softmax), 10**6) == 256 * 64 * 64
    assert work(settings(model=layers, train={"batch_size": 1024}, **softmax), 10**6) == 1024 * 1024 * 8
    assert work(settings(model=layers, negatives={"full": True}, **softmax), 10**6) == 256 * 8 * 10**6
    plain = {"width": 32, "pairs": [{"user": {"layers": []}, "item": {"layers": []}}]}
    assert work(settings(model=plain, **softmax), 10**6) == 256 * 32 * 256


def test_a_pair_that_a_step_leaves_out_has_no_products() -> None:
    narrow, wide = ({side: {"layers": [width]} for side in ("user", "item")} for width in (8, 32))
    kept = {"pairs": "apart", "start": [{"kind": "transitions", "pair": 1, "learn": False}]}
    both = {"bias": False, "similarity": "dot", "pairs": [narrow, wide]}
    softmax = {"loss": {"kind": "softmax"}}
    assert work(settings(model=both, train=kept, **softmax), 30) == 256 * 256 * 8
    assert work(settings(model=both, **softmax), 30) == 256 * 256 * 32


@pytest.mark.parametrize(("has", "expected"), [(True, "bf16"), (False, "fp32")])
def test_large_products_are_in_bf16_where_the_device_has_it(
    has: bool, expected: str, board: Dataset, messages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "has_bf16", lambda device: has)
    assert Config().train.precision == "auto"
    assert work(settings(**WIDE), len(board.items)) >= MIN_WORK
    assert Trainer(board, settings(**WIDE)).recipe.train.precision == expected
    given = settings(train={"precision": "fp32"})
    assert with_precision(given, board, CPU, DistributedContext()) is given
    said = [m for m in messages if m.startswith("train.precision")]
    instructions = f"{'' if has else 'no '}instructions for matrix products in bf16"
    assert said == [f"train.precision = '{expected}': this cpu has {instructions}"]


def test_small_models_train_in_fp32(board: Dataset, messages: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the machine, so that a fixed seed gives the bits of fp32."""
    monkeypatch.setattr(precision, "has_bf16", lambda device: True)
    assert Trainer(board, settings()).recipe.train.precision == "fp32"
    told = "train.precision = 'fp32': the matrix products of a step are small (0.0 million multiplications)"
    assert told in messages


def test_a_resumed_training_keeps_the_choice_of_its_start(
    tmp_path: Path, messages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(
        model={"pairs": [{"user": {"layers": [768, 8]}, "item": {"layers": [8]}}]}, train={"checkpoint_steps": 1}
    )
    assert work(config, 30) >= MIN_WORK
    monkeypatch.setattr(precision, "has_bf16", lambda device: True)
    with pytest.raises(KeyboardInterrupt):
        api.fit(checkerboard(), CHECKERBOARD_SCHEMA, config, folder=tmp_path / "run", callback=StopAt(3))
    monkeypatch.setattr(precision, "has_bf16", lambda device: False)
    done = api.fit(checkerboard(), CHECKERBOARD_SCHEMA, config, folder=tmp_path / "run", resume=True)
    assert done.config.train.precision == runs.load(tmp_path / "run").config.train.precision == "bf16"
    assert "resuming after step 2" in messages
    assert "train.precision = 'bf16': the training that is resumed has it" in messages
    again = api.fit(checkerboard(), CHECKERBOARD_SCHEMA, config, folder=tmp_path / "other")
    assert again.config.train.precision == "fp32"


def test_all_ranks_take_the_choice_of_the_first(board: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DistributedContext, "broadcast", lambda self, value: "bf16")
    monkeypatch.setattr(precision, "work", None)  # another rank decides nothing
    found = with_precision(settings(), board, CPU, DistributedContext(rank=1, world_size=2))
    assert found.train.precision == "bf16"
