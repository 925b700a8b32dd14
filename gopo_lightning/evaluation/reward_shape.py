"""What the rewards of sampled groups look like, and what that means for ranks. Pure; shape legend: `types.py`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from gopo_lightning.evaluation.intervals import Interval, student
from gopo_lightning.objectives.advantages import grpo, ordinal
from gopo_lightning.rewards.metrics import pair_ties, rank_correlation

OUTLIER_MADS = 4.0
"""A reward so many (normal-consistent) median absolute deviations from its group's median is an outlier: of normal
rewards about 4 % are at G = 8, for the median of few is uncertain itself."""
_NORMAL_CONSISTENT = 1.4826


@dataclass(frozen=True)
class Shape:
    """Of rewards_PG within the groups."""

    mean: float
    within_group_std: float
    between_group_std: float
    """Of the groups' means."""
    skewness: float
    """Mean cube of the rewards that were centred and scaled in their group. 0: symmetric; above: few very good ones."""
    excess_kurtosis: float
    """Mean fourth power of these, less what normal rewards give at this G. Above 0: heavier tails."""
    outlier_fraction: float
    """Of the completions, see `OUTLIER_MADS`."""
    tied_pair_fraction: float
    all_tied_group_fraction: float
    nan_fraction: float
    infinite_fraction: float
    distinct_values: int


def shape_of(rewards_PG: Tensor) -> Shape:
    """Moments, outliers and ties.

    Args:
        rewards_PG: float64; NaN: no valid score. ±∞ counts for ties, not for moments.
    """
    finite_PG = torch.where(rewards_PG.isfinite(), rewards_PG, torch.nan)
    z_PG = standardised(finite_PG)
    z = z_PG[~z_PG.isnan()]
    mad_P1 = (finite_PG - _median(finite_PG)).abs().nanmedian(-1, keepdim=True).values * _NORMAL_CONSISTENT
    far_PG = (finite_PG - _median(finite_PG)).abs() > OUTLIER_MADS * mad_P1
    spread_P = _std(finite_PG)
    tied_P, pairs_P = pair_ties(rewards_PG)
    valid = rewards_PG[~rewards_PG.isnan()]
    return Shape(
        mean=float(finite_PG.nanmean()),
        within_group_std=float(spread_P.nanmean()),
        between_group_std=float(_std(finite_PG.nanmean(-1)[None])[0]),
        skewness=float((z**3).mean()),
        excess_kurtosis=float((z**4).mean()) - normal_kurtosis(rewards_PG.shape[1]),
        outlier_fraction=float(far_PG[~finite_PG.isnan() & (mad_P1 > 0)].double().mean()),
        tied_pair_fraction=float(tied_P.sum() / pairs_P.sum().clamp(min=1)),
        all_tied_group_fraction=float(((tied_P == pairs_P) & (pairs_P > 0)).double().mean()),
        nan_fraction=float(rewards_PG.isnan().double().mean()),
        infinite_fraction=float(rewards_PG.isinf().double().mean()),
        distinct_values=len(valid.unique()),
    )


def standardised(rewards_PG: Tensor) -> Tensor:
    """Centred and divided by the standard deviation of the group (n, not n − 1); NaN where a group is constant."""
    centred_PG = rewards_PG - rewards_PG.nanmean(-1, keepdim=True)
    spread_P1 = (centred_PG**2).nanmean(-1, keepdim=True).sqrt()
    return torch.where(spread_P1 > 0, centred_PG / spread_P1, torch.nan)


def _median(rewards_PG: Tensor) -> Tensor:
    return rewards_PG.nanmedian(-1, keepdim=True).values


def _std(rewards_PG: Tensor) -> Tensor:
    """Unbiased, of the values of each row that are numbers; NaN for fewer than two."""
    n_P = (~rewards_PG.isnan()).sum(-1)
    squares_P = ((rewards_PG - rewards_PG.nanmean(-1, keepdim=True)) ** 2).nansum(-1)
    return torch.where(n_P > 1, (squares_P / (n_P - 1).clamp(min=1)).sqrt(), torch.nan)


# ------------------------------------------------------------------------------ directions


@dataclass(frozen=True)
class Likeness:
    """How alike two advantages are on the same groups."""

    cosine: float
    """Over all completions: what the two gradients share, were all completions' gradients orthogonal and as long."""
    within_groups: float
    """Mean of the cosines of single groups: blind to how groups are weighted against each other."""
    lowest_tenth: float
    """The tenth percentile of these."""


def likeness(first_PG: Tensor, second_PG: Tensor) -> Likeness | None:
    """Cosines of two advantages; None where either is 0 everywhere."""
    first_PG, second_PG = first_PG.double(), second_PG.double()
    if not bool(first_PG.any()) or not bool(second_PG.any()):
        return None
    both_P = first_PG.any(-1) & second_PG.any(-1)
    cosines_P = torch.nn.functional.cosine_similarity(first_PG[both_P], second_PG[both_P], dim=-1)
    whole = torch.nn.functional.cosine_similarity(first_PG.flatten(), second_PG.flatten(), dim=0)
    return Likeness(float(whole), float(cosines_P.mean()), float(cosines_P.quantile(0.1)))


def effective_fraction(advantages_PG: Tensor) -> float:
    """Groups that share the update as equals would, as a fraction of P: (Σ w)² / (P Σ w²) with w = |A|² of a group."""
    w_P = advantages_PG.double().square().sum(-1)
    return float(w_P.sum() ** 2 / (len(w_P) * w_P.square().sum())) if bool(w_P.any()) else 0.0


@cache
def normal_cosine(group_size: int) -> float:
    """Mean cosine of `ordinal` and `grpo` in groups of normal rewards, by 4000 draws: 0.955 at G = 8."""
    rewards_PG = _normal(group_size)
    found = likeness(ordinal(rewards_PG), grpo(rewards_PG))
    assert found is not None
    return found.within_groups


def normal_kurtosis(group_size: int) -> float:
    """Mean fourth power of standardised normal rewards in groups of this size; it comes near 3 for large groups only.

    Exactly 3 (G − 1) / (G + 1).
    """
    return 3 * (group_size - 1) / (group_size + 1)


def _normal(group_size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4000, group_size, generator=generator, dtype=torch.float64)


# ------------------------------------------------------------------------------ agreement


def mean_rank_correlation(first_PG: Tensor, second_PG: Tensor) -> Interval | None:
    """Kendall's τ-b within groups, its mean over groups and the interval of that; None where it is defined in none."""
    values_P = rank_correlation(first_PG, second_PG)
    kept = values_P[~values_P.isnan()].tolist()
    return student(kept, -1.0, 1.0) if kept else None


def agreement(rewards_PG: Tensor, preferred_PGG: Tensor) -> Interval | None:
    """Share of compared pairs that the reward orders as ``preferred_PGG`` does, its mean over groups.

    A tie of the reward counts half, pairs with a preference of exactly ½ do not count.

    Args:
        rewards_PG: NaN: no valid score.
        preferred_PGG: how surely i beats j, NaN where it was not asked.
    """
    invalid_PGG = rewards_PG.isnan()[:, :, None] | rewards_PG.isnan()[:, None, :]
    asked_PGG = ~(invalid_PGG | preferred_PGG.isnan()) & (preferred_PGG != 0.5)
    asked_PGG &= torch.ones_like(asked_PGG[0]).triu(1)
    side_PGG = (rewards_PG[:, :, None] > rewards_PG[:, None, :]).double() - (
        rewards_PG[:, :, None] < rewards_PG[:, None, :]
    ).double()
    agrees_PGG = 0.5 + 0.5 * side_PGG * (preferred_PGG - 0.5).sign()
    shares_P = (agrees_PGG.nan_to_num() * asked_PGG).sum((1, 2)) / asked_PGG.sum((1, 2))
    kept = shares_P[~shares_P.isnan()].tolist()
    return student(kept, 0.0, 1.0) if kept else None


@dataclass(frozen=True)
class Noise:
    """What scoring the same completions a second time changes."""

    std: float
    """Of one score: the standard deviation of the difference, by √2."""
    of_within_group_std: float
    """The same as a share of the spread within groups."""
    changed_pair_fraction: float
    """Pairs of a group whose order is another the second time."""


def noise_of(first_PG: Tensor, second_PG: Tensor) -> Noise:
    """Of a source, from two scorings of the same groups."""
    difference = (second_PG - first_PG)[~(first_PG.isnan() | second_PG.isnan())]
    std = float(difference.square().mean().sqrt() / 2**0.5) if difference.numel() else float("nan")
    orders = [(x[:, :, None] - x[:, None, :]).sign() for x in (first_PG, second_PG)]
    both_PGG = ~(orders[0].isnan() | orders[1].isnan()) & torch.ones_like(orders[0][0], dtype=torch.bool).triu(1)
    changed = (orders[0] != orders[1])[both_PGG].double().mean()
    share = torch.tensor(std, dtype=torch.float64) / _std(first_PG).nanmean()
    return Noise(std, float(share), float(changed))


def advantages_of(
    rewards_PG: Tensor, functions: Mapping[str, Callable[[Tensor], Tensor]]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(advantages by name, reason by name of those that refuse these rewards)."""
    found, refused = {}, {}
    for name, function in functions.items():
        try:
            found[name] = function(rewards_PG)
        except ValueError as error:
            refused[name] = str(error)
    return found, refused
