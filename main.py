"""The teaching project's command: train DSSM on MovieLens features, or test a saved model. See `twotower.compat`."""

import sys

from twotower.compat import main

if __name__ == "__main__":
    sys.exit(main())
