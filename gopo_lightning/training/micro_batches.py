"""What is forwarded together: whole groups within a budget of tokens."""

from typing import NamedTuple

import torch
from torch import Tensor

from gopo_lightning.types import Rollout


class MicroBatch(NamedTuple):
    """Groups that are forwarded together."""

    groups_P: Tensor
    """int64 row numbers, on the CPU."""
    counts: bool = True
    """False: it only keeps this rank in step with the others, with weight 0 in loss, denominator and metrics."""


def minibatches(
    num_prompts: int, num_minibatches: int, generator: torch.Generator, rank: int = 0, world_size: int = 1
) -> list[Tensor]:
    """Row numbers of this rank's groups in each minibatch, which may be none.

    They are drawn over the prompts of all ranks, so that a step does not depend on how many ranks there are.

    >>> rows = [minibatches(2, 2, torch.Generator().manual_seed(1), rank, 2) for rank in (0, 1)]
    >>> [[part.tolist() for part in parts] for parts in rows]
    [[[], [1, 0]], [[0, 1], []]]

    Args:
        num_prompts: of this rank, whose prompt i is number i · W + r of the step (see ``PromptSampler``).
    """
    order = torch.randperm(num_prompts * world_size, generator=generator)
    parts = order.tensor_split(num_minibatches)
    return [part[part % world_size == rank] // world_size for part in parts]


def split_groups(rollout: Rollout, *, budget: int | None, shared: bool, active_P: Tensor | None = None) -> list[Tensor]:
    """Row numbers (int64, on the CPU) of the groups of each micro-batch, longest first; none without active groups.

    Args:
        budget: most tokens of one micro-batch, padding included; a larger group goes alone. None: no limit.
        shared: the prompt is forwarded once per group, and nothing is padded; not once per completion (G times the
            longest prompt and completion together).
        active_P: bool, groups to forward; the others are left out. All if None.
    """
    G = rollout.group_size
    prompt_P, completion_P = _lengths(rollout)
    tokens_P = prompt_P + rollout.completions.lengths_N.reshape(-1, G).sum(-1).cpu()
    order = _longest_first(rollout)
    chosen = [p for p in order if active_P is None or bool(active_P[p])]

    def cost(groups: list[int]) -> int:
        if shared:
            return int(tokens_P[groups].sum())
        return len(groups) * G * int((prompt_P + completion_P)[groups].max())

    batches: list[list[int]] = []
    for group in chosen:
        if batches and (budget is None or cost([*batches[-1], group]) <= budget):
            batches[-1].append(group)
        else:
            batches.append([group])
    return [torch.tensor(groups) for groups in batches]


def fill_up(rollout: Rollout, batches: list[Tensor], number: int) -> list[MicroBatch]:
    """``number`` micro-batches, the most that a rank has: every rank makes as many forwards, backwards and collectives.

    The largest are halved; when all are single groups, the shortest group of ``rollout`` fills up, with weight 0.
    """
    batches = list(batches)
    while len(batches) < number and max(map(len, batches), default=0) > 1:
        place = max(range(len(batches)), key=lambda i: len(batches[i]))
        half = len(batches[place]) // 2
        batches.append(batches[place][half:])
        batches[place] = batches[place][:half]
    filler = MicroBatch(torch.tensor(_longest_first(rollout)[-1:]), counts=False)
    return [*map(MicroBatch, batches), *[filler] * (number - len(batches))]


def _lengths(rollout: Rollout) -> tuple[Tensor, Tensor]:
    """Tokens of each group's prompt, and of its longest completion; int64 [P] each, on the CPU."""
    completions_PG = rollout.completions.lengths_N.reshape(-1, rollout.group_size)
    return rollout.prompts.mask_PL.sum(-1).cpu(), completions_PG.amax(-1).cpu()


def _longest_first(rollout: Rollout) -> list[int]:
    prompt_P, completion_P = _lengths(rollout)
    return sorted(range(len(rollout)), key=lambda p: (-int(completion_P[p]), -int(prompt_P[p]), p))


def forwarded_tokens(rollout: Rollout, shared: bool) -> tuple[int, int]:
    """``(real, all)`` tokens of one micro-batch's forward; the difference is padding. ``shared`` as above."""
    P, N = len(rollout), len(rollout.completions)
    prompt = int(rollout.prompts.mask_PL.sum())
    completion = int(rollout.completions.lengths_N.sum())
    if shared:
        return prompt + completion, prompt + completion
    group_lengths_P = rollout.prompts.mask_PL.sum(-1) + rollout.completions.lengths_N.view(P, -1).amax(-1)
    return N // P * prompt + completion, N * int(group_lengths_P.max())
