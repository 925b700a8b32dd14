"""How far two scores must be apart for people to prefer one: the one parameter between ranks and magnitudes."""

import math

from torch import Tensor

_LOG_BOUND = math.log(1000)


def fit_tau(differences_Q: Tensor, preferences_Q: Tensor) -> float | None:
    """The τ > 0 that maximises Σ_q W log σ(d / τ) + (1 − W) log σ(−d / τ); None where there is none.

    Maximum likelihood of the Bradley–Terry model with the temperature of arXiv 1706.04599 (sec. 4.2) as its only
    parameter. The sum is concave in 1 / τ, so its slope Σ d (W − σ(d / τ)) has one zero at most. It is bisected for, in
    log τ, from 1/1000 to 1000 times the mean |d|. There is none where the scores order all pairs as people do
    (τ → 0), or do no better than at random (τ → ∞).

    Args:
        differences_Q: d = s_i − s_j of Q compared pairs. τ has their unit: it is c times as large for c · d.
        preferences_Q: W in [0, 1], how surely people prefer i to j; ½ is a tie.
    """
    d_Q, W_Q = differences_Q.double(), preferences_Q.double()
    scale = d_Q.abs().mean()
    d_Q = d_Q / scale

    def slope(log_tau: float) -> float:
        return float((d_Q * (W_Q - (d_Q / math.exp(log_tau)).sigmoid())).sum())

    low, high = -_LOG_BOUND, _LOG_BOUND
    if not slope(low) < 0 < slope(high):  # nor with a NaN, of no pairs or none that differs
        return None
    for _ in range(60):  # 14 / 2^60: to the last bit
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return float(scale) * math.exp(low)
