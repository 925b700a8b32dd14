"""Groups without a signal give way to groups of further prompts: DAPO's dynamic sampling (arXiv 2503.14476, eq. 11).

Differs from the paper: only as many prompts are sampled again as groups are without a signal (the authors sample whole
batches and drop what is over), rounds are bounded, and what is left after the last one is trained on as it is.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from gopo_lightning.distributed.collectives import all_or_none, all_reduce_sum, gather_objects, rank, world_size
from gopo_lightning.objectives.advantages import preferences
from gopo_lightning.rollout.collector import Actor, Collector
from gopo_lightning.rollout.joining import joined
from gopo_lightning.types import PromptBatch, Rollout


@runtime_checkable
class HasFurtherPrompts(Protocol):
    """A data module of which a step may read more prompts than its own."""

    @property
    def can_read_further(self) -> bool:
        """Whether it can at all."""
        ...

    def further_prompts(self, count: int) -> list[int]:
        """Rows of up to ``count`` more prompts for this step, over all ranks and the same on each."""
        ...

    def training_prompts(self, rows: Sequence[int]) -> PromptBatch:
        """The prompts of ``rows``."""
        ...


class Refilled(NamedTuple):
    """What the refilling of a rollout took."""

    tokens: Tensor
    """Completion tokens that were sampled and are not in the rollout, over all ranks."""
    metrics: dict[str, Tensor]


class Refill:
    """Samples further prompts for groups without a signal.

    The prompts of a step are numbered over all ranks, and the next prompts of the order go to those without a signal,
    by their number; so which ones they get does not depend on how many ranks there are. A group stays on its rank. A
    rank that needs none in a round samples its first prompt once more, in step with the others, and drops it: its
    completions are the same, which judges with a cache know.

    Args:
        collector: samples and scores.
        rounds: most rounds; 0 for no refilling.
        from_wins: whether the comparisons of the only source are what is ranked, and not the rewards.
    """

    def __init__(self, collector: Collector, rounds: int, *, from_wins: bool) -> None:
        self.collector, self.rounds, self.from_wins = collector, rounds, from_wins

    def __call__(
        self, rollout: Rollout, actor: Actor, source: HasFurtherPrompts, *, step: int
    ) -> tuple[Rollout, Refilled]:
        """``rollout`` with groups of prompts of ``source`` for those without a signal, as far as any is found.

        A collective.
        """
        tokens = torch.zeros((), dtype=torch.int64, device=rollout.completions.mask_NT.device)
        if not self.rounds:
            return rollout, Refilled(tokens, {})
        kept, missing = rollout, self._missing(rollout)
        num_missing, num_rounds, num_prompts = len(missing), 0, 0
        while missing and num_rounds < self.rounds and (rows := source.further_prompts(len(missing))):
            ours = [
                (i // world_size(), row) for i, row in zip(missing, rows, strict=False) if i % world_size() == rank()
            ]
            found = self._found(kept, [row for _, row in ours], actor, source, step)
            if ours:
                tokens = tokens + found.completions.lengths_N.sum()
                alive_n = has_signal(found, from_wins=self.from_wins)
                kept = _replaced(kept, torch.tensor([place for place, _ in ours]), found, alive_n)
            missing, num_rounds, num_prompts = self._missing(kept), num_rounds + 1, num_prompts + len(rows)
        tokens = tokens + rollout.completions.lengths_N.sum() - kept.completions.lengths_N.sum()
        metrics = {
            "rollout/refilled_groups": (num_missing - len(missing)) / (len(rollout) * world_size()),
            "rollout/further_prompts": num_prompts,
            "rollout/refill_rounds": num_rounds,
        }
        return kept, Refilled(all_reduce_sum(tokens), {name: torch.tensor(float(x)) for name, x in metrics.items()})

    def _found(self, rollout: Rollout, rows: list[int], actor: Actor, source: HasFurtherPrompts, step: int) -> Rollout:
        """Groups of the prompts of ``rows``; of the first prompt of ``rollout`` where there are none."""
        with all_or_none("reading further prompts"):
            first = rollout.prompts.select(torch.tensor([0]))
            prompts = source.training_prompts(rows).to(actor.device) if rows else first
        return self.collector.collect(actor, prompts, rollout.group_size, step=step)

    def _missing(self, rollout: Rollout) -> list[int]:
        """Numbers of the prompts without a signal, over all ranks: prompt i of rank r is i · W + r."""
        alive = gather_objects(has_signal(rollout, from_wins=self.from_wins).tolist())
        return sorted(
            i * len(alive) + r for r, part in enumerate(alive) for i, is_alive in enumerate(part) if not is_alive
        )


def has_signal(rollout: Rollout, *, from_wins: bool) -> Tensor:
    """bool [P] on the CPU: two valid rewards of the group differ; or ``from_wins``, some preference is not ½."""
    if from_wins:
        assert rollout.wins_PGGK is not None
        preferences_PGG = preferences(rollout.wins_PGGK[..., 0]).cpu()
        return ((preferences_PGG != 0.5) & ~preferences_PGG.isnan()).flatten(1).any(-1)
    rewards_PG = rollout.rewards_PG.cpu()
    valid_PG = ~rewards_PG.isnan()
    highest_P = rewards_PG.masked_fill(~valid_PG, -torch.inf).amax(-1)
    lowest_P = rewards_PG.masked_fill(~valid_PG, torch.inf).amin(-1)
    return valid_PG.any(-1) & (highest_P != lowest_P)


def _replaced(rollout: Rollout, places_n: Tensor, found: Rollout, alive_n: Tensor) -> Rollout:
    """``rollout`` with the groups of ``found`` that are alive at their places."""
    index_P = torch.arange(len(rollout))
    index_P[places_n[alive_n]] = len(rollout) + alive_n.nonzero()[:, 0]
    return joined(rollout, found).select(index_P)
