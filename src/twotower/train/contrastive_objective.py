"""The loss of a batch of positives against their candidates."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from twotower.arrays.types import Float, Ints, Shaped
from twotower.evaluation.factors import Factors
from twotower.train.candidate_versions import CandidateVersions
from twotower.train.contrastive import contrastive_loss
from twotower.train.losses.loss import ContrastiveLoss
from twotower.train.negatives.candidates import Candidates
from twotower.train.negatives.mixture import CandidateSampler
from twotower.train.objective import BatchLoss, Objective
from twotower.train.order import Epoch, Examples
from twotower.train.positive_sampler import PositiveSampler


class ContrastiveObjective(Objective[ContrastiveLoss]):
    """Batches of training positives, each against candidates from a mixture of sources, and their contrastive loss."""

    def make_sampler(self) -> PositiveSampler:
        """Return the source of the positives, and prepare that of their candidates."""
        config, negatives = self.recipe.train, self.recipe.negatives
        sampler = PositiveSampler(self.dataset, config.seed, config.shuffle, self.causal, config.data_shards)
        self.candidates = CandidateSampler(self.dataset, negatives, config.seed, self.device)
        self.parts |= self.candidates.samplers
        histories = self.dataset.schema.histories()
        self._histories_hold_dislikes = any(h.interactions != "positive" for h in histories)
        return sampler

    def begin_epoch(self, factors: Callable[[], Factors], epoch: int) -> None:
        """Prepare the sources of the candidates."""
        self.candidates.begin_epoch(factors, epoch)

    def __call__(self, epoch: Epoch, batch: int, step: int) -> BatchLoss:
        """Return the loss of a batch."""
        config, context = self.recipe, self.context
        whole, ends, own_part = self.examples(epoch, batch)
        own = whole[own_part]
        # A negative must not be in the positive's history; a causal history holds the earlier interactions.
        rows_in_time = whole.source if self.causal and self._histories_hold_dislikes else None
        of_weights = None if self.dataset.pairs.weight is None else whole.weight
        total_weight = len(whole) if of_weights is None else float(of_weights.sum(dtype=np.float64))
        weights = None if of_weights is None else torch.from_numpy(of_weights[own_part]).to(self.device)
        tally = self.tally if batch == self.tallied_batch else None
        drawn = self.candidates(
            whole.user, whole.item, step, rows_in_time, ends, own_part, of_weights, whole.source, tally is not None
        )
        if tally is not None:
            tally.begin(self.candidates.samplers)
        versions = self._versions(drawn, whole)
        every, shared = (drawn.items, drawn.shared) if versions is None else (versions.rows, versions.shared)
        part = context.partition(shared)
        sizes = context.partition_sizes(shared)
        rows = np.concatenate([every[part], every[shared:]])
        left_out = self._left_out(whole.source, drawn.interactions)
        # All ranks take part in every collective: a rank without a row embeds one, and drops it.
        embedded, embedded_items = own if len(own) else whole[:1], rows if len(rows) else every[:1]
        user_rows = self.dataset.input_rows("user", embedded.user, embedded.source)
        positives = self.batcher.contrastive_batch(user_rows, embedded.source, embedded_items, self.causal, left_out)
        users, items = self.vectors(positives.users, positives.items)
        n = part.stop - part.start

        def gather(local: Float[Tensor, "r d"]) -> Float[Tensor, "I d"]:
            """Return the vectors of `every` row, from those of this rank's `rows`."""
            if context.world_size == 1:
                return local
            return torch.cat([context.all_gather(local[:n], sizes), local[n : len(rows)]])

        items = gather(items)
        seen, positive = None, drawn.positive
        if versions is not None and versions.several:
            seen = versions.seen_at(self._times(own.source))
            positive = seen.find(positive[:, None])[:, 0]
        mimic_loss = torch.zeros((), device=self.device)
        if self.loss.mimic:
            user = torch.arange(len(embedded), device=users.device) if positives.user is None else positives.user
            mimic_loss = self.mimic_loss(
                positives.users,
                positives.items,
                users,
                items,
                user[: len(own)],
                positive,
                total_weight,
                gather,
                weights,
            )
        if positives.user is not None:
            users = users.index_select(0, positives.user)
        columns = items if drawn.memory_vectors is None else torch.cat([items, drawn.memory_vectors])
        dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        scored_alone = self._parts_of_loss
        loss = torch.stack([
            contrastive_loss(
                users[: len(own), columns_of_pair], columns[:, columns_of_pair], drawn, self.loss, len(self.dataset.items), dtype, total_weight,
                weights=weights, versions=seen, tally=tally,
            )
            for columns_of_pair in scored_alone
        ]).sum()  # fmt: skip
        if tally is not None:
            tally.end(min(len(own), tally.max_rows) * len(scored_alone), context)
        if config.negatives.remembered:
            latest = torch.from_numpy(whole.item.astype(np.int64)).to(self.device)
            vectors = items.index_select(0, drawn.batch_positive)
            remembered = None if of_weights is None else torch.from_numpy(of_weights).to(self.device)
            self.candidates.remember(latest, vectors, remembered)
        return BatchLoss(len(whole), loss, mimic_loss)

    @property
    def _parts_of_loss(self) -> list[slice]:
        """Columns of the vectors that make a score with a loss of its own: all, or those of each pair that is trained apart."""
        if self.recipe.train.pairs == "together":
            return [slice(None)]
        return self.model.parts_of_pairs(self.recipe.trained_pairs)

    def _versions(self, drawn: Candidates, whole: Examples) -> CandidateVersions | None:
        """Return the versions of the candidates that the batch sees; None if items have none."""
        versions = self.dataset.items.versions
        return None if versions is None else CandidateVersions(drawn, versions, self._times(whole.source), self.device)

    def _times(self, source: Shaped[Ints, "n"]) -> Shaped[Ints, "n"]:
        """Return the times of interactions, by index."""
        assert self.dataset.times is not None
        times: Ints = self.dataset.times[source]
        return times

    def _left_out(self, source: Shaped[Ints, "B"], drawn: Shaped[Ints, "n"]) -> Shaped[Ints, "m"]:
        """Return the interactions that no history of the batch may hold: the batch's, and those `drawn` as negatives."""
        # A rank without a row of the batch has drawn nothing, and leaves out what the others drew.
        drawn_apart = self.recipe.train.data_shards > 1 or len(source) < self.context.world_size
        if self.context.world_size > 1 and drawn_apart and self.candidates.gives_interactions:
            counts = self.context.all_gather_array(np.array([len(drawn)]), [1] * self.context.world_size)
            drawn = self.context.all_gather_array(drawn, [int(n) for n in counts])
        return np.concatenate([source, drawn]) if len(drawn) else source
