"""Fetch MovieLens 1M into dataset/ml-1m of this project. See `twotower.legacy.download`."""

import sys
from pathlib import Path

from twotower.legacy import download

if __name__ == "__main__":
    sys.exit(download(Path(__file__).resolve().parents[2]))
