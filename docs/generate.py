"""Writes docs/configuration.md and docs/cli.md from the code: `make docs`. A test keeps them up to date."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from twotower import cli
from twotower.config import BRANCH_KINDS, FEATURE_KINDS, branch_options, options
from twotower.schema import Schema

DOCS = Path(__file__).parent
NOTE = "<!-- written by `make docs` from the code; do not edit -->\n"


def configuration() -> str:
    """Every key of a config file."""
    lines = [
        "# Configuration",
        NOTE,
        "A config is a TOML file; `twotower config` prints one with every option. An unknown key is an error. "
        "Any value can be changed from the command line: `--set train.epochs=3`, "
        "`--set model.pairs.0.user.dropout=0.2`.\n",
    ]
    section = ""
    for name, key, default, meaning in options():
        if name != section:
            lines += [f"\n## [{name}]\n", "| key | default | meaning |", "|---|---|---|"]
            section = name
        lines.append(_row(key, default, meaning))
    lines.append(
        "\n## [[model.pairs.user.branches]]\n\nThe same on the item side. Every branch has a `kind`, a section `senet` "
        "(its own gate, keys as in `[model.pairs.user.senet]`), and the keys of its kind."
    )
    for kind, model in BRANCH_KINDS.items():
        text = " ".join((model.__doc__ or "").split())
        lines.append(f'\n### branch kind = "{kind}"\n\n{text}')
        if own := [_row(*rest) for k, *rest in branch_options() if k == kind]:
            lines += ["", "| key | default | meaning |", "|---|---|---|", *own]
    lines += ["\n## [schema]\n", "| key | default | meaning |", "|---|---|---|", *_fields(Schema, skip=("features",))]
    lines.append(
        "\n## [[schema.features]]\n\nEvery feature has a `kind`, a `name`, a `side` (`user` or `item`), and the keys "
        "of its kind."
    )
    for kind, model in FEATURE_KINDS.items():
        text = " ".join((model.__doc__ or "").split())
        lines += [f'\n### kind = "{kind}"\n\n{text}\n', "| key | default | meaning |", "|---|---|---|"]
        lines += _fields(model, skip=("kind", "name", "side"))
    return "\n".join(lines) + "\n"


def _row(key: str, default: str, meaning: str) -> str:
    return f"| `{key}` | `{default}` | {_cell(meaning)} |"


def _fields(model: Any, skip: tuple[str, ...]) -> list[str]:
    return [
        f"| `{name}` | `{info.default!r}` | {_cell(info.description or '')} |"
        for name, info in model.model_fields.items()
        if name not in skip
    ]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def command_line() -> str:
    """Every verb with its arguments and options."""
    lines = ["# Command line", NOTE, "Exit codes: 0 done, 1 training failed, 2 a mistake in the input, 143 stopped by "
             "a signal after saving.\n"]  # fmt: skip
    _command(typer.main.get_command(cli.app), "twotower", lines)
    return "\n".join(lines) + "\n"


def _command(command: Any, name: str, lines: list[str]) -> None:
    if hasattr(command, "commands"):
        for inner, sub in command.commands.items():
            _command(sub, f"{name} {inner}", lines)
        return
    lines.append(f"\n## {name}\n\n{command.help}\n")
    params = [p for p in command.params if p.name != "help"]
    if params:
        lines += ["| argument | meaning |", "|---|---|"]
    for p in params:
        shown = " ".join(p.opts) if p.param_type_name == "option" else (p.metavar or p.name.upper())
        value = f" {p.metavar}" if p.param_type_name == "option" and p.metavar else ""
        lines.append(f"| `{shown}{value}` | {_cell(p.help or '')} |")


PAGES = {"configuration.md": configuration, "cli.md": command_line}

if __name__ == "__main__":
    for page, text in PAGES.items():
        (DOCS / page).write_text(text(), encoding="utf-8")
