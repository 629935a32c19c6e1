"""The columns that `suggest` takes for a log are compared with the right ones, and its question is answered once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from benchmarks.quality import first_contact
from benchmarks.quality.other_logs import DECLARED, MADE, Outcome, outcome, truth

RIGHT = {"user": ["who"], "item": ["what"], "weight": ["", "amount"]}
CONFIG = '[schema]\nuser_id = "who"\nitem_id = "{item}"\nweight = "{weight}"\n'


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[object]]]:
    """Return a function that takes the replies of `suggest`, a code and a text each, and returns the calls to come."""

    def replies(*texts: tuple[int, str]) -> list[list[object]]:
        left, calls = [*texts], []

        def call(words: list[object], may_refuse: bool) -> CompletedProcess[str]:
            code, text = left.pop(0)
            calls.append(words)
            if not code:
                Path(str(words[words.index("-o") + 1])).write_text(text)
            return CompletedProcess([], code, "", text)

        monkeypatch.setattr(first_contact, "call", call)
        return calls

    return replies


@pytest.mark.parametrize(
    ("replies", "found"),
    [
        ([(0, CONFIG.format(item="what", weight="amount"))], Outcome({"weight": "amount"}, [], [])),
        ([(0, CONFIG.format(item="where", weight=""))], Outcome({"item": "where"}, [], ["item = 'where'"])),
        ([(2, "give --item C"), (0, CONFIG.format(item="what", weight=""))], Outcome({}, ["item"], [])),
        (
            [(2, "give --user C or --item C"), (0, CONFIG.format(item="what", weight="amount"))],
            Outcome({"weight": "amount"}, ["item", "user"], ["weight = 'amount'"]),
        ),
        ([(2, "give --weight C"), (0, CONFIG.format(item="what", weight=""))], Outcome({}, ["weight"], [])),
        ([(2, "give --item C"), (2, "give --time C")], Outcome({}, ["item"], ["refused: give --time C"])),
        ([(2, "no rows")], Outcome({}, [], ["refused: no rows"])),
        ([(2, "schema.missing=drop"), (0, CONFIG.format(item="what", weight=""))], Outcome({}, [], [])),
    ],
    ids=["right", "wrong", "asked", "asked for none", "more than the flags", "asked twice", "refused", "a setting"],
)
def test_roles_questions_and_refusals(
    say: Callable[..., list[list[object]]], tmp_path: Path, replies: list[tuple[int, str]], found: Outcome
) -> None:
    calls = say(*replies)
    roles, asked, errors = outcome(["log.csv"], tmp_path / "c.toml", ["schema.missing=drop"], RIGHT)
    assert roles == ({"user": "who", "item": "what", **found.roles} if not replies[-1][0] else {})
    assert asked == found.asked
    assert [error.partition(" in place of")[0] for error in errors] == found.wrong
    assert len(calls) == len(replies)
    if asked:
        none = ["--weight", ""] if "weight" in asked else ["--time", ""] if "time" in asked else []
        assert calls[1][2:-2] == ["--user", "who", "--item", "what", *none]


def test_every_log_has_a_user_and_an_item() -> None:
    assert set(DECLARED["options"]["only"][0]) == set(DECLARED["options"]["only"][2]) == set(DECLARED["logs"])
    assert set(MADE) < set(DECLARED["logs"])
    for name in DECLARED["logs"]:
        assert all(truth(name)[role][0] for role in ("user", "item"))
