"""Run a script of the benchmarks: `python -m benchmarks speed.search --quick`; without a name, list them.

A script has a function `main(chosen, report)`. The TOML file beside it declares its options and the measurement with
which names of its results begin; torch has `--threads` threads where the script loads it.
"""

import sys
from importlib import import_module
from pathlib import Path

from benchmarks.lib.report import Report, declared, options
from twotower.errors import TwoTowerError


def main() -> None:
    folder = Path(__file__).parent
    scripts = {".".join(p.relative_to(folder).with_suffix("").parts): p for p in sorted(folder.rglob("*.toml"))}
    scripts = {name: path for name, path in scripts.items() if "about" in declared(str(path))}
    if len(sys.argv) < 2 or sys.argv[1] not in scripts:
        for name, path in scripts.items():
            print(f"{name:20} {declared(str(path))['about'].strip().splitlines()[0]}")
        sys.exit("name a script: python -m benchmarks SCRIPT --help")
    chosen = options(str(scripts[sys.argv[1]]), sys.argv[2:])
    script = import_module(f"benchmarks.{sys.argv[1]}")
    if "torch" in sys.modules and "threads" in chosen:
        sys.modules["torch"].set_num_threads(chosen.threads)
    with Report(chosen, declared(str(scripts[sys.argv[1]])).get("name", "")) as report:
        try:
            script.main(chosen, report)
        except TwoTowerError as e:
            sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
