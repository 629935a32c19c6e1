"""Optimizers: updates of the weights by their gradients. One file per kind."""

from __future__ import annotations

from twotower.kinds import Kinds
from twotower.train.optimizers.adagrad import Adagrad
from twotower.train.optimizers.adam import Adam
from twotower.train.optimizers.adamw import AdamW
from twotower.train.optimizers.optimizer import Optimizer
from twotower.train.optimizers.sgd import Sgd

__all__ = ["OPTIMIZERS", "Adagrad", "Adam", "AdamW", "Optimizer", "Sgd"]

OPTIMIZERS: Kinds[Optimizer] = Kinds("optimizer", Optimizer, Adam, AdamW, Sgd, Adagrad, default=Adam)
"""Kinds of optimizers by their names in a config."""
