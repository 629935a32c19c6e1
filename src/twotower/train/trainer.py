"""The training loop: from a dataset and a config to the best weights.

Everything random depends on (seed, epoch, step) alone, so a run that was killed at any step resumes from its checkpoint to
the same weights, on a CPU bit for bit.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from twotower import files
from twotower.data.dataset import Dataset
from twotower.data.splits import VALIDATION
from twotower.distributed import DistributedContext, choose_device
from twotower.errors import ConfigError, Interrupted, RunError, TrainingError
from twotower.evaluation.factors import Factors
from twotower.evaluation.part import evaluate_part
from twotower.features.field import InputField
from twotower.features.schema import SIDES, SideName
from twotower.machine import peak_memory_mb
from twotower.model.tables import EmbeddingShard
from twotower.model.two_tower import FirstOrder, TwoTower, evaluation_mode
from twotower.train import checkpoint
from twotower.train.callbacks import Callback
from twotower.train.factors import model_factors
from twotower.train.objective import Objective
from twotower.train.order import Epoch
from twotower.train.recipe import Recipe, TrainConfig
from twotower.train.sharded import TorchRecEmbeddings

log = logging.getLogger(__name__)


@dataclass
class TrainingResult:
    """A model with its best weights, one history entry per epoch, and the metrics `train.…` of the whole run."""

    model: TwoTower
    history: list[dict[str, Any]]
    metrics: dict[str, float]


@dataclass
class _Progress:
    """The state of a run beside tensors, which a checkpoint holds."""

    epoch: int = 0
    batch: int = 0  # steps done in this epoch
    step: int = 0  # steps done in all epochs
    rows: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    mimic_sum: float = 0.0
    best: float = -math.inf
    best_epoch: int = 0
    validations_since_best: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def restore(cls, state: dict[str, Any], path: Path) -> _Progress:
        """Check and return the progress in a checkpoint's `state`, in which a best of "none" is -inf. Raises RunError if a
        field is unknown or of another type."""
        fresh = vars(cls())
        best = -math.inf if state.get("best") == "none" else state.get("best")
        values = state | {"best": best}
        types = {name: (int, float) if isinstance(v, float) else (type(v),) for name, v in fresh.items()}
        if not values.keys() <= fresh.keys() or not all(type(v) in types[name] for name, v in values.items()):
            raise RunError(
                f"{path / 'state.json'} is damaged: its progress has unknown or missing fields; remove {path}"
            )
        return cls(**values)


class Trainer:
    """Trains one model on one dataset. With several ranks it runs inside `context.process_group()`."""

    def __init__(
        self,
        dataset: Dataset,
        recipe: Recipe,
        folder: Path | None = None,
        callback: Callback | None = None,
        fingerprint: dict[str, Any] | None = None,
        context: DistributedContext | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Build the model, its objective and its optimizer.

        `folder` receives the checkpoints; None writes none. `fingerprint` holds the values that must be equal when a
        checkpoint is resumed. `device` None is that of `train.device`. Raises ConfigError, or DataError if the dataset
        holds nothing to learn.
        """
        self.dataset, self.recipe, self.folder = dataset, recipe, folder
        self.context = context or DistributedContext()
        self.fingerprint = fingerprint or {}
        self.callback = callback or Callback()
        self.device = device or choose_device(recipe.train.device, self.context.local_rank)
        user_fields, item_fields = dataset.encoders.fields("user"), dataset.encoders.fields("item")
        self.torchrec: TorchRecEmbeddings | None = None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.train.seed)
            if recipe.train.embedding_placement == "torchrec":
                self.torchrec = TorchRecEmbeddings(recipe, user_fields, item_fields, self.context, self.device)
                self.model = self.torchrec.model
            else:
                _check_memory(recipe, user_fields, item_fields)
                self.model = TwoTower(recipe.model, user_fields, item_fields).to(self.device)
        self.objective = Objective(dataset, recipe, self.model, self.device, self.context, self.torchrec)
        self.optimizer = _optimizer(self.model, recipe.train, self.device)
        self.parameter_names = {p: n for n, p in self.model.named_parameters()}
        self.progress = _Progress()
        self.best_weights: dict[str, Tensor] = {}
        self.ema = {n: p.detach().clone() for n, p in self.model.named_parameters()} if recipe.train.ema_decay else {}
        self._stop_requested = False  # of this process, by a signal
        self._stop = self._save_due = False  # of all ranks, since their last agreement
        self._last_saved = time.monotonic()
        self._last_path: Path | None = None

    # ---- the run

    def run(self) -> TrainingResult:
        """Train to the last epoch or until patience runs out, and load the best weights.

        Raises TrainingError if the loss or a weight is not finite, Interrupted after SIGTERM or SIGINT.
        """
        p, config = self.progress, self.recipe.train
        with self._signals(), torch.random.fork_rng(devices=[]):
            while p.epoch < config.epochs and not self._out_of_patience():
                self._train_epoch(self.objective.sampler.epoch(p.epoch))
        self._load(self.best_weights)
        if self.torchrec:
            self.torchrec.gather_tables()
        self.objective.detach_from_group()
        seconds = max(p.seconds, 1e-9)
        metrics = {
            "train.seconds": p.seconds,
            "train.rows_per_second": p.rows / seconds,
            "train.steps": float(p.step),
            "train.epochs": float(p.epoch),
            "train.best_epoch": float(p.best_epoch),
            "train.peak_memory_mb": peak_memory_mb(),
        }
        return TrainingResult(self.model, p.history, metrics)

    def _train_epoch(self, epoch: Epoch) -> None:
        p = self.progress
        started = time.perf_counter()
        if not p.batch:
            self.objective.refresh_hard_negatives(self.factors, p.epoch)
        p.seconds += time.perf_counter() - started
        while p.batch < self.objective.steps_per_epoch:
            started = time.perf_counter()
            self.step(epoch, p.batch)
            p.seconds += time.perf_counter() - started
            if self._stop or (self._stop_requested and self.context.world_size == 1):
                self._save()
                self.objective.detach_from_group()
                saved = "a checkpoint is written" if self.folder else "no checkpoint is written"
                raise Interrupted(f"stopped after step {p.step}; {saved}")
            if self._checkpoint_due():
                self._save()
        started = time.perf_counter()
        metrics = self._validate()
        entry: dict[str, Any] = {
            "epoch": p.epoch + 1,
            "step": p.step,
            "train.loss": p.loss_sum / self.objective.steps_per_epoch,
            **({"train.mimic": p.mimic_sum / self.objective.steps_per_epoch} if self.recipe.loss.mimic else {}),
            "train.seconds": round(p.seconds, 3),
            "lr": self._lr(max(p.step - 1, 0)),
            **metrics,
            "validation.seconds": round(time.perf_counter() - started, 3),
        }
        p.history.append(entry)
        p.epoch, p.batch, p.loss_sum, p.mimic_sum = p.epoch + 1, 0, 0.0, 0.0
        self._save()
        self.callback.on_epoch_end(p.history)

    def step(self, epoch: Epoch, batch: int) -> None:
        """Update the weights once, with batch `batch` (0, 1, …) of an epoch. Raises TrainingError if the loss is not
        finite."""
        p, config = self.progress, self.recipe.train
        self._seed(p.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr(p.step)
        self.optimizer.zero_grad(set_to_none=True)
        rows, loss, mimic_loss = self.objective(epoch, batch, p.step)
        # Gradients are averaged over the ranks, and must be their sum: a rank's loss is its part of the batch's mean.
        ((loss + mimic_loss) * self.context.world_size).backward()  # type: ignore[no-untyped-call]
        value, mimic_value = self._agree(loss.item(), mimic_loss.item())
        if not math.isfinite(value + mimic_value):
            raise TrainingError(self._not_finite(f"the loss is {value + mimic_value}", epoch, batch))
        if self.torchrec:
            self.torchrec.apply_gradients(self._lr(p.step))
        if config.clip_norm:
            self._clip(config.clip_norm)
        self.optimizer.step()
        p.step, p.batch, p.rows, p.loss_sum = p.step + 1, p.batch + 1, p.rows + rows, p.loss_sum + value
        p.mimic_sum += mimic_value
        if self.ema:
            # A lower decay in the first steps, so that the average forgets the random weights of the start.
            decay = min(config.ema_decay, p.step / (p.step + 10))
            for name, parameter in self.model.named_parameters():
                self.ema[name].lerp_(parameter.detach(), 1 - decay)
        self.callback.on_step_end(p.batch, self.objective.steps_per_epoch, value)
        files.point(f"step:{p.step}:{self.context.rank}")

    def _clip(self, norm: float) -> None:
        """Scale all gradients so that their common norm is at most `norm`, over the pieces of all ranks."""
        if not self.torchrec or self.context.world_size == 1:
            nn.utils.clip_grad_norm_(self.model.parameters(), norm)
            return
        gradients: dict[bool, list[Tensor]] = {True: [], False: []}  # by whether each rank holds a piece
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                gradients[name in self.torchrec.shards_by_parameter].append(parameter.grad)
        sharded, replicated = (float(nn.utils.get_total_norm(gradients[which])) for which in (True, False))
        total = math.sqrt(replicated**2 + self.context.all_reduce_sum(sharded**2)[0])
        if total > norm:
            for gradient in gradients[True] + gradients[False]:
                gradient.mul_(norm / (total + 1e-6))  # as torch does

    def _agree(self, loss: float, mimic_loss: float) -> tuple[float, float]:
        """Return the losses, summed over the ranks' parts, and agree on stopping and saving after this step.

        All ranks stop if one of them is to, and all save when rank 0's clock says so.
        """
        if self.context.world_size == 1:
            return loss, mimic_loss
        late = self.context.is_main and time.monotonic() - self._last_saved > self.recipe.train.checkpoint_seconds
        loss, mimic_loss, stop, save = self.context.all_reduce_sum(
            loss, mimic_loss, float(self._stop_requested), float(late)
        )
        self._stop, self._save_due = stop > 0, save > 0
        return loss, mimic_loss

    def _seed(self, step: int) -> None:
        """Seed torch for a step: its dropout and unknown values depend on (seed, step, rank) alone."""
        seed = (self.recipe.train.seed << 32) + step
        if not self.context.is_main:
            seed = int(np.random.SeedSequence([seed, self.context.rank]).generate_state(1, np.uint64)[0] >> 1)
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        elif self.device.type == "mps":
            torch.mps.manual_seed(seed)

    def _validate(self) -> dict[str, float]:
        """Return the validation metrics every `validate_every` epochs and after the last, else none; keep the best weights.

        Raises TrainingError if a weight is not finite, ConfigError if the monitor cannot be measured.
        """
        p, config = self.progress, self.recipe.train
        if (p.epoch + 1) % config.validate_every and p.epoch + 1 < config.epochs:
            return {}
        weights = {n: t.detach().clone() for n, t in self.model.named_parameters()}
        if not self._finite(weights):
            raise TrainingError(f"a weight is not finite after step {p.step}; {self._advice()}")
        if self.ema:
            self._load(self.ema)
        factors = self.factors()
        metrics = (
            evaluate_part(factors, self.dataset, VALIDATION, self.recipe.evaluation) if self.context.is_main else {}
        )
        named = {f"validation.{m}": v for m, v in metrics.items() if not math.isnan(v)}
        found: dict[str, float] = self.context.broadcast(named)
        value = found.get(config.monitor)
        if value is None:
            raise ConfigError(
                f"train.monitor '{config.monitor}' cannot be measured on this validation part (one class only?); "
                f"allowed: {', '.join(found)}"
            )
        # Of all metrics, only the log loss is better when it is lower.
        score = -value if config.monitor.endswith("log_loss") else value
        if score > p.best:
            p.best, p.best_epoch, p.validations_since_best = score, p.epoch + 1, 0
            self.best_weights = {n: t.detach().clone() for n, t in self.model.named_parameters()}
        else:
            p.validations_since_best += 1
        self._load(weights)
        return found

    def factors(self) -> Factors:
        """Return the vectors of all users and items, with the model's present weights."""
        if self.context.world_size == 1 and not self.torchrec:
            return model_factors(self.model, self.objective.users, self.objective.items)
        with evaluation_mode(self.model):
            return Factors(self._all_vectors("user"), self._all_vectors("item"))

    def _all_vectors(self, name: SideName) -> Tensor:
        """Return the vectors (n, D) of all rows of a side. Each rank embeds its part of every block, and all ranks call
        their tower equally often."""
        context, torchrec, o = self.context, self.torchrec, self.objective
        side, tower = (o.users, self.model.user_vectors) if name == "user" else (o.items, self.model.item_vectors)
        block = 4096 if torchrec else 32_768  # with torchrec a block's rows of the tables are fetched and held
        blocks = []
        for start in range(0, side.n, block * context.world_size):
            n = min(side.n - start, block * context.world_size)
            sizes = context.partition_sizes(n)
            part = context.partition(n)
            rows = start + np.arange(part.start, max(part.stop, part.start + 1)) % n
            inputs = side.take(rows)
            if torchrec:
                torchrec.fetch(*((inputs, None) if name == "user" else (None, inputs)))
            blocks.append(context.all_gather(tower(inputs)[: sizes[context.rank]], sizes))
        if torchrec:
            torchrec.drop_fetched()
        return torch.cat(blocks)

    def _finite(self, tensors: dict[str, Tensor]) -> bool:
        """Return True if every number of the tensors is finite, on all ranks."""
        broken = any(not bool(torch.isfinite(t).all()) for t in tensors.values())
        return not (self.context.all_reduce_sum(float(broken))[0] if self.torchrec else broken)

    def _out_of_patience(self) -> bool:
        return bool(self.recipe.train.patience) and self.progress.validations_since_best >= self.recipe.train.patience

    def _lr(self, step: int) -> float:
        """Return the learning rate of a step: lr, times a linear warmup, times the factor of the schedule."""
        c = self.recipe.train
        warm = min(1.0, (step + 1) / c.warmup_steps) if c.warmup_steps else 1.0
        if c.schedule == "cosine":
            factor = 0.5 * (1 + math.cos(math.pi * step / (c.epochs * self.objective.steps_per_epoch)))
        elif c.schedule == "step":
            factor = c.lr_decay_rate ** (step // (c.lr_decay_epochs * self.objective.steps_per_epoch))
        else:
            factor = 1.0
        return c.lr * warm * factor

    def _load(self, weights: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(weights[name])

    # ---- stopping and going on

    def resume(self, override: bool = False, *others: Path) -> Path | None:
        """Load the newest intact checkpoint of the folder, or else of the first of `others` that has one.

        Return the folder that held it, or None if no folder has one. Raises RunError with the differences if the fingerprint
        has changed, unless `override`.
        """
        for folder in (*([self.folder] if self.folder else []), *others):
            if found := checkpoint.newest(folder):
                break
        else:
            return None
        tensors, state = found
        self._last_path = folder / f"step-{state['step']:09d}"
        changed = [
            f"{key}: {old!r} then, {new!r} now"
            for key in sorted({*state["fingerprint"], *self.fingerprint})
            if (old := state["fingerprint"].get(key)) != (new := self.fingerprint.get(key))
        ]
        if changed:
            differences = "; ".join(changed[:5])
            if not override:
                raise RunError(
                    f"cannot resume: the run has changed ({differences}); undo the change, or pass `override=True`"
                )
            log.warning(f"resuming although the run has changed ({differences})")
        self._restore(tensors)
        self.progress = _Progress.restore(state["progress"], self._last_path)
        return folder

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        shards = self.torchrec.shards_by_parameter if self.torchrec else {}
        expected = {
            n: (s.num_embeddings, s.embedding_dim) if (s := shards.get(n)) else tuple(p.shape)
            for n, p in self.model.named_parameters()
        }
        if {n.removeprefix("model/"): tuple(w.shape) for n, w in tensors.items() if n.startswith("model/")} != expected:
            raise RunError("the checkpoint's weights have other names or shapes than the model's; start a new run")
        if self.torchrec:
            tensors = {
                name: self.torchrec.local_piece(shard, value) if (shard := self._shard(name, value)) else value
                for name, value in tensors.items()
            }

        def group(name: str) -> dict[str, Tensor]:
            return {
                k.removeprefix(f"{name}/"): v.to(self.device) for k, v in tensors.items() if k.startswith(f"{name}/")
            }

        weights = group("model")
        self._load(weights)
        self.best_weights = group("best")
        if self.ema:
            self.ema = group("ema") or self.ema
        # With override=True the settings may have neither a memory nor hard negatives.
        if self.objective.memory.size and (memory := group("memory")):
            self.objective.memory.vectors, self.objective.memory.items = memory["vectors"], memory["items"]
        if self.objective.candidates and self.recipe.negatives.hard and (hard := group("hard_negatives")):
            self.objective.candidates.hard = hard["items"].cpu().numpy()
        if self.torchrec and self.torchrec.updates_sparsely:
            self.torchrec.restore_optimizer(tensors)
        optimized = {p: n for p, n in self.parameter_names.items() if p.requires_grad or n not in shards}
        checkpoint.restore_optimizer(self.optimizer, optimized, tensors)

    def _shard(self, name: str, value: Tensor) -> EmbeddingShard | None:
        """Return the sharded table that a tensor of a checkpoint belongs to; None if it is replicated."""
        if self.torchrec is None or not value.ndim:
            return None
        kind, _, rest = name.partition("/")
        return self.torchrec.shards_by_parameter.get(rest.partition("/")[2] if kind == "optimizer" else rest)

    def _save(self) -> None:
        """Write a checkpoint, or on another rank than 0 send the pieces for it. Raises TrainingError if a weight is not
        finite, RunError if the checkpoint cannot be written."""
        self._last_saved = time.monotonic()
        if self.folder is None or not (self.context.is_main or self.torchrec):
            return
        tensors: dict[str, Tensor | checkpoint.TensorBlocks] = {
            f"model/{n}": t for n, t in self.model.named_parameters()
        }
        if not self._finite(dict(self.model.named_parameters())):
            raise TrainingError(f"a weight is not finite after step {self.progress.step}; {self._advice()}")
        tensors |= {f"best/{n}": t for n, t in self.best_weights.items()}
        tensors |= {f"ema/{n}": t for n, t in self.ema.items()}
        if self.objective.memory.vectors is not None:
            tensors |= {"memory/vectors": self.objective.memory.vectors, "memory/items": self.objective.memory.items}
        if self.objective.candidates and self.objective.candidates.hard is not None:
            tensors["hard_negatives/items"] = torch.from_numpy(self.objective.candidates.hard)
        tensors |= checkpoint.optimizer_tensors(self.optimizer, self.parameter_names)
        if self.torchrec:
            if self.torchrec.updates_sparsely:
                tensors |= self.torchrec.optimizer_tensors(self.progress.step)
            for name, value in list(tensors.items()):
                if isinstance(value, Tensor) and (shard := self._shard(name, value)):
                    shape = (shard.num_embeddings, shard.embedding_dim)
                    tensors[name] = checkpoint.TensorBlocks(shape, self.torchrec.stream_rows(shard, value))
            if not self.context.is_main:  # send the pieces that rank 0 writes, in its order
                for name in checkpoint.file_order(tensors):
                    if isinstance(value := tensors[name], checkpoint.TensorBlocks):
                        for _ in value.rows:
                            pass
                return
        progress = dict(vars(self.progress))
        if progress["best"] == -math.inf:
            progress["best"] = "none"
        state = {"fingerprint": self.fingerprint, "progress": progress}
        self._last_path = checkpoint.save(self.folder, self.progress.step, tensors, state)

    def _checkpoint_due(self) -> bool:
        config = self.recipe.train
        if config.checkpoint_steps:
            return self.progress.step % config.checkpoint_steps == 0
        return (
            self._save_due
            if self.context.world_size > 1
            else time.monotonic() - self._last_saved > config.checkpoint_seconds
        )

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Make SIGTERM and SIGINT request a stop after the present step; without effect outside the main thread."""

        def request_stop(signal_number: int, frame: Any) -> None:
            self._stop_requested = True  # several ranks agree first: all must stop after the same step

        try:
            old = {s: signal.signal(s, request_stop) for s in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:
            old = {}
        try:
            yield
        finally:
            for s, handler in old.items():
                signal.signal(s, handler)

    def _not_finite(self, what: str, epoch: Epoch, batch: int) -> str:
        source = self.objective.examples(epoch, batch)[0].source
        rows = ", ".join(str(s) for s in source[source >= 0][:5])
        return f"{what} at step {self.progress.step + 1} (interactions {rows}, …); {self._advice()}"

    def _advice(self) -> str:
        last = f"last intact checkpoint: {self._last_path}" if self._last_path else "no checkpoint yet"
        return f"{last}; try a lower train.lr, or train.clip_norm = 1"


def _check_memory(recipe: Recipe, user_fields: tuple[InputField, ...], item_fields: tuple[InputField, ...]) -> None:
    """Raise ConfigError if the weights and their gradients take more bytes than the machine's memory."""
    with torch.device("meta"):  # tensors with shapes and without numbers
        try:
            weights = dict(TwoTower(recipe.model, user_fields, item_fields).named_parameters())
        except RuntimeError as e:  # a weight has more numbers than torch can count
            raise ConfigError(f"the model cannot be built ({str(e).splitlines()[0]}); {_HOW_TO_SHRINK}") from None
    need = 2 * sum(w.numel() * w.element_size() for w in weights.values())
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if need > have:
        name, largest = max(weights.items(), key=lambda named: named[1].numel())
        shape = " x ".join(f"{n:,}" for n in largest.shape)
        raise ConfigError(
            f"the model's weights and gradients take {need / 1e9:,.0f} GB and this machine has {have / 1e9:,.0f} GB of "
            f"memory (the largest: {name}, {shape}); {_HOW_TO_SHRINK}"
        )


_HOW_TO_SHRINK = "lower hash_buckets, max_grams, max_length, width or layers, or raise min_count"


def _optimizer(model: TwoTower, config: TrainConfig, device: torch.device) -> torch.optim.Optimizer:
    """Return the optimizer with one parameter group per weight decay: of embeddings (by tower), biases, and layers."""
    groups: list[tuple[list[nn.Parameter], float]] = []
    for side in SIDES:
        for tower, _ in model.towers(side):
            decay = config.embedding_weight_decay * tower.weight_decay_scale
            tables = [tower.embeddings.tables, *([] if tower.augmented is None else [tower.augmented])]
            groups.append(([p for t in tables for p in t.parameters() if p.requires_grad], decay))
    biases = [p for m in model.modules() if isinstance(m, FirstOrder) for p in m.parameters() if p.requires_grad]
    biases += [p for n, p in model.named_parameters() if n in ("global_bias", "log_temperature") and p.requires_grad]
    groups.append((biases, config.bias_weight_decay))
    known = {id(p) for params, _ in groups for p in params}
    groups.append(([p for p in model.parameters() if id(p) not in known and p.requires_grad], config.weight_decay))
    by_decay: dict[float, list[nn.Parameter]] = {}
    for params, decay in groups:
        by_decay.setdefault(decay, []).extend(params)
    kind: Any = getattr(torch.optim, config.optimizer)
    optimizer: torch.optim.Optimizer = kind(
        [{"params": params, "weight_decay": decay} for decay, params in by_decay.items() if params],
        lr=config.lr,
        **({"betas": (0.9, config.beta2)} if config.optimizer in ("Adam", "AdamW") else {}),
        fused=device.type == "cpu",  # every optimizer has a fused CPU kernel; elsewhere torch chooses
    )
    return optimizer
