"""The loop: batches in, best weights out.

Everything random depends on (seed, epoch, step) and not on what ran before, so a run that was killed at any step
goes on from its checkpoint to the same weights, bit for bit on a CPU.

Several ranks train one batch together: each runs the user tower for its own positives and the item tower for its part of
the batch's candidates, and the item vectors of all are gathered, gradients included. So the batch is what it is for one.
"""

from __future__ import annotations

import math
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from twotower.config import Config, TrainConfig
from twotower.data.batches import Batch, Batcher, Inputs, SideTensors
from twotower.data.dataset import Dataset
from twotower.data.splits import VALIDATION
from twotower.encoders import Ints
from twotower.errors import ConfigError, DataError, Interrupted, RunError, TrainingError
from twotower.evaluation import Factors, evaluate_part, evaluating, vectors
from twotower.model.tables import Shard
from twotower.model.two_tower import FirstOrder, TwoTower
from twotower.ranks import Ranks
from twotower.schema import SIDES, Sequence, SideName
from twotower.train import checkpoint
from twotower.train.candidates import CandidateSampler, Memory
from twotower.train.losses import binary_cross_entropy, contest, mimic
from twotower.train.negatives import Positives, Sampler
from twotower.train.order import Epoch, Examples
from twotower.train.sharded import Sharded
from twotower.watcher import Watcher

FAIL_POINT = "TWOTOWER_FAIL_AT_STEP"
"""For tests of recovery: SIGKILL to itself after this step; "step:rank" is meant for one rank, ":hang" at the end stops it."""


@dataclass
class Trained:
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


def choose_device(name: str, say: Callable[[str], None], local: int = 0) -> torch.device:
    """The device that `name` means here, the `local`-th of its kind; `auto` picks and says why. Raises ConfigError if it
    is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        say(f"device: {name} ({'an accelerator is here' if name != 'cpu' else 'no accelerator here'})")
    if (name == "cuda" and torch.cuda.device_count() <= local) or (
        name == "mps" and not torch.backends.mps.is_available()
    ):
        which = f"no GPU number {local} for this rank" if local else "none"
        raise ConfigError(f"train.device = '{name}' but there is {which} here; use 'auto' or 'cpu'")
    if name == "cuda":
        torch.cuda.set_device(local)
    return torch.device(name)


class _Towers(nn.Module):
    """Both towers in one call, as DistributedDataParallel wants it."""

    def __init__(self, model: TwoTower) -> None:
        super().__init__()
        self.model = model

    def forward(self, users: Inputs, items: Inputs) -> tuple[Tensor, Tensor]:
        return self.model.user_vectors(users), self.model.item_vectors(items)


def _together(towers: _Towers, pieces: Iterable[str]) -> nn.parallel.DistributedDataParallel:
    """The towers with gradients that are averaged over the ranks, but for the `pieces`, parameters of the model of which
    each rank has its own."""
    kind: Any = nn.parallel.DistributedDataParallel
    constants = [name for name, _ in towers.named_buffers()]  # the same on all ranks for ever
    kind._set_params_and_buffers_to_ignore_for_model(towers, [*constants, *(f"model.{name}" for name in pieces)])
    wrapped: nn.parallel.DistributedDataParallel = kind(towers)
    return wrapped


class Trainer:
    """Trains one model on one dataset. `folder` (optional) gets the checkpoints; `fingerprint` names what must
    not change between a checkpoint and its resume. Several `ranks` must be together (`Ranks.together`)."""

    def __init__(
        self,
        dataset: Dataset,
        config: Config,
        folder: Path | None = None,
        watcher: Watcher | None = None,
        fingerprint: dict[str, Any] | None = None,
        ranks: Ranks | None = None,
        device: torch.device | None = None,
    ) -> None:
        """`device` is chosen by `train.device` if it is None."""
        self.dataset, self.config, self.folder = dataset, config, folder
        self.ranks = ranks or Ranks()
        self.fingerprint = fingerprint or {}
        self.watcher = watcher or Watcher()
        self.device = device or choose_device(config.train.device, self.watcher.say, self.ranks.local)
        user_fields, item_fields = dataset.encoders.fields("user"), dataset.encoders.fields("item")
        self.sharded: Sharded | None = None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.train.seed)
            if config.train.tables == "torchrec":
                self.sharded = Sharded(config, user_fields, item_fields, self.ranks, self.device)
                self.model = self.sharded.model
            else:
                self.model = TwoTower(config.model, user_fields, item_fields).to(self.device)
        self.earlier = config.train.histories == "earlier"
        timeline = dataset.timeline if self.earlier else None
        self.users = SideTensors(dataset.users, user_fields, self.device, timeline, dataset.by_user)
        self.items = SideTensors(dataset.items, item_fields, self.device)
        self.batcher = Batcher(self.users, self.items)
        sequences = [f for f in dataset.schema.features if isinstance(f, Sequence)]
        self._tells_dislikes = any(f.of != "positive" for f in sequences)
        self._check_learnable()
        seed, shuffle, shards = config.train.seed, config.train.shuffle, config.train.shards
        if shards > 1 and shards % self.ranks.count:
            raise ConfigError(
                f"train.shards = {shards} cannot be dealt to {self.ranks.count} ranks; set a multiple, or 1: then every "
                "rank reads all shards"
            )
        if shards > config.train.batch_size:
            raise ConfigError(
                f"train.shards = {shards} and train.batch_size = {config.train.batch_size}: some batches would be empty; "
                "set no more shards than a batch has rows"
            )
        self.sampler: Sampler | Positives
        self.candidates: CandidateSampler | None = None
        self.memory = Memory(config.negatives.memory)
        if config.loss.kind == "bce":
            self.sampler = Sampler(dataset, config.negatives, seed, shuffle, shards)
        else:
            self.sampler = Positives(dataset, seed, shuffle, self.earlier, shards)
            self.candidates = CandidateSampler(dataset, config.negatives, seed)
        self.optimizer = _optimizer(self.model, config.train, self.device)
        self.names = {p: n for n, p in self.model.named_parameters()}
        self.towers: Callable[[Inputs, Inputs], tuple[Tensor, Tensor]] = _Towers(self.model)
        if self.ranks.count > 1:
            self.towers = _together(_Towers(self.model), self.sharded.names if self.sharded else ())
        self.steps_per_epoch = math.ceil(len(self.sampler) / config.train.batch_size)
        self.progress = _Progress()
        self.best_weights: dict[str, Tensor] = {}
        self.average = {n: p.detach().clone() for n, p in self.model.named_parameters()} if config.train.average else {}
        self._asked = False  # by a signal, of this process alone
        self._stop = self._late = False  # what the ranks have agreed on
        self._last_saved = time.monotonic()
        self._last_path: Path | None = None

    def _check_learnable(self) -> None:
        """Raises, before anything is written, if there is nothing to learn or nothing to choose epochs by."""
        pairs = self.config.loss.kind == "bce"
        if pairs and self.dataset.train.positive.all() and not self.config.negatives.random:
            raise DataError(
                "every training interaction is a positive, and negatives.random is 0; set negatives.random = 5, "
                "or loss.kind = 'softmax', or name a label and schema.positive_above"
            )
        if self.config.negatives.observed and self.dataset.train.positive.all():
            raise ConfigError(
                "negatives.observed draws items that were met and not liked, and every training interaction is a "
                "positive; drop it, or name a label and schema.positive_above"
            )
        self._check_histories()
        positive, monitor = self.dataset.validation.positive, self.config.train.monitor
        k = self.config.evaluation.k[0]
        if monitor in ("validation.auc", "validation.gauc") and (positive.all() or not positive.any()):
            raise ConfigError(
                f"train.monitor '{monitor}' cannot be measured: the validation part has one class only; "
                f"use train.monitor = 'validation.recall@{k}'"
            )

    def _check_histories(self) -> None:
        """Raises ConfigError if the sequences cannot be had as `train.histories` wants them."""
        for f in self.dataset.schema.features:
            if not isinstance(f, Sequence):
                continue
            if not self.earlier and f.pooling == "decay":
                raise ConfigError(
                    f"feature '{f.name}': pooling = 'decay' goes with the order of time; set train.histories = 'earlier'"
                )
            if self.earlier and (f.side == "item" or (f.max_length and not f.attends)):
                what = "on the item side" if f.side == "item" else "with max_length"
                raise ConfigError(
                    f"feature '{f.name}': a sequence {what} cannot be had as it was at every earlier moment; drop it or "
                    "set train.histories = 'others'"
                )
        n = self.config.negatives
        if self.earlier and not (n.full or n.random or n.uniform or n.popularity or n.memory):
            self.watcher.say(
                "warning: with train.histories = 'earlier' a batch holds few users, so the batch alone gives few "
                "candidates; add negatives.uniform, or negatives.full = true"
            )
        if self.earlier and self.dataset.seconds is None:
            raise ConfigError("train.histories = 'earlier' needs a time; name its column in schema.time")

    # ---- the run

    def run(self) -> Trained:
        """Train to the last epoch or until patience runs out; the model ends with its best weights.

        Raises TrainingError if the loss or the weights stop being finite, Interrupted on SIGTERM or SIGINT.
        """
        p, config = self.progress, self.config.train
        with self._signals(), torch.random.fork_rng(devices=[]):
            while p.epoch < config.epochs and not self._out_of_patience():
                self._epoch(self.sampler.epoch(p.epoch))
        self._load(self.best_weights)
        if self.sharded:
            self.sharded.whole()
        self.towers = _Towers(self.model)  # nobody waits for other ranks any more
        seconds = max(p.seconds, 1e-9)
        metrics = {
            "train.seconds": p.seconds,
            "train.rows_per_second": p.rows / seconds,
            "train.steps": float(p.step),
            "train.epochs": float(p.epoch),
            "train.best_epoch": float(p.best_epoch),
            "train.peak_memory_mb": peak_memory_mb(),
        }
        return Trained(self.model, p.history, metrics)

    def _epoch(self, epoch: Epoch) -> None:
        p = self.progress
        started = time.perf_counter()
        self._mine()
        p.seconds += time.perf_counter() - started
        while p.batch < self.steps_per_epoch:
            started = time.perf_counter()
            self.step(epoch, p.batch)
            p.seconds += time.perf_counter() - started
            if self._stop or (self._asked and self.ranks.count == 1):
                self._save()
                self.towers = _Towers(self.model)  # nothing holds the ranks' group any more
                run = self.folder.parent if self.folder else None
                how = f"go on: twotower train {run}/config.toml --run {run} --resume" if run else "nothing was saved"
                raise Interrupted(f"stopped after step {p.step}; {how}")
            if self._due():
                self._save()
        started = time.perf_counter()
        found = self._validate()
        entry: dict[str, Any] = {
            "epoch": p.epoch + 1,
            "step": p.step,
            "train.loss": p.loss_sum / self.steps_per_epoch,
            **({"train.mimic": p.mimic_sum / self.steps_per_epoch} if self.config.loss.mimic else {}),
            "train.seconds": round(p.seconds, 3),
            "lr": self._lr(max(p.step - 1, 0)),
            **found,
            "validation.seconds": round(time.perf_counter() - started, 3),
        }
        p.history.append(entry)
        p.epoch, p.batch, p.loss_sum, p.mimic_sum = p.epoch + 1, 0, 0.0, 0.0
        self._save()
        self.watcher.epoch(p.history)

    def step(self, epoch: Epoch, number: int) -> None:
        """One update of the weights with batch `number` of an epoch."""
        p, config = self.progress, self.config.train
        self._seed(p.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr(p.step)
        self.optimizer.zero_grad(set_to_none=True)
        rows, loss, mimicry = self._contest(epoch, number) if self.candidates else self._pairs(epoch, number)
        # The gradients of the ranks are averaged, and a rank's loss is its part of the batch's: a sum is meant.
        ((loss + mimicry) * self.ranks.count).backward()  # type: ignore[no-untyped-call]
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
            keep = min(config.average, p.step / (p.step + 10))
            for name, parameter in self.model.named_parameters():
                self.average[name].lerp_(parameter.detach(), 1 - keep)
        self.watcher.step(p.batch, self.steps_per_epoch, value)
        here = (str(p.step), f"{p.step}:{self.ranks.number}")
        if (told := os.environ.get(FAIL_POINT)) and told.removesuffix(":hang") in here:
            os.kill(os.getpid(), signal.SIGSTOP if told.endswith(":hang") else signal.SIGKILL)

    def _clip(self, norm: float) -> None:
        """Scale all gradients down to `norm`, if they are longer together."""
        if not self.sharded or self.ranks.count == 1:
            nn.utils.clip_grad_norm_(self.model.parameters(), norm)
            return
        gradients: dict[bool, list[Tensor]] = {True: [], False: []}
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                gradients[name in self.sharded.names].append(parameter.grad)
        pieces, same = (float(nn.utils.get_total_norm(gradients[of])) for of in (True, False))
        total = math.sqrt(same**2 + self.ranks.sum(pieces**2)[0])
        if total > norm:
            for gradient in gradients[True] + gradients[False]:
                gradient.mul_(norm / (total + 1e-6))  # as torch does

    def _both(self, users: Inputs, items: Inputs) -> tuple[Tensor, Tensor]:
        """The vectors of these users and items."""
        if self.sharded:
            self.sharded.fetch(users, items)
        with self._precision():
            return self.towers(users, items)

    def _agree(self, loss: float, mimicry: float) -> tuple[float, float]:
        """The losses of all ranks' parts together; and if one is to stop, all do, when the first is to save, all know."""
        if self.ranks.count == 1:
            return loss, mimicry
        late = self.ranks.first and time.monotonic() - self._last_saved > self.config.train.checkpoint_seconds
        loss, mimicry, stop, save = self.ranks.sum(loss, mimicry, float(self._asked), float(late))
        self._stop, self._late = stop > 0, save > 0
        return loss, mimicry

    def _pairs(self, epoch: Epoch, number: int) -> tuple[int, Tensor, Tensor]:
        """Number, loss and mimic loss of a batch of labelled pairs."""
        whole, _, mine = self.examples(epoch, number)
        # Who has none runs the towers for one, of weight nothing: all ranks take part in every step.
        own = whole[mine] if mine.start < mine.stop else replace(whole[:1], weight=np.zeros(1, np.float32))
        batch = self.batcher(own.user, own.item, own.label, own.weight, whole.source)
        users, items = self._both(batch.users, batch.items)
        with self._precision():
            logits = (users.index_select(0, batch.user) * items.index_select(0, batch.item)).sum(1)
        total = 0.0 if self.ranks.count == 1 else float(whole.weight.sum(dtype=np.float64))
        loss = binary_cross_entropy(logits, batch.label, batch.weight, total)
        mimicry = torch.zeros((), device=self.device)
        if self.config.loss.mimic:
            liked = (batch.label > 0) & (batch.weight > 0)
            mimicry = self._mimic(
                batch.users, batch.items, users, items, batch.user[liked], batch.item[liked], int(whole.label.sum())
            )
        return len(whole), loss, mimicry

    def _contest(self, epoch: Epoch, number: int) -> tuple[int, Tensor, Tensor]:
        """Number, loss and mimic loss of a batch of positives against its candidates."""
        assert self.candidates is not None
        config, memory, ranks = self.config, self.memory, self.ranks
        whole, ends, mine = self.examples(epoch, number)
        own = whole[mine]
        # An observed candidate must not be readable from a history either; what was met before is in an earlier one.
        moments = whole.source if self.earlier and self._tells_dislikes else None
        drawn = self.candidates(
            whole.user, whole.item, self.progress.step, memory.items, self.device, moments, ends, mine
        )
        share = ranks.share(drawn.shared)
        sizes = ranks.sizes(drawn.shared)
        rows = np.concatenate([drawn.items[share], drawn.items[drawn.shared :]])
        known = self._left_out(whole.source, drawn.observed)
        # All ranks take part in every step: who has nothing to embed embeds something, and drops it.
        asked, items_asked = own if len(own) else whole[:1], rows if len(rows) else drawn.items[:1]
        batch = self.batcher.contestants(asked.user, asked.source, items_asked, self.earlier, known)
        users, items = self._both(batch.users, batch.items)
        n = share.stop - share.start

        def everything(mine: Tensor) -> Tensor:
            """What is known of the rank's items -> of `drawn.items`."""
            return mine if ranks.count == 1 else torch.cat([ranks.gather(mine[:n], sizes), mine[n : len(rows)]])

        items = everything(items)
        mimicry = torch.zeros((), device=self.device)
        if config.loss.mimic:
            of = torch.arange(len(asked), device=users.device) if batch.user is None else batch.user
            mimicry = self._mimic(
                batch.users, batch.items, users, items, of[: len(own)], drawn.positive, len(whole), everything
            )
        if batch.user is not None:
            users = users.index_select(0, batch.user)
        columns = items if memory.vectors is None else torch.cat([items, memory.vectors])
        loss = contest(
            users[: len(own)], columns, drawn, config.loss, len(self.dataset.items), config.negatives.hard_margin,
            torch.bfloat16 if config.train.precision == "bf16" else torch.float32, len(whole),
        )  # fmt: skip
        if memory.size:
            latest = torch.from_numpy(whole.item.astype(np.int64)).to(self.device)
            memory.keep(latest, items.index_select(0, drawn.batch))
        return len(whole), loss, mimicry

    def _left_out(self, source: Ints, observed: Ints) -> Ints:
        """The interactions of the batch, which no sequence may hold."""
        if self.ranks.count > 1 and self.config.train.shards > 1 and self.config.negatives.observed:
            counts = [int(n) for n in self.ranks.gather_array(np.array([len(observed)]), [1] * self.ranks.count)]
            observed = self.ranks.gather_array(observed, counts)
        return np.concatenate([source, observed]) if len(observed) else source

    def _mimic(
        self, user_rows: Inputs, item_rows: Inputs, users: Tensor, items: Tensor, user: Tensor, item: Tensor,
        n: int, everything: Callable[[Tensor], Tensor] = lambda mine: mine,
    ) -> Tensor:  # fmt: skip
        """Weighted `mimic` losses of the positives (user[p], item[p]), indices into `users` and `items`; they are a part
        of `n`. `everything` turns what belongs to `item_rows` into what belongs to `items`."""
        model = self.model
        found = [mimic(a[user], v[item], n) for a, v in model.augmented("user", user_rows, items)]
        found += [mimic(everything(a)[item], v[user], n) for a, v in model.augmented("item", item_rows, users)]
        return self.config.loss.mimic * torch.stack(found).sum()

    def _precision(self) -> Any:
        bf16 = self.config.train.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16) if bf16 else nullcontext()

    def _seed(self, step: int) -> None:
        """Dropout and unknown values of a step depend on (seed, step) alone."""
        seed = (self.config.train.seed << 32) + step
        if not self.ranks.first:
            seed = int(np.random.SeedSequence([seed, self.ranks.number]).generate_state(1, np.uint64)[0] >> 1)
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        elif self.device.type == "mps":
            torch.mps.manual_seed(seed)

    def batch(self, epoch: Epoch, number: int) -> Batch:
        """Batch `number` of an epoch, of all ranks."""
        whole, _, _ = self.examples(epoch, number)
        return self.batcher(whole.user, whole.item, whole.label, whole.weight, whole.source)

    def examples(self, epoch: Epoch, number: int) -> tuple[Examples, Ints, slice]:
        """The examples of a batch, where those of each shard end, and which are this rank's."""
        parts, ranks = epoch.cut(number, self.config.train.batch_size), self.ranks
        ends = np.cumsum([p.stop - p.start for p in parts])
        if ranks.count == 1 or len(parts) == 1:
            whole = Examples.join([epoch.of(s, part) for s, part in enumerate(parts)])
            return whole, ends, ranks.share(len(whole))
        counts = [int(n) for n in np.diff(ends, prepend=0).reshape(ranks.count, -1).sum(1)]  # of as many shards each
        own = ranks.share(len(parts))
        read = Examples.join([epoch.of(s, parts[s]) for s in range(own.start, own.stop)])
        whole = Examples.unpack(ranks.gather_array(read.pack(), counts))
        first = sum(counts[: ranks.number])
        return whole, ends, slice(first, first + len(read))

    def _mine(self) -> None:
        """Hard candidates from the present model, at the start of every `hard_every`-th epoch but the first."""
        p, negatives = self.progress, self.config.negatives
        if self.candidates and negatives.hard and not p.batch and p.epoch and (p.epoch - 1) % negatives.hard_every == 0:
            factors = self.factors()
            self.candidates.mine(factors.users, factors.items, p.epoch)

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
        metrics = evaluate_part(factors, self.dataset, VALIDATION, self.config.evaluation) if self.ranks.first else {}
        found: dict[str, float] = self.ranks.told({f"validation.{m}": v for m, v in metrics.items() if v == v})
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
        if self.ranks.count == 1 and not self.sharded:
            return vectors(self.model, self.users, self.items)
        with evaluating(self.model):
            return Factors(self._everyone("user"), self._everyone("item"))

    def _everyone(self, name: SideName) -> Tensor:
        """The vectors of all rows of a side, each rank's part of every block by itself; all ask their tower as often."""
        ranks, found, sharded = self.ranks, [], self.sharded
        side, tower = (self.users, self.model.user_vectors) if name == "user" else (self.items, self.model.item_vectors)
        block = 4096 if sharded else 32_768  # a block's rows of the tables are held
        for start in range(0, side.n, block * ranks.count):
            n = min(side.n - start, block * ranks.count)
            sizes = ranks.sizes(n)
            mine = ranks.share(n)
            rows = start + np.arange(mine.start, max(mine.stop, mine.start + 1)) % n
            inputs = side.take(rows)
            if sharded:
                sharded.fetch(*((inputs, None) if name == "user" else (None, inputs)))
            found.append(ranks.gather(tower(inputs)[: sizes[ranks.number]], sizes))
        if sharded:
            sharded.forget()
        return torch.cat(found)

    def _finite(self, tensors: dict[str, Tensor]) -> bool:
        """Whether all numbers are, on every rank that has others."""
        strange = any(not bool(torch.isfinite(t).all()) for t in tensors.values())
        return not (self.ranks.sum(float(strange))[0] if self.sharded else strange)

    def _out_of_patience(self) -> bool:
        return bool(self.config.train.patience) and self.progress.waited >= self.config.train.patience

    def _lr(self, step: int) -> float:
        c = self.config.train
        warm = min(1.0, (step + 1) / c.warmup_steps) if c.warmup_steps else 1.0
        if c.schedule == "cosine":
            factor = 0.5 * (1 + math.cos(math.pi * step / (c.epochs * self.steps_per_epoch)))
        elif c.schedule == "step":
            factor = c.decay_rate ** (step // (c.decay_epochs * self.steps_per_epoch))
        else:
            factor = 1.0
        return c.lr * warm * factor

    def _load(self, weights: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(weights[name])

    # ---- stopping and going on

    def resume(self, override: bool = False) -> bool:
        """Go on from the newest good checkpoint; False if there is none.

        Raises RunError with the differences if the fingerprint has changed, unless `override`.
        """
        if self.folder is None:
            return False
        found = checkpoint.newest(self.folder, self.watcher.say)
        if found is None:
            return False
        tensors, state = found
        self._last_path = self.folder / f"step-{state['step']:09d}"
        changed = [
            f"{key}: {old!r} then, {new!r} now"
            for key in sorted({*state["fingerprint"], *self.fingerprint})
            if (old := state["fingerprint"].get(key)) != (new := self.fingerprint.get(key))
        ]
        if changed:
            what = "; ".join(changed[:5])
            if not override:
                raise RunError(f"cannot resume, the run has changed ({what}); go back, or pass --override")
            self.watcher.say(f"warning: resuming although the run has changed ({what})")
        self._restore(tensors)
        self.progress = _Progress(**state["progress"])
        if self.progress.best == "none":  # type: ignore[comparison-overlap]
            self.progress.best = -math.inf  # type: ignore[unreachable]
        return True

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
        # With --override the settings may ask for none.
        if self.memory.size and (memory := group("memory")):
            self.memory.vectors, self.memory.items = memory["vectors"], memory["items"]
        if self.candidates and self.config.negatives.hard and (mined := group("mined")):
            self.candidates.mined = mined["items"].cpu().numpy()
        if self.sharded and self.sharded.touched:
            self.sharded.restore(tensors)
        swept = {p: n for p, n in self.names.items() if p.requires_grad or n not in shards}
        checkpoint.restore_optimizer(self.optimizer, swept, tensors)

    def _shard(self, name: str, value: Tensor) -> Shard | None:
        """The table that a tensor of a checkpoint is as large as, if the ranks hold it in pieces."""
        if self.sharded is None or not value.ndim:
            return None
        kind, _, rest = name.partition("/")
        return self.sharded.names.get(rest.partition("/")[2] if kind == "optimizer" else rest)

    def _save(self) -> None:
        self._last_saved = time.monotonic()
        if self.folder is None or not (self.ranks.first or self.sharded):
            return
        tensors: dict[str, Tensor | checkpoint.Blocks] = {f"model/{n}": t for n, t in self.model.named_parameters()}
        if not self._finite(dict(self.model.named_parameters())):
            raise TrainingError(f"weights are no longer finite after step {self.progress.step}; {self._advice()}")
        tensors |= {f"best/{n}": t for n, t in self.best_weights.items()}
        tensors |= {f"average/{n}": t for n, t in self.average.items()}
        if self.memory.vectors is not None:
            tensors |= {"memory/vectors": self.memory.vectors, "memory/items": self.memory.items}
        if self.candidates and self.candidates.mined is not None:
            tensors["mined/items"] = torch.from_numpy(self.candidates.mined)
        tensors |= checkpoint.optimizer_tensors(self.optimizer, self.names)
        if self.sharded:
            if self.sharded.touched:
                tensors |= self.sharded.states(self.progress.step)
            for name, value in list(tensors.items()):
                if isinstance(value, Tensor) and (shard := self._shard(name, value)):
                    shape = (shard.num_embeddings, shard.embedding_dim)
                    tensors[name] = checkpoint.Blocks(shape, self.sharded.blocks(shard, value))
            if not self.ranks.first:  # what the first rank asks for, in its order
                for name in checkpoint.in_order(tensors):
                    if isinstance(value := tensors[name], checkpoint.Blocks):
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
        return self._late if self.ranks.count > 1 else time.monotonic() - self._last_saved > config.checkpoint_seconds

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
        source = self.examples(epoch, number)[0].source
        rows = ", ".join(str(s) for s in source[source >= 0][:5])
        return f"{what} at step {self.progress.step + 1} (interactions {rows}, …); {self._advice()}"

    def _advice(self) -> str:
        good = f"last good checkpoint: {self._last_path}" if self._last_path else "no checkpoint yet"
        return f"{good}; try a lower train.lr or train.clip_norm = 1"


def _optimizer(model: TwoTower, config: TrainConfig, device: torch.device) -> torch.optim.Optimizer:
    """Each tower's embeddings, the biases and the layers are groups of their own, each with its weight decay."""
    groups: list[tuple[list[nn.Parameter], float]] = []
    for side in SIDES:
        for tower, _ in model.towers(side):
            decay = config.embedding_weight_decay * tower.decay_scale
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
