"""The command `twotower`, also as `python -m twotower`, which `torchrun -m twotower …` starts."""

from __future__ import annotations

import sys

from twotower.machine import limit_spinning


def main() -> None:
    """Run the command line; an interrupt ends it with one line, also while its modules are loaded."""
    limit_spinning()
    try:
        try:
            from twotower.cli import app
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)
        app.main()
    finally:
        exec(
            ""
        )  # else an interrupt in code that is made from text, as of a dataclass, ends Python by the signal, though it is handled


if __name__ == "__main__":
    main()
