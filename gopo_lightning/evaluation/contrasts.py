"""Differences of two groups of runs, with their intervals, and what several comparisons at once ask for. Pure."""

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from scipy.stats import t

from gopo_lightning.evaluation.event_files import Curve
from gopo_lightning.evaluation.intervals import Interval, student
from gopo_lightning.evaluation.run_groups import Group
from gopo_lightning.evaluation.seed_curves import StepsRatio, common_steps, steps_ratio

LEVEL = 0.05
HIGH_IS_GOOD = re.compile(r"(.*/)?(reward|win_rate|pair_accuracy\w*|spearman|kendall)|reward/(.+/)?mean")
"""Tags of which a group with a higher value is ahead, and can reach a target; of others it is only higher."""


@dataclass(frozen=True)
class Contrast:
    """Group − baseline of one tag, at the last step that all compared runs have."""

    tag: str
    group: str
    baseline: str
    step: int
    difference: Interval
    is_paired: bool
    """By seed; else the seeds differ, and the interval is Welch's."""
    p: float
    """Two-sided; NaN where there are too few seeds."""
    adjusted_p: float
    """Holm's, over all comparisons of the report."""
    steps_ratio: StepsRatio | None
    """Of pairs of the same seed only, and of what is better when it is higher."""
    by_step: Mapping[int, Interval]
    """The difference at every step that all compared runs have."""

    @property
    def is_clear(self) -> bool:
        """The adjusted p is below 0.05."""
        return self.adjusted_p < LEVEL


def welch(first: Sequence[float], second: Sequence[float]) -> tuple[Interval, float]:
    """Difference of two means of independent values with its 95 % interval and p, by Welch's t; NaN for n < 2, and
    where the values of each side are equal, from which chance cannot be told.

    Raises:
        ValueError: a side has no values.
    """
    a, b = student(first), student(second)
    difference, n = a.mean - b.mean, min(a.n, b.n)
    if n < 2:
        return Interval(difference, math.nan, math.nan, n), math.nan
    parts = [statistics.variance(values) / len(values) for values in (first, second)]
    if _is_rounding(math.sqrt(sum(parts)), difference):
        return _without_spread(difference, n)
    degrees = sum(parts) ** 2 / sum(v**2 / (len(values) - 1) for v, values in zip(parts, (first, second), strict=True))
    error = math.sqrt(sum(parts))
    half = float(t.ppf(0.975, degrees)) * error
    p = 2 * float(t.sf(abs(difference) / error, degrees))
    return Interval(difference, difference - half, difference + half, n), p


def paired_p(differences: Sequence[float]) -> float:
    """Two-sided p of a mean of 0, by Student's t; NaN for one value, and for equal ones other than 0."""
    return paired_difference(differences)[1]


def paired_difference(differences: Sequence[float]) -> tuple[Interval, float]:
    """Their mean with its 95 % interval and p, by Student's t; NaN for one value, and for equal ones other than 0, from
    which chance cannot be told.
    """
    interval, n = student(differences), len(differences)
    if n < 2:
        return interval, math.nan
    error = statistics.stdev(differences) / math.sqrt(n)
    if _is_rounding(error, interval.mean):
        return _without_spread(interval.mean, n)
    return interval, 2 * float(t.sf(abs(interval.mean) / error, n - 1))


def _is_rounding(error: float, mean: float) -> bool:
    return error <= 1e-12 * abs(mean)


def _without_spread(mean: float, n: int) -> tuple[Interval, float]:
    return (Interval(0.0, 0.0, 0.0, n), 1.0) if mean == 0 else (Interval(mean, math.nan, math.nan, n), math.nan)


def holm(ps: Sequence[float]) -> list[float]:
    """p values after Holm (1979): all at once, a false one among them has at most the chance that each is tested at.

    The smallest is multiplied by their number m, the next by m − 1, …, none below one before it. NaN stays and does
    not count.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted((i for i, p in enumerate(ps) if not math.isnan(p)), key=lambda i: ps[i])
    adjusted, highest = [math.nan] * len(ps), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, ps[i] * (len(order) - rank)))
        adjusted[i] = highest
    return adjusted


def curves_of(group: Group, tag: str) -> dict[str, Curve]:
    """By seed, of the runs that have ``tag``."""
    return {seed: run.scalars[tag] for seed, run in group.runs.items() if run.scalars.get(tag)}


def contrast(group: Group, baseline: Group, tag: str) -> Contrast | None:
    """Paired by seed if they have any seed in common; None if they cannot be compared at any step."""
    ours, theirs = curves_of(group, tag), curves_of(baseline, tag)
    shared = [seed for seed in ours if seed in theirs and seed != "unknown"]
    if shared:
        ours, theirs = ({seed: curves[seed] for seed in shared} for curves in (ours, theirs))
    first, second = list(ours.values()), list(theirs.values())
    steps = common_steps([*first, *second]) if first and second else []
    if not steps:
        return None
    values = {step: ([c[step] for c in first], [c[step] for c in second]) for step in steps}
    if shared:
        differences = {step: [x - y for x, y in zip(a, b, strict=True)] for step, (a, b) in values.items()}
        told = {step: paired_difference(d) for step, d in differences.items()}
    else:
        told = {step: welch(a, b) for step, (a, b) in values.items()}
    by_step, p = {step: interval for step, (interval, _) in told.items()}, told[steps[-1]][1]
    ratio = steps_ratio(first, second) if shared and HIGH_IS_GOOD.fullmatch(tag) else None
    last = steps[-1]
    return Contrast(tag, group.label, baseline.label, last, by_step[last], bool(shared), p, p, ratio, by_step)


def contrasts(groups: Sequence[Group], baseline: Group, tags: Sequence[str]) -> list[Contrast]:
    """Every other group against ``baseline`` on every tag; those of the first tag come first."""
    others = [group for group in groups if group is not baseline]
    found = [c for tag in tags for group in others if (c := contrast(group, baseline, tag)) is not None]
    adjusted = holm([c.p for c in found])
    return [replace(c, adjusted_p=p) for c, p in zip(found, adjusted, strict=True)]


def number(value: float) -> str:
    """With a sign and three decimals; more digits for small ones, fewer for large."""
    if math.isnan(value):
        return "—"
    text = f"{value:+.3f}" if value == 0 or 0.01 <= abs(value) < 1000 else f"{value:+.3g}"
    return text.replace("-", "−")


def sentence(c: Contrast, num_comparisons: int) -> str:
    """``c`` in words."""
    at = f"on {c.tag} at step {c.step}"
    size, n = number(c.difference.mean), c.difference.n
    if math.isnan(c.p) and n > 1:
        return (
            f"{c.group} − {c.baseline} is {size} {at} in each of {n} seeds: without any spread there is no interval, "
            "and no difference can be told from chance."
        )
    if math.isnan(c.p):
        return (
            f"{c.group} − {c.baseline} is {size} {at}, of one seed{'' if c.is_paired else ' each at least'}: "
            "without several seeds there is no interval, and no difference can be told."
        )
    how = f"{n} seeds, paired" if c.is_paired else f"at least {n} seeds each, none in common, so not paired"
    interval = f"{size}, 95 % interval {number(c.difference.low)} to {number(c.difference.high)}; {how}"
    adjusted = f", Holm's p over {num_comparisons} comparisons {c.adjusted_p:.2g}" if num_comparisons > 1 else ""
    if c.is_clear:
        high, low = (c.group, c.baseline) if c.difference.mean > 0 else (c.baseline, c.group)
        ahead = "ahead of" if HIGH_IS_GOOD.fullmatch(c.tag) else "higher than"
        return f"{high} is {ahead} {low} {at} ({interval}; p = {c.p:.2g}{adjusted})."
    if c.p < LEVEL:
        return (
            f"{c.group} and {c.baseline} cannot be told apart {at}: the interval alone excludes 0 ({interval}), "
            f"but of {num_comparisons} comparisons one may do so by chance (p = {c.p:.2g}{adjusted})."
        )
    return f"No difference between {c.group} and {c.baseline} can be told {at}: the interval includes 0 ({interval})."
