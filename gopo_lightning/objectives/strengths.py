"""Strengths of the G completions of one group from a few comparisons, and which comparison is worth asking next.

Bradley and Terry (Biometrika 1952) with a Gaussian prior: P(i beats j) = σ(θ_i − θ_j), θ_i ~ N(0, spread²). The
posterior is taken as Gaussian at its mode (Laplace), so the order of a pair that was never compared is known as surely
as the others imply: that is transitivity, with its doubt. Suffix Q: candidate pairs.
"""

import torch
from torch import Tensor

_STEPS = 30
_LARGEST_STEP = 2.0


def posterior(wins_GG: Tensor, spread: float) -> tuple[Tensor, Tensor]:
    """Mean θ_G and covariance [G, G], float64, after the answers so far.

    Args:
        wins_GG: W_ij in [0, 1], W_ij + W_ji = 1; NaN where there is no answer. The diagonal is not read.
        spread: of the prior, in log-odds. Large: answers are nearly free of noise.
    """
    G = len(wins_GG)
    known_GG = ~wins_GG.isnan() & ~torch.eye(G, dtype=torch.bool)
    wins_GG = torch.where(known_GG, wins_GG.double(), 0.0)
    theta_G = torch.zeros(G, dtype=torch.float64)
    prior_GG = torch.eye(G, dtype=torch.float64) / spread**2
    for _ in range(_STEPS):
        p_GG = (theta_G[:, None] - theta_G).sigmoid()
        slope_G = (wins_GG - known_GG * p_GG).sum(1) - theta_G / spread**2
        precision_GG = prior_GG + _laplacian(known_GG * p_GG * (1 - p_GG))
        step_G = torch.linalg.solve(precision_GG, slope_G)
        theta_G = theta_G + step_G * (_LARGEST_STEP / step_G.abs().max().clamp(min=_LARGEST_STEP))
        if step_G.abs().max() < 1e-9:
            break
    p_GG = (theta_G[:, None] - theta_G).sigmoid()
    return theta_G, torch.linalg.inv(prior_GG + _laplacian(known_GG * p_GG * (1 - p_GG)))


def surely_better(theta_G: Tensor, covariance_GG: Tensor) -> Tensor:
    """P(θ_i > θ_j) [G, G], ½ on the diagonal; any leading dimensions."""
    variance_GG = _variance(covariance_GG)
    margin_GG = theta_G[..., :, None] - theta_G[..., None, :]
    return torch.special.ndtr(margin_GG / variance_GG.clamp(min=1e-12).sqrt())


def expected_change(theta_G: Tensor, covariance_GG: Tensor, pairs_Q2: Tensor) -> Tensor:
    """float64 [Q]: by how much an answer about each pair would change the ordinal advantages, Σ_k |A'_k − A_k|, in
    expectation over the answer.

    A_k = 2 Σ_j (2 P(θ_k > θ_j) − 1) / (G − 1), as `ordinal_from_wins` makes them of ``surely_better``. The answer
    changes the posterior by one step of Newton's method.
    """
    Q, G = len(pairs_Q2), len(theta_G)
    i_Q, j_Q = pairs_Q2.unbind(-1)
    u_QG = torch.zeros(Q, G, dtype=torch.float64)
    u_QG[torch.arange(Q), i_Q], u_QG[torch.arange(Q), j_Q] = 1.0, -1.0
    margin_Q = u_QG @ theta_G
    variance_Q = _variance(covariance_GG)[i_Q, j_Q]
    p_Q, slope_Q = margin_Q.sigmoid(), margin_Q.sigmoid() * (1 - margin_Q.sigmoid())
    moved_QG = u_QG @ covariance_GG
    gain_Q = slope_Q / (1 + slope_Q * variance_Q)
    covariance_QGG = covariance_GG - gain_Q[:, None, None] * moved_QG[:, :, None] * moved_QG[:, None, :]
    step_QG = (covariance_QGG @ u_QG[..., None])[..., 0]
    now_G = _advantages(theta_G, covariance_GG)
    change = [
        (_advantages(theta_G + (won - p_Q)[:, None] * step_QG, covariance_QGG) - now_G).abs().sum(-1)
        for won in (1.0, 0.0)
    ]
    expected_Q = (margin_Q / (1 + torch.pi * variance_Q / 8).sqrt()).sigmoid()  # with the doubt about θ
    return expected_Q * change[0] + (1 - expected_Q) * change[1]


def _advantages(theta_G: Tensor, covariance_GG: Tensor) -> Tensor:
    return 2 * (2 * surely_better(theta_G, covariance_GG) - 1).sum(-1) / (theta_G.shape[-1] - 1)


def _variance(covariance_GG: Tensor) -> Tensor:
    """Of θ_i − θ_j."""
    own_G = covariance_GG.diagonal(dim1=-2, dim2=-1)
    return own_G[..., :, None] + own_G[..., None, :] - 2 * covariance_GG


def _laplacian(weights_GG: Tensor) -> Tensor:
    return weights_GG.sum(1).diag() - weights_GG
