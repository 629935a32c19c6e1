"""A change of the code of an outside kind is warned of at a load of its weights, and refused at a resume."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
from pydantic import JsonValue
from worlds import CHECKERBOARD_SCHEMA, checkerboard, settings

import twotower
from twotower import api
from twotower.config.experiment import Config
from twotower.errors import RunError
from twotower.kinds import code_digests, warn_of_changes
from twotower.train.progress import Callback, EpochRecord

NAME = "kinds_that_change"
MODULE = """
from twotower.train.losses.bce import Bce


class Doubled(Bce):
    '''Doubles nothing.'''

    kind = __name__ + ":Doubled"
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a module that is loaded, with a kind of loss."""
    path = tmp_path / f"{NAME}.py"
    path.write_text(MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    importlib.invalidate_caches()
    importlib.import_module(NAME)
    return path


def edited(module: Path, again: bool = True) -> None:
    """Change the file of the module, and with `again` load it as another process would."""
    module.write_text(module.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    if again:
        del sys.modules[NAME]
        importlib.import_module(NAME)


def config(epochs: int = 1) -> Config:
    return settings(loss={"kind": f"{NAME}:Doubled"}, train={"epochs": epochs})


def test_digests_are_of_the_modules_that_are_named(module: Path) -> None:
    section: JsonValue = {"a": [{"kind": f"{NAME}:Doubled"}], "b": {"kind": "bce"}, "c": 1, "d": "json:loads"}
    found = code_digests(section)
    assert [*found] == [NAME]
    assert code_digests({"negatives": {f"{NAME}:Doubled": {"n": 3}}}) == found
    assert code_digests({"kind": "no_module_of_this:Name"}, [{"kind": "__main__:Name"}], f"{NAME}:Doubled") == {}
    edited(module, again=False)
    assert code_digests(section) == found, "the code that is loaded is as it was"
    edited(module)
    assert code_digests(section) != found


@pytest.mark.parametrize("told", [None, [], {"no_module_of_this": "x"}, {"sys": "x"}])
def test_what_has_no_file_is_no_change(told: JsonValue, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    warn_of_changes(told, tmp_path)
    assert not caplog.messages


def test_a_change_is_told_where_a_run_or_its_bundle_is_loaded(
    module: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = api.fit(checkerboard(), CHECKERBOARD_SCHEMA, config(), folder=tmp_path / "run")
    api.publish(run, tmp_path / "store")
    for changed in (False, True):
        caplog.clear()
        if changed:
            edited(module)
        api.load(tmp_path / "run")
        twotower.retriever(tmp_path / "store")
        told = [line for line in caplog.messages if f"{NAME}.py has changed since the training" in line]
        assert len(told) == 2 * changed


def test_a_training_is_not_resumed_by_other_code(module: Path, tmp_path: Path) -> None:
    tables = checkerboard()
    api.fit(tables, CHECKERBOARD_SCHEMA, config(), folder=tmp_path / "run")
    edited(module)
    with pytest.raises(RunError, match=f"cannot resume: the run has changed .code of {NAME}: "):
        api.fit(tables, CHECKERBOARD_SCHEMA, config(), folder=tmp_path / "run", resume=True)
    done = api.fit(tables, CHECKERBOARD_SCHEMA, config(2), folder=tmp_path / "run", resume=True, override=True)
    assert len(done.history) == 2


def test_what_was_trained_is_what_was_loaded_when_the_training_began(
    module: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The file is edited after the first epoch, and put back after the training."""

    class Edit(Callback):
        def on_epoch_end(self, history: list[EpochRecord]) -> None:
            edited(module, again=False)

    before = module.read_bytes()
    api.fit(checkerboard(), CHECKERBOARD_SCHEMA, config(), folder=tmp_path / "run", callback=Edit())
    module.write_bytes(before)
    del sys.modules[NAME]
    importlib.import_module(NAME)
    api.load(tmp_path / "run")
    assert "has changed" not in caplog.text
