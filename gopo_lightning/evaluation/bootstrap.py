"""Intervals for a mean over prompts, by drawing prompts with replacement. Pure NumPy.

A prompt is one cluster: its completions share its difficulty, so its pairs of completions are not independent, and only
their mean counts, the prompt's *share*. All shares and bounds are put on a grid of 2⁻³², where 1 − x and sums over
prompts are exact: a duel and its reverse add up to exactly 1.

Departures from the plain percentile bootstrap, both measured (`docs/duel.md`, Coverage):

- The percentiles are expanded (Hesterberg, "What Teachers Should Know About the Bootstrap", 2015, §4.3): draws of n
  prompts vary by √((n − 1)/n) too little, and the normal's tails are thinner than Student's.
- Draws cannot show a share that no prompt had: 10 prompts with 10 wins give the point 1. So the interval also reaches
  as far as Wilson's score interval, whose variance at win rate p is p(1 − p) times the clusters' design effect.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, t

from gopo_lightning.evaluation.intervals import Interval

Floats = NDArray[np.float64]
GRID = 2.0**32
_BLOCK = 2**22
"""Draws × prompts at a time."""


def on_grid(values: Floats) -> Floats:
    """``values`` in [0, 1], rounded to multiples of 2⁻³²: on_grid(x) + on_grid(1 − x) is exactly 1."""
    return np.rint(np.asarray(values, dtype=np.float64) * GRID) / GRID


def cluster_bootstrap(shares: Sequence[float] | Floats, draws: int = 4000, seed: int = 0) -> Interval:
    """The mean share and its 95 % interval over ``draws`` draws of n prompts from n, with replacement.

    It is the same with 1 − shares, turned round, to the last bit. A single prompt has no interval (NaN bounds). Where
    all prompts have one same share strictly between 0 and 1 the interval is a point: nothing in the data says how other
    prompts would differ.

    Raises:
        ValueError: no share, or one outside [0, 1] or NaN.
    """
    shares = _checked(shares)
    n, mean = len(shares), float(on_grid(shares.mean()))
    if n < 2:
        return Interval(mean, math.nan, math.nan, n)
    return Interval(mean, _low(shares, draws, seed), 1.0 - _low(1.0 - shares, draws, seed), n)


def authors_interval(shares: Sequence[float] | Floats, N: int = 25, B: int = 25, seed: int = 0) -> Interval:
    """The interval of the paper's code: 2.5 % and 97.5 % of the means of B draws of N prompts, with replacement.

    It says how the mean of N = 25 prompts varies, however many were judged, so it is wider than `cluster_bootstrap`
    by about √(n / N) once n exceeds N; and its bounds are almost the extremes of B = 25 numbers, so they are noisy.
    """
    shares = _checked(shares)
    means = np.random.default_rng(seed).choice(shares, (B, N)).mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(means.mean()), float(low), float(high), N)


def expanded_level(n: int, level: float = 0.025) -> float:
    """The percentile of draws of n clusters that is worth Student's ``level``: Φ(√(n/(n − 1)) · t(level, n − 1)).

    >>> round(expanded_level(10), 4), round(expanded_level(10**6), 4)
    (0.0086, 0.025)
    """
    return float(norm.cdf(math.sqrt(n / (n - 1)) * t.ppf(level, n - 1)))


def draw_counts(n: int, draws: int, seed: int) -> Iterator[Floats]:
    """Blocks of rows; each row is one draw: how often each of n prompts is in it."""
    generator = np.random.default_rng(seed)
    size = max(_BLOCK // n, 1)
    for start in range(0, draws, size):
        rows = min(size, draws - start)
        drawn = generator.integers(0, n, (rows, n)) + n * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)


def _low(shares: Floats, draws: int, seed: int) -> float:
    """The lower bound, on the grid; the upper one is 1 − that of 1 − shares."""
    n = len(shares)
    means = np.concatenate([counts @ shares / n for counts in draw_counts(n, draws, seed)])
    low = min(float(np.quantile(means, expanded_level(n))), score_bound(shares))
    return float(on_grid(np.clip(low, 0.0, 1.0)))


def score_bound(shares: Floats) -> float:
    """The lower bound of Wilson's score interval with the clusters' design effect and Student's quantile.

    The design effect is the variance of the shares over m(1 − m), that of single votes. Where m is 0 or 1 it is 1.
    """
    n, m = len(shares), float(shares.mean())
    spread = float(shares.var(ddof=1))
    effect = spread / (m * (1 - m)) if 0 < m < 1 else 1.0
    c = float(t.ppf(0.975, n - 1)) ** 2 * effect / n  # t² over the effective number of votes
    return (m + c / 2 - math.sqrt(c * m * (1 - m) + c * c / 4)) / (1 + c)


def _checked(shares: Sequence[float] | Floats) -> Floats:
    values = np.asarray(shares, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"an interval over {values.shape} shares: give one share a prompt, of at least one prompt")
    if bool((bad := ~((values >= 0) & (values <= 1))).any()):
        raise ValueError(f"a share is {values[bad][0]}; a share of wins lies in [0, 1]. Leave prompts without one out.")
    return on_grid(values)
