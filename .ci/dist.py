"""Checks the wheel of dist/ in clean environments: `make dist`.

The base installation is made for each Python of this machine that the package allows: it has no torch, duckdb or
pyarrow, stays below LIMIT_MB, says its version, and a verb of training names the extra. With the first, whose torch is
at hand, the quickstart of the README is run from the wheel with the extra `train`: its config, its commands, its
request. The store that it publishes is asked by the base of every Python.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT_MB = 550
VERSIONS = range(11, 16)
ABSENT = ("torch", "pyarrow", "pandas", "duckdb")
USERS, ITEMS = 60, 40


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path, help="Wheel to install.")
    parser.add_argument("--base", action="store_true", help="Check the base installations alone, without a training.")
    chosen = parser.parse_args(arguments)
    wheel = chosen.wheel.resolve()
    with tempfile.TemporaryDirectory(prefix="twotower-dist-") as name:
        folder = Path(name)
        store = None
        if not chosen.base:
            begun = time.monotonic()
            store = quickstart(environment(folder / "train", sys.executable, f"{wheel}[train]"), folder / "quickstart")
            print(
                f"quickstart of the README from {wheel.name}: {time.monotonic() - begun:.0f} s, the installation "
                "included"
            )
        for python in pythons():
            check_base(wheel, folder / Path(python).name, python, store)
    return 0


def pythons() -> list[str]:
    """Return the interpreters of this machine that the package allows and that make environments, one of each
    version."""
    found = [shutil.which(f"python3.{minor}") for minor in VERSIONS]
    works = [
        p
        for p in found
        if p and subprocess.run([p, "-c", "import ensurepip, venv"], capture_output=True).returncode == 0
    ]
    return works or [sys.executable]


def environment(folder: Path, python: str, requirement: str) -> Path:
    """Make an environment with a requirement, and return its folder of programs."""
    run([python, "-m", "venv", str(folder)])
    binary = folder / ("Scripts" if os.name == "nt" else "bin")
    run([str(binary / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", requirement])
    return binary


def check_base(wheel: Path, folder: Path, python: str, store: Path | None) -> None:
    """Install the base and check its size, packages and answers."""
    binary = environment(folder / "venv", python, str(wheel))
    megabytes = sum(p.lstat().st_blocks * 512 for p in (folder / "venv").rglob("*")) / 2**20
    listed = json.loads(run([str(binary / "python"), "-m", "pip", "list", "--format", "json"]))
    found = {one["name"].lower() for one in listed} & set(ABSENT)
    check(not found, f"the base has {', '.join(sorted(found))}")
    check(megabytes <= LIMIT_MB, f"the base takes {megabytes:.0f} MB, more than {LIMIT_MB}")
    twotower = str(binary / "twotower")
    version = stated_version()
    check(run([twotower, "--version"]).strip() == f"twotower {version}", "twotower --version says another version")
    run([twotower, "--help"])
    refused = subprocess.run([twotower, "config"], capture_output=True, text=True, check=False)
    check(refused.returncode == 2 and "[train]" in refused.stderr, f"twotower config: {refused.stderr}")
    if store:
        answer = json.loads(run([twotower, "recommend", "--store", str(store), "--user", "42", "-k", "10", "--json"]))
        check(len(answer["items"]) == 10, f"ten items are asked for, {len(answer['items'])} come")
        serve(binary, ["serve", "--store", str(store)], ask)
    print(
        f"{run([python, '--version']).strip()}: base {megabytes:.0f} MB, {len(listed)} packages"
        + (", answers" if store else "")
    )


def quickstart(binary: Path, folder: Path) -> Path:
    """Run the quickstart of the README with a table of clicks and the programs in `binary`, then train with the config
    that the README shows; return the published store."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    config = next(block for block in blocks(text, "toml") if "clicks.parquet" in block)
    commands = next(block for block in blocks(text, "") if "twotower train mine.toml" in block).splitlines()
    folder.mkdir(parents=True)
    (folder / "clicks.py").write_text(CLICKS, encoding="utf-8")
    run([str(binary / "python"), "clicks.py", str(USERS), str(ITEMS)], folder)
    for line in commands:
        words = shlex.split(line, comments=True)
        if words[:2] == ["twotower", "serve"]:
            serve(binary, words[1:], ask, folder)
        elif words[:1] == ["twotower"]:
            follow(binary, words, folder)
    (folder / "mine.toml").write_text(config, encoding="utf-8")
    follow(binary, ["twotower", "train", "mine.toml", "--run", "runs/shown"], folder)
    return folder / "store"


def follow(binary: Path, words: Sequence[str], folder: Path) -> None:
    """Run a command in a folder, and show it with the last lines that it prints."""
    print(f"$ {shlex.join(words)}", flush=True)
    # A table of toys is too small for a good model, which the doctor says, with code 1.
    shown = run([str(binary / words[0]), *words[1:]], folder, (0, 1) if "doctor" in words else (0,))
    check(bool(shown.strip()), f"{shlex.join(words)} prints nothing")
    print("  " + "\n  ".join(shown.splitlines()[-3:]), flush=True)


CLICKS = """
import sys
import polars as pl
users, items = map(int, sys.argv[1:])
rows = [(str(u), str((u * 7 + 2 * n) % items), 1_700_000_000 + 60 * n) for u in range(users) for n in range(12)]
pl.DataFrame(rows, schema=["user", "item", "clicked_at"], orient="row").write_parquet("clicks.parquet")
"""
"""Each user clicks every second item from one on, so the next is known."""


def blocks(text: str, language: str) -> list[str]:
    """Return the code blocks of a page that are marked with a language; "" is none."""
    return [code for mark, code in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S) if mark == language]


def serve(binary: Path, words: Sequence[str], then: Callable[[str], None], folder: Path | None = None) -> None:
    """Serve on a free port, call `then` with the URL once the service is ready, and end it."""
    command = [str(binary / "twotower"), *words, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder, env=clean()) as process:
        try:
            assert process.stdout is not None
            said = re.search(r"on (http://\S+)", process.stdout.readline())
            check(said is not None, f"{shlex.join(command)} does not serve")
            assert said is not None
            until = time.monotonic() + 120
            while not is_ready(said[1]):
                check(time.monotonic() < until, "the service is not ready")
                time.sleep(0.2)
            then(said[1])
        finally:
            process.terminate()
    check(process.returncode == 0, f"the service ends with code {process.returncode}")


def is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=5) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def ask(url: str) -> None:
    """Send the request of the README."""
    body = json.dumps({"user_id": "42", "k": 10}).encode()
    request = urllib.request.Request(f"{url}/v1/recommend", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as reply:
        check(len(json.load(reply)["items"]) == 10, "the service answers with other than ten items")


def stated_version() -> str:
    """Return the version that the checkout says."""
    path = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["version"]["path"]
    found = re.search(r'__version__ = "(.+)"', (ROOT / path).read_text(encoding="utf-8"))
    assert found is not None
    return found[1]


def clean() -> Mapping[str, str]:
    """Return the environment without the paths of a checkout."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


def run(command: Sequence[str], folder: Path | None = None, allowed: Sequence[int] = (0,)) -> str:
    """Run a command to its end and return what it prints. Ends the check if its code is none of `allowed`."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=clean())
    check(done.returncode in allowed, f"{shlex.join(command)}: code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def check(holds: bool, what: str) -> None:
    if not holds:
        raise SystemExit(f"error: {what}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
