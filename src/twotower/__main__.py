"""The command `twotower`, also as `python -m twotower`, which `torchrun -m twotower …` starts."""

from __future__ import annotations

import gc
import sys

from twotower.machine import limit_spinning


def main() -> None:
    """Run the command line; an interrupt ends it with one line, also while its modules are loaded."""
    limit_spinning()
    try:
        from twotower.cli import app

        app.main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        gc.freeze()  # else Python looks through all objects of the imported modules before it ends
        exec("")  # else Python ends by the signal if the interrupt came in code that `exec` ran, as of a dataclass


if __name__ == "__main__":
    main()
