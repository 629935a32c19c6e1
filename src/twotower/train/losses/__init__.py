"""Losses in two families: pointwise over labelled pairs and contrastive over candidates. One file per kind."""

from __future__ import annotations

from twotower.kinds import Kinds
from twotower.train.losses.bce import Bce
from twotower.train.losses.bpr import Bpr
from twotower.train.losses.gbce import Gbce
from twotower.train.losses.loss import ContrastiveLoss, Loss, PointwiseLoss
from twotower.train.losses.softmax import Softmax

__all__ = ["LOSSES", "Bce", "Bpr", "ContrastiveLoss", "Gbce", "Loss", "PointwiseLoss", "Softmax"]

LOSSES: Kinds[Loss] = Kinds(
    "loss", Loss, Bce, Softmax, Gbce, Bpr, default=Bce, families=(PointwiseLoss, ContrastiveLoss)
)
"""Kinds of losses by their names in a config."""
