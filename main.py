"""The teaching project's command: train DSSM on MovieLens features, or test a saved model. See `twotower.legacy`."""

import sys

from twotower.legacy import main

if __name__ == "__main__":
    sys.exit(main())
