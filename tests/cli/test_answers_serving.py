"""The options of `twotower serve`: one for each setting of a service."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer

from twotower.cli.app import app, run_command
from twotower.errors import ConfigError
from twotower.serve import supervisor
from twotower.serve.settings import ServeSettings


def test_every_setting_is_an_option_with_its_default() -> None:
    options = {p.name: p for p in typer.main.get_command(app).commands["serve"].params}  # type: ignore[attr-defined]
    for name, field in ServeSettings.model_fields.items():
        option = options[name]
        assert option.required == field.is_required()
        assert option.required or option.default == field.default
        assert (field.description or "?").split("`")[0] in option.help


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
    for place, (name, field) in enumerate(ServeSettings.model_fields.items()):
        flag, value = f"--{name.replace('_', '-')}", values.get(name, place + 1)
        if isinstance(field.default, bool):
            value = not field.default
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, tuple):
            words += [word for element in value for word in (flag, element)]
        else:
            words += [flag, str(value)]
        want[name] = value
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


def test_a_demo_that_cannot_serve_ends_before_it_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with supervisor.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert run_command(["demo", "--data", "none.zip", "--serve", "--port", str(port)]) == 2
    assert capsys.readouterr().err.startswith(f"error: cannot listen on 127.0.0.1:{port} ")


@pytest.mark.parametrize(
    ("name", "bad", "least"),
    [
        ("port", (-1, 65_536), 0), ("workers", (0,), 1), ("event_timeout", (0.0, float("nan"), float("inf")), 0.1),
        ("drain", (-0.1, float("inf")), 0.0), ("max_connections", (-1,), 0), ("keep_alive", (-1.0, 0.0), 0.5),
    ],
)  # fmt: skip
def test_a_value_out_of_its_range_is_refused_by_name(name: str, bad: tuple[float, ...], least: float) -> None:
    for value in bad:
        with pytest.raises(ConfigError, match=f"^`{name}`: input should be .*, got {value}"):
            ServeSettings(store=Path("s"), **{name: value})
    assert getattr(ServeSettings(store=Path("s"), **{name: least}), name) == least
