"""Two-tower retrieval (DSSM): train on tables of users, items and interactions, evaluate, publish, recommend.

    import twotower
    run = twotower.fit(clicks, folder="runs/mine")  # or fit((users, items, clicks), schema, config)
    twotower.evaluate(run)
    twotower.recommend(twotower.load("runs/mine"), [user_id, other_id])
    twotower.publish(run, "store")
    twotower.retriever("store").recommend(twotower.Request(user_id), k=10)

Names of the package are imported on first use, so `import twotower` loads neither torch nor polars. `fit`, `evaluate`,
`load`, `publish`, `recommend` and `suggest` need the extra `train`; `retriever` and `Request` do not.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from twotower.errors import missing_package
from twotower.version import __version__ as __version__

if TYPE_CHECKING:
    from twotower.api import evaluate, fit, load, publish, recommend, retriever, suggest
    from twotower.config.experiment import Config
    from twotower.errors import TwoTowerError
    from twotower.features.categorical import Categorical
    from twotower.features.multi_hot import MultiHot
    from twotower.features.numeric import Numeric
    from twotower.features.schema import Schema
    from twotower.features.sequence import Sequence
    from twotower.features.text import Text
    from twotower.features.vector import Vector
    from twotower.legacy.dssm_trainable import DSSMTrainable
    from twotower.retrieval.request import Request

_HOME = {
    "fit": "api", "evaluate": "api", "load": "api", "publish": "api", "recommend": "api",
    "retriever": "retrieval.retriever:current_retriever", "suggest": "api", "Request": "retrieval.request",
    "Config": "config.experiment", "Schema": "features.schema", "Categorical": "features.categorical",
    "Numeric": "features.numeric", "MultiHot": "features.multi_hot", "Vector": "features.vector",
    "Sequence": "features.sequence", "Text": "features.text", "DSSMTrainable": "legacy.dssm_trainable",
    "TwoTowerError": "errors",
}  # fmt: skip
"""Module of each name, with the name there if it is another one."""
__all__ = [
    "Categorical", "Config", "DSSMTrainable", "MultiHot", "Numeric", "Request", "Schema", "Sequence", "Text",
    "TwoTowerError", "Vector", "evaluate", "fit", "load", "publish", "recommend", "retriever", "suggest",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'twotower' has no attribute {name!r}")
    module, _, there = _HOME[name].partition(":")
    try:
        return getattr(import_module(f"twotower.{module}"), there or name)
    except ModuleNotFoundError as e:
        if missing := missing_package(e, f"twotower.{name}"):
            raise missing from None
        raise
