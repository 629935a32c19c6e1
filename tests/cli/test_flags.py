"""Messages of the library in flags and commands of the command line."""

from __future__ import annotations

import ast
import re
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
import typer

import twotower
from twotower.cli.app import app
from twotower.cli.flags import VERB_OF_FUNCTION, in_flags
from twotower.escaping import python_literal


@pytest.mark.parametrize(
    ("verb", "message", "shown"),
    [
        ("train", "pass `resume=True`, or choose another `folder`", "pass --resume, or choose another --run"),
        ("train", "`overrides` a: expected key=value", "--set a: expected key=value"),
        ("serve", "`max_wait` and `console=False`", "--max-wait and --no-console"),
        ("data fetch", "pass `archive='a.zip'`", "pass --source a.zip"),
        ("gc", "user `gc(keep=3)`, `gc(store=a)`, `gc(**a)`", "user `gc(keep=3)`, `gc(store=a)`, `gc(**a)`"),
        ("gc", "`diagnose(run)` says why", "`twotower doctor RUN` says why"),
        ("gc", "`fit(config, folder='-a b', resume=True)`", "`twotower train CONFIG --run './-a b' --resume`"),
        ("serve", f"`rollback(store={python_literal('a`b$(c)')})`", "`twotower rollback --store 'a`b$(c)'`"),
    ],
)
def test_a_message_of_the_library_is_shown_in_flags(verb: str, message: str, shown: str) -> None:
    assert in_flags(message, [*verb.split(), "a", "--b"], app) == shown


OTHER_PROGRAMS = {"--quiet", "--no-deps", "--dest", "--data-dir", "--port"}  # of pip, and of milvus-lite


@cache
def library_texts() -> list[tuple[str, str]]:
    """Texts of the library's code but docstrings and descriptions: where, and the text with 'x' for what is
    formatted."""
    found, source = [], Path(twotower.__file__).parent
    for path in source.rglob("*.py"):
        if {"cli", "legacy"} & set(path.relative_to(source).with_suffix("").parts) or path.stem == "terminal":
            continue
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        left_out: list[ast.AST] = [
            n.value for n in nodes if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)
        ]
        left_out += [k.value for k in nodes if isinstance(k, ast.keyword) and k.arg == "description"]
        left_out += [value for j in nodes if isinstance(j, ast.JoinedStr) for value in j.values]
        skipped = {id(inner) for node in left_out for inner in ast.walk(node)}
        for node in nodes:
            if id(node) in skipped or not isinstance(node, ast.JoinedStr | ast.Constant):
                continue
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = [p.value if isinstance(p, ast.Constant) and isinstance(p.value, str) else "'x'" for p in parts]
            found.append((f"{path.relative_to(source)}:{node.lineno}", "".join(texts)))
    return found


def test_messages_of_the_library_hold_no_flags() -> None:
    for where, text in library_texts():
        flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - OTHER_PROGRAMS
        assert not flags, f"{where}: {text}"
        assert "`twotower " not in text, f"{where}: {text}"


def test_every_argument_that_a_message_of_the_library_names_is_a_flag() -> None:
    verbs = [[name] for name in typer.main.get_command(app).commands] + [["data", "fetch"]]  # type: ignore[attr-defined]
    spans = {
        span: where
        for where, text in library_texts()
        for span in re.findall(r"`\w+(?:=(?:True|False|'[^`]*')|\([^`]*\))?`", text)
    }
    for span, where in spans.items():
        assert any(in_flags(span, verb, app) != span for verb in verbs), f"{where}: {span}"
    assert len(spans) > 20
    for function, verb in VERB_OF_FUNCTION.items():
        assert [verb] in verbs, function
        homes = ("api", "config.reference", "diagnostics", "store.remote_collections", "serve.api_keys")
        assert any(hasattr(import_module(f"twotower.{home}"), function) for home in homes), function
