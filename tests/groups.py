"""Groups with log-probs, for objectives of whole completions."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gopo_lightning.objectives import Loss, Objective
from gopo_lightning.types import Experience
from tests.rollouts import experience_of


def padded(rows: Sequence[Sequence[float]]) -> Tensor:
    """float64 [N, T] of ragged rows."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=torch.float64) for row in rows], batch_first=True)


CURRENT = padded([[-0.5, -1.0, -0.3], [-0.9, -0.4], [-1.2, -0.7, -0.6], [-0.8]])
OLD = padded([[-0.6, -1.1, -0.3], [-0.8, -0.4], [-1.0, -0.7, -0.6], [-1.0]])
REFERENCE = padded([[-0.7, -1.2, -0.4], [-0.7, -0.4], [-0.9, -0.7, -0.6], [-1.1]])
REWARDS = [2.0, 1.0, 0.0, 1.5]


def group(rewards: Sequence[float] = REWARDS, **fields: Any) -> Experience:
    """One group of four completions of 3, 2, 3 and 1 tokens; log-ratios are .5, −.2, −.3, .3 to the reference and
    .2, −.1, −.2, .2 to the old policy, if the current log-probs are ``CURRENT``."""
    experience = experience_of([rewards], [3, 2, 3, 1], old_logprobs_NT=OLD, reference_logprobs_NT=REFERENCE)
    return replace(with_own_tokens(experience), **fields)


def with_own_tokens(experience: Experience) -> Experience:
    """No two completions have the same tokens."""
    completions = experience.completions
    tokens_NT = completions.mask_NT * torch.arange(1, len(completions) + 1)[:, None]
    return replace(experience, completions=replace(completions, tokens_NT=tokens_NT))


def random_groups(seed: int, num_prompts: int = 3, size: int = 5, *, ties: bool = True) -> tuple[Tensor, Experience]:
    """float64 logprobs_NT, and groups of completions of 1 to 7 tokens with rewards, anchors and draws."""
    generator = torch.Generator().manual_seed(seed)
    N = num_prompts * size
    lengths = torch.randint(1, 8, (N,), generator=generator)
    lengths[0] = 7

    def normal(scale: float) -> Tensor:
        return scale * torch.randn(N, 7, generator=generator, dtype=torch.float64)

    logprobs_NT = normal(1.0) - 2
    rewards_PG = torch.randn(num_prompts, size, generator=generator, dtype=torch.float64)
    if ties:
        rewards_PG = (rewards_PG * 2).round()
    experience = experience_of(
        rewards_PG.tolist(),
        lengths.tolist(),
        old_logprobs_NT=logprobs_NT + normal(0.1),
        reference_logprobs_NT=logprobs_NT + normal(0.2),
        iterate_logprobs_NT=logprobs_NT + normal(0.15),
    )
    draws_PGG = torch.rand(num_prompts, size, size, generator=generator, dtype=torch.float64)
    return logprobs_NT, replace(with_own_tokens(experience), draws_PGG=draws_PGG)


def loss_of(objective: Objective, experience: Experience, logprobs_NT: Tensor = CURRENT, total: Any = None) -> Loss:
    """Of all groups at once, or the part of a minibatch whose denominator is ``total``."""
    mask_NT = objective.mask(experience)
    total = objective.denominator(experience, mask_NT) if total is None else total
    return objective(logprobs_NT, experience, mask_NT, total)


def value(objective: Objective, experience: Experience, logprobs_NT: Tensor = CURRENT) -> float:
    return loss_of(objective, experience, logprobs_NT).value.item()


def descent(objective: Objective, experience: Experience, logprobs_NT: Tensor = CURRENT) -> Tensor:
    """−∂loss/∂(log-prob of a completion) [P, G]; that of its last token, which every objective counts in full."""
    leaf_NT = logprobs_NT.clone().requires_grad_()
    loss_of(objective, experience, leaf_NT).value.backward()
    assert leaf_NT.grad is not None
    last_N1 = experience.completions.lengths_N[:, None] - 1
    return -leaf_NT.grad.gather(-1, last_N1).view_as(experience.rewards_PG)


def permuted(experience: Experience, order: Tensor) -> tuple[Tensor, Experience]:
    """Row numbers, and the experience with the completions of each group in another order."""
    P, G = experience.rewards_PG.shape
    rows_N = (torch.arange(P)[:, None] * G + order).flatten()
    fields: dict[str, Any] = {
        name: getattr(experience, name)[rows_N]
        for name in ("old_logprobs_NT", "reference_logprobs_NT", "iterate_logprobs_NT")
        if getattr(experience, name) is not None
    }
    for name in ("rewards_PG", "rewards_PGK", "weights_PG", "advantages_PG"):
        if getattr(experience, name) is not None:
            fields[name] = getattr(experience, name)[:, order]
    for name in ("preferences_PGG", "draws_PGG"):
        if getattr(experience, name) is not None:
            fields[name] = getattr(experience, name)[:, order][:, :, order]
    return rows_N, replace(experience, completions=experience.completions.select(rows_N), **fields)
