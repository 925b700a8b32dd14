"""One loss for methods that compare completions of a group in pairs.

Shape legend: see `types.py`. With lp the log-prob of a whole completion (the sum over its tokens, at the sampling
temperature),

    d_i  = lp_i − a · lp_i(reference) − (1 − a) · lp_i(anchor)
    m_ij = d_i − d_j
    loss = Σ over pairs  w_ij · link(m_ij) / denominator

    method        anchor      link           beta      reduction    source
    DPO           reference   logistic       β         pairs        arXiv 2305.18290, eq. 7
    IPO           reference   square         τ         pairs        2310.12036, eq. 17
    SLiC, RSO     reference   hinge          γ         pairs        2309.06657, eq. 9 and 10
    LiPO-λ        reference   logistic       β         groups       2402.01878, eq. 7, with weight dcg_lambda
    CoPG          reference   regression     β         completions  2406.19185
    DNO           old         logistic       β         pairs        2404.03715
    INPO          iterate     square         η         pairs        2407.00617, eq. 8, reference_share a = τ/η
    REBEL         old         regression     1/η       pairs        2404.16767, eq. 3
    P3O           old         p3o_*          –         pairs        2310.00212, sec. 4.2

How sure it is that i is better, p_ij, splits a pair between its two orders: w_ij = p_ij, so a tie is ½ each way and
pulls m to 0. The denominator is that of the whole minibatch over all ranks:

    pairs         Σ of the weights of the pairs, each counted once
    groups        number of groups that have a pair: the loss is a sum over the pairs of a group
    completions   the same, each group's sum divided by its valid completions − 1

The first-step theorem. Over all pairs, where the anchor equals the policy, ∂loss/∂lp of logistic, hinge and square
links is the ordinal advantage's up to a constant, and that of regression and P3O is RLOO's; of regression with the
reference as anchor, RLOO's of r − β d, at any policy. So at one update per rollout the methods anchored at ``old`` are
GOPO or RLOO, up to a constant that AdamW removes. It holds for groups of equally many valid completions without a
filter, and sums over tokens. Compare methods at 4 updates per rollout or more.

Departures: a pair of equal tokens is left out (it has no gradient); P3O at more than two completions takes all pairs;
LiPO's gains ψ are (K − 1)/K times the mean preference over the other valid completions.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from gopo_lightning.objectives import links
from gopo_lightning.objectives.anchored import AnchoredObjective, check_choices, pair_metrics, token_metrics
from gopo_lightning.objectives.base import Loss, Mean
from gopo_lightning.objectives.pairing import PairSelection, Standing, same_tokens, selected, standing
from gopo_lightning.types import Experience

Link = Literal["logistic", "hinge", "square", "regression", "p3o_joint", "p3o_separate"]
PairWeight = Literal["uniform", "margin", "dcg_lambda"]
Reduction = Literal["pairs", "groups", "completions"]
P3O = ("p3o_joint", "p3o_separate")
READS_GAPS = ("regression", *P3O)
"""Links that read differences of rewards, and count each pair once."""


@dataclass(frozen=True)
class PairObjective(AnchoredObjective):
    """A loss of pairs of completions: DPO, IPO, SLiC, RSO, LiPO, CoPG, DNO, INPO, REBEL, P3O (docs/methods.md)."""

    link: Link = "logistic"
    """The loss of a pair, of m: logistic log(1 + exp(−βm)); hinge max(0, 1 − βm); square (m − 1/(2β))²; regression
    (βm − difference of rewards)²; p3o_joint and p3o_separate, P3O's, with its joint or separate clip."""
    beta: float = 0.1
    """β > 0 of the links, per nat of a whole completion's log-ratio; P3O has none."""
    clip: float = 0.2
    """P3O clips ratios of whole completions to 1 ± this."""
    pairs: PairSelection = "all"
    """all; best_worst: the best of a group against its worst; adjacent: each against the next better one; random:
    ``num_random_pairs`` of each group, drawn for each rollout."""
    num_random_pairs: int | None = None
    """For pairs: random."""
    ties: Literal["pull", "skip"] = "pull"
    """pull: completions that tie are drawn together (to equal log-ratios); skip: such pairs are left out."""
    min_margin: float = 0.0
    """Leave out pairs whose rewards differ by less; a pairwise source's reward is the share of wins."""
    target: Literal["preference", "win_share"] = "preference"
    """How surely i is better: preference, 1, ½ or 0 by the rewards, or what a pairwise source says; win_share: σ of the
    difference of the shares of wins, DNO's regression (arXiv 2404.03715, eq. 8)."""
    weight: PairWeight = "uniform"
    """Of a pair: uniform 1; margin the difference of the rewards; dcg_lambda LiPO's, what swapping both would change of
    DCG."""
    reduction: Reduction = "pairs"
    """pairs: mean over the pairs of the step; groups: sum over the pairs of a group, mean over groups; completions:
    that, divided by the group's valid completions − 1. With dcg_lambda, pairs is RAX's: the group's size times the
    mean."""
    skip_tokens: int = 0
    """Leave each completion's first tokens out of its log-prob: REFUEL's mask of what was written before (arXiv
    2410.04612)."""

    def __post_init__(self) -> None:
        """Raise ValueError on a value out of its range, or one that would have no effect."""
        super().__post_init__()
        check_choices(self, _CHOICES)
        _check_numbers(self)
        _check_effects(self)

    @property
    def needs_rewards(self) -> bool:  # type: ignore[override]  # of the class
        """Differences of rewards."""
        return self.link in READS_GAPS or self.weight == "margin"

    @property
    def reads_draws(self) -> bool:  # type: ignore[override]  # of the class
        """For pairs: random."""
        return self.pairs == "random"

    def mask(self, experience: Experience) -> Tensor:
        """Also without the first ``skip_tokens``."""
        mask_NT = super().mask(experience)
        if not self.skip_tokens:
            return mask_NT
        return mask_NT & (experience.completions.mask_NT.cumsum(-1) > self.skip_tokens)

    def active(self, experience: Experience) -> Tensor:
        """Groups that have a pair."""
        return (self._weights(experience, self.mask(experience))[1] > 0).flatten(1).any(-1).cpu()

    def denominator(self, experience: Experience, mask_NT: Tensor) -> Tensor:
        """See the module docstring."""
        _, weights_PGG = self._weights(experience, mask_NT)
        has_pair_P = (weights_PGG > 0).flatten(1).any(-1)
        total = weights_PGG.sum() / 2 if self.reduction == "pairs" else has_pair_P.sum()
        return total.float().to(mask_NT.device)

    def __call__(self, logprobs_NT: Tensor, experience: Experience, mask_NT: Tensor, total: Tensor) -> Loss:
        """See the module docstring."""
        stand, weights_PGG = self._weights(experience, mask_NT)
        d_PG = self.logratios(logprobs_NT, experience, mask_NT)
        m_PGG, counts_PGG = d_PG.unsqueeze(-1) - d_PG.unsqueeze(-2), (weights_PGG > 0).to(d_PG.device)
        losses_PGG, stops_PGG = self._losses(d_PG, m_PGG, stand)
        losses_PGG = losses_PGG.masked_fill(~counts_PGG, 0.0)  # it may be infinite, and 0 · inf is NaN
        ordered_PGG = (weights_PGG * self._preferred(stand)).to(d_PG)
        if self.weight == "dcg_lambda":
            ordered_PGG = ordered_PGG * self._lambdas(d_PG, stand)
        sums_P = (ordered_PGG * losses_PGG).flatten(1).sum(-1)
        if self.reduction == "completions":
            sums_P = sums_P / (stand.valid_PG.sum(-1) - 1).clamp(min=1).to(d_PG)
        value = sums_P.sum() / torch.where(total > 0, total, 1.0)
        metrics = pair_metrics(m_PGG.detach(), stand.prefers_PGG, weights_PGG)
        if stops_PGG is not None:
            metrics["pair_clip_fraction"] = Mean((stops_PGG * counts_PGG).sum() / 2, counts_PGG.sum())
        return Loss(value, metrics | token_metrics(logprobs_NT, experience, mask_NT))

    def _weights(self, experience: Experience, mask_NT: Tensor) -> tuple[Standing, Tensor]:
        """How completions stand, and float64 [P, G, G], symmetric: what each pair counts."""
        stand = standing(experience, mask_NT)
        usable_PGG = ~stand.prefers_PGG.isnan() & ~same_tokens(experience).to(stand.valid_PG.device)
        if self.ties == "skip":
            usable_PGG = usable_PGG & (stand.prefers_PGG != 0.5)
        if self.min_margin > 0:
            usable_PGG = usable_PGG & (stand.gaps_PGG.abs() >= self.min_margin)
        if self.weight == "dcg_lambda":
            usable_PGG = usable_PGG & (stand.share_PG.unsqueeze(-1) != stand.share_PG.unsqueeze(-2))
        weights_PGG = selected(
            stand, usable_PGG, self.pairs, num_random=self.num_random_pairs, draws_PGG=experience.draws_PGG
        )
        weights_PGG = weights_PGG * stand.weights_PG.unsqueeze(-1) * stand.weights_PG.unsqueeze(-2)
        if self.needs_rewards:
            gaps_PGG = stand.finite_gaps_PGG("PairObjective")
            weights_PGG = weights_PGG * gaps_PGG.abs() if self.weight == "margin" else weights_PGG
        return stand, weights_PGG

    def _preferred(self, stand: Standing) -> Tensor:
        """float64 [P, G, G]: which part of a pair's weight the order (i, j) has; 0 for unknown pairs."""
        shares_PGG = stand.share_PG.unsqueeze(-1) - stand.share_PG.unsqueeze(-2)
        if self.link in READS_GAPS:
            return torch.full_like(shares_PGG, 0.5)
        if self.weight == "dcg_lambda":
            return (shares_PGG > 0).double()
        if self.target == "win_share":
            return shares_PGG.sigmoid()
        return stand.prefers_PGG.nan_to_num(0.0)

    def _losses(self, d_PG: Tensor, m_PGG: Tensor, stand: Standing) -> tuple[Tensor, Tensor | None]:
        """The link's losses, and how many of the two clips of a pair stop its gradient, for P3O."""
        gaps_PGG = stand.gaps_PGG.to(d_PG)
        if self.link == "p3o_joint":
            return links.p3o_joint(d_PG, gaps_PGG, self.clip)
        if self.link == "p3o_separate":
            return links.p3o_separate(d_PG, gaps_PGG, self.clip)
        if self.link == "regression":
            return links.regression(m_PGG, gaps_PGG, self.beta), None
        return {"logistic": links.logistic, "hinge": links.hinge, "square": links.square}[self.link](
            m_PGG, self.beta
        ), None

    def _lambdas(self, d_PG: Tensor, stand: Standing) -> Tensor:
        """LiPO's weights, of RAX under the reduction ``pairs``."""
        size_P1 = stand.valid_PG.sum(-1, keepdim=True).double()
        gains_PG = stand.share_PG * (size_P1 - 1).clamp(min=0) / size_P1.clamp(min=1)
        lambdas_PGG = links.dcg_lambda(d_PG, gains_PG.to(d_PG), stand.valid_PG.to(d_PG.device))
        return lambdas_PGG * size_P1.unsqueeze(-1).to(d_PG) if self.reduction == "pairs" else lambdas_PGG


_CHOICES: dict[str, tuple[str, ...]] = {
    "link": get_args(Link),
    "pairs": get_args(PairSelection),
    "ties": ("pull", "skip"),
    "target": ("preference", "win_share"),
    "weight": get_args(PairWeight),
    "reduction": get_args(Reduction),
}


def _check_numbers(config: PairObjective) -> None:
    if not 0 < config.beta < math.inf:
        raise ValueError(f"beta={config.beta} must be above 0 and finite. Try 0.1.")
    if not 0 < config.clip < 1:
        raise ValueError(f"clip={config.clip} must lie between 0 and 1, as ratios are positive. Try 0.2.")
    if not 0 <= config.min_margin < math.inf:
        raise ValueError(f"min_margin={config.min_margin} must be finite and at least 0. Use 0 for all pairs.")
    if config.skip_tokens < 0:
        raise ValueError(f"skip_tokens={config.skip_tokens} must be at least 0. Use 0 for whole completions.")
    if (config.pairs == "random") != (config.num_random_pairs is not None):
        raise ValueError(
            f"pairs={config.pairs} with num_random_pairs={config.num_random_pairs}: pairs: random needs their number, "
            "and nothing else reads it. Give both or neither."
        )
    if config.num_random_pairs is not None and config.num_random_pairs < 1:
        raise ValueError(f"num_random_pairs={config.num_random_pairs} must be at least 1.")


def _check_effects(config: PairObjective) -> None:
    reads_gaps, is_p3o = config.link in READS_GAPS, config.link in P3O
    default = PairObjective.__dataclass_fields__
    without_effect = {
        "beta": is_p3o and config.beta != default["beta"].default,
        "clip": not is_p3o and config.clip != default["clip"].default,
        "target": config.target != "preference" and (reads_gaps or config.weight == "dcg_lambda"),
        "weight": config.weight == "dcg_lambda" and reads_gaps,
    }
    for name, is_unread in without_effect.items():
        if is_unread:
            raise ValueError(
                f"{name}={getattr(config, name)!r} has no effect with link={config.link} and weight={config.weight}. "
                "Leave it out, or choose another link."
            )
