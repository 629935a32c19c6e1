"""`DSSMTrainable`, the class of the teaching project."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy.typing as npt

from twotower import runs
from twotower.config.toml import TomlValue, parse_config
from twotower.data.reading.readers import TableLike, as_frame
from twotower.errors import DataError, RunError
from twotower.legacy.column_params import Param, check_params, schema_of
from twotower.legacy.interaction_rows import LabelledRows, check_labels, dataset_of
from twotower.legacy.training import accelerator_or_cpu, fit, save, save_locked, score
from twotower.runs import Run
from twotower.runs.folder import locked


class DSSMTrainable:
    """Two towers over the columns of `x`, trained on 0/1 labels `y`, with the teaching project's signature.

    `cols_params[column]` takes `belongs` ('user' or 'item'), `use_vec` (the column holds vectors) with `vec_len`
    (a number, or text such as '128'), `emb_size` (embedding width, 16 if absent) and `bucket` (quantile buckets of
    a float column, which is otherwise standardised). A list column without `use_vec` is multi-hot; everything
    else is categorical, with values rarer than `label_encoder_rate_min` of the rows sharing one embedding. A column
    that belongs to 'weight' holds the weights of the rows, at least 0, in the loss and in AUCs.
    Without `cols_params` the columns must be the MovieLens ones of this project.

    With `model_path` the saved model is loaded (its settings and encoders with it) and `test` scores `x`, `y`.
    """

    def __init__(
        self,
        x: TableLike,
        y: npt.ArrayLike,
        cols_params: Mapping[str, Mapping[str, Param]] | None = None,
        batch_size: int = 2048,
        shuffle: bool = True,
        val_x: TableLike | None = None,
        val_y: npt.ArrayLike | None = None,
        label_encoder_rate_min: float = 0.0001,
        user_dnn_size: Sequence[int] = (64, 32),
        item_dnn_size: Sequence[int] = (64, 32),
        dropout: float = 0.2,
        activation: str = "LeakyReLU",
        model_path: str | os.PathLike[str] | None = None,
        use_senet: bool = False,
        device: str = "cpu",
    ) -> None:
        self._rows = LabelledRows(as_frame(x, "x"), check_labels(y, "y"))
        if self._rows.x.height != len(self._rows.y):
            raise DataError(f"x has {self._rows.x.height} rows and y {len(self._rows.y)}; give one label per row")
        self._device = device
        self.model_path = Path(model_path) if model_path is not None else None
        self._run: Run | None = None
        if self.model_path is not None:
            self._run = runs.load(self.model_path)
            return
        val = None
        if val_x is not None:
            if val_y is None:
                raise DataError("val_x is given without val_y; give both or neither")
            val = LabelledRows(as_frame(val_x, "val_x"), check_labels(val_y, "val_y"))
        schema = schema_of(self._rows.x, check_params(cols_params, self._rows.x), label_encoder_rate_min)
        self._dataset = dataset_of(schema, self._rows, val)
        tower: dict[str, TomlValue] = {
            "activation": activation,
            "dropout": dropout,
            "senet": {"enabled": bool(use_senet)},
        }
        pair = {"user": tower | {"layers": [*user_dnn_size]}, "item": tower | {"layers": [*item_dnn_size]}}
        training = {"batch_size": batch_size, "shuffle": bool(shuffle)}
        evaluation = {"bootstrap": 0, "weighted": bool(schema.weight)}
        settings: dict[str, TomlValue] = {"model": {"pairs": [pair]}, "train": training, "evaluation": evaluation}
        _, self._config = parse_config(settings, "DSSMTrainable")

    def train(
        self,
        epochs: int = 10,
        val_step: int = 1,
        device: str = "cpu",
        optimizer: str = "Adam",
        lr: float = 1e-5,
        model_path: str | os.PathLike[str] | None = None,
        lr_decay_rate: float = 0,
        lr_decay_step: int = 0,
    ) -> float:
        """Train and keep the weights with the best validation AUC, which is returned.

        Without validation rows a tenth of the training rows is used for validation. `lr_decay_rate` multiplies the
        learning rate every `lr_decay_step` epochs, if both are set. With `model_path` the model is saved there.
        """
        if self.model_path is not None:
            raise RunError(f"this model was loaded from {self.model_path}; make a new DSSMTrainable to train")
        body = self._config.model_dump()
        body["train"] |= {"epochs": epochs, "validate_every": val_step, "optimizer": optimizer, "lr": lr}
        body["train"]["device"] = self._choose(device)
        if lr_decay_rate and lr_decay_step:
            body["train"] |= {"schedule": "step", "lr_decay_rate": lr_decay_rate, "lr_decay_epochs": lr_decay_step}
        _, config = parse_config(body, "train")
        with locked(Path(model_path)) if model_path is not None else nullcontext():
            self._run, best = fit(self._dataset, config)
            if model_path is not None:
                save_locked(self._run, Path(model_path))
        return best

    def test(self, device: str = "cpu") -> float:
        """Return the AUC over the rows given to the constructor; values never seen in training count as unknown."""
        return score(self._trained(), self._rows, self._choose(device))

    def _choose(self, device: str) -> str:
        """Return the device of a call; 'cpu', the default, means that of the constructor."""
        return accelerator_or_cpu(device if device != "cpu" else self._device)

    def save_model(self, model_path: str | os.PathLike[str]) -> None:
        """Write the best weights, the encoders and the settings to the folder `model_path`."""
        save(self._trained(), Path(model_path))

    def _trained(self) -> Run:
        if self._run is None:
            raise RunError("nothing is trained yet; call train() first, or give model_path")
        return self._run
