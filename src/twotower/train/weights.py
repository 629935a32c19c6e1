"""Weights of a model: their names, moving average, best epoch, and updates by an optimizer."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from twotower.arrays.types import Shaped
from twotower.distributed import DistributedContext
from twotower.errors import ConfigError
from twotower.features.side import SIDES
from twotower.model.two_tower import FirstOrder, TwoTower
from twotower.train.recipe import TrainConfig
from twotower.train.torchrec.embeddings import TorchRecEmbeddings


class Weights:
    """Parameters of a model by name; a sharded table is this rank's piece."""

    def __init__(self, model: nn.Module, context: DistributedContext | None = None, sharded: bool = False) -> None:
        """Name the parameters of `model`. `sharded`: each rank of `context` holds different numbers."""
        self._model, self._context, self._sharded = model, context or DistributedContext(), sharded

    def state(self) -> dict[str, Shaped[Tensor, "*_"]]:
        """Return the parameters, not copies."""
        return dict(self._model.named_parameters())

    @torch.no_grad()
    def load_state(self, state: dict[str, Shaped[Tensor, "*_"]]) -> None:
        for name, parameter in self._model.named_parameters():
            parameter.copy_(state[name])

    def copy(self) -> dict[str, Shaped[Tensor, "*_"]]:
        return {name: parameter.detach().clone() for name, parameter in self._model.named_parameters()}

    def are_finite(self) -> bool:
        """Return True if every number is finite, on all ranks."""
        broken = any(not bool(torch.isfinite(p).all()) for p in self._model.parameters())
        return not (self._context.all_reduce_sum(float(broken))[0] if self._sharded else broken)


class MovingAverage:
    """Exponential moving average of the weights, which evaluation uses.

        a_t = d a_{t-1} + (1 - d) w_t,    d = min(decay, t / (t + 10)) after t steps

    The lower decay of the first steps discounts the random initial weights.
    """

    def __init__(self, weights: Weights, decay: float) -> None:
        """Begin with the current weights; decay 0 keeps no average."""
        self._model_weights, self._decay = weights, decay
        self.weights: dict[str, Shaped[Tensor, "*_"]] = {}
        """Averaged weights by name; empty without an average."""
        self.restart()

    def restart(self) -> None:
        self.weights = self._model_weights.copy() if self._decay else {}

    def update(self, steps: int) -> None:
        """Add the weights after `steps` steps."""
        decay = min(self._decay, steps / (steps + 10))
        if self.weights:
            for name, parameter in self._model_weights.state().items():
                self.weights[name].lerp_(parameter.detach(), 1 - decay)

    def state(self) -> dict[str, Shaped[Tensor, "*_"]]:
        return self.weights

    def load_state(self, state: dict[str, Shaped[Tensor, "*_"]]) -> None:
        """Overwrite the average, if the state holds one."""
        if state:
            for name, average in self.weights.items():
                average.copy_(state[name])


class BestWeights:
    """Weights of the epoch with the best monitored metric, or without validation of the last epoch."""

    def __init__(self, monitor: str, patience: int, higher_is_better: bool = True) -> None:
        """Watch the metric `monitor`, such as "validation.auc". `patience` 0 never runs out."""
        self._monitor, self._patience = monitor, patience
        self._sign = 1 if higher_is_better else -1
        self.weights: dict[str, Shaped[Tensor, "*_"]] = {}
        self.score, self.epoch, self._validations_since = -math.inf, 0, 0

    @property
    def out_of_patience(self) -> bool:
        """True after `patience` validations without a better metric."""
        return bool(self._patience) and self._validations_since >= self._patience

    def score_of(self, metrics: Mapping[str, float]) -> float:
        """Return the monitored metric, negated if lower is better. Raises ConfigError if it is missing."""
        if self._monitor not in metrics:
            raise ConfigError(
                f"train.monitor '{self._monitor}' cannot be measured on this validation part (one class only?); "
                f"allowed: {', '.join(metrics)}"
            )
        return self._sign * metrics[self._monitor]

    def observe(self, metrics: dict[str, float], epoch: int, weights: Weights) -> None:
        """Copy the weights if the metrics of epoch `epoch`, from 1, or 0 for a start, are the best so far."""
        score = self.score_of(metrics)
        if score > self.score:
            self.score, self.epoch, self._validations_since = score, epoch, 0
            self.weights = weights.copy()
        else:
            self._validations_since += 1

    def keep(self, epoch: int, weights: Weights) -> None:
        """Copy the weights of epoch `epoch` without a metric: the last epoch is the best."""
        self.epoch, self.weights = epoch, weights.copy()

    def state(self) -> dict[str, Shaped[Tensor, "*_"]]:
        """Return the best weights, their score and epoch, and the number of validations since; at first nothing."""
        if not self.weights:
            return {}
        return {
            "score": torch.tensor(self.score, dtype=torch.float64),
            "epoch": torch.tensor(self.epoch),
            "validations_since": torch.tensor(self._validations_since),
            **{f"weights/{name}": tensor for name, tensor in self.weights.items()},
        }

    def load_state(self, state: dict[str, Shaped[Tensor, "*_"]]) -> None:
        if state:
            self.score, self.epoch = float(state["score"]), int(state["epoch"])
            self._validations_since = int(state["validations_since"])
            prefix = "weights/"
            self.weights = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate of a step (0, 1, …): lr times a linear warm-up times the factor of the schedule."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    factor = 1.0
    if config.schedule == "cosine":
        factor = 0.5 * (1 + math.cos(math.pi * step / (config.epochs * steps_per_epoch)))
    elif config.schedule == "step":
        factor = config.lr_decay_rate ** (step // (config.lr_decay_epochs * steps_per_epoch))
    return config.lr * warm * factor


def parameter_groups(model: TwoTower, config: TrainConfig) -> dict[float, list[nn.Parameter]]:
    """Return the parameters by weight decay: embeddings (by tower), biases, layers."""
    groups: list[tuple[list[nn.Parameter], float]] = []
    for side in SIDES:
        for tower in model.towers(side):
            decay = config.embedding_weight_decay * tower.weight_decay_scale
            tables = [tower.embeddings.tables, *([] if tower.augmented is None else [tower.augmented])]
            groups.append(([p for t in tables for p in t.parameters() if p.requires_grad], decay))
    biases = [p for m in model.modules() if isinstance(m, FirstOrder) for p in m.parameters() if p.requires_grad]
    biases += [p for n, p in model.named_parameters() if n in ("global_bias", "log_temperature") and p.requires_grad]
    groups.append((biases, config.bias_weight_decay))
    known = {id(p) for parameters, _ in groups for p in parameters}
    groups.append(([p for p in model.parameters() if id(p) not in known and p.requires_grad], config.weight_decay))
    by_decay: dict[float, list[nn.Parameter]] = {}
    for parameters, decay in groups:
        by_decay.setdefault(decay, []).extend(parameters)
    return {decay: parameters for decay, parameters in by_decay.items() if parameters}


class ModelOptimizer:
    """Optimizer of all weights of a model. Each rank updates its pieces of sharded tables."""

    def __init__(
        self, model: TwoTower, config: TrainConfig, steps_per_epoch: int, device: torch.device,
        context: DistributedContext | None = None, torchrec: TorchRecEmbeddings | None = None,
    ) -> None:  # fmt: skip
        self._model, self._config, self._steps_per_epoch = model, config, steps_per_epoch
        self._context, self._torchrec = context or DistributedContext(), torchrec
        groups = [{"params": params, "weight_decay": d} for d, params in parameter_groups(model, config).items()]
        # On a CPU the fused kernel must be requested.
        self.optimizer = config.optimizer.build(groups, config.lr, fused=device.type == "cpu")
        self._steps = 0

    def learning_rate(self, step: int) -> float:
        return learning_rate(self._config, step, self._steps_per_epoch)

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def step(self, step: int) -> None:
        lr = self.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self._torchrec:
            self._torchrec.apply_gradients(lr)
        if self._config.clip_norm:
            self._clip(self._config.clip_norm)
        self.optimizer.step()
        self._steps = step + 1

    def _clip(self, norm: float) -> None:
        """Scale all gradients so that their total norm over all ranks is at most `norm`."""
        if not self._torchrec or self._context.world_size == 1:
            nn.utils.clip_grad_norm_(self._model.parameters(), norm)
            return
        gradients: dict[bool, list[Tensor]] = {True: [], False: []}  # by whether the table is sharded
        for name, parameter in self._model.named_parameters():
            if parameter.grad is not None:
                gradients[name in self._torchrec.shards_by_parameter].append(parameter.grad)
        sharded, replicated = (float(nn.utils.get_total_norm(gradients[which])) for which in (True, False))
        total = math.sqrt(replicated**2 + self._context.all_reduce_sum(sharded**2)[0])
        if total > norm:
            for gradient in gradients[True] + gradients[False]:
                gradient.mul_(norm / (total + 1e-6))  # as torch does

    def state(self) -> dict[str, Shaped[Tensor, "*_"]]:
        """Return the tensors of the optimizer as "<slot>/<parameter>"."""
        tensors = {
            f"{slot}/{name}": value
            for name, parameter in self._model.named_parameters()
            for slot, value in self.optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        }
        if self._torchrec and self._torchrec.updates_sparsely:
            tensors |= self._torchrec.optimizer_tensors(self._steps)
        return tensors

    def load_state(self, state: dict[str, Shaped[Tensor, "*_"]]) -> None:
        """Continue from a state. Parameters that it lacks start without tensors."""
        if self._torchrec and self._torchrec.updates_sparsely:
            self._torchrec.restore_optimizer(state)
        self._steps = int(max((float(value) for key, value in state.items() if key.startswith("step/")), default=0))
        slots: dict[str, dict[str, Shaped[Tensor, "*_"]]] = {}
        for key, value in state.items():
            slot, _, name = key.partition("/")
            slots.setdefault(name, {})[slot] = value
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad and name in slots:
                self.optimizer.state[parameter] = {
                    slot: value if slot == "step" else value.to(parameter.device) for slot, value in slots[name].items()
                }
