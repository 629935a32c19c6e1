"""TorchRec is refused where it does not run."""

from __future__ import annotations

import preloaded
import pytest
import torch

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
