"""The teaching project's command: train DSSM on MovieLens features, or test a saved model. See
`twotower.legacy.training_script`."""

import sys

from twotower.legacy.training_script import main

if __name__ == "__main__":
    sys.exit(main())
