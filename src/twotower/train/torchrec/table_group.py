"""Tables of one width in one sharded TorchRec module. `embeddings.import_torchrec` imports it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor, distributed
from torchrec import EmbeddingCollection, EmbeddingConfig, JaggedTensor, KeyedJaggedTensor
from torchrec.distributed.batched_embedding_kernel import BaseBatchedEmbedding
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.sharding_plan import (
    column_wise,
    construct_module_sharding_plan,
    row_wise,
    table_wise,
)
from torchrec.distributed.types import ShardingEnv

from twotower.arrays.types import F32, I64
from twotower.train.torchrec.shard import ShardPlacement, padded_width


class TableGroup:
    """Tables of one width, zeros at first, that an update rule of fbgemm changes.

    Keys are numbers of tables in the order of the model. `placements` holds the pieces of all ranks, `weights` this
    rank's piece of each table, `states` the rule's state, empty for a rule without state.
    """

    def __init__(
        self, sizes: list[tuple[int, int]], ranks_of_table: dict[int, list[int]], rule: str, keeps_state: bool,
        lr: float, row_cut: bool, device: torch.device,
    ) -> None:  # fmt: skip
        """Shard the tables of `ranks_of_table` with (rows, width) in `sizes`.

        Columns are shared by their ranks, or with `row_cut` rows by all ranks. `rule` is a name of fbgemm's
        `EmbOptimType`; if it `keeps_state`, it has a number for each weight.
        """
        self.device, world_size = device, distributed.get_world_size()
        width = padded_width(sizes[next(iter(ranks_of_table))][1])
        configs = [
            EmbeddingConfig(
                name=f"t{t}", feature_names=[f"t{t}"], num_embeddings=sizes[t][0], embedding_dim=width, init_fn=_no_init
            )
            for t in ranks_of_table
        ]
        collection = EmbeddingCollection(tables=configs, device=torch.device("meta"))
        sharding = {
            f"t{t}": row_wise(compute_kernel="fused") if row_cut
            else column_wise(ranks=ranks, compute_kernel="fused") if len(ranks) > 1
            else table_wise(rank=ranks[0], compute_kernel="fused")
            for t, ranks in ranks_of_table.items()
        }  # fmt: skip
        fused = {"optimizer": getattr(EmbOptimType, rule), "learning_rate": lr, "eps": 1e-10}  # torch's eps
        sharder = EmbeddingCollectionSharder(fused_params=fused)
        plan = construct_module_sharding_plan(
            collection, sharding, sharder=sharder, local_size=world_size, world_size=world_size, device_type=device.type
        )
        env = ShardingEnv.from_process_group(distributed.group.WORLD)
        self._module = sharder.shard(collection, plan, env, device)
        self.placements = {
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
        self.weights: dict[int, Tensor] = {}
        self.states: dict[int, Tensor] = {}
        self._kernels = []
        for kernel in [
            m for lookup in self._module._lookups for m in lookup.modules() if isinstance(m, BaseBatchedEmbedding)
        ]:
            self._kernels.append(kernel.emb_module)
            states = kernel.emb_module.split_optimizer_states()
            weights = kernel.emb_module.split_embedding_weights()
            for i, table in enumerate(kernel.config.embedding_tables):
                t, weight = int(table.name[1:]), weights[i].detach()
                self.weights[t] = weight.zero_()
                if keeps_state:
                    self.states[t] = states[i][0].detach().view(weight.shape).zero_()
        for t in ranks_of_table:  # empty pieces of tables that other ranks hold
            self.weights.setdefault(t, torch.zeros(0, width, device=device))
            if keeps_state:
                self.states.setdefault(t, torch.zeros(0, width, device=device))

    def look_up(self, codes: list[I64[Tensor, "_"]]) -> Mapping[str, JaggedTensor]:
        """Request the rows of each table's codes by name "t<table>"; the first access waits for them."""
        wanted = {f"t{t}": codes[t] for t in self.weights}
        lengths = torch.tensor([len(c) for c in wanted.values()], device=self.device)
        rows: Mapping[str, JaggedTensor] = self._module(
            KeyedJaggedTensor(keys=list(wanted), values=torch.cat(list(wanted.values())), lengths=lengths)
        )
        return rows

    def set_learning_rate(self, lr: float) -> None:
        """Set the learning rate of the update rule."""
        for kernel in self._kernels:
            kernel.set_learning_rate(lr)


def _no_init(weight: F32[Tensor, "rows width"]) -> None:
    """Replace TorchRec's initialization by none."""
