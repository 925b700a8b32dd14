"""Losses of a whole ranked group. Pure.

Shape legend: see `types.py`. "Worse" is a lower reward (of a pairwise source, a lower share of wins); completions that
tie are on the same level, and neither is contrasted with the other, so their order does not matter. (The listwise
LiPO-λ is a sum over pairs: `PairObjective` with weight dcg_lambda.)

The denominator is the number of groups that have something to compare, over all micro-batches and ranks: a loss is a
sum over the terms of a group, and the mean over groups. A completion's weight multiplies its own term.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from gopo_lightning.objectives.anchored import AnchoredObjective, logratios, pair_metrics, token_metrics
from gopo_lightning.objectives.base import Loss, Mean
from gopo_lightning.objectives.pairing import GroupObjective, Standing, standing
from gopo_lightning.types import Experience


def first_choice(own_PG: Tensor, others_PGG: Tensor, worse_PGG: Tensor) -> Tensor:
    """[P, G] log(exp(own_k) + Σ_{i worse than k} exp(others_ki)) − own_k: k is chosen before all that are worse.

    0 where nothing is worse than k.
    """
    logits_PGG = others_PGG.masked_fill(~worse_PGG, -torch.inf)
    all_PGH = torch.cat([own_PG.unsqueeze(-1), logits_PGG], -1)
    return all_PGH.logsumexp(-1) - own_PG


class _Listwise(GroupObjective):
    """What the objectives below share: groups count if one completion is better than another."""

    def active(self, experience: Experience) -> Tensor:
        """Groups that do not tie."""
        return _has_order(standing(experience, self.mask(experience))).cpu()

    def denominator(self, experience: Experience, mask_NT: Tensor) -> Tensor:
        """The number of such groups."""
        return _has_order(standing(experience, mask_NT)).sum().float().to(mask_NT.device)


@dataclass(frozen=True)
class PlackettLuce(_Listwise, AnchoredObjective):
    """−Σ_k log softmax of β d_k among itself and all that are worse: DPO for rankings (arXiv 2305.18290, app. A.3).

    d is the log-ratio to the anchor. Without ties this is `comparison_losses.plackett_luce` (list-MLE).
    """

    beta: float = 0.1
    """β > 0, per nat of a completion's log-ratio."""

    def __post_init__(self) -> None:
        """Raise ValueError on a value out of its range."""
        super().__post_init__()
        _check_beta(self.beta)

    def __call__(self, logprobs_NT: Tensor, experience: Experience, mask_NT: Tensor, total: Tensor) -> Loss:
        """See the class."""
        stand, d_PG = standing(experience, mask_NT), self.logratios(logprobs_NT, experience, mask_NT)
        scores_PG, worse_PGG = self.beta * d_PG, _worse(stand).to(d_PG.device)
        losses_PG = first_choice(scores_PG, scores_PG.unsqueeze(-2).expand_as(worse_PGG), worse_PGG)
        return _loss(losses_PG, d_PG, stand, total, token_metrics(logprobs_NT, experience, mask_NT))


@dataclass(frozen=True)
class PRO(_Listwise):
    """Preference Ranking Optimization (arXiv 2306.17492), as its authors' code has it, which is not list-MLE.

    With u the mean log-prob of a completion (no reference) and T_ki = r_k − r_i, T_kk = max_i T_ki:

        Σ_k [log(exp(u_k T_kk) + Σ_{i worse than k} exp(u_i T_ki)) − u_k T_kk]  −  w (G_valid − 1)² lp_best

    The last term, likelihood of the best, is there only if one completion is the best. Reads magnitudes of rewards:
    twice the rewards are another loss. Departure: the authors' code contrasts ties too, by their position.
    """

    sft_weight: float = 0.05
    """w ≥ 0. Theirs for HH; the default of their code is 2."""

    def __post_init__(self) -> None:
        """Raise ValueError on a value out of its range."""
        if not 0 <= self.sft_weight < math.inf:
            raise ValueError(f"sft_weight={self.sft_weight} must be finite and at least 0. Use 0 for ranks alone.")

    def denominator(self, experience: Experience, mask_NT: Tensor) -> Tensor:
        """Also raises ValueError on an infinite reward."""
        standing(experience, mask_NT).finite_gaps_PGG("PRO")
        return super().denominator(experience, mask_NT)

    def __call__(self, logprobs_NT: Tensor, experience: Experience, mask_NT: Tensor, total: Tensor) -> Loss:
        """See the class."""
        stand = standing(experience, mask_NT)
        sums_N = logratios(logprobs_NT, {}, {}, mask_NT)
        means_N = logratios(logprobs_NT, {}, {}, mask_NT, length_normalised=True)
        sums_PG, u_PG = (values_N.view_as(stand.rewards_PG) for values_N in (sums_N, means_N))
        worse_PGG, gaps_PGG = _worse_by_reward(stand).to(u_PG.device), stand.finite_gaps_PGG("PRO").to(u_PG)
        widest_PG = gaps_PGG.masked_fill(~worse_PGG, 0.0).amax(-1)
        losses_PG = first_choice(u_PG * widest_PG, u_PG.unsqueeze(-2) * gaps_PGG, worse_PGG)
        num_others_P1 = stand.valid_PG.sum(-1, keepdim=True).to(u_PG) - 1
        is_best_PG = worse_PGG.sum(-1) == num_others_P1
        best_PG = (is_best_PG & worse_PGG.any(-1)) * -sums_PG * num_others_P1**2
        losses_PG = losses_PG + self.sft_weight * best_PG
        return _loss(losses_PG, u_PG, stand, total, token_metrics(logprobs_NT, experience, mask_NT))


@dataclass(frozen=True)
class GroupPreference(AnchoredObjective):
    """GEPO's group-equivalent loss (arXiv 2505.12723, eq. 6 to 9): the best against the rest, and the best alike.

        softplus(−β (mean of d over the best − mean of d over the rest)) + λ · variance of d over the best

    The best are the completions whose reward is the highest of the group, as many as tie; the paper takes both classes
    from data. The first term needs a rest, the second at least two that are best: a group with neither does not count.
    A completion's weight enters the means and the variance (which divides by the number of the best). The paper adds
    the loss with weight 0.01 to REINFORCE++; that sum is left out.
    """

    beta: float = 0.1
    """β > 0, per nat of a completion's log-ratio. Ours; the paper gives none."""
    variance_weight: float = 1.0
    """λ ≥ 0."""

    def __post_init__(self) -> None:
        """Raise ValueError on a value out of its range."""
        super().__post_init__()
        _check_beta(self.beta)
        if not 0 <= self.variance_weight < math.inf:
            raise ValueError(f"variance_weight={self.variance_weight} must be finite and at least 0. Use 0 for none.")

    def active(self, experience: Experience) -> Tensor:
        """Groups with one of the terms."""
        return self._terms(standing(experience, self.mask(experience))).any(-1).cpu()

    def denominator(self, experience: Experience, mask_NT: Tensor) -> Tensor:
        """The number of such groups."""
        return self._terms(standing(experience, mask_NT)).any(-1).sum().float().to(mask_NT.device)

    def __call__(self, logprobs_NT: Tensor, experience: Experience, mask_NT: Tensor, total: Tensor) -> Loss:
        """See the class."""
        stand, d_PG = standing(experience, mask_NT), self.logratios(logprobs_NT, experience, mask_NT)
        best_PG, weights_PG = _best(stand).to(d_PG.device), stand.weights_PG.to(d_PG)
        best_P1 = _weighted_mean(d_PG, weights_PG * best_PG)
        rest_P1 = _weighted_mean(d_PG, weights_PG * ~best_PG)
        variance_P1 = _weighted_mean((d_PG - best_P1) ** 2, weights_PG * best_PG)
        terms_P2 = torch.cat([F.softplus(-self.beta * (best_P1 - rest_P1)), self.variance_weight * variance_P1], -1)
        value = torch.where(self._terms(stand).to(d_PG.device), terms_P2, 0.0).sum()
        metrics = pair_metrics(_differences(d_PG), stand.prefers_PGG, _worse(stand).double())
        return Loss(
            value / torch.where(total > 0, total, 1.0), metrics | token_metrics(logprobs_NT, experience, mask_NT)
        )

    def _terms(self, stand: Standing) -> Tensor:
        """bool [P, 2]: which of the two terms a group has."""
        best_PG = _best(stand)
        has_rest_P = (stand.valid_PG & ~best_PG).any(-1)
        has_spread_P = (best_PG.sum(-1) > 1) & (self.variance_weight > 0)
        return torch.stack([has_rest_P, has_spread_P], -1)


def _worse(stand: Standing) -> Tensor:
    """bool [P, G, G]: both are valid, and j wins less than i."""
    both_PGG = stand.valid_PG.unsqueeze(-1) & stand.valid_PG.unsqueeze(-2)
    return both_PGG & (stand.share_PG.unsqueeze(-1) > stand.share_PG.unsqueeze(-2))


def _worse_by_reward(stand: Standing) -> Tensor:
    """bool [P, G, G]: both are valid, and j has the lower reward."""
    both_PGG = stand.valid_PG.unsqueeze(-1) & stand.valid_PG.unsqueeze(-2)
    return both_PGG & (stand.gaps_PGG > 0)


def _has_order(stand: Standing) -> Tensor:
    """bool [P]."""
    return _worse(stand).flatten(1).any(-1)


def _best(stand: Standing) -> Tensor:
    """bool [P, G]: valid, and nobody wins more."""
    return stand.valid_PG & ~_worse(stand).any(-2)


def _differences(d_PG: Tensor) -> Tensor:
    d_PG = d_PG.detach()
    return d_PG.unsqueeze(-1) - d_PG.unsqueeze(-2)


def _weighted_mean(values_PG: Tensor, weights_PG: Tensor) -> Tensor:
    """[P, 1]; 0 where no weight is above 0."""
    total_P1 = weights_PG.sum(-1, keepdim=True)
    return (weights_PG * values_PG).sum(-1, keepdim=True) / torch.where(total_P1 > 0, total_P1, 1.0)


def _loss(losses_PG: Tensor, scores_PG: Tensor, stand: Standing, total: Tensor, metrics: dict[str, Mean]) -> Loss:
    """Of terms of single completions."""
    value = (losses_PG * stand.weights_PG.to(losses_PG)).sum() / torch.where(total > 0, total, 1.0)
    pairs = pair_metrics(_differences(scores_PG), stand.prefers_PGG, _worse(stand).double())
    return Loss(value, pairs | metrics)


def _check_beta(beta: float) -> None:
    if not 0 < beta < math.inf:
        raise ValueError(f"beta={beta} must be above 0 and finite. Try 0.1.")
