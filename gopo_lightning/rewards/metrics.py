"""Pure: what is worth knowing about a rollout. Every tag is defined in docs/metrics.md."""

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from gopo_lightning.objectives.advantages import preferences


def _mean(values: Tensor) -> Tensor:
    """Mean of the values that are numbers; NaN if there is none."""
    return values[~values.isnan()].double().mean()


def _std(values: Tensor) -> Tensor:
    """Unbiased standard deviation of the values that are numbers; NaN for fewer than two."""
    kept = values[~values.isnan()].double()
    return kept.std() if kept.numel() > 1 else kept.new_tensor(float("nan"))


def pair_ties(rewards_PG: Tensor) -> tuple[Tensor, Tensor]:
    """``(tied_P, pairs_P)``: a group's pairs of valid completions with equal rewards, and all its valid pairs."""
    valid_PG = ~rewards_PG.isnan()
    pair_PGG = valid_PG[:, :, None] & valid_PG[:, None, :]
    pair_PGG &= torch.ones_like(pair_PGG[0]).triu(1)
    tied_PGG = pair_PGG & (rewards_PG[:, :, None] == rewards_PG[:, None, :])
    return tied_PGG.sum((1, 2)), pair_PGG.sum((1, 2))


def reward_metrics(rewards_PGK: Tensor, rewards_PG: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """Spread, ties and gaps of one rollout's rewards, over the groups of all ranks."""
    tied_P, pairs_P = pair_ties(rewards_PG)
    spread_P = torch.stack([_std(rewards_G) for rewards_G in rewards_PG])
    metrics = {
        "reward/mean": _mean(rewards_PG),
        "reward/std": _std(rewards_PG),
        "reward/within_group_std": _mean(spread_P),
        "reward/tied_pair_fraction": tied_P.sum() / pairs_P.sum().clamp(min=1),
        "reward/all_tied_group_fraction": ((tied_P == pairs_P) & (pairs_P > 0)).float().mean(),
        "reward/nan_fraction": rewards_PG.isnan().float().mean(),
    }
    for k, name in enumerate(names):
        metrics[f"reward/{name}/mean"] = _mean(rewards_PGK[..., k])
        metrics[f"reward/{name}/std"] = _std(rewards_PGK[..., k])
    if len(names) > 1:
        metrics["reward/rescued_groups"] = rescued_groups(rewards_PGK[..., 0], rewards_PG)
    for (k, first), (m, second) in combinations(enumerate(names), 2):
        correlation_P = rank_correlation(rewards_PGK[..., k], rewards_PGK[..., m])
        metrics[f"reward/rank_correlation/{first}-{second}"] = _mean(correlation_P)
    return metrics


def rescued_groups(first_PG: Tensor, rewards_PG: Tensor) -> Tensor:
    """Share of groups that tie whole by the first source and not by the combined reward: others gave them an order."""
    (first_P, pairs_P), (tied_P, all_P) = pair_ties(first_PG), pair_ties(rewards_PG)
    return ((first_P == pairs_P) & (pairs_P > 0) & (tied_P < all_P)).float().mean()


def rank_correlation(first_PG: Tensor, second_PG: Tensor) -> Tensor:
    """Kendall's tau-b of two sources within each group, over the completions that both have scored.

    sum of sign(a_i - a_j) sign(b_i - b_j) over pairs / sqrt(pairs untied in a * pairs untied in b): 1 for the same
    order, -1 for the opposite one. NaN where either source ties all of them.
    """
    both_PG = ~(first_PG.isnan() | second_PG.isnan())
    pair_PGG = both_PG[:, :, None] & both_PG[:, None, :]
    order = [
        ((x[:, :, None] > x[:, None, :]).double() - (x[:, :, None] < x[:, None, :]).double()) * pair_PGG
        for x in (first_PG, second_PG)
    ]
    agreement_P = (order[0] * order[1]).sum((1, 2))
    return agreement_P / (order[0].abs().sum((1, 2)) * order[1].abs().sum((1, 2))).sqrt()


def wins_metrics(wins_PGG: Tensor, name: str) -> dict[str, Tensor]:
    """What the comparison matrices of one source say about the source itself.

    Args:
        wins_PGG: W_ij, how surely i beats j when i is shown first; NaN where it was not asked so.
        name: of the source.
    """
    preferred_PGG = preferences(wins_PGG)
    asked_PGG = ~preferred_PGG.isnan()
    beats_PGG, compared_PGG = (preferred_PGG > 0.5).double(), asked_PGG.double()
    cycles, triads = (torch.einsum("pij,pjk,pki->", x, x, x) for x in (beats_PGG, compared_PGG))
    first_PGG = wins_PGG + wins_PGG.mT - 1  # a number where both orders were asked; the diagonal is not asked
    return {
        f"reward/{name}/tie_fraction": (preferred_PGG == 0.5).sum() / asked_PGG.sum().clamp(min=1),
        f"reward/{name}/cyclic_triad_fraction": 2 * cycles / triads.clamp(min=1),
        f"reward/{name}/compared_fraction": compared_PGG.sum() / max(wins_PGG.numel() - wins_PGG[:, 0].numel(), 1),
        f"reward/{name}/first_bias": _mean(first_PGG[asked_PGG]),
    }


def completion_metrics(lengths_N: Tensor, truncated_N: Tensor) -> dict[str, Tensor]:
    """Lengths in tokens, EOS included, and how many completions hit the limit."""
    lengths_N = lengths_N.float()
    return {
        "completion/length_mean": lengths_N.mean(),
        "completion/length_min": lengths_N.min(),
        "completion/length_max": lengths_N.max(),
        "completion/truncated_fraction": truncated_N.float().mean(),
    }


def win_rate(rewards_PG: Tensor, reference_PG: Tensor) -> Tensor:
    """Share of (policy, reference) pairs of completions of one prompt that the policy's wins; ties count half.

    Args:
        rewards_PG: of the policy's completions.
        reference_PG: of the reference's completions of the same prompts; its G may differ.

    Returns:
        win_rate_P in [0, 1]; pairs with a NaN do not count, NaN where no pair is left.
    """
    policy, reference = rewards_PG[:, :, None], reference_PG[:, None, :]
    asked = ~(policy.isnan() | reference.isnan())
    wins = (policy > reference).float() + 0.5 * (policy == reference).float()
    return (wins * asked).sum((1, 2)) / asked.sum((1, 2))
