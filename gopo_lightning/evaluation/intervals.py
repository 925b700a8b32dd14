"""Means with their intervals. Pure."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import t


@dataclass(frozen=True)
class Interval:
    """A mean and the bounds of its 95 % interval; NaN bounds where n is too small to say."""

    mean: float
    low: float
    high: float
    n: int
    """How many independent units it rests on: seeds, or prompts."""

    @property
    def half_width(self) -> float:
        """Of the interval."""
        return (self.high - self.low) / 2

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]" if self.n > 1 else f"{self.mean:+.3f}"


def student(values: Sequence[float], lowest: float = -math.inf, highest: float = math.inf) -> Interval:
    """Mean of ``values`` and its 95 % interval by Student's t with n − 1 degrees of freedom.

    Args:
        values: of independent units.
        lowest: no value can be below it, so the interval ends there.
        highest: likewise.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("a mean of no values: give at least one")
    n, mean = len(values), statistics.fmean(values)
    if n < 2:
        return Interval(mean, math.nan, math.nan, n)
    half = float(t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n)
    return Interval(mean, max(mean - half, lowest), min(mean + half, highest), n)


def paired(first: Sequence[float], second: Sequence[float]) -> Interval:
    """`student` of first − second, value by value: of runs with the same seed, say."""
    return student([a - b for a, b in zip(first, second, strict=True)])
