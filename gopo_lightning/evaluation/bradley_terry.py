"""Strengths of K players from their duels (Bradley and Terry, Biometrika 1952), in Elo. Pure NumPy.

P(i beats j) = σ(θ_i − θ_j), Elo_i = 400 / ln 10 · θ_i; the mean Elo is 0. Each prompt is one vote of every duel,
divided as the completions' pairs were won; a tie is half a vote for each side.

Departure from maximum likelihood: each pair that met has half a vote more on either side. Between two players that is
the log-odds ln((w + ½) / (l + ½)) of Haldane and Anscombe, whose bias is of second order; and it keeps finite the
strength of a player that won or lost everything, in every draw of the bootstrap. ``prior=0`` is maximum likelihood,
which has no solution then.

Suffixes: n prompts, B draws, K players.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components

from gopo_lightning.evaluation.bootstrap import Floats, draw_counts, expanded_level
from gopo_lightning.evaluation.intervals import Interval

ELO = 400 / math.log(10)
"""Of one unit of log-odds."""
_LARGEST_STEP = 2.0
_MOST_STEPS = 200
_PRECISE = 1e-8
"""Of θ, 2e-6 Elo: votes from ½ to a million leave noise of 1e-10."""


@dataclass(frozen=True)
class Ladder:
    """Strengths of K players, in Elo."""

    ratings: tuple[Interval, ...]
    """Of each player, with n the number of prompts; bounds are NaN for a single prompt."""


def ladder(shares_nKK: Floats, prior: float = 0.5, draws: int = 1000, seed: int = 0) -> Ladder:
    """Elo of K players with 95 % intervals over draws of prompts (expanded percentiles, as in `bootstrap`).

    Args:
        shares_nKK: share of i against j on each prompt, 1 − that of j against i; NaN where they did not meet. The
            diagonal is not read.
        prior: votes that each side of a pair that met has beforehand.
        draws: of the bootstrap. In every draw the pairs that met in any prompt have their prior.
        seed: of the draws.

    Raises:
        ValueError: as in `strengths`.
    """
    n, K, _ = shares_nKK.shape
    met = ~np.isnan(shares_nKK) & ~np.eye(K, dtype=bool)
    wins_nKK = np.where(met, shares_nKK, 0.0)
    prior_KK = prior * met.any(0)
    elo_K = ELO * strengths(wins_nKK.sum(0), prior_KK)
    if n < 2:
        return Ladder(tuple(Interval(float(elo), math.nan, math.nan, n) for elo in elo_K))
    flat = wins_nKK.reshape(n, K * K)
    drawn_BKK = np.concatenate([counts @ flat for counts in draw_counts(n, draws, seed)]).reshape(-1, K, K)
    level = expanded_level(n)
    low_K, high_K = np.quantile(ELO * _newton(drawn_BKK + prior_KK), [level, 1 - level], axis=0)
    bounds = zip(elo_K.tolist(), low_K.tolist(), high_K.tolist(), strict=True)
    return Ladder(tuple(Interval(elo, low, high, n) for elo, low, high in bounds))


def strengths(wins_KK: Floats, prior: float | Floats = 0.0) -> Floats:
    """θ_K with mean 0, of maximum likelihood with ``prior`` votes more on each side of the pairs that met.

    Args:
        wins_KK: votes of i against j, fractions too.
        prior: added to each vote; a number counts for the pairs that met.

    Raises:
        ValueError: a negative or infinite vote, players that no chain of duels connects, or, without a prior, a group
            of players that won or lost all votes against the others.
    """
    wins_KK = np.where(np.eye(len(wins_KK), dtype=bool), 0.0, np.asarray(wins_KK, dtype=np.float64))
    if not np.isfinite(wins_KK).all() or (wins_KK < 0).any():
        raise ValueError(
            "votes must be finite and not negative; count a duel that was not held as 0 votes on each side"
        )
    total_KK = wins_KK + prior * (wins_KK + wins_KK.T > 0)
    groups, number_K = connected_components(total_KK, directed=True, connection="weak")
    if groups > 1:
        apart = [np.flatnonzero(number_K == g).tolist() for g in range(groups)]
        raise ValueError(
            f"no chain of duels connects the players {' and '.join(map(str, apart))}, so their strengths cannot be "
            "compared. Let one of each group meet on prompts that the judge answers."
        )
    if connected_components(total_KK, directed=True, connection="strong")[0] > 1:
        raise ValueError(
            "some players won or lost every vote against the others, so maximum likelihood puts them at infinity. "
            "Give a prior, such as half a vote (prior=0.5)."
        )
    return _newton(total_KK[None])[0]


def _newton(wins_BKK: Floats) -> Floats:
    """θ_BK of B problems that have a solution, each with mean 0, by Newton's method with bounded steps."""
    B, K, _ = wins_BKK.shape
    votes_BKK = wins_BKK + wins_BKK.transpose(0, 2, 1)
    theta_BK = np.zeros((B, K))
    for _ in range(_MOST_STEPS):
        p_BKK = 0.5 * (1 + np.tanh((theta_BK[:, :, None] - theta_BK[:, None, :]) / 2))
        slope_BK = (wins_BKK - votes_BKK * p_BKK).sum(2)
        weight_BKK = votes_BKK * p_BKK * (1 - p_BKK)
        curvature_BKK = _diagonal(weight_BKK.sum(2)) - weight_BKK + 1 / K  # 1/K keeps the mean where it is
        step_BK = np.linalg.solve(curvature_BKK, slope_BK[..., None])[..., 0]
        size_B1 = np.abs(step_BK).max(1, keepdims=True)
        theta_BK += step_BK * np.minimum(1.0, _LARGEST_STEP / np.maximum(size_B1, 1e-300))
        if size_B1.max() < _PRECISE:
            return theta_BK - theta_BK.mean(1, keepdims=True)
    raise AssertionError(f"no convergence in {_MOST_STEPS} steps: {wins_BKK[size_B1.argmax()]}")


def _diagonal(values_BK: Floats) -> NDArray[np.float64]:
    return values_BK[:, :, None] * np.eye(values_BK.shape[1])
