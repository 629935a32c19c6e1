"""Data sets by their names, `data.dataset = "ml-1m"`."""

from __future__ import annotations

from twotower.data.datasets.ml_1m import MovieLens1M, MovieLens1MTitles
from twotower.data.datasets.ml_100k import MovieLens100K, MovieLens100KTitles
from twotower.data.datasets.named_dataset import NamedDataset
from twotower.kinds import Kinds

__all__ = ["DATASETS", "MovieLens1M", "MovieLens1MTitles", "MovieLens100K", "MovieLens100KTitles", "NamedDataset"]

DATASETS = Kinds("data set", NamedDataset, MovieLens1M, MovieLens100K, MovieLens1MTitles, MovieLens100KTitles)
"""Kinds of data sets, by their names in a config."""
