"""The loop: batches in, best weights out.

Everything random depends on (seed, epoch, step) and not on what ran before, so a run that was killed at any step
goes on from its checkpoint to the same weights, bit for bit on a CPU.
"""

from __future__ import annotations

import logging
import math
import os
import resource
import signal
import sys
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
from twotower.callbacks import Callback
from twotower.config import Config, TrainConfig
from twotower.data.dataset import Dataset
from twotower.data.splits import VALIDATION
from twotower.distributed import DistributedContext
from twotower.encoders import Field
from twotower.errors import ConfigError, Interrupted, RunError, TrainingError
from twotower.evaluation import Factors, evaluate_part, evaluation_mode, model_factors
from twotower.model.tables import EmbeddingShard
from twotower.model.two_tower import FirstOrder, TwoTower
from twotower.schema import SIDES, SideName
from twotower.train import checkpoint
from twotower.train.objective import Objective
from twotower.train.order import Epoch
from twotower.train.sharded import TorchRecEmbeddings

log = logging.getLogger(__name__)


@dataclass
class TrainingResult:
    """A model with its best weights, and how it came to them."""

    model: TwoTower
    history: list[dict[str, Any]]
    metrics: dict[str, float]


@dataclass
class _Progress:
    """What a checkpoint remembers beside tensors; all of it goes on exactly."""

    epoch: int = 0
    batch: int = 0  # steps done in this epoch
    step: int = 0  # steps done in all
    rows: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    mimic_sum: float = 0.0
    best: float = -math.inf
    best_epoch: int = 0
    waited: int = 0  # validations since the best one
    history: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def restore(cls, kept: dict[str, Any], path: Path) -> _Progress:
        """Check and return what a checkpoint holds; "none" is its best of nothing. Raises RunError if that is none."""
        fresh = vars(cls())
        best = -math.inf if kept.get("best") == "none" else kept.get("best")
        found = kept | {"best": best}
        kinds = {name: (int, float) if isinstance(v, float) else (type(v),) for name, v in fresh.items()}
        if not found.keys() <= fresh.keys() or not all(type(v) in kinds[name] for name, v in found.items()):
            raise RunError(f"{path / 'state.json'}: damaged (progress is not as it was written); remove {path}")
        return cls(**found)


def choose_device(name: str, local: int = 0) -> torch.device:
    """The device that `name` means here, the `local`-th of its kind; `auto` picks and says why. Raises ConfigError if it
    is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        log.info(f"device: {name} ({'an accelerator is here' if name != 'cpu' else 'no accelerator here'})")
    if (name == "cuda" and torch.cuda.device_count() <= local) or (
        name == "mps" and not torch.backends.mps.is_available()
    ):
        which = f"no GPU number {local} for this rank" if local else "none"
        raise ConfigError(f"train.device = '{name}' but there is {which} here; use 'auto' or 'cpu'")
    if name == "cuda":
        torch.cuda.set_device(local)
    return torch.device(name)


class Trainer:
    """Trains one model on one dataset. `folder` (optional) gets the checkpoints; `fingerprint` names what must
    not change between a checkpoint and its resume. With several ranks it runs inside `context.process_group()`."""

    def __init__(
        self,
        dataset: Dataset,
        config: Config,
        folder: Path | None = None,
        callback: Callback | None = None,
        fingerprint: dict[str, Any] | None = None,
        context: DistributedContext | None = None,
        device: torch.device | None = None,
    ) -> None:
        """`device` is chosen by `train.device` if it is None."""
        self.dataset, self.config, self.folder = dataset, config, folder
        self.context = context or DistributedContext()
        self.fingerprint = fingerprint or {}
        self.callback = callback or Callback()
        self.device = device or choose_device(config.train.device, self.context.local_rank)
        user_fields, item_fields = dataset.encoders.fields("user"), dataset.encoders.fields("item")
        self.sharded: TorchRecEmbeddings | None = None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.train.seed)
            if config.train.embedding_placement == "torchrec":
                self.sharded = TorchRecEmbeddings(config, user_fields, item_fields, self.context, self.device)
                self.model = self.sharded.model
            else:
                _check_memory(config, user_fields, item_fields)
                self.model = TwoTower(config.model, user_fields, item_fields).to(self.device)
        self.objective = Objective(dataset, config, self.model, self.device, self.context, self.sharded)
        self.optimizer = _optimizer(self.model, config.train, self.device)
        self.names = {p: n for n, p in self.model.named_parameters()}
        self.progress = _Progress()
        self.best_weights: dict[str, Tensor] = {}
        self.average = (
            {n: p.detach().clone() for n, p in self.model.named_parameters()} if config.train.ema_decay else {}
        )
        self._asked = False  # by a signal, of this process alone
        self._stop = self._late = False  # what the ranks have agreed on
        self._last_saved = time.monotonic()
        self._last_path: Path | None = None

    # ---- the run

    def run(self) -> TrainingResult:
        """Train to the last epoch or until patience runs out; the model ends with its best weights.

        Raises TrainingError if the loss or the weights stop being finite, Interrupted on SIGTERM or SIGINT.
        """
        p, config = self.progress, self.config.train
        with self._signals(), torch.random.fork_rng(devices=[]):
            while p.epoch < config.epochs and not self._out_of_patience():
                self._epoch(self.objective.sampler.epoch(p.epoch))
        self._load(self.best_weights)
        if self.sharded:
            self.sharded.whole()
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

    def _epoch(self, epoch: Epoch) -> None:
        p = self.progress
        started = time.perf_counter()
        if not p.batch:
            self.objective.refresh_hard_negatives(self.factors, p.epoch)
        p.seconds += time.perf_counter() - started
        while p.batch < self.objective.steps_per_epoch:
            started = time.perf_counter()
            self.step(epoch, p.batch)
            p.seconds += time.perf_counter() - started
            if self._stop or (self._asked and self.context.world_size == 1):
                self._save()
                self.objective.detach_from_group()
                saved = "a checkpoint is written" if self.folder else "nothing was saved"
                raise Interrupted(f"stopped after step {p.step}; {saved}")
            if self._due():
                self._save()
        started = time.perf_counter()
        found = self._validate()
        entry: dict[str, Any] = {
            "epoch": p.epoch + 1,
            "step": p.step,
            "train.loss": p.loss_sum / self.objective.steps_per_epoch,
            **({"train.mimic": p.mimic_sum / self.objective.steps_per_epoch} if self.config.loss.mimic else {}),
            "train.seconds": round(p.seconds, 3),
            "lr": self._lr(max(p.step - 1, 0)),
            **found,
            "validation.seconds": round(time.perf_counter() - started, 3),
        }
        p.history.append(entry)
        p.epoch, p.batch, p.loss_sum, p.mimic_sum = p.epoch + 1, 0, 0.0, 0.0
        self._save()
        self.callback.on_epoch_end(p.history)

    def step(self, epoch: Epoch, number: int) -> None:
        """One update of the weights with batch `number` of an epoch."""
        p, config = self.progress, self.config.train
        self._seed(p.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr(p.step)
        self.optimizer.zero_grad(set_to_none=True)
        rows, loss, mimicry = self.objective(epoch, number, p.step)
        # The gradients of the ranks are averaged, and a rank's loss is its part of the batch's: a sum is meant.
        ((loss + mimicry) * self.context.world_size).backward()  # type: ignore[no-untyped-call]
        value, mimicked = self._agree(loss.item(), mimicry.item())
        if not math.isfinite(value + mimicked):
            raise TrainingError(self._not_finite(f"the loss is {value + mimicked}", epoch, number))
        if self.sharded:
            self.sharded.send(self._lr(p.step))
        if config.clip_norm:
            self._clip(config.clip_norm)
        self.optimizer.step()
        p.step, p.batch, p.rows, p.loss_sum = p.step + 1, p.batch + 1, p.rows + rows, p.loss_sum + value
        p.mimic_sum += mimicked
        if self.average:
            # A young average follows quickly, or it would remember the random start.
            keep = min(config.ema_decay, p.step / (p.step + 10))
            for name, parameter in self.model.named_parameters():
                self.average[name].lerp_(parameter.detach(), 1 - keep)
        self.callback.on_step_end(p.batch, self.objective.steps_per_epoch, value)
        files.point(f"step:{p.step}:{self.context.rank}")

    def _clip(self, norm: float) -> None:
        """Scale all gradients down to `norm`, if they are longer together."""
        if not self.sharded or self.context.world_size == 1:
            nn.utils.clip_grad_norm_(self.model.parameters(), norm)
            return
        gradients: dict[bool, list[Tensor]] = {True: [], False: []}
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                gradients[name in self.sharded.names].append(parameter.grad)
        pieces, same = (float(nn.utils.get_total_norm(gradients[of])) for of in (True, False))
        total = math.sqrt(same**2 + self.context.all_reduce_sum(pieces**2)[0])
        if total > norm:
            for gradient in gradients[True] + gradients[False]:
                gradient.mul_(norm / (total + 1e-6))  # as torch does

    def _agree(self, loss: float, mimicry: float) -> tuple[float, float]:
        """The losses of all ranks' parts together; and if one is to stop, all do, when the first is to save, all know."""
        if self.context.world_size == 1:
            return loss, mimicry
        late = self.context.is_main and time.monotonic() - self._last_saved > self.config.train.checkpoint_seconds
        loss, mimicry, stop, save = self.context.all_reduce_sum(loss, mimicry, float(self._asked), float(late))
        self._stop, self._late = stop > 0, save > 0
        return loss, mimicry

    def _seed(self, step: int) -> None:
        """Dropout and unknown values of a step depend on (seed, step) alone."""
        seed = (self.config.train.seed << 32) + step
        if not self.context.is_main:
            seed = int(np.random.SeedSequence([seed, self.context.rank]).generate_state(1, np.uint64)[0] >> 1)
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        elif self.device.type == "mps":
            torch.mps.manual_seed(seed)

    def _validate(self) -> dict[str, float]:
        """Validation metrics, every `validate_every` epochs and after the last; keeps the weights if they are the best."""
        p, config = self.progress, self.config.train
        if (p.epoch + 1) % config.validate_every and p.epoch + 1 < config.epochs:
            return {}
        weights = {n: t.detach().clone() for n, t in self.model.named_parameters()}
        if not self._finite(weights):
            raise TrainingError(f"weights are no longer finite after step {p.step}; {self._advice()}")
        if self.average:
            self._load(self.average)
        factors = self.factors()
        metrics = (
            evaluate_part(factors, self.dataset, VALIDATION, self.config.evaluation) if self.context.is_main else {}
        )
        found: dict[str, float] = self.context.broadcast({f"validation.{m}": v for m, v in metrics.items() if v == v})
        value = found.get(config.monitor)
        if value is None:
            raise ConfigError(
                f"train.monitor '{config.monitor}' cannot be measured on this validation part (one class only?); "
                f"choose one of {', '.join(found)}"
            )
        # Only the log loss is better when it is lower.
        better = -value if config.monitor.endswith("log_loss") else value
        if better > p.best:
            p.best, p.best_epoch, p.waited = better, p.epoch + 1, 0
            self.best_weights = {n: t.detach().clone() for n, t in self.model.named_parameters()}
        else:
            p.waited += 1
        self._load(weights)
        return found

    def factors(self) -> Factors:
        """Vectors of all users and items with the model's present weights."""
        if self.context.world_size == 1 and not self.sharded:
            return model_factors(self.model, self.objective.users, self.objective.items)
        with evaluation_mode(self.model):
            return Factors(self._everyone("user"), self._everyone("item"))

    def _everyone(self, name: SideName) -> Tensor:
        """The vectors of all rows of a side, each rank's part of every block by itself; all ask their tower as often."""
        context, found, sharded, o = self.context, [], self.sharded, self.objective
        side, tower = (o.users, self.model.user_vectors) if name == "user" else (o.items, self.model.item_vectors)
        block = 4096 if sharded else 32_768  # a block's rows of the tables are held
        for start in range(0, side.n, block * context.world_size):
            n = min(side.n - start, block * context.world_size)
            sizes = context.partition_sizes(n)
            mine = context.partition(n)
            rows = start + np.arange(mine.start, max(mine.stop, mine.start + 1)) % n
            inputs = side.take(rows)
            if sharded:
                sharded.fetch(*((inputs, None) if name == "user" else (None, inputs)))
            found.append(context.all_gather(tower(inputs)[: sizes[context.rank]], sizes))
        if sharded:
            sharded.forget()
        return torch.cat(found)

    def _finite(self, tensors: dict[str, Tensor]) -> bool:
        """Whether all numbers are, on every rank that has others."""
        strange = any(not bool(torch.isfinite(t).all()) for t in tensors.values())
        return not (self.context.all_reduce_sum(float(strange))[0] if self.sharded else strange)

    def _out_of_patience(self) -> bool:
        return bool(self.config.train.patience) and self.progress.waited >= self.config.train.patience

    def _lr(self, step: int) -> float:
        c = self.config.train
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
        """Go on from the newest good checkpoint of the folder, or else of one of `others`: the one it was in; None if
        there is none.

        Raises RunError with the differences if the fingerprint has changed, unless `override`.
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
            what = "; ".join(changed[:5])
            if not override:
                raise RunError(f"cannot resume, the run has changed ({what}); go back, or pass `override=True`")
            log.warning(f"resuming although the run has changed ({what})")
        self._restore(tensors)
        self.progress = _Progress.restore(state["progress"], self._last_path)
        return folder

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        shards = self.sharded.names if self.sharded else {}
        expected = {
            n: (s.num_embeddings, s.embedding_dim) if (s := shards.get(n)) else tuple(p.shape)
            for n, p in self.model.named_parameters()
        }
        if {n.removeprefix("model/"): tuple(w.shape) for n, w in tensors.items() if n.startswith("model/")} != expected:
            raise RunError("the checkpoint's weights do not have the model's names and shapes; start a new run")
        if self.sharded:
            tensors = {
                name: self.sharded.take(shard, value) if (shard := self._shard(name, value)) else value
                for name, value in tensors.items()
            }

        def group(name: str) -> dict[str, Tensor]:
            return {
                k.removeprefix(f"{name}/"): v.to(self.device) for k, v in tensors.items() if k.startswith(f"{name}/")
            }

        weights = group("model")
        self._load(weights)
        self.best_weights = group("best")
        if self.average:
            self.average = group("average") or self.average
        # With override=True the settings may ask for none.
        if self.objective.memory.size and (memory := group("memory")):
            self.objective.memory.vectors, self.objective.memory.items = memory["vectors"], memory["items"]
        if self.objective.candidates and self.config.negatives.hard and (mined := group("mined")):
            self.objective.candidates.hard = mined["items"].cpu().numpy()
        if self.sharded and self.sharded.touched:
            self.sharded.restore(tensors)
        swept = {p: n for p, n in self.names.items() if p.requires_grad or n not in shards}
        checkpoint.restore_optimizer(self.optimizer, swept, tensors)

    def _shard(self, name: str, value: Tensor) -> EmbeddingShard | None:
        """The table that a tensor of a checkpoint is as large as, if the ranks hold it in pieces."""
        if self.sharded is None or not value.ndim:
            return None
        kind, _, rest = name.partition("/")
        return self.sharded.names.get(rest.partition("/")[2] if kind == "optimizer" else rest)

    def _save(self) -> None:
        self._last_saved = time.monotonic()
        if self.folder is None or not (self.context.is_main or self.sharded):
            return
        tensors: dict[str, Tensor | checkpoint.TensorBlocks] = {
            f"model/{n}": t for n, t in self.model.named_parameters()
        }
        if not self._finite(dict(self.model.named_parameters())):
            raise TrainingError(f"weights are no longer finite after step {self.progress.step}; {self._advice()}")
        tensors |= {f"best/{n}": t for n, t in self.best_weights.items()}
        tensors |= {f"average/{n}": t for n, t in self.average.items()}
        if self.objective.memory.vectors is not None:
            tensors |= {"memory/vectors": self.objective.memory.vectors, "memory/items": self.objective.memory.items}
        if self.objective.candidates and self.objective.candidates.hard is not None:
            tensors["mined/items"] = torch.from_numpy(self.objective.candidates.hard)
        tensors |= checkpoint.optimizer_tensors(self.optimizer, self.names)
        if self.sharded:
            if self.sharded.touched:
                tensors |= self.sharded.states(self.progress.step)
            for name, value in list(tensors.items()):
                if isinstance(value, Tensor) and (shard := self._shard(name, value)):
                    shape = (shard.num_embeddings, shard.embedding_dim)
                    tensors[name] = checkpoint.TensorBlocks(shape, self.sharded.blocks(shard, value))
            if not self.context.is_main:  # what the first rank asks for, in its order
                for name in checkpoint.in_order(tensors):
                    if isinstance(value := tensors[name], checkpoint.TensorBlocks):
                        for _ in value.rows:
                            pass
                return
        progress = dict(vars(self.progress))
        if progress["best"] == -math.inf:
            progress["best"] = "none"
        state = {"fingerprint": self.fingerprint, "progress": progress}
        self._last_path = checkpoint.save(self.folder, self.progress.step, tensors, state)

    def _due(self) -> bool:
        config = self.config.train
        if config.checkpoint_steps:
            return self.progress.step % config.checkpoint_steps == 0
        return (
            self._late
            if self.context.world_size > 1
            else time.monotonic() - self._last_saved > config.checkpoint_seconds
        )

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT ask the loop to stop after its step (only the main thread can listen)."""

        def ask(number: int, frame: Any) -> None:
            # Not _stop where there are several ranks: all must stop after the same step.
            self._asked = True

        try:
            old = {s: signal.signal(s, ask) for s in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:
            old = {}
        try:
            yield
        finally:
            for s, handler in old.items():
                signal.signal(s, handler)

    def _not_finite(self, what: str, epoch: Epoch, number: int) -> str:
        source = self.objective.examples(epoch, number)[0].source
        rows = ", ".join(str(s) for s in source[source >= 0][:5])
        return f"{what} at step {self.progress.step + 1} (interactions {rows}, …); {self._advice()}"

    def _advice(self) -> str:
        good = f"last good checkpoint: {self._last_path}" if self._last_path else "no checkpoint yet"
        return f"{good}; try a lower train.lr or train.clip_norm = 1"


def _check_memory(config: Config, user_fields: tuple[Field, ...], item_fields: tuple[Field, ...]) -> None:
    """Raises ConfigError if the weights and their gradients are more than the machine's memory."""
    with torch.device("meta"):  # which has shapes and no numbers
        try:
            weights = dict(TwoTower(config.model, user_fields, item_fields).named_parameters())
        except RuntimeError as e:  # a weight of more numbers than torch can count
            raise ConfigError(f"the model cannot be made ({str(e).splitlines()[0]}); {_SMALLER}") from None
    need = 2 * sum(w.numel() * w.element_size() for w in weights.values())
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if need > have:
        name, largest = max(weights.items(), key=lambda named: named[1].numel())
        shape = " x ".join(f"{n:,}" for n in largest.shape)
        raise ConfigError(
            f"the model's weights and gradients take {need / 1e9:,.0f} GB and this machine has {have / 1e9:,.0f} GB of "
            f"memory (the largest: {name}, {shape}); {_SMALLER}"
        )


_SMALLER = "lower hash_buckets, max_grams, max_length, width or layers, or raise min_count"


def _optimizer(model: TwoTower, config: TrainConfig, device: torch.device) -> torch.optim.Optimizer:
    """Each tower's embeddings, the biases and the layers are groups of their own, each with its weight decay."""
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
        fused=device.type == "cpu",  # every optimizer has a fused CPU kernel; elsewhere torch knows best
    )
    return optimizer


def peak_memory_mb() -> float:
    """The largest resident size this process has had, in MB (10^6 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
