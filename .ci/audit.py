"""Asks for known vulnerabilities of the packages that are installed here: `make audit`. The argument is a Python that
has pip-audit, which asks pypi.org.

Exit code 0: none is known; 1: some are, a line each; 2: not every package could be asked for, so nothing is known.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from importlib.metadata import distributions
from pathlib import Path


def audit(python: str) -> int:
    # A version such as 2.13.0+cpu is a build of 2.13.0, which the advisories name.
    installed = {d.metadata["Name"]: d.version.split("+")[0] for d in distributions()}
    installed.pop("twotower", None)
    with tempfile.TemporaryDirectory() as folder:
        listed = Path(folder) / "requirements.txt"
        listed.write_text(
            "".join(f"{name}=={number}\n" for name, number in sorted(installed.items())), encoding="utf-8"
        )
        options = [
            "--format",
            "json",
            "--progress-spinner",
            "off",
            "--no-deps",
            "--disable-pip",
            "--requirement",
            str(listed),
        ]
        done = subprocess.run([python, "-m", "pip_audit", *options], capture_output=True, text=True, check=False)
    try:
        found = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        why = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        print(f"error: the advisories cannot be reached ({why}); run this where pypi.org can be", file=sys.stderr)
        return 2
    asked = [one for one in found if "skip_reason" not in one]
    for one in asked:
        for known in one["vulns"]:
            fixed = ", ".join(known["fix_versions"]) or "no version yet"
            print(
                f"{one['name']} {one['version']}: {known['id']} ({', '.join(known['aliases']) or '–'}), fixed in "
                f"{fixed}"
            )
    if len(asked) < len(installed):
        print(
            f"error: advisories were found for {len(asked)} of {len(installed)} packages; the index that answers here "
            "may have none: run this where pypi.org can be reached",
            file=sys.stderr,
        )
        return 2
    vulnerable = sum(bool(one["vulns"]) for one in asked)
    print(f"{len(asked)} packages, {vulnerable} with known vulnerabilities")
    return int(vulnerable > 0)


if __name__ == "__main__":
    sys.exit(audit(sys.argv[1]))
