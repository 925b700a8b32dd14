"""What is computed together: whole groups within a budget of tokens, and rows of logits that fit a cache."""

from collections.abc import Iterator

import torch
from torch import Tensor

from gopo_lightning.structs import Experience


def split_groups(
    experience: Experience,
    *,
    budget: int | None,
    shared: bool,
    active_P: Tensor | None = None,
    at_least: int = 1,
) -> list[Tensor]:
    """Row numbers of the groups of each micro-batch, longest first.

    Args:
        budget: most tokens of one micro-batch, padding included; a larger group goes alone. None: no limit.
        shared: the prompt is forwarded once per group (L + G·T tokens), not once per completion (G times the longest
            prompt and completion together).
        active_P: bool, groups to forward; the others are left out. All if None.
        at_least: number of micro-batches wanted, so that every rank runs as many: large ones are split, then inactive
            groups fill up (their gradient is zero). At most P.

    Returns:
        At least one micro-batch, each an int64 tensor on the CPU.
    """
    G = experience.group_size
    prompt_P = experience.prompts.mask_PL.sum(-1).cpu()
    completion_P = experience.completions.lengths_N.reshape(-1, G).amax(-1).cpu()
    order = sorted(range(len(experience)), key=lambda p: (-int(completion_P[p]), -int(prompt_P[p]), p))
    chosen = [p for p in order if active_P is None or bool(active_P[p])]
    idle = [p for p in order if p not in set(chosen)]

    def cost(groups: list[int]) -> int:
        if shared:
            return len(groups) * int(prompt_P[groups].max() + G * completion_P[groups].max())
        return len(groups) * G * int((prompt_P + completion_P)[groups].max())

    batches: list[list[int]] = []
    for group in chosen:
        if batches and (budget is None or cost([*batches[-1], group]) <= budget):
            batches[-1].append(group)
        else:
            batches.append([group])
    while len(batches) < at_least:
        largest = max(batches, key=len, default=[])
        if len(largest) > 1:
            half = len(largest) // 2
            batches.append(largest[half:])
            del largest[half:]
        else:
            batches.append([idle.pop()])
    return [torch.tensor(groups) for groups in batches]


def forwarded_tokens(experience: Experience, shared: bool) -> tuple[int, int]:
    """``(real, all)`` tokens of one micro-batch's forward; the difference is padding. ``shared`` as above."""
    P, L = experience.prompts.tokens_PL.shape
    N, T = experience.completions.tokens_NT.shape
    prompt = int(experience.prompts.mask_PL.sum())
    completion = int(experience.completions.lengths_N.sum())
    if shared:
        return prompt + completion, P * L + N * T
    group_lengths_P = experience.prompts.mask_PL.sum(-1) + experience.completions.lengths_N.view(P, -1).amax(-1)
    return N // P * prompt + completion, N * int(group_lengths_P.max())


_BLOCK = 2**19
"""Logits of a block on CPU: 2 MiB in float32. Other devices take all rows at once."""


def row_blocks(logits_NV: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows of the arguments, block by block, small enough that several passes over one read a CPU core's cache."""
    N, V = logits_NV.shape
    rows = max(_BLOCK // V, 1) if logits_NV.device.type == "cpu" else max(N, 1)
    return zip(logits_NV.split(rows), *(other.split(rows) for other in others), strict=True)
