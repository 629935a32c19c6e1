"""Tables that several ranks hold together, each a piece of them, by TorchRec.

A step names distinct rows of each table; TorchRec fetches them from the ranks that hold them as one small matrix a table,
and the towers read that (`tables.EmbeddingShard`). After the backward pass the matrices' gradients go the same way back, where
those of all ranks are added up. What is trained is what whole tables would be trained to:

- By SGD and Adagrad a row without a gradient stays as it is. So the rank that holds a row updates it as the gradient
  arrives (fbgemm's exact update rules), and no other row is touched: "touched".
- Adam and AdamW move every row at every step, and so does a weight decay; the clipping of gradients must know all of them
  first. Then gradients are added up in a table of their own, cut as the weights are, and torch's optimizer updates the
  piece that is here: "swept".
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

from twotower.config import Config
from twotower.data.batches import Inputs
from twotower.distributed import DistributedContext
from twotower.encoders import Field
from twotower.errors import ConfigError
from twotower.model.tables import EmbeddingShard, Table, named_tables
from twotower.model.two_tower import TwoTower

_BLOCK_NUMBERS = 2**22
"""Numbers of a table that are sent to the first rank at a time."""
_WIDTH_MULTIPLE = 4
"""The kernels want widths that are multiples of it: a narrower table has columns of zeros beside its own."""


def torchrec_requirements() -> list[str]:
    """What pip must install, `--no-deps`, beside the extra: the release of TorchRec, and of its kernels for a CPU, that
    were built for the torch that is here."""
    major, minor = map(int, torch.__version__.split(".")[:2])
    release = f"{major - 1}.{minor - 5}.*"  # torch 2.13 and fbgemm 1.8 came out together, and so on
    return [f"torchrec=={release}", f"fbgemm-gpu-cpu=={release}"]


@dataclass(frozen=True)
class ShardPlacement:
    """A rectangle of a table, and who holds it."""

    rank: int
    rows: tuple[int, int]
    columns: tuple[int, int]


def plan_sharding(sizes: list[tuple[int, int]], world_size: int, sharding: str) -> list[list[int]]:
    """For tables (rows, width) the ranks among which the columns of each are dealt; one: it lies there whole.

    The largest are given first, each to those who hold the least. "auto" cuts what is larger than an equal share of all.
    """
    held, found = [0] * world_size, [[0]] * len(sizes)
    numbers = [rows * padded_width(width) for rows, width in sizes]
    for t in sorted(range(len(sizes)), key=lambda t: (-numbers[t], t)):
        parts = 1
        if sharding == "column_wise" or (sharding == "auto" and numbers[t] * world_size > sum(numbers)):
            grains = padded_width(sizes[t][1]) // _WIDTH_MULTIPLE
            parts = max(k for k in range(1, world_size + 1) if grains % k == 0)
        found[t] = sorted(sorted(range(world_size), key=lambda r: (held[r], r))[:parts])
        for r in found[t]:
            held[r] += numbers[t] // parts
    return found


def padded_width(width: int) -> int:
    """The width of a table for the kernels."""
    return -(-width // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE


@dataclass
class _TableGroup:
    """Tables of one width as TorchRec holds them: the sharded module, its kernels, what each rank holds of each table
    (by number), and of this rank's pieces the numbers and what the update rule remembers of them."""

    module: Any
    kernels: list[Any]
    pieces: dict[int, list[ShardPlacement]]
    weights: dict[int, Tensor]
    states: dict[int, Tensor]


class TorchRecEmbeddings:
    """A model whose tables are cut into pieces. All ranks must call the same methods in the same order."""

    def __init__(
        self, config: Config, user_fields: tuple[Field, ...], item_fields: tuple[Field, ...], context: DistributedContext,
        device: torch.device,
    ) -> None:  # fmt: skip
        """Raises ConfigError if it cannot be had here."""
        self.context, self.device = context, device
        self._rec = _import_torchrec(device)
        if not distributed.is_initialized():
            raise ConfigError(
                "train.embedding_placement = 'torchrec' is for twotower.fit, which brings ranks together; "
                "here set train.embedding_placement = 'replicated'"
            )
        self._sizes: list[tuple[int, int]] = []
        with torch.device("meta"):
            TwoTower(config.model, user_fields, item_fields, self._measure)
        dealt = plan_sharding(self._sizes, context.world_size, config.train.embedding_sharding)
        by_width: dict[int, list[int]] = {}
        for t, (_, width) in enumerate(self._sizes):
            by_width.setdefault(padded_width(width), []).append(t)
        self.touched = _updates_sparsely(config)
        rule = {"SGD": "EXACT_SGD", "Adagrad": "EXACT_ADAGRAD"}[config.train.optimizer] if self.touched else "EXACT_SGD"
        groups = [{t: dealt[t] for t in numbers} for numbers in by_width.values()]
        row_wise = config.train.embedding_sharding == "row_wise"
        self._held = [self._collection(g, rule, config.train.lr, row_wise) for g in groups]
        # Where rows are swept: zeros, which an update at a rate of -1 makes the sum of the gradients.
        self._gradients = [] if self.touched else [self._collection(g, rule, -1.0, row_wise) for g in groups]
        self._shards: list[EmbeddingShard] = []
        self._leaves: dict[EmbeddingShard, Tensor] = {}
        torch.manual_seed(config.train.seed)  # what was drawn until here says nothing
        self.model = TwoTower(config.model, user_fields, item_fields, self._make).to(device)
        """The model, with the fresh weights of one with whole tables."""
        self.names = {f"{name}.weight": cast(EmbeddingShard, table) for name, table in named_tables(self.model)}

    # ---- how tables are cut

    def _measure(self, rows: int, width: int) -> Table:
        self._sizes.append((rows, width))
        return Table(rows, width)

    def _make(self, rows: int, width: int) -> EmbeddingShard:
        """The next table's piece. (A model makes its tables in the same order every time.)"""
        t = len(self._shards)
        held = next(c for c in self._held if t in c.weights)
        mine = [p for p in held.pieces[t] if p.rank == self.context.rank]
        first_row, first_column = (mine[0].rows[0], mine[0].columns[0]) if mine else (0, 0)
        # An optimizer of torch updates what is swept only.
        weight = nn.Parameter(held.weights[t], requires_grad=not self.touched)
        self._shards.append(EmbeddingShard(rows, width, weight, first_row, first_column))
        return self._shards[-1]

    def _collection(self, dealt: dict[int, list[int]], rule: str, lr: float, row_wise: bool) -> _TableGroup:
        """Tables of one width, zeros, for an update rule; `dealt` says among which ranks."""
        rec, count = self._rec, self.context.world_size
        width = padded_width(self._sizes[next(iter(dealt))][1])
        configs = [
            rec.EmbeddingConfig(
                name=f"t{t}",
                feature_names=[f"t{t}"],
                num_embeddings=self._sizes[t][0],
                embedding_dim=width,
                init_fn=_no_init,
            )
            for t in dealt
        ]
        whole = rec.EmbeddingCollection(tables=configs, device=torch.device("meta"))
        cuts = {
            f"t{t}": rec.row_wise(compute_kernel="fused") if row_wise
            else rec.column_wise(ranks=among, compute_kernel="fused") if len(among) > 1
            else rec.table_wise(rank=among[0], compute_kernel="fused")
            for t, among in dealt.items()
        }  # fmt: skip
        fused = {"optimizer": getattr(rec.EmbOptimType, rule), "learning_rate": lr, "eps": 1e-10}  # torch's eps
        sharder = rec.EmbeddingCollectionSharder(fused_params=fused)
        cut = rec.construct_module_sharding_plan(
            whole, cuts, sharder=sharder, local_size=count, world_size=count, device_type=self.device.type
        )
        module = sharder.shard(whole, cut, rec.ShardingEnv.from_process_group(distributed.group.WORLD), self.device)
        pieces = {
            t: [
                ShardPlacement(
                    s.placement.rank(),
                    (s.shard_offsets[0], s.shard_offsets[0] + s.shard_sizes[0]),
                    (s.shard_offsets[1], s.shard_offsets[1] + s.shard_sizes[1]),
                )
                for s in cut[f"t{t}"].sharding_spec.shards
                if s.shard_sizes[0]
            ]
            for t in dealt
        }
        made = _TableGroup(module, [], pieces, {}, {})
        for kernel in [m for lookup in module._lookups for m in lookup.modules() if hasattr(m, "emb_module")]:
            made.kernels.append(kernel.emb_module)
            states = kernel.emb_module.split_optimizer_states()
            weights = kernel.emb_module.split_embedding_weights()
            for number, table in enumerate(kernel.config.embedding_tables):
                t, weight = int(table.name[1:]), weights[number].detach()
                made.weights[t] = weight.zero_()
                if rule == "EXACT_ADAGRAD":
                    made.states[t] = states[number][0].detach().view(weight.shape).zero_()
        for t in dealt:  # of which this rank holds nothing
            made.weights.setdefault(t, torch.zeros(0, width, device=self.device))
            if rule == "EXACT_ADAGRAD":
                made.states.setdefault(t, torch.zeros(0, width, device=self.device))
        return made

    # ---- a step

    def fetch(self, users: Inputs | None, items: Inputs | None) -> None:
        """Fetch the rows that the vectors of these users and items may read, for `model` to read them."""
        wanted: dict[Any, list[Tensor]] = {shard: [] for shard in self._shards}
        for table, codes in self.model.codes(users, items):
            wanted[table].append(codes)
        asked = [torch.unique(torch.cat(w)) if w else self._none() for w in wanted.values()]
        for shard, codes in zip(self._shards, asked, strict=True):
            shard.batch_codes = codes
        self._leaves = {}
        with torch.set_grad_enabled(self.touched and torch.is_grad_enabled()):
            arriving = [(c, self._ask(c, asked)) for c in self._held]
            for collection, rows in arriving:
                for t in collection.weights:
                    self._leaves[self._shards[t]] = rows[f"t{t}"].values()
        for shard, found in self._leaves.items():
            # A leaf: what it gets is sent on when the step is known to be good.
            shard.batch_rows = (
                found.detach()[:, : shard.embedding_dim].contiguous().requires_grad_(torch.is_grad_enabled())
            )

    def _none(self) -> Tensor:
        return torch.zeros(0, dtype=torch.int64, device=self.device)

    def _ask(self, collection: _TableGroup, codes: list[Tensor]) -> Any:
        """By table "t<number>" the rows of the codes, not yet arrived."""
        asked = {f"t{t}": codes[t] for t in collection.weights}
        lengths = torch.tensor([len(c) for c in asked.values()], device=self.device)
        return collection.module(
            self._rec.KeyedJaggedTensor(keys=list(asked), values=torch.cat(list(asked.values())), lengths=lengths)
        )

    def send(self, lr: float) -> None:
        """Send on what the fetched rows got as gradients, times the number of ranks: where rows are touched, they are
        updated; where they are swept, the pieces have their `grad`."""
        for number, held in enumerate(self._held):
            if self.touched:
                for kernel in held.kernels:
                    kernel.set_learning_rate(lr)
                self._back(held, {t: self._leaves[self._shards[t]] for t in held.weights})
                continue
            gradients = self._gradients[number]
            for weight in gradients.weights.values():
                weight.zero_()
            rows = self._ask(gradients, [cast(Tensor, shard.batch_codes) for shard in self._shards])
            self._back(gradients, {t: rows[f"t{t}"].values() for t in gradients.weights})
            for t, gradient in gradients.weights.items():
                self._shards[t].weight.grad = gradient
        self._leaves = {}

    def _back(self, collection: _TableGroup, rows: dict[int, Tensor]) -> None:
        gradients = []
        for t, fetched in rows.items():
            found = self._shards[t].batch_rows
            assert found is not None
            gradient = torch.zeros_like(fetched)
            if found.grad is not None:
                gradient[:, : found.shape[1]] = found.grad
            gradients.append(gradient)
        torch.autograd.backward(list(rows.values()), gradients)

    def forget(self) -> None:
        """Drop what was fetched."""
        self._leaves = {}
        for shard in self._shards:
            shard.batch_rows = shard.batch_codes = None

    # ---- whole tables

    def _pieces(self, shard: EmbeddingShard) -> list[ShardPlacement]:
        t = self._shards.index(shard)
        return next(c.pieces[t] for c in self._held if t in c.pieces)

    def blocks(self, shard: EmbeddingShard, local: Tensor) -> Iterator[Tensor]:
        """What the ranks hold as `local` (as `shard.weight`, or numbers beside it) as rows of the table, some at a time;
        the first rank gets them, the others empty ones."""
        rows, width = shard.num_embeddings, shard.embedding_dim
        step = max(1, _BLOCK_NUMBERS // padded_width(width))
        for first in range(0, rows, step):
            last = min(first + step, rows)
            block = torch.zeros(last - first if self.context.is_main else 0, padded_width(width), device=self.device)
            for piece in self._pieces(shard):
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
    def take(self, shard: EmbeddingShard, whole: Tensor) -> Tensor:
        """What this rank holds of a table (rows, width), as `shard.weight`."""
        local = torch.zeros_like(shard.weight)
        shard.copy_rows(local, slice(0, shard.num_embeddings), whole)
        return local

    @torch.no_grad()
    def whole(self) -> TwoTower:
        """The model with whole tables, on the first rank; the others keep their pieces. It is the last that is asked."""
        self.forget()
        for name, shard in list(named_tables(self.model)):
            assert isinstance(shard, EmbeddingShard)
            table = None
            if self.context.is_main:
                table = _empty_table(shard.num_embeddings, shard.embedding_dim, self.device)
            first = 0
            for block in self.blocks(shard, shard.weight):
                if table is not None:
                    table.weight[first : first + len(block)] = block
                    first += len(block)
            if table is not None:
                parent, _, last = name.rpartition(".")
                self.model.get_submodule(parent)._modules[last] = table
        return self.model

    def states(self, step: int) -> dict[str, Tensor]:
        """What touched rows' update rule remembers, as `checkpoint.optimizer_tensors` names it."""
        found: dict[str, Tensor] = {}
        if step:
            for name, local in self._states().items():
                found |= {f"optimizer/step/{name}": torch.tensor(float(step)), f"optimizer/sum/{name}": local}
        return found

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """The reverse of `states`, of pieces."""
        for name, local in self._states().items():
            if (key := f"optimizer/sum/{name}") in tensors:
                local.copy_(tensors[key])

    def _states(self) -> dict[str, Tensor]:
        by_table = {t: state for c in self._held for t, state in c.states.items()}
        return {name: by_table[t] for name, shard in self.names.items() if (t := self._shards.index(shard)) in by_table}


def _empty_table(rows: int, width: int, device: torch.device) -> Table:
    with torch.device("meta"):
        table = Table(rows, width)
    return table.to_empty(device=device)


def _no_init(weight: Tensor) -> None:
    """TorchRec would start a table with other numbers."""


def _updates_sparsely(config: Config) -> bool:
    """Whether a row without a gradient stays as it is, so that touched rows alone need be updated."""
    train, scales = config.train, [t.weight_decay_scale for p in config.model.pairs for t in (p.user, p.item)]
    decays = (train.embedding_weight_decay and any(scales)) or (train.bias_weight_decay and config.model.bias)
    return train.optimizer in ("SGD", "Adagrad") and not decays and not train.clip_norm


def _import_torchrec(device: torch.device) -> Any:
    """What is used of TorchRec. Raises ConfigError if it is not here, or not for this torch or device."""
    requirements = " ".join(map(repr, torchrec_requirements()))
    install = f"pip install -e '.[torchrec]' and pip install --no-deps {requirements} (docs/scale.md)"
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(
            f"train.embedding_placement = 'torchrec' works on 'cpu' and 'cuda', not on '{device.type}'; set train.device"
        )
    # TorchRec calls a name of torch that only logs that there are newer ones.
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # On a CPU the kernels of other hardware are missing, and fbgemm warns of each.
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
            "train.embedding_placement = 'torchrec' on 'cuda' needs fbgemm-gpu, and its build for CPUs is here; install "
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
