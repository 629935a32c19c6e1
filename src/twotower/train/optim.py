"""Updates of the weights: groups of parameters, the schedule of the learning rate, clipping."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from twotower.arrays.types import Shaped
from twotower.distributed import DistributedContext
from twotower.features.side import SIDES
from twotower.model.two_tower import FirstOrder, TwoTower
from twotower.train.recipe import TrainConfig
from twotower.train.torchrec.embeddings import TorchRecEmbeddings


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate of a step (0, 1, …): lr, times a linear warmup, times the factor of the schedule."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    factor = 1.0
    if config.schedule == "cosine":
        factor = 0.5 * (1 + math.cos(math.pi * step / (config.epochs * steps_per_epoch)))
    elif config.schedule == "step":
        factor = config.lr_decay_rate ** (step // (config.lr_decay_epochs * steps_per_epoch))
    return config.lr * warm * factor


def parameter_groups(model: TwoTower, config: TrainConfig) -> dict[float, list[nn.Parameter]]:
    """Return the parameters by weight decay: that of the embeddings (by tower), the biases, and the layers."""
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
    """Optimizer of all weights of a model. Sharded tables are updated with the others, by the ranks that hold them."""

    def __init__(
        self,
        model: TwoTower,
        config: TrainConfig,
        steps_per_epoch: int,
        device: torch.device,
        context: DistributedContext | None = None,
        torchrec: TorchRecEmbeddings | None = None,
    ) -> None:
        self._model, self._config, self._steps_per_epoch = model, config, steps_per_epoch
        self._context, self._torchrec = context or DistributedContext(), torchrec
        groups = [{"params": params, "weight_decay": d} for d, params in parameter_groups(model, config).items()]
        # torch's optimizers have a fused kernel for a CPU; elsewhere torch chooses.
        self.optimizer = config.optimizer.build(groups, config.lr, fused=device.type == "cpu")
        self._steps = 0

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step (0, 1, …)."""
        return learning_rate(self._config, step, self._steps_per_epoch)

    def zero_grad(self) -> None:
        """Drop all gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def step(self, step: int) -> None:
        """Update the weights by their gradients, as step `step` (0, 1, …)."""
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
        """Scale all gradients so that their common norm is at most `norm`, over the pieces of all ranks."""
        if not self._torchrec or self._context.world_size == 1:
            nn.utils.clip_grad_norm_(self._model.parameters(), norm)
            return
        gradients: dict[bool, list[Tensor]] = {True: [], False: []}  # by whether each rank holds a piece
        for name, parameter in self._model.named_parameters():
            if parameter.grad is not None:
                gradients[name in self._torchrec.shards_by_parameter].append(parameter.grad)
        sharded, replicated = (float(nn.utils.get_total_norm(gradients[which])) for which in (True, False))
        total = math.sqrt(replicated**2 + self._context.all_reduce_sum(sharded**2)[0])
        if total > norm:
            for gradient in gradients[True] + gradients[False]:
                gradient.mul_(norm / (total + 1e-6))  # as torch does

    def state(self) -> dict[str, Shaped[Tensor, "*_"]]:
        """Return the optimizer's tensors as "<slot>/<parameter>"."""
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
        """Continue from a state; parameters without tensors in it start with none."""
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
