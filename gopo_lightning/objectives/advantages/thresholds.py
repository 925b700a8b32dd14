"""ODRPO: each reward as a row of successes, one for each threshold that it reaches."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gopo_lightning.objectives.advantages.groups import STD_EPSILON, check_groups, valid


def odrpo(
    rewards_PG: Tensor,
    *,
    thresholds: Sequence[float] | None = None,
    normalise: bool = True,
    repeats: bool = False,
    half_ties: bool = False,
) -> Tensor:
    """A_i = Σ_k A_ik, A_ik the advantage of the binary reward 1[r_i ≥ t_k] within the group (ODRPO, arXiv 2605.12667).

    The paper's: rewards of few levels, one indicator a level, an advantage of each by itself, their sum. Our reading:
    the advantage of an indicator is (b − mean) / (std + 1e-4) with the unbiased std, as in ``grpo``; a threshold that
    all reach, or none, gives 0; without ``thresholds`` the levels are the group's own distinct rewards.

    Only the order of rewards and thresholds is read, so ±inf are ordinary. Without the division, with one threshold for
    each valid completion (``repeats``) and ``half_ties``, A is (G_valid − 1) / 4 · ``ordinal``, ties included; without
    ties any of the three choices of indicator and repetition gives this. The division turns ranks into ranks that
    weigh the tails: rare successes and rare failures count more.

    Args:
        rewards_PG: any real dtype; NaN leaves the group and is 0.
        thresholds: t_k, the same for all prompts; a repeated one counts as often.
        normalise: false leaves the division by the standard deviation out.
        repeats: of the group's own rewards, a threshold for each valid completion; else for each distinct reward.
        half_ties: ½(1[r ≥ t] + 1[r > t]) as the indicator: a reward at the threshold is half a success.
    """
    check_groups(rewards_PG)
    valid_PG = valid(rewards_PG)
    if thresholds is None:
        t_PK, counts_PK = _levels(rewards_PG, valid_PG, repeats)
    else:
        t_PK, counts_PK = _given(thresholds, repeats, rewards_PG)
    reached_PGK = (rewards_PG[:, :, None] >= t_PK[:, None, :]).double()  # NaN reaches nothing
    if half_ties:
        reached_PGK = (reached_PGK + (rewards_PG[:, :, None] > t_PK[:, None, :])) / 2
    num_valid_P11 = valid_PG.sum(-1)[:, None, None]
    mean_P1K = reached_PGK.sum(1, keepdim=True) / num_valid_P11.clamp(min=1)
    centred_PGK = (reached_PGK - mean_P1K) * valid_PG[:, :, None]
    if normalise:
        variance_P1K = (centred_PGK**2).sum(1, keepdim=True) / (num_valid_P11 - 1).clamp(min=1)
        centred_PGK = centred_PGK / (variance_P1K.sqrt() + STD_EPSILON)
    return (centred_PGK * counts_PK[:, None, :]).sum(-1).float()


def _levels(rewards_PG: Tensor, valid_PG: Tensor, repeats: bool) -> tuple[Tensor, Tensor]:
    """The group's rewards as thresholds [P, G], and which of them count: those of valid completions, once or each."""
    if repeats:
        return rewards_PG, valid_PG
    earlier_GG = torch.ones(rewards_PG.shape[1], rewards_PG.shape[1], device=rewards_PG.device).tril(-1).bool()
    repeated_PG = ((rewards_PG[:, :, None] == rewards_PG[:, None, :]) & earlier_GG).any(-1)
    return rewards_PG, valid_PG & ~repeated_PG


def _given(thresholds: Sequence[float], repeats: bool, rewards_PG: Tensor) -> tuple[Tensor, Tensor]:
    """Thresholds [1, K] on the rewards' device, all of which count."""
    t_1K = torch.tensor([list(thresholds)], dtype=torch.float64, device=rewards_PG.device)
    if repeats or t_1K.numel() == 0 or bool(t_1K.isnan().any()):
        raise ValueError(
            f"thresholds={list(thresholds)}, repeats={repeats}: give at least one number and no NaN, and repeats only "
            "where the thresholds are the group's own rewards."
        )
    return t_1K, torch.ones_like(t_1K, dtype=torch.bool)
