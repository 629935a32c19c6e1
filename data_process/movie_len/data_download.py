"""Fetch MovieLens 1M into dataset/ml-1m of this project. See `twotower.legacy.movielens_scripts.download`."""

import sys
from pathlib import Path

from twotower.legacy.movielens_scripts import download

if __name__ == "__main__":
    sys.exit(download(Path(__file__).resolve().parents[2]))
