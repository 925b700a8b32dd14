"""Which way to move a policy of which only a ranking of perturbed copies is known: ZO-RankSGD (arXiv 2303.03751).

Of m copies θ + μ ξ_i the direction is (1 / |E|) Σ_{(a, b) ∈ E} (ξ_a − ξ_b), where E has a pair for every copy a of the
best k and every copy b that is worse: weights of the noise vectors, by rank.
"""

import torch
from torch import Tensor

from gopo_lightning.objectives.advantages import without_noise


def net_preferences(preferences_PGG: Tensor) -> tuple[Tensor, Tensor]:
    """float64 (net_G, compared_G): Borda points of each copy over the prompts, wins − losses; and of how many.

    Both add up over ranks. Soft preferences count as 2 p − 1; NaN is no comparison.
    """
    asked_PGG = ~preferences_PGG.isnan()
    net_PGG = torch.where(asked_PGG, 2 * preferences_PGG.double() - 1, 0.0)
    return without_noise(net_PGG.sum((0, 2))), asked_PGG.sum((0, 2)).double()


def preferences_of_rewards(rewards_PG: Tensor) -> Tensor:
    """float64 [P, G, G]: 1 where i has more than j, ½ for a tie, NaN where either is NaN and on the diagonal."""
    mine_PG1, other_P1G = rewards_PG.unsqueeze(-1), rewards_PG.unsqueeze(-2)
    unknown_PGG = mine_PG1.isnan() | other_P1G.isnan()
    unknown_PGG |= torch.eye(rewards_PG.shape[-1], dtype=torch.bool, device=rewards_PG.device)
    better_PGG = (mine_PG1 > other_P1G).double() + 0.5 * (mine_PG1 == other_P1G)
    return better_PGG.masked_fill(unknown_PGG, torch.nan)


def rank_weights_of_noise(scores_m: Tensor, top: int | None = None, *, authors_weights: bool = False) -> Tensor:
    """float64 [m], weights of the noise vectors; with all copies ranked ``ordinal`` / m exactly.

    The copy at place q = 0, 1, … of the best k has (m − 1 − 2 q) / |E|, every other −k / |E|, with
    |E| = k (k − 1) / 2 + k (m − k). Copies that tie share the mean of their places. NaN is not ranked: weight 0.

    Args:
        scores_m: more is better.
        top: k; None ranks all.
        authors_weights: m − 2 q of the authors' code, which adds Σ ξ of the best k / |E|: noise without bias.

    >>> rank_weights_of_noise(torch.tensor([2.0, 1.0, 0.0, 1.5]), 2).tolist()
    [0.6, -0.4, -0.4, 0.2]
    """
    weights_m = torch.zeros(len(scores_m), dtype=torch.float64)
    ranked = sorted((i for i, s in enumerate(scores_m.tolist()) if s == s), key=lambda i: -scores_m[i].item())
    m = len(ranked)
    if m < 2:
        return weights_m
    k = m if top is None else min(top, m)
    place_q = torch.arange(m, dtype=torch.float64)
    weight_q = torch.where(place_q < k, m - (0 if authors_weights else 1) - 2 * place_q, float(-k))
    weight_q /= k * (k - 1) / 2 + k * (m - k)
    for i in ranked:
        is_tied_q = scores_m[ranked] == scores_m[i]
        weights_m[i] = weight_q[is_tied_q].mean()
    return weights_m
