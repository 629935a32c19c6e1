"""Embedding tables sharded over the ranks by TorchRec.

In a step, TorchRec fetches the distinct rows of each table that the batch reads, as one small matrix per table, and the
towers read that matrix (`shard.EmbeddingShard`). After the backward pass the gradients of the matrices return the same
way and are summed over the ranks. The result equals that of replicated tables:

- sparse updates: some optimizers do not change a row without a gradient. The rank of a row updates it when its gradient
  arrives, by the exact rule of fbgemm that the optimizer names.
- dense updates: other optimizers and weight decay change every row in every step, and gradient clipping first needs the
  norm of all gradients. Gradients are summed in a second table, sharded like the weights, and torch's optimizer updates
  this rank's piece.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, distributed, nn

from twotower.arrays.types import F32, Shaped
from twotower.distributed import DistributedContext
from twotower.errors import ConfigError, install_command
from twotower.model.inputs.code_layout import Inputs
from twotower.model.tables import Table, named_tables
from twotower.model.two_tower import TwoTower
from twotower.train.recipe import Recipe
from twotower.train.torchrec.shard import EmbeddingShard, padded_width, plan_sharding

if TYPE_CHECKING:
    from twotower.train.torchrec.table_group import TableGroup

ADD = "EXACT_SGD"
"""fbgemm's rule that adds gradients times a learning rate to rows."""
MAX_BLOCK_NUMBERS = 2**22
"""Numbers of a table sent to rank 0 at a time: 16 MiB of float32."""


class TorchRecEmbeddings:
    """Embedding tables of a model, sharded over the ranks. All ranks call the same methods in the same order."""

    def __init__(self, model: TwoTower, recipe: Recipe, context: DistributedContext, device: torch.device) -> None:
        """Replace the deferred tables of `model` by this rank's shards, with the initial rows of whole tables.

        Raises ConfigError without TorchRec or a process group, or on an unsupported device.
        """
        import_torchrec(device)
        if not distributed.is_initialized():
            raise ConfigError(
                "train.embedding_placement = 'torchrec' needs a process group, which twotower.fit makes; "
                "here set train.embedding_placement = 'replicated'"
            )
        from twotower.train.torchrec.table_group import TableGroup

        self.model, self.context, self.device = model, context, device
        tables = dict(named_tables(model))
        sizes = [(table.num_embeddings, table.embedding_dim) for table in tables.values()]
        ranks_of_table = plan_sharding(sizes, context.world_size, recipe.train.embedding_sharding)
        by_width: dict[int, dict[int, list[int]]] = {}
        for t, (_, width) in enumerate(sizes):
            by_width.setdefault(padded_width(width), {})[t] = ranks_of_table[t]
        self.updates_sparsely = _updates_sparsely(recipe)
        optimizer = recipe.train.optimizer
        rule, self._state = (optimizer.sparse_rule, optimizer.sparse_state) if self.updates_sparsely else (ADD, "")
        row_cut = recipe.train.embedding_sharding == "row_wise"
        self._groups = [
            TableGroup(sizes, g, rule, bool(self._state), recipe.train.lr, row_cut, device) for g in by_width.values()
        ]
        # For dense updates: an update of zeros with a learning rate of -1 is the sum of gradients.
        self._gradient_groups = [
            TableGroup(sizes, g, ADD, False, -1.0, row_cut, device)
            for g in by_width.values()
            if not self.updates_sparsely
        ]
        self._shards = [self._shard(t, table) for t, table in enumerate(tables.values())]
        self._fetched: dict[EmbeddingShard, Tensor] = {}
        for name, shard in zip(tables, self._shards, strict=True):
            model.set_submodule(name, shard)
        model.to(device)
        self.shards_by_parameter = {f"{name}.weight": s for name, s in zip(tables, self._shards, strict=True)}

    def _shard(self, t: int, table: Table) -> EmbeddingShard:
        group = self._group(t)
        own = [p for p in group.placements[t] if p.rank == self.context.rank]
        first_row, first_column = (own[0].rows[0], own[0].columns[0]) if own else (0, 0)
        # torch's optimizer makes the dense updates only.
        weight = nn.Parameter(group.weights[t], requires_grad=not self.updates_sparsely)
        return EmbeddingShard(table, weight, first_row, first_column)

    def _group(self, t: int) -> TableGroup:
        return next(g for g in self._groups if t in g.weights)

    # ---- a step

    def fetch(self, users: Inputs | None, items: Inputs | None) -> None:
        """Fetch the rows for the vectors of these users and items into the shards of `model`."""
        codes_of_shard: dict[Table, list[Tensor]] = {shard: [] for shard in self._shards}
        for table, codes in self.model.codes(users, items):
            codes_of_shard[table].append(codes)
        none = torch.zeros(0, dtype=torch.int64, device=self.device)
        distinct = [torch.unique(torch.cat(codes)) if codes else none for codes in codes_of_shard.values()]
        for shard, rows in zip(self._shards, distinct, strict=True):
            shard.batch_codes = rows
        self._fetched = {}
        with torch.set_grad_enabled(self.updates_sparsely and torch.is_grad_enabled()):
            arriving = [(group, group.look_up(distinct)) for group in self._groups]
            for group, by_name in arriving:
                for t in group.weights:
                    self._fetched[self._shards[t]] = by_name[f"t{t}"].values()
        for shard, fetched in self._fetched.items():
            # A leaf of the graph: `apply_gradients` sends its gradient once the loss is known to be finite.
            shard.batch_rows = (
                fetched.detach()[:, : shard.embedding_dim].contiguous().requires_grad_(torch.is_grad_enabled())
            )

    def apply_gradients(self, lr: float) -> None:
        """Send the gradients of the fetched rows to the ranks of the rows.

        Sparse updates happen there, with the learning rate `lr`. For dense updates each piece's `grad` becomes the sum
        over the ranks times their number.
        """
        for i, group in enumerate(self._groups):
            if self.updates_sparsely:
                group.set_learning_rate(lr)
                self._backward({t: self._fetched[self._shards[t]] for t in group.weights})
                continue
            gradients = self._gradient_groups[i]
            for weight in gradients.weights.values():
                weight.zero_()
            by_name = gradients.look_up([shard.batch_codes for shard in self._shards if shard.batch_codes is not None])
            self._backward({t: by_name[f"t{t}"].values() for t in gradients.weights})
            for t, gradient in gradients.weights.items():
                self._shards[t].weight.grad = gradient
        self._fetched = {}

    def _backward(self, rows: dict[int, F32[Tensor, "_ _"]]) -> None:
        """Run TorchRec's backward pass from the fetched `rows` of each table, with the gradients of `batch_rows`."""
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
        self._fetched = {}
        for shard in self._shards:
            shard.batch_rows = shard.batch_codes = None

    # ---- whole tables

    def stream_rows(
        self, shard: EmbeddingShard, local: F32[Tensor, "rows columns"]
    ) -> Iterator[F32[Tensor, "b width"]]:
        """Yield the rows of a table, or of an optimizer's state, in blocks on rank 0 and empty blocks elsewhere.

        `local` is this rank's piece, shaped like `shard.weight`.
        """
        rows, width, t = shard.num_embeddings, shard.embedding_dim, self._shards.index(shard)
        step = max(1, MAX_BLOCK_NUMBERS // padded_width(width))
        for first in range(0, rows, step):
            last = min(first + step, rows)
            block = torch.zeros(last - first if self.context.is_main else 0, padded_width(width), device=self.device)
            for piece in self._group(t).placements[t]:
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
    def local_piece(self, shard: EmbeddingShard, whole: F32[Tensor, "rows width"]) -> F32[Tensor, "r c"]:
        """Return this rank's piece of a whole table, shaped like `shard.weight`."""
        local = torch.zeros_like(shard.weight)
        shard.copy_rows(local, slice(0, shard.num_embeddings), whole)
        return local

    @torch.no_grad()
    def gather_tables(self) -> None:
        """Replace the shards by whole tables in the model of rank 0. No step may follow."""
        self.drop_fetched()
        for parameter, shard in self.shards_by_parameter.items():
            blocks = self.stream_rows(shard, shard.weight)
            if not self.context.is_main:
                for _ in blocks:
                    pass
                continue
            with torch.device("meta"):
                table = Table(shard.num_embeddings, shard.embedding_dim)
            table.to_empty(device=self.device)
            first = 0
            for block in blocks:
                table.weight[first : first + len(block)] = block
                first += len(block)
            self.model.set_submodule(parameter.removesuffix(".weight"), table)

    def optimizer_tensors(self, step: int) -> dict[str, Shaped[Tensor, "*_"]]:
        """Return the state of sparse updates after `step` steps, with the names of `ModelOptimizer.state`."""
        tensors: dict[str, Shaped[Tensor, "*_"]] = {}
        if step:
            for name, local in self._states().items():
                tensors |= {f"step/{name}": torch.tensor(float(step)), f"{self._state}/{name}": local}
        return tensors

    @torch.no_grad()
    def restore_optimizer(self, tensors: dict[str, Shaped[Tensor, "*_"]]) -> None:
        for name, local in self._states().items():
            if (key := f"{self._state}/{name}") in tensors:
                local.copy_(tensors[key])

    def _states(self) -> dict[str, Shaped[Tensor, "*_"]]:
        """Return this rank's piece of the update rule's state by parameter; empty for a rule without state."""
        by_table = {t: state for group in self._groups for t, state in group.states.items()}
        index = {shard: t for t, shard in enumerate(self._shards)}
        return {n: by_table[t] for n, shard in self.shards_by_parameter.items() if (t := index[shard]) in by_table}


def _updates_sparsely(recipe: Recipe) -> bool:
    """Return True if no step changes a row without a gradient: no weight decay, clipping or dense rule."""
    train, scales = recipe.train, [t.weight_decay_scale for p in recipe.model.pairs for t in (p.user, p.item)]
    decays = (train.embedding_weight_decay and any(scales)) or (train.bias_weight_decay and recipe.model.bias)
    return bool(train.optimizer.sparse_rule) and not decays and not train.clip_norm


def torchrec_requirements() -> list[str]:
    """Return the requirements of TorchRec and its CPU kernels for the installed torch, for `pip install --no-deps`."""
    major, minor = map(int, torch.__version__.split(".")[:2])
    release = f"{major - 1}.{minor - 5}.*"  # torch 2.13 goes with fbgemm 1.8, and so on
    return [f"torchrec=={release}", f"fbgemm-gpu-cpu=={release}"]


def import_torchrec(device: torch.device) -> None:
    """Import TorchRec without its warnings. Raises ConfigError if it is missing or does not fit torch or the device."""
    requirements = " ".join(map(repr, torchrec_requirements()))
    install = f"{install_command('torchrec')}, then pip install --no-deps {requirements} (docs/scale.md)"
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(
            f"train.embedding_placement = 'torchrec' works on 'cpu' and 'cuda', not on '{device.type}'; set "
            "train.device"
        )
    # TorchRec uses a deprecated function of torch, which logs each use.
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # fbgemm warns of each kernel of other hardware that is missing.
            warnings.simplefilter("ignore")
            for module in ("fbgemm_gpu", "torchrec", "twotower.train.torchrec.table_group"):
                importlib.import_module(module)
    except ImportError as e:
        raise ConfigError(f"train.embedding_placement = 'torchrec' needs TorchRec ({e}); {install}") from None
    except (OSError, AttributeError, RuntimeError) as e:
        what = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise ConfigError(f"TorchRec does not fit torch {torch.__version__} ({what}); {install}") from None
    if device.type == "cuda" and not is_installed("fbgemm-gpu"):
        raise ConfigError(
            "train.embedding_placement = 'torchrec' on 'cuda' needs fbgemm-gpu, and its CPU build is installed; "
            "install fbgemm-gpu instead of fbgemm-gpu-cpu, or set train.device = 'cpu'"
        )


def is_installed(distribution: str) -> bool:
    """Return True if a distribution of this name is installed."""
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
