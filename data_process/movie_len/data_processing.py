"""Write the train, val and test splits into dataset/ml-1m/feature of this project. See
`twotower.legacy.movielens_scripts.process`."""

import sys
from pathlib import Path

from twotower.legacy.movielens_scripts import process

if __name__ == "__main__":
    sys.exit(process(Path(__file__).resolve().parents[2]))
