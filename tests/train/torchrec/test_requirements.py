"""TorchRec is refused where it does not run."""

from __future__ import annotations

import tomllib
from pathlib import Path

import preloaded
import pytest
import torch

import twotower
from twotower.errors import ConfigError
from twotower.train.torchrec.requirements import import_torchrec, is_installed


@pytest.fixture(scope="module", autouse=True)
def loaded() -> None:
    """TorchRec takes seconds to import."""
    preloaded.load("torchrec", "twotower.train.torchrec.table_group")


@pytest.mark.parametrize(
    ("kind", "message"), [("mps", "not on 'mps'"), ("cuda", "needs fbgemm-gpu, and its CPU build")]
)
def test_devices_that_cannot_do_it_are_refused(kind: str, message: str) -> None:
    if kind == "cuda" and is_installed("fbgemm-gpu"):
        pytest.fail("this machine has the kernels of a GPU: look at what the test says of their absence")
    with pytest.raises(ConfigError, match=message):
        import_torchrec(torch.device(kind))


def test_an_installation_of_the_checkout_and_of_the_extra_keeps_torch_at_one_bound() -> None:
    root = Path(twotower.__file__).parents[2]
    extras = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    (bound,) = (requirement for requirement in extras["torchrec"] if requirement.startswith("torch<"))
    assert f"\nTORCH = {bound}\n" in (root / "Makefile").read_text(encoding="utf-8")
    major, minor = map(int, torch.__version__.split(".")[:2])
    assert (major, minor) < tuple(map(int, bound.removeprefix("torch<").split(".")))
