"""The options of `twotower serve`: one for each setting of a service."""

from __future__ import annotations

from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_args

import pytest
import typer

from twotower.cli.app import app, run_command
from twotower.errors import ConfigError
from twotower.serve import supervisor
from twotower.serve.settings import HINTS, ServeSettings, Setting

SETTINGS: dict[str, Setting] = {name: get_args(hint)[1] for name, hint in HINTS.items()}


def test_every_setting_is_an_option_with_its_default() -> None:
    options = {p.name: p for p in typer.main.get_command(app).commands["serve"].params}  # type: ignore[attr-defined]
    for field in fields(ServeSettings):
        option = options[field.name]
        assert option.required == (field.default is MISSING)
        assert option.required or option.default == field.default
        assert SETTINGS[field.name].description.split("`")[0] in option.help


def test_every_option_reaches_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def run(settings: ServeSettings) -> int:
        given.append(settings)
        return 0

    monkeypatch.setattr(supervisor, "run_service", run)
    words, want = ["serve"], {}
    values: dict[str, Any] = {
        "store": str(tmp_path), "host": "127.0.0.2", "keys": tmp_path / "keys", "event_store": "redis://h:1/2",
        "trusted_proxies": "10.0.0.0/8", "unknown_user": "404", "index_down": "503", "workers": 2, "threads": 3,
        "kinds": ("json", "csv"), "target_wait": 6.0, "max_wait": 7.0, "max_k": 9,
    }  # fmt: skip
    for place, field in enumerate(fields(ServeSettings)):
        flag, value = f"--{field.name.replace('_', '-')}", values.get(field.name, place + 1)
        if isinstance(field.default, bool):
            value = not field.default
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, tuple):
            words += [word for element in value for word in (flag, element)]
        else:
            words += [flag, str(value)]
        want[field.name] = value
    assert run_command(words) == 0
    assert given == [ServeSettings(**want)]


def test_options_are_read_from_the_environment_and_flags_override_them(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[ServeSettings] = []
    monkeypatch.setattr(supervisor, "run_service", lambda settings: given.append(settings))
    for name, value in (("STORE", "s"), ("MAX_K", "9"), ("CONSOLE", "false"), ("KINDS", "json csv"), ("PORT", "1")):
        monkeypatch.setenv(f"TWOTOWER_SERVE_{name}", value)
    assert run_command(["serve", "--port", "2"]) == 0
    assert given == [ServeSettings(store="s", max_k=9, console=False, kinds=("json", "csv"), port=2)]
    monkeypatch.setenv("TWOTOWER_SERVE_MAX_K", "many")
    assert run_command(["serve"]) == 2


def settings_with(**given: Any) -> ServeSettings:
    more = {"rate": 1.0} if "burst" in given else {}
    return ServeSettings(**{"store": Path("s"), **more, **given})


def test_a_demo_that_cannot_serve_ends_before_it_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with supervisor.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert run_command(["demo", "--data", "none.zip", "--serve", "--port", str(port)]) == 2
    assert capsys.readouterr().err.startswith(f"error: cannot listen on 127.0.0.1:{port} ")


@pytest.mark.parametrize("name", [n for n, s in SETTINGS.items() if s.at_least is not None or s.above is not None])
def test_a_value_out_of_its_range_is_refused_by_name(name: str) -> None:
    setting = SETTINGS[name]
    bad = [setting.above if setting.at_least is None else setting.at_least - 1]
    if setting.at_most is not None:
        bad.append(setting.at_most + 1)
    for value in [*bad, *((float("nan"), float("inf")) if get_args(HINTS[name])[0] is float else ())]:
        with pytest.raises(ConfigError, match=f"^`{name}` is {value}, expected "):
            settings_with(**{name: value})
    if setting.at_least is not None and name != "admin_port":
        settings_with(**{name: setting.at_least})
