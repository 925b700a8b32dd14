"""Curves of several seeds: where they can be compared, over which axis, and how soon they reach a target. Pure."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import exp, log

from gopo_lightning.evaluation.event_files import Curve, Run
from gopo_lightning.evaluation.intervals import Interval, student

Points = Sequence[tuple[float, float]]
"""(x, y) in the order of x."""


def common_steps(curves: Sequence[Curve]) -> list[int]:
    """The steps at which all of ``curves`` have a value."""
    return sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []


def band(curves: Sequence[Curve]) -> dict[int, Interval]:
    """Mean and 95 % interval over ``curves``, at the steps that all have."""
    return {step: student([curve[step] for curve in curves]) for step in common_steps(curves)}


def interpolate(points: Points, x: float) -> float:
    """The value at ``x`` on straight lines between ``points``; beyond the ends, that of the end."""
    i = bisect_left(points, (x,))
    if i == 0:
        return points[0][1]
    if i == len(points):
        return points[-1][1]
    (x0, y0), (x1, y1) = points[i - 1], points[i]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def over(curve: Curve, axis: Curve) -> list[tuple[float, float]]:
    """``curve`` over another quantity than steps, which ``axis`` gives at the same or the surrounding steps."""
    steps = [(float(step), value) for step, value in axis.items()]
    return [(interpolate(steps, step), value) for step, value in curve.items()] if steps else []


def resampled_band(curves: Sequence[Points], num_points: int = 60) -> list[tuple[float, Interval]]:
    """Mean and interval over ``curves``, which have values at different x, where all of them are known.

    Between two of its values a curve is taken to be a straight line.
    """
    if not curves or not all(curves):
        return []
    low, high = max(points[0][0] for points in curves), min(points[-1][0] for points in curves)
    if low > high:
        return []
    xs = [low + (high - low) * i / (num_points - 1) for i in range(num_points)] if high > low else [low]
    return [(x, student([interpolate(points, x) for points in curves])) for x in xs]


def sampled_tokens(run: Run) -> Curve:
    """Completion tokens that training has sampled until each step, over all ranks; those of validation do not count.

    Of a rollout they are tokens per second × seconds, both of which are logged; float32 leaves them right to 1e-6. A
    rollout that was not logged (`log_every_n_steps` > 1) counts like the next one that was.
    """
    rates, seconds = (run.scalars.get(tag, {}) for tag in ("throughput/rollout_tokens_per_second", "seconds/rollout"))
    total, before, tokens = 0.0, 0, {0: 0.0}
    updates = updates_per_rollout(run.config)
    for step in common_steps([rates, seconds]):
        total += round(rates[step] * seconds[step]) * max(1, round((step - before) / updates))
        tokens[step], before = total, step
    return tokens if total else {}


def updates_per_rollout(config: Mapping[str, object]) -> int:
    """Optimiser steps of one rollout: `update.num_inner_epochs` × `update.num_minibatches`."""
    node: object = config
    for key in ("model", "init_args", "update"):
        node = node.get(key) if isinstance(node, Mapping) else None
    update = node if isinstance(node, Mapping) else {}
    return int(update.get("num_inner_epochs", 1)) * int(update.get("num_minibatches", 1))


def steps_to(curve: Curve, target: float) -> float | None:
    """The first step at which ``curve`` is at or above ``target``, on straight lines; None if it never is."""
    items = list(curve.items())
    if items and items[0][1] >= target:
        return float(items[0][0])
    for (x0, y0), (x1, y1) in pairwise(items):
        if y1 >= target:
            return x0 + (x1 - x0) * (target - y0) / (y1 - y0)
    return None


@dataclass(frozen=True)
class StepsRatio:
    """How many steps a group needs for what the baseline had at its end: ½ is in half the steps."""

    ratio: Interval | None
    """Geometric mean over pairs, and its interval unless a run never got there: then a lower bound without interval."""
    never: int
    """Pairs whose run never got there. It counts with all its steps, which is less than it would have needed."""
    without_target: int
    """Pairs whose baseline ended no better than it began: there is nothing to reach, so they do not count."""


def steps_ratio(runs: Sequence[Curve], baselines: Sequence[Curve]) -> StepsRatio:
    """Pair by pair: steps of a run until it reaches what its baseline had at its end, over those of the baseline.

    Both count until they first get there, so that luck at single steps helps both alike.
    """
    logs, never, without_target = [], 0, 0
    for run, baseline in zip(runs, baselines, strict=True):
        values = list(baseline.values())
        reached = steps_to(baseline, values[-1]) if values else None
        if not run or not values or not reached or values[-1] <= values[0]:
            without_target += 1
            continue
        steps = steps_to(run, values[-1])
        if steps is None:
            never += 1
            steps = float(max(run))
        logs.append(log(max(steps, 1.0) / reached))
    if not logs:
        return StepsRatio(None, never, without_target)
    mean = student(logs)
    bounds = (exp(mean.low), exp(mean.high)) if not never else (float("nan"), float("nan"))
    return StepsRatio(Interval(exp(mean.mean), *bounds, mean.n), never, without_target)
