"""Embedding tables sharded over the ranks, by TorchRec.

A step names the distinct rows of each table that its batch reads; TorchRec fetches them, from the ranks that hold them, as one
small matrix per table, and the towers read that matrix (`tables.EmbeddingShard`). After the backward pass the gradients of the
matrices go back the same way and are added up over the ranks. The result is that of replicated tables:

- sparse updates: by SGD and Adagrad a row without a gradient does not change. The rank that holds a row updates it when the
  gradient arrives, by fbgemm's exact update rules, and touches no other row.
- dense updates: Adam, AdamW and weight decay change every row in every step, and gradient clipping needs the norm of all
  gradients first. Gradients are added up in a second table, sharded like the weights, and torch's optimizer updates this
  rank's piece.
"""

from __future__ import annotations

import importlib.metadata
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn

from twotower.distributed import DistributedContext
from twotower.errors import ConfigError
from twotower.features.field import InputField
from twotower.model.inputs.carriers import Inputs
from twotower.model.tables import EmbeddingShard, Table, named_tables
from twotower.model.two_tower import TwoTower
from twotower.train.recipe import Recipe

MAX_BLOCK_NUMBERS = 2**22
"""Numbers of a table that are sent to rank 0 at a time: 16 MiB of float32."""
KERNEL_WIDTH_MULTIPLE = 4
"""fbgemm's kernels take widths that are multiples of this; other tables are padded with columns of zeros."""


def torchrec_requirements() -> list[str]:
    """Return the requirements of TorchRec and of its CPU kernels that fit the installed torch, for `pip install --no-deps`."""
    major, minor = map(int, torch.__version__.split(".")[:2])
    release = f"{major - 1}.{minor - 5}.*"  # torch 2.13 and fbgemm 1.8 came out together, and so on
    return [f"torchrec=={release}", f"fbgemm-gpu-cpu=={release}"]


@dataclass(frozen=True)
class ShardPlacement:
    """A rectangle [rows) x [columns) of a table, and the rank that holds it."""

    rank: int
    rows: tuple[int, int]
    columns: tuple[int, int]


def plan_sharding(sizes: list[tuple[int, int]], world_size: int, sharding: str) -> list[list[int]]:
    """Return for each table (rows, width) the ranks that share its columns; one rank holds the whole table.

    "column_wise" cuts every table, "auto" those larger than an equal share of all numbers. The largest tables are placed
    first, on the ranks that hold the fewest numbers.
    """
    held, ranks_of_table = [0] * world_size, [[0]] * len(sizes)
    numbers = [rows * padded_width(width) for rows, width in sizes]
    for t in sorted(range(len(sizes)), key=lambda t: (-numbers[t], t)):
        parts = 1
        if sharding == "column_wise" or (sharding == "auto" and numbers[t] * world_size > sum(numbers)):
            units = padded_width(sizes[t][1]) // KERNEL_WIDTH_MULTIPLE
            parts = max(k for k in range(1, world_size + 1) if units % k == 0)
        ranks_of_table[t] = sorted(sorted(range(world_size), key=lambda r: (held[r], r))[:parts])
        for r in ranks_of_table[t]:
            held[r] += numbers[t] // parts
    return ranks_of_table


def padded_width(width: int) -> int:
    """Return the width that the kernels need for a table: the next multiple of `KERNEL_WIDTH_MULTIPLE`."""
    return -(-width // KERNEL_WIDTH_MULTIPLE) * KERNEL_WIDTH_MULTIPLE


@dataclass
class _TableGroup:
    """The tables of one width in one sharded TorchRec module. Tables are numbered in the order of the model."""

    module: Any
    kernels: list[Any]  # of this rank
    placements: dict[int, list[ShardPlacement]]  # by table, of all ranks
    weights: dict[int, Tensor]  # by table, this rank's piece
    states: dict[int, Tensor]  # by table, the update rule's state of this rank's piece; empty without one


class TorchRecEmbeddings:
    """A model whose embedding tables are sharded over the ranks. All ranks call the same methods in the same order."""

    def __init__(
        self, recipe: Recipe, user_fields: tuple[InputField, ...], item_fields: tuple[InputField, ...], context: DistributedContext,
        device: torch.device,
    ) -> None:  # fmt: skip
        """Build the model. Raises ConfigError without TorchRec, without a process group, or on a device it does not
        support."""
        self.context, self.device = context, device
        self._torchrec = _import_torchrec(device)
        if not distributed.is_initialized():
            raise ConfigError(
                "train.embedding_placement = 'torchrec' needs a process group, which twotower.fit makes; "
                "here set train.embedding_placement = 'replicated'"
            )
        self._sizes: list[tuple[int, int]] = []
        with torch.device("meta"):
            TwoTower(recipe.model, user_fields, item_fields, self._record_size)
        ranks_of_table = plan_sharding(self._sizes, context.world_size, recipe.train.embedding_sharding)
        by_width: dict[int, list[int]] = {}
        for t, (_, width) in enumerate(self._sizes):
            by_width.setdefault(padded_width(width), []).append(t)
        self.updates_sparsely = _updates_sparsely(recipe)
        rules = {"SGD": "EXACT_SGD", "Adagrad": "EXACT_ADAGRAD"}
        rule = rules[recipe.train.optimizer] if self.updates_sparsely else "EXACT_SGD"
        groups = [{t: ranks_of_table[t] for t in tables} for tables in by_width.values()]
        row_wise = recipe.train.embedding_sharding == "row_wise"
        self._groups = [self._make_group(g, rule, recipe.train.lr, row_wise) for g in groups]
        # For dense updates: tables of zeros, which an update with a learning rate of -1 turns into the sum of gradients.
        self._gradient_groups = (
            [] if self.updates_sparsely else [self._make_group(g, rule, -1.0, row_wise) for g in groups]
        )
        self._shards: list[EmbeddingShard] = []
        self._fetched: dict[EmbeddingShard, Tensor] = {}
        torch.manual_seed(recipe.train.seed)  # the same numbers as for replicated tables, whatever was drawn before
        self.model = TwoTower(recipe.model, user_fields, item_fields, self._make_shard).to(device)
        """The model, with the initial weights that replicated tables have."""
        self.shards_by_parameter = {
            f"{name}.weight": cast(EmbeddingShard, table) for name, table in named_tables(self.model)
        }

    # ---- sharding

    def _record_size(self, rows: int, width: int) -> Table:
        self._sizes.append((rows, width))
        return Table(rows, width)

    def _make_shard(self, rows: int, width: int) -> EmbeddingShard:
        """Return this rank's piece of the next table; a model makes its tables in the same order every time."""
        t = len(self._shards)
        group = next(g for g in self._groups if t in g.weights)
        own = [p for p in group.placements[t] if p.rank == self.context.rank]
        first_row, first_column = (own[0].rows[0], own[0].columns[0]) if own else (0, 0)
        # torch's optimizer makes the dense updates only.
        weight = nn.Parameter(group.weights[t], requires_grad=not self.updates_sparsely)
        self._shards.append(EmbeddingShard(rows, width, weight, first_row, first_column))
        return self._shards[-1]

    def _make_group(self, ranks_of_table: dict[int, list[int]], rule: str, lr: float, row_wise: bool) -> _TableGroup:
        """Return tables of one width, all zeros, that are updated by an fbgemm rule."""
        rec, world_size = self._torchrec, self.context.world_size
        width = padded_width(self._sizes[next(iter(ranks_of_table))][1])
        configs = [
            rec.EmbeddingConfig(
                name=f"t{t}",
                feature_names=[f"t{t}"],
                num_embeddings=self._sizes[t][0],
                embedding_dim=width,
                init_fn=_no_init,
            )
            for t in ranks_of_table
        ]
        collection = rec.EmbeddingCollection(tables=configs, device=torch.device("meta"))
        sharding = {
            f"t{t}": rec.row_wise(compute_kernel="fused") if row_wise
            else rec.column_wise(ranks=ranks, compute_kernel="fused") if len(ranks) > 1
            else rec.table_wise(rank=ranks[0], compute_kernel="fused")
            for t, ranks in ranks_of_table.items()
        }  # fmt: skip
        fused = {"optimizer": getattr(rec.EmbOptimType, rule), "learning_rate": lr, "eps": 1e-10}  # torch's eps
        sharder = rec.EmbeddingCollectionSharder(fused_params=fused)
        plan = rec.construct_module_sharding_plan(
            collection, sharding, sharder=sharder, local_size=world_size, world_size=world_size,
            device_type=self.device.type,
        )  # fmt: skip
        env = rec.ShardingEnv.from_process_group(distributed.group.WORLD)
        module = sharder.shard(collection, plan, env, self.device)
        placements = {
            t: [
                ShardPlacement(
                    s.placement.rank(),
                    (s.shard_offsets[0], s.shard_offsets[0] + s.shard_sizes[0]),
                    (s.shard_offsets[1], s.shard_offsets[1] + s.shard_sizes[1]),
                )
                for s in plan[f"t{t}"].sharding_spec.shards
                if s.shard_sizes[0]
            ]
            for t in ranks_of_table
        }
        group = _TableGroup(module, [], placements, {}, {})
        for kernel in [m for lookup in module._lookups for m in lookup.modules() if hasattr(m, "emb_module")]:
            group.kernels.append(kernel.emb_module)
            states = kernel.emb_module.split_optimizer_states()
            weights = kernel.emb_module.split_embedding_weights()
            for i, table in enumerate(kernel.config.embedding_tables):
                t, weight = int(table.name[1:]), weights[i].detach()
                group.weights[t] = weight.zero_()
                if rule == "EXACT_ADAGRAD":
                    group.states[t] = states[i][0].detach().view(weight.shape).zero_()
        for t in ranks_of_table:  # empty pieces of tables that other ranks hold
            group.weights.setdefault(t, torch.zeros(0, width, device=self.device))
            if rule == "EXACT_ADAGRAD":
                group.states.setdefault(t, torch.zeros(0, width, device=self.device))
        return group

    # ---- a step

    def fetch(self, users: Inputs | None, items: Inputs | None) -> None:
        """Fetch the rows that the vectors of these users and items may read, into the shards of `model`."""
        codes_of_shard: dict[Any, list[Tensor]] = {shard: [] for shard in self._shards}
        for table, codes in self.model.codes(users, items):
            codes_of_shard[table].append(codes)
        none = torch.zeros(0, dtype=torch.int64, device=self.device)
        distinct = [torch.unique(torch.cat(codes)) if codes else none for codes in codes_of_shard.values()]
        for shard, rows in zip(self._shards, distinct, strict=True):
            shard.batch_codes = rows
        self._fetched = {}
        with torch.set_grad_enabled(self.updates_sparsely and torch.is_grad_enabled()):
            arriving = [(group, self._look_up(group, distinct)) for group in self._groups]
            for group, by_name in arriving:
                for t in group.weights:
                    self._fetched[self._shards[t]] = by_name[f"t{t}"].values()
        for shard, fetched in self._fetched.items():
            # A leaf of the graph: `apply_gradients` sends its gradient on, once the loss is known to be finite.
            shard.batch_rows = (
                fetched.detach()[:, : shard.embedding_dim].contiguous().requires_grad_(torch.is_grad_enabled())
            )

    def _look_up(self, group: _TableGroup, codes: list[Tensor]) -> Any:
        """Return an awaitable of the rows of each table's codes, by name "t<table>"."""
        wanted = {f"t{t}": codes[t] for t in group.weights}
        lengths = torch.tensor([len(c) for c in wanted.values()], device=self.device)
        return group.module(
            self._torchrec.KeyedJaggedTensor(
                keys=list(wanted), values=torch.cat(list(wanted.values())), lengths=lengths
            )
        )

    def apply_gradients(self, lr: float) -> None:
        """Send the gradients of the fetched rows to the ranks that hold the rows.

        Sparse updates happen there, at the learning rate `lr`; for dense updates each piece's `grad` is set, to the sum over
        the ranks times their number.
        """
        for i, group in enumerate(self._groups):
            if self.updates_sparsely:
                for kernel in group.kernels:
                    kernel.set_learning_rate(lr)
                self._backward({t: self._fetched[self._shards[t]] for t in group.weights})
                continue
            gradients = self._gradient_groups[i]
            for weight in gradients.weights.values():
                weight.zero_()
            by_name = self._look_up(gradients, [cast(Tensor, shard.batch_codes) for shard in self._shards])
            self._backward({t: by_name[f"t{t}"].values() for t in gradients.weights})
            for t, gradient in gradients.weights.items():
                self._shards[t].weight.grad = gradient
        self._fetched = {}

    def _backward(self, rows: dict[int, Tensor]) -> None:
        """Run the backward pass of TorchRec from the fetched `rows` of each table, with the gradients of `batch_rows`."""
        gradients = []
        for t, fetched in rows.items():
            batch_rows = self._shards[t].batch_rows
            assert batch_rows is not None
            gradient = torch.zeros_like(fetched)
            if batch_rows.grad is not None:
                gradient[:, : batch_rows.shape[1]] = batch_rows.grad
            gradients.append(gradient)
        torch.autograd.backward(list(rows.values()), gradients)

    def drop_fetched(self) -> None:
        """Free the fetched rows."""
        self._fetched = {}
        for shard in self._shards:
            shard.batch_rows = shard.batch_codes = None

    # ---- whole tables

    def _placements(self, shard: EmbeddingShard) -> list[ShardPlacement]:
        t = self._shards.index(shard)
        return next(g.placements[t] for g in self._groups if t in g.placements)

    def stream_rows(self, shard: EmbeddingShard, local: Tensor) -> Iterator[Tensor]:
        """Yield the rows of a table, or of an optimizer's state of it, in blocks (b, width) on rank 0, and empty ones elsewhere.

        `local` is this rank's piece, shaped like `shard.weight`.
        """
        rows, width = shard.num_embeddings, shard.embedding_dim
        step = max(1, MAX_BLOCK_NUMBERS // padded_width(width))
        for first in range(0, rows, step):
            last = min(first + step, rows)
            block = torch.zeros(last - first if self.context.is_main else 0, padded_width(width), device=self.device)
            for piece in self._placements(shard):
                low, high = max(first, piece.rows[0]), min(last, piece.rows[1])
                if low >= high:
                    continue
                if piece.rank == self.context.rank:
                    sent = local[low - piece.rows[0] : high - piece.rows[0]].contiguous()
                    if not self.context.is_main:
                        distributed.send(sent, 0)
                elif self.context.is_main:
                    sent = torch.empty(high - low, piece.columns[1] - piece.columns[0], device=self.device)
                    distributed.recv(sent, piece.rank)
                if self.context.is_main:
                    block[low - first : high - first, slice(*piece.columns)] = sent
            yield block[:, :width]

    @torch.no_grad()
    def local_piece(self, shard: EmbeddingShard, whole: Tensor) -> Tensor:
        """Return this rank's piece of a whole table (rows, width), shaped like `shard.weight`."""
        local = torch.zeros_like(shard.weight)
        shard.copy_rows(local, slice(0, shard.num_embeddings), whole)
        return local

    @torch.no_grad()
    def gather_tables(self) -> TwoTower:
        """Replace the pieces by whole tables in the model of rank 0; other ranks keep their pieces. No step may follow."""
        self.drop_fetched()
        for name, shard in list(named_tables(self.model)):
            assert isinstance(shard, EmbeddingShard)
            table = None
            if self.context.is_main:
                table = _empty_table(shard.num_embeddings, shard.embedding_dim, self.device)
            first = 0
            for block in self.stream_rows(shard, shard.weight):
                if table is not None:
                    table.weight[first : first + len(block)] = block
                    first += len(block)
            if table is not None:
                parent, _, last = name.rpartition(".")
                self.model.get_submodule(parent)._modules[last] = table
        return self.model

    def optimizer_tensors(self, step: int) -> dict[str, Tensor]:
        """Return the state of sparse updates after `step` steps, named as by `ModelOptimizer.state`."""
        tensors: dict[str, Tensor] = {}
        if step:
            for name, local in self._states().items():
                tensors |= {f"step/{name}": torch.tensor(float(step)), f"sum/{name}": local}
        return tensors

    @torch.no_grad()
    def restore_optimizer(self, tensors: dict[str, Tensor]) -> None:
        """Load the pieces of the tensors of `optimizer_tensors`."""
        for name, local in self._states().items():
            if (key := f"sum/{name}") in tensors:
                local.copy_(tensors[key])

    def _states(self) -> dict[str, Tensor]:
        """Return this rank's piece of the update rule's state, by parameter; empty for a rule without state."""
        by_table = {t: state for group in self._groups for t, state in group.states.items()}
        index = {shard: t for t, shard in enumerate(self._shards)}
        return {n: by_table[t] for n, shard in self.shards_by_parameter.items() if (t := index[shard]) in by_table}


def _empty_table(rows: int, width: int, device: torch.device) -> Table:
    with torch.device("meta"):
        table = Table(rows, width)
    return table.to_empty(device=device)


def _no_init(weight: Tensor) -> None:
    """Keep a table as it is, in place of TorchRec's initialization."""


def _updates_sparsely(recipe: Recipe) -> bool:
    """Return True if no step changes a row without a gradient: SGD or Adagrad, without weight decay or clipping."""
    train, scales = recipe.train, [t.weight_decay_scale for p in recipe.model.pairs for t in (p.user, p.item)]
    decays = (train.embedding_weight_decay and any(scales)) or (train.bias_weight_decay and recipe.model.bias)
    return train.optimizer in ("SGD", "Adagrad") and not decays and not train.clip_norm


def _import_torchrec(device: torch.device) -> Any:
    """Return the names of TorchRec that this module uses. Raises ConfigError if it is missing, or does not fit the installed
    torch or the device."""
    requirements = " ".join(map(repr, torchrec_requirements()))
    install = f"pip install -e '.[torchrec]' and pip install --no-deps {requirements} (docs/scale.md)"
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(
            f"train.embedding_placement = 'torchrec' works on 'cpu' and 'cuda', not on '{device.type}'; set train.device"
        )
    # TorchRec uses a deprecated function of torch, which logs each use.
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # fbgemm warns of each kernel of other hardware that is missing.
            warnings.simplefilter("ignore")
            from fbgemm_gpu.split_embedding_configs import EmbOptimType
            from torchrec import EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
            from torchrec.distributed.embedding import EmbeddingCollectionSharder
            from torchrec.distributed.sharding_plan import (
                column_wise,
                construct_module_sharding_plan,
                row_wise,
                table_wise,
            )
            from torchrec.distributed.types import ShardingEnv
    except ImportError as e:
        raise ConfigError(f"train.embedding_placement = 'torchrec' needs TorchRec ({e}); {install}") from None
    except (OSError, AttributeError, RuntimeError) as e:
        what = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise ConfigError(f"TorchRec does not fit torch {torch.__version__} ({what}); {install}") from None
    if device.type == "cuda" and not _is_installed("fbgemm-gpu"):
        raise ConfigError(
            "train.embedding_placement = 'torchrec' on 'cuda' needs fbgemm-gpu, and its CPU build is installed; install "
            "fbgemm-gpu instead of fbgemm-gpu-cpu, or set train.device = 'cpu'"
        )
    return SimpleNamespace(
        EmbOptimType=EmbOptimType, EmbeddingCollection=EmbeddingCollection, EmbeddingConfig=EmbeddingConfig,
        KeyedJaggedTensor=KeyedJaggedTensor, EmbeddingCollectionSharder=EmbeddingCollectionSharder,
        column_wise=column_wise, construct_module_sharding_plan=construct_module_sharding_plan, row_wise=row_wise,
        table_wise=table_wise, ShardingEnv=ShardingEnv,
    )  # fmt: skip


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
