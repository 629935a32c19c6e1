"""The section of the negatives takes sources by name, by import path and as instances."""

from __future__ import annotations

import pytest
from mykinds.negatives import Recent
from pydantic import ValidationError

from twotower.train.negatives import SOURCES
from twotower.train.negatives.config import NegativesConfig
from twotower.train.negatives.hard import HardNegatives
from twotower.train.negatives.in_batch import InBatchNegatives
from twotower.train.negatives.random import RandomNegatives
from twotower.train.negatives.uniform import UniformNegatives


@pytest.mark.parametrize(
    ("named", "sources"),
    [
        ({}, (InBatchNegatives(),)),
        ({"uniform": 5}, (InBatchNegatives(), UniformNegatives(n=5))),
        ({"uniform": True, "in_batch": False}, (UniformNegatives(),)),
        ({"uniform": {}, "hard": 0, "attribute": "", "full": False}, (InBatchNegatives(), UniformNegatives())),
        ({"hard": {"ranks": [1, 3]}, "random": 2}, (InBatchNegatives(), RandomNegatives(n=2), HardNegatives(ranks=(1,
            3)))),
        ({"mykinds.negatives:Recent": 4, "uniform": 5}, (InBatchNegatives(), UniformNegatives(n=5), Recent(n=4))),
        ({"sources": (Recent(n=4), InBatchNegatives())}, (InBatchNegatives(), Recent(n=4))),
        ({"sources": (Recent(n=4),), "uniform": 5}, (UniformNegatives(n=5), Recent(n=4))),
        ({"sources": [HardNegatives(n=2)]}, (HardNegatives(n=2),)),
    ],
)  # fmt: skip
def test_sources_are_named_by_a_value_by_options_and_by_an_import_path(
    named: dict[str, object], sources: object
) -> None:
    config = NegativesConfig.model_validate(named)
    assert config.sources == sources
    assert NegativesConfig.model_validate_json(config.model_dump_json()) == config


def test_a_dump_lists_every_registered_source() -> None:
    dumped = NegativesConfig(uniform=5, sources=(InBatchNegatives(), Recent(n=4))).model_dump(mode="json")
    assert dumped == dict.fromkeys(SOURCES.names, False) | {
        "in_batch": True, "uniform": {"n": 5, "cold": True}, "mykinds.negatives:Recent": {"n": 4, "share": 0.1},
        "mask_positives": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ({"unifrom": 5}, "unknown key 'unifrom'; did you mean 'uniform'?"),
        ({"uniform": {"ranks": [1, 2]}}, "unknown key 'ranks'"),
        ({"in_batch": 5}, "5 is no option; set true or false"),
        ({"sources": 5}, "unknown key 'sources' (allowed: in_batch, uniform"),
        ({"sources": [{"kind": "hard", "n": 2}]}, "unknown key 'sources' (allowed: in_batch, uniform"),
        ({"sources": (Recent(), Recent(n=3))}, "negatives.mykinds.negatives:Recent is set twice"),
        ({"no.such.module:Source": 5}, "code outside twotower"),
        ({"full": True, "random": 5}, "negatives.full makes every item a candidate, so negatives.random adds none"),
    ],
)
def test_a_wrong_source_is_refused_with_what_to_do(named: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        NegativesConfig.model_validate(named)
    assert words in caught.value.errors()[0]["msg"]


def test_a_dump_without_defaults_leaves_out_sources_that_are_the_default() -> None:
    config = NegativesConfig(mask_positives=False)
    assert config.model_dump(exclude_defaults=True) == {"mask_positives": False}


class Sized(Recent):
    """A source with an option."""


def test_sources_of_elsewhere_keep_their_order_when_a_config_is_read_back() -> None:
    """A TOML file has keys with a value before keys with options."""
    config = NegativesConfig(sources=(Sized(n=3), Recent()))
    dumped = config.model_dump(mode="json")
    again = {key: dumped[key] for key in sorted(dumped, key=lambda key: isinstance(dumped[key], dict))}
    assert (
        NegativesConfig.model_validate(dict(reversed(again.items()))) == NegativesConfig.model_validate(again) == config
    )


@pytest.mark.parametrize("value", [{"kind": "popularity", "n": 3}, Recent(n=3)])
def test_a_source_stands_under_its_own_name(value: object) -> None:
    with pytest.raises(ValidationError, match=r"negatives.uniform is a source of kind '.*'; name it by its kind"):
        NegativesConfig.model_validate({"uniform": value})
