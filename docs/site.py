"""Build the site of the documents into build/site: `make site`. A warning, such as a link that leads nowhere, ends the
build.

The pages keep their places in the repository, so that their links hold: README.md is the start, and a file or folder
that a page links to becomes a page that shows it.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections import defaultdict
from functools import cache
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "site"
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)(#[^)\s]*)?(?=[)\s])")
FENCE = re.compile(r"^(```.*?^```$)", re.M | re.S)
LANGUAGES = {
    ".py": "python",
    ".toml": "toml",
    ".yaml": "yaml",
    ".csv": "text",
    ".sh": "bash",
    ".service": "ini",
    ".json": "json",
}
NAMES = {"README.md": "index.md", "README.zh-CN.md": "index.zh-CN.md"}
"""Pages that the site names otherwise."""
API = "docs/python.md"
SEARCH_ON_DISK = """// A browser starts no worker from a file: here the search is a worker of this text.
if (location.protocol === "file:") {
  const source = %s;
  window.Worker = class extends Worker {
    constructor(url, options) {
      const file = String(url).includes("/workers/search.");
      super(file ? URL.createObjectURL(new Blob([source], { type: "text/javascript" })) : url, options);
    }
  };
}
"""


def pages() -> list[Path]:
    """Return the pages that people write, relative to the repository."""
    notebooks = (ROOT / "examples" / "notebooks").glob("*.ipynb")
    found = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "benchmarks" / "README.md", *notebooks]
    return sorted(path.relative_to(ROOT) for path in found)


def stage(folder: Path) -> None:
    """Write the pages, with pages of all files that they link to, and the figures."""
    shutil.copytree(ROOT / "docs" / "figures", folder / "docs" / "figures")
    written, waiting = set[Path](), pages()
    while waiting:
        path = waiting.pop()
        if path in written:
            continue
        written.add(path)
        text, linked = rewritten(shown(path), path)
        waiting += linked
        target = folder / place(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    (folder / API).write_text(api_page(), encoding="utf-8")


def shown(path: Path) -> str:
    """Return the text of a page: that of a Markdown file, the cells of a notebook, the list of a folder, or the code of
    another file."""
    full = ROOT / path
    if path.suffix == ".md":
        return full.read_text(encoding="utf-8")
    if full.is_dir():
        names = sorted(p.name for p in full.iterdir() if not p.name.startswith(("__", ".")))
        return f"# {path}\n\n" + "".join(f"- [{name}]({name})\n" for name in names)
    code = full.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = [("".join(cell["source"]), cell["cell_type"]) for cell in json.loads(code)["cells"]]
        return "\n\n".join(f"```python\n{text}\n```" if kind == "code" else text for text, kind in cells) + "\n"
    return f"# {path}\n\n````{LANGUAGES.get(path.suffix, 'text')}\n{code}````\n"


def place(path: Path) -> Path:
    """Return where the site keeps a page."""
    if (ROOT / path).is_dir():
        return path / "index.md"
    named = path.with_name(NAMES[path.name]) if str(path) in NAMES else path
    return named if path.suffix == ".md" else named.with_name(f"{named.name}.md")


def rewritten(text: str, path: Path) -> tuple[str, list[Path]]:
    """Return a page whose links lead to pages of the site, and the files and folders that it links to."""
    home = ROOT / path if (ROOT / path).is_dir() else (ROOT / path).parent
    linked: list[Path] = []

    def lead(found: re.Match[str]) -> str:
        target, anchor = home / found[1], found[2] or ""
        if not target.exists():
            raise SystemExit(f"{path}: the link {found[1]} leads nowhere")
        inside = target.resolve().relative_to(ROOT)
        if inside.parts[:2] == ("docs", "figures"):
            return found[0]
        linked.append(inside)
        return os.path.relpath(place(inside), place(path).parent).replace(os.sep, "/") + anchor

    if path.suffix not in (".md", ".ipynb") and not (ROOT / path).is_dir():
        return text, linked
    return "".join(p if p.startswith("```") else LINK.sub(lead, p) for p in FENCE.split(text)), linked


def api_page() -> str:
    """Return the page of the public names of the package, which mkdocstrings fills from their docstrings."""
    tree = ast.parse((ROOT / "src" / "twotower" / "__init__.py").read_text(encoding="utf-8"))
    assigned = (n for n in tree.body if isinstance(n, ast.Assign | ast.AnnAssign))
    (homes,) = (ast.literal_eval(n.value) for n in assigned if n.value and "_HOME" in ast.unparse(n).split("=")[0])
    lines = [
        "# Python",
        "",
        "The public names of `import twotower`; [the start](../index.md#python) has an example. A section of a config "
        "may be given as a "
        'mapping: `Config.model_validate({"train": {"epochs": 3}})`.',
        "",
    ]
    for name in sorted(homes, key=str.lower):
        module, _, there = homes[name].partition(":")
        lines.append(f"::: twotower.{module}.{there or name}")
        if there:  # the signature would have the name that only the module has
            heading = json.dumps(f"{name}{signature(module, there)}")
            lines += [
                "    options:",
                f"      heading: {heading}",
                f"      toc_label: {name}",
                "      separate_signature: false",
            ]
        table = parameters(module)
        lines += ["    options:", "      members: []", "", *table, ""] if table else [""]
    return "\n".join(lines)


def signature(module: str, function: str) -> str:
    """Return the parameters and the result of a function of the package."""
    tree = ast.parse((ROOT / "src" / "twotower" / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
    (found,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == function)
    return f"({ast.unparse(found.args)}) -> {ast.unparse(found.returns or ast.Constant(None))}"


def parameters(module: str) -> list[str]:
    """Return the table of the parameters of Config, Schema or a feature, by its module, from docs/configuration.md;
    nothing for others."""
    rows, about = option_rows()
    shown = dict[str, str]()
    if module == "config.experiment":
        names = {name.strip("[]"): name for name in about if re.fullmatch(r"\[{1,2}\w+\]{1,2}", name)}
        shown = {
            key: f"| `{key}` | [options](configuration.md#{key}) | {about[name]} |"
            for key, name in names.items()
            if key != "schema"
        }
    elif module == "features.schema":
        shown = rows["[schema]"] | {"features": f"| `features` | `()` | {about['[[schema.features]]']} |"}
    elif own := rows.get(f'[[schema.features]] kind = "{module.rpartition(".")[2]}"'):
        shown = rows["[[schema.features]]"] | own
    return ["| parameter | default | meaning |", "|---|---|---|", *shown.values()] if shown else []


@cache
def option_rows() -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Return the rows of docs/configuration.md by section and key, with defaults as Python has them, and what each
    section is about."""
    rows, about, section = defaultdict[str, dict[str, str]](dict), dict[str, str](), ""
    for line in (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            section = line.lstrip("# ")
        elif found := re.match(r"\| `([\w.]+)` \|", line):
            *path, key = found[1].split(".")
            for toml, python in (
                ("`true` |", "`True` |"),
                ("`false` |", "`False` |"),
                (f"| `{found[1]}`", f"| `{key}`"),
            ):
                line = line.replace(toml, python, 1)
            rows[f"[{'.'.join(path)}]" if path else section].setdefault(key, line)
        elif line and section not in about and not line.startswith(("|", "<!--")):
            about[section] = line
    return rows, about


def search_on_disk() -> str:
    """Return a script that lets the search work in pages that are opened from the disk, without a network."""
    workers = Path(find_spec("zensical").origin).parent / "templates" / "assets" / "javascripts" / "workers"
    (worker,) = workers.glob("search.*.min.js")
    return SEARCH_ON_DISK % json.dumps(worker.read_text(encoding="utf-8"))


def foreign_parts(page: str) -> list[str]:
    """Return the addresses of other sites that a page loads scripts, styles, pictures or frames from."""
    return re.findall(r'<(?:script|link|img|iframe)\b[^>]*?\s(?:src|href)="((?:https?:)?//[^"]+)"', page)


def main() -> None:
    """Stage the pages and build them."""
    shutil.rmtree(BUILD, ignore_errors=True)
    config = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]
    stage(staged := ROOT / config["docs_dir"])
    for script in config["extra"]["polyfills"]:
        (staged / script["path"]).parent.mkdir(exist_ok=True)
        (staged / script["path"]).write_text(search_on_disk(), encoding="utf-8")
    done = subprocess.run([sys.executable, "-m", "zensical", "build", "--strict", "--clean"], cwd=ROOT, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    site = ROOT / config["site_dir"]
    for page in sorted(site.rglob("*.html")):
        if asked := foreign_parts(page.read_text(encoding="utf-8")):
            raise SystemExit(
                f"{page.relative_to(site)}: asks {', '.join(asked)}; a page loads nothing from other sites"
            )


if __name__ == "__main__":
    main()
