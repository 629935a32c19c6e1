"""The command `twotower`, also as `python -m twotower`, which `torchrun -m twotower …` starts."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point: an interrupt is one line, also while the command is loaded."""
    try:
        from twotower import cli
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    cli.main()


if __name__ == "__main__":
    main()
