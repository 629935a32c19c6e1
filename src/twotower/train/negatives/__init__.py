"""Sources of negatives."""

from __future__ import annotations

from twotower.kinds import Kinds
from twotower.train.negatives.attribute import AttributeNegatives
from twotower.train.negatives.cross_batch_memory import CrossBatchMemory
from twotower.train.negatives.disliked import DislikedNegatives
from twotower.train.negatives.full import FullCatalogue
from twotower.train.negatives.hard import HardNegatives
from twotower.train.negatives.in_batch import InBatchNegatives
from twotower.train.negatives.popularity import PopularityNegatives
from twotower.train.negatives.random import RandomNegatives
from twotower.train.negatives.source import NegativeSource, PairSource, PerPositiveSource, SharedSource
from twotower.train.negatives.uniform import UniformNegatives

__all__ = [
    "SOURCES", "AttributeNegatives", "CrossBatchMemory", "DislikedNegatives", "FullCatalogue", "HardNegatives",
    "InBatchNegatives", "NegativeSource", "PairSource", "PerPositiveSource", "PopularityNegatives", "RandomNegatives",
    "SharedSource", "UniformNegatives",
]  # fmt: skip

SOURCES = Kinds(
    "source of negatives", NegativeSource,
    InBatchNegatives, UniformNegatives, PopularityNegatives, CrossBatchMemory, FullCatalogue,
    RandomNegatives, DislikedNegatives, AttributeNegatives, HardNegatives,
    families=(SharedSource, PerPositiveSource),
)  # fmt: skip
"""Kinds of sources of negatives by their names in a config. They draw in this order, then sources of elsewhere by
name."""
