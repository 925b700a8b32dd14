"""Baselines that read the magnitudes of rewards, in float64; an infinity is refused.

What the papers leave open and is our reading: NaN leaves the group, and a group that is constant is exactly 0.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from gopo_lightning.objectives.advantages.groups import (
    STD_EPSILON,
    centred,
    check_groups,
    is_constant,
    magnitudes,
    scaled,
    std,
    valid,
)

_ROUNDING = 1e-9
"""0.1 · 30 is 3 and a little in floating point, and its ceiling is not to be 4."""


def grpo(rewards_PG: Tensor) -> Tensor:
    """A_i = (r_i - mean) / (std + 1e-4) within the group, unbiased std (GRPO, arXiv 2402.03300, sec. 4.1)."""
    return standardised(rewards_PG).float()


def standardised(rewards_PG: Tensor) -> Tensor:
    """``grpo`` in float64."""
    centred_PG, valid_PG = centred(rewards_PG)
    return centred_PG / std(centred_PG, valid_PG)


def dr_grpo(rewards_PG: Tensor) -> Tensor:
    """A_i = r_i - mean of the group (Dr. GRPO, arXiv 2503.20783, sec. 3.2)."""
    return centred(rewards_PG)[0].float()


def rloo(rewards_PG: Tensor) -> Tensor:
    """A_i = r_i - mean of the others of the group (RLOO, arXiv 2402.14740, eq. 9)."""
    rewards_PG, valid_PG, num_valid_P1 = magnitudes(rewards_PG)
    margin_PG = num_valid_P1 * rewards_PG - rewards_PG.sum(-1, keepdim=True)
    return scaled(torch.where(is_constant(rewards_PG, valid_PG), 0.0, margin_PG), num_valid_P1 - 1, valid_PG)


def qae(rewards_PG: Tensor, *, quantile: float = 0.4, normalise: bool = True) -> Tensor:
    """A_i = (r_i − Q_K) / (std + 1e-4), Q_K the K-quantile of the group (Quantile Advantage Estimation, 2509.22611).

    The paper's: a quantile in place of the mean as the baseline, and for binary rewards with success rate p the two
    regimes Q_K = 0 for p ≤ 1 − K and Q_K = 1 above. Our reading: hence Q_K is the lower quantile, the smallest reward r
    of the group with #{j: r_j ≤ r} ≥ K · G_valid, without interpolation; the scale stays GRPO's (unbiased std). A group
    does not sum to 0, but for K = ½ as many are above as below.

    Args:
        rewards_PG: finite, or NaN.
        quantile: K, between 0 and 1.
        normalise: false leaves the division out.
    """
    if not 0 < quantile < 1:
        raise ValueError(f"quantile={quantile}: it must be between 0 and 1. Use 0.4, or 0.5 for the median.")
    deviation_PG, valid_PG = centred(rewards_PG)
    sorted_PG = torch.where(valid_PG, deviation_PG, torch.inf).sort(-1).values
    rank_P1 = (quantile * valid_PG.sum(-1, keepdim=True).double() - _ROUNDING).ceil().long().clamp(min=1)
    above_PG = torch.where(valid_PG, deviation_PG - sorted_PG.gather(-1, rank_P1 - 1), 0.0)
    return (above_PG / std(deviation_PG, valid_PG) if normalise else above_PG).float()


def maxrl(rewards_PG: Tensor) -> Tensor:
    """A_i = (r_i − mean) / mean of the group (Maximum Likelihood Reinforcement Learning, arXiv 2602.02710).

    The paper's, for rewards 0 and 1: a group without success gives no gradient. Our reading: rewards may be any numbers
    from 0 on; a mean of 0 means that all are 0, and such a group is 0. (The authors' code adds 1e-6 to the mean.)

    Raises:
        ValueError: a negative or an infinite reward.
    """
    if bool((rewards_PG < 0).any()):
        row = int((rewards_PG < 0).any(-1).nonzero()[0])
        lowest = rewards_PG[row].nan_to_num(0.0).min().item()
        raise ValueError(
            f"the rewards of prompt {row} of the batch go down to {lowest}; maxrl divides by their mean and reads them "
            "as rates of success, from 0 on. Use a reward between 0 and 1, or an advantage that takes any number, such "
            "as ordinal or dr_grpo."
        )
    deviation_PG, valid_PG = centred(rewards_PG)
    mean_P1 = torch.where(valid_PG, rewards_PG.double(), 0.0).sum(-1, keepdim=True) / valid_PG.sum(-1, keepdim=True)
    return torch.where(deviation_PG == 0, 0.0, deviation_PG / mean_P1).float()


def batch(rewards_PG: Tensor, *, all_reduce: Callable[[Tensor], Tensor] = lambda moments: moments) -> Tensor:
    """A_i = (r_i - group mean) / (std of all rewards of the step + 1e-4), unbiased std.

    The baseline and the scale of REINFORCE++-baseline (arXiv 2501.03262) and Lite PPO (arXiv 2508.08221).

    Args:
        rewards_PG: the rewards of this rank.
        all_reduce: the sum of a float64 tensor over the ranks; called exactly twice on every rank, whatever
            the rewards. The default is one process.

    Raises:
        ValueError: an infinite reward, of any rank: on all ranks.
    """
    check_groups(rewards_PG)
    valid_PG = valid(rewards_PG)
    rewards_PG = torch.where(valid_PG, rewards_PG.double(), 0.0)
    count, total = all_reduce(torch.stack([valid_PG.sum().double(), rewards_PG.sum()]))
    deviations_PG = torch.where(valid_PG, rewards_PG - total / count.clamp(min=1), 0.0)
    variance = all_reduce((deviations_PG**2).sum()) / (count - 1).clamp(min=1)
    centred_PG, _ = centred(torch.where(valid_PG, rewards_PG, torch.nan))  # raises, now that nobody waits for this rank
    if not bool(total.isfinite()):
        raise ValueError("the rewards of another rank hold an infinity, which has no magnitude to average.")
    return (centred_PG / (variance.sqrt() + STD_EPSILON)).float()
