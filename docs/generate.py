"""Write docs/configuration.md, cli.md, http.md, openapi.json, and the code in extending.md and prepared-format.md, from
the code: `make docs`. A test compares them."""

from __future__ import annotations

import json
import re
import tempfile
from functools import cache, partial
from pathlib import Path
from typing import Any

import typer

from twotower.cli.app import app
from twotower.config.reference import Option, OptionTable, config_tables, of_tier, schema_tables

DOCS = Path(__file__).parent
NOTE = "<!-- written by `make docs` from the code; do not edit -->\n"


def configuration() -> str:
    """Return configuration.md: every key of a config file, in three tiers."""
    tables = (*config_tables(), *schema_tables())
    lines = [
        "# Configuration",
        NOTE,
        "A config is a TOML file. The shortest names `data.interactions`, and `schema.user_id` and `schema.item_id` "
        "where its columns have other names; `twotower config` prints one with the options to start with, `twotower "
        "config --all` one with every option. An unknown key is an error. The command line changes any value: `--set "
        "train.epochs=3`, `--set model.pairs.0.user.dropout=0.2`. Where a `kind` is named, a kind of your own may be: "
        "[extending.md](extending.md).",
        "\n## Start here\n",
        *_rows([(f"{t.name}.{o.key}", o) for t in of_tier(tables, "start here") for o in t.options]),
        "\n## Tune\n\nOptions that decide how good and how fast a model is, by section.",
    ]
    for table in of_tier(tables, "tune"):
        lines += [*_heading(table), *_documentation(table), *_rows([(o.key, o) for o in table.options])]
    lines.append("\n## Research\n\nOptions whose defaults are right for nearly everybody, by section.")
    for table in of_tier(tables, "research"):
        lines += [*_heading(table), *_rows([(o.key, o) for o in table.options])]
    return "\n".join(lines) + "\n"


def _heading(table: OptionTable) -> list[str]:
    name = f"[[{table.name}]]" if table.listed else f"[{table.name}]"
    same = ["", f"As `[{table.same_as}]`."] if table.same_as else []
    if table.always:
        return [f"\n#### {name} {table.kind}, measured always\n"]
    return [f'\n#### {name} kind = "{table.kind}"' if table.kind else f"\n### {name}", *same, ""]


def _documentation(table: OptionTable) -> list[str]:
    return [table.about, ""] if table.about and not table.same_as else []


def _rows(options: list[tuple[str, Option]]) -> list[str]:
    """Return a table of options by key; nothing without options."""
    rows = [f"| `{key}` | {_code(o.default)} | {_cell(o.meaning)} |" for key, o in options]
    return ["| key | default | meaning |", "|---|---|---|", *rows] if rows else []


def _code(default: str) -> str:
    return f"`{default}`" if default else "required"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def command_line() -> str:
    """Return cli.md: every command with its arguments and options."""
    codes = (
        "Exit codes: 0 done, 1 training failed, 2 a mistake in the input, 130 stopped by Ctrl-C, 143 by SIGTERM. "
        "`twotower --install-completion` completes verbs and options in a shell.\n"
    )
    lines = ["# Command line", NOTE, codes]
    _command(typer.main.get_command(app), "twotower", lines)
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
        shows = p.default not in (None, "") and not isinstance(p.default, bool)
        default = f" (default {p.default})" if shows else ""
        lines.append(f"| `{_cell(f'{shown}{value}')}` | {_cell(p.help or '')}{default} |")


# ---- the service


@cache
def openapi() -> dict[str, Any]:
    """Return the OpenAPI document of the service, without generated titles."""
    from twotower.serve.routes import create_app
    from twotower.serve.service import Service
    from twotower.serve.settings import ServeSettings
    from twotower.store.store import Store

    with tempfile.TemporaryDirectory() as folder:
        Store.create(Path(folder) / "store")
        document = create_app(Service(ServeSettings(store=Path(folder) / "store"))).openapi()

    def plain(value: Any, of_names: bool = False) -> Any:
        if isinstance(value, list):
            return [plain(v) for v in value]
        if not isinstance(value, dict):
            return value
        return {
            k: plain(v, k == "properties") for k, v in value.items() if of_names or k != "title" or "version" in value
        }

    without: dict[str, Any] = plain(document)
    return without


def openapi_json() -> str:
    """Return openapi.json, the document of `GET /openapi.json`."""
    return json.dumps(openapi(), indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def http() -> str:
    """Return http.md: every route, body, reply and problem."""
    from twotower.serve.problems import PROBLEMS

    document = openapi()
    lines = [
        "# HTTP",
        NOTE,
        "The routes of `twotower serve --store STORE`. Bodies and replies are JSON in UTF-8; the OpenAPI document is "
        "[openapi.json](openapi.json), also at `GET /openapi.json`. Every reply has the header `X-Request-ID`: that of "
        "the request, if it is 1 to 64 of `A-Z a-z 0-9 . _ -`, or a new one. An id in a path is percent-encoded UTF-8 "
        "of any characters; ids that a path would lose (`.` and `..` in most clients, `%2F` and `%00` in some proxies) "
        "go into the query of the same route. With `--keys`, all routes but `/`, `/livez`, `/readyz`, `/openapi.json` "
        "and `/problems` need `Authorization: Bearer KEY`. "
        "[operations.md](operations.md) says how to run the service.\n",
    ]
    for tag in document["tags"]:
        lines.append(f"\n## {tag['name'].capitalize()}\n\n{tag['description']}")
        for path, operations in document["paths"].items():
            for verb, operation in operations.items():
                if operation["tags"] == [tag["name"]]:
                    lines += _operation(verb, path, operation)
    lines.append("\n## Bodies and replies")
    for name, schema in document["components"]["schemas"].items():
        lines += _schema_table(name, schema)
    lines += [
        "\n## Problems\n",
        "Every error is `application/problem+json` (RFC 9457); `type` is the address of a page with the remedy.\n",
        "| type | status | title | what to do |",
        "|---|---|---|---|",
    ]
    for name, (status, title, what_to_do) in PROBLEMS.items():
        lines.append(f"| `/problems/{name}` | {status} | {title} | {_cell(what_to_do)} |")
    return "\n".join(lines) + "\n"


def _operation(verb: str, path: str, operation: dict[str, Any]) -> list[str]:
    lines = [f"\n### {verb.upper()} {path.replace(':path}', '}')}\n", operation["description"]]
    rows = [
        f"| `{p['name']}` | {p['in']} | {_kind(p['schema'])} | {_cell(p.get('description', ''))} |"
        for p in operation.get("parameters", [])
    ]
    if rows:
        lines += ["", "| parameter | in | kind | meaning |", "|---|---|---|---|", *rows]
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
    if body:
        lines.append(f"\nBody: {_kind(body)}.")
    for status, reply in operation["responses"].items():
        schema = next(iter(reply.get("content", {}).values()), {}).get("schema") or {}
        kind = f": {_kind(schema)}" if schema else ""
        if not kind.endswith("(#problemreply)"):
            lines.append(f"\n{status}{kind}.")
    refused = [
        f"{s} {r['description']}"
        for s, r in operation["responses"].items()
        if "application/problem+json" in r.get("content", {})
    ]
    if refused:
        lines.append(f"\nProblems: {'; '.join(refused)}.")
    return lines


def _schema_table(name: str, schema: dict[str, Any]) -> list[str]:
    lines = [f"\n### {name}\n", " ".join(schema.get("description", "").split()), ""]
    lines += ["| field | kind | default | meaning |", "|---|---|---|---|"]
    for field, about in schema.get("properties", {}).items():
        default = "required" if field in schema.get("required", ()) else f"`{json.dumps(about.get('default'))}`"
        lines.append(f"| `{field}` | {_cell(_kind(about))} | {default} | {_cell(about.get('description', ''))} |")
    return lines


def _kind(schema: dict[str, Any]) -> str:
    """Describe a JSON schema in a few words."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if branches := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(dict.fromkeys(_kind(s) for s in branches))
    if "enum" in schema:
        return " or ".join(f"`{json.dumps(v)}`" for v in schema["enum"])
    kind = schema.get("type", "any")
    if kind == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"object of {_kind(schema['additionalProperties'])}"
    bounds = [f"{word} {schema[key]:g}" for key, word in _BOUNDS.items() if key in schema]
    return f"{kind} ({', '.join(bounds)})" if bounds else str(kind)


_BOUNDS = {"minimum": "from", "maximum": "to", "minLength": "at least", "maxLength": "at most"}

# ---- pages that show code


def with_code(page: str) -> str:
    """Return a page with the present code of the examples that it shows."""

    def shown(found: re.Match[str]) -> str:
        code = (DOCS.parent / found[1]).read_text(encoding="utf-8")
        return f"<!-- code: {found[1]} -->\n\n```python\n{code}```\n"

    text = (DOCS / page).read_text(encoding="utf-8")
    return re.sub(r"<!-- code: (\S+) -->\n(?:\n```python\n.*?```\n)?", shown, text, flags=re.DOTALL)


PAGES = {
    **{page: partial(with_code, page) for page in ("extending.md", "prepared-format.md")},
    "configuration.md": configuration,
    "cli.md": command_line,
    "http.md": http,
    "openapi.json": openapi_json,
}

if __name__ == "__main__":
    for page, text in PAGES.items():
        (DOCS / page).write_text(text(), encoding="utf-8")
