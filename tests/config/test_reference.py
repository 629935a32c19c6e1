"""The reference of the options: every one with its default, its tier and a short description."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import typer
from pydantic import BaseModel
from worlds import ID_FEATURES

from twotower.cli.app import app
from twotower.config.experiment import Config
from twotower.config.reference import config_tables, config_template, of_tier, schema_tables
from twotower.config.toml import load_config
from twotower.features.schema import FEATURES, Schema
from twotower.kinds import Kinds
from twotower.model.branches import BRANCHES
from twotower.model.pooling import POOLINGS
from twotower.model.towers import TowerConfig
from twotower.section import Section, Tier
from twotower.serve.settings import ServeSettings
from twotower.train.negatives import SOURCES
from twotower.train.negatives.config import NegativesConfig

MAX_WORDS = 25


@pytest.mark.parametrize("everything", [False, True])
def test_the_template_is_the_default_config(tmp_path: Path, everything: bool) -> None:
    path = tmp_path / "config.toml"
    path.write_text(config_template(everything), encoding="utf-8")
    schema, config = load_config(path)
    assert config == Config()
    assert schema == Schema(features=ID_FEATURES)


def sections(base: type[Section] = Section) -> Iterator[type[Section]]:
    """All sections of the package that are loaded."""
    for section in base.__subclasses__():
        if section.__module__.startswith("twotower."):
            yield section
        yield from sections(section)


def test_every_option_has_exactly_one_tier() -> None:
    for section in sections():
        for base in section.__mro__:
            named = [*base.__dict__.get("start_here", ()), *base.__dict__.get("research", ())]
            known = {*section.model_fields, *(SOURCES.names if section is NegativesConfig else ())}
            assert sorted({*named} & known) == sorted(named), section
    tables = (*config_tables(), *schema_tables())
    tiers = {
        tier: {(t.name, t.kind, o.key) for t in of_tier(tables, tier) for o in t.options} for tier in get_args(Tier)
    }
    every = [(t.name, t.kind, o.key) for t in tables for o in t.options]
    assert sorted(every) == sorted(option for options in tiers.values() for option in options)
    assert 10 <= len(tiers["start here"]) <= 14
    assert len(tiers["tune"]) > len(tiers["research"]) > 10


def test_the_short_template_has_the_options_to_start_with() -> None:
    shown = tomllib.loads(config_template())
    assert shown["train"] == {"epochs": 10, "lr": 0.001, "monitor": ""}
    assert not shown["negatives"]
    assert "\n# random = false\n" in config_template(), (
        "which a pointwise loss without negatives has, unless it is given"
    )
    assert len(config_template().splitlines()) < 80 < 200 < len(config_template(everything=True).splitlines())


def test_the_template_names_every_option() -> None:
    text = config_template(everything=True)
    lines = set(text.splitlines())
    for table in config_tables():
        assert table.about or table.same_as or not table.name
        for option in table.options:
            active = {f"{'# ' * option.commented}{option.key} = {option.default}", f"# {option.meaning}"}
            commented = f"#   {option.key} = {option.default or '…'}  # {option.meaning}"
            assert active <= lines or commented in lines, (table.name, option)
        if table.kind:
            about = " ".join(table.about.partition("\n\n")[0].split())
            word = f"{table.kind}, measured always" if table.always else f'kind = "{table.kind}"'
            assert f"# {word}: {about}" in lines
    for table in schema_tables()[1:]:
        for option in table.options:
            assert f"#   {option.key} = {option.default or '…'}  # {option.meaning}" in lines
    assert {t.kind for t in schema_tables()} == {"", *FEATURES.names, *POOLINGS.names}
    assert {t.kind for t in config_tables()} >= {"", *BRANCHES.names}
    for key in Schema.model_fields:
        assert key in text


def leaves(prefix: str, model: type[BaseModel], seen: set[type[BaseModel]]) -> set[tuple[str, str]]:
    """Every (section, key) below a section, found without the code under test. A section's second place is left out."""
    found: set[tuple[str, str]] = set()
    if model in seen:
        return found
    seen.add(model)
    for key, info in model.model_fields.items():
        path = f"{prefix}.{key}".strip(".")
        if path == "model.pairs":
            found |= leaves("model.pairs.user", TowerConfig, seen)
        elif key in ("branches", "metrics", "scorers"):
            found.add((path, "kind"))
        elif path == "train.solved":  # which no user writes
            continue
        elif key == "sources":
            for kind in SOURCES:
                found |= {(prefix, kind.kind), *((f"{prefix}.{kind.kind}", option) for option in kind.model_fields)}
        elif registry := next((m for m in info.metadata if isinstance(m, Kinds)), None):
            found |= {(path, name) for name in ("kind", *registry.protocol.model_fields)}
        elif isinstance(info.default, BaseModel):
            found |= leaves(path, type(info.default), seen)
        else:
            found.add((prefix, key))
    return found


def test_options_are_every_key_with_its_default_and_meaning() -> None:
    found = [(table.name, o) for table in config_tables() if not table.kind for o in table.options]
    known = leaves("", Config, set())
    assert {(section, o.key) for section, o in found} == known
    assert len(found) == len(known)
    for section, o in found:
        assert len(o.meaning) > 5, (section, o.key)
        tomllib.loads(f"{o.key} = {o.default or 0}")
    hashing = next(o for t in schema_tables() if t.kind == "categorical" for o in t.options if o.key == "hash_buckets")
    assert (hashing.default, hashing.meaning) == ("0", "Number of hash buckets. 0: a vocabulary.")


def descriptions() -> Iterator[tuple[str, str]]:
    """Where, and the description: of each option of a config, of a service, and of a command."""
    assert config_tables() + schema_tables()  # which load the kinds
    for section in sections():
        for key, field in section.model_fields.items():
            yield f"{section.__module__}:{section.__name__}.{key}", field.description or ""
    for key, field in ServeSettings.model_fields.items():
        yield f"twotower.serve.settings:{key}", field.description or ""
    commands = [("", typer.main.get_command(app))]
    while commands:
        name, command = commands.pop()
        commands += [(f"{name} {verb}", inner) for verb, inner in getattr(command, "commands", {}).items()]
        for parameter in command.params:
            yield f"twotower{name} {parameter.name}", getattr(parameter, "help", None) or ""


def sentences(text: str) -> list[str]:
    """The sentences of a description, without notes: `Repeatable.`, and the meaning of a value, `0: none.`"""
    parts = re.split(r"(?<=[.!?])\s+(?=\S)", text)
    return [p for p in parts if len(p.split()) > 3 and not re.match(r"\S+( \S+)?: ", p)]


def test_a_description_is_one_sentence_of_25_words_at_most() -> None:
    found = dict(descriptions())
    assert len(found) > 200
    long = [
        f"{where}: {len(text.split())} words, {len(sentences(text))} sentences: {text}"
        for where, text in found.items()
        if len(text.split()) > MAX_WORDS or len(sentences(text)) > 1
    ]
    assert not long, "\n".join(long)
