"""A training with `train.precision = "auto"` takes the faster precision, says why, and keeps it."""

from __future__ import annotations

from collections.abc import Callable
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
from twotower.train.precision import Precision, Product, choose, products, seconds, with_precision
from twotower.train.trainer import Trainer

CPU = torch.device("cpu")
LARGE = Product(4096, 128, 4000)


def stopwatch(fp32: float, bf16: float) -> precision.Stopwatch:
    """A stopwatch of a machine with these seconds for a billion multiplications, on which every second time is ten times as long,
    and every third in fp32."""
    calls = {"fp32": 0, "bf16": 0}

    def watch(product: Product, chosen: Precision, device: torch.device) -> float:
        calls[chosen] += 1
        busy = calls[chosen] % (3 if chosen == "fp32" else 2) == 0
        return (10 if busy else 1) * {"fp32": fp32, "bf16": bf16}[chosen] * product.work / 1e9

    return watch


@pytest.mark.parametrize(
    ("fp32", "bf16", "expected"), [(1.0, 0.5, "bf16"), (0.5, 0.8, "fp32"), (1.0, 0.95, "fp32"), (1.0, 1.0, "fp32")]
)
def test_the_faster_precision_is_chosen_on_a_busy_machine(fp32: float, bf16: float, expected: str) -> None:
    chosen, reason = choose([LARGE], CPU, stopwatch(fp32, bf16))
    assert chosen == expected
    assert reason == (
        f"the largest matrix products of a step take about {bf16 * LARGE.work / 1e6:.3g} ms in bf16 and "
        f"{fp32 * LARGE.work / 1e6:.3g} ms in fp32"
    )


def test_the_larger_product_counts_more() -> None:
    def watch(product: Product, chosen: Precision, device: torch.device) -> float:
        fast = "bf16" if product.inner == 128 else "fp32"
        return product.work * (1.0 if chosen == fast else 3.0)

    assert choose([LARGE, Product(4096, 64, 4000)], CPU, watch)[0] == "bf16"
    assert choose([LARGE, Product(4096, 512, 4000)], CPU, watch)[0] == "fp32"


def test_small_products_and_other_devices_are_not_timed() -> None:
    def watch(product: Product, chosen: Precision, device: torch.device) -> float:
        raise AssertionError

    assert choose([Product(256, 8, 100)], CPU, watch) == (
        "fp32", "the matrix products of a step are small (0.2 million multiplications)"
    )  # fmt: skip
    assert choose([LARGE], torch.device("mps"), watch) == ("fp32", "bf16 is not measured on mps")


def test_a_piece_of_a_product_is_timed() -> None:
    assert Product(8, 4, 3).timed == Product(8, 4, 3)
    assert max(Product(2048, 10**9, 10**9).timed) <= 2**14
    for large in (LARGE, Product(10**6, 4096, 10**6), Product(10**6, 10**6, 1), Product(2, 3, 10**9)):
        piece = large.timed
        assert piece.inner == min(large.inner, precision.MAX_INNER)
        assert all(a <= b for a, b in zip(piece, large, strict=True))
        assert piece.work <= max(precision.MAX_WORK, 16 * piece.rows * piece.inner)


@pytest.mark.parametrize("chosen", precision.PRECISIONS)
def test_a_product_takes_time_and_no_random_number(chosen: Precision) -> None:
    state = torch.get_rng_state()
    assert 0 < seconds(Product(64, 512, 512), chosen, CPU) < 10
    assert torch.equal(torch.get_rng_state(), state)


def test_the_products_are_those_of_the_layers_and_of_the_loss(board: Dataset) -> None:
    n = len(board.items)
    layers = {"bias": False, "pairs": [{"user": {"layers": [16, 8]}, "item": {"layers": [8]}}]}
    pairs = products(settings(model=layers), board)
    assert {p.rows for p in pairs} <= {256, 512}
    assert (16, 8) in [(p.inner, p.columns) for p in pairs]
    full = products(settings(model=layers, loss={"kind": "softmax"}, negatives={"full": True}), board)
    in_batch = products(settings(model=layers, loss={"kind": "softmax"}), board)
    assert [(p.rows, p.columns) for p in full if p not in pairs][-1] == (256, n)
    assert [(p.rows, p.columns) for p in in_batch if p not in pairs] == [(256, 256)]


def test_a_pair_that_a_step_leaves_out_has_no_products(board: Dataset) -> None:
    narrow, wide = ({side: {"layers": [width]} for side in ("user", "item")} for width in (8, 32))
    common: dict[str, Any] = {"loss": {"kind": "softmax"}, "negatives": {"full": True}}
    kept = {"pairs": "apart", "start": [{"kind": "transitions", "pair": 1, "learn": False}]}
    alone = settings(model={"bias": False, "similarity": "dot", "pairs": [narrow]}, **common)
    both = settings(model={"bias": False, "similarity": "dot", "pairs": [narrow, wide]}, train=kept, **common)
    assert products(both, board) == products(alone, board)


def machine(fp32: float, bf16: float) -> Callable[..., tuple[Precision, str]]:
    """The choice on a machine of these speeds, on which the products of a test are large."""
    return lambda found, device, watch: choose([p._replace(rows=10**8) for p in found], device, stopwatch(fp32, bf16))


@pytest.fixture
def fast_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "choose", machine(1.0, 0.5))


def test_auto_is_the_default_and_a_given_precision_stays(board: Dataset, fast_bf16: None) -> None:
    assert Config().train.precision == "auto"
    assert Trainer(board, settings()).recipe.train.precision == "bf16"
    given = settings(train={"precision": "fp32"})
    assert with_precision(given, board, CPU, DistributedContext()) is given
    assert Trainer(board, given).recipe.train.precision == "fp32"


def test_small_models_train_in_fp32(board: Dataset) -> None:
    """Whatever the machine, so that a fixed seed gives the bits of fp32."""
    assert Trainer(board, settings()).recipe.train.precision == "fp32"


@pytest.mark.usefixtures("fast_bf16")
def test_a_run_keeps_the_choice_and_the_log_the_reason(tmp_path: Path, messages: list[str]) -> None:
    done = api.fit(checkerboard(), CHECKERBOARD_SCHEMA, settings(), folder=tmp_path / "run")
    assert done.config.train.precision == runs.load(tmp_path / "run").config.train.precision == "bf16"
    said = [m for m in messages if m.startswith("train.precision")]
    assert len(said) == 1
    assert said[0].startswith("train.precision = 'bf16': the largest matrix products of a step take about")


def test_a_resumed_training_keeps_the_choice_of_its_start(
    tmp_path: Path, messages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(train={"checkpoint_steps": 1})
    monkeypatch.setattr(precision, "choose", machine(1.0, 0.5))
    with pytest.raises(KeyboardInterrupt):
        api.fit(checkerboard(), CHECKERBOARD_SCHEMA, config, folder=tmp_path / "run", callback=StopAt(3))
    monkeypatch.setattr(precision, "choose", machine(0.5, 1.0))
    done = api.fit(checkerboard(), CHECKERBOARD_SCHEMA, config, folder=tmp_path / "run", resume=True)
    assert done.config.train.precision == "bf16"
    assert "resuming after step 2" in messages
    assert "train.precision = 'bf16': the training that is resumed has it" in messages
    again = api.fit(checkerboard(), CHECKERBOARD_SCHEMA, config, folder=tmp_path / "other")
    assert again.config.train.precision == "fp32"


def test_all_ranks_take_the_choice_of_the_first(board: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DistributedContext, "broadcast", lambda self, value: "bf16")
    monkeypatch.setattr(precision, "choose", None)  # another rank measures nothing
    found = with_precision(settings(), board, CPU, DistributedContext(rank=1, world_size=2))
    assert found.train.precision == "bf16"
