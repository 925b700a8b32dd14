"""Losses of one pair, of the difference m of two completions' log-ratios. Pure.

Shape legend: see `types.py`. d_PG are log-ratios to an anchor, m_ij = d_i − d_j, gap_ij = r_i − r_j.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def logistic(m_PGG: Tensor, beta: float) -> Tensor:
    """log(1 + exp(−β m)), i preferred: DPO (arXiv 2305.18290, eq. 7), RSO's sigmoid-norm, DNO-Prct."""
    return F.softplus(-beta * m_PGG)


def hinge(m_PGG: Tensor, beta: float) -> Tensor:
    """max(0, 1 − β m), i preferred: SLiC (arXiv 2305.10425) on log-ratios, RSO's hinge-norm (2309.06657, eq. 10)."""
    return torch.relu(1 - beta * m_PGG)


def square(m_PGG: Tensor, beta: float) -> Tensor:
    """(m − 1/(2β))², i preferred: IPO (arXiv 2310.12036, eq. 17), INPO (2407.00617, eq. 8)."""
    return (m_PGG - 1 / (2 * beta)) ** 2


def regression(m_PGG: Tensor, gaps_PGG: Tensor, beta: float) -> Tensor:
    """(β m − (r_i − r_j))²: REBEL (arXiv 2404.16767, eq. 3, β = 1/η), CoPG (2406.19185) at the reference."""
    return (beta * m_PGG - gaps_PGG) ** 2


def p3o_separate(d_PG: Tensor, gaps_PGG: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """−½ [min(c_i ρ_i, c_i clip(ρ_i)) + min(c_j ρ_j, c_j clip(ρ_j))], and how many of the two clips act on a gradient.

    P3O (arXiv 2310.00212, sec. 4.2): ρ = exp(d) of a whole completion, c_i = gap_ij sg[ρ_j], c_j = −gap_ij sg[ρ_i],
    clip to [1 − clip, 1 + clip]. 0 where the gap is.
    """
    ratio_PG1 = _exp(d_PG).unsqueeze(-1)
    c_PGG = (gaps_PGG * ratio_PG1.detach().mT).masked_fill(gaps_PGG == 0, 0.0)  # 0 · inf is NaN, here and below
    gain_PGG = torch.minimum(c_PGG * ratio_PG1, c_PGG * ratio_PG1.clamp(1 - clip, 1 + clip))
    gain_PGG = gain_PGG.masked_fill(gaps_PGG == 0, 0.0)
    stops_PGG = ((c_PGG > 0) & (ratio_PG1 > 1 + clip)) | ((c_PGG < 0) & (ratio_PG1 < 1 - clip))
    return -(gain_PGG + gain_PGG.mT) / 2, stops_PGG.double() + stops_PGG.mT.double()


def p3o_joint(d_PG: Tensor, gaps_PGG: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """−½ clip(sg[ρ_i ρ_j]) |gap| min(q, log(1 + clip)), q = log ρ_better − log ρ_worse; where the clip acts counts 2.

    P3O (arXiv 2310.00212, sec. 4.2). The paper clips q of a pair (y1, y2) to [log(1 − clip), log(1 + clip)], which is
    another bound where y1 is the worse one; here a pair is always read from its better completion.
    """
    sign_PGG = gaps_PGG.sign().to(d_PG)
    q_PGG = sign_PGG * (d_PG.unsqueeze(-1) - d_PG.unsqueeze(-2))
    product_PGG = _exp((d_PG.unsqueeze(-1) + d_PG.unsqueeze(-2)).detach()).clamp(1 - clip, 1 + clip)
    gain_PGG = gaps_PGG.abs() * q_PGG.clamp(max=math.log1p(clip))
    return -product_PGG * gain_PGG / 2, 2.0 * ((q_PGG > math.log1p(clip)) & (gaps_PGG != 0)).double()


def dcg_lambda(scores_PG: Tensor, gains_PG: Tensor, valid_PG: Tensor) -> Tensor:
    """|2^ψ_i − 2^ψ_j| · |1/log2(1 + τ_i) − 1/log2(1 + τ_j)|: what DCG changes when i and j are swapped, [P, G, G].

    LiPO-λ (arXiv 2402.01878, eq. 7 and 8) with RAX's logarithm to base 2 (the paper prints the natural one).

    Args:
        scores_PG: the policy's; τ is the rank by them, 1 for the highest, among the valid ones. Equal ones are ranked
            in the order of completions.
        gains_PG: ψ in [0, 1].
        valid_PG: bool.
    """
    order_PG = scores_PG.detach().masked_fill(~valid_PG, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    discount_PG = 1 / (order_PG.argsort(-1) + 2).log2()
    gain_PG = 2**gains_PG
    gain_PGG = (gain_PG.unsqueeze(-1) - gain_PG.unsqueeze(-2)).abs()
    return gain_PGG * (discount_PG.unsqueeze(-1) - discount_PG.unsqueeze(-2)).abs()


def _exp(log_ratio: Tensor) -> Tensor:
    """exp, but inf without gradient beyond the range of the type, where exp's own gradient would be 0 · inf."""
    beyond = torch.exp(log_ratio.detach()).isinf()
    return torch.exp(log_ratio.masked_fill(beyond, 0.0)).masked_fill(beyond, math.inf)
