"""Requirements of TorchRec, and the check that it is there and fits torch and the device."""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import warnings

import torch

from twotower.errors import ConfigError, install_command


def torchrec_requirements() -> list[str]:
    """Return the requirements of TorchRec and of its CPU kernels that fit the installed torch, for `pip install --no-deps`."""
    major, minor = map(int, torch.__version__.split(".")[:2])
    release = f"{major - 1}.{minor - 5}.*"  # torch 2.13 and fbgemm 1.8 came out together, and so on
    return [f"torchrec=={release}", f"fbgemm-gpu-cpu=={release}"]


def import_torchrec(device: torch.device) -> None:
    """Import TorchRec, without its warnings. Raises ConfigError if it is missing, or does not fit the installed torch or
    the device."""
    requirements = " ".join(map(repr, torchrec_requirements()))
    install = f"{install_command('torchrec')}, then pip install --no-deps {requirements} (docs/scale.md)"
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(
            f"train.embedding_placement = 'torchrec' works on 'cpu' and 'cuda', not on '{device.type}'; set train.device"
        )
    # TorchRec uses a deprecated function of torch, which logs each use.
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # fbgemm warns of each kernel of other hardware that is missing.
            warnings.simplefilter("ignore")
            for module in ("fbgemm_gpu", "torchrec", "twotower.train.torchrec.table_group"):
                importlib.import_module(module)
    except ImportError as e:
        raise ConfigError(f"train.embedding_placement = 'torchrec' needs TorchRec ({e}); {install}") from None
    except (OSError, AttributeError, RuntimeError) as e:
        what = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise ConfigError(f"TorchRec does not fit torch {torch.__version__} ({what}); {install}") from None
    if device.type == "cuda" and not is_installed("fbgemm-gpu"):
        raise ConfigError(
            "train.embedding_placement = 'torchrec' on 'cuda' needs fbgemm-gpu, and its CPU build is installed; install "
            "fbgemm-gpu instead of fbgemm-gpu-cpu, or set train.device = 'cpu'"
        )


def is_installed(distribution: str) -> bool:
    """Return True if a distribution of this name is installed."""
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
