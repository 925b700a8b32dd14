"""What all advantages share: which completions of a group are valid, and how groups are checked, centred and scaled."""

import torch
from torch import Tensor

STD_EPSILON = 1e-4
"""Added to every standard deviation, as in the authors' code of GOPO."""


def valid(rewards_PG: Tensor) -> Tensor:
    """bool [P, G]: the completions that enter the loss, i.e. those with a score."""
    return ~torch.isnan(rewards_PG)


def check_groups(rewards_PG: Tensor) -> None:
    """ValueError unless they are [P, G] with G ≥ 2."""
    if rewards_PG.dim() != 2:
        raise ValueError(f"rewards have shape {tuple(rewards_PG.shape)}; they must be [prompts, completions].")
    if rewards_PG.shape[1] < 2:
        raise ValueError(
            f"a group has {rewards_PG.shape[1]} completion(s); an advantage compares completions of one "
            "prompt, so it needs at least 2. Raise the number of completions per prompt."
        )


def magnitudes(rewards_PG: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """float64 rewards with NaN as 0, ``valid_PG``, and the number of valid ones per group [P, 1]."""
    check_groups(rewards_PG)
    if bool(torch.isinf(rewards_PG).any()):
        row = int(torch.isinf(rewards_PG).any(-1).nonzero()[0])
        raise ValueError(
            f"the rewards of prompt {row} of the batch hold an infinity, which has no magnitude to average. "
            "Use the ordinal advantage, clip the reward, or return NaN for 'no valid score'."
        )
    valid_PG = valid(rewards_PG)
    return torch.where(valid_PG, rewards_PG.double(), 0.0), valid_PG, valid_PG.sum(-1, keepdim=True)


def is_constant(rewards_PG: Tensor, valid_PG: Tensor) -> Tensor:
    """bool [P, 1]: all valid rewards of the group are equal, or none is valid."""
    lowest_P1 = torch.where(valid_PG, rewards_PG, torch.inf).amin(-1, keepdim=True)
    highest_P1 = torch.where(valid_PG, rewards_PG, -torch.inf).amax(-1, keepdim=True)
    return lowest_P1 >= highest_P1


def centred(rewards_PG: Tensor) -> tuple[Tensor, Tensor]:
    """float64 r_i − mean of the group, exactly 0 where the group is constant and where there is no score."""
    rewards_PG, valid_PG, num_valid_P1 = magnitudes(rewards_PG)
    mean_P1 = rewards_PG.sum(-1, keepdim=True) / num_valid_P1.clamp(min=1)
    kept_PG = valid_PG & ~is_constant(rewards_PG, valid_PG)
    return torch.where(kept_PG, rewards_PG - mean_P1, 0.0), valid_PG


def scaled(numerator_PG: Tensor, denominator: Tensor, valid_PG: Tensor) -> Tensor:
    """float32 numerator / denominator on valid entries, 0 elsewhere and where nothing was compared."""
    ratio_PG = numerator_PG.double() / denominator.clamp(min=1)
    return torch.where(valid_PG & (denominator > 0), ratio_PG, 0.0).float()


def std(centred_PG: Tensor, valid_PG: Tensor) -> Tensor:
    """float64 unbiased standard deviation of each group, + 1e-4 [P, 1]."""
    variance_P1 = (centred_PG**2).sum(-1, keepdim=True) / (valid_PG.sum(-1, keepdim=True) - 1).clamp(min=1)
    return variance_P1.sqrt() + STD_EPSILON
