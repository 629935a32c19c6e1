"""Print the dependencies with their allowed and installed versions: `make versions`. With `--write` the table becomes
the section "Tested with" of the newest release in CHANGELOG.md: `make versions RELEASE=1`, after CI has passed."""

from __future__ import annotations

import platform
import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parent.parent
HEADING = "### Tested with"


def table(pyproject: Path = ROOT / "pyproject.toml") -> str:
    """Return a table of the direct dependencies with allowed and installed versions."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(one for extra in extras.values() for one in extra)]
    lines = [
        "| package | allowed | tested |",
        "|---|---|---|",
        f"| Python | {project['requires-python']} | {platform.python_version()} |",
    ]
    for one in dict.fromkeys(wanted):
        name, allowed = re.fullmatch(r"([\w.-]+)(?:\[.*\])?(.*)", one).groups()
        if name != project["name"]:
            lines.append(f"| {name} | {allowed} | {_installed(name)} |")
    return "\n".join(lines) + "\n"


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def with_table(changelog: str, table: str) -> str:
    """Return the changelog with the table at the end of the newest version's section, replacing an earlier one."""
    start = re.search(r"^## (?!Unreleased).*\n", changelog, re.M).end()
    following = re.search(r"^## ", changelog[start:], re.M)
    end = start + following.start() if following else len(changelog)
    section = changelog[start:end].partition(f"{HEADING}\n")[0].rstrip("\n")
    rest = f"\n{changelog[end:]}" if following else ""
    return f"{changelog[:start]}{section}\n\n{HEADING}\n\n{table}{rest}"


def main(arguments: list[str]) -> None:
    found = table()
    print(found, end="")
    if "--write" in arguments:
        path = ROOT / "CHANGELOG.md"
        path.write_text(with_table(path.read_text(encoding="utf-8"), found), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
